"""What version 0.1.0 left is still read: its checkpoints, its records, and its runs' files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nuteprune import load_pruned
from nuteprune.export.loading import load_config
from nuteprune.export.modeling_pruned import PrunedLlamaForCausalLM
from tests.conftest import Run, json_line

# As 0.1.0 wrote them, after six steps with settings that later versions may not know.
LAYERS = [(4, 2, 40), (2, 1, 32), (4, 2, 16)]
CONFIG: dict[str, Any] = {
    "allow_global_per_layer_attribute_access": True,
    "architectures": ["PrunedLlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "modeling_pruned.PrunedLlamaConfig",
        "AutoModel": "modeling_pruned.PrunedLlamaModel",
        "AutoModelForCausalLM": "modeling_pruned.PrunedLlamaForCausalLM",
    },
    "bos_token_id": 1,
    "dtype": "float32",
    "eos_token_id": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "mlp_bias": False,
    "model_type": "pruned_llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "per_layer_config": {
        "1": {"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1},
        "2": {"intermediate_size": 16},
    },
    "pretraining_tp": 1,
    "pruned": {
        "blocks": {
            "attention": {
                "modules": ["self_attn"],
                "norms": ["input_layernorm"],
                "projections": {
                    "self_attn.k_proj": "hidden -> kv",
                    "self_attn.o_proj": "q -> hidden",
                    "self_attn.q_proj": "hidden -> q",
                    "self_attn.v_proj": "hidden -> kv",
                },
            },
            "mlp": {
                "modules": ["mlp"],
                "norms": ["post_attention_layernorm"],
                "projections": {
                    "mlp.down_proj": "neurons -> hidden",
                    "mlp.gate_proj": "hidden -> neurons",
                    "mlp.up_proj": "hidden -> neurons",
                },
            },
        },
        "counts": {
            "heads": "num_attention_heads",
            "kv_heads": "num_key_value_heads",
            "neurons": "intermediate_size",
        },
        "layers": "model.layers",
    },
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "transformers_version": "5.24.0",
    "use_cache": True,
    "vocab_size": 300,
}
CHOSEN: dict[str, Any] = {
    "importance": "fisher",
    "gate_type": "hard_concrete",
    "solved_schedule": False,
    "calibration_blocks": 2,
    "gate_learning_rate": 0.05,
    "kd_temperature": 2.0,
    "lm_weight": 0.1,
    "compensation_blocks": 2,
    "neuron_multiple": 8,
}
RECORD: dict[str, Any] = {
    "schema": 1,
    "target": 0.3,
    "sparsity": 0.3,
    "total_sparsity": 0.1627731725697061,
    "params": {"before": 42464, "blocks_before": 23040, "after": 35552, "blocks_after": 16128},
    "layers": [
        {"heads": heads, "kv_heads": kv_heads, "neurons": neurons, "attention": True, "mlp": True}
        for heads, kv_heads, neurons in LAYERS
    ],
    "hidden": {"before": 32, "after": 32},
    "layers_before": [{"heads": 4, "kv_heads": 2, "neurons": 48}] * 3,
    "shapes": "free",
    "teachers": {"count": 1, "sparsities": [0.018300890922546387]},
    "bad_steps": 0,
    "seed": 42,
    "base_model": "owner/model",
    "config": {
        "model": "owner/model",
        "data": "text.txt",
        "length": 24,
        "eval_blocks": 2,
        "device": "cpu",
        "dtype": "float32",
        "target_sparsity": 0.3,
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "save_steps": 3,
        "save_total_limit": 2,
        **CHOSEN,
    },
    "perplexity": {
        "before": {"text.txt": 782.7564202884678},
        "after": {"text.txt": 745.0023688938749},
        "protocol": {
            "measure": "exp of the mean next-token negative log-likelihood (float32), all tokens "
            "of a block but the first predicted",
            "text": "held-out documents of each source, never trained on, in the source's order",
            "joining": "tokenized without special tokens, joined by eos (else bos, else nothing)",
            "mean": "plain mean over the sources",
            "block_length": {"text.txt": 24},
            "block_count": {"text.txt": 2},
        },
    },
    "seconds": 4.1,
    "license": None,
    "bytes_on_disk": 145256,
    "peak_memory_bytes": 627437568,
    "versions": {
        "python": "3.11.7",
        "nuteprune": "0.1.0",
        "torch": "2.13.0",
        "transformers": "5.24.0",
        "peft": "0.21.2",
    },
}
SETTINGS: dict[str, Any] = {
    "model": "owner/model",
    "data": "text.txt",
    "text_column": None,
    "length": 24,
    "bits": None,
    "dtype": "float32",
    "sparsity": [0.3],
    "gates": ["kv_groups", "neurons"],
    "compensation": "start",
    "freeze_share": 0.5,
    "hidden_multiple": 64,
    "layer_term": "relative",
    "layer_weight": 1.0,
    "lora_alpha": 32,
    "lora_rank": 32,
    "lora_targets": "all",
    "method": "nuteprune",
    "ramp_power": 1.0,
    "ramp_share": 0.5,
    "score_decay": 0.99,
    "shape": None,
    "shapes": "free",
    "teachers": "numerous",
    "token_weight": 1.0,
    "warm_start": True,
    "seed": 42,
    "learning_rate": 0.002,
    "lr_scheduler_type": "polynomial",
    "lr_scheduler_kwargs": {"power": 0.5, "lr_end": 0.0},
    "warmup_steps": 0,
    "optim": "adamw_torch_fused",
    "optim_args": None,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-08,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    **CHOSEN,
}
STEP: dict[str, Any] = {
    "loss": 1.087367296218872,
    "grad_norm": 1.626883864402771,
    "learning_rate": 0.002,
    "token_kl": 0.28515586256980896,
    "layer": 0.15132109820842743,
    "lm": 0.6508902907371521,
    "penalty": 0.0,
    "lambda1": -0.04999999329447746,
    "lambda2": 0.04999992623925209,
    "sparsity": 0.018300890922546387,
    "target": 0.09999999999999998,
    "teacher": -1,
    "teachers": 1,
    "bad_steps": 0,
}


@pytest.fixture
def earlier(tiny_tokenizer, tmp_path: Path) -> Path:
    """A checkpoint and its run's files, all but the trainer's checkpoints."""
    out = tmp_path / "earlier"
    (out / "run").mkdir(parents=True)
    tiny_tokenizer.save_pretrained(out)
    (out / "config.json").write_text(json.dumps(CONFIG))
    (out / "nuteprune.json").write_text(json.dumps(RECORD))
    (out / "run" / "settings.json").write_text(json.dumps(SETTINGS))
    lines = [json.dumps({"step": step, **STEP}) + "\n" for step in range(1, 7)]
    (out / "run" / "metrics.jsonl").write_text("".join(lines))
    sample = {"prompt": "student 2.", "dense": "one", "pruned": "other"}
    (out / "run" / "samples.json").write_text(json.dumps([sample]))
    model = PrunedLlamaForCausalLM(load_config(out))
    save_file(dict(model.state_dict()), out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_it_loads_with_the_counts_that_it_states(earlier: Path) -> None:
    model = load_pruned(earlier)
    assert sum(x.numel() for x in model.parameters()) == RECORD["params"]["after"]
    for layer, (heads, kv_heads, neurons) in zip(model.model.layers, LAYERS, strict=True):
        assert layer.self_attn.q_proj.weight.shape == (8 * heads, 32)
        assert layer.self_attn.k_proj.weight.shape == (8 * kv_heads, 32)
        assert layer.mlp.up_proj.weight.shape == (neurons, 32)
    assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()


def test_it_is_inspected_and_reported(run: Run, earlier: Path) -> None:
    code, out, err = run("inspect", earlier, "--json")
    assert code == 0, err
    assert json_line(out)["sparsity"] == 0.3
    code, _, err = run("report", earlier / "run")
    assert code == 0, err
    page = (earlier / "run" / "report.html").read_text()
    assert "745.0" in page
    assert "fisher" in page  # its settings, under the names that they had


def test_it_is_recovered(run: Run, earlier: Path, text: Path, tmp_path: Path) -> None:
    command = ["recover", earlier, "--data", text, "--out", tmp_path / "better", "--steps", "2"]
    code, _, err = run(*command, "--length", "16", "--batch-size", "2", "--device", "cpu")
    assert code == 0, err
    record = json.loads((tmp_path / "better" / "nuteprune.json").read_text())
    assert record["recover"]["steps"] == 2
    assert record["layers"] == RECORD["layers"]
    assert record["config"] == RECORD["config"]
    model = load_pruned(tmp_path / "better")
    assert sum(x.numel() for x in model.parameters()) == RECORD["params"]["after"]

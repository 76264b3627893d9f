"""Pruned checkpoints in vLLM: greedy tokens and their log-probabilities as in transformers."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import nuteprune
from nuteprune.export.checkpoint import save
from nuteprune.export.clients import warnings
from nuteprune.export.gguf.refusals import ModelFacts
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.families import FAMILIES
from nuteprune.stages.write import read_written
from tests.greedy import continuation

pytestmark = pytest.mark.clients

SOURCE = Path(nuteprune.__file__).parents[1]

SIZES = {
    **{"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32},
    **{"intermediate_size": 192, "vocab_size": 128},
}
LESS = {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "head_dim")}
LATENTS = {
    **{"moe_intermediate_size": 64, "head_dim": 64, "num_key_value_heads": 8},
    **{"q_lora_rank": 96, "kv_lora_rank": 512, "v_head_dim": 128},
    **{"qk_rope_head_dim": 64, "qk_nope_head_dim": 128},
    # What checkpoints state, and transformers' class takes for granted.
    **{"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
}
DELTA_NET = {
    **{"moe_intermediate_size": 64, "shared_expert_intermediate_size": 96},
    # vLLM's CPU build runs recurrences with 64 or 128 features a head.
    **{"linear_num_key_heads": 1, "linear_key_head_dim": 128},
    **{"linear_num_value_heads": 2, "linear_value_head_dim": 128},
}
EXPERTS = {
    "qwen3_moe": {"mlp_only_layers": [], "moe_intermediate_size": 64, "num_local_experts": 8},
    "mixtral": {"intermediate_size": 64},
    "qwen2_moe": {
        **{"mlp_only_layers": [], "moe_intermediate_size": 64},
        "shared_expert_intermediate_size": 96,
    },
    "glm4_moe": {"moe_intermediate_size": 64},
    "gpt_oss": {"intermediate_size": 64, "sliding_window": 16, "head_dim": 64},
    "olmoe": {"num_key_value_heads": 8, "clip_qkv": None, "intermediate_size": 64},
    "granitemoe": {"intermediate_size": 64, "attention_multiplier": 0.18},
    "llama4_text": {
        **{"intermediate_size": 64, "intermediate_size_mlp": 192, "attention_bias": False},
        # vLLM finds layers with experts, and without rotary embedding, by their number.
        **{"num_hidden_layers": 4, "interleave_moe_layer_step": 2, "moe_layers": None},
        **{"no_rope_layers": [1, 1, 1, 0], "attention_chunk_size": 8192, "floor_scale": 8192},
    },
    "deepseek_v3": LATENTS,
    "qwen3_next": DELTA_NET
    | {"mlp_only_layers": [], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "qwen3_5_moe_text": DELTA_NET,
}
HEADS = ("kv_groups", "heads", "neurons")
PROMPT, STEPS = [40, 5, 77, 120, 9, 33, 25, 61, 14, 108, 99, 3], 8


def own_sizes(name: str) -> dict[str, Any]:
    """The sizes that a family's config knows of."""
    if name == "opt":
        return LESS | {"ffn_dim": 192, "word_embed_proj_dim": 256}
    if name in EXPERTS:
        return SIZES | EXPERTS[name]
    return SIZES if "kv_heads" in FAMILIES[name].config_names else LESS


@pytest.fixture(scope="module")
def client(
    python_of: Callable[[str], Path], make_client: type, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., dict[str, Any]]]:
    """Asks a vLLM that the tests share, since it takes long to import; a dead one is replaced."""
    clients: list[Any] = []

    def ask(**job: Any) -> dict[str, Any]:
        if not clients or clients[-1].process.poll() is not None:
            log = tmp_path_factory.mktemp("vllm") / "client.log"
            clients.append(make_client(python_of("vllm"), "vllm_client.py", log))
        answer: dict[str, Any] = clients[-1].ask(**job)
        return answer

    yield ask
    for each in clients:
        each.close()


def compare(
    model: PreTrainedModel,
    client: Callable[..., dict[str, Any]],
    folder: Path,
    *,
    implementation: str = "auto",
    dtype: torch.dtype = torch.float32,
    tolerance: float = 1e-3,
    **overrides: Any,
) -> None:
    """Compare greedy tokens and their log-probabilities with those of transformers in float32."""
    save(model.to(dtype), folder)
    model.float()
    tokens = torch.tensor([PROMPT])
    made = continuation(model, tokens, STEPS)
    with torch.no_grad():
        logits = model(torch.cat([tokens, made], 1)).logits
    scores, chosen = logits[0, len(PROMPT) - 1 : -1].log_softmax(-1), made[0]
    answer = client(
        folder=str(folder),
        remote_code=not Anatomy(model).shape.uniform,
        implementation=implementation,
        dtype=str(dtype).removeprefix("torch."),
        overrides=overrides,
        prompt=PROMPT,
        steps=STEPS,
    )
    assert answer["made"] == chosen.tolist()
    expected = scores.gather(-1, chosen[:, None])[:, 0]
    assert torch.allclose(torch.tensor(answer["logprobs"]), expected, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "gates", "shapes"),
    [
        ("llama", HEADS, "free"),
        ("llama", ("kv_groups", "neurons"), "free"),
        ("llama", ("kv_groups", "neurons"), "uniform"),
        ("llama", ("mlp_block",), "free"),
        ("llama", (*HEADS, "hidden"), "free"),
        ("mistral", HEADS, "free"),
        ("qwen2", HEADS, "free"),
        ("qwen3", HEADS, "free"),
        ("phi3", HEADS, "free"),
        ("gemma2", HEADS, "free"),
        ("gemma3_text", HEADS, "free"),
        ("granite", HEADS, "free"),
        ("gpt_neox", ("heads", "neurons"), "free"),
        ("opt", ("heads", "neurons"), "free"),
        ("qwen3_moe", ("experts", "kv_groups"), "uniform"),
        ("mixtral", ("experts", "expert_neurons", "kv_groups"), "uniform"),
        ("olmoe", ("experts",), "uniform"),
        ("qwen2_moe", ("experts", "neurons"), "uniform"),
        ("glm4_moe", ("experts", "kv_groups"), "uniform"),
        ("gpt_oss", ("experts",), "uniform"),
        ("granitemoe", ("experts", "expert_neurons"), "uniform"),
        ("llama4_text", ("experts", "kv_groups"), "uniform"),
        ("qwen3_moe", ("experts", "kv_groups"), "free"),
        ("mixtral", ("experts", "kv_groups"), "free"),
        ("glm4_moe", ("experts", "kv_groups"), "free"),
        ("gpt_oss", ("experts",), "free"),
        ("granitemoe", ("experts", "kv_groups"), "free"),
    ],
)
def test_greedy_tokens(
    name: str,
    gates: tuple[str, ...],
    shapes: str,
    tiny_model: Callable,
    prune_at_random: Callable,
    client: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    whole = tiny_model(name, **own_sizes(name))
    # So much that neither all groups nor all heads of a group are left alike.
    model = prune_at_random(whole, gates, shapes, share=0.3 if gates == HEADS else 0.5)
    shape = Anatomy(model).shape
    assert shape.uniform == (shapes == "uniform")
    assert (shape.hidden < SIZES["hidden_size"]) == ("hidden" in gates)
    implementation = "transformers" if shapes == "free" else "auto"
    compare(model, client, tmp_path / "model", implementation=implementation)


@pytest.mark.parametrize(
    ("name", "gates"),
    [
        ("qwen3_next", ("experts", "kv_groups")),
        ("qwen3_5_moe_text", ("experts", "expert_neurons", "neurons")),
    ],
)
def test_recurrent_layers(
    name: str,
    gates: tuple[str, ...],
    tiny_model: Callable,
    prune_at_random: Callable,
    client: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    """In bfloat16: vLLM's CPU build computes them in nothing else."""
    whole = tiny_model(name, **own_sizes(name))
    with torch.no_grad():  # so that rounding does not choose other tokens
        for path, parameter in whole.named_parameters():
            if ".layers." in path and parameter.dim() > 1 and "conv" not in path:
                parameter *= 0.25
    model = prune_at_random(whole, gates, "uniform")
    assert Anatomy(model).shape.uniform
    compare(model, client, tmp_path / "model", dtype=torch.bfloat16, tolerance=0.1)


@pytest.mark.parametrize("queries", [LATENTS["q_lora_rank"], None])
def test_latent_attention(
    queries: int | None,
    tiny_model: Callable,
    prune_at_random: Callable,
    client: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    """By the Transformers backend: the CPU build's own attention differs, of dense models too."""
    sizes = own_sizes("deepseek_v3") | {"q_lora_rank": queries}
    model = prune_at_random(tiny_model("deepseek_v3", **sizes), ("experts",), "uniform")
    assert Anatomy(model).shape.uniform
    compare(model, client, tmp_path / "model", implementation="transformers")


def test_what_is_said_of_heads_that_its_own_class_would_not_see(
    tiny_model: Callable,
    prune_at_random: Callable,
    client: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    whole = tiny_model("granitemoe", **own_sizes("granitemoe"))
    model = prune_at_random(whole, ("experts", "kv_groups"), "uniform")
    source = ModelFacts(FAMILIES["granitemoe"], model.config, Anatomy(model).shape, {})
    [line] = [x for x in warnings(source) if x.startswith("vLLM: ")]
    said = line.partition("; pass --model-impl transformers --hf-overrides ")[2]
    overrides = json.loads(said.strip("'"))
    compare(model, client, tmp_path / "model", implementation="transformers", **overrides)


def test_write_takes_it_as_the_engine(
    tiny_model, tiny_tokenizer, python_of, client_environment, tmp_path: Path
) -> None:
    sizes = SIZES | {"vocab_size": 320}
    model = tiny_model("llama", **sizes, max_position_embeddings=128)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer.backend_tokenizer,
        **{"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"},
    )
    folder, out = tmp_path / "model", tmp_path / "own.jsonl"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    command = [python_of("vllm"), "-m", "nuteprune.cli", "write", folder, "--engine", "vllm"]
    options = ["--tokens", "2000", "--length", "48", "--dtype", "float32", "--out", out]
    environment = client_environment(
        PYTHONPATH=str(SOURCE), HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="1"
    )
    subprocess.run([*map(str, command), *map(str, options)], env=environment, check=True)
    texts = read_written(out, model, tokenizer, tokens=2000)
    assert len({tuple(x) for x in texts}) == len(texts)
    assert max(map(len, texts)) == 47 + 1  # all of a block, and what ends it

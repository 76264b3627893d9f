"""GGUF exports in a real llama.cpp: tokens, logits and greedy continuations as in transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
)

import nuteprune
from nuteprune.data import demo as assets
from nuteprune.export.checkpoint import recount, save
from nuteprune.export.gguf.splits import PROBES
from nuteprune.export.gguf.write import write_gguf
from nuteprune.export.loading import load_pruned
from nuteprune.export.record import blocks_recount
from tests.greedy import continuation

pytestmark = pytest.mark.clients

BLOCKS = ("attn_block", "mlp_block")
FREE = ("kv_groups", "heads", "neurons", "hidden")
GROUPS = ("kv_groups", "neurons", "hidden")
GEMMA3_LAYERS = ["sliding_attention"] * 5 + ["full_attention"]
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e3,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 5e3,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.5],
    "long_factor": [2.0, 3.0],
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 4096,
}
LATENT_YARN = YARN | {"rope_theta": 1e4, "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 0.7}
LLAMA4 = {
    "num_hidden_layers": 4,
    "moe_layers": [1, 3],
    "no_rope_layers": [1, 1, 1, 0],
    "attention_chunk_size": 8192,
    "floor_scale": 8192,
    "attention_bias": False,
}
DELTA_NET = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_value_head_dim": 4,
}
SHARED = DELTA_NET | {"shared_expert_intermediate_size": 40}
QWEN3_NEXT = SHARED | {"mlp_only_layers": []}
# what is pruned: (model, config, gates, shapes) -> architecture
CASES: dict[str, tuple[str, dict[str, Any], tuple[str, ...], str, str]] = {
    "llama, uniform": ("llama", {}, ("kv_groups", "neurons", "hidden"), "uniform", "llama"),
    "llama, free": ("llama", {}, FREE, "free", "deci"),
    "llama, free, llama3 rope": ("llama", {"rope_parameters": LLAMA3_ROPE}, FREE, "free", "deci"),
    "llama, uniform, llama3 rope": (
        "llama",
        {"rope_parameters": LLAMA3_ROPE},
        ("neurons",),
        "uniform",
        "llama",
    ),
    "llama, linear rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e3}},
        ("neurons",),
        "uniform",
        "llama",
    ),
    "llama, biases": (
        "llama",
        {"attention_bias": True, "mlp_bias": True},
        ("neurons",),
        "uniform",
        "llama",
    ),
    "llama, attention biases, free": ("llama", {"attention_bias": True}, FREE, "free", "deci"),
    "llama, blocks": ("llama", {"num_hidden_layers": 8}, BLOCKS, "free", "deci"),
    "llama, everything": ("llama", {"num_hidden_layers": 8}, (*BLOCKS, *FREE), "free", "deci"),
    "llama_mha, free": ("llama_mha", {}, ("heads", "neurons"), "free", "deci"),
    "mistral, free": ("mistral", {"sliding_window": None}, FREE, "free", "deci"),
    "mistral, uniform, window": (
        "mistral",
        {"sliding_window": 24},
        ("neurons",),
        "uniform",
        "llama",
    ),
    "qwen2, uniform neurons": ("qwen2", {}, ("neurons",), "uniform", "qwen2"),
    "qwen2, uniform heads": ("qwen2", {}, ("kv_groups", "neurons", "hidden"), "uniform", "llama"),
    "qwen2, free": ("qwen2", {}, FREE, "free", "deci"),
    "qwen3, uniform": ("qwen3", {}, ("kv_groups", "neurons", "hidden"), "uniform", "qwen3"),
    "qwen3, free": ("qwen3", {"tie_word_embeddings": True}, FREE, "free", "openelm"),
    "qwen3, blocks": (
        "qwen3",
        {"tie_word_embeddings": True, "num_hidden_layers": 8},
        BLOCKS,
        "free",
        "openelm",
    ),
    "phi3, uniform neurons": ("phi3", {}, ("neurons",), "uniform", "phi3"),
    "phi3, long rope": ("phi3", {"rope_parameters": LONG_ROPE}, ("neurons",), "uniform", "phi3"),
    "phi3, uniform heads": (
        "phi3",
        {"rope_parameters": {"rope_theta": 5e3}},
        ("kv_groups", "neurons"),
        "uniform",
        "llama",
    ),
    "phi3, free": ("phi3", {"rope_parameters": {"rope_theta": 5e3}}, FREE, "free", "deci"),
    "gemma2, uniform": (
        "gemma2",
        {"tie_word_embeddings": True, "query_pre_attn_scalar": 12},
        ("kv_groups", "neurons", "hidden"),
        "uniform",
        "gemma2",
    ),
    "gemma3, uniform": (
        "gemma3_text",
        {
            "tie_word_embeddings": True,
            "num_hidden_layers": 6,
            "layer_types": GEMMA3_LAYERS,
            "query_pre_attn_scalar": 12,
        },
        ("kv_groups", "neurons", "hidden"),
        "uniform",
        "gemma3",
    ),
    "granite, uniform": ("granite", {}, ("kv_groups", "neurons", "hidden"), "uniform", "granite"),
    "granite, free": (
        "granite",
        {"mlp_bias": False, "tie_word_embeddings": True},
        FREE,
        "free",
        "deci",
    ),
    "gpt_neox, uniform": ("gpt_neox", {}, ("neurons",), "uniform", "gptneox"),
    "seed_oss, uniform": ("seed_oss", {}, GROUPS, "uniform", "llama"),
    "seed_oss, free": ("seed_oss", {"attention_out_bias": False}, FREE, "free", "deci"),
    "ernie4_5, uniform": ("ernie4_5", {"tie_word_embeddings": True}, GROUPS, "uniform", "llama"),
    "ernie4_5, free": ("ernie4_5", {"use_bias": False}, FREE, "free", "deci"),
    "ministral, uniform": ("ministral", {"sliding_window": 24}, GROUPS, "uniform", "llama"),
    "helium, free": ("helium", {}, FREE, "free", "deci"),
    "helium, blocks": ("helium", {"num_hidden_layers": 8}, BLOCKS, "free", "deci"),
    "smollm3, uniform": (
        "smollm3",
        {"no_rope_layer_interval": 4, "num_hidden_layers": 4},
        GROUPS,
        "uniform",
        "smollm3",
    ),
    "arcee, uniform": ("arcee", {"mlp_bias": False}, GROUPS, "uniform", "arcee"),
    "hunyuan, uniform": ("hunyuan_v1_dense", {}, GROUPS, "uniform", "hunyuan-dense"),
    "gemma, uniform": ("gemma", {"tie_word_embeddings": True}, GROUPS, "uniform", "gemma"),
    "glm, uniform": ("glm", {}, ("neurons",), "uniform", "chatglm"),
    "glm4, uniform": ("glm4", {}, GROUPS, "uniform", "glm4"),
    "exaone4, uniform": (
        "exaone4",
        {"sliding_window": None, "layer_types": ["full_attention"] * 3},
        ("neurons",),
        "uniform",
        "exaone4",
    ),
    "olmo, uniform": ("olmo", {}, ("neurons",), "uniform", "olmo"),
    "olmo2, uniform": ("olmo2", {"attention_bias": False}, ("neurons",), "uniform", "olmo2"),
    "starcoder2, uniform": ("starcoder2", {}, ("neurons",), "uniform", "starcoder2"),
    "nemotron, uniform": ("nemotron", {}, ("neurons",), "uniform", "nemotron"),
    "stablelm, uniform": ("stablelm", {}, ("neurons",), "uniform", "stablelm"),
    "phi, uniform": ("phi", {}, ("neurons",), "uniform", "phi2"),
    "cohere, uniform": (
        "cohere",
        {"tie_word_embeddings": True},
        ("neurons",),
        "uniform",
        "command-r",
    ),
    "cohere2, uniform": (
        "cohere2",
        {
            "tie_word_embeddings": True,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        },
        ("neurons",),
        "uniform",
        "cohere2",
    ),
    "mixtral": (
        "mixtral",
        {},
        ("experts", "expert_neurons", "kv_groups", "hidden"),
        "uniform",
        "llama",
    ),
    "olmoe": (
        "olmoe",
        {"clip_qkv": None, "num_key_value_heads": 4},
        ("experts", "expert_neurons"),
        "uniform",
        "olmoe",
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {"mlp_only_layers": []},
        ("experts", "expert_neurons", "kv_groups", "hidden"),
        "uniform",
        "qwen3moe",
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {"mlp_only_layers": []},
        ("experts", "neurons"),
        "uniform",
        "qwen2moe",
    ),
    "lfm2": ("lfm2", {}, ("neurons",), "uniform", "lfm2"),
    "falcon_h1": (
        "falcon_h1",
        {
            **{"mamba_norm_before_gate": False, "mamba_n_groups": 2, "embedding_multiplier": 1.7},
            **{"mlp_multipliers": [0.6, 1.4], "ssm_in_multiplier": 1.2},
            "attention_in_multiplier": 0.9,
        },
        ("kv_groups", "neurons", "hidden"),
        "uniform",
        "falcon-h1",
    ),
    "falcon_h1, no norm": (
        "falcon_h1",
        {"mamba_rms_norm": False, "tie_word_embeddings": True},
        ("heads",),
        "uniform",
        "falcon-h1",
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        {"mamba_n_groups": 2},
        ("kv_groups", "neurons"),
        "uniform",
        "granitehybrid",
    ),
    "granitemoehybrid, rope": (
        "granitemoehybrid",
        {"position_embedding_type": "rope", "attention_multiplier": 0.3},
        ("heads",),
        "uniform",
        "granitehybrid",
    ),
    "granitemoehybrid, no recurrent layers": (
        "granitemoehybrid",
        {"layer_types": ["attention"] * 3, "position_embedding_type": "rope"},
        ("kv_groups", "neurons"),
        "uniform",
        "granite",
    ),
    "granitemoehybrid, no positions": (
        "granitemoehybrid",
        {"layer_types": ["attention"] * 3, "position_embedding_type": "nope"},
        ("kv_groups", "neurons"),
        "uniform",
        "granite",
    ),
    "granitemoehybrid, no recurrent layers, free": (
        "granitemoehybrid",
        {"layer_types": ["attention"] * 3, "position_embedding_type": "rope"},
        ("kv_groups", "neurons"),
        "free",
        "deci",
    ),
    "granitemoe": ("granitemoe", {}, ("experts", "expert_neurons"), "uniform", "granitemoe"),
    "glm4_moe": ("glm4_moe", {}, ("experts", "kv_groups", "hidden"), "uniform", "glm4moe"),
    "glm4_moe, biases": (
        "glm4_moe",
        {"attention_bias": True, "use_qk_norm": False, "first_k_dense_replace": 2},
        ("experts", "kv_groups"),
        "uniform",
        "glm4moe",
    ),
    "gpt_oss": (
        "gpt_oss",
        {"rope_parameters": YARN, "head_dim": 64},
        ("experts", "kv_groups", "hidden"),
        "uniform",
        "gpt-oss",
    ),
    "gpt_oss, thinner": (
        "gpt_oss",
        {"rope_parameters": YARN, "head_dim": 64},
        ("expert_neurons", "heads"),
        "uniform",
        "gpt-oss",
    ),
    "llama4": ("llama4_text", LLAMA4, ("experts", "kv_groups", "hidden"), "uniform", "llama4"),
    "llama4, llama3 rope": (
        "llama4_text",
        LLAMA4 | {"moe_layers": [0, 1, 2, 3], "rope_parameters": LLAMA3_ROPE},
        ("experts", "heads"),
        "uniform",
        "llama4",
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {"rms_norm_eps": 1e-3},
        ("experts", "hidden"),
        "uniform",
        "deepseek2",
    ),
    "deepseek_v3, yarn": (
        "deepseek_v3",
        {"rope_parameters": LATENT_YARN, "first_k_dense_replace": 0},
        ("experts",),
        "uniform",
        "deepseek2",
    ),
    "deepseek_v3, direct queries": (
        "deepseek_v3",
        {"q_lora_rank": None, "num_hidden_layers": 27},
        ("experts",),
        "uniform",
        "deepseek2",
    ),
    "deepseek_v3, groups": ("deepseek_v3", {"n_group": 2}, ("hidden",), "uniform", "deepseek2"),
    "qwen3_next": (
        "qwen3_next",
        QWEN3_NEXT,
        ("experts", "expert_neurons", "neurons", "hidden"),
        "uniform",
        "qwen3next",
    ),
    "qwen3_next, heads": (
        "qwen3_next",
        QWEN3_NEXT,
        ("kv_groups", "expert_neurons"),
        "uniform",
        "qwen3next",
    ),
    "qwen3_5": (
        "qwen3_5_text",
        DELTA_NET | {"linear_num_value_heads": 6},
        ("kv_groups", "neurons", "hidden"),
        "uniform",
        "qwen35",
    ),
    "qwen3_5_moe": (
        "qwen3_5_moe_text",
        SHARED,
        ("experts", "expert_neurons", "neurons", "kv_groups"),
        "uniform",
        "qwen35moe",
    ),
}
PROMPT = [40, 5, 77, 120, 9, 33, 250, 61, 14, 208, 99, 3]
STEPS = 8


@torch.no_grad()
def expected(model: PreTrainedModel) -> tuple[np.ndarray, list[int]]:
    """The last logits of the prompt, and its greedy continuation."""
    tokens = torch.tensor([PROMPT])
    logits = model(tokens).logits[0, -1]
    made = continuation(model, tokens, STEPS, eos_token_id=None)
    return logits.numpy(), made[0].tolist()


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_tokens(
    name: str,
    tiny_model: Callable,
    tiny_tokenizer: Any,
    prune_at_random: Callable,
    start: Callable,
    tmp_path: Path,
) -> None:
    model_name, config, kinds, shapes, arch = CASES[name]
    model = prune_at_random(tiny_model(model_name, vocab_size=300, **config), kinds, shapes)
    written = write_gguf(model, tiny_tokenizer, tmp_path / "m.gguf", type_name="f32")
    assert written.arch == arch
    logits, made = expected(model)
    answer = start("llama-cpp", "llama_cpp_client.py").ask(
        file=str(tmp_path / "m.gguf"),
        prompt=PROMPT,
        steps=STEPS,
        texts=PROBES,
        hybrid=arch in ("lfm2", "qwen3next", "qwen35moe"),
    )
    error = np.abs(np.array(answer["logits"]) - logits).max()
    # gpt_neox: llama.cpp approximates its GELU by tanh
    assert error <= (1e-2 if model_name == "gpt_neox" else 2e-3) * np.abs(logits).max()
    assert answer["made"] == made
    assert answer["texts"] == [
        tiny_tokenizer(text, add_special_tokens=False).input_ids for text in PROBES
    ]


# error of the last logits, relative to the largest; llama.cpp rounds activations too
TYPES = {"f16": 5e-3, "bf16": 3e-2, "q8_0": 0.1, "q4_0": 0.6}


def test_stored_types(
    tiny_model: Callable,
    tiny_tokenizer: Any,
    prune_at_random: Callable,
    start: Callable,
    tmp_path: Path,
) -> None:
    model = prune_at_random(tiny_model("llama", vocab_size=300), ("neurons",), "free")
    logits, _ = expected(model)
    client = start("llama-cpp", "llama_cpp_client.py")
    errors = {}
    for type_name in TYPES:
        path = tmp_path / f"{type_name}.gguf"
        write_gguf(model, tiny_tokenizer, path, type_name=type_name)
        answer = client.ask(file=str(path), prompt=PROMPT, steps=1)
        error = np.abs(np.array(answer["logits"]) - logits).max()
        errors[type_name] = error / np.abs(logits).max()
    assert all(errors[x] <= TYPES[x] for x in TYPES), errors


def test_sentencepiece_tokens(
    tiny_model: Callable, sentencepiece_tokenizer: Any, start: Callable, tmp_path: Path
) -> None:
    texts = [*PROBES, "the student learns from a teacher that is a little less pruned"]
    path = tmp_path / "m.gguf"
    write_gguf(tiny_model("llama", vocab_size=300), sentencepiece_tokenizer, path)
    answer = start("llama-cpp", "llama_cpp_client.py").ask(
        file=str(path), prompt=PROMPT, steps=1, texts=texts
    )
    assert answer["texts"] == [
        sentencepiece_tokenizer(text, add_special_tokens=False).input_ids for text in texts
    ]


@pytest.mark.network
def test_tokens_of_a_smaller_vocabulary(start: Callable, tmp_path: Path) -> None:
    """`nuteprune vocab` on the real model, then GGUF: spelled as the tokenizer beside it spells."""
    small = tmp_path / "small"
    nuteprune.vocab("demo", keep=8192, data="demo", out=small, quiet=True)
    tokenizer = AutoTokenizer.from_pretrained(small)
    model = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    assert len(tokenizer) <= model.get_input_embeddings().weight.shape[0] < 8500
    write_gguf(model, tokenizer, tmp_path / "m.gguf", type_name="f16")
    texts = [x[-1][:2000] for x in assets.documents().values()]
    texts += [*PROBES, "def f(x):\n    return {x: 'äöü 漢字 🙂'}\n\n\t# 1,234.56 "]
    prompt = tokenizer("The history of bread begins").input_ids
    answer = start("llama-cpp", "llama_cpp_client.py").ask(
        file=str(tmp_path / "m.gguf"), prompt=prompt, steps=1, texts=texts
    )
    assert answer["texts"] == [tokenizer(x, add_special_tokens=False).input_ids for x in texts]


@pytest.mark.network
@pytest.mark.parametrize("shapes", ["free", "uniform"])
def test_a_real_model_without_a_quarter_of_its_decoder(
    shapes: str, prune_at_random: Callable, start: Callable, tmp_path: Path
) -> None:
    folder = assets.model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    whole = load_pruned(folder, dtype=torch.float32)
    before = blocks_recount(recount(folder)["tensors"], "llama")
    # 90 % may go at most, so 28 % of that is a quarter of all.
    small = prune_at_random(whole, ("kv_groups", "neurons"), shapes, share=0.28)
    save(small, tmp_path / "model", tokenizer)
    after = blocks_recount(recount(tmp_path / "model")["tensors"], "llama")
    assert 0.25 <= (before - after) / before < 0.26
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", trust_remote_code=shapes == "free"
    )
    assert (type(model) is LlamaForCausalLM) == (shapes == "uniform")
    write_gguf(model, tokenizer, tmp_path / "m.gguf", type_name="f16")
    texts = [x[0][:2000] for x in assets.documents().values()]
    prompt = tokenizer("The history of bread begins").input_ids
    made = continuation(model, torch.tensor([prompt]), 16)
    answer = start("llama-cpp", "llama_cpp_client.py").ask(
        file=str(tmp_path / "m.gguf"), prompt=prompt, steps=16, texts=[*texts, *PROBES]
    )
    assert answer["made"] == made[0].tolist()
    assert answer["texts"] == [
        tokenizer(x, add_special_tokens=False).input_ids for x in [*texts, *PROBES]
    ]

"""GGUF files read back: by transformers' own GGUF loader, and by value with the gguf package."""

from __future__ import annotations

import copy
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, TokenType, quants
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

from nuteprune.errors import UserError
from nuteprune.export.checkpoint import assemble
from nuteprune.export.gguf import write as export
from nuteprune.export.gguf.architectures import ARCHITECTURES
from nuteprune.export.gguf.rows import BLOCK, check_super_blocks, padded_shape, torn_rows
from nuteprune.export.gguf.splits import IGNORE_MERGES, PROBES, SPLITS, find_split
from nuteprune.export.gguf.tokenizer import KEY, check_vocabulary, name_that_strips
from nuteprune.export.gguf.tokenizer import read_vocabulary as read
from nuteprune.export.gguf.write import read_keys, write_gguf
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.families import FAMILIES
from nuteprune.model.shape import LayerShape, Shape
from nuteprune.train.config import NutePruneConfig
from nuteprune.train.constraints import make_allocator
from tests.conftest import json_line
from tests.forked import python

VOCAB = 300
TOKENS = torch.tensor([[40, 5, 77, 120, 9, 33, 250, 61, 14, 208, 99, 3]])
UNIFORM = ("kv_groups", "neurons", "hidden")
FREE = ("kv_groups", "heads", "neurons", "hidden")
GEMMA3 = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    "tie_word_embeddings": True,
}
PLAIN_ROPE = {"rope_parameters": {"rope_theta": 5e3}}


@pytest.fixture
def make(tiny_model: Callable, prune_at_random: Callable) -> Callable[..., PreTrainedModel]:
    """`make(name, gates, shapes, **config)`: a pruned tiny model; without gates a whole one."""

    def model(
        name: str, gates: tuple[str, ...] = (), shapes: str = "free", **config: Any
    ) -> PreTrainedModel:
        whole = tiny_model(name, **{"vocab_size": VOCAB} | config)
        return prune_at_random(whole, gates, shapes) if gates else whole

    return model


def dequantized(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a GGUF file by name, in float32, as rows of outputs."""
    return {
        x.name: np.asarray(quants.dequantize(x.data, x.tensor_type), np.float32)
        for x in GGUFReader(path).tensors
    }


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(TOKENS).logits


# --- what is in the file ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "gates", "arch", "config"),
    [
        ("llama", UNIFORM, "llama", {}),
        ("llama_mha", ("neurons",), "llama", {}),
        ("llama", (), "llama", {}),
        ("mistral", UNIFORM, "llama", {"sliding_window": None}),
        ("qwen2", ("neurons",), "qwen2", {}),
        ("qwen3", UNIFORM, "qwen3", {}),
        ("phi3", ("neurons",), "phi3", {}),
        ("gemma2", UNIFORM, "gemma2", {"tie_word_embeddings": True}),
        ("gemma3_text", UNIFORM, "gemma3", GEMMA3),
    ],
)
def test_transformers_reads_the_tensors_of_stock_architectures(
    name: str,
    gates: tuple[str, ...],
    arch: str,
    config: dict[str, Any],
    make: Callable,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    how = {}
    if name.startswith("gemma"):  # what llama.cpp computes is scaled by head_dim
        config = config | {"query_pre_attn_scalar": 8}
    model = make(name, gates, "uniform", **config)
    if name.startswith(("gemma", "phi3", "qwen3")):  # of which transformers reads not all keys
        how = {"config": copy.deepcopy(model.config)}
    assert write_gguf(model, tiny_tokenizer, tmp_path / "m.gguf", type_name="f32").arch == arch
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32, **how
    ).eval()
    assert logits(model).std() > 0.1
    assert torch.allclose(logits(theirs), logits(model), atol=1e-4)


def unshuffled(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's rows of queries or keys in the order that transformers has."""
    head_dim = len(rows) // heads
    found = np.empty_like(rows)
    for head in range(heads):
        for j in range(head_dim):
            half, pair = divmod(j, head_dim // 2)
            found[head * head_dim + j] = rows[head * head_dim + 2 * pair + half]
    return found


def assert_same(ours: np.ndarray, theirs: torch.Tensor) -> None:
    np.testing.assert_array_equal(ours, theirs.detach().numpy())


def assert_close(found: np.ndarray, expected: torch.Tensor) -> None:
    """Check values that were computed: equal but for rounding."""
    np.testing.assert_allclose(found, expected.detach(), rtol=1e-6)


def test_deci_has_counts_and_tensors_by_layer(
    make: Callable, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = make("llama", FREE, attention_bias=True)
    layers = Anatomy(model).shape.layers
    assert len(set(layers)) > 1
    written = write_gguf(model, tiny_tokenizer, tmp_path / "m.gguf", type_name="f32")
    keys, found = read_keys(tmp_path / "m.gguf"), dequantized(tmp_path / "m.gguf")
    assert (written.arch, keys["general.architecture"]) == ("deci", "deci")
    assert keys["deci.attention.head_count"] == [x.heads for x in layers]
    assert keys["deci.attention.head_count_kv"] == [x.kv_heads for x in layers]
    assert keys["deci.feed_forward_length"] == [x.neurons for x in layers]
    assert keys["deci.embedding_length"] == model.config.hidden_size
    assert keys["deci.attention.key_length"] == keys["deci.rope.dimension_count"] == 8
    assert keys["deci.rope.freq_base"] == model.config.rope_parameters["rope_theta"]
    epsilon = keys["deci.attention.layer_norm_rms_epsilon"]
    assert epsilon == pytest.approx(model.config.rms_norm_eps, rel=1e-6)
    for i, (layer, shape) in enumerate(zip(model.model.layers, layers, strict=True)):
        attention, mlp, blk = layer.self_attn, layer.mlp, f"blk.{i}"
        for kind in ("weight", "bias"):
            q, k = found[f"{blk}.attn_q.{kind}"], found[f"{blk}.attn_k.{kind}"]
            assert_same(unshuffled(q, shape.heads), getattr(attention.q_proj, kind))
            assert_same(unshuffled(k, shape.kv_heads), getattr(attention.k_proj, kind))
            assert_same(found[f"{blk}.attn_v.{kind}"], getattr(attention.v_proj, kind))
            assert_same(found[f"{blk}.attn_output.{kind}"], getattr(attention.o_proj, kind))
        assert_same(found[f"{blk}.ffn_gate.weight"], mlp.gate_proj.weight)
        assert_same(found[f"{blk}.ffn_up.weight"], mlp.up_proj.weight)
        assert_same(found[f"{blk}.ffn_down.weight"], mlp.down_proj.weight)
        assert_same(found[f"{blk}.ffn_norm.weight"], layer.post_attention_layernorm.weight)
    assert_same(found["token_embd.weight"], model.model.embed_tokens.weight)
    assert_same(found["output.weight"], model.lm_head.weight)
    assert len(found) == written.tensors == 3 + 3 * (2 * 4 + 3 + 2)
    assert written.parameters == sum(p.numel() for p in model.parameters())


def test_openelm_stacks_queries_keys_and_values(
    make: Callable, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = make("qwen3", FREE, tie_word_embeddings=True)
    assert write_gguf(model, tiny_tokenizer, tmp_path / "m.gguf", type_name="f32").arch == "openelm"
    found = dequantized(tmp_path / "m.gguf")
    assert "output.weight" not in found
    for i, layer in enumerate(model.model.layers):
        x = layer.self_attn
        stacked = torch.cat([x.q_proj.weight, x.k_proj.weight, x.v_proj.weight])
        assert_same(found[f"blk.{i}.attn_qkv.weight"], stacked)
        assert_same(found[f"blk.{i}.attn_q_norm.weight"], x.q_norm.weight)


def test_gptneox_stacks_what_lies_interleaved(
    make: Callable, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = make("gpt_neox", ("neurons",), "uniform")
    write_gguf(model, tiny_tokenizer, tmp_path / "m.gguf", type_name="f32")
    keys, found = read_keys(tmp_path / "m.gguf"), dequantized(tmp_path / "m.gguf")
    fused = model.gpt_neox.layers[1].attention.query_key_value
    for kind in ("weight", "bias"):
        parts = getattr(fused, kind).unflatten(0, (4, 3, 8))  # heads; q, k, v; head_dim
        assert_same(found[f"blk.1.attn_qkv.{kind}"], parts.transpose(0, 1).flatten(0, 2))
    assert keys["gptneox.use_parallel_residual"] is True
    assert keys["gptneox.rope.dimension_count"] == 2


def test_granite_states_its_multipliers_or_has_them_folded_in(
    make: Callable, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    free = {"mlp_bias": False, "attention_bias": False, "tie_word_embeddings": True}
    uniform = make("granite", UNIFORM, "uniform")
    write_gguf(uniform, tiny_tokenizer, tmp_path / "u.gguf", type_name="f32")
    keys = read_keys(tmp_path / "u.gguf")
    assert [keys[f"granite.{x}_scale"] for x in ("embedding", "residual", "logit")] == [2, 0.5, 4]
    model = make("granite", FREE, **free)
    write_gguf(model, tiny_tokenizer, tmp_path / "f.gguf", type_name="f32")
    found = dequantized(tmp_path / "f.gguf")
    embedding = model.model.embed_tokens.weight
    assert_same(found["token_embd.weight"], 2 * embedding)
    assert_same(found["output.weight"], embedding / 4)
    assert_same(found["blk.0.ffn_down.weight"], 0.5 * model.model.layers[0].mlp.down_proj.weight)


def test_gpt_oss_has_halves_biases_and_sinks_apart(
    make: Callable, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = make("gpt_oss", ("experts", "heads"), "uniform")
    written = write_gguf(model, tiny_tokenizer, tmp_path / "m.gguf", type_name="f16")
    found = dequantized(tmp_path / "m.gguf")
    layer = model.model.layers[1]
    experts, half = layer.mlp.experts, {"rtol": 2**-11, "atol": 1e-7}
    for j, name in enumerate(("gate", "up")):
        rows = experts.gate_up_proj.detach()[:, :, j::2].transpose(1, 2)
        np.testing.assert_allclose(found[f"blk.1.ffn_{name}_exps.weight"], rows, **half)
        assert_same(found[f"blk.1.ffn_{name}_exps.bias"], experts.gate_up_proj_bias[:, j::2])
    assert_same(found["blk.1.ffn_down_exps.bias"], experts.down_proj_bias)
    assert_same(found["blk.1.ffn_gate_inp.bias"], layer.mlp.router.bias)
    assert_same(found["blk.1.attn_sinks.weight"], layer.self_attn.sinks)
    assert written.parameters == sum(p.numel() for p in model.parameters())
    assert "rounds where YaRN's ramp begins" in written.notes[0]


def test_latents_have_keys_and_values_apart(
    make: Callable, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    sizes = {"moe_intermediate_size": 32, "n_shared_experts": 1, "kv_lora_rank": 32}
    model = make("deepseek_v3", num_hidden_layers=2, q_lora_rank=32, **sizes)
    write_gguf(model, tiny_tokenizer, tmp_path / "m.gguf", type_name="f32")
    found, keys = dequantized(tmp_path / "m.gguf"), read_keys(tmp_path / "m.gguf")
    attention, latent = model.model.layers[1].self_attn, torch.randn(32)
    key, value = attention.kv_b_proj(latent).detach().view(4, 14).split([6, 8], dim=1)
    back = found["blk.1.attn_k_b.weight"].transpose(0, 2, 1) @ latent.numpy()
    np.testing.assert_allclose(back, key, atol=1e-5)
    np.testing.assert_allclose(found["blk.1.attn_v_b.weight"] @ latent.numpy(), value, atol=1e-5)
    cached = [keys[f"deepseek2.attention.{x}_length"] for x in ("key", "value")]
    assert cached == [32 + 4, 32]  # of one head
    write_gguf(model, tiny_tokenizer, tmp_path / "q.gguf", type_name="q8_0")
    types = {x.name: x.tensor_type.name for x in GGUFReader(tmp_path / "q.gguf").tensors}
    assert types["blk.1.attn_k_b.weight"] == "F16"  # rows of 6
    assert types["blk.1.attn_v_b.weight"] == types["blk.1.ffn_up_exps.weight"] == "Q8_0"


def test_value_heads_of_qwen3_5_are_ordered_by_place_first(
    make: Callable, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    sizes = {"linear_num_value_heads": 6, "linear_value_head_dim": 4, "num_hidden_layers": 2}
    model = make("qwen3_5_text", layer_types=["linear_attention", "full_attention"], **sizes)
    write_gguf(model, tiny_tokenizer, tmp_path / "m.gguf", type_name="f32")
    keys, found = read_keys(tmp_path / "m.gguf"), dequantized(tmp_path / "m.gguf")
    mixer = model.model.layers[0].linear_attn
    heads = [0, 3, 1, 4, 2, 5]  # of 2 key heads, with three value heads each
    rows = torch.arange(24).view(6, 4)[heads].flatten()
    assert_same(found["blk.0.attn_gate.weight"], mixer.in_proj_z.weight[rows])
    assert_same(found["blk.0.attn_qkv.weight"][16:], mixer.in_proj_qkv.weight[16:][rows])
    assert_same(found["blk.0.attn_qkv.weight"][:16], mixer.in_proj_qkv.weight[:16])
    assert_same(found["blk.0.ssm_conv1d.weight"][16:], mixer.conv1d.weight[16:, 0][rows])
    assert_same(found["blk.0.ssm_beta.weight"], mixer.in_proj_b.weight[heads])
    assert_same(found["blk.0.ssm_dt.bias"], mixer.dt_bias[heads])
    assert_same(found["blk.0.ssm_out.weight"], mixer.out_proj.weight[:, rows])
    assert keys["qwen35.full_attention_interval"] == 2
    assert keys["qwen35.rope.dimension_sections"] == [1, 1, 0, 0]


def test_multipliers_of_falcon_h1_are_folded_in(
    make: Callable, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    factors = {"embedding_multiplier": 2.0, "ssm_in_multiplier": 3.0, "mlp_multipliers": [4.0, 5.0]}
    factors |= {"attention_in_multiplier": 0.5, "mamba_norm_before_gate": False}
    model = make("falcon_h1", tie_word_embeddings=True, **factors)
    write_gguf(model, tiny_tokenizer, tmp_path / "m.gguf", type_name="f32")
    found, layer = dequantized(tmp_path / "m.gguf"), model.model.layers[1]
    embedding, mlp, heads = model.model.embed_tokens.weight, layer.feed_forward, layer.self_attn
    assert_same(found["token_embd.weight"], 2 * embedding)
    assert_same(found["output.weight"], 0.5 * embedding)
    each = torch.tensor([0.5] * 32 + [0.7] * 32 + [0.9] * 8 + [1.1] * 8 + [1.3] * 4)
    assert_close(found["blk.1.ssm_in.weight"], 3 * each[:, None] * layer.mamba.in_proj.weight)
    assert_close(found["blk.1.ssm_out.weight"], 0.7 * layer.mamba.out_proj.weight)
    assert_close(found["blk.1.attn_k.weight"], 0.5 * 0.8 * heads.k_proj.weight)
    assert_close(found["blk.1.attn_v.weight"], 0.5 * heads.v_proj.weight)
    assert_close(found["blk.1.attn_output.weight"], 1.5 * heads.o_proj.weight)
    assert_close(found["blk.1.ffn_gate.weight"], 4 * mlp.gate_proj.weight)
    assert_close(found["blk.1.ffn_down.weight"], 5 * mlp.down_proj.weight)
    assert_same(found["blk.1.ffn_norm"], layer.pre_ff_layernorm.weight)  # not .weight


def test_states_of_granite_4_stay_in_float32(
    make: Callable, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = make("granitemoehybrid", ("neurons",), "uniform", mamba_n_groups=2)
    write_gguf(model, tiny_tokenizer, tmp_path / "m.gguf", type_name="q8_0")
    keys, found = read_keys(tmp_path / "m.gguf"), dequantized(tmp_path / "m.gguf")
    types = {x.name: x.tensor_type.name for x in GGUFReader(tmp_path / "m.gguf").tensors}
    mixer = model.model.layers[2].mamba
    assert keys["granitehybrid.attention.head_count_kv"] == [0, 2, 0]
    assert keys["granitehybrid.rope.scaling.finetuned"] is False  # no rotary embedding
    assert keys["granitehybrid.attention.scale"] == pytest.approx(model.config.attention_multiplier)
    assert types["blk.2.ssm_in.weight"] == "Q8_0"
    whole = [f"blk.2.ssm_{x}" for x in ("a", "d", "dt.bias", "norm.weight", "conv1d.weight")]
    assert {types[name] for name in whole} == {"F32"}
    assert_close(found["blk.2.ssm_a"], -mixer.A_log.exp()[:, None])
    assert_same(found["blk.2.ssm_norm.weight"], mixer.norm.weight.view(2, -1))


def test_granite_4_without_recurrent_layers_is_a_granite(
    make: Callable, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    plain = {"layer_types": ["attention"] * 3, "tie_word_embeddings": True}
    kinds = {"rope": True, "nope": False}
    for kind, rotates in kinds.items():
        model = make(
            "granitemoehybrid", UNIFORM[:2], "uniform", position_embedding_type=kind, **plain
        )
        arch = write_gguf(model, tiny_tokenizer, tmp_path / "u.gguf", type_name="f32").arch
        keys, found = read_keys(tmp_path / "u.gguf"), dequantized(tmp_path / "u.gguf")
        assert (arch, keys["granite.rope.scaling.finetuned"]) == ("granite", rotates)
        assert keys["granite.attention.scale"] == pytest.approx(model.config.attention_multiplier)
        gate, up = model.model.layers[1].shared_mlp.input_linear.weight.chunk(2)
        assert_same(found["blk.1.ffn_gate.weight"], gate)
        assert_same(found["blk.1.ffn_up.weight"], up)
        (tmp_path / "u.gguf").unlink()
    model = make(
        "granitemoehybrid",
        ("kv_groups", "heads", "neurons"),
        position_embedding_type="rope",
        **plain,
    )
    assert write_gguf(model, tiny_tokenizer, tmp_path / "f.gguf", type_name="f32").arch == "deci"
    found = dequantized(tmp_path / "f.gguf")
    scale = model.config.embedding_multiplier
    assert_close(found["token_embd.weight"], scale * model.model.embed_tokens.weight)
    down = model.model.layers[0].shared_mlp.output_linear.weight
    assert_close(found["blk.0.ffn_down.weight"], model.config.residual_multiplier * down)


def test_a_scaled_embedding_is_not_the_language_head(
    make: Callable, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = {"mlp_bias": False, "tie_word_embeddings": True, "logits_scaling": 1.0}
    model = make("granite", FREE, **config)
    write_gguf(model, tiny_tokenizer, tmp_path / "m.gguf", type_name="f32")
    found = dequantized(tmp_path / "m.gguf")
    assert_same(found["token_embd.weight"], 2 * model.model.embed_tokens.weight)
    assert_same(found["output.weight"], model.model.embed_tokens.weight)


def test_what_is_missing_is_zero_where_llama_cpp_would_go_wrong(
    make: Callable, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = make(
        "qwen3", ("attn_block", "mlp_block"), num_hidden_layers=6, tie_word_embeddings=True
    )
    layers = Anatomy(model).shape.layers
    without_mlp = [i for i, x in enumerate(layers) if not x.mlp]
    without_attention = [i for i, x in enumerate(layers) if not x.attention]
    assert without_mlp
    assert without_attention
    written = write_gguf(model, tiny_tokenizer, tmp_path / "m.gguf", type_name="f32")
    keys, found = read_keys(tmp_path / "m.gguf"), dequantized(tmp_path / "m.gguf")
    assert [keys["openelm.feed_forward_length"][i] for i in without_mlp] == [BLOCK] * len(
        without_mlp
    )
    assert all(keys["openelm.attention.head_count"])
    assert not any(found[f"blk.{i}.ffn_down.weight"].any() for i in without_mlp)
    assert not any(found[f"blk.{i}.attn_output.weight"].any() for i in without_attention)
    assert [note.split()[2:] for note in written.notes] == [
        ["without", "an", "MLP", "got", "one", "of", "zeros"],
        ["without", "attention", "got", "one", "head", "of", "zeros"],
    ]


def test_deci_states_that_there_is_no_attention() -> None:
    shape = Shape(32, (LayerShape(2, 1, 40), LayerShape(0, 0, 0), LayerShape(2, 1, 0)))
    deci, notes = padded_shape(shape, ARCHITECTURES["deci"], quantized=False)
    assert [(x.heads, x.neurons) for x in deci.layers] == [(2, 40), (0, 32), (2, 32)]
    assert len(notes) == 1
    openelm, _ = padded_shape(shape, ARCHITECTURES["openelm"], quantized=True)
    assert [(x.heads, x.neurons) for x in openelm.layers] == [(2, 64), (1, 32), (2, 32)]


# largest error of a stored weight, relative to the largest of its block of 32 (or to itself)
ERRORS = {"f16": 2**-11, "bf16": 2**-8, "q8_0": 0.5 / 127 + 2**-11, "q4_0": 1.01 / 8}


@pytest.mark.parametrize("type_name", ERRORS)
def test_values_of_every_type(
    type_name: str, make: Callable, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = make("llama", ("neurons",))
    neurons = [x.neurons for x in Anatomy(model).shape.layers]
    assert any(x % BLOCK for x in neurons)
    written = write_gguf(model, tiny_tokenizer, tmp_path / "m.gguf", type_name=type_name)
    found = dequantized(tmp_path / "m.gguf")
    for i, layer in enumerate(model.model.layers):
        exact = layer.mlp.down_proj.weight.detach().numpy()
        stored = found[f"blk.{i}.ffn_down.weight"]
        if type_name.startswith("q"):
            exact = np.pad(exact, ((0, 0), (0, -exact.shape[1] % BLOCK)))
        largest = np.abs(exact)
        if type_name.startswith("q"):
            blocks = largest.reshape(len(exact), -1, BLOCK)
            largest = np.broadcast_to(blocks.max(-1, keepdims=True), blocks.shape)
            largest = largest.reshape(exact.shape)
        up, kept = found[f"blk.{i}.ffn_up.weight"], neurons[i]
        assert up.shape == stored.T.shape
        assert not up[kept:].any()
        np.testing.assert_allclose(up[:kept], layer.mlp.up_proj.weight.detach(), atol=0.2)
        error = np.abs(stored - exact)
        assert (error <= ERRORS[type_name] * largest + 1e-7).all()
        assert error.any()
    types = {x.name: x.tensor_type.name for x in GGUFReader(tmp_path / "m.gguf").tensors}
    assert types["blk.0.attn_q.weight"] == type_name.upper()
    assert types["blk.0.attn_norm.weight"] == "F32"
    ends = {"q4_0": "Q8_0"}.get(type_name, type_name.upper())
    assert types["token_embd.weight"] == types["output.weight"] == ends
    padded = [note for note in written.notes if "multiple of 32" in note]
    assert bool(padded) == type_name.startswith("q")
    torn = [note for note in written.notes if "K-quants store blocks of 256" in note]
    assert len(torn) == (type_name in ("f16", "bf16"))


def test_windows_that_llama_cpp_ignores_bound_the_context(
    make: Callable, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    written = write_gguf(make("mistral"), tiny_tokenizer, tmp_path / "m.gguf")
    assert read_keys(tmp_path / "m.gguf")["llama.context_length"] == 6
    assert "context length is 6" in written.notes[0]
    write_gguf(make("gemma3_text", **GEMMA3), tiny_tokenizer, tmp_path / "g.gguf")
    keys = read_keys(tmp_path / "g.gguf")
    assert keys["gemma3.context_length"] == 64
    assert keys["gemma3.attention.sliding_window"] == 6


# --- what is refused -------------------------------------------------------------------------

LLAMA4 = {"moe_layers": [0, 1, 2], "no_rope_layers": [1, 1, 1], "attention_bias": False}
LLAMA4 |= {"attention_chunk_size": 8192, "floor_scale": 8192}
YARN = {"rope_type": "yarn", "rope_theta": 5e3, "factor": 4.0}
YARN |= {"original_max_position_embeddings": 16}
QWEN3_NEXT = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2}
QWEN3_NEXT |= {"mlp_only_layers": []}
ROPE_OF = {"yarn": {"rope_type": "yarn", "rope_theta": 5e3, "factor": 4.0}}
REFUSALS: dict[str, tuple[str, tuple[str, ...], str, dict[str, Any], str, str]] = {
    "no architecture": ("opt", (), "free", {}, "f16", "is known to compute it"),
    "free gemma2": (
        "gemma2",
        ("neurons",),
        "free",
        {"tie_word_embeddings": True},
        "f16",
        r"one size for all layers, but layer \d has .* neurons; prune with --shapes uniform",
    ),
    "untied qwen3": ("qwen3", FREE, "free", {}, "f16", "head is the embedding.*--shapes uniform"),
    "untied gemma2": ("gemma2", (), "free", {}, "f16", "head is the embedding"),
    "phi3 partial rotary": (
        "phi3",
        ("kv_groups", "neurons"),
        "free",
        {},
        "f16",
        "phi3: it has one size.*deci: it rotates whole heads, not 4 of 8",
    ),
    "phi3 fewer heads": (
        "phi3",
        ("kv_groups",),
        "uniform",
        {},
        "f16",
        "heads must make up the width: 2 x 8 is not 32",
    ),
    "rope": (
        "llama",
        (),
        "free",
        {"rope_parameters": ROPE_OF["yarn"]},
        "f16",
        "rope_type yarn is not among",
    ),
    "activation": ("llama", (), "free", {"hidden_act": "relu"}, "f16", "silu, not relu"),
    "layer order": (
        "gemma3_text",
        (),
        "free",
        {"tie_word_embeddings": True},
        "f16",
        "every 6th of its layers has full attention",
    ),
    "local theta": (
        "gemma3_text",
        (),
        "free",
        GEMMA3
        | {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
                "full_attention": {"rope_type": "default", "rope_theta": 1e5},
            }
        },
        "f16",
        "rotate by theta 10000",
    ),
    "bounded logits": (
        "gemma3_text",
        (),
        "free",
        GEMMA3 | {"final_logit_softcapping": 5.0},
        "f16",
        "does not bound logits",
    ),
    "mlp biases": (
        "llama",
        ("neurons",),
        "free",
        {"mlp_bias": True},
        "f16",
        "deci: it has no biases on mlp",
    ),
    "narrow": (
        "llama",
        ("hidden",),
        "free",
        {},
        "q8_0",
        "blocks of 32, and the width is 16: pass --type f16 or bf16.*hidden_multiple=32",
    ),
    "free experts": (
        "mixtral",
        ("experts",),
        "free",
        {},
        "f16",
        "layer 1 has 4/2 heads and . experts of 24 neurons and layer 0 .*--shapes uniform",
    ),
    "a dense layer": ("qwen3_moe", (), "free", {}, "f16", "but layer 1 has none"),
    "weights of experts": (
        "qwen3_moe",
        (),
        "free",
        {"mlp_only_layers": [], "norm_topk_prob": False},
        "f16",
        "experts do sum to 1 there",
    ),
    "grouped keys": ("olmoe", (), "free", {}, "f16", "keys of its own, and here heads share them"),
    "bounded queries": (
        "olmoe",
        (),
        "free",
        {"num_key_value_heads": 4},
        "f16",
        "does not bound queries, .*clip_qkv",
    ),
    "experts of every third layer": (
        "llama4_text",
        (),
        "free",
        LLAMA4 | {"moe_layers": [0, 2]},
        "f16",
        "every n-th of its layers has experts, but layer 1 has none",
    ),
    "unnormed queries": (
        "llama4_text",
        (),
        "free",
        LLAMA4 | {"use_qk_norm": False},
        "f16",
        r"with 6 experts it norms queries and keys \(use_qk_norm",
    ),
    "short chunks": (
        "llama4_text",
        (),
        "free",
        LLAMA4 | {"attention_chunk_size": 6},
        "f16",
        "its attention_chunk_size is 8192, not 6",
    ),
    "another bound": (
        "gpt_oss",
        (),
        "free",
        {"swiglu_limit": 0.5},
        "f16",
        "its swiglu_limit is 7.0, not 0.5",
    ),
    "scaled attention": (
        "gpt_oss",
        (),
        "free",
        {"rope_parameters": YARN | {"attention_factor": 1.1}},
        "f16",
        r"from the scaling factor \(attention_factor",
    ),
    "two scales": (
        "deepseek_v3",
        (),
        "free",
        {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}},
        "f16",
        "takes YaRN with one mscale",
    ),
    "one scale": (
        "gpt_oss",
        (),
        "free",
        {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}},
        "f16",
        "takes YaRN with no mscale",
    ),
    "other pairs": (
        "deepseek_v3",
        (),
        "free",
        {"rope_interleave": False},
        "f16",
        "its rope_interleave is True, not False",
    ),
    "queries by count": (
        "deepseek_v3",
        (),
        "free",
        {"num_hidden_layers": 26},
        "f16",
        "with 26 layers its queries come straight from the width",
    ),
    "groups of experts": (
        "glm4_moe",
        (),
        "free",
        {"n_group": 2},
        "f16",
        r"not groups first \(n_group",
    ),
    "a dense layer between": (
        "qwen3_next",
        (),
        "free",
        QWEN3_NEXT | {"mlp_only_layers": [2], "linear_value_head_dim": 4},
        "f16",
        "but layer 2 has none",
    ),
    "wide values": ("qwen3_next", (), "free", QWEN3_NEXT, "f16", "values as wide as keys"),
    "attention at no distance": (
        "qwen3_next",
        (),
        "free",
        QWEN3_NEXT | {"layer_types": ["linear_attention"] + ["full_attention"] * 3},
        "f16",
        "every n-th of its layers has attention",
    ),
    "a norm before the gate": (
        "falcon_h1",
        (),
        "free",
        {"mamba_norm_before_gate": True},
        "f16",
        r"norm what is gated already \(mamba_norm_before_gate",
    ),
    "bounds on time steps": (
        "granitemoehybrid",
        (),
        "free",
        {"time_step_limit": (0.0, 2.0)},
        "f16",
        r"does not bound time steps of recurrent layers \(time_step_limit",
    ),
    "no recurrent layers, layers of several sizes and no positions": (
        "granitemoehybrid",
        ("neurons",),
        "free",
        {"layer_types": ["attention"] * 3, "position_embedding_type": "nope"},
        "f16",
        "granite: it has one size for all layers.*deci: all of its layers have rotary embedding",
    ),
    "a recurrent layer of another width": (
        "granitemoehybrid",
        (),
        "free",
        {"mamba_expand": 4, "mamba_n_heads": 8},
        "f16",
        "its mamba_expand is 2, not 4",
    ),
    "narrow experts": (
        "mixtral",
        (),
        "free",
        {},
        "q8_0",
        "layer 0 has experts of 24 neurons: pass --type f16 or bf16.*--set neuron_multiple=32",
    ),
    "heads": (
        "llama_mha",
        ("heads",),
        "uniform",
        {},
        "q4_0",
        "layer 0 has 2 heads of 8, 16 features.*multiples of 4",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_name_the_shape_and_what_would_fit(
    case: str, make: Callable, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    name, gates, shapes, config, type_name, message = REFUSALS[case]
    model = make(name, gates, shapes, **config)
    with pytest.raises(UserError, match=message):
        write_gguf(model, tiny_tokenizer, tmp_path / "m.gguf", type_name=type_name)
    assert not list(tmp_path.iterdir())


def test_tokens_that_end_a_turn_are_told(
    make: Callable, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = make("llama")
    eos = tiny_tokenizer.eos_token_id
    model.generation_config.eos_token_id = [eos, 40, 41, 42]
    write_gguf(model, tiny_tokenizer, tmp_path / "m.gguf")
    keys = read_keys(tmp_path / "m.gguf")
    names = ("eos", "eot", "eom")
    assert [keys[f"tokenizer.ggml.{x}_token_id"] for x in names] == [eos, 40, 41]
    for no_further in (eos, [eos, -2]):
        model.generation_config.eos_token_id = no_further
        write_gguf(model, tiny_tokenizer, tmp_path / "m.gguf")
        assert "tokenizer.ggml.eot_token_id" not in read_keys(tmp_path / "m.gguf")


@pytest.mark.parametrize("known", [True, False])
def test_a_name_lets_llama_cpp_strip_what_the_tokenizer_strips(
    known: bool, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    more = ["<unk>", "<s>", "<|endoftext|>", "</s>"] if known else []
    special = [AddedToken(x, special=True) for x in more]
    tokenizer.add_tokens([*special, AddedToken("<|user|>", special=True, rstrip=True)])
    tokens = read(tokenizer, len(tokenizer))[KEY.LIST]
    plain = read(tiny_tokenizer, len(tiny_tokenizer))[KEY.LIST]
    name, notes = name_that_strips("small", tokens, tokenizer)
    assert ("phi-3" in name, bool(notes)) == (known, not known)
    assert name_that_strips("Phi-3 cut", tokens, tokenizer)[0] == (
        "Phi-3 cut" if known else "phi_3 cut"
    )
    assert name_that_strips("small", plain, tiny_tokenizer) == ("small", [])
    assert (
        name_that_strips("phi3-cut", plain, tiny_tokenizer)[0] == "phi_3-cut"
    )  # it would not load


def test_an_added_token_beyond_the_embedding_is_left_out(
    make: Callable, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[more]"})
    while tokenizer.pad_token_id < VOCAB:
        tokenizer.add_tokens(f"[{len(tokenizer)}]")
        tokenizer.pad_token = f"[{len(tokenizer) - 1}]"
    written = write_gguf(make("llama"), tokenizer, tmp_path / "m.gguf", type_name="f16")
    assert written.texts_compared > 0
    keys = read_keys(tmp_path / "m.gguf")
    assert len(keys["tokenizer.ggml.tokens"]) == VOCAB
    assert "tokenizer.ggml.padding_token_id" not in keys


def test_f16_refuses_what_it_would_make_infinite(
    make: Callable, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = make("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e5
    with pytest.raises(UserError, match=r"blk\.1\.ffn_up\.weight .* pass bf16"):
        write_gguf(model, tiny_tokenizer, tmp_path / "m.gguf")
    write_gguf(model, tiny_tokenizer, tmp_path / "m.gguf", type_name="bf16")


def test_a_number_that_a_file_has_no_room_for_is_named(
    make: Callable, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = make("llama")
    model.config.max_position_embeddings = -64
    with pytest.raises(UserError, match="cannot state context_length -64"):
        write_gguf(model, tiny_tokenizer, tmp_path / "m.gguf")


def test_weights_in_few_bits_are_not_written_as_they_lie(make: Callable, tmp_path: Path) -> None:
    model = make("llama")
    model.is_quantized = True  # as transformers marks them
    with pytest.raises(UserError, match="quantised, and only whole ones can be exported"):
        write_gguf(model, byte_level("llama-bpe"), tmp_path / "m.gguf")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("type_name", ["f16", "q8_0"])
def test_what_is_no_number_is_not_written(
    type_name: str, make: Callable, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = make("mixtral", intermediate_size=32)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 3, 4] = torch.nan
    with pytest.raises(UserError, match=r"blk\.1\.ffn_down_exps\.weight has values that are not"):
        write_gguf(model, tiny_tokenizer, tmp_path / "m.gguf", type_name=type_name)
    assert not list(tmp_path.iterdir())


def test_every_family_names_known_architectures() -> None:
    assert {name for x in FAMILIES.values() for name in x.gguf} == ARCHITECTURES.keys()


# --- tokenizers ------------------------------------------------------------------------------


def byte_level(name: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer, merged far enough that every kind of split matters."""
    from tokenizers import Regex, trainers

    backend = Tokenizer(models.BPE(ignore_merges=name in IGNORE_MERGES))
    split = [pre_tokenizers.Split(Regex(x), "isolated") for x in SPLITS[name]]
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, byte])
    backend.train_from_iterator(
        [" ".join(PROBES), *PROBES],
        trainers.BpeTrainer(
            vocab_size=800,
            special_tokens=["<pad>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("name", SPLITS)
def test_splits_are_found(name: str) -> None:
    tokenizer = byte_level(name)
    vocabulary = read(tokenizer, 1000)
    assert vocabulary[KEY.PRE] == name
    assert check_vocabulary(vocabulary, tokenizer) == len(PROBES)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("gpt-2", "smollm"), ("llama-bpe", "qwen2"), ("qwen2", "gpt-2"), ("gpt-4o", "tekken")],
)
def test_a_wrong_split_is_noticed(name: str, wrong: str) -> None:
    tokenizer = byte_level(name)
    with pytest.raises(UserError, match="differently from token"):
        check_vocabulary(read(tokenizer, 1000) | {KEY.PRE: wrong}, tokenizer)


def test_stock_ways_to_say_it_are_recognised() -> None:
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend = Tokenizer(models.BPE())
    for given, name in (
        (byte, "gpt-2"),
        (pre_tokenizers.Sequence([digits, byte]), "smollm"),
    ):
        backend.pre_tokenizer = given
        assert find_split(backend) == name
    assert find_split(Qwen3_5Tokenizer().backend_tokenizer) == "qwen35"
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(UserError, match="nuteprune export takes it as --pre-tokenizer NAME"):
        find_split(backend)


def test_a_split_that_the_user_names_is_written_unchecked(make: Callable, tmp_path: Path) -> None:
    tokenizer = byte_level("gpt-2")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    model = make("llama", vocab_size=1000)
    written = write_gguf(model, tokenizer, tmp_path / "m.gguf", pre_tokenizer="my-own")
    assert (read_keys(tmp_path / "m.gguf")[KEY.PRE], written.texts_compared) == ("my-own", 0)
    with pytest.raises(UserError, match="differently"):
        write_gguf(model, tokenizer, tmp_path / "m.gguf", pre_tokenizer="gpt-2")


def test_sentencepiece_merges_become_scores(
    make: Callable, sentencepiece_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    written = write_gguf(make("llama"), sentencepiece_tokenizer, tmp_path / "m.gguf")
    assert written.texts_compared == len(PROBES)
    keys = read_keys(tmp_path / "m.gguf")
    assert (keys[KEY.MODEL], keys[KEY.ADD_PREFIX]) == ("llama", True)
    assert keys[KEY.TOKEN_TYPE][0] == TokenType.UNKNOWN
    assert keys[KEY.TOKEN_TYPE][3 + 65] == TokenType.BYTE
    text = "the teacher learns"
    assert len(sentencepiece_tokenizer(text).input_ids) < len(text)  # it merges
    flat = keys | {KEY.SCORES: [-1000.0] * len(keys[KEY.LIST])}
    with pytest.raises(UserError, match="differently"):
        check_vocabulary(flat, sentencepiece_tokenizer)


def test_special_added_and_missing_tokens(make: Callable, tmp_path: Path) -> None:
    tokenizer = byte_level("qwen2")
    tokenizer.add_tokens([AddedToken("return"), AddedToken("<|turn|>", special=True)])
    tokenizer.add_tokens([AddedToken("<calls▁begin>")])
    tokenizer.chat_template = "{{ messages }}"
    size = len(tokenizer) + 5
    write_gguf(make("qwen2", vocab_size=size), tokenizer, tmp_path / "m.gguf")
    found = read_keys(tmp_path / "m.gguf")
    assert read(tokenizer, size).items() <= found.items()
    assert {k: v for k, v in found.items() if k.endswith("_id")} == {KEY.BOS_ID: 1, KEY.EOS_ID: 2}
    assert (found[KEY.ADD_BOS], found[KEY.ADD_EOS]) == (False, False)
    assert found[KEY.CHAT_TEMPLATE] == "{{ messages }}"
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    assert read(tokenizer, size)[KEY.CHAT_TEMPLATE] == "{{ messages }}"
    types = dict(zip(found[KEY.LIST], found[KEY.TOKEN_TYPE], strict=True))
    assert types["return"] == types["<calls▁begin>"] == TokenType.USER_DEFINED
    assert types["<|turn|>"] == types["<s>"] == TokenType.CONTROL
    assert types[f"[PAD{size - 1}]"] == TokenType.UNUSED
    with pytest.raises(UserError, match="embedding only 300 rows"):
        write_gguf(make("qwen2"), tokenizer, tmp_path / "n.gguf")


def test_other_kinds_of_tokenizer_are_refused(make: Callable, tmp_path: Path) -> None:
    unigram = Tokenizer(models.Unigram([("a", -1.0), ("b", -2.0)], 0))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=unigram)
    with pytest.raises(UserError, match="of type Unigram"):
        write_gguf(make("llama"), tokenizer, tmp_path / "m.gguf")


# --- the command -----------------------------------------------------------------------------


@pytest.fixture
def folder(make: Callable, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    from nuteprune.export.checkpoint import save

    save(make("llama", ("neurons",)), tmp_path / "model", tiny_tokenizer)
    return tmp_path / "model"


def test_the_command(folder: Path, tmp_path: Path, run: Callable) -> None:
    out = tmp_path / "m.gguf"
    code, stdout, _ = run(folder, "--to", "gguf", "--out", out, "--type", "q8_0", "--json")
    assert code == 0
    result = json_line(stdout)
    assert (result["arch"], result["type"]) == ("deci", "q8_0")
    assert result["bytes"] == out.stat().st_size
    assert read_keys(out)["general.name"] == "model"
    for args, message in (
        ((folder, "--to", "gguf", "--out", out), "exists; pass --overwrite"),
        ((folder, "--to", "mlx", "--out", out), "--to mlx"),
        ((folder, "--to", "gguf", "--out", out, "--type", "q4_k"), "--type q4_k"),
        ((folder, "--to", "onnx", "--out", out, "--pre-tokenizer", "llama"), "--to gguf writes"),
        ((folder, "--to", "gguf", "--out", tmp_path), "is a folder"),
        ((folder, "--to", "gguf", "--out", folder / "config.json" / "x"), "cannot write"),
        ((tmp_path / "no", "--to", "gguf", "--out", tmp_path / "n.gguf"), "neither a folder"),
    ):
        code, _, err = run(*args)
        assert code == 2
        assert message in err
        assert len(err.strip().splitlines()) == 1
    assert run(folder, "--to", "gguf", "--out", out, "--overwrite")[0] == 0
    assert read_keys(out)["general.file_type"] == 1


def test_a_failed_export_leaves_the_old_file(
    folder: Path, tmp_path: Path, run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "m.gguf"
    out.write_text("old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "check_vocabulary", full)
    code, _, err = run(folder, "--to", "gguf", "--out", out, "--overwrite")
    assert (code, out.read_text()) == (1, "old")
    assert "No space left" in err
    assert sorted(x.name for x in tmp_path.iterdir()) == ["m.gguf", "model"]


# Ends like a process that the system kills: no handler runs, nothing is tidied up.
KILLED = """
import os, signal, sys
from nuteprune.cli.app import main
from nuteprune.export.gguf import write

written = write.GGUFWriter.write_tensor_data

def last_words(self, *arguments, **named):
    written(self, *arguments, **named)
    os.kill(os.getpid(), signal.SIGKILL)

write.GGUFWriter.write_tensor_data = last_words
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_killed_export_leaves_the_old_file_or_none(
    folder: Path, tmp_path: Path, run: Callable, old: bytes | None
) -> None:
    out = tmp_path / "m.gguf"
    if old:
        out.write_bytes(old)
    command = ["export", str(folder), "--to", "gguf", "--out", str(out), "--overwrite"]
    assert python("-c", KILLED, *command).code == -signal.SIGKILL
    assert (out.read_bytes() if out.exists() else None) == old
    assert run(*command[1:])[0] == 0  # the same again goes on as if nothing had been
    assert read_keys(out)["general.architecture"] == "deci"
    assert sorted(x.name for x in tmp_path.iterdir()) == ["m.gguf", "model"]


def wide(tiny_model: Callable) -> PreTrainedModel:
    sizes = {"vocab_size": VOCAB, "num_hidden_layers": 2, "intermediate_size": 1536}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128}
    return tiny_model("llama", hidden_size=1024, **sizes, **heads)


@pytest.mark.parametrize("asked", [True, False])
def test_rows_fit_k_quants_where_it_is_asked_for(
    asked: bool, tiny_model: Callable, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    anatomy = Anatomy(wide(tiny_model))
    args = NutePruneConfig(output_dir="unused", for_quantization=asked)
    allocator = make_allocator(anatomy, args)
    random = torch.Generator().manual_seed(0)
    units = {kind: allocator.layout.units(kind) for kind in allocator.constraints.kinds}
    scores = {kind: torch.rand(n, generator=random) for kind, n in units.items()}
    masks = allocator.masks(allocator.shape(scores, 0.43), scores)
    small, _ = assemble(anatomy, masks)
    assert any(x.neurons < 1536 for x in Anatomy(small).shape.layers)
    assert any(x.heads < 8 for x in Anatomy(small).shape.layers)
    written = write_gguf(small, tiny_tokenizer, tmp_path / "model.gguf", type_name="bf16")
    rows = [x.shape for x in GGUFReader(tmp_path / "model.gguf").tensors if len(x.shape) > 1]
    assert len(rows) == 1 + 1 + 2 * 7
    torn = [x for x in rows if x[0] % 256]
    assert bool(torn) == (not asked)
    said = [re.findall(r"\d+", note.split("rows of")[1]) for note in written.notes]
    assert {int(x) for numbers in said for x in numbers} == {int(x[0]) for x in torn}


@pytest.mark.parametrize(
    ("config", "gates", "said"),
    [
        ({"hidden_size": 576}, "neurons", "width is 576"),
        ({"head_dim": 32}, "kv_groups,neurons", "kv_groups has 64 features"),
        ({}, "heads,neurons", "heads has 128 features"),
        ({"hidden_size": 576}, "neurons,hidden", ""),
        ({"head_dim": 32}, "neurons", ""),
    ],
)
def test_what_k_quants_cannot_store_whole_is_refused(
    config: dict[str, int], gates: str, said: str
) -> None:
    sizes = {"hidden_size": 1024, "head_dim": 128} | config
    layer = LayerShape(heads=8, kv_heads=4, neurons=1536)
    how = Shape(sizes["hidden_size"], (layer,)), sizes["head_dim"], gates.split(",")
    if not said:
        check_super_blocks(*how)
        return
    with pytest.raises(UserError, match=said):
        check_super_blocks(*how)


def test_rows_of_experts_are_among_those_that_do_not_fit() -> None:
    layers = LayerShape(4, 2, 512), LayerShape(4, 2, 0, experts=8, expert_neurons=320)
    (said,) = torn_rows(Shape(1024, layers), head_dim=64)
    assert "rows of 320 would" in said
    assert torn_rows(Shape(1024, layers[:1]), head_dim=64) == []


def test_multiples_of_one_s_own_stay_multiples() -> None:
    args = NutePruneConfig(output_dir="unused", for_quantization=True, neuron_multiple=96)
    assert (args.neuron_multiple, args.hidden_multiple) == (768, 256)

"""One tiny pruned model per family, and a stock model of full size that computes the same."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from nuteprune.export import modeling_pruned
from nuteprune.export.config import pruned_config
from nuteprune.model.families import FAMILIES
from nuteprune.model.family import Family
from nuteprune.model.shape import LayerShape, Shape
from tests.conftest import TINY, Run
from tests.forked import python

HIDDEN, HEADS, KV_HEADS, NEURONS, VOCAB = 96, 6, 2, 96, 128
GROUPED = {"num_key_value_heads": KV_HEADS, "head_dim": HIDDEN // HEADS}


def hybrid(name: str, mixer: str) -> dict[str, Any]:
    """A tiny hybrid whose layer 0 is of attention, which `uneven_shape` cuts."""
    return TINY[name] | {"layer_types": ["full_attention", mixer, mixer]}


SPECIAL: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 5e3}},
    "mistral": {"sliding_window": 6},
    "qwen2": {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6}},
    "qwen3": {"head_dim": 32},
    "phi3": {"rope_parameters": {"rope_theta": 5e3, "partial_rotary_factor": 0.5}},
    "gemma2": {"head_dim": 32, "sliding_window": 6},
    "gemma3_text": {
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
        },
    },
    "granite": {"attention_bias": True, "mlp_bias": True, "residual_multiplier": 0.5},
    "gpt_neox": {"rope_parameters": {"rope_theta": 5e3, "partial_rotary_factor": 0.5}},
    "opt": {"word_embed_proj_dim": HIDDEN, "dropout": 0.0},
    "smollm3": {"no_rope_layer_interval": 2},
    "seed_oss": {"attention_dropout": 0.0, "residual_dropout": 0.0},
    "vaultgemma": {"sliding_window": 6},
    "exaone4": {"sliding_window": 6, "sliding_window_pattern": 2},
    "olmo3": {"sliding_window": 6},
    "cohere2": {"sliding_window": 6},
    "qwen3_5_text": hybrid("qwen3_5_text", "linear_attention"),
    "lfm2": hybrid("lfm2", "conv"),
    "granitemoehybrid": hybrid("granitemoehybrid", "linear_attention"),
    "falcon_h1": TINY["falcon_h1"] | {"mamba_d_ssm": 64, "mamba_n_heads": 8},
}


@dataclass(frozen=True)
class Case:
    """A pruned model, its shape, and a zero-padded stock model of the same function."""

    family: Family
    shape: Shape
    pruned: PreTrainedModel
    reference: PreTrainedModel


@pytest.fixture(scope="session")
def case() -> Callable[[str], Case]:
    """Returns the case of a model type. Cases are shared: a test must leave them as they are."""
    return cache(make_case)


def make_case(model_type: str) -> Case:
    family = FAMILIES[model_type]
    original = stock_config(family)
    shape = uneven_shape(family)
    config = pruned_config(original, family, shape)
    pruned = getattr(modeling_pruned, f"Pruned{family.causal_lm}")(config).eval().float()
    randomize(pruned)
    return Case(family, shape, pruned, padded(pruned, original, family, shape))


def stock_config(family: Family) -> PreTrainedConfig:
    """A tiny config of full size; no theta is the default one."""
    names = family.config_names
    sizes = {names["hidden"]: HIDDEN, names["heads"]: HEADS, names["neurons"]: NEURONS}
    grouped = GROUPED if "kv_heads" in names else {}
    common = {"vocab_size": VOCAB, "num_hidden_layers": 3, "max_position_embeddings": 64}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    special = SPECIAL.get(family.model_type, {})
    return CONFIG_MAPPING[family.model_type](**sizes | grouped | common | tokens | special)


def uneven_shape(family: Family) -> Shape:
    """Fewer heads within groups; no attention; a whole group less and no MLP.

    Of hybrids, layer 1 loses its mixer (falcon_h1: and its attention), and 2 has one.
    """
    first, last = ((4, 2), (3, 1)) if "kv_heads" in family.config_names else ((5, 5), (3, 3))
    if family.refusal("heads"):
        first = last = (HEADS, KV_HEADS)
    if family.mixer and family.model_type != "falcon_h1":
        last = (0, 0)
    beside = family.model_type == "falcon_h1"
    layers = (
        LayerShape(*first, 40, mixer=beside),
        LayerShape(0, 0, 96),
        LayerShape(*last, 0, mixer=bool(family.mixer)),
    )
    return Shape(HIDDEN, layers)


def whole_shape(family: Family, heads: int, kv_heads: int, neurons: int) -> Shape:
    """The same counts in all layers that have what is counted."""
    layers = [LayerShape(heads, kv_heads, neurons, mixer=bool(family.mixer))] * 3
    if family.mixer and family.model_type != "falcon_h1":
        mixer = LayerShape(0, 0, neurons, mixer=True)
        layers = [LayerShape(heads, kv_heads, neurons), mixer, mixer]
    return Shape(HIDDEN, tuple(layers))


@torch.no_grad()
def randomize(model: PreTrainedModel) -> None:
    """Give all parameters, biases and norms too, values that matter to the output."""
    random = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.copy_(mean + 0.2 * torch.randn(parameter.shape, generator=random))


@torch.no_grad()
def padded(
    pruned: PreTrainedModel, original: PreTrainedConfig, family: Family, shape: Shape
) -> PreTrainedModel:
    """The stock model of the original size, zero wherever the pruned model has nothing."""
    reference = getattr(transformers, family.causal_lm)(original).eval().float()
    ours = pruned.state_dict()
    for name, parameter in reference.named_parameters():
        if name in ours and ours[name].shape == parameter.shape:
            parameter.copy_(ours[name])
    for i, layer in enumerate(shape.layers):
        for projection in family.projections:
            path = f"{family.layers}.{i}.{projection.path}"
            full = dict(reference.named_modules()).get(path)
            if full is None:  # the layer is of another kind
                continue
            full.weight.zero_()
            if full.bias is not None:
                full.bias.zero_()
            if f"{path}.weight" not in ours:
                continue
            if projection in family.mixer:  # whole, or gone
                full.weight.copy_(ours[f"{path}.weight"])
                continue
            rows = places(projection.rows, layer, original)
            columns = places((projection.columns,), layer, original)
            full.weight[rows[:, None], columns] = ours[f"{path}.weight"]
            if full.bias is not None:
                full.bias[rows] = ours[f"{path}.bias"]
    return reference


def places(axes: tuple[str, ...], layer: LayerShape, original: PreTrainedConfig) -> Tensor:
    """Where a pruned axis, or several in a row, lies in the original one."""
    head_dim = getattr(original, "head_dim", None) or HIDDEN // HEADS
    kv_heads = getattr(original, "num_key_value_heads", None) or HEADS
    ours, theirs = layer.heads_per_group or 1, HEADS // kv_heads
    heads = [j // ours * theirs + j % ours for j in range(layer.heads)]
    units: dict[str, tuple[list[int], int, int]] = {  # kept units, their number, their width
        "hidden": (list(range(HIDDEN)), HIDDEN, 1),
        "neurons": (list(range(layer.neurons)), NEURONS, 1),
        "q": (heads, HEADS, head_dim),
        "kv": (list(range(layer.kv_heads)), kv_heads, head_dim),
        "qkv": (heads, HEADS, 3 * head_dim),
        "qgate": (heads, HEADS, 2 * head_dim),
    }
    found, offset = [], 0
    for axis in axes:
        kept, number, width = units[axis]
        found += [offset + unit * width + x for unit in kept for x in range(width)]
        offset += number * width
    return torch.tensor(found, dtype=torch.long)


@pytest.fixture(scope="session")
def tokens() -> Tensor:
    """A batch of two prompts, longer than the sliding windows."""
    random = torch.Generator().manual_seed(2)
    return torch.randint(3, VOCAB, (2, 12), generator=random)


@pytest.fixture(scope="session")
def transformers_4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH that puts transformers 4.57 before the installed one."""
    folder = tmp_path_factory.mktemp("transformers4")
    packages = ["transformers==4.57.6", "huggingface-hub==0.36.0", "tokenizers==0.22.1"]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    subprocess.run([*pip, *packages], check=True)
    return folder


@pytest.fixture
def run(run: Run) -> Run:
    """Calls `nuteprune export`."""
    return partial(run, "export")


def tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """A model's tensors as a state dict holds them, tied ones once."""
    stored = model.state_dict().keys()
    buffers = {name: x for name, x in model.named_buffers() if name in stored}
    return dict(model.named_parameters()) | buffers


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: Tensor, **kwargs: Any) -> Tensor:
    return model(tokens, **kwargs).logits


PLAIN = """
import torch, transformers
transformers.logging.disable_progress_bar()
transformers.logging.set_verbosity_warning()  # the default, whatever another test has set
transformers.AutoTokenizer.from_pretrained({folder!r}, trust_remote_code=False)
transformers.AutoTokenizer.from_pretrained({folder!r}, trust_remote_code=True)
transformers.AutoConfig.from_pretrained({folder!r}, trust_remote_code=True)
model = transformers.{auto}.from_pretrained({folder!r}, trust_remote_code=True)
assert type(model).__name__.startswith("Pruned")
mask = torch.ones(1, 3).long()
model.generate(torch.tensor([[5, 6, 7]]), attention_mask=mask, max_new_tokens=2, do_sample=False)
model.save_pretrained({folder!r} + "-again")
"""


def said_by_transformers(folder: Path, auto: str) -> tuple[int, str, str]:
    """What a process prints that loads a checkpoint as README does, and knows nothing of ours.

    Args:
        folder: a checkpoint of free shapes with its tokenizer.
        auto: the class of transformers that loads it.

    Returns:
        The exit code, and what it printed to stdout and stderr.
    """
    ended = python("-c", PLAIN.format(folder=str(folder), auto=auto))
    return ended.code, ended.out, ended.err

"""Prices against what is written and what generation really keeps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import DynamicCache

from nuteprune.export.checkpoint import as_stored, save
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.families import FAMILIES
from nuteprune.model.family import GATE_KINDS
from nuteprune.train.config import NutePruneConfig
from nuteprune.train.targets import Prices
from tests.conftest import TINY, cache_of


def prices(anatomy: Anatomy, folder: Path, dtype: torch.dtype, **settings: Any) -> Prices:
    args = NutePruneConfig(output_dir=str(folder), use_cpu=True, **settings)
    return Prices.of(anatomy, dtype, args)


@pytest.mark.filterwarnings("ignore:.*rope.*")
def test_parameters_and_bytes_are_those_of_the_written_file(
    tiny_name: str, tiny_model, prune_at_random, tmp_path: Path
) -> None:
    dtype = torch.bfloat16 if tiny_name == "llama" else torch.float32
    family = FAMILIES[TINY[tiny_name].get("model_type", tiny_name)]
    kinds = [kind for kind in GATE_KINDS if not family.refusal(kind)]
    dense = Anatomy(tiny_model(tiny_name))
    priced = prices(dense, tmp_path / "run", dtype)
    assert priced.params.total(dense.shape) == dense.parameters()
    for i, cut in enumerate((kinds, [x for x in kinds if x in ("hidden", "neurons")])):
        small = prune_at_random(tiny_model(tiny_name), cut, "free")
        save(as_stored(small, dtype), tmp_path / str(i))
        file = tmp_path / str(i) / "model.safetensors"
        with safe_open(file, framework="pt") as weights:
            names = [x for x in weights.keys() if not x.endswith(family.buffers or ("/",))]  # noqa: SIM118
            shapes = [weights.get_slice(name).get_shape() for name in names]
        shape = Anatomy(small).shape
        assert priced.params.total(shape) == sum(map(math.prod, shapes))
        # The header is counted as that of the dense model's file.
        assert 0 <= priced.size.total(shape) - file.stat().st_size < 4000
    assert shape.hidden < dense.shape.hidden or "hidden" not in kinds


@pytest.mark.parametrize(
    "name", ["llama", "llama_mha", "qwen3", "gemma3_text", "mistral", "llama4_text"]
)
def test_the_cache_is_what_generation_keeps(name: str, tiny_model, tmp_path: Path) -> None:
    model = tiny_model(name)
    anatomy = Anatomy(model)
    priced = prices(anatomy, tmp_path, model.dtype, target_memory="1GB@2x20")
    tokens = torch.randint(3, 90, (2, 20), generator=torch.Generator().manual_seed(0))
    cache = cache_of(model, tokens)
    held = sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)
    # A window of 6 tokens leaves transformers the last 5, others 6.
    slides = [getattr(x, "is_sliding", False) for x in cache.layers]
    more = sum(held_by / 5 for held_by, slide in zip(_bytes(cache), slides, strict=True) if slide)
    assert priced.cache(anatomy.shape) == held + more
    whole = priced.memory.total(anatomy.shape)
    assert whole == priced.size.total(anatomy.shape) + priced.cache(anatomy.shape)


def _bytes(cache: DynamicCache) -> list[int]:
    return [x.keys.nbytes + x.values.nbytes for x in cache.layers]


def test_the_context_is_the_models_own_where_none_is_asked_for(tiny_model, tmp_path: Path) -> None:
    priced = prices(Anatomy(tiny_model("llama")), tmp_path, torch.float32)
    assert (priced.context, priced.sequences) == (64, 1)

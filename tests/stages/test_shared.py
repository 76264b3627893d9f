"""The stages, shared out: what one process finds, with less work each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.forked import python

pytestmark = pytest.mark.slow(10)

Found = tuple[list[dict[str, torch.Tensor]], list[dict[str, int]]]


def stages(model: Path, processes: int, blocks: int, *methods: str, sharded: bool = False) -> Found:
    """What each process finds, and its products, by stage."""
    out = model / f"by {processes}{', sharded' * sharded}"
    out.mkdir()
    script = Path(__file__).with_name("shared_stages.py")
    done = python(script, model, out, blocks, int(sharded), *methods, processes=processes)
    assert done.code == 0, done.err
    ranks = range(processes)
    products = [json.loads((out / f"{i}.json").read_text()) for i in ranks]
    return [load_file(out / f"{i}.safetensors") for i in ranks], products


def assert_same(one: Found, many: Found) -> None:
    """All processes have the same bits, and those of one process but where they judge."""
    (alone,), (first, *others) = one[0], many[0]
    assert alone.keys() == first.keys()
    for name, value in alone.items():
        assert all(torch.equal(first[name], x[name]) for x in others if name in x), name
        if name.startswith("judge"):  # whose batches depend on the number of processes
            torch.testing.assert_close(first[name], value, rtol=1e-4, atol=0)
        else:
            assert torch.equal(first[name], value), name


def test_four_processes_do_a_quarter_each_of_every_stage(
    tiny_model: Callable, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    places = tmp_path / "before the first step", tmp_path / "text"
    tiny_model("llama", num_hidden_layers=16).save_pretrained(places[0])
    size = {"vocab_size": 300, "max_position_embeddings": 256}
    tiny_model("llama", **size).save_pretrained(places[1])
    tiny_tokenizer.save_pretrained(places[1])
    for place, names in zip(places, ({"score", "refit"}, {"write", "judge"}), strict=True):
        one = stages(place, 1, 32)
        ((alone,),) = one[1:]
        assert set(alone) == names
        for sharded in (False, True):
            four = stages(place, 4, 32, sharded=sharded)
            assert_same(one, four)
            shares = {stage: max(x[stage] for x in four[1]) / alone[stage] for stage in alone}
            assert all(share <= 0.3 for share in shares.values()), (sharded, shares)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "methods"),
    [
        ("gemma2", ("flap", "taylor", "similarity")),
        ("qwen2_moe", ("reap", "reconstruction")),
    ],
)
def test_processes_without_a_batch_of_their_own_add_nothing(
    name: str, methods: tuple[str, ...], dtype: torch.dtype, tiny_model: Callable, tmp_path: Path
) -> None:
    tiny_model(name).to(dtype).save_pretrained(tmp_path)
    one = stages(tmp_path, 1, 6, *methods)
    for sharded in (False, True):
        assert_same(one, stages(tmp_path, 3, 6, *methods, sharded=sharded))

"""What the stages of a run leave: taken again where all that it depends on is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nuteprune.errors import RunFailed
from nuteprune.products import Products, read_tensors

MADE = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor([1, 2])}


def refuse() -> Any:
    pytest.fail("it was there")


def made(folder: Path | None, tensors: dict[str, Tensor] | None = None, **how: Any) -> Products:
    """Products of two stages, the first of which depends on its seed."""
    settings = {"seed": 3, **how.pop("settings", {})}
    products = Products(folder, {"model": how.pop("model", "tiny")}, **how)
    products.keep("score", lambda: tensors or MADE, **settings)
    products.keep("choose", lambda: {"kept": torch.ones(2)}, target=0.3)
    return products


def test_a_product_is_what_was_made_in_its_order_and_is_taken_again(tmp_path: Path) -> None:
    first = made(tmp_path)
    assert first.found == []
    assert first.costs.keys() == {"score", "choose"}
    again = Products(tmp_path, {"model": "tiny"}, resumes=True)
    found = again.keep("score", refuse, seed=3)
    assert list(found) == list(MADE)
    assert all(torch.equal(found[name], MADE[name]) for name in MADE)
    again.keep("choose", refuse, target=0.3)
    assert again.found == ["score", "choose"]
    assert again.costs == first.costs
    assert not list(tmp_path.glob(".*"))


def test_without_resuming_nothing_is_taken_and_without_a_folder_nothing_is_kept(
    tmp_path: Path,
) -> None:
    made(tmp_path)
    other = {name: x + 1 for name, x in MADE.items()}
    assert made(tmp_path, other).found == []
    assert torch.equal(read_tensors(tmp_path / "score.safetensors")[0]["a"], other["a"])
    products = Products(None, {}, resumes=True)
    assert products.keep("score", lambda: MADE) is MADE
    assert products.keep_json("judge", lambda: 3) == 3


@pytest.mark.parametrize(
    ("how", "found"),
    [
        ({}, ["score", "choose"]),
        ({"settings": {"seed": 4}}, []),  # what follows depends on what was before it
        ({"model": "other"}, []),
    ],
    ids=str,
)
def test_other_settings_have_other_products(
    how: dict[str, Any], found: list[str], tmp_path: Path
) -> None:
    made(tmp_path)
    assert made(tmp_path, resumes=True, **how).found == found
    assert made(tmp_path, resumes=True, **how).found == ["score", "choose"]


def test_a_later_setting_leaves_what_was_before_it(tmp_path: Path) -> None:
    made(tmp_path)
    products = Products(tmp_path, {"model": "tiny"}, resumes=True)
    products.keep("score", refuse, seed=3)
    products.keep("choose", lambda: {"kept": torch.zeros(2)}, target=0.4)
    assert products.found == ["score"]


@pytest.mark.parametrize("damage", [b"", b"{}", None], ids=["empty", "no tensors", "cut off"])
def test_a_damaged_product_is_made_anew(damage: bytes | None, tmp_path: Path) -> None:
    made(tmp_path)
    path = tmp_path / "score.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-3] if damage is None else damage)
    assert made(tmp_path, resumes=True).found == ["choose"]
    assert read_tensors(path)[1]["key"] == {"model": "tiny", "score.seed": 3}
    products = Products(tmp_path, {}, resumes=True)
    for damaged in ('{"key"', "[[]]", "[1]"):
        path = tmp_path / "judge.json"
        kept = path.read_text() if path.is_file() else ""
        path.write_text(kept.replace("[1.5]", damaged) or damaged)
        assert products.keep_json("judge", lambda: [1.5]) == [1.5]
        assert products.keep_json("judge", refuse) == [1.5]


def test_a_product_without_what_it_took_is_made_anew(tmp_path: Path) -> None:
    products = made(tmp_path)
    products.costs["score"] = None  # type: ignore[assignment]
    path = tmp_path / "score.safetensors"
    products._write("score", path, MADE)
    assert made(tmp_path, resumes=True).found == ["choose"]


def test_a_full_disk_is_told_and_leaves_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(RunFailed, match=r"cannot write .*full; make room, then go on with"):
        made(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_a_stage_takes_is_measured_whatever_comes_of_it(tmp_path: Path) -> None:
    products = Products(tmp_path, {})
    with pytest.raises(KeyError), products.measured("score"):
        raise KeyError
    first = dict(products.costs["score"])
    assert first.keys() == {"seconds", "cpu_seconds", "peak_memory_bytes"}
    with products.measured("score"):
        sum(range(10**6))
    assert products.costs["score"]["cpu_seconds"] > first["cpu_seconds"]
    assert products.peak == products.costs["score"]["peak_memory_bytes"] > 0

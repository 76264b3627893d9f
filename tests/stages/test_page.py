"""docs/stages.md, run as it stands but for its model, its text and its sizes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from nuteprune import load_pruned

PAGE = Path(__file__).parents[2] / "docs" / "stages.md"


def block_under(heading: str) -> str:
    """Return the one block of Python under a heading of the page."""
    _, _, part = PAGE.read_text(encoding="utf-8").partition(f"## {heading}\n")
    (block,) = re.findall(r"```python\n(.*?)```", part.partition("\n## ")[0], re.DOTALL)
    return str(block)


@pytest.mark.slow(8)
def test_the_page_of_stages_does_what_it_says(
    tiny_inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = tiny_inputs
    monkeypatch.chdir(tmp_path)
    by_hand, own = (block_under(x) for x in ("All of them by hand", "A stage of your own"))
    small = "calibration_blocks=2, neuron_multiple=4, max_steps=2, use_cpu=True, disable_tqdm=True"
    code = by_hand.replace("target_sparsity=0.2)", f"target_sparsity=0.2, {small})")
    names: dict[str, Any] = {"torch": torch}
    for part in (code, own.replace('gates="neurons")', f'gates="neurons", {small})')):
        part = part.replace("MODEL", str(model)).replace("my.txt", str(text)).replace("256", "24")
        exec(compile(part, str(PAGE), "exec"), names)  # what the page shows
    loaded = load_pruned(tmp_path / "out")
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, names["small"](ids).logits, atol=1e-4)
    assert names["masks"].values.keys() == {"neurons"}
    assert names["weights"]
    before = sum(p.numel() for p in names["dense"].parameters())
    assert sum(p.numel() for p in loaded.parameters()) < before

"""K-quants by the real llama.cpp: what `for_quantization` keeps whole, and what is torn."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.clients
ROOT = Path(__file__).parents[2]


def test_nothing_falls_back_where_it_is_asked_for(
    python_of: Callable[[str], Path], client_environment: Callable, tmp_path: Path
) -> None:
    words = [ROOT / "benchmarks" / "k_quants.py", "--layers", 2, "--json", tmp_path / "found.json"]
    done = subprocess.run(
        [str(python_of("ours-llama-cpp")), "-W", "ignore", *map(str, words)],
        capture_output=True,
        text=True,
        env=client_environment(PYTHONPATH=str(ROOT / "src")),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    dense, cut, whole = json.loads((tmp_path / "found.json").read_text())["rows"]
    for row in (dense, whole):
        assert set(row["matrices"]) == {"Q4_K", "Q6_K"}
        assert row["torn"] == []
    assert cut["torn"]
    assert set(cut["matrices"]) - {"Q4_K", "Q6_K"}
    assert cut["bits_per_weight"] > whole["bits_per_weight"]
    assert whole["q4_k_m_bytes"] < cut["q4_k_m_bytes"] < dense["q4_k_m_bytes"]

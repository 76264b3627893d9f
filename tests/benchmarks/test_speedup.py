"""benchmarks/speedup.py on a tiny model: speeds are injected, and never judged here."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from nuteprune.model.anatomy import Anatomy
from nuteprune.train.constraints import make_allocator
from tests.scripts import script

COSTS: dict[str, Any] = {
    **{"schema": 1, "model_type": "llama", "hidden": 32, "head_dim": 8, "layers": 3},
    "new_tokens": 4,
    "attention": [
        {"heads": 2 * g, "kv_heads": g, "prefill": 1.0, "decode": 0.5 + g / 5} for g in (1, 2)
    ],
    "mlp": [{"neurons": n, "prefill": 1.0, "decode": 0.2 + n / 48} for n in (1, 48)],
    "rest": {"prefill": 1.0, "decode": 0.5},
}


texts, runs, speedup = map(script, ("quality_text", "quality_runs", "speedup"))


@pytest.fixture
def words(tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> list[str]:
    model, out = tmp_path / "model", tmp_path / "out"
    tiny_model("llama", vocab_size=300).save_pretrained(model)
    tiny_tokenizer.save_pretrained(model)
    drawn = random.Random(0)
    lines = [" ".join(drawn.choices(["student", "teacher", "gate"], k=60)) for _ in range(300)]
    rows = "".join(json.dumps({"text": line}) + "\n" for line in lines)
    (tmp_path / "words.jsonl").write_text(rows)
    out.mkdir()
    (out / "costs.json").write_text(json.dumps(COSTS))
    named = ["--model", model, "--data", tmp_path / "words.jsonl", "--out", out]
    small = ["--eval-blocks", 2, "--dtype", "float32", "--length", 32, "--speedups", 1.3]
    method = ["method=random", "calibration_blocks=2", "neuron_multiple=4"]
    settings = [word for x in method for word in ("--set", x)]
    return [str(x) for x in (*named, *small, *settings, "--json", tmp_path / "found.json")]


def decoding(row: dict[str, Any]) -> float:
    """Return what the table says of a row's counts, reckoned anew."""
    whole = 3 * (0.9 + 1.2) + 0.5
    attention = 0.5 * row["attention_blocks"] + row["kv_heads"] / 5
    return whole / (attention + 0.2 * row["mlp_blocks"] + row["neurons"] / 48 + 0.5)


@pytest.mark.slow(10)
def test_parameters_go_until_both_are_measured_to_be_as_fast(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[list[str]] = []

    def timed(names: list[str], settings: Any, repeats: int, how: Any, bars: Any) -> Any:
        told.append([Path(x).name for x in names])
        median = 0.9 if told[-1] == ["parameters-0", "seconds"] else 1.0
        ratio = {"median": median, "low": median - 0.05, "high": median + 0.05}
        return {"settings": [{"speedup": {"decode": ratio, "prefill": ratio}}]}

    monkeypatch.setattr(speedup, "measure", timed)
    monkeypatch.setattr(speedup, "conditions", lambda _: "injected")
    result = speedup.main(words)
    assert told == [
        ["parameters-0", "seconds"],
        ["parameters-1", "seconds"],
        ["seconds", "model"],
        ["parameters-1", "model"],
    ]
    seconds, parameters = result["rows"]
    for row in result["rows"]:
        assert row["expected"] == pytest.approx(decoding(row))
        assert row["times_dense"]["in_domain"] > 0
    assert seconds["expected"] >= 1.3
    assert parameters["expected"] >= seconds["expected"] / 0.9
    first = capsys.readouterr().out
    assert speedup.main(words) == result  # nothing is run again
    assert len(told) == 4
    assert capsys.readouterr().out.splitlines()[-4:] == first.splitlines()[-4:]


def test_seconds_buy_at_least_as_much_as_parameters_do(tiny_model: Any, tmp_path: Path) -> None:
    anatomy = Anatomy(tiny_model("llama"))
    gates = {"gates": "kv_groups,neurons,attn_block,mlp_block", "neuron_multiple": 1}
    config = speedup.NutePruneConfig(output_dir=str(tmp_path), **gates)
    allocator = make_allocator(anatomy, config)
    seconds = speedup.seconds_of(COSTS, allocator.budget, "decode")
    for seed in range(5):
        drawn = torch.Generator().manual_seed(seed)
        scores = {"kv_groups": torch.rand(6, generator=drawn)}
        scores["neurons"] = 0.1 * torch.rand(3 * 48, generator=drawn)
        for block, kind in (("attn_block", "kv_groups"), ("mlp_block", "neurons")):
            scores[block] = 0.9 * scores[kind].view(3, -1).sum(1)
        fewer = speedup.by_parameters(allocator, scores, seconds, 1.3)
        reached = seconds.total(allocator.budget.shape) / seconds.total(fewer)
        assert reached >= 1.3
        faster = speedup.by_seconds(allocator, scores, seconds, reached - 1e-9)
        assert loss(faster.layers, scores) <= loss(fewer.layers, scores) + 1e-6


def loss(layers: Any, scores: dict[str, torch.Tensor]) -> float:
    """Return what a shape loses of a model of 2 KV groups and 48 neurons in a layer."""
    total = 0.0
    for i, layer in enumerate(layers):
        groups, neurons = scores["kv_groups"].view(3, 2)[i], scores["neurons"].view(3, 48)[i]
        parts = (
            (groups, layer.kv_heads, scores["attn_block"][i]),
            (neurons, layer.neurons, scores["mlp_block"][i]),
        )
        for units, kept, block in parts:
            total += float(units.sort().values[: len(units) - kept].sum() if kept else block)
    return total

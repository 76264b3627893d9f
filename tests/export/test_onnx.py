"""What an ONNX graph is traced from, and how its files come into being; tests/clients runs them."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nuteprune.errors import RunFailed, UserError
from nuteprune.export import onnx
from nuteprune.export.checkpoint import save
from nuteprune.export.onnx import Exporter, obstacles, write_onnx
from nuteprune.model.families import FAMILIES
from tests.conftest import json_line
from tests.families import each_plain_family


@each_plain_family
@torch.no_grad()
def test_prompt_and_decoding_with_an_explicit_cache_are_the_model(
    case: Callable, tokens: Tensor, model_type: str
) -> None:
    model = case(model_type).pruned
    exporter = Exporter(model)
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = model(
        input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False
    ).logits
    cache = exporter.past(2, 0)
    for start, end in ((0, 9), (9, 10), (10, 12)):
        new = slice(start, end)
        logits, cache = exporter(tokens[:, new], mask[:, :end], positions[:, new], cache)
        seen = mask[:, new].bool()
        theirs = expected[:, new][seen]
        size = max(1.0, float(theirs.abs().max()))
        torch.testing.assert_close(logits[seen], theirs, atol=1e-5 * size, rtol=1e-5)
    # Layer 1 has no attention; 0 and 2 have their own numbers of KV heads.
    counts = {i: x.kv_heads for i, x in enumerate(case(model_type).shape.layers) if x.attention}
    assert [x.shape for pair in cache for x in pair] == [
        (2, counts[i], 12, exporter.anatomy.head_dim) for i in (0, 0, 2, 2)
    ]
    assert exporter.inputs[3:] == [
        f"past_key_values.{i}.{part}" for i in (0, 2) for part in ("key", "value")
    ]


def test_logits_that_are_not_numbers_are_an_error(
    case: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = Exporter(case("llama").pruned)

    class Session:
        broken = 0

        def get_inputs(self) -> list[Any]:
            return [SimpleNamespace(name=x) for x in exporter.inputs]

        def run(self, _: None, feed: dict[str, Any]) -> list[Any]:
            given = {k: torch.from_numpy(x) for k, x in feed.items()}
            ids, mask, positions, *cache = (given[x] for x in exporter.inputs)
            pairs = list(zip(cache[::2], cache[1::2], strict=True))
            logits, cache = exporter(ids, mask, positions, pairs)
            if ids.shape[1] == self.broken:
                logits = logits * float("nan")
            return [x.detach().numpy() for x in (logits, *(x for pair in cache for x in pair))]

    session = Session()
    runtime = SimpleNamespace(InferenceSession=lambda *_, **__: session)
    monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
    assert exporter.error(tmp_path / "m.onnx") < 1e-5
    session.broken = 1  # the second call, a token
    assert math.isnan(exporter.error(tmp_path / "m.onnx"))


# --- files -----------------------------------------------------------------------------------


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Lets files be written without the packages: what is in them, and how far off they are."""
    told: dict[str, Any] = {"content": b"graph", "error": 0.0}

    def write(graph: None, file: Path, data: str | None) -> None:
        file.write_bytes(told["content"])
        if data:
            (file.parent / data).write_bytes(b"weights of " + told["content"])

    def error(self: Exporter, file: Path) -> float:
        assert file.read_bytes() == told["content"]
        return told["error"]

    monkeypatch.setattr(onnx, "find_spec", lambda name: object())
    monkeypatch.setattr(Exporter, "graph", lambda self: None)
    monkeypatch.setattr(Exporter, "error", error)
    monkeypatch.setattr(onnx, "_save", write)
    return told


def content(folder: Path) -> dict[str, bytes]:
    return {x.name: x.read_bytes() for x in folder.iterdir()}


@pytest.mark.parametrize("off", [2e-3, float("nan")])
def test_a_file_that_computes_something_else_is_not_written(
    case: Callable, tmp_path: Path, fake: dict[str, Any], off: float
) -> None:
    (tmp_path / "m.onnx").write_bytes(b"old")
    fake["error"] = off
    with pytest.raises(RunFailed, match=r"more than 0\.001"):
        write_onnx(case("llama").pruned, tmp_path / "m.onnx")
    assert content(tmp_path) == {"m.onnx": b"old"}


def test_what_a_killed_export_left_behind_is_replaced(
    case: Callable, tmp_path: Path, fake: dict[str, Any]
) -> None:
    (tmp_path / ".m.onnx.0.partial").mkdir()
    (tmp_path / ".m.onnx.0.partial" / "m.onnx.01234567.data").write_bytes(b"half")
    written = write_onnx(case("llama").pruned, tmp_path / "m.onnx")
    assert content(tmp_path) == {"m.onnx": b"graph"}
    assert (written.files, written.bytes) == (["m.onnx"], 5)


def test_large_weights_are_beside_the_graph_and_never_met_by_another(
    case: Callable, tmp_path: Path, fake: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx, "LARGEST_FILE", 4 * case("llama").pruned.num_parameters() - 1)
    model, path = case("llama").pruned, tmp_path / "m.onnx"
    bracketed = tmp_path / "m[8b].onnx"  # of a pattern it would be no name
    files = {x for _ in range(2) for x in write_onnx(model, bracketed).files[1:]}
    assert len(files) == 2
    assert len([*tmp_path.iterdir()]) == 2
    for file in [*tmp_path.iterdir()]:
        file.unlink()
    (tmp_path / "m.onnx.mine.data").write_bytes(b"mine")
    (first, data), fake["content"] = write_onnx(model, path).files, b"new"
    assert first == "m.onnx"
    before = content(tmp_path)
    assert before[data] == b"weights of graph"

    # Cut off between weights and graph, the old pair is whole; then the new one takes its place.
    replace_file = Path.replace

    def stop(self: Path, target: Path) -> Path:
        if self.name == "m.onnx":
            raise KeyboardInterrupt
        return replace_file(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            write_onnx(model, path)
    assert content(tmp_path).items() >= before.items()
    _, other = write_onnx(model, path).files
    assert content(tmp_path) == {
        "m.onnx": b"new",
        other: b"weights of new",
        "m.onnx.mine.data": b"mine",
    }


def test_half_precision_is_refused(case: Callable, tmp_path: Path, fake: dict[str, Any]) -> None:
    import copy

    with pytest.raises(UserError, match=r"in torch.bfloat16; load it with dtype=torch.float32"):
        write_onnx(copy.deepcopy(case("llama").pruned).bfloat16(), tmp_path / "m.onnx")


@pytest.mark.parametrize("rope_type", ["longrope", "dynamic"])
@pytest.mark.parametrize("nested", [False, True])
def test_frequencies_that_follow_the_length_are_refused(rope_type: str, nested: bool) -> None:
    rope: dict[str, Any] = {"rope_type": rope_type, "rope_theta": 5e3}
    still = {"rope_type": "llama3", "rope_theta": 5e3}
    rope = {"full_attention": rope, "sliding_attention": still} if nested else rope
    (reason,) = obstacles(FAMILIES["llama"], SimpleNamespace(rope_parameters=rope))
    assert re.match(f"rope_type {rope_type} .*--to gguf", reason)
    assert not [*obstacles(FAMILIES["llama"], SimpleNamespace(rope_parameters=still))]
    assert not [*obstacles(FAMILIES["llama"], SimpleNamespace())]


@torch.no_grad()
def test_what_no_graph_computes_is_not_exported(tiny_model: Callable) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 5e3, "factor": 2.0}
    with pytest.raises(UserError, match="rope_type dynamic changes its frequencies"):
        Exporter(tiny_model("llama", rope_parameters=rope))


# --- the command -----------------------------------------------------------------------------


def test_the_command(case: Callable, tmp_path: Path, run: Callable, fake: dict[str, Any]) -> None:
    save(case("llama").pruned.to(torch.float32), tmp_path / "model")
    out = tmp_path / "m.onnx"
    code, stdout, _ = run(tmp_path / "model", "--to", "onnx", "--out", out, "--json")
    result = json_line(stdout)
    assert (code, result["files"], result["type"]) == (0, ["m.onnx"], "f32")
    assert result["parameters"] == case("llama").pruned.num_parameters()
    code, _, err = run(tmp_path / "model", "--to", "onnx", "--out", out)
    assert (code, "exists; pass --overwrite" in err) == (2, True)
    code, _, err = run(tmp_path / "model", "--to", "onnx", "--out", tmp_path / "n", "--type", "f16")
    assert (code, "--type f16 is unknown to --to onnx; pass one of f32" in err) == (2, True)


def test_without_the_extra_the_command_says_how_to_get_it(
    case: Callable, tmp_path: Path, run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(case("llama").pruned, tmp_path / "model")
    monkeypatch.setattr(onnx, "find_spec", lambda name: None if name == "onnxscript" else object())
    code, _, err = run(tmp_path / "model", "--to", "onnx", "--out", tmp_path / "m.onnx")
    assert code == 2
    assert err.strip().splitlines() == [
        "nuteprune: an ONNX export needs onnxscript, not installed here; "
        "run: pip install 'nuteprune[onnx]'"
    ]

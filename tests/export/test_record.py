"""What is no record is told in one line, by the key that is wrong."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nuteprune.data.fingerprint import learned_from
from nuteprune.errors import UserError
from nuteprune.export.card import model_card, perplexities_of
from nuteprune.export.record import read_record
from nuteprune.jobs.inspect import shapes_of
from nuteprune.judge.report import headline, kept_rows, recoveries, settings, verdict
from nuteprune.judge.run_files import RunFiles

LAYER = {"heads": 4, "kv_heads": 2, "neurons": 48}
PROTOCOL = {"measure": "how", "tokens": 10, "seed": 1}
FIGURES = {"before": {"text": 2.0}, "after": {"text": 3.0}, "protocol": PROTOCOL}
READ = {
    "documents": "0123456789abcdef" * 2,
    "files": "",
    "names": ["demo:recipes"],
    "judged": {"text": "in-domain"},
}
TUNED = {"steps": 2, "data": "text.txt", "kind": "text", "perplexity": FIGURES, "text": READ}
BOTH = {"before": 1.0, "after": 2.0}
ANSWERS = {
    **dict.fromkeys(("looping", "repeated", "length", "nats"), BOTH),
    **{"kl": 0.1, "agreement": 90.0},
    "protocol": {"measures": {"kl": "how"}, "prompts": "a", "answers": 2, "most_tokens": 8}
    | {"tokens": 9},
}
CONTEXT = {
    **{"tokens": 9, "needing": 3, "lost": 0.5, "lost_elsewhere": None, "gain": BOTH, "kept": 50.0},
    "protocol": {"measures": {"lost": "how"}, "blocks": 1},
}
RECORD: dict[str, Any] = {
    "schema": 1,
    "target": 0.2,
    "sparsity": 0.2,
    "total_sparsity": 0.1,
    "params": {"before": 200, "after": 180, "blocks_before": 100, "blocks_after": 80},
    "layers": [LAYER | {"neurons": 40, "attention": True}],
    "layers_before": [LAYER],
    "hidden": {"before": 32, "after": 32},
    "shapes": "free",
    "base_model": "owner/model",
    "teachers": {"count": 1, "sparsities": [0.1]},
    "perplexity": FIGURES,
    "copying": {"before": 60.0, "after": 50.0, "protocol": PROTOCOL},
    "answers": ANSWERS,
    "context": {"256": CONTEXT},
    "asked": {"kind": "sparsity", "value": 0.2},
    "config": {"model": "owner/model", "data": ["text.txt", "self"], "length": 16},
    "text": READ,
    "recover": TUNED | {"earlier": TUNED},
    "versions": {"nuteprune": "0"},
    "bytes_on_disk": 720,
    "seconds": 1.5,
    "seed": 7,
}
RECORD["history"] = [copy.deepcopy(RECORD)]
ODD = [None, "odd", -1, 0.5, True, [], {}, [None], {"x": None}, float("nan")]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each value in a record."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def changed(path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """Return the record with another value in a place; of `...` with none."""
    record = copy.deepcopy(RECORD)
    inner: Any = record
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return record


def use(record: dict[str, Any]) -> None:
    """Do what commands do with a record."""
    shapes_of(record)
    kept_rows(record)
    perplexities_of(record)
    headline(record, None)
    verdict(RunFiles(Path("out"), Path("out/run"), record, [], [], None))
    learned_from(record)
    settings(record)
    list(recoveries(record))
    model_card(record, remote_code=False)


@pytest.mark.slow
def test_whatever_is_odd_in_a_record_is_refused_or_no_trouble(tmp_path: Path) -> None:
    path, refused = tmp_path / "nuteprune.json", 0
    use(RECORD)
    for place in places(RECORD):
        for value in (..., *ODD):
            path.unlink(missing_ok=True)  # what is written over is waited for by some systems
            path.write_text(json.dumps(changed(place, value)))
            try:
                record = read_record(tmp_path)
            except UserError:
                refused += 1
                continue
            try:
                use(record)
            except Exception as error:
                raise AssertionError(f"{place} = {value}") from error
    assert refused > 500


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("params",), ..., "it lacks params"),
        (("params", "before"), "many", "params.before is not a count above 0"),
        (("layers", 0, "heads"), None, r"layers\[0\].heads is not a count"),
        (("layers",), [LAYER] * 2, "layers are 2, and layers_before 1"),
        (("layers",), [], "layers is not a list, or an empty one"),
        (("config",), None, "config is not an object"),
        (("answers", "kl"), "odd", "answers.kl is not a finite number or null"),
        (("context", "256", "lost"), ..., "context is not an object of figures of context"),
        (("history", 0, "hidden", "before"), 0, r"history\[0\].hidden.before is not a count above"),
    ],
)
def test_the_line_names_the_key(
    place: tuple[Any, ...], value: Any, message: str, tmp_path: Path
) -> None:
    (tmp_path / "nuteprune.json").write_text(json.dumps(changed(place, value)))
    with pytest.raises(UserError, match=f"nuteprune.json is damaged: {message}.*; take the file"):
        read_record(tmp_path)


def test_one_that_nests_without_end_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "nuteprune.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="is damaged"):
        read_record(tmp_path)


def test_a_folder_of_several_targets_names_one(tmp_path: Path) -> None:
    (inner := tmp_path / "sparsity-0.2").mkdir()
    (inner / "nuteprune.json").write_text(json.dumps(RECORD))
    with pytest.raises(UserError, match=f"several targets: pass {inner}"):
        read_record(tmp_path)
    assert read_record(inner)["sparsity"] == 0.2

"""docs/json.yaml declares what --json prints: keys and types, no more and no less."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from nuteprune.export.record import FORM
from tests.conftest import Run, json_line, json_of

from .conftest import TINY

DECLARED = Path(__file__).parents[2] / "docs" / "json.yaml"
DENSE = "Qwen/Qwen3-0.6B"
PRUNE = ["prune", DENSE, "--sparsity", "0.2", "--data", "my_text.jsonl", "--out", "new"]
RECOVER = ["recover", "small", "--data", "my_text.jsonl", "--out", "new"]

TYPES: dict[str, type | tuple[type, ...]] = {
    "integer": int,
    "number": (int, float),
    "string": str,
    "boolean": bool,
    "list": list,
    "object": dict,
    "null": type(None),
}


def schema(*sections: str) -> dict[str, tuple[str, bool]]:
    """Return key -> (type, whether it is always there) of sections of the declaration."""
    told = yaml.safe_load(DECLARED.read_text(encoding="utf-8"))["sections"]
    tables = {section["title"]: section.get("keys", {}) for section in told}
    found = {}
    for section in sections:
        for key, (kind, *more) in tables[section].items():
            for one in spelled(key):
                found[one] = (kind, len(more) < 2)
    return found


def spelled(key: str) -> list[str]:
    """Return the keys that {a,b} in one stands for."""
    head, brace, rest = key.partition("{")
    names, _, tail = rest.partition("}")
    return [head + name + tail for name in names.split(",")] if brace else [key]


def leaves(value: Any, known: dict[str, tuple[str, bool]], path: str = "") -> Iterator[tuple]:
    """Yield (documented key, value) of all that is in a result; without one, the path is the key.

    What is declared an object or a list is not looked into.
    """
    if path in known:
        yield path, value
    elif isinstance(value, dict):
        for key, one in value.items():
            at = f"{path}.{key}" if path else key
            star = f"{path}.*"
            fixed = any(k == at or k.startswith((f"{at}.", f"{at}[")) for k in known)
            yield from leaves(one, known, at if fixed or not path else star)
    elif isinstance(value, list):
        for one in value:
            yield from leaves(one, known, f"{path}[]")
    else:
        yield path, value


def check(result: dict[str, Any], known: dict[str, tuple[str, bool]], *there: str) -> None:
    """Hold a result to a schema; of the keys that are there sometimes, those named have to be."""
    seen = set()
    for key, value in leaves(result, known):
        assert key in known, f"{key} is not declared"
        kinds = known[key][0].split(" or ")
        if isinstance(value, bool):
            assert "boolean" in kinds, key
        else:
            assert isinstance(value, tuple(TYPES[kind] for kind in kinds)), (key, value)
        seen.add(key)
    needed = {key for key, (_, always) in known.items() if always or key.startswith(there or "!")}
    assert not needed - seen, sorted(needed - seen)


def merged(*results: dict[str, Any]) -> dict[str, Any]:
    return {key: value for result in results for key, value in result.items()}


def last(run: Run, *words: str) -> dict[str, Any]:
    return json_of(run, *words, *TINY[words[0]])


pytestmark = [pytest.mark.usefixtures("in_workspace"), pytest.mark.slow]


def test_prune(run: Run) -> None:
    check(last(run, *PRUNE), schema("prune"))
    again = ["prune", "small", *PRUNE[2:-1], "again"]
    check(last(run, *again), schema("prune"), "history")


def test_prune_to_several_targets(run: Run) -> None:
    several = ["prune", DENSE, "--sparsity", "0.1,0.2", *PRUNE[4:]]
    result = last(run, *several)
    assert list(result) == ["targets"]
    assert len(result["targets"]) == 2
    for one in result["targets"]:
        check(one, schema("prune"))


def test_a_dry_run(run: Run) -> None:
    check(last(run, *PRUNE, "--dry-run"), schema("--dry-run"), "phases")


def test_demo(run: Run) -> None:
    check(last(run, "demo", "--out", "new"), merged(schema("prune"), schema("demo")))


def test_eval(run: Run) -> None:
    known = schema("eval")
    both = ["protocol", "perplexity", "retention.perplexity"]
    check(last(run, "eval", "small", "--data", "my_text.jsonl"), known, *both[:2])
    against = ["--against", DENSE, "--data", "my_text.jsonl"]
    check(last(run, "eval", "small", *against), known, *both)


def test_bench(run: Run) -> None:
    check(last(run, "bench", "small"), schema("bench"))
    both = last(run, "bench", "small", "--against", DENSE)
    check(both, schema("bench"), "settings[].speedup")


def test_recover(run: Run) -> None:
    known = merged(schema("prune"), schema("recover"))
    check(last(run, *RECOVER), known)
    again = last(run, "recover", "better", *RECOVER[2:-1], "again")
    check(again, known, "recover.earlier")
    # A model that nuteprune has not pruned has no record.
    dense = last(run, "recover", DENSE, *RECOVER[2:-1], "dense")
    own = {key: known[key] for key in ("out", "bytes_on_disk")} | schema("recover")
    check(dense, own)


def test_family(run: Run) -> None:
    check(last(run, "family", "MODEL"), schema("family"))


def test_plan(run: Run) -> None:
    check(last(run, "plan", DENSE), schema("plan"))
    sized = last(run, "plan", DENSE, "--devices", "2", "--device-memory", "1GB")
    check(sized, schema("plan"), "devices", "device_memory_bytes", "settings", "fits")


def test_inspect(run: Run) -> None:
    record = {key: kind for key, kind in schema("prune").items() if key != "out"}
    known = merged(record, schema("inspect"))
    check(last(run, "inspect", "small"), known)
    recovered = last(run, "inspect", "better")
    check(recovered, merged(known, schema("recover")))


def test_export(run: Run) -> None:
    check(last(run, "export", "small", "--to", "gguf", "--out", "new.gguf"), schema("export"))


def test_a_table_of_costs_and_a_speedup(run: Run) -> None:
    table = ("--save-costs", "costs.json", "--lengths", "8", "--new-tokens", "4", "--device", "cpu")
    assert json_of(run, "bench", DENSE, *table)["out"] == "costs.json"
    fast = ["prune", DENSE, "--speedup", "1.0001@1x8+4", "--costs", "costs.json"]
    few = [*TINY["prune"], "--data", "my_text.jsonl", "--out", "new"]
    code, stdout, stderr = run(*fast, *few, "--json")
    if code == 0:
        check(json_line(stdout), schema("prune"), "asked.for", "asked.at", "speedup")
    else:  # a busy machine may make it slower
        assert (code, stdout) == (1, "")
        assert "the target was missed" in stderr
    plan = [*fast, *few, "--out", "planned", "--dry-run"]
    check(json_of(run, *plan), schema("--dry-run"), "expected_speedup")


def test_write(run: Run) -> None:
    check(last(run, "write", DENSE, "--out", "new.jsonl"), schema("write"))


def test_vocab(run: Run) -> None:
    words = ("vocab", DENSE, "--data", "my_text.jsonl", "--keep", "280", "--out", "new")
    known = merged(schema("prune"), schema("vocab"))
    del known["perplexity.protocol"], known["peak_memory_bytes"]
    known["peak_memory_bytes"] = ("integer", True)
    for role in ("before", "after"):  # per token, it would flatter
        known[f"perplexity.{role}.*"] = ("number", False)
    check(last(run, *words), known)


def test_what_readers_of_a_record_go_by_is_declared() -> None:
    known = schema("prune", "recover", "vocab")

    def names(form: Any, path: str = "") -> Iterator[str]:
        if isinstance(form, list):
            form, path = form[0], f"{path}[]"
        if isinstance(form, dict) and path not in known and not path.startswith("config"):
            for key, one in form.items():
                yield from names(one, f"{path}.{key.removesuffix('?')}".lstrip("."))
        else:
            yield path

    unknown = {
        name
        for name in names({k: x for k, x in FORM.items() if k != "history?"})
        if not any(key == name or key.startswith((f"{name}.", f"{name}[")) for key in known)
    }
    assert unknown == set()


def test_report(run: Run) -> None:
    check(last(run, "report", "small"), schema("report"))


def test_what_is_not_declared_is_found() -> None:
    known = schema("report")
    good = {"report": "a", "plots": []}
    check(good, known)
    for bad in ({**good, "more": 1}, {"report": "a"}, {**good, "report": 1}):
        with pytest.raises(AssertionError):
            check(bad, known)

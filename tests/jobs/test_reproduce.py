"""The command and the settings that make a run again, from its record."""

from __future__ import annotations

import copy
import shlex

from nuteprune.jobs import reproduce


def test_the_command_says_what_was_set() -> None:
    config = {
        "model": "my model; rm -rf /",
        "data": "it's.txt",
        "device": "auto",
        "length": 64,
        "target_sparsity": 0.2,
        "max_steps": 6,
        "save_steps": 50,
        "learning_rate": 1e-05,
        "refit": False,
        "lr_scheduler_kwargs": {"power": 1.0, "lr_end": 1e-07},
        "eval_data": None,
    }
    record = {"config": config, "seed": 7}
    before = copy.deepcopy(record)
    parts = shlex.split(" ".join(reproduce.command(record, "new folder")))
    assert record == before
    assert parts[:3] == ["nuteprune", "prune", "my model; rm -rf /"]
    options = list(zip(parts[3::2], parts[4::2], strict=True))
    assert options == [
        ("--data", "it's.txt"),
        ("--length", "64"),
        ("--sparsity", "0.2"),
        ("--steps", "6"),
        ("--set", "learning_rate=1.0e-05"),
        ("--set", "refit=false"),
        ("--set", "lr_scheduler_kwargs={power: 1.0, lr_end: 1.0e-07}"),
        ("--set", "seed=7"),
        ("--out", "new folder"),
    ]


def test_a_recovery_is_made_again_from_the_target_that_it_was_of() -> None:
    config = {"model": "demo", "target_sparsity": [0.1, 0.2], "max_steps": 9}
    first = {"data": "a b.txt", "text_column": "text", "steps": 5, "dtype": "auto", "seed": 3}
    second = {"data": "demo", "epochs": 0.5, "steps": 7, "asked_for": "epochs", "earlier": first}
    second["eval_data"] = "c.txt"
    record = {"config": config, "target": 0.1, "recover": second}
    pruning, *tunings = (" ".join(parts) for parts in reproduce.commands(record, "out"))
    assert pruning.startswith("nuteprune prune demo --sparsity 0.1,0.2 --steps 9")
    assert pruning.endswith("--out out-0")
    assert tunings == [
        "nuteprune recover out-0/sparsity-0.1 --text-column text --data 'a b.txt' --steps 5 "
        "--seed 3 --out out-1",
        "nuteprune recover out-1 --data demo --eval-data c.txt --epochs 0.5 --out out",
    ]
    assert reproduce.commands({"recover": first}, "out") == []


def test_a_target_of_another_kind_is_named_as_its_folder_is() -> None:
    config = {"model": "demo", "target_size": ["200MB", "150MB"]}
    record = {
        "config": config,
        "target": 0.33,
        "asked": {"kind": "size", "value": 200_000_000},
        "recover": {"data": "demo", "steps": 7},
    }
    pruning, tuning = (" ".join(parts) for parts in reproduce.commands(record, "out"))
    assert pruning == "nuteprune prune demo --size 200MB,150MB --out out-0"
    assert tuning.startswith("nuteprune recover out-0/size-200MB ")


def test_a_vocabulary_is_cut_again_by_its_own_command() -> None:
    record = {"config": {"model": "demo", "data": ["a b.txt"], "keep": 300}, "target": 0.0}
    (parts,) = reproduce.commands(record, "out")
    assert " ".join(parts) == "nuteprune vocab demo --data 'a b.txt' --keep 300 --out out"
    record["config"] |= {"data": ["a.jsonl", "self"], "text_column": "the text", "length": 64}
    (parts,) = reproduce.commands(record, "out")
    more = "--data a.jsonl --data self --text-column 'the text' --length 64"
    assert sorted(" ".join(parts).split(" --")) == sorted(
        f"nuteprune vocab demo {more} --keep 300 --out out".split(" --")
    )

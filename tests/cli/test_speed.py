"""A speedup that is asked for: by a table, and held to a measurement whose timings are injected."""

from __future__ import annotations

import errno
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from nuteprune.console import Output
from nuteprune.jobs import speed, timing
from nuteprune.jobs.job import PruneJob
from nuteprune.jobs.prune_run import trainer_config
from nuteprune.jobs.read_settings import make_job
from nuteprune.jobs.sources import load_model
from nuteprune.judge.bench import Timing
from nuteprune.judge.work import Workload
from nuteprune.judge.worker import Worker
from tests.conftest import Run, json_line

pytestmark = pytest.mark.slow

AT = "1x8+4"
SMALL = [
    *("--steps", "0", "--length", "24", "--device", "cpu", "--dtype", "float32", "--shares", "1"),
    *("--set", "calibration_blocks=2", "--set", "eval_blocks=2", "--set", "neuron_multiple=4"),
]
TABLE: dict[str, Any] = {
    **{"schema": 1, "model_type": "llama", "hidden": 32, "head_dim": 8, "layers": 3},
    "new_tokens": 4,
    "attention": [
        {"heads": g * r, "kv_heads": g, "prefill": 8.0, "decode": 0.5 + g * r / 10}
        for g in (1, 2)
        for r in (1, 2)
    ],
    "mlp": [{"neurons": n, "prefill": 3.0 + n, "decode": 0.2 + n / 48} for n in (1, 24, 48)],
    "rest": {"prefill": 1.0, "decode": 0.5},
}


def seconds(layers: list[dict[str, Any]], phase: str) -> float:
    """Return what the table says of a record's layers, reckoned anew."""
    total = TABLE["rest"][phase]
    for layer in layers:
        heads, neurons = layer["heads"], layer["neurons"]
        decode = (0.5 + heads / 10) * bool(heads) + (0.2 + neurons / 48) * bool(neurons)
        prefill = 8.0 * bool(heads) + (3 + neurons) * bool(neurons)
        total += {"decode": decode, "prefill": prefill}[phase]
    return float(total)


@pytest.fixture
def passes(model: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Seconds of the passes of the result and of the dense model, by `ours` and `dense`."""
    told = {"ours": 1.0, "dense": 1.3}

    class Told(Worker):
        def time(self, _: Workload) -> Timing:
            who = "dense" if Path(self.name) == model else "ours"
            return Timing(told[who], told[who])

    monkeypatch.setattr(timing, "Worker", Told)
    return told


@pytest.fixture
def words(model: Path, text: Path, tmp_path: Path) -> list[Any]:
    table = tmp_path / "costs.json"
    table.write_text(json.dumps(TABLE))
    named = ["--data", text, "--out", tmp_path / "out", "--costs", table]
    return ["prune", model, *named, *SMALL]


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_the_result_is_as_fast_as_is_asked_by_the_table(
    phase: str, words: list[Any], passes: dict[str, float], run: Run
) -> None:
    code, stdout, stderr = run(*words, "--speedup", f"1.3@{phase}:{AT}", "--json")
    assert code == 0, stderr
    record = json_line(stdout)
    before, after = (seconds(record[x], phase) for x in ("layers_before", "layers"))
    assert 1.3 <= before / after < 1.45
    assert record["asked"] == {"kind": "speedup", "value": 1.3, "for": phase, "at": AT}
    assert record["target"] == record["sparsity"]
    assert record["speedup"][phase]["median"] == pytest.approx(1.3)
    assert f"Speed   {phase} at {AT}" in stderr
    out = Path(record["out"])
    assert json.loads((out / "run/speed.json").read_text())["rows"]
    table = Path(words[words.index("--costs") + 1])
    assert record["config"]["costs"] == str(table)
    rest = {name: 0.99 * cost for name, cost in TABLE["rest"].items()}
    table.write_text(json.dumps({**TABLE, "rest": rest}))
    code, _, stderr = run(*words, "--speedup", f"1.3@{phase}:{AT}", "--resume")
    assert (code, "was started with costs" in stderr) == (2, True)


@pytest.mark.parametrize(("ours", "expected"), [(1.05, 0), (1.06, 1)])
def test_only_what_is_slower_than_95_percent_of_it_in_every_pass_has_failed(
    ours: float, expected: int, words: list[Any], passes: dict[str, float], run: Run
) -> None:
    passes["ours"] = ours  # 1.238 and 1.226 times as fast; 0.95 of 1.3 is 1.235
    code, _, stderr = run(*words, "--speedup", f"1.3@{AT}")
    assert code == expected, stderr
    last = stderr.splitlines()[-1] if code else ""
    assert ("the target was missed" in last) == (code == 1)
    assert (Path(words[words.index("--out") + 1]) / "model.safetensors").is_file()


def test_a_dry_run_tells_the_speed_that_is_expected(words: list[Any], run: Run) -> None:
    code, stdout, stderr = run(*words, "--sparsity", 0.3, "--dry-run", "--json")
    assert code == 0, stderr
    plan = json_line(stdout)
    whole = [{"heads": 4, "neurons": 48}] * 3
    faster = seconds(whole, "decode") / seconds(plan["shape"][0]["layers"], "decode")
    assert plan["expected_speedup"] == [pytest.approx(faster)]


def test_a_table_is_measured_once_and_can_be_taken_elsewhere(
    model: Path, text: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUTEPRUNE_CACHE", str(tmp_path / "cache"))
    words = ["prune", model, "--data", text, "--out", tmp_path / "out", *SMALL]
    asked = ["--speedup", f"1.01@{AT}", "--dry-run"]
    for _ in range(2):
        code, _, stderr = run(*words, *asked)
        assert code == 0, stderr
    (path,) = (tmp_path / "cache").glob("costs-*.json")
    assert "timing blocks" not in stderr
    file = tmp_path / "new" / "costs.json"
    short = ["--lengths", 8, "--new-tokens", 4, "--device", "cpu", "--dtype", "float32"]
    code, stdout, stderr = run("bench", model, "--save-costs", file, *short, "--json")
    assert code == 0, stderr
    found = json_line(stdout)
    written = json.loads(file.read_text())
    assert written.keys() == json.loads(path.read_text()).keys()
    assert found == {"out": str(file), **written}
    assert {row["neurons"] for row in written["mlp"]} >= {1, 48}
    assert run(*words, *asked, "--costs", file)[0] == 0
    longer = ["--speedup", "1.01@1x9+4", "--dry-run"]
    code, _, stderr = run(*words, *longer, "--costs", file)
    assert (code, "measured with length 8, and --speedup at 1x9+4 has 9" in stderr) == (2, True)


def test_two_runs_at_once_share_one_table(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUTEPRUNE_CACHE", str(tmp_path / "cache"))
    both, measured = Barrier(2), []

    def write(path: Path, *_: Any) -> None:
        measured.append(path)
        time.sleep(0.3)  # in which the other would begin
        path.write_text(json.dumps(TABLE))

    monkeypatch.setattr(speed, "write_table", write)
    given = {"model": str(model), "speedup": f"1.2@{AT}", "device": "cpu"}
    job = make_job(PruneJob, {**given, "out": tmp_path / "out"})
    config, loaded = trainer_config(job, tmp_path / "run"), load_model(str(model), None)

    def table(_: int) -> Any:
        with Output(quiet=True).bars() as bars:
            both.wait()
            return speed.costs_for(job, config, loaded, bars)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(table, range(2)))
    assert len(measured) == 1
    assert found[0] == found[1]


def test_a_cache_that_takes_nothing_is_told_before_blocks_are_timed(
    words: list[Any], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setenv("NUTEPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("nuteprune.jobs.guard.tempfile.TemporaryFile", refuse)
    monkeypatch.setattr(speed, "write_table", None)
    at = words.index("--costs")
    code, _, stderr = run(*words[:at], *words[at + 2 :], "--speedup", f"1.2@{AT}", "--dry-run")
    assert code == 2
    assert f"cannot write the table of costs {tmp_path / 'cache'}/costs-" in stderr
    assert "Read-only file system" in stderr


def test_several_processes_need_one_table(
    model: Path, text: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nuteprune.jobs.speed.several_started", lambda: True)
    words = ["prune", model, "--data", text, "--out", tmp_path / "out", *SMALL]
    code, _, stderr = run(*words, "--speedup", f"1.2@{AT}")
    assert code == 2
    assert "needs one table for all" in stderr


BAD: dict[str, tuple[list[Any], str]] = {
    "slower": (["--speedup", 0.9], "above 1"),
    "falling": (["--speedup", "1.3,1.2"], "largest model comes first"),
    "out of reach": (["--speedup", f"99@{AT}"], "make it at most"),
    "another phase": (["--speedup", "1.2@training"], "decode, prefill, both"),
    "another moment": (["--speedup", "1.2@both:256"], "1.5@1x256+32"),
    "too long": (["--speedup", "1.2@1x99999+32"], "the length of --speedup at 1x9"),
    "the width": (["--speedup", f"1.2@{AT}", "--gates", "hidden"], "leave hidden out"),
    "with another": (["--speedup", 1.2, "--params", "20K"], "both say how much"),
    "no such table": (["--speedup", f"1.2@{AT}", "--costs", "no.json"], "cannot read --costs no"),
}


@pytest.mark.parametrize("case", BAD)
def test_speeds_that_cannot_be_are_one_line_and_exit_code_2(
    case: str, words: list[Any], run: Run
) -> None:
    more, expected = BAD[case]
    code, _, stderr = run(*words, *more)
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert (code, len(lines)) == (2, 1), stderr
    assert expected in lines[0]

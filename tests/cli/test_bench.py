from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run, json_line

pytestmark = pytest.mark.slow

SHORT = [
    *("--batch-sizes", "1,2", "--lengths", "4", "--new-tokens", "2", "--repeats", "2"),
    *("--device", "cpu", "--dtype", "float32", "--threads", "1"),
]


def test_a_table_and_its_json(model: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    shutil.copytree(model, out)
    (out / "run").mkdir()
    code, stdout, stderr = run("bench", out, "--against", model, *SHORT, "--save", "--json")
    assert (code, "Traceback" in stderr) == (0, False), stderr
    found = json_line(stdout)
    saved = json.loads((out / "run/speed.json").read_text())
    assert saved.items() >= found.items()
    assert len(saved["rows"]) == 2 * 3
    row = saved["rows"][1]
    assert row["name"] == "decode, batch 1, 4 tokens"
    first = found["settings"][0]["models"]
    for key, name in (("pruned", out), ("dense", model)):
        assert row[key] == first[str(name)]["decode_tokens_per_second"]["median"]
    assert (row["unit"], row["better"]) == ("tokens/s", "higher")
    assert "1 thread," in saved["conditions"]
    assert len(saved["notes"]) == 2
    decode = found["settings"][0]["speedup"]["decode"]
    assert row["gain"] == decode["median"]
    assert {k: row[k] for k in ("low", "high", "bound", "verdict")}.items() <= decode.items()
    assert decode["verdict"] in ("none", "noise")  # two passes, of one and the same model
    assert "decode n" in saved["notes"][0]
    assert decode["reached"] is None
    assert saved["notes"][0].endswith(", its bound 1.00 x")
    assert [x.name for x in (out / "run").iterdir()] == ["speed.json"]
    about = found["models"][str(out)]
    assert about == found["models"][str(model)]
    assert about["bytes_on_disk"] == (model / "model.safetensors").stat().st_size
    assert [x["batch_size"] for x in found["settings"]] == [1, 2]
    for setting in found["settings"]:
        assert setting["speedup"]["prefill"]["bound"] == 1
        assert setting["speedup"]["decode"]["bound"] == 1
        spread = setting["models"][str(out)]["decode_tokens_per_second"]
        assert 0 < spread["low"] <= spread["median"] <= spread["high"]
    assert (found["threads"], found["dtype"], found["attention"]) == (1, "float32", "sdpa")
    for text in ("1 thread, float32, sdpa attention", "times", "bound", "peak"):
        assert text in stderr


def test_one_model_alone(model: Path, run: Run) -> None:
    code, stdout, _ = run("bench", model, *SHORT)
    assert code == 0
    assert "prefill tok/s" in stdout
    assert "times faster" not in stdout


BAD: dict[str, tuple[list[str], str]] = {
    "no number": (["--batch-sizes", "1,many"], "such as 1,8"),
    "length 0": (["--lengths", "0"], "at least 1"),
    "no new tokens": (["--new-tokens", "0"], "at least 1"),
    "no repeats": (["--repeats", "0"], "at least 1"),
    "no threads": (["--threads", "0"], "at least 1"),
    "nothing to compare in a report": (["--save"], "--against"),
    "nowhere to save": (["--save", "--against", "demo"], "not the output folder of a run"),
    "no such dense model": (["--against", "./nope"], "nope"),
    "beyond the positions": (["--lengths", "63", "--new-tokens", "2"], "64 positions"),
    "unknown dtype": (["--dtype", "float99"], "float99"),
    "costs beyond the positions": (
        ["--save-costs", "costs.json", "--lengths", "63,8", "--new-tokens", "2"],
        "64 positions",
    ),
    "costs beside another": (["--save-costs", "costs.json", "--against", "demo"], "of MODEL alone"),
    "no file of costs": (["--save-costs", ""], "is a folder; name the file to write"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case: str, model: Path, run: Run) -> None:
    args, expected = BAD[case]
    code: Any
    code, _, stderr = run("bench", model, "--device", "cpu", *args)
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert (code, len(lines)) == (2, 1), stderr
    assert expected in lines[0]

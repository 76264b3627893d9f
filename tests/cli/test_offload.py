"""`prune --offload`: layers that stay off the device, in a whole job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Run


@pytest.mark.slow(seconds=6)
def test_a_job_writes_the_same(run: Run, tiny_model, tiny_tokenizer, tmp_path: Path) -> None:
    tiny_model("llama", vocab_size=300).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"the student learns from teacher number {i}" for i in range(900)))
    command = ["prune", tmp_path / "model", "--sparsity", "0.2,0.3", "--data", text, "--steps", "2"]
    command += ["--length", "16", "--batch-size", "2", "--set", "neuron_multiple=4", "--gates"]
    command += ["neurons", "--set", "calibration_blocks=4", "--set", "eval_blocks=2"]
    # The file holds float32, so that weights, and the result, are converted.
    command += ["--device", "cpu", "--dtype", "bfloat16", "--out"]
    for name, more in (("plain", ()), ("away", ("--offload",))):
        code, _, err = run(*command, tmp_path / name, *more)
        assert code == 0, err
    for target in ("sparsity-0.2", "sparsity-0.3"):
        plain, away = (tmp_path / name / target for name in ("plain", "away"))
        files = [(x / "model.safetensors").read_bytes() for x in (plain, away)]
        assert files[0] == files[1]
        records = [json.loads((x / "nuteprune.json").read_text()) for x in (plain, away)]
        assert records[0]["perplexity"] == records[1]["perplexity"]
        assert [x["config"].get("offload") for x in records] == [None, True]


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (("--bits", "8"), "weights in 8 or 4 bits cannot be offloaded"),
        (("--set", "sharded=true"), "offload is for one process"),
    ],
)
def test_what_does_not_go_with_it_is_refused(
    more: tuple[str, ...], line: str, run: Run, tiny_model, tmp_path: Path
) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    code, _, err = run(
        "prune", tmp_path / "model", "--sparsity", "0.2", "--offload", *more, "--out", out
    )
    assert code == 2
    assert line in err
    assert len(err.strip().splitlines()) == 1
    assert not out.exists()

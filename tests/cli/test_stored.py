"""What a run does not touch stays equal to the bit, whatever dtype the run computes in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nuteprune import load_pruned
from nuteprune.data.held_out import held_out_blocks
from nuteprune.judge.perplexity import perplexities
from tests.conftest import Run

pytestmark = pytest.mark.slow

STORED = {"float32": torch.float32, "float16": torch.float16}
KEPT = ("embed_tokens.weight", "norm.weight", "lm_head.weight")
"""What pruning heads and neurons leaves alone."""


@pytest.fixture
def stored(
    request: pytest.FixtureRequest, tiny_model, tiny_tokenizer, tmp_path: Path
) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint in a dtype, and its tensors."""
    model = tiny_model("llama", vocab_size=300)
    model.to(STORED[request.param]).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model", tensors(tmp_path / "model")


def prune(run: Run, model: Path, text: Path, out: Path, *more: str) -> None:
    command = ["prune", model, "--data", text, "--out", out, "--device", "cpu"]
    sizes = ["--dtype", "bfloat16", "--length", "16", "--batch-size", "2"]
    blocks = [
        "--set",
        "neuron_multiple=4",
        "--set",
        "calibration_blocks=4",
        "--set",
        "eval_blocks=2",
    ]
    code, _, err = run(*command, *sizes, *blocks, *more)
    assert code == 0, err


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def untouched(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x for name, x in tensors.items() if name.endswith(KEPT)}


@pytest.mark.parametrize("stored", STORED, indirect=True)
def test_a_cut_alone_rounds_nothing(run: Run, text: Path, stored, tmp_path: Path) -> None:
    folder, before = stored
    without = ("--set", "refit=false")
    prune(run, folder, text, tmp_path / "out", "--sparsity", "0.3", "--steps", "0", *without)
    after = tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, ours in after.items():
        theirs = before[name]
        assert ours.dtype == theirs.dtype
        if ours.dim() == 1 or ours.shape == theirs.shape:
            assert torch.equal(ours, theirs), name
        elif ours.shape[1] == theirs.shape[1]:  # rows were cut: each is one of theirs
            assert set(map(tuple, ours.tolist())) < set(map(tuple, theirs.tolist())), name
        else:
            assert set(map(tuple, ours.T.tolist())) < set(map(tuple, theirs.T.tolist())), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == json.loads((folder / "config.json").read_text())["dtype"]


@pytest.mark.parametrize("stored", STORED, indirect=True)
def test_what_is_trained_is_added_to_what_is_stored(
    run: Run, text: Path, stored, tmp_path: Path
) -> None:
    folder, before = stored
    settings = ("--set", "lora_rank=2")
    prune(run, folder, text, tmp_path / "out", "--sparsity", "0.2,0.3", "--steps", "4", *settings)
    for target in ("sparsity-0.2", "sparsity-0.3"):
        after = tensors(tmp_path / "out" / target)
        kept = untouched(after)
        assert kept.keys() == untouched(before).keys()
        assert all(torch.equal(x, before[name]) for name, x in kept.items())
        if STORED["float32"] not in {x.dtype for x in after.values()}:
            continue
        # Trained was a change of rank 2: all else is rounding, of the dtype it was added in. The
        # refit replaces last projections whole.
        whole = [x for x in after if x.endswith(("o_proj.weight", "down_proj.weight"))]
        whole += [x for x in after if after[x].shape != before[x].shape or after[x].dim() != 2]
        trained = after.keys() - kept.keys() - set(whole)
        assert trained
        for name in trained:
            sizes_R = torch.linalg.svdvals((after[name] - before[name]).double())
            assert sizes_R[2] < 1e-5 * sizes_R[0] + 1e-6, name


@pytest.mark.parametrize("stored", ["float32"], indirect=True)
def test_judged_is_what_the_file_computes_in_the_runs_dtype(
    run: Run, text: Path, stored, tiny_tokenizer, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    prune(run, stored[0], text, out, "--sparsity", "0.3", "--steps", "2")
    record = json.loads((out / "nuteprune.json").read_text())["perplexity"]
    blocks = held_out_blocks(str(text), tiny_tokenizer, count=2, length=16, vocab_size=300)
    for when, folder in (("before", stored[0]), ("after", out)):
        model = load_pruned(folder, dtype=torch.bfloat16)
        assert record[when] == perplexities(model, blocks, batch_size=4)


def test_a_checkpoint_that_does_not_state_its_dtype_keeps_it(
    run: Run, text: Path, model: Path, tmp_path: Path
) -> None:
    silent = tmp_path / "silent"
    silent.mkdir()
    for path in model.iterdir():
        (silent / path.name).write_bytes(path.read_bytes())
    config = json.loads((model / "config.json").read_text())
    config.pop("dtype")
    (silent / "config.json").write_text(json.dumps(config))
    before = {name: x.half() for name, x in tensors(model).items()}
    save_file(before, silent / "model.safetensors", metadata={"format": "pt"})
    prune(run, silent, text, tmp_path / "out", "--sparsity", "0.3", "--steps", "0")
    after = tensors(tmp_path / "out")
    assert {x.dtype for x in after.values()} == {torch.float16}
    assert all(torch.equal(x, before[name]) for name, x in untouched(after).items())

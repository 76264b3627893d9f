"""The main job on the real model, from a package index to a smaller checkpoint: few steps."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nuteprune import run
from nuteprune.cli.app import main
from nuteprune.data import demo as assets
from nuteprune.distill.coforward import CoForward, Role
from nuteprune.export.checkpoint import assemble, recount, save
from nuteprune.export.loading import load_pruned
from nuteprune.export.record import blocks_recount
from nuteprune.gates import copying_losses
from nuteprune.gates.masks import Masks
from nuteprune.jobs import demo
from nuteprune.jobs.folder import DEMOS
from nuteprune.jobs.sources import load_model
from nuteprune.judge import context
from nuteprune.judge.work import Workload
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.hooks import MaskHooks
from nuteprune.model.lora import LoraBank
from nuteprune.stages import judge
from nuteprune.train.config import NutePruneConfig
from nuteprune.train.constraints import make_allocator
from tests.conftest import json_line
from tests.forked import python, workers

pytestmark = [pytest.mark.network, pytest.mark.slow(25)]

SMALL = {
    "calibration_blocks": 2,
    "eval_blocks": 2,
}

STRANGER = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], trust_remote_code=True, dtype=torch.float32  # in bfloat16 tokens may tie
)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
assert not any(name.startswith("nuteprune") for name in sys.modules)
tied = model.lm_head.weight is model.get_input_embeddings().weight
ids = tokenizer("The history of bread begins", return_tensors="pt").input_ids
args = dict(attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
assert model.generation_config.use_cache and model.config.use_cache
same = torch.equal(model.generate(ids, **args), model.generate(ids, use_cache=False, **args))
print("tied", tied, "cache", same, "parameters", sum(p.numel() for p in model.parameters()))
"""


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Download once; a cache that is there already is used."""
    try:
        assets.model_folder()
        assets.documents()
    except Exception as error:
        pytest.fail(f"the embedded default cannot be fetched: {error}")


def test_demo_ends_with_a_smaller_checkpoint_that_strangers_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [x for k, v in SMALL.items() for x in ("--set", f"{k}={v}")]
    args = ["demo", "--steps", "4", "--batch-size", "1", "--length", "64", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["nuteprune", *args, *settings, "--json"])
    monkeypatch.chdir(tmp_path)
    # What is measured by copying takes a minute of a core each time; here a part of it will do.
    monkeypatch.setattr(copying_losses, "SEQUENCES", 1)
    monkeypatch.setattr(copying_losses, "LENGTH", 16)
    monkeypatch.setattr(context, "SEQUENCES", 2)
    monkeypatch.setattr(demo, "TIMED", Workload(batch_size=1, length=16, new_tokens=2))
    monkeypatch.setattr(run, "judge_beside", partial(run.judge_beside, tokens=2, blocks=3))
    monkeypatch.setattr(judge, "make_prompts", partial(judge.make_prompts, count=4))
    # tests/judge/test_bench.py starts interpreters for models that are timed.
    contexts = SimpleNamespace(get_context=lambda _: workers())
    monkeypatch.setattr("nuteprune.judge.worker.multiprocessing", contexts)
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capsys.readouterr()
    assert not stopped.value.code, err
    record = json_line(out)
    folder = tmp_path / DEMOS
    assert record["out"] == str(DEMOS)
    assert 0.2 <= record["sparsity"] <= 0.201
    assert record["answers"]["protocol"]["prompts"].startswith("questions written by the dense")
    assert 0 < record["answers"]["kl"] < 10
    assert "The worst answer" in err

    dense = recount(assets.model_folder())["total"]
    counted = recount(folder)
    blocks = blocks_recount(counted["tensors"], "llama")
    assert record["params"]["before"] == dense == 134_515_008
    assert record["params"]["blocks_before"] == 106_168_320
    assert record["params"]["blocks_after"] == blocks
    assert dense - counted["total"] == 106_168_320 - blocks
    saved_bytes = (assets.model_folder() / "model.safetensors").stat().st_size
    smaller = saved_bytes - (folder / "model.safetensors").stat().st_size
    assert smaller == pytest.approx(2 * (106_168_320 - blocks), abs=50_000)

    stranger = python("-c", STRANGER, folder)
    expected = f"tied True cache True parameters {counted['total']}"
    assert expected in stranger.out, stranger.err


def test_exactness_on_the_real_model(tmp_path: Path) -> None:
    model = load_model("demo", torch.float32)
    anatomy = Anatomy(model)
    allocator = make_allocator(anatomy, NutePruneConfig(output_dir="unused"))
    random = torch.Generator().manual_seed(0)
    kinds = allocator.constraints.kinds
    scores = {k: torch.rand(allocator.layout.units(k), generator=random) for k in kinds}
    shape = allocator.shape(scores, 0.2)
    hard = allocator.masks(shape, scores).values
    soft = {k: v * (0.7 + 0.3 * torch.rand(v.shape, generator=random)) for k, v in hard.items()}
    masks = Masks(allocator.layout, soft)
    tokens = torch.randint(0, 49_000, (1, 24), generator=random)
    hooks = MaskHooks(anatomy)
    with torch.no_grad():
        stock = load_model("demo", torch.float32)(tokens, use_cache=False).logits
        with hooks.using(Masks.open(allocator.layout, kinds)):
            assert torch.equal(model(tokens, use_cache=False).logits, stock)  # rule 1
        with hooks.using(masks):
            masked = model(tokens, use_cache=False).logits
        coforward, weight = CoForward(anatomy, hooks, LoraBank(anatomy)), torch.ones(1, 24)
        with (
            coforward.student(masks),
            coforward.roles(None, weight),
        ):  # computes what masks keep alone
            narrow = model(tokens, use_cache=False).logits
        assert (narrow - masked).abs().max() <= 1e-4 * masked.abs().max()
        with coforward.student(masks), coforward.roles(Role(), weight) as passage:
            assert torch.equal(model(tokens, use_cache=False).logits, narrow)  # rule 4
        assert passage.teacher_BTD is not None
        assert torch.equal(model.lm_head(passage.teacher_BTD), stock)
        hooks.remove()
        small, cut = assemble(anatomy, masks)
        save(small, tmp_path / "out")
        loaded = load_pruned(tmp_path / "out", dtype=torch.float32)
        for ours in (small, loaded):
            error = (ours(tokens).logits - masked).abs().max()
            assert error <= 1e-4 * masked.abs().max()  # rule 2
    assert cut == shape
    counted = blocks_recount(recount(tmp_path / "out")["tensors"], "llama")
    assert counted == allocator.budget.parameters(shape)  # rule 3

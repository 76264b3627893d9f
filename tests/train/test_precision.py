"""What half precision and large numbers do to a run."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from nuteprune import NutePruneConfig, load_pruned
from nuteprune.distill.coforward import Objective
from nuteprune.errors import RunFailed, UserError
from nuteprune.gates import importance
from nuteprune.gates.scores import Probe, Scores

from .conftest import LENGTH, make, trial_step

TOKENS = torch.arange(3, 3 + 60)[None]


def test_the_finalized_model_stays_as_it_is_when_it_is_written(tiny_model, tmp_path: Path) -> None:
    trainer = make(tiny_model("llama").bfloat16(), tmp_path / "run", max_steps=1)
    trainer.train()
    small = trainer.finalize()
    with torch.no_grad():
        before = small(TOKENS).logits
        trainer.save_pruned(tmp_path / "out")
        assert torch.equal(small(TOKENS).logits, before)
        assert torch.equal(load_pruned(tmp_path / "out")(TOKENS).logits, before)


def test_what_is_narrower_than_stored_makes_room_for_what_is_cut(
    tiny_model, tmp_path: Path
) -> None:
    model = tiny_model("llama").bfloat16()
    trainer = make(model, tmp_path / "run", stored_dtype=torch.float32, max_steps=1)
    del model
    trainer.train()
    with pytest.raises(UserError, match="narrower than they are stored"):
        trainer.finalize()
    learned = {id(value) for value in trainer.prepared.bank.state().values()}
    base = [p for n, p in trainer.model.named_parameters() if ".base_layer." in n]
    held = [weakref.ref(p) for p in base if id(p) not in learned]
    assert len(held) >= 3 * 5  # all but what refits have put in their place
    del base

    def load() -> Any:
        gc.collect()
        assert not any(x() is not None for x in held)
        return tiny_model("llama")

    small = trainer.finalize(load)
    kept = ("embed_tokens.weight", "norm.weight", "lm_head.weight")
    stored = {n: p for n, p in tiny_model("llama").named_parameters() if n.endswith(kept)}
    ours = dict(small.named_parameters())
    assert len(stored) == 9
    assert all(torch.equal(ours[name], value) for name, value in stored.items())


def test_small_gradients_survive_float16(
    tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As small as those of a layer term over thousands of tokens: below what float16 holds."""
    ids = torch.arange(3, 3 + 4 * LENGTH).remainder(90).view(4, LENGTH)
    found = []
    monkeypatch.setattr(NutePruneConfig, "losses", Objective(token_weight=0.0, layer_weight=1e-5))
    for dtype in (torch.float32, torch.float16):
        trainer = make(
            tiny_model("llama").to(dtype),
            tmp_path / str(dtype),
            max_grad_norm=1e9,
        )
        trainer.masks = trainer.prepared.allocator.chance(0.3)
        loss = trial_step(trainer, {"input_ids": ids})
        trainer._clip_grad_norm(trainer.model)
        lora = [p.grad.flatten() for n, p in trainer.model.named_parameters() if "lora_B" in n]
        found.append((loss, torch.cat(lora)))
    (loss, exact), (loss_16, half) = found
    assert float(loss_16) == pytest.approx(float(loss), rel=1e-2)
    assert exact.norm() > 0
    assert (half - exact).norm() < 0.05 * exact.norm()


def test_a_gradient_far_above_the_usual_is_clipped_to_half(tiny_model, tmp_path: Path) -> None:
    trainer = make(tiny_model("llama"), tmp_path)
    lora = [p for n, p in trainer.model.named_parameters() if "lora_" in n]
    for parameter in lora:
        parameter.grad = torch.full_like(parameter, 3.0)
    before = trainer._clip_grad_norm(trainer.model)
    assert float(before) == pytest.approx(3 * sum(p.numel() for p in lora) ** 0.5)
    after = torch.nn.utils.get_total_norm([p.grad for p in lora])
    assert float(after) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("place", ["lm_head", "model.layers.1.mlp.up_proj"])
def test_a_model_that_overflows_is_told_of_while_it_is_scored(
    place: str, tiny_model, tmp_path: Path
) -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    model.get_submodule(place).weight.data[3] = float("inf")
    trainer = make(model, tmp_path, method="surgeon")
    with pytest.raises(RunFailed, match=r"surgeon gave scores that are not finite.*float32"):
        trainer.train()


def test_scores_that_are_not_finite_end_the_run(
    tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(probe: Probe) -> Scores:
        scores = method.score(probe)
        scores["neurons"][3] = float("nan")
        return scores

    method: Any = importance.METHODS["random"]
    monkeypatch.setitem(importance.METHODS, "random", type(method)(broken))
    trainer = make(tiny_model("llama"), tmp_path, method="random")
    with pytest.raises(RunFailed, match=r"random gave scores that are not finite.*float32"):
        trainer.train()

"""What is the paper's alone: masks that move, snapshots that teach, rates of gates."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Adafactor

from nuteprune import UserError
from tests.train.conftest import LENGTH, make, metrics, trial_step


@pytest.mark.slow
def test_teachers_grow_and_lead_back_to_the_intact_model(tiny_model, tmp_path: Path) -> None:
    trainer = make(tiny_model("llama"), tmp_path, max_steps=20, target_sparsity=0.4, ramp_share=0.5)
    trainer.train()
    lines = metrics(tmp_path)
    sparsities = trainer.teachers.sparsities
    assert sparsities == sorted(sparsities)
    assert len(sparsities) >= 5
    assert lines[0]["teacher"] == -1
    assert lines[-1]["teacher"] == -1
    in_use = [line["teacher"] for line in lines]
    top = in_use.index(max(in_use))
    assert max(in_use) >= 0
    assert in_use[top:] == sorted(in_use[top:], reverse=True)
    taught = [(x["sparsity"], sparsities[x["teacher"]]) for x in lines if x["teacher"] >= 0]
    assert all(theirs <= ours for ours, theirs in taught)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "steps"), [(0.05, 24), (0.3, 8)])
def test_a_small_target_and_a_short_run_have_teachers_too(
    target: float, steps: int, tiny_model, tmp_path: Path
) -> None:
    settings = {"target_sparsity": target, "max_steps": steps, "ramp_share": 0.5}
    trainer = make(tiny_model("llama"), tmp_path, neuron_multiple=1, **settings)
    trainer.train()
    taught = {line["teacher"] for line in metrics(tmp_path)}
    assert len(trainer.teachers) >= 3
    assert len(taught) >= 3  # the dense model and at least two snapshots


@pytest.mark.parametrize("schedule", ["linear", "polynomial", "cosine", "constant_with_warmup"])
def test_gates_learn_at_a_constant_rate_and_lora_at_that_of_the_schedule(
    schedule: str, tiny_model, tmp_path: Path
) -> None:
    settings = {"lr_scheduler_type": schedule, "lr_scheduler_kwargs": {}, "warmup_steps": 2}
    soft = make(tiny_model("llama"), tmp_path, gate_type="hard_concrete", max_steps=8, **settings)
    soft.create_optimizer_and_scheduler(8)
    rates = []
    for _ in range(8):
        rates.append([group["lr"] for group in soft.optimizer.param_groups])
        soft.optimizer.step()
        soft.lr_scheduler.step()
    lora, *gates = zip(*rates, strict=True)
    assert [set(x) for x in gates] == [{0.1}, {0.1}]
    assert lora[0] == 0 < lora[1] < lora[2] == soft.args.learning_rate


def test_a_teacher_is_gone_before_the_backward_pass(
    tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(tiny_model("llama"), tmp_path, ramp_share=0.5)
    trainer.gates.begin_step(0.1, 0)
    trainer.teachers.record(0.1, trainer.gates.snapshot(), trainer.prepared.bank.state())
    held: list[weakref.ref[Any]] = []
    read = trainer.teachers.role

    def role(*args: Any) -> Any:
        found = read(*args)
        held.extend(weakref.ref(part) for part in found.lora.values())
        return found

    parts = type(trainer.args.losses).parts

    def after_the_pass(*args: Any) -> Any:
        assert held
        assert all(part() is None for part in held)
        return parts(*args)

    monkeypatch.setattr(trainer.teachers, "role", role)
    monkeypatch.setattr(type(trainer.args.losses), "parts", after_the_pass)
    ids = torch.arange(3, 3 + 2 * LENGTH).remainder(90).view(2, LENGTH)
    trainer._teacher_index = 0
    trial_step(trainer, {"input_ids": ids})


def test_the_published_loss_by_hand(tiny_model, tmp_path: Path) -> None:
    """0.9 x sum over layers of MSE + 0.1 x T^2 KL(teacher || student), T = 2/3, of a first step.

    As in the authors' code: `hidden_states` ends after the final norm, and the KL divergence is
    `F.kl_div` of logits (B, T, V) by `batchmean`, so the sum over tokens.
    """
    trainer = make(
        tiny_model("llama"),
        tmp_path,
        method="fisher",
        refit=False,
        objective="paper",
        max_steps=1,
    )
    batches = []
    compute = trainer.compute_loss

    def watched(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        batches.append(inputs["input_ids"].clone())
        return compute(model, inputs, *args, **kwargs)

    trainer.compute_loss = watched
    trainer.train()
    masks = trainer.final_masks().values
    teacher, student = tiny_model("llama"), tiny_model("llama")
    with torch.no_grad():
        for i, layer in enumerate(student.model.layers):
            columns = masks["kv_groups"].view(3, 2)[i].repeat_interleave(16)
            layer.self_attn.o_proj.weight *= columns
            layer.mlp.down_proj.weight *= masks["neurons"].view(3, 48)[i]
        theirs, ours = (x(batches[0], output_hidden_states=True) for x in (teacher, student))
    pairs = zip(theirs.hidden_states[1:], ours.hidden_states[1:], strict=True)
    mse = sum(float(((a - b) ** 2).mean()) for a, b in pairs)
    p, q = (torch.softmax(x.logits / (2 / 3), -1) for x in (theirs, ours))
    kl = float(torch.nn.functional.kl_div(q.log(), p, reduction="batchmean"))
    line = metrics(tmp_path)[0]
    assert line["layer"] == pytest.approx(0.9 * mse, rel=1e-4)
    assert line["token_kl"] == pytest.approx(0.1 * (2 / 3) ** 2 * kl, rel=1e-4)
    assert line["loss"] == pytest.approx(line["layer"] + line["token_kl"], rel=1e-4)


def test_masks_that_freeze_last_are_at_the_target(tiny_model, tmp_path: Path) -> None:
    settings = {"gate_type": "hard_concrete", "ramp_share": 0.6, "freeze_share": 1.0}
    trainer = make(tiny_model("llama"), tmp_path / "run", max_steps=3, **settings)
    trainer.train()
    assert not trainer.gates.frozen
    trainer.finalize()
    record = trainer.save_pruned(tmp_path / "out")
    assert 0.3 <= record["sparsity"] <= 0.32
    assert all(layer["neurons"] % 4 == 0 for layer in record["layers"])


def test_masks_freeze_where_the_ramp_ends(tiny_model, tmp_path: Path) -> None:
    soft = make(tiny_model("llama"), tmp_path, max_steps=8, gate_type="hard_concrete")
    assert soft.schedule.freeze_step == 4


def test_gradients_of_gates_that_are_not_finite_are_dropped(tiny_model, tmp_path: Path) -> None:
    trainer = make(tiny_model("llama"), tmp_path, gate_type="hard_concrete")
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    next(iter(trainer.gates.log_alpha.values())).grad.fill_(float("inf"))
    trainer._clip_grad_norm(trainer.model)
    assert trainer.bad_steps.read()[1] == 1
    assert all(bool((p.grad == 0).all()) for p in parameters)


def test_noise_differs_from_seed_to_seed_and_step_to_step(tiny_model, tmp_path: Path) -> None:
    drawn = set()
    for seed in (1, 2):
        settings = {"gate_type": "hard_concrete", "seed": seed}
        trainer = make(tiny_model("llama"), tmp_path / str(seed), **settings)
        for step in (0, 1):
            trainer.begin_step(step)
            drawn.add(tuple(trainer.gates.masks(1).values["neurons"].tolist()))
    assert len(drawn) == 4


def test_weight_decay_spares_gates(tiny_model, tmp_path: Path) -> None:
    settings = {"gate_type": "hard_concrete", "weight_decay": 0.25}
    groups = make(tiny_model("llama"), tmp_path, **settings).create_optimizer().param_groups
    assert [group["weight_decay"] for group in groups] == [0.25, 0.0, 0.0]


def test_multipliers_want_an_optimizer_that_ascends(tiny_model, tmp_path: Path) -> None:
    trainer = make(tiny_model("llama"), tmp_path, gate_type="hard_concrete")
    trainer.optimizer_cls_and_kwargs = (Adafactor, {"lr": 1e-3, "relative_step": False})
    with pytest.raises(UserError, match="multipliers ascend, which Adafactor cannot do"):
        trainer.create_optimizer()

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from nuteprune import RunFailed, UserError, load_pruned
from nuteprune.gates.allocate import Allocator
from nuteprune.plan.trial import trial_step

from .conftest import LENGTH, make, metrics


@pytest.mark.parametrize("steps", [0, *(pytest.param(x, marks=pytest.mark.slow) for x in (1, 4))])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gate_type": "hard_concrete"},
        {"ramp_share": 0.5},
        {"method": "flap"},
        {"method": "similarity", "neuron_multiple": 48},
        {"shapes": "uniform"},
        {"objective": "paper", "teacher": "dense"},
        {"teacher": "none", "compensation": False},
    ],
    ids=[
        "default",
        "hard-concrete",
        "ramp",
        "flap",
        "similarity",
        "uniform",
        "paper-objective",
        "no-teacher",
    ],
)
def test_any_number_of_steps_ends_at_the_target(
    settings: dict[str, Any], steps: int, tiny_model, tmp_path: Path
) -> None:
    if not steps and settings.get("gate_type") == "hard_concrete":
        steps = 2  # they are refused without any
    trainer = make(tiny_model("llama"), tmp_path / "run", max_steps=steps, **settings)
    if steps:
        trainer.train()
    small = trainer.finalize()
    record = trainer.save_pruned(tmp_path / "out")
    projections = sum(p.numel() for n, p in small.named_parameters() if "_proj" in n)
    assert record["params"]["blocks_after"] == projections
    assert record["params"]["after"] == sum(p.numel() for p in small.parameters())
    unit = unit_share(trainer.allocator)
    assert 0.3 <= record["sparsity"] <= 0.3 + unit + 1e-9
    tokens = torch.arange(3, 15)[None]
    with torch.no_grad():
        loaded = load_pruned(tmp_path / "out", dtype=torch.float32)
        assert torch.allclose(loaded(tokens).logits, small(tokens).logits, atol=1e-5)


def unit_share(allocator: Allocator) -> float:
    """The smallest step that shapes can take, as a share of the parameters."""
    layer = allocator.budget.shape.layers[0]
    width = allocator.budget.shape.hidden
    unit = allocator.constraints.neuron_multiple * 3 * width
    if allocator.constraints.uniform:
        unit *= len(allocator.budget.shape.layers)
    assert layer.neurons % allocator.constraints.neuron_multiple == 0
    return max(0.001, unit / allocator.budget.before)


@pytest.mark.slow
def test_training_lowers_the_loss_that_pruning_caused(tiny_model, tmp_path: Path) -> None:
    trainer = make(
        tiny_model("llama"),
        tmp_path,
        max_steps=60,
        per_device_train_batch_size=16,
        teacher="dense",
        compensation=False,
        ramp_share=0.1,
        freeze_share=0.1,
    )
    trainer.train()
    losses = [line["loss"] for line in metrics(tmp_path)]
    frozen = losses[trainer.schedule.stage(0).freeze_step :]
    assert sum(frozen[-5:]) < 0.8 * sum(frozen[:5])


@pytest.mark.slow
def test_teachers_grow_and_lead_back_to_the_intact_model(tiny_model, tmp_path: Path) -> None:
    trainer = make(tiny_model("llama"), tmp_path, max_steps=40, target_sparsity=0.4, ramp_share=0.5)
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
@pytest.mark.parametrize(("target", "steps"), [(0.05, 80), (0.2, 12), (0.3, 8)])
def test_a_small_target_and_a_short_run_have_teachers_too(
    target: float, steps: int, tiny_model, tmp_path: Path
) -> None:
    settings = {"target_sparsity": target, "max_steps": steps, "ramp_share": 0.5}
    trainer = make(tiny_model("llama"), tmp_path, neuron_multiple=1, **settings)
    trainer.train()
    taught = {line["teacher"] for line in metrics(tmp_path)}
    assert len(trainer.teachers) >= 3
    assert len(taught) >= 3  # the dense model and at least two snapshots


def test_the_default_is_the_surgeon_at_once_and_soft_gates_have_a_ramp(
    tiny_model, tmp_path: Path
) -> None:
    ours = make(tiny_model("llama"), tmp_path / "a", max_steps=3)
    theirs = make(tiny_model("llama"), tmp_path / "b", max_steps=3, method="surgeon")
    for trainer in (ours, theirs):
        trainer.train()
    assert [x["loss"] for x in metrics(tmp_path / "a")] == [
        x["loss"] for x in metrics(tmp_path / "b")
    ]
    for name, value in ours.coforward.bank.state().items():
        assert torch.equal(theirs.coforward.bank.state()[name], value), name
    soft = make(tiny_model("llama"), tmp_path / "c", max_steps=8, gate_type="hard_concrete")
    assert soft.schedule.stage(0).freeze_step == 4


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


def test_what_is_logged_of_a_step_is_of_all_its_parts(tiny_model, tmp_path: Path) -> None:
    trainer = make(
        tiny_model("llama"), tmp_path, max_steps=3, gradient_accumulation_steps=2, ramp_share=0.5
    )
    trainer.train()
    for line in metrics(tmp_path):
        assert line["loss"] == pytest.approx(line["token_kl"] + line["layer"], rel=1e-5)


def test_a_short_part_of_a_step_counts_by_its_tokens(tiny_model, tmp_path: Path) -> None:
    trainer = make(tiny_model("llama"), tmp_path)
    whole, short = ({"input_ids": torch.ones(n, LENGTH, dtype=torch.long)} for n in (2, 1))
    device = torch.device("cpu")
    assert trainer._get_num_items_in_batch([whole, whole], device) is None
    counts = trainer._get_num_items_in_batch([whole, short], device)
    assert counts.tolist() == [3 * LENGTH, 3 * (LENGTH - 1), 3]


@pytest.mark.parametrize("method", ["fisher", "random"])
def test_one_shot_masks_are_final_from_the_first_step(
    method: str, tiny_model, tmp_path: Path
) -> None:
    trainer = make(tiny_model("llama"), tmp_path, method=method, max_steps=2)
    seen = []
    compute = trainer.compute_loss

    def watched(*args: Any, **kwargs: Any) -> Any:
        assert trainer.gates.frozen
        seen.append({k: v.clone() for k, v in trainer.gates.masks(2).values.items()})
        return compute(*args, **kwargs)

    trainer.compute_loss = watched
    trainer.train()
    final = trainer.gates.snapshot().values
    assert len(seen) == 2
    assert all(torch.equal(masks[k], final[k]) for masks in seen for k in final)
    scores = trainer.pruning.first_scores
    shape = trainer.allocator.shape(scores, 0.3)
    expected = trainer.allocator.masks(shape, scores).values
    assert all(torch.equal(final[k], expected[k]) for k in final)
    lines = metrics(tmp_path)
    assert {line["teacher"] for line in lines} == {-1}
    assert {line["target"] for line in lines} == {0.3}
    assert {line["sparsity"] for line in lines} == {lines[0]["sparsity"]}
    losses = [line["loss"] for line in lines]
    assert losses[-1] != losses[0]  # LoRA is trained


def test_the_published_loss_by_hand(tiny_model, tmp_path: Path) -> None:
    """0.9 x sum over layers of MSE + 0.1 x T^2 KL(teacher || student), T = 2/3, of a first step.

    As in the authors' code: `hidden_states` ends after the final norm, and the KL divergence is
    `F.kl_div` of logits (B, T, V) by `batchmean`, so the sum over tokens.
    """
    trainer = make(
        tiny_model("llama"),
        tmp_path,
        method="fisher",
        compensation=False,  # so that LoRA adds nothing yet
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
    masks = trainer.gates.snapshot().values
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


class Killed(Exception):
    pass


class KillAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise Killed


@pytest.mark.slow
@pytest.mark.parametrize(
    "gates",
    [
        {"gate_type": "ranked"},
        {"gate_type": "ranked", "ramp_share": 0.5},
        {"gate_type": "hard_concrete"},
    ],
    ids=["ranked", "on a ramp", "hard-concrete"],
)
@pytest.mark.parametrize("killed_at", [4, 9])
def test_killed_and_resumed_is_never_interrupted(
    gates: dict[str, Any], killed_at: int, tiny_model, tmp_path: Path
) -> None:
    settings = {
        **gates,
        "max_steps": 12,
        "save_strategy": "steps",
        "save_steps": 3,
        "compensation": True,
    }
    whole = make(tiny_model("llama"), tmp_path / "whole", **settings)
    whole.train()
    broken = make(
        tiny_model("llama"), tmp_path / "broken", callbacks=[KillAt(killed_at)], **settings
    )
    with pytest.raises(Killed):
        broken.train()
    resumed = make(tiny_model("llama"), tmp_path / "broken", **settings)
    last = tmp_path / "broken" / f"checkpoint-{(killed_at - 1) // 3 * 3}"
    resumed.train(resume_from_checkpoint=str(last))

    keys = ("step", "loss", "token_kl", "layer", "sparsity", "teacher", "grad_norm")
    ours = [{k: line[k] for k in keys} for line in metrics(tmp_path / "broken")]
    theirs = [{k: line[k] for k in keys} for line in metrics(tmp_path / "whole")]
    assert ours == theirs
    assert resumed.teachers.sparsities == whole.teachers.sparsities
    assert whole.teachers.sparsities or "ramp_share" not in gates
    state, other = resumed.finalize().state_dict(), whole.finalize().state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[name], other[name]) for name in state)


@pytest.mark.slow
def test_eight_micro_batches_of_one_equal_one_of_eight(tiny_model, tmp_path: Path) -> None:
    settings = {"max_steps": 6, "compensation": False, "calibration_blocks": 8}
    one = make(tiny_model("llama"), tmp_path / "a", per_device_train_batch_size=8, **settings)
    one.train()
    many = make(
        tiny_model("llama"),
        tmp_path / "b",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
        **settings,
    )
    many.train()
    ours = [line["loss"] for line in metrics(tmp_path / "b")]
    theirs = [line["loss"] for line in metrics(tmp_path / "a")]
    assert ours == pytest.approx(theirs, rel=1e-4)
    for kind, value in one.gates.snapshot().values.items():
        assert torch.equal(value, many.gates.snapshot().values[kind])


def test_losses_that_are_not_finite_stop_the_run(tiny_model, tmp_path: Path) -> None:
    model = tiny_model("llama")
    trainer = make(model, tmp_path, method="random", compensation=False)

    original = trainer.compute_loss
    trainer.compute_loss = lambda *a, **k: original(*a, **k) * float("nan")
    with pytest.raises(RunFailed, match="not finite in 3 steps"):
        trainer.train()
    weights = trainer.coforward.bank.state().values()
    assert all(torch.isfinite(w).all() for w in weights)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_sparsity": 1.2}, "between 0 and 1"),
        ({"target_sparsity": 0.99}, "at most"),
        ({"gates": "headz"}, "known kinds"),
        ({"gates": "kv_groups", "target_sparsity": 0.5}, "out of reach"),
        ({"gate_type": "soft"}, "must be one of"),
        ({"method": "wand"}, "must be one of random, wanda"),
        ({"method": "fisher", "gate_type": "hard_concrete"}, "nothing to rank"),
        ({"gate_type": "hard_concrete", "max_steps": 0}, "learns its masks in steps"),
        ({"gate_type": "hard_concrete", "ramp_share": 0.0}, "learns its masks in steps"),
        ({"method": "similarity", "gates": "heads"}, "cannot score gates on heads"),
        ({"method": "flap", "gates": "kv_groups,hidden"}, "cannot score gates on hidden"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    settings: dict[str, Any], message: str, tiny_model, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        make(tiny_model("llama"), tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_an_unsupported_family_names_the_supported_ones(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50))
    with pytest.raises(UserError, match=r"gpt2.*supported: llama"):
        make(model, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_gradient_checkpointing_changes_nothing(tiny_model, tmp_path: Path) -> None:
    plain = make(tiny_model("llama"), tmp_path / "a", max_steps=5)
    plain.train()
    saving = make(tiny_model("llama"), tmp_path / "b", max_steps=5, gradient_checkpointing=True)
    saving.train()
    ours = [line["loss"] for line in metrics(tmp_path / "b")]
    assert ours == pytest.approx([line["loss"] for line in metrics(tmp_path / "a")], rel=1e-5)


def test_dropout_makes_no_noise_and_stays_in_the_config(tiny_model, tmp_path: Path) -> None:
    model = tiny_model("opt", dropout=0.5, attention_dropout=0.5)
    trainer = make(model, tmp_path, max_steps=2, gates="neurons")
    trainer.model.train()
    tokens = torch.arange(3, 15)[None]
    with torch.no_grad():
        first, second = (trainer.anatomy.model(tokens).logits for _ in range(2))
    assert torch.equal(first, second)
    assert trainer.finalize().config.dropout == 0.5


def test_the_language_model_term_is_the_models_own_loss_of_real_tokens(
    tiny_model, tmp_path: Path
) -> None:
    trainer = make(tiny_model("llama"), tmp_path, teacher="none")
    ids = torch.arange(3, 35).reshape(2, LENGTH)
    real = torch.ones_like(ids)
    real[1, 10:] = 0
    trial_step(trainer, {"input_ids": ids, "attention_mask": real})
    labels = ids.masked_fill(real == 0, -100)
    with torch.no_grad(), trainer.hooks.using(trainer.gates.masks(len(ids))):
        expected = trainer.anatomy.model(ids, attention_mask=real, labels=labels).loss
    assert float(trainer.parts["lm"]) == pytest.approx(float(expected), rel=1e-5)


def test_a_teacher_is_gone_before_the_backward_pass(
    tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(tiny_model("llama"), tmp_path, ramp_share=0.5)
    trainer.gates.begin_step(0.1, 0)
    trainer.teachers.record(0.1, trainer.gates.snapshot(), trainer.coforward.bank.state())
    held: list[weakref.ref[Any]] = []
    read = trainer.teachers.role

    def role(*args: Any) -> Any:
        found = read(*args)
        held.extend(weakref.ref(part) for part in found.lora.values())
        return found

    parts = type(trainer.objective).parts

    def after_the_pass(*args: Any) -> Any:
        assert held
        assert all(part() is None for part in held)
        return parts(*args)

    monkeypatch.setattr(trainer.teachers, "role", role)
    monkeypatch.setattr(type(trainer.objective), "parts", after_the_pass)
    ids = torch.arange(3, 3 + 2 * LENGTH).remainder(90).view(2, LENGTH)
    trial_step(trainer, {"input_ids": ids}, teacher=0)

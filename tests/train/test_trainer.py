from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from nuteprune import NutePruneConfig, RunFailed, UserError, load_pruned
from nuteprune.gates.allocate import Allocator
from nuteprune.gates.masks import Masks
from nuteprune.products import read_tensors
from nuteprune.train import own_answers

from .conftest import LENGTH, make, metrics, trial_step


@pytest.mark.parametrize("steps", [0, pytest.param(3, marks=pytest.mark.slow)])
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
        {"teacher": "none", "refit": False},
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
    unit = unit_share(trainer.prepared.allocator)
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
    settings = {"per_device_train_batch_size": 16, "refit": False}
    trainer = make(tiny_model("llama"), tmp_path, max_steps=40, **settings)
    trainer.train()
    losses = [line["loss"] for line in metrics(tmp_path)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_the_default_is_the_surgeon(tiny_model, tmp_path: Path) -> None:
    found = []
    for name, settings in (("a", {}), ("b", {"method": "surgeon"})):
        trainer = make(tiny_model("llama"), tmp_path / name, max_steps=2, **settings)
        trainer.train()
        found.append((metrics(tmp_path / name)[-1]["loss"], trainer.prepared.bank.state()))
    (ours, state), (theirs, other) = found
    assert ours == theirs
    assert all(torch.equal(state[name], other[name]) for name in other)


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
def test_masks_of_the_stages_are_those_of_every_step(
    method: str, tiny_model, tmp_path: Path
) -> None:
    trainer = make(tiny_model("llama"), tmp_path, method=method, max_steps=2)
    seen = []
    compute = trainer.compute_loss

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append({k: v.clone() for k, v in trainer.masks.values.items()})
        return compute(*args, **kwargs)

    trainer.compute_loss = watched
    trainer.train()
    assert len(seen) == 2
    scores, allocator = read_tensors(tmp_path / "score.safetensors")[0], trainer.prepared.allocator
    expected = allocator.masks(allocator.shape(scores, 0.3), scores).values
    for masks in (
        *seen,
        trainer.final_masks().values,
        read_tensors(tmp_path / "choose.safetensors")[0],
    ):
        assert all(torch.equal(masks[k], expected[k]) for k in expected)
    lines = metrics(tmp_path)
    assert {line["sparsity"] for line in lines} == {allocator.sparsity(trainer.masks)}
    assert lines[-1]["loss"] != lines[0]["loss"]  # LoRA is trained


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
    ("gates", "kills"),
    [
        ({}, [7]),
        # Masks move still where it goes on from step 3; from step 6 on they are frozen.
        ({"ramp_share": 0.5}, [4, 7]),
        ({"gate_type": "hard_concrete"}, [4, 7]),
    ],
    ids=str,
)
def test_killed_and_resumed_is_never_interrupted(
    gates: dict[str, Any], kills: list[int], tiny_model, tmp_path: Path
) -> None:
    settings = {**gates, "max_steps": 8, "save_strategy": "steps", "save_steps": 3}
    whole = make(tiny_model("llama"), tmp_path / "whole", **settings)
    whole.train()
    assert whole.teachers_met() or "ramp_share" not in gates
    state = whole.finalize().state_dict()
    keys = {"step", "loss", "token_kl", "layer", "sparsity", "teacher", "grad_norm"}
    for killed_at in kills:
        out = tmp_path / f"broken {killed_at}"
        broken = make(tiny_model("llama"), out, callbacks=[KillAt(killed_at)], **settings)
        with pytest.raises(Killed):
            broken.train()
        resumed = make(tiny_model("llama"), out, **settings)
        last = out / f"checkpoint-{(killed_at - 1) // 3 * 3}"
        resumed.train(resume_from_checkpoint=str(last))

        ours, theirs = (
            [{k: v for k, v in line.items() if k in keys} for line in metrics(folder)]
            for folder in (out, tmp_path / "whole")
        )
        assert ours == theirs
        assert resumed.teachers_met() == whole.teachers_met()
        other = resumed.finalize().state_dict()
        assert state.keys() == other.keys()
        assert all(torch.equal(state[name], other[name]) for name in state)


@pytest.mark.slow
def test_eight_micro_batches_of_one_equal_one_of_eight(
    tiny_model, tiny_chat_tokenizer, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(own_answers, "LAST", 0.5)
    settings = {"max_steps": 3, "refit": False, "calibration_blocks": 8, "unlikelihood": 100.0}
    settings["seed"] = 1  # some answers repeat
    settings["given"] = {"processing_class": tiny_chat_tokenizer}
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
    repeats = [[x.get("repeats") for x in metrics(tmp_path / run)] for run in "ab"]
    assert repeats[0][0] is repeats[1][0] is None
    assert repeats[0][1:] == pytest.approx(repeats[1][1:], rel=1e-4)
    assert all(x > 0 for x in repeats[0][1:])
    for kind, value in one.masks.values.items():
        assert torch.equal(value, many.masks.values[kind])


def test_losses_that_are_not_finite_stop_the_run(tiny_model, tmp_path: Path) -> None:
    model = tiny_model("llama")
    trainer = make(model, tmp_path, method="random", refit=False)

    original = trainer.compute_loss
    trainer.compute_loss = lambda *a, **k: original(*a, **k) * float("nan")
    with pytest.raises(RunFailed, match="not finite in 3 steps"):
        trainer.train()
    weights = trainer.prepared.bank.state().values()
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
        ({"gate_type": "hard_concrete", "ramp_share": 0.0}, "need steps to move in"),
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
    plain = make(tiny_model("llama"), tmp_path / "a", max_steps=3)
    plain.train()
    saving = make(tiny_model("llama"), tmp_path / "b", max_steps=3, gradient_checkpointing=True)
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
    trainer.masks = trainer.prepared.allocator.chance(0.3)
    trial_step(trainer, {"input_ids": ids, "attention_mask": real})
    labels = ids.masked_fill(real == 0, -100)
    with torch.no_grad(), trainer.prepared.hooks.using(trainer.masks):
        expected = trainer.anatomy.model(ids, attention_mask=real, labels=labels).loss
    assert float(trainer.parts["lm"]) == pytest.approx(float(expected), rel=1e-5)


def test_masks_and_weights_that_are_given_are_used(tiny_model, tmp_path: Path) -> None:
    """As the stages of another run left them; no stage is gone through."""
    made = make(tiny_model("llama"), tmp_path / "made", max_steps=2)
    made.train()
    masks, weights = (
        read_tensors(tmp_path / "made" / f"{stage}.safetensors")[0] for stage in ("choose", "refit")
    )
    losses = []
    for name, parts in (("both", (masks, weights)), ("masks", (masks, None))):
        given: dict[str, Any] = {"weights": parts[1]}
        given["masks"] = Masks(made.prepared.layout, parts[0])
        trainer = make(tiny_model("llama"), tmp_path / name, max_steps=2, given=given)
        trainer.train()
        assert not list((tmp_path / name).glob("*.safetensors"))
        assert trainer.final_masks() is given["masks"]
        losses.append([line["loss"] for line in metrics(tmp_path / name)])
        replaced = {k for k in trainer.prepared.bank.state() if k.endswith(".W")}
        assert replaced == (set(weights) if parts[1] else set())
    assert losses[0] == [line["loss"] for line in metrics(tmp_path / "made")]
    assert losses[1] != losses[0]


def test_settings_of_masks_that_move_are_another_config_s(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"progressive settings are those of .*\.ProgressiveConfig"):
        NutePruneConfig(output_dir=str(tmp_path), use_cpu=True, progressive=True)

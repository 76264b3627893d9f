"""Runs with several targets, and runs to dimensions that the user chose."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from nuteprune import UserError, load_pruned
from nuteprune.gates.units import chance
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.shape import LayerShape, Shape
from nuteprune.plan.trial import seconds_per_step

from .conftest import make

pytestmark = pytest.mark.slow

TOKENS = torch.arange(3, 15)[None]


class LogitsAt(TrainerCallback):
    """Remembers what the masked, LoRA-carrying model says at the end of some steps."""

    def __init__(self, trainer: Any, steps: list[int]) -> None:
        self.trainer, self.steps, self.seen = trainer, steps, []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in self.steps:
            trainer = self.trainer
            with torch.no_grad(), trainer.hooks.using(trainer.gates.snapshot()):
                self.seen.append(trainer.anatomy.model(TOKENS).logits.clone())


SEVERAL: dict[str, Any] = {"target_sparsity": "0.15,0.3,0.45", "max_steps": 9}


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "fisher"},
        {"ramp_share": 0.5},
        {"ramp_share": 0.5, "teacher": "snapshots"},
        {"gate_type": "hard_concrete"},
        {"gate_type": "hard_concrete", "teacher": "snapshots"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())) or "default",
)
def test_each_target_gives_the_model_of_its_own_moment(
    settings: dict[str, Any], tiny_model, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    dense = copy.deepcopy(model)
    trainer = make(model, tmp_path / "run", **settings, **SEVERAL)
    trainer.add_callback(watch := LogitsAt(trainer, [3, 6, 9]))
    trainer.train()
    made = [trainer.finalize()]
    records = [trainer.save_pruned(tmp_path / "last")]
    for index in (0, 1):
        made.append(trainer.finalize_target(index, copy.deepcopy(dense)))
        records.append(trainer.save_pruned(tmp_path / f"stop{index}"))
    for small, logits in zip(made, [watch.seen[2], *watch.seen[:2]], strict=True):
        with torch.no_grad():
            assert torch.allclose(
                small(TOKENS).logits, logits, atol=1e-4 * float(logits.abs().max())
            )
    for record, target in zip(records, (0.45, 0.15, 0.3), strict=True):
        assert record["target"] == target
        assert target <= record["sparsity"] <= target + 0.02
    assert load_pruned(tmp_path / "stop0").config.num_hidden_layers == 3
    numerous = trainer.schedule.ramps and settings.get("teacher") == "snapshots"
    assert all((record["teachers"]["count"] > 0) == numerous for record in records)
    served = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(served) == 9
    assert any(x["teacher"] >= 0 or x["teachers"] for x in served) == numerous


def test_several_targets_without_training_are_the_models_of_runs_of_their_own(
    tiny_model, tmp_path: Path
) -> None:
    """Up to 30 %: beyond, all share the scores of the largest target's rounds, as all prices."""
    plain: dict[str, Any] = {"max_steps": 0, "method": "fisher"}
    trainer = make(tiny_model("llama"), tmp_path / "run", target_sparsity=[0.15, 0.2, 0.3], **plain)
    made = [trainer.finalize()]
    made += [trainer.finalize_target(index, tiny_model("llama")) for index in (0, 1)]
    for small, target in zip(made, (0.3, 0.15, 0.2), strict=True):
        alone = make(tiny_model("llama"), tmp_path / str(target), target_sparsity=target, **plain)
        expected = alone.finalize()
        assert small.state_dict().keys() == expected.state_dict().keys()
        with torch.no_grad():
            theirs = expected(TOKENS).logits
            assert torch.allclose(
                small(TOKENS).logits, theirs, atol=1e-5 * float(theirs.abs().max())
            )


@pytest.mark.slow
@pytest.mark.parametrize("ramp_share", [0.0, 0.5])
def test_a_run_with_several_targets_resumes_as_if_never_interrupted(
    ramp_share: float, tiny_model, tmp_path: Path
) -> None:
    settings = {**SEVERAL, "ramp_share": ramp_share}
    saving = {"save_strategy": "steps", "save_steps": 1}
    whole = make(tiny_model("llama"), tmp_path / "a", **settings)
    whole.train()
    cut = make(tiny_model("llama"), tmp_path / "b", **settings, **saving)
    cut.train()
    for step in (3, 5, 8):
        again = make(tiny_model("llama"), tmp_path / "b", **settings)
        again.train(resume_from_checkpoint=str(tmp_path / "b" / f"checkpoint-{step}"))
        assert again.pruning.reached == whole.pruning.reached
        for name, value in whole.coforward.bank.state().items():
            assert torch.equal(again.coforward.bank.state()[name], value), name
        lines = [(tmp_path / x / "metrics.jsonl").read_text().splitlines() for x in "ab"]
        losses = [[json.loads(line)["loss"] for line in part] for part in lines]
        assert losses[0] == losses[1]


@pytest.mark.parametrize(
    "shape",
    [
        {"neurons": 20, "kv_heads": 1},
        {"neurons": 33},
        {"hidden": 24, "heads": 2},
        {"layers": [{}, {"kv_heads": 1, "neurons": 4}, {"heads": 0, "kv_heads": 0}]},
        {"hidden": 16, "layers": [{"neurons": 12}, {"neurons": 0}, {"kv_heads": 1}]},
    ],
    ids=["uniform", "no-multiple", "width-and-heads", "free", "no-mlp"],
)
@pytest.mark.parametrize("steps", [0, pytest.param(5, marks=pytest.mark.slow)])
def test_dimensions_chosen_by_the_user_come_out(
    shape: dict[str, Any], steps: int, tiny_model, tmp_path: Path
) -> None:
    trainer = make(tiny_model("llama"), tmp_path / "run", max_steps=steps, shape=shape)
    wanted = trainer.allocator.budget.shape.cut_to(shape)
    if steps:
        trainer.train()
    trainer.finalize()
    record = trainer.save_pruned(tmp_path / "out")
    counts = ("heads", "kv_heads", "neurons")
    rows = [LayerShape(**{k: row[k] for k in counts}) for row in record["layers"]]
    assert rows == list(wanted.layers)
    assert record["hidden"]["after"] == wanted.hidden
    # What one run gave, another can be asked for.
    again = make(tiny_model("llama"), tmp_path / "again", shape=record)
    assert again.allocator.constraints.floor == wanted


def test_a_shape_is_found_where_steps_of_a_price_are_rounded(
    tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nuteprune.gates.frontier.FINEST", 4)
    trainer = make(tiny_model("qwen2_moe"), tmp_path, shape={"experts": 5, "neurons": 20})
    allocator = trainer.allocator
    for seed in range(4):
        scores = chance(allocator.budget, allocator.layout, allocator.constraints.kinds, seed)
        wanted = allocator.constraints.floor
        assert allocator.shape(scores, trainer.goals[-1].goal) == wanted


@pytest.mark.parametrize(
    "shape", [{"neurons": 0}, {"experts": 0, "expert_neurons": 0}], ids=["shared", "routed"]
)
def test_a_part_of_a_mixture_that_no_gate_removes_is_refused(
    shape: dict[str, int], tiny_model
) -> None:
    with pytest.raises(UserError, match="to remove its whole MLP, pass mlp: false"):
        Anatomy(tiny_model("qwen2_moe")).shape.cut_to(shape)


def test_uniform_shapes_without_any_gate_say_so(tiny_model, tmp_path: Path) -> None:
    model = tiny_model("deepseek_v3", n_group=2)
    with pytest.raises(UserError, match=r"no gates can be used here: .*use --shapes free"):
        make(model, tmp_path, shapes="uniform")


def test_a_count_for_all_layers_is_of_those_that_have_any(tiny_model) -> None:
    hybrid = Anatomy(tiny_model("qwen3_5_text")).shape
    with_heads = [x.attention for x in hybrid.layers]
    assert {True, False} == set(with_heads)
    kept = hybrid.cut_to({"kv_heads": 1})
    assert [x.kv_heads for x in kept.layers] == [int(x) for x in with_heads]
    mixture = Anatomy(tiny_model("glm4_moe")).shape
    assert [x.experts for x in mixture.layers] == [0, 6, 6]
    assert [x.experts for x in mixture.cut_to({"experts": 4}).layers] == [0, 4, 4]
    with pytest.raises(UserError, match="experts is 4; it must be a whole number from 0 to 0"):
        hybrid.cut_to({"experts": 4})


@pytest.mark.parametrize("name", ["llama", "qwen3_5_text", "glm4_moe"])
def test_a_shape_comes_back_from_what_is_written_of_it(name: str, tiny_model) -> None:
    whole = Anatomy(tiny_model(name)).shape
    rows: list[dict[str, Any]] = [{}, {"mlp": False}, {"attention": False}]
    kept = whole.cut_to({"layers": rows})
    assert (kept.layers[1].mlp, kept.layers[2].mixes) == (False, False)
    assert whole.cut_to(kept.to_dict()) == Shape.from_dict(kept.to_dict()) == kept


def test_a_mixer_alone_is_not_cut(tiny_model) -> None:
    whole = Anatomy(tiny_model("falcon_h1")).shape
    with pytest.raises(UserError, match=r"layer 1 has mixer: false; .*pass attention: false"):
        whole.cut_to({"layers": [{}, {"mixer": False}, {}]})


def test_blocks_may_be_named_as_gone(tiny_model) -> None:
    whole = Anatomy(tiny_model("llama")).shape
    rows = [{}, {"attention": False, "neurons": 8}, {"mlp": False, "attention": True}]
    kept = whole.cut_to({"layers": rows}).layers
    assert kept[0] == whole.layers[0]
    assert (kept[1].heads, kept[1].kv_heads, kept[1].neurons) == (0, 0, 8)
    assert (kept[2].heads, kept[2].neurons) == (whole.layers[2].heads, 0)


@pytest.mark.filterwarnings("ignore:.*rope.*")
def test_uniform_shapes_of_no_stock_class_are_refused(tiny_model, tmp_path: Path) -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 5e3, "partial_rotary_factor": 1.0, **factors}
    long = {"rope_parameters": rope, "original_max_position_embeddings": 32}
    with pytest.raises(UserError, match="no stock class"):
        make(tiny_model("phi3", **long), tmp_path, shapes="uniform")
    trainer = make(tiny_model("phi3", **long), tmp_path, shapes="uniform", gates="neurons")
    trainer.args.max_steps = 0
    assert type(trainer.finalize()).__name__ == "Phi3ForCausalLM"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shape": {"layers": [{}, {"attention": False, "heads": 2}, {}]}}, "pass one"),
        ({"shape": {"neurons": 49}}, "whole number from 0 to 48"),
        ({"shape": {"neuron": 4}}, "unknown key 'neuron'"),
        ({"shape": {"layers": [{}]}}, "names 1 layers; the model has 3"),
        ({"shape": {"layers": [4, 4, 4]}}, "layer 0 of the shape is 4"),
        ({"shape": {"layers": [{"head": 1}, {}, {}]}}, "unknown key 'head'"),
        ({"shape": {"heads": 3, "kv_heads": 2}}, "cannot share"),
        ({"shape": {"heads": 4, "kv_heads": 1}}, "more for each"),
        ({"shape": {"layers": [{"kv_heads": 0, "heads": 0}, {}, {}]}}, "layer 0 must keep"),
        ({"shape": {}}, "keeps everything"),
        ({"shape": [1]}, "must map"),
        ({"shape": {"hidden": 16}, "gates": "neurons"}, "it needs hidden"),
        ({"shape": {"layers": [{"neurons": 8}, {}, {}]}, "shapes": "uniform"}, "uniform"),
        ({"target_sparsity": "0.4,0.3"}, "must grow"),
        ({"target_sparsity": [0.1, 0.2, 0.3], "max_steps": 2}, "at least 3 steps"),
        ({"target_sparsity": "a"}, "neither a share nor several"),
        ({"target_sparsity": []}, "neither a share nor several"),
        ({"target_params": []}, "write a number above"),
    ],
)
def test_shapes_and_targets_that_cannot_be_are_refused(
    settings: dict[str, Any], message: str, tiny_model, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        make(tiny_model("llama"), tmp_path / "run", **settings)


def test_settings_state_no_sparsity_that_nobody_asked_for(tiny_model, tmp_path: Path) -> None:
    for name, given, stated in (("a", {}, [0.3]), ("b", {"shape": {"neurons": 24}}, None)):
        settings = make(tiny_model("llama"), tmp_path / name, **given).settings()
        assert settings.get("target_sparsity") == stated


def test_timing_a_step_learns_nothing(tiny_model, tmp_path: Path) -> None:
    trainer = make(tiny_model("llama"), tmp_path)
    seen: list[int] = []
    down = trainer.anatomy.linear(1, trainer.anatomy.family.mlp[-1])
    down.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[-1]))
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    assert seconds_per_step(trainer) > 0
    assert min(seen) < 48 == max(seen)  # the student's masks are fixed, as they will be
    assert not trainer.gates.frozen
    after = trainer.model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(p.grad is None for p in trainer.model.parameters())


class StopAfter(TrainerCallback):
    """Ends training early, as early stopping does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop |= state.global_step >= self.step


@pytest.mark.parametrize("steps", [4, 3, 6])  # the last two end a target
def test_a_run_that_stops_early_has_its_last_target_all_the_same(
    steps: int, tiny_model, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    dense = copy.deepcopy(model)
    trainer = make(model, tmp_path / "run", callbacks=[StopAfter(steps)], **SEVERAL)
    trainer.train()
    trainer.finalize()
    record = trainer.save_pruned(tmp_path / "small")
    assert record["target"] == 0.45
    assert 0.45 <= record["sparsity"] < 0.5
    trainer.finalize_target(0, copy.deepcopy(dense))
    assert 0.15 <= trainer.save_pruned(tmp_path / "first")["sparsity"] < 0.2
    if steps == 6:
        trainer.finalize_target(1, copy.deepcopy(dense))
        return
    with pytest.raises(UserError, match=r"stopped before it had the model of 30\.0% sparsity"):
        trainer.finalize_target(1, copy.deepcopy(dense))


def test_a_target_that_is_none_is_refused(tiny_model, tmp_path: Path) -> None:
    trainer = make(tiny_model("llama"), tmp_path, max_steps=4, target_sparsity=[0.1, 0.3])
    trainer.train()
    with pytest.raises(UserError, match="there is nothing to cut"):
        trainer.finalize_target(-1, tiny_model("llama"))

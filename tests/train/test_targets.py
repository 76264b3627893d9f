"""Runs to dimensions that the user chose, and to targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from nuteprune import UserError
from nuteprune.gates.scores import chance
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.shape import LayerShape, Shape

from .conftest import make

pytestmark = pytest.mark.slow


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
@pytest.mark.parametrize("steps", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_dimensions_chosen_by_the_user_come_out(
    shape: dict[str, Any], steps: int, tiny_model, tmp_path: Path
) -> None:
    trainer = make(tiny_model("llama"), tmp_path / "run", max_steps=steps, shape=shape)
    wanted = trainer.prepared.allocator.budget.shape.cut_to(shape)
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
    assert again.prepared.allocator.constraints.floor == wanted


def test_a_shape_is_found_where_steps_of_a_price_are_rounded(
    tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nuteprune.gates.allowed_shapes.FINEST", 4)
    trainer = make(tiny_model("qwen2_moe"), tmp_path, shape={"experts": 5, "neurons": 20})
    allocator = trainer.prepared.allocator
    for seed in range(4):
        scores = chance(allocator.budget, allocator.constraints.kinds, seed)
        wanted = allocator.constraints.floor
        assert allocator.shape(scores, trainer.prepared.targets[-1].goal) == wanted


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


class StopAfter(TrainerCallback):
    """Ends training early, as early stopping does."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = True


@pytest.mark.parametrize("settings", [{}, {"ramp_share": 1.0}], ids=["fixed", "ramp"])
def test_a_run_that_stops_early_is_at_its_target(
    settings: dict[str, Any], tiny_model, tmp_path: Path
) -> None:
    trainer = make(tiny_model("llama"), tmp_path / "run", callbacks=[StopAfter()], **settings)
    trainer.train()
    assert trainer.state.global_step == 1
    trainer.finalize()
    assert 0.3 <= trainer.save_pruned(tmp_path / "small")["sparsity"] < 0.32

"""What a run cannot do is said before the model is touched."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers.modeling_layers import GradientCheckpointingLayer

from nuteprune import NutePruneConfig, NutePruneTrainer, UserError
from nuteprune.train.recover import RecoverConfig, RecoverTrainer

from .conftest import make


def test_fsdp_would_quietly_be_ddp_here(tiny_model, tmp_path: Path) -> None:
    args = NutePruneConfig(output_dir=str(tmp_path), use_cpu=True)
    args.fsdp = True
    with pytest.raises(UserError, match=r"deepspeed are not supported.*by the setting sharded"):
        NutePruneTrainer(tiny_model("llama"), args)


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_a_launcher_cannot_ask_for_sharding_either(
    name: str, tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = NutePruneConfig(output_dir=str(tmp_path), use_cpu=True)
    monkeypatch.setenv(name, "true")
    with pytest.raises(UserError, match=r"are not supported: .*accelerate's config"):
        NutePruneTrainer(tiny_model("llama"), args)


def test_widths_that_long_rope_cannot_state_are_not_chosen(tiny_model, tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    how = {"rope_parameters": rope, "original_max_position_embeddings": 32}
    model, settings = (
        tiny_model("phi3", **how),
        {"gates": "hidden", "max_steps": 0, "hidden_multiple": 4},
    )
    with pytest.raises(UserError, match="takes no head count at a hidden size of 20"):
        make(model, tmp_path, shape={"hidden": 20}, **settings)
    for target in (0.3, 0.4):  # 20 of 32 would be the next
        trainer = make(tiny_model("phi3", **how), tmp_path, target_sparsity=target, **settings)
        allocator = trainer.prepared.allocator
        assert 20 in allocator.constraints.unstated
        assert allocator.shape(allocator.equal_scores(), target).hidden in (8, 16, 24)


def test_one_process_shares_nothing_out(tiny_model, tmp_path: Path) -> None:
    args = NutePruneConfig(output_dir=str(tmp_path), use_cpu=True, sharded=True)
    with pytest.raises(UserError, match="several processes: start them with torchrun"):
        NutePruneTrainer(tiny_model("llama"), args)


def test_weights_quantised_by_others_are_refused(tiny_model, tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.is_quantized, model.quantization_method = True, "gptq"  # as transformers marks them
    names = list(dict(model.named_modules()))
    with pytest.raises(UserError, match=r"not by bitsandbytes.*; load it in bfloat16"):
        NutePruneTrainer(model, NutePruneConfig(output_dir=str(tmp_path), use_cpu=True))
    assert list(dict(model.named_modules())) == names


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        yield from ({"input_ids": torch.arange(3, 19)} for _ in range(64))


def untouched(model: Any) -> list[str]:
    return [name for name, _ in model.named_modules()]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Stream(), r"a Stream, which can only be read in order.*: pass a list of its first items"),
        ([], "is empty: pass at least one item"),
        ([{"text": "a"}] * 3, "have text and no input_ids: pass tokenized text"),
    ],
)
def test_text_that_cannot_be_calibrated_on_is_refused(
    dataset: Any, message: str, tiny_model, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    before = untouched(model)
    with pytest.raises(UserError, match=message):
        NutePruneTrainer(model, NutePruneConfig(output_dir=str(tmp_path), use_cpu=True), dataset)
    assert untouched(model) == before


def test_a_list_of_what_a_stream_begins_with_will_do(tiny_model, tmp_path: Path) -> None:
    trainer = make(tiny_model("llama"), tmp_path / "x", max_steps=1)
    blocks = list(itertools.islice(Stream(), trainer.args.blocks))
    NutePruneTrainer(tiny_model("llama"), trainer.args, blocks).train()


@pytest.mark.parametrize("call", ["train", "finalize"])
def test_without_any_text_nothing_is_scored(call: str, tiny_model, tmp_path: Path) -> None:
    args = NutePruneConfig(output_dir=str(tmp_path), use_cpu=True, neuron_multiple=4)
    trainer = NutePruneTrainer(tiny_model("llama"), args)
    with pytest.raises(UserError, match="no training text: pass train_dataset"):
        getattr(trainer, call)()


def test_recovery_needs_examples(tiny_model, tiny_tokenizer, tmp_path: Path) -> None:
    args = RecoverConfig(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(UserError, match="is empty: pass items with input_ids and labels"):
        RecoverTrainer(tiny_model("llama"), args, cast(Any, []), tiny_tokenizer)


def test_no_steps_are_no_training(tiny_model, tmp_path: Path) -> None:
    trainer = make(tiny_model("llama"), tmp_path, max_steps=0)
    with pytest.raises(UserError, match=r"max_steps is 0.*: call finalize\(\) at once"):
        trainer.train()
    trainer.finalize()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("settings", [{"use_reentrant": True}, {"preserve_rng_state": True}])
@pytest.mark.parametrize("by", ["settings", "model"])
def test_reentrant_checkpointing_is_refused_whoever_asks_for_it(
    by: str, settings: dict[str, bool], tiny_model, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    asked: dict[str, Any] = {}
    if by == "model":
        model.gradient_checkpointing_enable(settings)
    else:
        asked = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": settings}
    before = untouched(model)
    with pytest.raises(UserError, match=r"re-entrant .*: pass gradient_checkpointing=True alone"):
        make(model, tmp_path, **asked)
    assert untouched(model) == before
    if by == "model":  # a run's own replaces it
        more = {"gate_type": "hard_concrete", "max_steps": 1}
        make(model, tmp_path, gradient_checkpointing=True, **more).train()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
def test_checkpointing_that_hooks_are_part_of_is_refused(
    tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in transformers 5.19, where a first step would fail."""
    monkeypatch.setattr(
        GradientCheckpointingLayer, "__call__", torch.nn.Module.__call__, raising=False
    )
    with pytest.raises(UserError, match=r"with transformers 5\..*: pip install --upgrade"):
        make(tiny_model("llama"), tmp_path, gradient_checkpointing=True)
    make(tiny_model("llama"), tmp_path, max_steps=0)


@pytest.mark.parametrize("own", [True, False], ids=["own", "another"])
def test_a_trainer_finalizes_once(own: bool, tiny_model, tmp_path: Path) -> None:
    trainer = make(tiny_model("llama"), tmp_path / "run", gate_type="hard_concrete", max_steps=2)
    trainer.train()
    small = trainer.finalize(None if own else tiny_model("llama"))
    tokens = torch.arange(3, 15)[None]
    with torch.no_grad():
        before = small(tokens).logits
    for again in (
        trainer.finalize,
        partial(trainer.finalize, tiny_model("llama")),
        trainer.train,
        partial(trainer.evaluate, trainer.train_dataset),
    ):
        with pytest.raises(UserError, match=r"has used the trainer's model up.*: keep what it"):
            again()
    with torch.no_grad():
        assert torch.equal(small(tokens).logits, before)


def test_another_model_is_not_cut_in_place_of_the_runs_own(tiny_model, tmp_path: Path) -> None:
    trainer = make(tiny_model("llama"), tmp_path / "run", gate_type="hard_concrete", max_steps=1)
    trainer.train()
    with pytest.raises(UserError, match="not the one that was trained: its dimensions differ"):
        trainer.finalize(tiny_model("llama", intermediate_size=40))


def test_a_pass_that_fails_leaves_no_masks_behind(
    tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(tiny_model("llama"), tmp_path, max_steps=1)

    def fail(*_: Any) -> Any:
        assert trainer.prepared.hooks.masks is not None
        raise RuntimeError("out of memory")

    monkeypatch.setattr(type(trainer.args.losses), "parts", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    assert trainer.prepared.hooks.masks is None
    with pytest.raises(AttributeError):
        trainer.prepared.hooks.masks = trainer.masks


def test_no_kinds_are_advised_that_would_be_refused(tiny_model, tmp_path: Path) -> None:
    def told(**settings: Any) -> str:
        with pytest.raises(UserError, match="out of reach") as error:
            make(tiny_model("llama"), tmp_path, target_sparsity=0.99, **settings)
        return str(error.value)

    assert "with hidden they" in told()
    assert "with attn_block they" in told()
    wanda = told(method="wanda")  # which scores heads, KV groups and neurons
    assert "with heads they" in wanda
    assert "hidden" not in wanda
    assert "_block" not in wanda

from __future__ import annotations

import copy
import json
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback

from nuteprune.data.examples import Examples, pad
from nuteprune.distill.losses import IGNORED
from nuteprune.errors import Interrupted, RunFailed, UserError
from nuteprune.export.loading import load_pruned
from nuteprune.train.config import RecoverConfig
from nuteprune.train.recover import RecoverTrainer
from nuteprune.train.state import last_checkpoint

pytestmark = pytest.mark.slow


def examples(count: int = 24) -> Examples:
    """Of different lengths, the first two tokens only read."""
    random = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, 96, (4 + i % 5,), generator=random) for i in range(count)]
    labels = [torch.cat([torch.full((2,), IGNORED), x[2:]]) for x in ids]
    return Examples(ids, labels, 0)


def make(
    model: PreTrainedModel, folder: Path, tokenizer: Any, data: Dataset[Any], **settings: Any
) -> RecoverTrainer:
    common = {"disable_tqdm": True, "use_cpu": True, "learning_rate": 1e-2, "max_steps": 4}
    args = RecoverConfig(output_dir=str(folder), **{**common, **settings})
    return RecoverTrainer(model, args, data, tokenizer)


def weights(trainer: RecoverTrainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.bank.state().items()}


# Of families with the same linears, one: LoRA knows no others. Where it goes is tested for all.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "llama_mha", "phi3", "gemma2", "gpt_neox", "opt"])
def test_merged_is_what_was_trained(name: str, tiny_model, tiny_tokenizer, tmp_path: Path) -> None:
    model = tiny_model(name)
    tokens = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        untouched = model(tokens).logits
    trainer = make(model, tmp_path, tiny_tokenizer, examples())
    trainer.train()
    trainer.model.eval()
    with torch.no_grad():
        trained = trainer.model(tokens).logits
        merged = trainer.merge()(tokens).logits
    assert (trained - untouched).abs().max() > 1e-2 * untouched.abs().max()
    assert (merged - trained).abs().max() < 1e-4 * trained.abs().max()
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_a_padding_token_that_the_model_has_not_is_not_looked_up(
    tiny_model, tiny_tokenizer, tmp_path: Path
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[more]"})
    model = tiny_model("llama")
    assert tokenizer.pad_token_id >= model.config.vocab_size
    trainer = make(model, tmp_path, tokenizer, examples(), max_steps=2)
    trainer.train()
    merged = trainer.merge()
    merged.save_pretrained(tmp_path / "better")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "better")
    assert again.config.pad_token_id == model.config.pad_token_id != tokenizer.pad_token_id


def test_metrics_that_read_logits_are_refused_and_a_collator_is_taken(
    tiny_model, tiny_tokenizer, tmp_path: Path
) -> None:
    args = RecoverConfig(output_dir=str(tmp_path), max_steps=1, use_cpu=True)
    rest = args, examples(), tiny_tokenizer
    with pytest.raises(UserError, match="compute_metrics needs logits"):
        RecoverTrainer(tiny_model("llama"), *rest, compute_metrics=lambda _: {})
    collator = partial(pad, padding=1)
    trainer = RecoverTrainer(tiny_model("llama"), *rest, data_collator=collator)
    assert trainer.data_collator is collator


@pytest.mark.slow
def test_loss_falls_on_every_projection(tiny_model, tiny_tokenizer, tmp_path: Path) -> None:
    trainer = make(tiny_model("llama"), tmp_path, tiny_tokenizer, examples(8), max_steps=12)
    trainer.train()
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == list(range(1, 13))
    assert lines[-1]["loss"] < lines[0]["loss"]
    changed = [v for name, v in weights(trainer).items() if name.endswith("B")]
    assert len(changed) == 3 * 7
    assert all(v.abs().max() > 0 for v in changed)


def test_accumulation_of_uneven_examples_is_one_big_batch(
    tiny_model, tiny_tokenizer, tmp_path: Path
) -> None:
    found = []
    for batch, times in ((8, 1), (1, 8)):
        trainer = make(
            tiny_model("llama"),
            tmp_path / str(batch),
            tiny_tokenizer,
            examples(),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=times,
            max_steps=2,
            optim="sgd",
            learning_rate=1.0,
        )
        trainer.train()
        found.append(weights(trainer))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-4, atol=1e-6)


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_resumed_is_never_interrupted(tiny_model, tiny_tokenizer, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 7,
        "lora_dropout": 0.2,
    }
    whole = make(tiny_model("llama"), tmp_path / "a", tiny_tokenizer, examples(), **settings)
    whole.train()
    killed = make(tiny_model("llama"), tmp_path / "b", tiny_tokenizer, examples(), **settings)
    killed.add_callback(StopAt(5))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    checkpoint = last_checkpoint(tmp_path / "b")
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-4"
    again = make(tiny_model("llama"), tmp_path / "b", tiny_tokenizer, examples(), **settings)
    again.train(resume_from_checkpoint=str(checkpoint))
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(again)[name])
    lines = [
        [(x["step"], x["loss"]) for x in map(json.loads, path.read_text().splitlines())]
        for path in (tmp_path / "a/metrics.jsonl", tmp_path / "b/metrics.jsonl")
    ]
    assert lines[0] == lines[1]


class SignalAt(TrainerCallback):
    """Sends this process a signal at the end of a step, or of the training (step 0)."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            signal.raise_signal(self.number)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        if not self.step:
            signal.raise_signal(self.number)


def test_resumed_after_the_last_step_takes_no_more(
    tiny_model, tiny_tokenizer, tmp_path: Path
) -> None:
    # Three steps to a pass: half of one ends within it.
    settings: dict[str, Any] = {"save_strategy": "steps", "max_steps": -1, "num_train_epochs": 0.5}
    whole = make(tiny_model("llama"), tmp_path, tiny_tokenizer, examples(), **settings)
    whole.train()
    before = (tmp_path / "metrics.jsonl").read_text()
    assert before.count("\n") == 2
    again = make(tiny_model("llama"), tmp_path, tiny_tokenizer, examples(), **settings)
    again.train(resume_from_checkpoint=True)
    assert (tmp_path / "metrics.jsonl").read_text() == before
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(again)[name])


def test_resuming_removes_what_a_kill_left_of_old_checkpoints(
    tiny_model, tiny_tokenizer, tmp_path: Path
) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    make(tiny_model("llama"), tmp_path, tiny_tokenizer, examples(), **settings).train()
    kept = sorted(x.name for x in tmp_path.glob("checkpoint-*"))
    for left in ("checkpoint-1", ".partial"):
        shutil.copytree(tmp_path / kept[0], tmp_path / left)
    again = make(tiny_model("llama"), tmp_path, tiny_tokenizer, examples(), **settings)
    again.train(resume_from_checkpoint=True)
    assert sorted(x.name for x in tmp_path.glob("checkpoint-*")) == kept
    assert len(kept) == 2
    assert not (tmp_path / ".partial").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_last_step_stops_as_in_any_other(
    number: int, tiny_model, tiny_tokenizer, tmp_path: Path
) -> None:
    data, save = examples(), {"save_strategy": "steps"}
    trainer = make(tiny_model("llama"), tmp_path, tiny_tokenizer, data, **save)
    trainer.callback_handler.callbacks.insert(0, SignalAt(4, number))  # before what listens
    with pytest.raises(Interrupted, match="stopped after step 4 of 4, which is saved"):
        trainer.train()
    again = make(tiny_model("llama"), tmp_path, tiny_tokenizer, data, **save)
    again.train(resume_from_checkpoint=True)
    for name, value in weights(trainer).items():
        assert torch.equal(value, weights(again)[name])


def test_a_signal_after_the_last_step_is_not_lost(
    tiny_model, tiny_tokenizer, tmp_path: Path
) -> None:
    trainer = make(tiny_model("llama"), tmp_path, tiny_tokenizer, examples())
    trainer.add_callback(SignalAt(0, signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_checkpoint_whose_sums_are_damaged_is_none(
    tiny_model, tiny_tokenizer, tmp_path: Path
) -> None:
    save = {"save_strategy": "steps", "save_steps": 2}
    make(tiny_model("llama"), tmp_path, tiny_tokenizer, examples(), **save).train()
    (tmp_path / "checkpoint-4" / "SHA256SUMS").write_bytes(b"\xff" * 40)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_a_checkpoint_cut_short_is_none(
    tiny_model, tiny_tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("disk full")

    trainer = make(
        tiny_model("llama"),
        tmp_path,
        tiny_tokenizer,
        examples(),
        save_strategy="steps",
        save_steps=2,
    )
    monkeypatch.setattr(trainer, "_save_rng_state", fail)
    with pytest.raises(RunFailed, match="disk full"):
        trainer.train()
    assert last_checkpoint(tmp_path) is None


def test_a_loss_that_is_not_finite_ends_the_run(tiny_model, tiny_tokenizer, tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.model.norm.weight.data.fill_(float("nan"))
    trainer = make(model, tmp_path, tiny_tokenizer, examples())
    with pytest.raises(RunFailed, match="not finite at step 1; lower --learning-rate"):
        trainer.train()


def test_a_checkpoint_of_another_rank_is_refused(
    tiny_model, tiny_tokenizer, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    make(tiny_model("llama"), tmp_path, tiny_tokenizer, examples(), **settings).train()
    other = make(tiny_model("llama"), tmp_path, tiny_tokenizer, examples(), lora_rank=4, **settings)
    with pytest.raises(UserError, match="was started with lora_rank 8, not 4"):
        other.train(resume_from_checkpoint=str(last_checkpoint(tmp_path)))


def test_half_precision_weights_keep_their_dtype(
    tiny_model, tiny_tokenizer, tmp_path: Path
) -> None:
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    model = load_pruned(tmp_path / "model", dtype=torch.bfloat16)
    trainer = make(model, tmp_path / "run", tiny_tokenizer, examples())
    trainer.train()
    assert trainer.merge().dtype == torch.bfloat16


def test_rows_may_hold_lists(tiny_model, tiny_tokenizer, tmp_path: Path) -> None:
    data = examples()
    rows: Any = [{k: x.tolist() for k, x in data[i].items()} for i in range(len(data))]
    found = []
    for name, text in (("tensors", data), ("lists", rows)):
        trainer = make(tiny_model("llama"), tmp_path / name, tiny_tokenizer, text, max_steps=2)
        trainer.train()
        found.append(weights(trainer))
    ours, theirs = found
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    "settings",
    [{"lora_rank": 0}, {"learning_rate": -1.0}, {"per_device_train_batch_size": 0}],
)
def test_senseless_settings_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must be at least"):
        RecoverConfig(output_dir=str(tmp_path), use_cpu=True, **settings)


def test_passes_over_the_text_go_on_in_steps_of_the_same_size(
    tiny_model, tiny_tokenizer, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": -1}
    size, passes = "per_device_train_batch_size", "gradient_accumulation_steps"

    def trainer(**more: Any) -> Any:
        return make(tiny_model("llama"), tmp_path, tiny_tokenizer, examples(), **settings, **more)

    whole = trainer(num_train_epochs=2)
    whole.add_callback(StopAt(2))
    with pytest.raises(KeyboardInterrupt):
        whole.train()
    each = whole.args.per_device_train_batch_size
    with pytest.raises(UserError, match="started with sequences_per_step"):
        trainer(num_train_epochs=2, **{size: 2 * each}).train(resume_from_checkpoint=True)
    again = trainer(num_train_epochs=2, **{size: each // 2, passes: 2})
    assert again.train(resume_from_checkpoint=True).global_step == whole.steps()

"""What somebody who knows transformers.Trainer takes for granted."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from signal import SIGTERM
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import Dataset
from transformers import HfArgumentParser, TrainerControl, TrainingArguments

from nuteprune import NutePruneConfig, NutePruneTrainer, UserError, load_pruned
from nuteprune.data.training_text import BlockDataset, collated
from nuteprune.products import read_tensors
from nuteprune.progressive.config import ProgressiveConfig
from nuteprune.train import checkpoints
from nuteprune.train.config import RecoverConfig
from nuteprune.train.declared import chosen_settings
from nuteprune.train.first_stages import calibration_blocks

from .conftest import LENGTH, make, metrics

pytestmark = pytest.mark.slow

TOKENS = torch.arange(3, 15)[None]


def steps_of(folder: Path) -> list[int]:
    return [line["step"] for line in metrics(folder)]


@pytest.mark.parametrize("kind", [NutePruneConfig, RecoverConfig])
def test_transformers_parser_reads_the_settings(
    kind: type[TrainingArguments], tmp_path: Path
) -> None:
    parser = HfArgumentParser(kind)
    words = ["--output_dir", str(tmp_path), "--use_cpu"]
    (parsed,) = parser.parse_args_into_dataclasses([*words, "--lora_rank", "3"])
    assert parsed.to_dict() == kind(output_dir=str(tmp_path), use_cpu=True, lora_rank=3).to_dict()
    assert "Rank of " in parser.format_help()


@pytest.mark.parametrize(
    ("words", "asked"), [("--target_sparsity 0.3", (0.3,)), ("--target_params 100M", ("100M",))]
)
def test_transformers_parser_reads_a_target(
    words: str, asked: tuple[float | str, ...], tmp_path: Path
) -> None:
    given = ["--output_dir", str(tmp_path), "--use_cpu", *words.split()]
    (parsed,) = HfArgumentParser(NutePruneConfig).parse_args_into_dataclasses(given)
    told = {"sparsity": parsed.target_sparsity, "params": parsed.target_params}
    assert (told[parsed.asked[0].kind],) == asked


def test_the_result_generates_as_the_intact_model_did(tiny_model, tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.generation_config.eos_token_id = [2, 7]
    model.generation_config.top_p = 0.8
    model.generation_config.do_sample = True
    assert model.config.use_cache
    trainer = make(model, tmp_path / "run", max_steps=1)
    trainer.train()
    trainer.finalize()
    trainer.save_pruned(tmp_path / "out")
    loaded = load_pruned(tmp_path / "out")
    assert loaded.config.use_cache
    wanted = loaded.generation_config
    assert (wanted.eos_token_id, wanted.top_p, wanted.do_sample) == ([2, 7], 0.8, True)
    lengths: list[int] = []
    loaded.model.embed_tokens.register_forward_pre_hook(lambda _, x: lengths.append(x[0].shape[1]))
    loaded.generate(TOKENS, max_new_tokens=4, min_new_tokens=4)
    assert lengths == [TOKENS.shape[1], 1, 1, 1]  # with a cache


@pytest.mark.parametrize(
    "old", [{"temperature": 0.9, "do_sample": False}, {"pad_token_id": -1}, {"top_k": -1}]
)
def test_settings_of_generation_that_cannot_be_saved_do_not_cost_a_run(
    old: dict[str, Any], tiny_model, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    model.generation_config.update(eos_token_id=[2, 7], repetition_penalty=1.3, **old)
    trainer = make(model, tmp_path / "run", max_steps=0)
    trainer.finalize()
    trainer.save_pruned(tmp_path / "out")
    loaded = load_pruned(tmp_path / "out").generation_config
    assert (loaded.eos_token_id, loaded.repetition_penalty) == ([2, 7], 1.3)
    assert loaded.use_cache


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "polynomial"])
def test_the_rate_may_fall_in_any_way(kind: str, tiny_model, tmp_path: Path) -> None:
    trainer = make(tiny_model("llama"), tmp_path, max_steps=4, lr_scheduler_type=kind)
    trainer.train()
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = [line["learning_rate"] / trainer.args.learning_rate for line in lines]
    share = [1, 0.75, 0.5, 0.25]
    expected = {
        "cosine": [(1 + float(torch.cos(torch.tensor(torch.pi * (1 - x))))) / 2 for x in share],
        "linear": share,
        "constant": [1.0] * 4,
        "polynomial": [x**0.5 for x in share],
    }
    assert rates == pytest.approx(expected[kind], rel=1e-4)


def test_weight_decay_is_that_of_the_settings(tiny_model, tmp_path: Path) -> None:
    groups = make(tiny_model("llama"), tmp_path, weight_decay=0.25).create_optimizer().param_groups
    assert [group["weight_decay"] for group in groups] == [0.25]


def test_evaluation_is_the_loss_of_the_model_that_would_be_cut(tiny_model, tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(5)
    held_out = BlockDataset(torch.randint(3, 90, (6, LENGTH), generator=random))
    trainer = make(
        tiny_model("llama"),
        tmp_path,
        eval_dataset=held_out,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=6,
    )
    trainer.train()
    logged = [x["eval_loss"] for x in trainer.state.log_history if "eval_loss" in x]
    small = trainer.finalize()
    ids = torch.stack([item["input_ids"] for item in held_out])
    with torch.no_grad():
        loss = float(small(ids, labels=ids).loss)
    assert len(logged) == 2
    assert logged[-1] == pytest.approx(loss, rel=1e-4)


@pytest.mark.slow
def test_a_run_goes_on_from_its_newest_checkpoint_and_forgets_an_earlier_run(
    tiny_model, tmp_path: Path
) -> None:
    saving = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    first = make(tiny_model("llama"), tmp_path, **saving)
    with pytest.raises(UserError, match="nothing to resume"):
        first.train(resume_from_checkpoint=True)
    first.train()
    again = make(tiny_model("llama"), tmp_path, **saving | {"max_steps": 8})
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 8
    assert steps_of(tmp_path) == list(range(1, 9))
    other = make(tiny_model("llama"), tmp_path, **saving | {"max_steps": 8})
    other.train(str(tmp_path / "checkpoint-4"))
    assert steps_of(tmp_path) == list(range(1, 9))
    shutil.copytree(tmp_path / "checkpoint-4", tmp_path / "kept")
    other = make(tiny_model("llama"), tmp_path, **saving | {"max_steps": 8})
    other.train(str(tmp_path / "kept"))
    assert steps_of(tmp_path) == list(range(1, 9))
    (tmp_path / "checkpoint-500").mkdir()  # of another trainer
    (tmp_path / "checkpoint-500" / "model.safetensors").write_bytes(b"a model of the user's")
    make(tiny_model("llama"), tmp_path, **saving | {"max_steps": 3}).train()
    assert steps_of(tmp_path) == [1, 2, 3]
    shutil.rmtree(tmp_path / "checkpoint-500")
    assert {x.name for x in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}
    with pytest.raises(UserError, match="has trained already"):
        other.train()
    with pytest.raises(UserError, match=r"nothing to resume: there is no folder .*checkpoint-70"):
        other.train(str(tmp_path / "checkpoint-70"))


def test_a_run_goes_on_with_its_own_settings_alone(tiny_model, tmp_path: Path) -> None:
    settings = {"lora_rank": 16, "method": "taylor", "learning_rate": 3e-3}
    saving = {"save_strategy": "steps", "save_steps": 2}
    make(tiny_model("llama"), tmp_path, max_steps=2, **saving, **settings).train()
    path = tmp_path / "settings.json"
    kept = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in kept.items() if k != "schema"}))
    resumed = make(tiny_model("llama"), tmp_path, max_steps=4, **settings)
    with pytest.raises(UserError, match=r"most likely 0\.1\.0"):
        resumed.train(resume_from_checkpoint=True)
    path.write_text(json.dumps(kept))
    other = make(tiny_model("llama"), tmp_path, max_steps=4, **{**settings, "lora_rank": 8})
    with pytest.raises(UserError, match="was started with lora_rank 16, not 8"):
        other.train(resume_from_checkpoint=True)


def test_steps_are_fixed_where_a_ramp_shares_them_out(tiny_model, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    make(tiny_model("llama"), tmp_path, max_steps=4, ramp_share=0.5, **saving).train()
    other = make(tiny_model("llama"), tmp_path, max_steps=6, ramp_share=0.5)
    with pytest.raises(UserError, match="was started with max_steps 4, not 6"):
        other.train(resume_from_checkpoint=True)


def test_a_model_of_the_users_beside_checkpoints_stays(tiny_model, tmp_path: Path) -> None:
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    for name in ("checkpoint-0", "checkpoint-500"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"a model of the user's")
    with pytest.raises(UserError, match=r"checkpoint-0 is no checkpoint of nuteprune's"):
        make(tiny_model("llama"), tmp_path, **saving).train()
    (tmp_path / "checkpoint-0").rename(tmp_path / "checkpoint-5")
    (tmp_path / "checkpoint-3").mkdir()  # as a kill leaves one that was being removed
    make(tiny_model("llama"), tmp_path, **saving).train()
    left = {x.name for x in tmp_path.glob("checkpoint-*")}
    assert left == {"checkpoint-4", "checkpoint-5", "checkpoint-500"}


def test_a_tokenizers_own_padding_does_not_get_into_the_result(
    tiny_model, tiny_tokenizer, tmp_path: Path
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[more]"})
    model = tiny_model("llama")
    own = model.config.pad_token_id
    assert tokenizer.pad_token_id >= model.config.vocab_size
    trainer = make(model, tmp_path / "run", max_steps=1)
    trainer.processing_class = tokenizer
    trainer.train()
    trainer.finalize()
    trainer.save_pruned(tmp_path / "out")
    assert load_pruned(tmp_path / "out").config.pad_token_id == own


def test_other_columns_are_not_read(tiny_model, tmp_path: Path) -> None:
    trainer = make(tiny_model("llama"), tmp_path, max_steps=1)
    blocks = trainer.train_dataset
    trainer.train_dataset = [x | {"messages": [{"role": "user"}] * i} for i, x in enumerate(blocks)]
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_model_with_adapters_is_refused(tiny_model, tmp_path: Path) -> None:
    model = tiny_model("llama")
    make(model, tmp_path, max_steps=1)
    with pytest.raises(UserError, match="the model has adapters already"):
        make(model, tmp_path, max_steps=1)


def test_what_would_do_nothing_is_refused(tiny_model, tmp_path: Path) -> None:
    model = tiny_model("llama")
    args = NutePruneConfig(output_dir=str(tmp_path), max_steps=1, use_cpu=True)
    given: list[tuple[dict[str, Any], str]] = [
        ({"optimizers": (torch.optim.SGD(model.parameters()), None)}, "would not have what is"),
        ({"compute_loss_func": lambda *_: 0}, "compute_loss_func is not called"),
    ]
    for kwargs, message in given:
        with pytest.raises(UserError, match=message):
            NutePruneTrainer(model, args, **kwargs)
    trainer = NutePruneTrainer(model, args, optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1}))
    assert isinstance(trainer.create_optimizer(), torch.optim.SGD)
    with pytest.raises(UserError, match="save_model would write no model"):
        trainer.save_model(str(tmp_path / "out"))
    for name, value in (("num_train_epochs", 2), ("auto_find_batch_size", True)):
        with pytest.raises(UserError, match=name):
            NutePruneConfig(output_dir=str(tmp_path), **{name: value})


def test_a_checkpoint_of_a_run_in_another_folder_is_refused(tiny_model, tmp_path: Path) -> None:
    saving = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make(tiny_model("llama"), tmp_path / "one", **saving).train()
    other = make(tiny_model("llama"), tmp_path / "two", **saving)
    with pytest.raises(UserError, match=r"set output_dir to .*one"):
        other.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-1"))


def test_the_best_checkpoint_so_far_is_not_looked_for_where_it_was_written(
    tiny_model, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "eval_dataset": make(tiny_model("llama"), tmp_path).train_dataset,
        **{"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"},
        **{"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1},
    }
    make(tiny_model("llama"), tmp_path, max_steps=2, **settings).train()
    assert (tmp_path / "checkpoint-2").is_dir()
    again = make(tiny_model("llama"), tmp_path, max_steps=3, **settings)
    again.train(resume_from_checkpoint=True)
    assert steps_of(tmp_path)[-1] == 3


def test_several_processes_neither_send_nor_hold_frozen_weights(tiny_model, tmp_path: Path) -> None:
    model = make(tiny_model("llama"), tmp_path).model
    ignored = set(model._ddp_params_and_buffers_to_ignore)
    assert ignored == {name for name, p in model.named_parameters() if not p.requires_grad}
    assert len(ignored) < len(list(model.named_parameters()))


def test_callbacks_and_a_collator_may_be_none(tiny_model, tmp_path: Path) -> None:
    text = make(tiny_model("llama"), tmp_path / "run").train_dataset
    args = NutePruneConfig(output_dir=str(tmp_path), use_cpu=True, max_steps=1)
    none: dict[str, Any] = {"callbacks": None, "data_collator": None}
    trainer = NutePruneTrainer(tiny_model("llama"), args, text, **none)
    assert trainer.data_collator is collated


def test_a_complete_run_takes_no_further_step(tiny_model, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 4, "lr_scheduler_type": "constant"}
    first = make(tiny_model("llama"), tmp_path, save_strategy="steps", save_steps=2, **settings)
    first.train()
    again = make(tiny_model("llama"), tmp_path, **settings)
    assert again.train(resume_from_checkpoint=True).global_step == 4
    assert again.state.global_step == 4
    assert steps_of(tmp_path) == [1, 2, 3, 4]
    ours, theirs = (x.finalize().state_dict() for x in (again, first))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


class Padded(Dataset[Any]):
    """The same text in rows that end in padding."""

    def __init__(self, blocks: BlockDataset, filler: int) -> None:
        stream = torch.cat([item["input_ids"] for item in blocks])
        self.rows = []
        for i, start in enumerate(range(0, len(stream) - LENGTH, LENGTH // 2)):
            real = LENGTH // 2 if i % 2 else 3
            ids = torch.full((LENGTH,), filler)
            ids[:real] = stream[start : start + real]
            mask = (torch.arange(LENGTH) < real).long()
            self.rows.append({"input_ids": ids, "attention_mask": mask})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{"teacher": "dense"}, {"teacher": "none"}, {"objective": "paper"}], ids=str
)
def test_padding_counts_alike_however_a_step_is_parted(
    settings: dict[str, Any], tiny_model, tmp_path: Path
) -> None:
    found = []
    for size in (4, 1):
        trainer = make(
            tiny_model("llama"),
            tmp_path / str(size),
            max_steps=2,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
            **settings,
            adam_epsilon=1e-2,  # else rounding is divided by rounding where gradients are near 0
        )
        trainer.train_dataset = Padded(trainer.train_dataset, filler=50)
        trainer.train()
        found.append((metrics(tmp_path / str(size)), trainer.prepared.bank.state()))
    (ours, lora), (theirs, other) = found
    for key in ("loss", "grad_norm"):
        assert [x[key] for x in ours] == pytest.approx([x[key] for x in theirs], rel=1e-4)
    assert all(torch.allclose(lora[key], other[key], atol=1e-5) for key in lora)


def test_padding_is_no_text_to_score_or_re_fit_by(tiny_model, tmp_path: Path) -> None:
    found = []
    for filler in (0, 50):
        trainer = make(tiny_model("llama"), tmp_path / str(filler), max_steps=1)
        trainer.train_dataset = Padded(trainer.train_dataset, filler)
        trainer.begin()
        scores = read_tensors(tmp_path / str(filler) / "score.safetensors")[0]
        found.append((scores, trainer.prepared.bank.state()))
    for ours, theirs in zip(*found, strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)

    padded = Padded(make(tiny_model("llama"), tmp_path / "x").train_dataset, 0)
    blocks = calibration_blocks(padded, 2)
    rows = [x["input_ids"][x["attention_mask"] == 1] for x in reversed(padded.rows)]
    assert torch.equal(blocks.flatten(), torch.cat(rows)[: 2 * LENGTH])
    for row in padded.rows:
        row["attention_mask"].zero_()
    with pytest.raises(UserError, match="nothing but padding"):
        calibration_blocks(padded, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fp16": True}, "use bf16"),
        ({"lora_targets": "qv"}, "set refit to false"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"},
            "leave it out",
        ),
        ({"save_only_model": True}, "could not go on"),
        (
            {"gate_type": "hard_concrete", "optim": "adafactor"},
            "multipliers ascend",
        ),
    ],
)
def test_what_would_fail_later_is_refused_at_once(
    settings: dict[str, Any], message: str, tiny_model, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(UserError, match=message):
        make(model, tmp_path, **settings)
    assert [name for name, _ in model.named_modules()] == names


def test_metrics_of_logits_are_refused(tiny_model, tmp_path: Path) -> None:
    args = NutePruneConfig(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(UserError, match="eval_loss"):
        NutePruneTrainer(tiny_model("llama"), args, compute_metrics=lambda _: {})


@pytest.mark.parametrize(
    ("given", "told"), [(0.3, 0.3), ("0.3", 0.3), ([0.3], 0.3), ("0.1,0.3", [0.1, 0.3])]
)
def test_targets_are_told_alike_however_they_are_spelled(
    given: Any, told: Any, tmp_path: Path
) -> None:
    args = NutePruneConfig(output_dir=str(tmp_path), use_cpu=True, target_sparsity=given)
    assert chosen_settings(args) == {"target_sparsity": told}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
def test_checkpointing_is_recorded_by_the_name_that_we_have(tmp_path: Path) -> None:
    """Newer releases of transformers have another beside it, which would win over ours."""
    args = NutePruneConfig(output_dir=str(tmp_path), use_cpu=True, gradient_checkpointing=True)
    assert chosen_settings(args) == {"gradient_checkpointing": True}


def test_a_stop_of_another_process_is_not_the_first_of_two_signals(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    args = NutePruneConfig(output_dir=str(tmp_path), use_cpu=True)
    monkeypatch.setattr(checkpoints, "several", lambda: True)
    monkeypatch.setattr(checkpoints.dist, "all_reduce", lambda flag, _: flag.fill_(SIGTERM))
    signals, control = checkpoints.StopSignals(), TrainerControl()
    signals.on_step_end(args, None, control)
    assert control.should_save
    assert control.should_training_stop
    assert signals.obeyed == SIGTERM
    try:
        signals._note(SIGTERM, None)  # its own comes late, while it saves
    except KeyboardInterrupt:
        pytest.fail("it would stop in the middle of the joint checkpoint")
    with pytest.raises(KeyboardInterrupt):
        signals._note(SIGTERM, None)


def test_the_record_has_what_was_set_and_leaves_other_accelerators_alone(tmp_path: Path) -> None:
    own: dict[str, Any] = {"learning_rate": 1e-3, "seed": 7}
    moving: dict[str, Any] = {"progressive": True, "gate_type": "hard_concrete", **own}
    for given in ({}, own, moving, moving | {"ramp_share": 0.25}, {"lr_scheduler_type": "cosine"}):
        kind = ProgressiveConfig if "progressive" in given else NutePruneConfig
        args = kind(output_dir=str(tmp_path), use_cpu=True, **given)
        other = Accelerator(cpu=True)
        assert chosen_settings(args) == given
        assert other.distributed_type == "NO"


@pytest.mark.parametrize("kind", [NutePruneConfig, RecoverConfig])
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "no loss here smooths labels: leave it out"),
        ({"use_liger_kernel": True}, "never been tested with: leave it out"),
        ({"torch_compile": True}, "hooks come and go in each step"),
    ],
)
def test_settings_that_would_do_nothing_or_harm_are_refused(
    kind: Any, setting: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        kind(output_dir=str(tmp_path), use_cpu=True, **setting)


@pytest.mark.parametrize("kind", [NutePruneConfig, RecoverConfig])
def test_a_process_keeps_to_one_accelerator(kind: Any, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("transformers.TrainingArguments.n_gpu", property(lambda self: self._n_gpu))
    original = TrainingArguments.__post_init__

    def with_four(self: Any) -> None:
        original(self)
        self._n_gpu = 4

    monkeypatch.setattr(TrainingArguments, "__post_init__", with_four)
    args = kind(output_dir=str(tmp_path), per_device_train_batch_size=2, use_cpu=True)
    assert args.train_batch_size == 2


def test_what_a_callback_does_with_the_model_can_be_the_pruned_ones(
    tiny_model, tmp_path: Path
) -> None:
    trainer = make(tiny_model("llama"), tmp_path, max_steps=2)
    trainer.train()
    trainer.model.eval()
    with torch.no_grad():
        plain = trainer.model(TOKENS, use_cache=False).logits
        with trainer.as_pruned():
            pruned = trainer.model(TOKENS, use_cache=False).logits
            made = trainer.model.generate(input_ids=TOKENS, max_new_tokens=6, do_sample=False)
        small = trainer.finalize().eval()
        wanted = small(TOKENS).logits
    close = 1e-4 * float(wanted.abs().max())
    assert torch.allclose(pruned, wanted, atol=close)
    assert not torch.allclose(plain, wanted, atol=close)
    assert torch.equal(made, small.generate(TOKENS, max_new_tokens=6, do_sample=False))
    with pytest.raises(UserError, match="used the trainer's model up"):
        trainer.as_pruned()


def test_the_order_of_the_text_is_that_of_the_seed_whatever_is_drawn_before(
    tiny_model, tmp_path: Path
) -> None:
    found = []
    for folder, seed in (("a", 7), ("b", 8)):
        trainer = make(tiny_model("llama"), tmp_path / folder, max_steps=3)
        torch.manual_seed(seed)
        trainer.train()
        found.append([line["loss"] for line in metrics(tmp_path / folder)])
    assert found[0] == found[1]


def test_blocks_to_calibrate_on_are_as_long_as_the_text_not_as_its_first_item() -> None:
    items = [{"input_ids": list(range(4))}, *({"input_ids": list(range(9))} for _ in range(5))]
    assert calibration_blocks(items, 4).shape == (4, 9)


def test_items_of_several_lengths_want_a_collator(tiny_model, tmp_path: Path) -> None:
    items = [{"input_ids": torch.arange(3, 3 + n)} for n in (4, 9, 9)]
    args = NutePruneConfig(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(UserError, match=r"have 4 to 9 tokens: .* data_collator that pads"):
        NutePruneTrainer(tiny_model("llama"), args, items)


def test_a_model_over_several_devices_is_refused(tiny_model, tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.hf_device_map = {"model.embed_tokens": 0, "model.layers": "cpu"}
    with pytest.raises(UserError, match="spread over 0, cpu: load it without device_map"):
        make(model, tmp_path)


def test_only_the_process_that_saves_writes_the_runs_state(
    tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(tiny_model("llama"), tmp_path / "run")
    trainer._save(str(tmp_path / "a"))
    assert (tmp_path / "a").is_dir()
    monkeypatch.setattr(NutePruneConfig, "should_save", False)
    monkeypatch.setattr(NutePruneTrainer, "is_world_process_zero", lambda self: False)
    trainer._save(str(tmp_path / "b"))
    assert trainer.save_pruned(tmp_path / "b") == {}
    assert not (tmp_path / "b").exists()

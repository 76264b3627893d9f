"""The kinds of step that step.py compares; each lives in a process of its own, fed line by line.

- lora: the yardstick, with nothing of this package in it: the stock model, PEFT's LoRA on all
  projections, the model's own `labels=` loss.
- nuteprune: a step of `NutePruneTrainer` as it is by default: masks on heads and neurons are fixed
  and what they have at 0 is not computed; both roles layer by layer in one pass, KL chunk by chunk.
- ramp: the same while masks move: scores of all units are re-estimated from the gradients.
- teachers: ramp at its most costly: each step a snapshot is written, and another one is read and
  teaches.
- two_pass: nuteprune's loss as it is usually written: a pass of the teacher and one of the student
  with `output_hidden_states=True`, full fp32 log-probabilities of both.
- two_model: the same with a second copy of the model as the teacher.

Shape suffixes: B batch, T tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

import atexit
import json
import logging
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nuteprune.memory import peak

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from nuteprune import NutePruneTrainer

LEARNING_RATE = 1e-3
SNAPSHOTS = (0.4, 0.6, 0.8, 1.0)
"""Sparsities of the teachers that take turns, as shares of the target."""


@dataclass(frozen=True)
class Cell:
    """What a step is done on.

    Args:
        model: a checkpoint folder or hub id.
        batch_size: sequences.
        length: tokens per sequence.
        vocabulary: random weights with so many tokens; None: the checkpoint's own weights.
        rank: LoRA rank.
        dtype: of the base weights.
        device: where.
        checkpointing: whether activations are made again in the backward pass.
        sparsity: of the student.
        autocast: whether adapters compute in the base weights' dtype, as ours do, in the other
            kinds too; PEFT as it comes computes them in fp32.
    """

    model: str
    batch_size: int = 4
    length: int = 256
    vocabulary: int | None = None
    rank: int = 32
    dtype: str = "float32"
    device: str = "cpu"
    checkpointing: bool = False
    sparsity: float = 0.2
    autocast: bool = False


@dataclass
class Row:
    """One kind of step, ready to run.

    Args:
        backward: computes the loss and leaves its gradients.
        update: clips them, moves the optimizer, and ends the step.
        trained: parameters that are trained.
    """

    backward: Callable[[], Tensor]
    update: Callable[[], None]
    trained: int


def serve(row: Callable[[Cell], Row], cell: Cell) -> None:
    """Do a step for each line that comes in, and tell its seconds and the peak memory so far."""
    import transformers

    warnings.simplefilter("ignore")
    for name in ("bitsandbytes", "kernels"):  # which PEFT imports
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries may print
    torch.manual_seed(0)
    step = row(cell)
    for _ in sys.stdin:
        started = time.perf_counter()
        loss = float(step.backward())
        step.update()
        if cell.device != "cpu":
            torch.cuda.synchronize()
        answer = {
            "seconds": time.perf_counter() - started,
            "memory_bytes": peak(),
            "loss": loss,
            "trained": step.trained,
        }
        print(json.dumps(answer), file=answers, flush=True)


def backbone(cell: Cell) -> PreTrainedModel:
    """Return the stock model of a cell."""
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = getattr(torch, cell.dtype)
    if cell.vocabulary is None:
        model = AutoModelForCausalLM.from_pretrained(cell.model, dtype=dtype)
    else:
        config = AutoConfig.from_pretrained(cell.model)
        config.vocab_size = cell.vocabulary
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.to(cell.device)


@contextmanager
def adapters(cell: Cell, model: PeftModel) -> Iterator[None]:
    """Let PEFT's adapters compute as the cell says."""
    from peft.helpers import disable_input_dtype_casting

    dtype = getattr(torch, cell.dtype) if cell.autocast else torch.float32
    half = dtype != torch.float32
    autocast = torch.autocast(cell.device, dtype if half else None, enabled=half)
    with autocast, disable_input_dtype_casting(model, active=half):
        yield


def tokens(cell: Cell, model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the same random tokens for all kinds of step."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    random = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(0, vocabulary, (cell.batch_size, cell.length), generator=random)
    ids_BT = ids_BT.to(cell.device)
    return {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}


def lora(cell: Cell) -> Row:
    """Return the plain step that all others are measured against."""
    from peft import LoraConfig, get_peft_model

    base = backbone(cell)
    if cell.checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    settings = LoraConfig(
        r=cell.rank, lora_alpha=cell.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, settings).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    inputs = tokens(cell, base)

    def backward() -> Tensor:
        with adapters(cell, model):
            loss: Tensor = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
        loss.backward()
        return loss.detach()

    def update() -> None:
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return Row(backward, update, sum(p.numel() for p in trained))


def trainer_for(cell: Cell, base: PreTrainedModel, **settings: Any) -> NutePruneTrainer:
    """Return a trainer that has the masks of a step, in a folder that goes with the process.

    Args:
        cell: what a step is done on.
        base: the dense model.
        **settings: beside the cell's, such as those of masks that move.
    """
    from nuteprune.data.training_text import BlockDataset
    from nuteprune.plan.trial import cut_by_chance
    from nuteprune.train.config import prune_config

    folder = tempfile.mkdtemp(prefix="nuteprune-step-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    checkpointing = {"gradient_checkpointing": True} if cell.checkpointing else {}
    config = prune_config(settings)(
        output_dir=folder,
        target_sparsity=cell.sparsity,
        use_cpu=cell.device == "cpu",
        lora_rank=cell.rank,
        learning_rate=LEARNING_RATE,
        per_device_train_batch_size=cell.batch_size,
        **checkpointing,
        **settings,
    )
    data = BlockDataset(tokens(cell, base)["input_ids"].cpu())
    trainer: NutePruneTrainer = import_module(config.PIPELINE).TRAINER(base, config, data)
    if cell.checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trainer.model.train()
    if config.progressive:  # else all units would be alike
        for kind, score in trainer.prepared.allocator.chance_scores().items():
            trainer.gates.scores[kind].copy_(score)
    cut_by_chance(trainer)
    return trainer


def _row(trainer: NutePruneTrainer, backward: Callable[[], Tensor]) -> Row:
    optimizer = trainer.create_optimizer()
    gates = getattr(trainer, "gates", None)

    def update() -> None:
        if gates is not None:
            gates.observe()
        trainer._clip_grad_norm(trainer.model)
        optimizer.step()
        optimizer.zero_grad()
        if gates is not None:
            gates.end_step()

    return Row(backward, update, sum(p.numel() for p in optimizer.param_groups[0]["params"]))


def nuteprune(cell: Cell) -> Row:
    """Return a step of ours, taught by the dense model."""
    from nuteprune.plan.trial import trial_step

    base = backbone(cell)
    trainer, inputs = trainer_for(cell, base), tokens(cell, base)
    return _row(trainer, lambda: trial_step(trainer, inputs))


def ramp(cell: Cell) -> Row:
    """Return a step of ours while masks move, taught by the dense model."""
    from nuteprune.plan.trial import trial_step

    base = backbone(cell)
    trainer, inputs = trainer_for(cell, base, progressive=True), tokens(cell, base)
    return _row(trainer, lambda: trial_step(trainer, inputs))


def teachers(cell: Cell) -> Row:
    """Return one that writes a snapshot and is taught by another one from disk."""
    from nuteprune.plan.trial import trial_step
    from nuteprune.progressive.teachers import Teachers

    base = backbone(cell)
    trainer: Any = trainer_for(cell, base, progressive=True)
    inputs, state = tokens(cell, base), trainer.prepared.bank.state()
    for share in SNAPSHOTS:
        trainer.gates.begin_step(share * cell.sparsity, 0)
        trainer.teachers.record(share * cell.sparsity, trainer.gates.snapshot(), state)
    turn = 0

    def backward() -> Tensor:
        nonlocal turn
        turn += 1
        written = Teachers(trainer.teachers.folder / "written", trainer.teachers.layout)
        written.record(cell.sparsity, trainer.gates.snapshot(), state)
        trainer._teacher_index = turn % len(SNAPSHOTS)
        return trial_step(trainer, inputs)

    return _row(trainer, backward)


def two_pass(cell: Cell) -> Row:
    """Return distillation as it is usually written, the adapters off for the teacher."""
    base = backbone(cell)
    trainer, inputs = trainer_for(cell, base), tokens(cell, base)
    return _row(trainer, lambda: _plain_distillation(cell, trainer, inputs, None))


def two_model(cell: Cell) -> Row:
    """Return the same with another copy of the model as the teacher."""
    base, teacher = backbone(cell), backbone(cell).requires_grad_(False)
    trainer, inputs = trainer_for(cell, base), tokens(cell, base)
    return _row(trainer, lambda: _plain_distillation(cell, trainer, inputs, teacher))


def _plain_distillation(
    cell: Cell,
    trainer: NutePruneTrainer,
    inputs: dict[str, Tensor],
    teacher: PreTrainedModel | None,
) -> Tensor:
    from nuteprune.distill.losses import layer_relative
    from nuteprune.model.anatomy import Anatomy

    def outputs(model: Any, anatomy: Anatomy) -> tuple[list[Tensor], Tensor]:
        """Outputs of all layers, and fp32 log-probabilities."""
        last: list[Tensor] = []  # `hidden_states` ends with what the final norm makes of it
        handle = anatomy.final_norm.register_forward_pre_hook(lambda _, x: last.append(x[0]))
        said = model(**inputs, use_cache=False, output_hidden_states=True)
        handle.remove()
        return [*said.hidden_states[1:-1], last[0]], said.logits.float().log_softmax(-1)

    with torch.no_grad():
        if teacher is not None:
            theirs, theirs_BTV = outputs(teacher, Anatomy(teacher))
        else:
            with trainer.model.disable_adapter():
                theirs, theirs_BTV = outputs(trainer.model, trainer.anatomy)
    with trainer.prepared.hooks.using(trainer.masks):
        with adapters(cell, trainer.model):
            ours, ours_BTV = outputs(trainer.model, trainer.anatomy)
        weight_BT = inputs["attention_mask"].float()
        layers = [layer_relative(a, b, weight_BT) for a, b in zip(ours, theirs, strict=True)]
        kl = (theirs_BTV.exp() * (theirs_BTV - ours_BTV)).sum(-1).mean()
        loss = kl + torch.stack(layers).mean()
        loss.backward()
    return loss.detach()


ROWS: dict[str, Callable[[Cell], Row]] = {
    row.__name__: row for row in (lora, nuteprune, ramp, teachers, two_pass, two_model)
}

if __name__ == "__main__":
    serve(ROWS[sys.argv[1]], Cell(**json.loads(sys.argv[2])))

"""A model in the middle of its training, from a trainer checkpoint: to judge, not to go on with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from nuteprune.errors import UserError
from nuteprune.gates.masks import Masks
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.hooks import MaskHooks
from nuteprune.model.lora import LoraBank
from nuteprune.run_folder import STATE, TRAINER_STATE
from nuteprune.train.config import NutePruneConfig
from nuteprune.train.setup import lora_config, make_allocator, make_gates
from nuteprune.train.state import RunState, restore

_SCORES = "scores_"  # how `gates.Gates` names the buffer of a kind


def is_midway(folder: Path) -> bool:
    """Return whether a folder is a checkpoint in the middle of a run."""
    return (folder / STATE).is_file()


def load_midway(
    model: PreTrainedModel, folder: Path, settings: Mapping[str, Any]
) -> tuple[PreTrainedModel, float | None]:
    """Give a run's model the LoRA weights and the masks that the run has reached.

    Args:
        model: the model that the run prunes; it is changed, and masks are hooked into it.
        folder: the trainer checkpoint.
        settings: settings of the run under the names of `NutePruneConfig`; those that the files
            tell themselves are not needed.

    Returns:
        The model as it was at that step, and the sparsity of its masks, None of `recover`, which
        has none.

    Raises:
        UserError: if the checkpoint is not of this model and these settings.
    """
    state = RunState.load(folder)
    kinds = [name.removeprefix(_SCORES) for name in state.gates if name.startswith(_SCORES)]
    soft = any(not name.startswith(_SCORES) for name in state.gates)  # something is trained
    rank = next(len(value) for name, value in state.lora.items() if name.endswith(".A"))
    known = {
        "gates": ",".join(kinds),
        "gate_type": settings.get("gate_type", "hard_concrete") if soft else "ranked",
        "solved_schedule": not any("lagrangian" in x for x in state.gates),
        "lora_rank": rank,
        "compensation": "none",  # it has been, or is for the end
        "use_cpu": True,
    }
    if not kinds:  # of `recover`: adapters on all projections, their scale 1
        settings = {k: v for k, v in settings.items() if not k.startswith("lora_")}
        known |= {"lora_alpha": rank}
    args = NutePruneConfig(**{**settings, **known})
    dense = Anatomy(model)
    allocator = make_allocator(dense, args) if kinds else None
    anatomy = Anatomy(get_peft_model(model, lora_config(dense, args)))
    _take(LoraBank(anatomy).state(), state.lora, folder, "LoRA weights")
    if allocator is None:
        return anatomy.model.eval(), None
    masks = state.masks
    if not masks:
        gates = make_gates(allocator, allocator.equal_scores(), args)
        _take(gates.state_dict(), state.gates, folder, "gates")
        gates.begin_step(_scheduled(folder), seed=0)  # a snapshot has no noise in it
        masks = gates.snapshot().values
    hooks = MaskHooks(anatomy)
    hooks.masks = Masks(allocator.layout, masks).to(anatomy.model.device)
    hard = {kind: (value > 0).float().cpu() for kind, value in masks.items()}
    sparsity = allocator.budget.expected_sparsity(Masks(allocator.layout, hard))
    return anatomy.model.eval(), float(sparsity)


def _take(current: dict[str, Tensor], saved: dict[str, Tensor], folder: Path, what: str) -> None:
    try:
        restore(current, saved, what)
    except UserError as error:
        raise UserError(
            f"{folder}: its {what} are not of this model under these settings; pass the model that "
            "the run prunes as --base, and the run's own settings as --config or --set"
        ) from error


def _scheduled(folder: Path) -> float:
    """Return the sparsity that was due at the checkpoint's step, from the trainer's log."""
    try:
        log = json.loads((folder / TRAINER_STATE).read_text(encoding="utf-8"))["log_history"]
        return float([line["target"] for line in log if "target" in line][-1])
    except (OSError, ValueError, LookupError) as error:
        raise UserError(
            f"{folder}: cannot tell how far its masks were ({TRAINER_STATE} has no target in "
            "its log); pass a later checkpoint"
        ) from error

"""A model in the middle of its training, from a trainer checkpoint: to judge, not to go on with."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from nuteprune.errors import UserError
from nuteprune.files import damage
from nuteprune.gates.masks import Masks
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.hooks import MaskHooks
from nuteprune.model.lora import LoraBank
from nuteprune.products import read_tensors
from nuteprune.run_folder import SETTINGS, STATE
from nuteprune.train.config import NutePruneConfig, RecoverConfig, prune_config
from nuteprune.train.settings import WHAT, declared, read_settings
from nuteprune.train.setup import make_allocator, with_lora
from nuteprune.train.state import RunState


def is_midway(folder: Path) -> bool:
    """Return whether a folder is a checkpoint in the middle of a run."""
    return (folder / STATE).is_file()


def run_config(checkpoint: Path) -> NutePruneConfig | RecoverConfig:
    """Return the settings of the run that a trainer checkpoint belongs to.

    Raises:
        UserError: if its settings.json is missing or of another release.
    """
    settings = read_settings(checkpoint.resolve().parent)
    is_pruning = "method" in settings  # nothing else of a run is
    kind = prune_config(settings) if is_pruning else RecoverConfig
    what = [name for name, x in declared(kind).items() if x.role == WHAT]
    given = {name: settings[name] for name in what if name in settings}
    try:
        return kind(output_dir=str(checkpoint), use_cpu=True, **given)
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{checkpoint.parent / SETTINGS} is damaged: {error}") from error


def load_midway(model: PreTrainedModel, checkpoint: Path) -> tuple[PreTrainedModel, float | None]:
    """Give a run's model the LoRA weights and the masks that the run has reached.

    Args:
        model: the model that the run prunes; it is changed, and masks are hooked into it.
        checkpoint: the trainer checkpoint.

    Returns:
        The model as it was at that step, and the sparsity of its masks, None of `recover`, which
        has none.

    Raises:
        UserError: if the checkpoint is not of this model.
    """
    if found := damage(checkpoint, lambda name: name == STATE):
        raise UserError(f"{found}; judge another checkpoint of the run")
    args, state = run_config(checkpoint), RunState.load(checkpoint)
    dense = Anatomy(model)
    allocator = make_allocator(dense, args) if isinstance(args, NutePruneConfig) else None
    anatomy = Anatomy(with_lora(dense, args))
    fixed = isinstance(args, NutePruneConfig) and "masks" not in state.tensors and args.refit
    weights = _product(checkpoint, "refit") if fixed else {}
    try:
        LoraBank(anatomy).load(weights | state.lora)
    except UserError as error:
        raise UserError(f"{checkpoint} is not of this model: pass the run's as --base") from error
    if allocator is None:
        return anatomy.model.eval(), None
    masks = Masks(allocator.layout, state.tensors.get("masks") or _product(checkpoint, "choose"))
    MaskHooks(anatomy, masks.to(anatomy.model.device))
    return anatomy.model.eval(), allocator.sparsity(masks)


def _product(checkpoint: Path, stage: str) -> dict[str, Tensor]:
    """Return what a stage of the checkpoint's run has left beside it."""
    return read_tensors(checkpoint.resolve().parent / f"{stage}.safetensors")[0]

"""Checks on a small model whether an entry is exact, for each kind of gate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from nuteprune.console import quiet_loading
from nuteprune.distill.losses import Head
from nuteprune.errors import RunFailed, UserError, in_one_line
from nuteprune.export.checkpoint import assemble, recount, save
from nuteprune.export.loading import load_pruned
from nuteprune.export.record import blocks_recount
from nuteprune.gates.allocate import Allocator
from nuteprune.gates.masks import Layout, Masks, NarrowMasks
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.family import GATE_KINDS, Family
from nuteprune.model.forwards import noting_outputs
from nuteprune.model.hooks import MaskHooks
from nuteprune.model.lookup import knowing
from nuteprune.model.small import VOCABULARY, small_model
from nuteprune.train.config import NutePruneConfig
from nuteprune.train.constraints import make_allocator

SHAPES = ("free", "uniform")
LARGEST_ERROR = 1e-4
"""How far logits may be off, relative to the largest: in float32 a wrong cut is off by far more."""
Found = dict[str, dict[str, str | None]]
"""Kind of gate -> kind of shapes -> why it is not exact, None if it is."""


def settled(family: Family, small: PreTrainedConfig) -> Family:
    """Return an entry completed by trial: whether attention counts its heads.

    Raises:
        UserError: if the model under open gates, or its language head, is not what the entry says.
    """
    with knowing(family):
        model = small_model(small)
        anatomy = Anatomy(model)
        tokens = _tokens()
        layout, hooks = Layout(anatomy.shape, anatomy.head_dim), MaskHooks(anatomy)
        stock = _logits(model, tokens)
        kinds = [kind for kind in GATE_KINDS if layout.units(kind)]
        open_ = Masks(layout, {kind: torch.ones(layout.units(kind)) for kind in kinds})
        with hooks.using(open_):
            if not torch.equal(_logits(model, tokens), stock):
                raise UserError("under open gates the model is not what it was")
        with torch.no_grad(), noting_outputs([anatomy.final_norm]) as read:
            model(input_ids=tokens, use_cache=False)
        if difference := _off(Head.of(anatomy).logits(read[0][0]), stock[0]):
            raise UserError(f"logits are not what the entry makes of the head's: {difference}")
        heads = torch.ones(layout.units("heads"))
        per_layer = len(heads) // len(anatomy.layers)
        heads[: per_layer // 2] = 0.0
        masks = Masks(layout, {"heads": heads})
        with hooks.using(masks):
            expected = _logits(model, tokens)
        try:
            with hooks.using(NarrowMasks(masks, family)):
                narrow = _off(_logits(model, tokens), expected)
        except RuntimeError:
            narrow = "shapes do not fit"
        hooks.remove()
    return replace(family, counts_heads=narrow is not None)


def examine(family: Family, small: PreTrainedConfig) -> Found:
    """Check an entry, for every kind of gate and of shapes that it does not refuse.

    Masked, sliced, saved and reloaded models must give the same logits, the file must hold as many
    parameters as predicted, and generation with and without a cache must be equal.

    Args:
        family: the entry.
        small: a small config of its type.
    """
    found: Found = {}
    kinds = [x for x in GATE_KINDS if x != "kv_groups" or "kv_heads" in family.config_names]
    with knowing(family), quiet_loading():
        for kind in kinds:
            asked = [x for x in SHAPES if not family.refusal(kind, uniform=x == "uniform")]
            found[kind] = {shapes: _tried(small, kind, shapes) for shapes in asked}
    return found


def _tried(small: PreTrainedConfig, kind: str, shapes: str) -> str | None:
    """Return why a kind of gate is not exact, None if it is."""
    try:
        with TemporaryDirectory() as folder:
            return _difference(small, kind, shapes, Path(folder) / "model")
    except Exception as error:  # whatever code raises that an entry does not fit
        is_ours = isinstance(error, (UserError, RunFailed))
        return ("" if is_ours else f"{type(error).__name__}: ") + in_one_line(error)


def _difference(small: PreTrainedConfig, kind: str, shapes: str, folder: Path) -> str | None:
    model, tokens = small_model(small), _tokens()
    anatomy = Anatomy(model)
    settings = NutePruneConfig(
        output_dir=str(folder), gates=kind, shapes=shapes, neuron_multiple=8, hidden_multiple=8
    )
    allocator = make_allocator(anatomy, settings)
    masks = _half(allocator)
    hooks = MaskHooks(anatomy)
    with hooks.using(masks):
        expected = _logits(model, tokens)
    hooks.remove()
    cut, shape = assemble(anatomy, masks)
    if off := _off(_logits(cut, tokens), expected):
        return f"cutting changes the logits: {off}"
    save(cut, folder)
    loaded = load_pruned(folder, dtype=torch.float32)
    if off := _off(_logits(loaded, tokens), expected):
        return f"saving and loading changes the logits: {off}"
    if shapes == "uniform" and not type(loaded).__module__.startswith("transformers.models."):
        return "the result is of no stock class"
    counted = blocks_recount(recount(folder)["tensors"], loaded.config.model_type)
    if counted != allocator.budget.parameters(shape):
        return f"the file holds {counted} parameters, not {allocator.budget.parameters(shape)}"
    return _generation(loaded, tokens)


def _generation(model: PreTrainedModel, tokens: Tensor) -> str | None:
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(tokens)
    cached, plain = (
        model.generate(tokens, attention_mask=mask, use_cache=use, **how)  # type: ignore[operator]
        for use in (True, False)
    )
    return None if torch.equal(cached, plain) else "generation with a cache differs"


def _half(allocator: Allocator) -> Masks:
    """Return masks that remove half of what can be removed, with soft values where open."""
    random = torch.Generator().manual_seed(0)
    kinds = allocator.constraints.kinds
    scores = {k: torch.rand(allocator.layout.units(k), generator=random) for k in kinds}
    shape = allocator.shape(scores, 0.5 * allocator.maximum())
    hard = allocator.masks(shape, scores)
    soft = {k: v * (0.5 + torch.rand(v.shape, generator=random)) for k, v in hard.values.items()}
    return Masks(allocator.layout, soft)


def _tokens() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def _logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


@torch.no_grad()
def _off(ours: Tensor, theirs: Tensor) -> str | None:
    """Return by how much logits are off, None if they are the same but for rounding."""
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    return None if error <= LARGEST_ERROR else f"off by {error:.1e} of the largest"

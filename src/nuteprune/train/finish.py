"""From a trained student to a checkpoint: LoRA merged, masks folded, cut to its shape, written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nuteprune.errors import UserError
from nuteprune.export.checkpoint import as_stored, assemble, rounded_as_stored
from nuteprune.export.loading import exact_dtype
from nuteprune.export.record import write_pruned
from nuteprune.export.wrapping import Around
from nuteprune.gates.masks import Masks
from nuteprune.mapped import mapped
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.offload import bring_home
from nuteprune.model.packed import forget_packed, is_packed
from nuteprune.model.shape import Shape
from nuteprune.shrink.finalize import merge_layer
from nuteprune.shrink.slicing import Tensors
from nuteprune.train.pruning import Pruning
from nuteprune.train.run_settings import chosen_settings


@dataclass(frozen=True)
class Finished:
    """A smaller model, ready to be written.

    Args:
        model: its weights rounded as they will be stored.
        shape: its dimensions.
        masks: what was kept of the dense model, on the CPU.
        target: the sparsity that was asked for, or that what was asked for came to at first.
    """

    model: PreTrainedModel
    shape: Shape
    masks: Masks
    target: float


def free_base(model: PeftModel) -> None:
    """Drop a model's own weights, to make room for another; LoRA and gates stay."""
    for name, module in model.get_base_model().named_modules():
        if "lora_" not in name:
            module._parameters = dict.fromkeys(module._parameters)
            forget_packed(module)


class Ending:
    """What becomes of a run's model: it is cut, once for each target, and written.

    Args:
        pruning: the run.
    """

    def __init__(self, pruning: Pruning) -> None:
        self._pruning, self._ready, self._args = pruning, pruning.ready, pruning.args
        self.finished: Finished | None = None
        self._used_up = False

    def check_unused(self) -> None:
        """Refuse to go on with a model that is used up.

        Raises:
            UserError: if it is.
        """
        if self._used_up:
            raise UserError(
                "finalize() has used the trainer's model up, and what was learned with it: keep "
                "what it returned. To go on from a checkpoint of the run, make a new trainer and "
                "call train(resume_from_checkpoint=True)"
            )

    @property
    def reloads(self) -> bool:
        """Whether the model that is cut has to be loaded anew.

        So it is where the run's own is not whole, or does not hold all values that are stored.
        """
        origin, own = self._ready.origin, self._ready.origin.computed_dtype
        narrow = exact_dtype(origin.stored_dtype, own) != own
        return self._args.sharded or is_packed(self._ready.anatomy.model) or narrow

    def check_whole(self) -> None:
        """Refuse to cut the run's own model where it has to be loaded anew.

        Raises:
            UserError: saying how.
        """
        if self.reloads:
            raise UserError(
                "weights that are sharded, in 8 or 4 bits, or narrower than they are stored cannot "
                "be cut: load the model again, whole and in full precision, call settle() in all "
                "processes, then finalize(dense=...) in one"
            )

    def cut(self, dense: PreTrainedModel | Callable[[], PreTrainedModel] | None) -> PreTrainedModel:
        """Return the smaller model of the last target, whose masks are final; see `finalize`."""
        ready, bank = self._ready, self._pruning.bank
        ready.hooks.remove()
        self._used_up = True
        learned = bank.state()
        bank.release()
        if dense is None:
            base = cast(PreTrainedModel, ready.model.unload())
            if self._args.offload:
                bring_home(base)
        else:
            free_base(ready.model)
            base = dense if isinstance(dense, PreTrainedModel) else dense()
        return self._finish(base, learned, ready.gates.snapshot(), ready.targets[-1])

    def cut_earlier(self, index: int, dense: PreTrainedModel) -> PreTrainedModel:
        """Return the smaller model of an earlier target; see `finalize_target`."""
        ready, reached = self._ready, self._pruning.reached
        if not 0 <= index < len(reached):
            raise UserError(
                f"the run stopped before it had the model of {ready.targets[index]:.1%} sparsity: "
                "there is nothing to cut"
            )
        role = ready.teachers.role(reached[index])
        assert role.masks is not None
        assert role.lora is not None
        return self._finish(dense, dict(role.lora), role.masks, ready.targets[index])

    def _finish(
        self, base: PreTrainedModel, state: dict[str, Tensor], masks: Masks, target: float
    ) -> PreTrainedModel:
        """Merge, fold and slice.

        Args:
            base: a dense model without adapters; it is used up.
            state: what was learned, as `LoraBank.state` names it; it is used up.
            masks: final ones.
            target: the sparsity that they are for.
        """
        origin, anatomy = self._ready.origin, Anatomy(base.eval())
        if anatomy.shape != masks.layout.shape:
            raise UserError(
                "the dense model given is not the one that was trained: its dimensions differ; "
                "load the run's own model again"
            )
        learned = self._pruning.bank.learned(state)
        state.clear()  # each part goes when it is merged
        exact = torch.promote_types(
            base.dtype, exact_dtype(origin.stored_dtype, origin.computed_dtype)
        )

        def begin(layer: int | None) -> None:
            for parameter in (base if layer is None else anatomy.layers[layer]).parameters():
                parameter.data = parameter.data.to(exact)
            if layer is not None:
                merge_layer(anatomy, layer, learned, origin.computed_dtype)

        def hold(part: Tensors) -> Tensors:
            part = rounded_as_stored(part, origin.stored_dtype)  # judged is what will be written
            return mapped(part, Path(cast(str, self._args.output_dir)))

        masks = masks.to("cpu")
        small, shape = assemble(anatomy, masks, begin=begin, hold=hold)
        self.finished = Finished(small, shape, masks, target)
        return small

    def save(
        self,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase | None,
        record: Mapping[str, Any],
        around: Around | None = None,
    ) -> dict[str, Any]:
        """Write the model that was cut last, with its tokenizer, record and card.

        Args:
            folder: absent, empty, or with nothing but `run/` in it.
            tokenizer: the model's.
            record: what else the record is to hold; it wins over what is known here.
            around: what else the checkpoint has that the model is from; None: nothing.

        Returns:
            The record as it was written.

        Raises:
            UserError: if nothing was cut yet, or the folder holds other files.
        """
        if self.finished is None:
            raise UserError("there is nothing to save yet: call finalize() first")
        ready, done, args = self._ready, self.finished, self._args
        origin, budget = ready.origin, ready.allocator.budget
        record = {**origin.entries, "config": chosen_settings(args), **record}
        record.setdefault("perplexity", {"before": {}, "after": {}})
        came_to, cache = budget.sparsity(done.shape), ready.prices.cache(done.shape)
        record |= ready.target(done.target).record(came_to, cache)
        return write_pruned(
            folder,
            as_stored(done.model, origin.stored_dtype),
            tokenizer,
            around=around,
            params={
                "before": origin.parameters,
                "blocks_before": budget.before,
                **ready.prices.of_a_token(done.shape),
            },
            before=budget.shape,
            after=done.shape,
            shapes=args.shapes,
            teachers={"count": len(ready.met), "sparsities": ready.met},
            bad_steps=self._pruning.bad_steps.total,
            seed=args.seed,
            **record,
        )

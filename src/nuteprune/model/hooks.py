"""Where masks multiply, and projections that compute only what masks keep: hooks on stock modules.

Heads act on the input of the attention output projection, neurons on the input of the down
projection, hidden gates on the first layer's input and on the output of both projections and of
mixers, block gates on what a block adds to the residual stream: after its post-norm where a family
has one, since a norm would undo any factor but 0. Routed experts are in `model.routing`. Attach
after PEFT has wrapped the model, so that masks cover the LoRA branch too.

Masks may also say which rows and columns of a projection are computed at all. Fixed masks leave
features that nobody reads. Not computing them saves as much as cutting them, and the weights stay
whole for the other role.

Shape suffixes: O rows (output features), I columns (input features).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nuteprune.model.anatomy import Anatomy, Mixture
from nuteprune.model.family import Projection
from nuteprune.model.forwards import put_forward

if TYPE_CHECKING:
    from nuteprune.model.routing import Mask

Selection = tuple[Tensor | None, Tensor | None]
"""Indices of the rows and of the columns of a projection that are computed, None for all."""


class MaskSource(Protocol):
    """What the hooks ask of masks; see `nuteprune.gates.masks.Masks`."""

    def inputs(self, layer: int) -> Mapping[str, Tensor | None]:
        """Return `attn_block` and `mlp_block` -> multipliers of their last projection's input."""

    def part(self, kind: str, layer: int) -> Tensor | None:
        """Return a layer's multipliers of a kind; `hidden` is the same in all layers."""

    def selection(self, layer: int, projection: Projection) -> Selection:
        """Return the rows and columns of a projection that the masks leave to compute."""


def scale(x: Tensor, mask: Tensor | None) -> Tensor:
    """Multiply features (..., F) by a mask (F,), or by one mask per sequence (B, F)."""
    if mask is None:
        return x
    mask = mask.to(x.dtype)
    if mask.dim() == 1:
        return x * mask
    by_sequence = x.reshape(mask.shape[0], -1, x.shape[-1])
    return (by_sequence * mask.unsqueeze(1)).reshape(x.shape)


def _scaled(output: Any, mask: Tensor | None) -> Any:
    """Scale what a module reads or gives: features, or a tuple that begins with them."""
    if mask is None:
        return output
    if isinstance(output, tuple):
        return (scale(output[0], mask), *output[1:])
    return scale(output, mask)


class MaskHooks:
    """Multiplies a model's activations by the masks in use; without masks the model is stock.

    Args:
        anatomy: the model to attach to.
        masks: those in use outside of `using`.
    """

    def __init__(self, anatomy: Anatomy, masks: MaskSource | None = None) -> None:
        self._masks = masks
        self._stack = ExitStack()
        hidden = self._part("hidden", 0)
        self._scale_input(anatomy.layers[0], hidden)
        for layer in range(len(anatomy.layers)):
            for block, module in anatomy.writers(layer):
                self._scale_output(module, hidden)
                added = anatomy.post_norm(layer, block) or module
                self._scale_output(added, self._part(block, layer))
            for block, projection in anatomy.ends(layer).items():
                if (module := anatomy.projection(layer, projection)) is not None:
                    self._scale_input(module, self._inputs(block, layer))
            if (mixture := anatomy.mixture(layer)) is not None:
                self._route(mixture, layer)
            for projection in anatomy.family.projections:
                self._narrow(anatomy.projection(layer, projection), layer, projection)

    def _part(self, kind: str, layer: int) -> Mask:
        return lambda: None if self.masks is None else self.masks.part(kind, layer)

    def _inputs(self, block: str, layer: int) -> Mask:
        return lambda: None if self.masks is None else self.masks.inputs(layer)[block]

    def _scale_input(self, module: nn.Module, mask: Mask) -> None:
        hook = module.register_forward_pre_hook(lambda _, args: _scaled(args, mask()))
        self._stack.enter_context(hook)

    def _scale_output(self, module: nn.Module, mask: Mask) -> None:
        hook = module.register_forward_hook(lambda _, __, output: _scaled(output, mask()))
        self._stack.enter_context(hook)

    def _route(self, mixture: Mixture, layer: int) -> None:
        """Let masks decide which experts may be chosen, and weigh their outputs."""
        from nuteprune.model.routing import RoutedMasks, WeighedMasks  # mixtures alone need it

        kind = WeighedMasks if mixture.entry.weighed_first else RoutedMasks
        masks = kind(mixture, self._part("experts", layer), self._part("expert_neurons", layer))
        self._stack.callback(put_forward(mixture.router, masks.route))
        self._stack.callback(put_forward(mixture.experts, masks.compute))

    def _narrow(self, module: nn.Module | None, layer: int, projection: Projection) -> None:
        """Let a projection and its LoRA leave out rows and columns that masks remove."""

        def selected() -> Selection:
            return (None, None) if self.masks is None else self.masks.selection(layer, projection)

        if isinstance(module, LoraLayer):
            for reads in module.lora_A.values():
                self._put_narrow(reads, lambda: (None, selected()[1]))
            for writes in module.lora_B.values():
                self._put_narrow(writes, lambda: (selected()[0], None))
            module = module.get_base_layer()
        if module is not None:
            self._put_narrow(module, selected)

    def _put_narrow(self, module: Any, selected: Callable[[], Selection]) -> None:
        self._stack.callback(put_forward(module, Narrow(module, selected)))

    @property
    def masks(self) -> MaskSource | None:
        """The masks in use; `using` alone changes them."""
        return self._masks

    @contextmanager
    def using(self, masks: MaskSource | None) -> Iterator[None]:
        """Run the model under other masks for a while."""
        previous, self._masks = self._masks, masks
        try:
            yield
        finally:
            self._masks = previous

    def remove(self) -> None:
        """Take all hooks off the model."""
        self._stack.close()


def cut(weight_OI: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """Return some rows and columns of a weight."""
    if rows is not None:
        weight_OI = weight_OI.index_select(0, rows)
    if columns is not None:  # by rows of the transposed: on CPUs, columns are gathered one by one
        weight_OI = weight_OI.t().contiguous().index_select(0, columns).t()
    return weight_OI


def narrow_linear(
    x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, selected: Selection
) -> Tensor:
    """Return `x @ cut(weight).T + cut(bias)`; of a frozen weight, nothing cut stays in memory.

    Args:
        x: (..., selected columns).
        weight_OI: the whole weight.
        bias_O: the whole bias, frozen.
        selected: rows to compute, and columns that `x` has.

    Returns:
        (..., selected rows).
    """
    rows, _ = selected
    if bias_O is not None and rows is not None:
        bias_O = bias_O.index_select(0, rows)
    if weight_OI.requires_grad:
        return F.linear(x, cut(weight_OI, *selected), bias_O)
    return cast(Tensor, _FrozenNarrow.apply(x, weight_OI, bias_O, selected))


class _FrozenNarrow(torch.autograd.Function):
    """Cuts in the forward pass, and again in the backward pass: no copy lives in between."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, selected: Selection
    ) -> Tensor:
        ctx.save_for_backward(weight_OI, *selected)
        return F.linear(x, cut(weight_OI, *selected), bias_O)  # which autocast sees

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad @ cut(*ctx.saved_tensors).to(grad.dtype), None, None, None


class Narrow:
    """A linear module's forward, with the rows and columns selected at the time of a call.

    No function, so that a deep copy of the model computes with its own weights.

    Args:
        module: whose forward it stands in for; its weight and state stay as they are.
        selected: called at each forward pass.
    """

    def __init__(self, module: nn.Linear, selected: Callable[[], Selection]) -> None:
        self._module, self._selected, self._whole = module, selected, module.forward

    def __call__(self, x: Tensor) -> Tensor:
        """Compute the selected outputs (..., O) from the selected inputs (..., I)."""
        selected = self._selected()
        if all(part is None for part in selected):
            return self._whole(x)
        return narrow_linear(x, self._module.weight, self._module.bias, selected)

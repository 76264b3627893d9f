"""Runs calibration text through a model, one decoder layer at a time.

What is large, such as the covariance of a projection's inputs, is held for one layer at a time. A
layer may be changed before the text goes on to the next.

Shape suffixes: B batch, T tokens, D hidden width, I inputs of a projection.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from nuteprune.model.anatomy import Anatomy, no_logits
from nuteprune.model.hooks import MaskHooks, MaskSource
from nuteprune.model.sharding import gathered, is_sharded

PANEL = 256
"""Columns of a product of inputs that are formed at once."""


class _Stop(Exception):
    """Ends a forward pass where nothing that follows is wanted."""


class Layerwise:
    """Hidden states of some text in front of a decoder layer, at first the first one.

    Args:
        anatomy: the model; no gradients are taken.
        hooks: where masks multiply in it.
        masks: the masks that it runs under, None for open ones.
        batches: token ids (B, T), T the same in all.
    """

    @torch.no_grad()
    def __init__(
        self,
        anatomy: Anatomy,
        hooks: MaskHooks,
        masks: MaskSource | None,
        batches: Sequence[Tensor],
    ) -> None:
        self._anatomy, self._hooks, self._masks = anatomy, hooks, masks
        self._batches_BTD: list[Tensor] = []
        # What else a layer is called with, by batch size: masks and rotary tables differ by layer.
        self._kwargs: dict[int, list[dict[str, Any]]] = {}
        device = next(anatomy.model.parameters()).device
        for batch_BT in batches:
            ids_BT = batch_BT.to(device)
            if len(ids_BT) not in self._kwargs:
                self._kwargs[len(ids_BT)] = self._calls(ids_BT)
            with _hooked([anatomy.layers[0]], self._enter):
                self._until_stopped(anatomy.model, input_ids=ids_BT, use_cache=False)

    def _calls(self, ids_BT: Tensor) -> list[dict[str, Any]]:
        """Return what each layer is called with beside hidden states."""
        found: list[dict[str, Any]] = []

        def note(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(kwargs)

        with _hooked(self._anatomy.layers, note, with_kwargs=True), self._hooks.using(self._masks):
            self._anatomy.model(input_ids=ids_BT, use_cache=False, logits_to_keep=no_logits(ids_BT))
        return found

    def _enter(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        self._batches_BTD.append(args[0])
        if not is_sharded(layer):  # else what was gathered would not be let go
            raise _Stop

    def _until_stopped(self, run: Any, *args: Any, **kwargs: Any) -> None:
        try:
            with self._hooks.using(self._masks):
                run(*args, **kwargs)
        except _Stop:
            pass

    @torch.no_grad()
    def covariance(self, layer: int, module: nn.Module) -> Tensor:
        """Return X^T X (I, I) of the unmasked inputs of a layer's projection, in fp32."""
        products = _Products()

        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            products.add(args[0])
            raise _Stop

        # Before the masks' own hook, so that inputs are seen unmasked.
        layers = self._anatomy.layers
        with gathered(layers[layer]), _hooked([module], hook, prepend=True):
            for hidden_BTD in self._batches_BTD:
                self._until_stopped(self._run, layer, hidden_BTD)
        return products.whole()

    @torch.no_grad()
    def advance(
        self, layer: int, watched: Mapping[str, nn.Module] | None = None
    ) -> dict[str, Tensor]:
        """Take the text through a layer, to the next.

        Args:
            layer: the layer.
            watched: name -> projection of it.

        Returns:
            Name -> X^T X (I, I) of the projection's unmasked inputs, in fp32.
        """
        products = {name: _Products() for name in watched or ()}

        def hook(name: str) -> Any:
            return lambda _, args: products[name].add(args[0])

        with ExitStack() as stack:
            stack.enter_context(gathered(self._anatomy.layers[layer]))
            for name, module in (watched or {}).items():
                stack.enter_context(_hooked([module], hook(name), prepend=True))
            stack.enter_context(self._hooks.using(self._masks))
            self._batches_BTD = [self._run(layer, hidden_BTD) for hidden_BTD in self._batches_BTD]
        return {name: product.whole() for name, product in products.items()}

    def _run(self, layer: int, hidden_BTD: Tensor) -> Tensor:
        kwargs = self._kwargs[len(hidden_BTD)][layer]
        output: Any = self._anatomy.layers[layer].forward(hidden_BTD, **kwargs)
        return cast(Tensor, output[0] if isinstance(output, tuple) else output)


class _Products:
    """The sum of X^T X (I, I) over inputs X (..., I), in fp32; the lower triangle is computed."""

    def __init__(self) -> None:
        self._sum_II: Tensor | None = None

    def add(self, inputs: Tensor) -> None:
        rows_MI = inputs.reshape(-1, inputs.shape[-1]).float()
        size = rows_MI.shape[1]
        if self._sum_II is None:
            self._sum_II = rows_MI.new_zeros(size, size)
        for start in range(0, size, PANEL):
            panel_MP = rows_MI[:, start : start + PANEL]
            self._sum_II[start:, start : start + PANEL].addmm_(rows_MI[:, start:].T, panel_MP)

    def whole(self) -> Tensor:
        """Return both triangles."""
        assert self._sum_II is not None
        return self._sum_II.tril() + self._sum_II.tril(-1).T


@contextmanager
def _hooked(modules: Iterable[nn.Module], hook: Any, **kwargs: Any) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook, **kwargs) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

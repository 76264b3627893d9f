"""Runs calibration text through a model, one decoder layer at a time.

What is large, such as the covariance of a projection's inputs, is held for one layer at a time. A
layer may be changed before the text goes on to the next.

Shape suffixes: B batch, T tokens, D hidden width, I inputs of a projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from nuteprune.memory import give_back
from nuteprune.model.anatomy import Anatomy, no_logits, without_lora
from nuteprune.model.covariance import Block, Covariance, Read, Stop
from nuteprune.model.family import Projection
from nuteprune.model.forwards import giving, hidden_of, in_place_of, noting_calls
from nuteprune.model.hooks import MaskHooks, MaskSource
from nuteprune.model.weights import gathered, is_sharded, weight_of
from nuteprune.processes import ALONE, Team, sum_dtype

BATCH = 4
"""Blocks of text that go through a layer together: no gradients, no logits, so more than one fits.
As many for any number of processes, since rounding depends on it."""
KEPT_BYTES = 2**30
"""Bytes of a projection's inputs that may be kept, so that a layer need not form them again."""


class Layerwise:
    """Hidden states of some text in front of a decoder layer, at first the first one.

    Its `tokens` are those of all processes.

    Args:
        anatomy: the model; no gradients are taken.
        hooks: where masks multiply in it.
        masks: the masks to run with; None: open ones.
        batches: token ids (B, T), T the same in all.
        team: the processes that share the batches out, each reading its own.
    """

    @torch.no_grad()
    def __init__(
        self,
        anatomy: Anatomy,
        hooks: MaskHooks,
        masks: MaskSource | None,
        batches: Sequence[Tensor],
        team: Team = ALONE,
    ) -> None:
        self._anatomy, self._hooks, self._masks, self._team = anatomy, hooks, masks, team
        self.tokens = sum(batch_BT.numel() for batch_BT in batches)
        self._batches_BTD: list[Tensor] = []
        # What else a layer is called with, by batch size: masks and rotary tables differ by layer.
        self._kwargs: dict[int, list[dict[str, Any]]] = {}
        self._blocks: list[Block] = []  # all of them modules
        give_back()
        device, own = anatomy.model.device, team.mine(batches)
        for size, batch_BT in {len(x): x for x in batches}.items():
            self._kwargs[size] = self._calls(batch_BT.to(device))
        idle = len(own) * team.size < len(batches) and is_sharded(anatomy.layers[0])
        for batch_BT in [*own, *batches[: int(idle)]]:  # each process needs as many passes
            ids_BT = batch_BT.to(device)
            enters = anatomy.layers[0].register_forward_pre_hook(self._enter)
            with enters, self._first_layer_alone():
                kept = no_logits(ids_BT)
                self._until_stopped(
                    anatomy.model, input_ids=ids_BT, use_cache=False, logits_to_keep=kept
                )
        del self._batches_BTD[len(own) :]

    def _calls(self, ids_BT: Tensor) -> list[dict[str, Any]]:
        """Return the arguments of each layer besides hidden states."""
        found: list[dict[str, Any]] = []

        def note(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(kwargs)

        with ExitStack() as stack:
            for layer in self._anatomy.layers:
                stack.enter_context(layer.register_forward_pre_hook(note, with_kwargs=True))
            stack.enter_context(self._first_layer_alone())
            stack.enter_context(self._hooks.using(self._masks))
            self._anatomy.model(input_ids=ids_BT, use_cache=False, logits_to_keep=no_logits(ids_BT))
        return found

    @contextmanager
    def _first_layer_alone(self) -> Iterator[None]:
        """Let the other layers give what the first one does, at once."""
        first, *others = self._anatomy.layers
        with ExitStack() as stack:

            def skip(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
                stack.enter_context(giving(others, [output] * len(others)))

            stack.enter_context(first.register_forward_hook(skip))
            yield

    def _enter(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        self._batches_BTD.append(args[0])
        if not is_sharded(layer):  # else what was gathered would not be let go
            raise Stop

    def _until_stopped(self, run: Any, *args: Any, **kwargs: Any) -> None:
        with suppress(Stop), self._hooks.using(self._masks):
            run(*args, **kwargs)

    @torch.no_grad()
    def covariance(
        self, layer: int, projection: Projection, norm: nn.Module | None = None, other: Read = ()
    ) -> tuple[Tensor, Tensor | None]:
        """Return X^T X (I, I) of the unmasked inputs of a block's last projection, in fp32.

        The layer goes on from these inputs when it runs again, if they fit in `KEPT_BYTES`.

        Args:
            layer: where the text stands.
            projection: the last one of a block of it.
            norm: what the block reads the residual stream through.
            other: the inputs of `norm` for the same text in another model, from `reads`.

        Returns:
            X^T X, and (other - H)^T X (D, I) of what `norm` reads here, H; None without a norm.
            Where a norm follows the projection, X is divided as in `Covariance`.
        """
        module = self._anatomy.projection(layer, projection)
        around = self._anatomy.block(layer, projection)
        most = KEPT_BYTES // max(1, len(self._batches_BTD))
        with ExitStack() as stack:
            stack.enter_context(gathered(self._anatomy.layers[layer]))
            block = Block(around, module, self._products(layer, projection), most, other)
            # Before the masks' own hook, so that inputs are seen unmasked.
            stack.enter_context(module.register_forward_pre_hook(block.on_input, prepend=True))
            if norm is not None:
                stack.enter_context(norm.register_forward_pre_hook(block.on_read))
            if around is not None:
                stack.enter_context(module.register_forward_hook(block.on_written))
                stack.enter_context(around.register_forward_hook(block.on_output, prepend=True))
            for i in range(len(self._batches_BTD)):
                self._until_stopped(self._run, layer, i)
        # The last batch may be smaller, and have been kept alone.
        if len(block.inputs) == len(self._batches_BTD):
            self._blocks.append(block)
        missing_DI = block.missing_DI
        if norm is not None:
            if missing_DI is None:  # no batch is this process's
                shape = module.out_features, module.in_features
                device = self._anatomy.model.device
                missing_DI = torch.zeros(shape, dtype=sum_dtype(device), device=device)
            self._team.add_up([missing_DI])
            missing_DI = missing_DI.float()
        return block.products.whole(self._team), missing_DI

    @torch.no_grad()
    def calls(self, layer: int, module: nn.Module) -> list[tuple[Any, ...]]:
        """Return the arguments that a layer's module is called with, for each batch."""
        found: list[tuple[Any, ...]] = []

        def note(_: nn.Module, args: tuple[Any, ...]) -> None:
            found.append(args)
            raise Stop

        with module.register_forward_pre_hook(note):
            for i in range(len(self._batches_BTD)):
                self._until_stopped(self._run, layer, i)
        return found

    @torch.no_grad()
    def reads(self, layer: int, norms: Mapping[str, nn.Module]) -> dict[str, Read]:
        """Run the text through a layer, and return the inputs of its norms."""
        with ExitStack() as stack:
            found = {k: stack.enter_context(noting_calls(norm)) for k, norm in norms.items()}
            self.advance(layer)
        return {name: [args[0] for args in calls] for name, calls in found.items()}

    @torch.no_grad()
    def advance(
        self, layer: int, watched: Mapping[str, nn.Module] | None = None
    ) -> dict[str, Tensor]:
        """Run the text through a layer.

        Args:
            layer: the layer.
            watched: `attn_block` or `mlp_block` -> its last projection.

        Returns:
            Block -> X^T X (I, I) of the projection's unmasked inputs, in fp32.
        """
        ends = self._anatomy.ends(layer)
        products = dict[str, Covariance]()
        with ExitStack() as stack:
            stack.enter_context(gathered(self._anatomy.layers[layer]))
            for name, module in (watched or {}).items():
                products[name] = self._products(layer, ends[name])
                add = partial(_add_input, products[name])
                stack.enter_context(module.register_forward_pre_hook(add, prepend=True))
            stack.enter_context(self._hooks.using(self._masks))
            for i in range(len(self._batches_BTD)):
                self._batches_BTD[i] = self._run(layer, i)
        self._blocks.clear()
        give_back()
        return {name: product.whole(self._team) for name, product in products.items()}

    def _products(self, layer: int, projection: Projection) -> Covariance:
        """Return the empty sum over a block's last projection's inputs."""
        block = "attn_block" if projection in self._anatomy.family.attention else "mlp_block"
        linear = without_lora(self._anatomy.projection(layer, projection))
        is_normed = self._anatomy.post_norm(layer, block) is not None
        weight_OI = weight_of(linear) if is_normed else None
        return Covariance(linear.in_features, self._anatomy.model.device, weight_OI)

    def _run(self, layer: int, batch: int) -> Tensor:
        hidden_BTD = self._batches_BTD[batch]
        kwargs = self._kwargs[len(hidden_BTD)][layer]
        modules = [cast(nn.Module, block.module) for block in self._blocks]
        with in_place_of(modules, [partial(block.forward, batch) for block in self._blocks]):
            return hidden_of(self._anatomy.layers[layer].forward(hidden_BTD, **kwargs))


def _add_input(products: Covariance, _: nn.Module, args: tuple[Any, ...]) -> None:
    products.add(args[0])

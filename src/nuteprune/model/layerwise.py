"""Runs calibration text through a model, one decoder layer at a time.

What is large, such as the covariance of a projection's inputs, is held for one layer at a time. A
layer may be changed before the text goes on to the next.

Shape suffixes: B batch, T tokens, M tokens of a batch, D hidden width, I inputs of a projection, O
its outputs, P columns of a panel.
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
from nuteprune.model.family import Projection
from nuteprune.model.forwards import giving, hidden_of, in_place_of, noting_calls
from nuteprune.model.hooks import MaskHooks, MaskSource
from nuteprune.model.weights import gathered, is_sharded, weight_of
from nuteprune.processes import ALONE, Team
from nuteprune.simulated import once

PANEL = 256
"""Columns of a product of inputs that are formed at once."""
LEAST = 1e-12
"""The least root mean square that a token's inputs are divided by."""
KEPT_BYTES = 2**30
"""Bytes of a projection's inputs that may be kept, so that a layer need not form them again."""

Read = Sequence[Tensor]
"""The inputs (B, T, D) of a module, batch by batch."""


class Covariance:
    """The sum of X^T X (I, I) over inputs X (..., I), in fp32; the lower triangle is computed.

    Args:
        size: how many inputs there are.
        device: where they are.
        weight_OI: where a norm follows the projection, its weight. The norm divides each token's
            output by its root mean square, so the token's inputs are divided too: else a few
            tokens of large outputs would drown all others.
    """

    def __init__(self, size: int, device: torch.device, weight_OI: Tensor | None = None) -> None:
        self._size, self._device, self._weight_OI = size, device, weight_OI
        self._sum_II: Tensor | None = None

    def add(self, inputs: Tensor) -> Tensor:
        """Take in a batch of inputs (..., I); return them (M, I) as they count."""
        rows_MI = inputs.reshape(-1, inputs.shape[-1]).float()
        if self._weight_OI is not None:
            output_MO = nn.functional.linear(inputs, self._weight_OI.to(inputs)).flatten(0, -2)
            size_M1 = output_MO.float().square().mean(-1, keepdim=True).sqrt()
            rows_MI = rows_MI / size_M1.clamp(min=LEAST)
        size = self._size
        if self._sum_II is None:
            self._sum_II = rows_MI.new_zeros(size, size)
        sum_II = self._sum_II

        def multiply() -> None:
            for start in range(0, size, PANEL):
                panel_MP = rows_MI[:, start : start + PANEL]
                sum_II[start:, start : start + PANEL].addmm_(rows_MI[:, start:].T, panel_MP)

        once(multiply, rows_MI, *rows_MI.shape)
        return rows_MI

    def whole(self, team: Team) -> Tensor:
        """Return both triangles of the sum over all processes."""
        sum_II = self._sum_II
        if sum_II is None:  # no batch is this process's
            sum_II = torch.zeros(self._size, self._size, device=self._device)
        team.add_up([sum_II])

        def mirror() -> None:
            for start in range(0, len(sum_II), PANEL):
                below = slice(start + PANEL, None)
                panel = slice(start, start + PANEL)
                sum_II[panel, below] = sum_II[below, panel].T

        once(mirror, sum_II, len(sum_II))
        return sum_II


def product(values_MD: Tensor, inputs_MI: Tensor, length: int) -> Tensor:
    """Return values^T inputs (D, I) of a batch, in fp32.

    Of inputs in bf16 it is computed in bf16, twice as fast. That rounds an entry by 0.4 %, which a
    covariance of few tokens would not stand: it may then have no inverse. Each sequence is rounded
    by itself, so that the sum does not depend on how many there are to a batch.

    Args:
        values_MD: one side.
        inputs_MI: the other.
        length: tokens of a sequence.
    """
    if inputs_MI.dtype != torch.bfloat16:
        return values_MD.float().T @ inputs_MI.float()
    sum_DI = torch.zeros(values_MD.shape[1], inputs_MI.shape[1], device=inputs_MI.device)
    pairs = zip(values_MD.bfloat16().split(length), inputs_MI.split(length), strict=True)
    for values_TD, inputs_TI in pairs:
        sum_DI += values_TD.T @ inputs_TI
    return sum_DI


class _Stop(Exception):
    """Raised to end a forward pass early."""


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
        self._blocks: list[_Block] = []  # all of them modules
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
            raise _Stop

    def _until_stopped(self, run: Any, *args: Any, **kwargs: Any) -> None:
        with suppress(_Stop), self._hooks.using(self._masks):
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
            block = _Block(around, module, self._products(layer, projection), most, other)
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
                missing_DI = torch.zeros(shape, device=self._anatomy.model.device)
            self._team.add_up([missing_DI])
        return block.products.whole(self._team), missing_DI

    @torch.no_grad()
    def calls(self, layer: int, module: nn.Module) -> list[tuple[Any, ...]]:
        """Return the arguments that a layer's module is called with, for each batch."""
        found: list[tuple[Any, ...]] = []

        def note(_: nn.Module, args: tuple[Any, ...]) -> None:
            found.append(args)
            raise _Stop

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


class _Block:
    """A block of a layer, which can go on from what its last projection reads of each batch.

    Args:
        module: the block, None if it is no module of its own: then nothing is kept.
        projection: its last one. Nor is anything kept if the block changes that projection's
            output, such as by a factor.
        products: sums up what that reads.
        most: bytes of a batch's inputs that are kept; larger inputs are not.
        other: another model's values for each batch, used in place of those given to `on_read`.
    """

    def __init__(
        self,
        module: nn.Module | None,
        projection: nn.Module,
        products: Covariance,
        most: int,
        other: Read,
    ) -> None:
        self.module, self._projection, self._most = module, projection, most
        self.products = products
        self.missing_DI: Tensor | None = None
        self.inputs: list[Tensor] = []
        self._other, self._lack_MD, self._length = iter(other), torch.empty(0), 0
        self._written: Any = None
        self._output: Any = None

    def on_read(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        """Record the next batch's input of the block; runs before `on_input`."""
        self._length = args[0].shape[-2]
        self._lack_MD = (next(self._other).float() - args[0].float()).flatten(0, -2)

    def on_input(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        """Record the next batch's input of the projection; end the pass if that is all."""
        rows_MI = self.products.add(args[0])
        if len(self._lack_MD):
            found_DI = product(self._lack_MD, rows_MI.to(args[0].dtype), self._length)
            self.missing_DI = found_DI if self.missing_DI is None else self.missing_DI + found_DI
        keeps = self.module is not None and args[0].nbytes <= self._most
        if keeps:
            self.inputs.append(args[0])
        if not keeps or self._output is not None:
            raise _Stop

    def on_written(self, _: nn.Module, __: Any, output: Any) -> None:
        """Note what the projection gives."""
        self._written = output

    def on_output(self, _: nn.Module, __: Any, output: Any) -> None:
        """Record whether the block returns its projection's output as it is."""
        if hidden_of(output) is not self._written:
            self.module = None
            self.inputs.clear()
        self._written, self._output = None, output
        raise _Stop

    def forward(self, batch: int, *_: Any, **__: Any) -> Any:
        """Compute the block's output from the kept inputs of a batch."""
        written = self._projection(self.inputs[batch])
        return (written, *self._output[1:]) if isinstance(self._output, tuple) else written


def _add_input(products: Covariance, _: nn.Module, args: tuple[Any, ...]) -> None:
    products.add(args[0])

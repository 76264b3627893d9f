"""Statistics of a dense model's activations: projection inputs and the residual stream.

Shape suffixes: D hidden width, M tokens, I inputs of a projection, O its outputs, N units of one
kind in the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nuteprune.gates.scores import Probe, Scores
from nuteprune.gates.surgeon import INPUTS
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.family import BLOCK_KINDS
from nuteprune.model.forwards import hidden_of
from nuteprune.model.weights import weight_of
from nuteprune.processes import Team
from nuteprune.simulated import scored


class Watched:
    """The last projection of a block, and running sums of its inputs X (rows, I), in fp64 on CPUs.

    Args:
        block: `attn_block` or `mlp_block`.
        linear: the projection.
    """

    def __init__(self, block: str, linear: nn.Linear) -> None:
        self.block, self._linear = block, linear
        self._count = torch.zeros((), dtype=torch.float64)
        self._sum_I = torch.zeros(linear.in_features, dtype=torch.float64)
        self._square_I = torch.zeros_like(self._sum_I)

    def add(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        """Take in more rows, as a hook of the projection."""
        rows = _rows(args[0])
        self._count += len(rows)
        self._sum_I += scored(rows.sum(0)).double()
        self._square_I += scored(rows.square().sum(0)).double()

    def add_up(self, team: Team) -> None:
        """Add the rows that other processes took in."""
        team.add_up((self._count, self._sum_I, self._square_I))

    def weight(self) -> Tensor:
        """Return its weight (O, I) in fp32, unpacked at each call; the model's stays packed."""
        return weight_of(self._linear).float()

    @property
    def norm(self) -> Tensor:
        """L2 norm (I,) of each input over all rows, in fp32."""
        return self._square_I.sqrt().float()

    @property
    def variance(self) -> Tensor:
        """Variance (I,) of each input over all rows, in fp32."""
        count = self._count.clamp(min=1)
        mean_I = self._sum_I / count
        return (self._square_I / count - mean_I.square()).clamp(min=0).float()


def means_of_inputs(probe: Probe, metric: Callable[[Watched], Tensor]) -> Scores:
    """Return means (N,) over the inputs of the output or down projection that each unit feeds.

    Args:
        probe: the model and the text.
        metric: from a projection that has read the text to a value (I,) of each input.
    """
    anatomy, watched = probe.anatomy, list[Watched]()
    with ExitStack() as stack:
        for layer in range(len(anatomy.layers)):
            for block, projection in anatomy.ends(layer).items():
                if (linear := anatomy.linear(layer, projection)) is not None:
                    watched.append(Watched(block, linear))
                    stack.enter_context(linear.register_forward_pre_hook(watched[-1].add))
        probe.read()
    values: dict[str, list[Tensor]] = {block: [] for block in BLOCK_KINDS}
    for end in watched:
        end.add_up(probe.team)
        values[end.block].append(metric(end))
    found = {}
    for kind in probe.kinds:
        there = [count for count in probe.layout.sizes[kind] if count]  # some may be gone already
        pairs = zip(values[INPUTS[kind]], there, strict=True)
        found[kind] = torch.cat([values_I.view(count, -1).mean(1) for values_I, count in pairs])
    return found


AddStream = Callable[[int, Tensor, Tensor, Tensor], None]
"""Takes in (layer, stream before it, between attention and MLP, after it), each (M, D)."""


@contextmanager
def watching_streams(anatomy: Anatomy, add: AddStream) -> Iterator[None]:
    """Pass on the residual stream before, within and after each layer as the model reads text.

    A layer adds scale x (attention + MLP) to the stream, whatever the family; the scale (1 in
    most) is read off the stream itself, and what attention adds alone gives the stream in between.
    Where mixers are, each part may have a scale of its own, and the MLP's norm reads the stream.
    """
    with ExitStack() as stack:
        for i, layer in enumerate(anatomy.layers):
            for handle in _watch_layer(anatomy, i, layer, add):
                stack.enter_context(handle)
        yield


def _watch_layer(anatomy: Anatomy, index: int, layer: nn.Module, add: AddStream) -> list[Any]:
    seen: dict[str, Tensor] = {}

    def on_entry(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen["before"] = _rows(args[0])

    def on_write(block: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _, __, output: seen.__setitem__(block, _rows(hidden_of(output)))

    def on_middle(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen["between"] = _rows(args[0])

    def on_exit(_: nn.Module, __: Any, output: Any) -> None:
        before_MD = seen.pop("before")
        after_MD = _rows(hidden_of(output))
        if anatomy.family.mixer:
            add(index, before_MD, seen.pop("between", after_MD), after_MD)
            return
        nothing_MD = torch.zeros_like(before_MD)
        attention_MD = seen.pop("attn_block", nothing_MD)
        written_MD = attention_MD + seen.pop("mlp_block", nothing_MD)
        size = written_MD.square().sum().clamp(min=1e-30)
        scale = ((after_MD - before_MD) * written_MD).sum() / size
        add(index, before_MD, before_MD + scale * attention_MD, after_MD)

    handles = [layer.register_forward_pre_hook(on_entry), layer.register_forward_hook(on_exit)]
    if anatomy.family.mixer:
        if (norm := anatomy.pre_norm(index, "mlp_block")) is not None:
            handles.append(norm.register_forward_pre_hook(on_middle))
        return handles
    for block, writer in anatomy.writers(index):
        module = anatomy.post_norm(index, block) or writer
        handles.append(module.register_forward_hook(on_write(block)))
    return handles


def _rows(x: Tensor) -> Tensor:
    return x.detach().reshape(-1, x.shape[-1]).float()

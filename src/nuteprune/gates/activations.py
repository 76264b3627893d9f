"""Statistics of a dense model's activations: projection inputs and the residual stream.

Shape suffixes: B batch, T tokens, D hidden width, M = B x T, I inputs of a projection, O its
outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nuteprune.model.anatomy import Anatomy
from nuteprune.model.packed import weight_of
from nuteprune.processes import Team
from nuteprune.simulated import scored


class Moments:
    """Running sums of a projection's inputs X (rows, I), in fp64 on the CPU."""

    def __init__(self, size: int) -> None:
        self.count = torch.zeros((), dtype=torch.float64)
        self.sum_I = torch.zeros(size, dtype=torch.float64)
        self.square_I = torch.zeros(size, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Take in more rows."""
        self.count += len(rows)
        self.sum_I += scored(rows.sum(0)).double()
        self.square_I += scored(rows.square().sum(0)).double()

    def add_up(self, team: Team) -> None:
        """Add the rows that other processes took in."""
        team.add_up((self.count, self.sum_I, self.square_I))

    @property
    def norm(self) -> Tensor:
        """L2 norm (I,) of each input over all rows, in fp32."""
        return self.square_I.sqrt().float()

    @property
    def variance(self) -> Tensor:
        """Variance (I,) of each input over all rows, in fp32."""
        count = self.count.clamp(min=1)
        mean_I = self.sum_I / count
        return (self.square_I / count - mean_I.square()).clamp(min=0).float()


@dataclass(frozen=True)
class Watched:
    """An output (`heads`) or down (`neurons`) projection, and the moments of its inputs."""

    units: str
    linear: nn.Linear
    moments: Moments

    def weight(self) -> Tensor:
        """Return its weight (O, I) in fp32, unpacked at each call; the model's stays packed."""
        return weight_of(self.linear).float()


@contextmanager
def watching_inputs(anatomy: Anatomy) -> Iterator[list[Watched]]:
    """Gather moments of what every output and down projection reads, layer after layer.

    Yields:
        The projections; their moments are complete when the model has read the text.
    """
    watched = []
    with ExitStack() as stack:
        for layer in range(len(anatomy.layers)):
            last = {"heads": anatomy.family.attention[-1], "neurons": anatomy.down(layer)}
            for units, projection in last.items():
                linear = anatomy.linear(layer, projection)
                if linear is None:
                    continue
                watch = Watched(units, linear, Moments(linear.in_features))
                watched.append(watch)
                stack.enter_context(linear.register_forward_pre_hook(_adding(watch.moments)))
        yield watched


def _adding(moments: Moments) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        moments.add(_rows(args[0]))

    return hook


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
        return lambda _, __, output: seen.__setitem__(block, _rows(_first(output)))

    def on_middle(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen["between"] = _rows(args[0])

    def on_exit(_: nn.Module, __: Any, output: Any) -> None:
        before_MD = seen.pop("before")
        after_MD = _rows(_first(output))
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


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _rows(x: Tensor) -> Tensor:
    return x.detach().reshape(-1, x.shape[-1]).float()

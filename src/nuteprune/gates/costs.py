"""Prices of a model's parts: in parameters, in bytes of file and KV cache, or in seconds.

Each part of a model has a *line*: coefficient x width + constant. The allocator minimises the loss
under a limit on their sum, whatever the unit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from nuteprune.errors import UserError
from nuteprune.gates.budget import Budget
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.shape import LayerShape, Shape
from nuteprune.model.weights import count

SCHEMA = 1
"""Of a table of seconds."""
MEASURE = "nuteprune bench MODEL --save-costs FILE"
"""How one is made."""
PHASES = ("prefill", "decode")
"""What it tells apart: a prompt, and one token after it."""

Line = tuple[float, float]
"""(coefficient of the hidden width, constant)."""


@dataclass(frozen=True)
class Uncounted:
    """Parameters that sparsity does not count.

    Args:
        attention: of each layer, those that go with its attention block.
        mlp: of each layer, those that go with its MLP.
        rest: embedding, head, final norm and whatever else stays.
        expert: of each layer, those of its router that go with an expert.
        head: of each layer, how many go with a query head.
    """

    attention: tuple[Line, ...]
    mlp: tuple[Line, ...]
    rest: Line
    expert: tuple[Line, ...]
    head: tuple[int, ...]

    @classmethod
    def of(cls, anatomy: Anatomy) -> Uncounted:
        """Count a live model's, tied ones once."""
        family, width = anatomy.family, anatomy.shape.hidden
        norms = {f"{path}.weight" for path in family.norms}
        blocks = {
            "attention": (*family.attention_modules, *family.attention_norms),
            "mlp": (*family.mlp_modules, *family.mlp_norms),
        }
        inside = tuple(f"{projection.path}." for projection in family.projections)
        experts = family.experts
        if experts is not None:
            blocks["expert"] = (experts.router,)
            inside += tuple(projection.path for projection in experts.projections)
        shapes = anatomy.shape.layers
        found: dict[str, list[Line]] = {x: [(0, 0)] * len(shapes) for x in (*blocks, "expert")}
        rest: Line = (0, 0)
        heads = [0] * len(shapes)
        across = {f"{path}.weight" for path in (family.embedding, family.final_norm)}
        for name, parameter in anatomy.model.named_parameters():
            layer, path = _place(name, family.layers)
            block = [b for b, paths in blocks.items() if _within(path, paths)]
            of_router = block[-1:] == ["expert"]
            wide = name in across or parameter is anatomy.head.weight or path in norms
            wide |= of_router and parameter.dim() == 2
            wide |= experts is not None and path == f"{experts.shared_gate}.weight"
            line = (count(parameter) // width, 0) if wide else (0, count(parameter))
            if layer is None or not (block or path.startswith(inside)):
                rest = _sum(rest, line)
            elif path in family.per_head:
                heads[layer] += count(parameter) // shapes[layer].heads
            elif of_router:
                each = (line[0] // shapes[layer].experts, line[1] // shapes[layer].experts)
                found["expert"][layer] = _sum(found["expert"][layer], each)
            elif not path.startswith(inside):
                found[block[0]][layer] = _sum(found[block[0]][layer], line)
        lines = {kind: tuple(each) for kind, each in found.items()}
        return cls(rest=rest, head=tuple(heads), **lines)


def _place(name: str, layers: str) -> tuple[int | None, str]:
    """Return a parameter's layer and its path in it, (None, its name) if it is in none."""
    if not name.startswith(f"{layers}."):
        return None, name
    index, path = name.removeprefix(f"{layers}.").split(".", 1)
    return int(index), path


def _within(path: str, modules: tuple[str, ...]) -> bool:
    return any(path.startswith(f"{module}.") for module in modules)


def _sum(a: Line, b: Line, times: int = 1) -> Line:
    return a[0] + times * b[0], a[1] + times * b[1]


class Priced(Protocol):
    """Prices of a model's parts, in any unit: see `Cost` and `Seconds`."""

    budget: Budget

    @property
    def by_units(self) -> bool:
        """Whether equal parts cost the same whichever layer they are of."""

    def attention(self, index: int, kept: LayerShape) -> Line:
        """Return the price of a layer's remaining attention."""

    def mlp(self, index: int, kept: LayerShape) -> Line:
        """Return the price of a layer's remaining MLP."""

    def rest(self, width: int) -> float:
        """Return the price of all outside of blocks, at a width."""

    def total(self, shape: Shape) -> float:
        """Return the price of a model of a shape."""
        lines = (f(i, x) for i, x in enumerate(shape.layers) for f in (self.attention, self.mlp))
        return self.rest(shape.hidden) + sum(a * shape.hidden + b for a, b in lines)


@dataclass(frozen=True)
class Cost(Priced):
    """Prices of a model's parts, in one unit.

    Args:
        budget: counts the parameters of projections.
        outside: the other parameters; None where they cost nothing.
        each: price of a parameter.
        kv_head: of each layer, the price of a KV head beside its parameters; empty: none.
        fixed: the price of what always stays.
        active: whether only experts that a token goes through have a price.
    """

    budget: Budget
    outside: Uncounted | None = None
    each: int = 1
    kv_head: tuple[int, ...] = ()
    fixed: int = 0
    active: bool = False

    @property
    def by_units(self) -> bool:
        """Whether equal parts cost the same whichever layer they are of."""
        return not (self.kv_head or any(x.experts for x in self.budget.shape.layers))

    def attention(self, index: int, kept: LayerShape) -> Line:
        """Return the price of a layer's remaining attention."""
        line: Line = self.budget.attention(kept)
        if self.outside and kept.mixes:
            line = _sum(line, self.outside.attention[index])
            line = _sum(line, (0, self.outside.head[index]), kept.heads)
        cached = self.kv_head[index] * kept.kv_heads if self.kv_head else 0
        return float(self.each * line[0]), float(self.each * line[1] + cached)

    def mlp(self, index: int, kept: LayerShape) -> Line:
        """Return the price of a layer's remaining MLP."""
        counted = self.budget.of_a_token(kept) if self.active else kept
        line: Line = self.budget.mlp(counted)
        if self.outside and kept.mlp:
            line = _sum(line, self.outside.mlp[index])
            line = _sum(line, self.outside.expert[index], kept.experts)
        return float(self.each * line[0]), float(self.each * line[1])

    def rest(self, width: int) -> float:
        """Return the price of all outside of blocks, at a width."""
        if self.outside is None:
            return self.fixed
        coefficient, constant = self.outside.rest
        return self.each * (coefficient * width + constant) + self.fixed


@dataclass(frozen=True)
class Seconds(Priced):
    """Seconds that a model takes, block by block; counts between measured ones are interpolated.

    Args:
        budget: of the model, whose width stays.
        attention_s: query heads per KV head -> KV heads -> seconds of an attention block.
        mlp_s: neurons -> seconds of an MLP.
        rest_s: seconds of all else.
    """

    budget: Budget
    attention_s: Mapping[int, Mapping[int, float]]
    mlp_s: Mapping[int, float]
    rest_s: float
    by_units = False

    def attention(self, index: int, kept: LayerShape) -> Line:
        """Return the seconds of a layer's remaining attention."""
        if not kept.attention:
            return 0, 0
        rows = {each: _at(row, kept.kv_heads) for each, row in self.attention_s.items()}
        return 0, _at(rows, kept.heads_per_group)

    def mlp(self, index: int, kept: LayerShape) -> Line:
        """Return the seconds of a layer's remaining MLP."""
        return 0, _at(self.mlp_s, kept.neurons) if kept.mlp else 0

    def rest(self, width: int) -> float:
        """Return the seconds of all outside of blocks."""
        return self.rest_s


def _at(points: Mapping[int, float], count: int) -> float:
    """Return the seconds of a count: no more than a larger one took, which is noise of timing."""
    known = sorted(points)
    least = np.minimum.accumulate([points[x] for x in reversed(known)])[::-1]
    return float(np.interp(count, known, least))


def seconds_of(table: Mapping[str, Any], budget: Budget, phase: str) -> Seconds:
    """Return the costs in a table, of one phase or, as `both`, of both.

    Args:
        table: content of a table; docs/speed.md has the format.
        budget: that of the model to cut.
        phase: `prefill`, `decode` or `both`.

    Raises:
        UserError: if it is no table, or one of another model.
    """
    try:
        check_model(table, budget)
        each = {"prefill": 1, "decode": int(table["new_tokens"])}
        weights = {k: n for k, n in each.items() if phase in (k, "both")}

        def seconds_in(row: Mapping[str, Any]) -> float:
            return float(sum(float(row[k]) * n for k, n in weights.items()))

        attention: dict[int, dict[int, float]] = {}
        for row in table["attention"]:
            per_group = int(row["heads"]) // int(row["kv_heads"])
            attention.setdefault(per_group, {})[int(row["kv_heads"])] = seconds_in(row)
        mlp = {int(row["neurons"]): seconds_in(row) for row in table["mlp"]}
        found = Seconds(budget, attention, mlp, seconds_in(table["rest"]))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"the table of costs cannot be read ({type(error).__name__}: {error}): run {MEASURE}"
        ) from error
    _check_reach(found, budget)
    return found


def check_model(table: Mapping[str, Any], budget: Budget) -> None:
    """Refuse a table that was measured on blocks of another kind.

    Raises:
        UserError: naming what differs.
    """
    here = {
        "schema": SCHEMA,
        "model_type": budget.family.model_type,
        "hidden": budget.shape.hidden,
        "head_dim": budget.head_dim,
        "layers": len(budget.shape.layers),
    }
    for name, value in here.items():
        if table[name] != value:
            raise UserError(f"the costs are of {name} {table[name]}, not {value}: run {MEASURE}")


def _check_reach(found: Seconds, budget: Budget) -> None:
    for layer in budget.shape.layers:
        rows = [max(row, default=0) for row in found.attention_s.values()]
        if layer.neurons > max(found.mlp_s, default=0) or layer.kv_heads > min(rows, default=0):
            raise UserError(
                f"the table of costs says nothing of {layer.kv_heads} KV heads and "
                f"{layer.neurons} neurons, which the model has: run {MEASURE}"
            )


@dataclass(frozen=True)
class Goal:
    """The most that a model may cost.

    Args:
        cost: the prices.
        limit: the most, in their unit.
        name: the goal in an error's words.
        reach: from the least cost that gates can reach to an error's words for it.
        instead: what to do where gates cannot reach the limit.
    """

    cost: Priced
    limit: float
    name: str
    reach: Callable[[float], str]
    instead: str

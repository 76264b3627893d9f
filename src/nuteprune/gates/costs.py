"""Prices of a model's parts: in parameters, or in bytes of the file and of the KV cache.

Each part of a model has a *line*: coefficient x width + constant. The allocator minimises the loss
under a limit on their sum, whatever the unit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from nuteprune.gates.budget import Budget
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.packed import count
from nuteprune.model.shape import LayerShape, Shape

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
        attention, mlp, expert = (tuple(found[x]) for x in ("attention", "mlp", "expert"))
        return cls(attention, mlp, rest, expert, tuple(heads))


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


class Priced(ABC):
    """Prices of a model's parts, in any unit: see `Cost` and `gates.speed_costs`."""

    budget: Budget

    @property
    @abstractmethod
    def by_units(self) -> bool:
        """Whether equal parts cost the same whichever layer they are of."""

    @abstractmethod
    def attention(self, index: int, kept: LayerShape) -> Line:
        """Return the price of a layer's remaining attention."""

    @abstractmethod
    def mlp(self, index: int, kept: LayerShape) -> Line:
        """Return the price of a layer's remaining MLP."""

    @abstractmethod
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

"""What blocks cost in seconds, from a table that was measured on some machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nuteprune.errors import UserError
from nuteprune.gates.budget import Budget
from nuteprune.gates.costs import Line, Priced
from nuteprune.model.shape import LayerShape

SCHEMA = 1
PHASES = ("prefill", "decode")
"""What a table tells apart: a prompt, and one token after it."""


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
            f"the table of costs cannot be read ({type(error).__name__}: {error}); nuteprune bench "
            "MODEL --save-costs FILE writes one"
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
            raise UserError(
                f"the table of costs is of {name} {table[name]}, not {value}: measure this model "
                "with nuteprune bench MODEL --save-costs FILE"
            )


def _check_reach(found: Seconds, budget: Budget) -> None:
    for layer in budget.shape.layers:
        rows = [max(row, default=0) for row in found.attention_s.values()]
        if layer.neurons > max(found.mlp_s, default=0) or layer.kv_heads > min(rows, default=0):
            raise UserError(
                f"the table of costs says nothing of {layer.kv_heads} KV heads and "
                f"{layer.neurons} neurons, which the model has: measure it with nuteprune bench "
                "MODEL --save-costs FILE"
            )

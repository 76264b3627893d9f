"""Finds the axes of projections, by how their sizes follow each dimension."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from nuteprune.errors import UserError, in_one_line
from nuteprune.model.family import Projection
from nuteprune.model.small import SIZES, Passed, names_of, small_config, small_model

STEP = 16
"""How many neurons are added to a small model, to see which sizes grow with them."""


def base_config(config: PreTrainedConfig) -> tuple[PreTrainedConfig, bool]:
    """Return a small config that runs, and whether heads must make up its width.

    Raises:
        UserError: if none is found.
    """
    problems = []
    filling = SIZES["hidden"] // SIZES["heads"]
    for head_dim in (SIZES["head_dim"], None, filling):
        try:
            small = small_config(config, head_dim=head_dim)
            with torch.no_grad():
                small_model(small)(torch.arange(3, 10)[None], use_cache=False)
            return small, head_dim == filling
        except UserError as error:
            problems.append(str(error))
        except Exception as error:  # whatever a forward pass of sizes that do not fit raises
            problems.append(f"a small {config.model_type} does not compute: {in_one_line(error)}")
    raise UserError(problems[0])


class Axes:
    """Names the axes of projections, by what changes with each dimension of the config.

    Args:
        config: a config of the type.
        model: a small one of it.
        passed: what a forward pass of that showed.

    Raises:
        UserError: if layers differ, or a projection is none that an entry can state.
    """

    def __init__(self, config: PreTrainedConfig, model: PreTrainedModel, passed: Passed) -> None:
        self._config, self._passed = config, passed
        self._linears = _linears(model, passed)
        names = names_of(model.config.to_dict())
        if "heads" not in names:
            raise UserError(f"{config.model_type} states no number of attention heads")
        self._heads = getattr(model.config, names["heads"])
        self.hidden = passed.embedded.shape[-1]
        stated = getattr(model.config, "head_dim", None)
        self._neurons = self._changed("neurons", SIZES["neurons"] + STEP, stated)
        grouped = "kv_heads" in names
        self._keys = self._changed("kv_heads", SIZES["heads"], stated) if grouped else {}
        more = self._changed("heads", 2 * SIZES["heads"], stated)
        # Where more heads change nothing, they are narrower: together they are the width.
        self.head_dim_from_hidden = not any(columns for _, columns in more.values())
        own = None if self.head_dim_from_hidden else stated
        self.head_dim = own or self.hidden // self._heads

    def _changed(self, word: str, size: int, head_dim: int | None) -> dict[str, tuple[int, int]]:
        """Return by how much the rows and columns of each projection grow with a dimension."""
        try:
            model = small_model(small_config(self._config, head_dim=head_dim, **{word: size}))
            grown = _linears(model, self._passed)
        except UserError:
            return {}
        if grown.keys() != self._linears.keys():
            return {}
        return {
            path: (grown[path][0] - rows, grown[path][1] - columns)
            for path, (rows, columns) in self._linears.items()
        }

    def blocks(self) -> dict[str, tuple[Projection, ...]]:
        """Return the projections of attention and MLP, in the order in which they are called.

        Raises:
            UserError: if a layer has other blocks, or a projection is none that an entry can state.
        """
        groups: dict[str, list[str]] = {"attention": [], "mlp": []}
        for path in self._passed.called:
            is_mlp = any(self._neurons.get(path, (0, 0)))
            groups["mlp" if is_mlp else "attention"].append(path)
        unused = self._linears.keys() - set(self._passed.called)
        if unused or not all(len(group) > 1 for group in groups.values()):
            raise UserError(
                f"{self._config.model_type} has no layers of one attention and one MLP block "
                "whose projections are linear modules"
            )
        return {
            "attention": tuple(self._attention(groups["attention"])),
            "mlp": tuple(self._mlp(groups["mlp"])),
        }

    def _mlp(self, paths: list[str]) -> Iterator[Projection]:
        for path in paths:
            rows, columns = self._neurons[path]
            wide = self._linears[path]
            if columns == STEP and wide[0] == self.hidden:
                yield Projection(path, ("hidden",), "neurons")
            elif rows and rows % STEP == 0 and wide[1] == self.hidden:
                yield Projection(path, ("neurons",) * (rows // STEP), "hidden")
            else:
                raise UserError(f"{path} of {wide} is neither read nor written by one MLP width")

    def _attention(self, paths: list[str]) -> Iterator[Projection]:
        together = self._heads * self.head_dim
        kv_step = (SIZES["heads"] - SIZES["kv_heads"]) * self.head_dim
        for path in paths[:-1]:
            rows, columns = self._linears[path]
            keys = self._keys.get(path, (0, 0))[0] // kv_step
            queries, rest = divmod(rows - keys * SIZES["kv_heads"] * self.head_dim, together)
            if columns != self.hidden or rest:
                raise UserError(
                    f"{path} of {rows} x {columns} is not made of whole heads that read the "
                    "residual stream"
                )
            yield Projection(path, self._heads_of(path, queries, keys), "hidden")
        if self._linears[paths[-1]] != (self.hidden, together):
            raise UserError(f"{paths[-1]} does not write heads to the residual stream")
        yield Projection(paths[-1], ("hidden",), "q")

    def _heads_of(self, path: str, queries: int, keys: int) -> tuple[str, ...]:
        if keys or self._keys:
            known = {(1, 0): ("q",), (0, 1): ("kv",), (1, 2): ("q", "kv", "kv")}
            if (queries, keys) not in known:
                raise UserError(
                    f"{path} makes {queries} of all query heads and {keys} of all KV heads, which "
                    "no entry states"
                )
            return known[queries, keys]
        if queries == 3:
            return ("q", "kv", "kv")
        return ("q",) if re.search(r"q(uery)?(_|$)", path.rpartition(".")[2]) else ("kv",)


def _linears(model: PreTrainedModel, passed: Passed) -> dict[str, tuple[int, int]]:
    """Return path -> (rows, columns) of a layer's linear modules, checked to be alike in all."""
    found = []
    for layer in model.get_submodule(passed.layers).children():
        modules = dict(layer.named_modules())
        if conv := [path for path, x in modules.items() if isinstance(x, Conv1D)]:
            raise UserError(
                f"{model.config.model_type} keeps its weights transposed (Conv1D, in {conv[0]}), "
                "which no entry states"
            )
        linears = {path: x for path, x in modules.items() if isinstance(x, nn.Linear)}
        found.append({path: (x.out_features, x.in_features) for path, x in linears.items()})
    if any(x.keys() != found[0].keys() for x in found):
        raise UserError(
            f"{model.config.model_type} has layers of several kinds, which no entry states"
        )
    return found[0]

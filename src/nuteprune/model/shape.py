"""Dimensions of a decoder, layer by layer: plain numbers, no tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from nuteprune.errors import UserError

SUPER_BLOCK = 256
"""Weights of a row that llama.cpp's K-quants store together."""


@dataclass(frozen=True)
class LayerShape:
    """Counts of one decoder layer; 0 heads means no attention, 0 neurons and experts no MLP.

    `mixer` says whether something else mixes tokens, in place of attention or beside it: a
    recurrence or a convolution, which no gate cuts. With its attention it is one block.
    """

    heads: int
    kv_heads: int
    neurons: int
    experts: int = 0
    """Routed experts."""
    expert_neurons: int = 0
    """Neurons of each of them."""
    mixer: bool = False

    @property
    def attention(self) -> bool:
        """Whether the layer still has attention heads."""
        return self.heads > 0

    @property
    def mixes(self) -> bool:
        """Whether the layer still has its attention block: heads, a mixer, or both."""
        return self.attention or self.mixer

    @property
    def mlp(self) -> bool:
        """Whether the layer still has its MLP block."""
        return self.neurons > 0 or self.experts > 0

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads if self.kv_heads else 0

    def to_dict(self) -> dict[str, int]:
        """Return the counts by name; those of experts and `mixer` only where there are any.

        A block that is gone or never existed is named too, as false.
        """
        names = (*COUNTS, "mixer")
        counts = {k: v for k in names if (v := getattr(self, k)) or k in DENSE_COUNTS}
        there = zip(BLOCKS, (self.mixes, self.mlp), strict=True)
        return {**counts, **{block: False for block, whole in there if not whole}}


@dataclass(frozen=True)
class Shape:
    """Residual width and the counts of every layer."""

    hidden: int
    layers: tuple[LayerShape, ...]

    @property
    def uniform(self) -> bool:
        """Whether all layers of a kind have the same counts: with heads, with experts, without."""
        heads = {(x.heads, x.kv_heads) for x in self.layers if x.attention or not x.mixer}
        dense = {x.neurons for x in self.layers if not x.experts}
        mixtures = {(x.neurons, x.experts, x.expert_neurons) for x in self.layers if x.experts}
        whole = {x.mlp for x in self.layers}
        return all(len(x) <= 1 for x in (heads, whole, dense, mixtures))

    @property
    def first_attention(self) -> int:
        """The first layer with attention heads: it makes the attention sink, and is cut last.

        Generation counts cached tokens there.
        """
        return next((i for i, x in enumerate(self.layers) if x.attention), 0)

    def to_dict(self) -> dict[str, Any]:
        """Return a plain structure for JSON and YAML (the format that `--shape FILE` reads)."""
        return {"hidden": self.hidden, "layers": [x.to_dict() for x in self.layers]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Rebuild a shape from `to_dict`'s structure."""
        rows = ({k: x for k, x in row.items() if k not in BLOCKS} for row in data["layers"])
        return cls(data["hidden"], tuple(LayerShape(**row) for row in rows))

    def cut_to(self, wanted: Mapping[str, Any]) -> Shape:
        """Return the shape that a user asks for, checked to be a part of this one.

        Args:
            wanted: what to keep: `hidden`, and `layers`, one mapping per layer with `heads`,
                `kv_heads`, `neurons`, or `attention` or `mlp` as false; counts beside `layers`
                hold for every layer that has any of it; what is not named stays. A checkpoint's
                record serves too.

        Raises:
            UserError: for keys or counts that do not fit this model.
        """
        rows = wanted.get("layers", [{}] * len(self.layers))
        if not isinstance(rows, Sequence) or len(rows) != len(self.layers):
            count = len(rows) if isinstance(rows, Sequence) else 0
            raise UserError(f"the shape names {count} layers; the model has {len(self.layers)}")
        common = {key: wanted[key] for key in COUNTS if key in wanted}
        for key, count in common.items():
            _check_count(key, count, max(getattr(x, key) for x in self.layers), 0)
        known = {*COUNTS, "hidden", "layers"}
        if "schema" not in wanted and (unknown := set(wanted) - known):
            raise UserError(
                f"the shape has an unknown key {min(unknown)!r}; known: {', '.join(sorted(known))}"
            )
        hidden = wanted.get("hidden", self.hidden)
        if isinstance(hidden, Mapping):  # a record holds before and after
            hidden = hidden.get("after")
        _check_count("hidden", hidden, self.hidden, 1)
        layers = [
            _cut_layer(i, whole, row, common, i == self.first_attention)
            for i, (whole, row) in enumerate(zip(self.layers, rows, strict=True))
        ]
        return Shape(hidden, tuple(layers))


DENSE_COUNTS = ("heads", "kv_heads", "neurons")
COUNTS = (*DENSE_COUNTS, "experts", "expert_neurons")
MLP_COUNTS = COUNTS[2:]
BLOCKS = ("attention", "mlp")
"""Keys that a layer's row has as false where that block was removed."""
SAID = {x: x for x in COUNTS} | {"kv_heads": "KV heads", "expert_neurons": "neurons of each expert"}
"""A layer's counts, as people are told them."""


def _check_count(what: str, count: Any, most: int, least: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or not least <= count <= most:
        raise UserError(f"{what} is {count!r}; it must be a whole number from {least} to {most}")


def _counts_asked(
    index: int, whole: LayerShape, row: Any, common: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the counts that a user asks for in a layer, checked to be at most its own."""
    if not isinstance(row, Mapping):
        raise UserError(f"layer {index} of the shape is {row!r}; it must map names to counts")
    if unknown := set(row) - {*COUNTS, *BLOCKS, "mixer"}:
        raise UserError(
            f"layer {index} of the shape has an unknown key {min(unknown)!r}; known: "
            f"{', '.join((*COUNTS, *BLOCKS))}"
        )
    if row.get("mixer") is False and whole.mixer and row.get("attention") is not False:
        raise UserError(
            f"layer {index} has mixer: false; a mixer goes with its attention block alone: pass "
            "attention: false"
        )
    # Layers may be of several kinds: a count for all is of those that have any of it.
    given = {**{key: x for key, x in common.items() if getattr(whole, key)}, **row}
    for block, names in zip(BLOCKS, (("heads", "kv_heads"), MLP_COUNTS), strict=True):
        if row.get(block) is False:
            if contrary := [name for name in names if row.get(name)]:
                raise UserError(f"layer {index} has {contrary[0]} and {block}: false; pass one")
            given |= dict.fromkeys(names, 0)
    for name in COUNTS:
        if name in given:
            _check_count(f"layer {index}: {name}", given[name], getattr(whole, name), 0)
    return given


def _cut_layer(
    index: int, whole: LayerShape, row: Any, common: Mapping[str, Any], first: bool
) -> LayerShape:
    """Return a layer as it is asked for, checked to be one that can be had."""
    given = _counts_asked(index, whole, row, common)
    # One of the two head counts is enough: the other follows from the heads per group.
    per_group = whole.heads_per_group or 1
    heads = given.get("heads", whole.heads)
    follows = heads < whole.heads and heads % per_group == 0
    kv_heads = given.get("kv_heads", heads // per_group if follows else whole.kv_heads)
    heads = given.get("heads", kv_heads * per_group)
    # What mixes tokens is one block: without its heads, a layer that had some has no mixer either.
    mixer = whole.mixer and row.get("attention") is not False and bool(heads or not whole.heads)
    mlp = {name: given.get(name, getattr(whole, name)) for name in MLP_COUNTS}
    layer = LayerShape(heads, kv_heads, **mlp, mixer=mixer)
    if bool(layer.experts) != bool(layer.expert_neurons):
        raise UserError(
            f"layer {index} has {layer.experts} experts of {layer.expert_neurons} neurons; to "
            "remove all of them, pass mlp: false"
        )
    rest = [name for name in ("neurons", "experts") if getattr(whole, name)]
    gone = [name for name in rest if not getattr(layer, name)]
    if layer.mlp and gone:
        raise UserError(
            f"layer {index} has {gone[0]}: 0, and no gate removes them alone; to remove its whole "
            "MLP, pass mlp: false"
        )
    if bool(layer.heads) != bool(layer.kv_heads) or (kv_heads and heads % kv_heads):
        raise UserError(f"layer {index}: {heads} heads cannot share {kv_heads} KV heads evenly")
    if layer.heads_per_group > per_group:
        raise UserError(
            f"layer {index}: {heads} heads on {kv_heads} KV heads are more for each than the "
            f"model's {per_group}"
        )
    if first and whole.attention and not layer.attention:
        raise UserError(f"layer {index} must keep an attention block: give it at least one head")
    return layer


def kinds_of_cut(whole: Shape, kept: Shape) -> tuple[str, ...]:
    """Return the kinds of gates that can cut one shape to another."""
    pairs = list(zip(whole.layers, kept.layers, strict=True))
    alive = [(a, b) for a, b in pairs if b.attention]
    found = {
        "heads": any(b.heads_per_group < a.heads_per_group for a, b in alive),
        "kv_groups": any(b.kv_heads < a.kv_heads for a, b in alive),
        "neurons": any(0 < b.neurons < a.neurons for a, b in pairs),
        "experts": any(0 < b.experts < a.experts for a, b in pairs),
        "expert_neurons": any(0 < b.expert_neurons < a.expert_neurons for a, b in pairs),
        "hidden": kept.hidden < whole.hidden,
        "attn_block": any(a.mixes and not b.mixes for a, b in pairs),
        "mlp_block": any(a.mlp and not b.mlp for a, b in pairs),
    }
    return tuple(kind for kind, wanted in found.items() if wanted)


PER_HEAD = {"q": 1, "qgate": 2, "qkv": 3}
"""Axis of query heads -> how many times head_dim each has there."""


def axis_sizes(layer: LayerShape, head_dim: int) -> dict[str, int]:
    """Return the features of each axis of a layer (`families` names them), `hidden` excepted."""
    return {
        **{axis: many * (layer.heads * head_dim) for axis, many in PER_HEAD.items()},
        "kv": layer.kv_heads * head_dim,
        "neurons": layer.neurons,
        "expert_neurons": layer.expert_neurons,
    }

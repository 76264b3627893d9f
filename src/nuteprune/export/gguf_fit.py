"""Whether llama.cpp can express a model: the architecture to write it as, or the reason why not.

A family names the architectures that compute what it does (`Family.gguf`); the first without a
reason against it is taken. What would be taken and computed wrong is refused or mended here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

from nuteprune.errors import UserError
from nuteprune.export.gguf_archs import ARCHS, BLOCK, SUPER_BLOCK, Arch, Experts
from nuteprune.model.family import Family
from nuteprune.model.shape import LayerShape, Shape

_SLIDING, _FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Source:
    """What a fit is judged by.

    Args:
        family: the checkpoint's family.
        config: its config.
        shape: its dimensions.
        biases: projection path -> whether it has a bias, where that is known.
    """

    family: Family
    config: Any
    shape: Shape
    biases: Mapping[str, bool]

    @property
    def head_dim(self) -> int:
        """Features per head."""
        config = self.config
        own = getattr(config, "head_dim", None)
        return int(own or config.hidden_size // config.num_attention_heads)

    @property
    def tied(self) -> bool:
        """Whether the language head is the embedding matrix."""
        return bool(self.config.tie_word_embeddings)

    @property
    def rope(self) -> dict[str, Any]:
        """Rotary parameters; of full attention, where kinds of attention have their own."""
        rope = dict(getattr(self.config, "rope_parameters", None) or {})
        return dict(rope.get(_FULL, rope))

    @property
    def rotary_dimensions(self) -> int:
        """Features per head that are rotated."""
        return int(self.head_dim * self.rope.get("partial_rotary_factor", 1.0))

    @property
    def window(self) -> int | None:
        """Tokens that some layer looks back, itself included; None if all see everything."""
        window = getattr(self.config, "sliding_window", None)
        kinds = getattr(self.config, "layer_types", None)
        return window if window and (kinds is None or _SLIDING in kinds) else None

    @property
    def biased(self) -> frozenset[str]:
        """Which parts have biases, in `Arch.biases`' words."""
        family = self.family
        parts = {"qkv": family.attention[:-1], "o": family.attention[-1:], "mlp": family.mlp}
        return frozenset(
            part for part, paths in parts.items() if any(self.biases.get(p.path) for p in paths)
        )


def choose(source: Source) -> Arch:
    """Return the architecture that a model is written as.

    Raises:
        UserError: if none can express it: which shape or property, and what would make it fit.
    """
    reasons = []
    for name in source.family.gguf:
        reason = next(_misfits(ARCHS[name], source), None)
        if reason is None:
            return ARCHS[name]
        reasons.append(f"{name}: {reason}")
    none = "no architecture of llama.cpp is known to compute it"
    if source.family.mixer:
        none = "its recurrent layers are not written yet"
    why = "; ".join(reasons) or none
    raise UserError(f"{source.family.model_type} cannot be written as GGUF: {why}")


def _misfits(arch: Arch, source: Source) -> Iterator[str]:
    """Yield why an architecture cannot express a model."""
    if arch.experts is not None:
        yield from _expert_misfits(arch.experts, source)
    yield from _shape_misfits(arch, source)
    family, config, rope = source.family, source.config, source.rope
    if source.rotary_dimensions != source.head_dim and not arch.partial_rotary:
        yield (
            f"it rotates whole heads, not {source.rotary_dimensions} of {source.head_dim} features"
        )
    if family.rope_pairs == "neighbours" and not arch.interleaved_rope:
        yield "it rotates features of a head's halves together, not neighbours"
    if (rotated := _rotated(arch, config)) is not None:
        yield rotated
    kind = rope.get("rope_type", "default")
    if kind not in arch.rope_types:
        known = ", ".join(sorted(arch.rope_types))
        yield f"rope_type {kind} is not among those that it is known to compute alike ({known})"
    activation = getattr(config, family.activation, "silu")  # unsaid, it is built in
    if activation not in arch.activations:
        yield f"its activation is {min(arch.activations)}, not {activation}"
    if extra := source.biased - arch.biases:
        yield f"it has no biases on {', '.join(sorted(extra))}"
    if arch.needs_biases and (missing := arch.biases - source.biased):
        yield f"it needs biases on {', '.join(sorted(missing))}"
    yield from _special_misfits(arch, source)


def _rotated(arch: Arch, config: Any) -> str | None:
    """Return why an architecture rotates other layers than a model does, None if the same."""
    given = getattr(config, "no_rope_layers", None)  # 1 where a layer has it
    layers = config.num_hidden_layers
    period = arch.unrotated_period
    expected = [int(period is None or (i + 1) % period != 0) for i in range(layers)]
    if list(given or [1] * layers) == expected:
        return None
    which = f"every {period}th" if period else "none"
    return f"of its layers {which} has no rotary embedding, not those of no_rope_layers"


def _shape_misfits(arch: Arch, source: Source) -> Iterator[str]:
    shape = source.shape
    first = shape.layers[shape.first_attention if arch.convolutions else 0]
    if not arch.per_layer:
        for i, layer in enumerate(shape.layers):
            if layer != (_convolution(first) if arch.convolutions and layer.mixer else first):
                yield (
                    f"it has one size for all layers, but layer {i} has {_counts(layer)} and "
                    f"layer 0 {_counts(first)}; prune with --shapes uniform"
                )
                break
    if not first.attention:
        yield "layer 0 has no attention"
    if arch.square_attention and first.heads * source.head_dim != shape.hidden:
        yield (
            f"its heads must make up the width: {first.heads} x {source.head_dim} is not "
            f"{shape.hidden}; leave heads and hidden as they are (--gates neurons)"
        )
    if arch.head == "never" and not source.tied:
        yield "its language head is the embedding, and this model's is not" + (
            "; prune with --shapes uniform" if arch.per_layer else ""
        )


def _convolution(layer: LayerShape) -> LayerShape:
    """Return what a layer would be with a convolution in place of attention."""
    return replace(layer, heads=0, kv_heads=0, mixer=True)


def _special_misfits(arch: Arch, source: Source) -> Iterator[str]:
    config, family = source.config, source.family
    caps = [
        getattr(config, name, None)
        for name in (family.logit_softcap, family.attention_softcap)
        if name
    ]
    if arch.convolutions and getattr(config, "conv_bias", False):
        yield "its convolutions have no biases (conv_bias)"
    if arch.softcaps and not all(caps):
        yield "it always bounds logits, and this config does not"
    if not arch.softcaps and any(caps):
        yield "it does not bound logits, and this config does"
    if arch.refuses_windows and source.window:
        yield "none of its layers has a window"
    if arch.window_period is not None:
        kinds = getattr(config, "layer_types", None) or []
        full_at = arch.window_period - 1
        expected = [
            _FULL if i % arch.window_period == full_at else _SLIDING for i in range(len(kinds))
        ]
        if list(kinds) != expected:
            yield f"every {arch.window_period}th of its layers has full attention, not {kinds}"
        sliding = dict(config.rope_parameters or {}).get(_SLIDING)
        if sliding and (sliding["rope_theta"], sliding["rope_type"]) != (10000.0, "default"):
            yield "its sliding layers rotate by theta 10000, unscaled"


def _expert_misfits(experts: Experts, source: Source) -> Iterator[str]:
    family, config = source.family, source.config
    dense = [i for i, layer in enumerate(source.shape.layers) if not layer.experts]
    if dense:
        yield f"all of its layers have experts, but layer {dense[0]} has none"
    if getattr(config, "norm_topk_prob", True) != experts.sums_to_one:
        does = "" if experts.sums_to_one else "not "
        yield f"weights of a token's experts do {does}sum to 1 there (norm_topk_prob)"
    if experts.joint_key_norm and source.shape.layers[0].heads_per_group > 1:
        yield "each of its heads has keys of its own, and here heads share them"
    if family.attention_clip and getattr(config, family.attention_clip):
        yield f"it does not bound queries, keys and values ({family.attention_clip})"


def _counts(layer: LayerShape) -> str:
    mlp = f"{layer.neurons} neurons"
    if layer.experts:
        mlp = f"{layer.experts} experts of {layer.expert_neurons} neurons"
    return f"{layer.heads}/{layer.kv_heads} heads and {mlp}"


def mended(shape: Shape, arch: Arch, quantized: bool) -> tuple[Shape, list[str]]:
    """Return the shape to write: with zeros where llama.cpp would go wrong on nothing.

    A layer with attention and no MLP would lose its attention, and no MLP in the last layer ends
    the process, so a missing MLP becomes `BLOCK` neurons of zeros, and a missing attention, where
    it cannot be stated, one head. Where rows are quantized, neurons are filled up to whole blocks.

    Args:
        shape: the model's dimensions.
        arch: what it is written as.
        quantized: whether rows must be whole blocks.

    Returns:
        The shape, and a line about each kind of zeros.
    """
    layers, notes = list(shape.layers), []
    for i, layer in enumerate(layers):
        if layer.experts:  # alike in all layers, so nothing is missing
            continue
        heads = layer.attention or arch.optional_attention
        neurons = layer.neurons or BLOCK
        if quantized:
            neurons = -(-neurons // BLOCK) * BLOCK
        counts = (layer.heads if heads else 1, layer.kv_heads if heads else 1)
        layers[i] = LayerShape(*counts, neurons, mixer=layer.mixer)
    for what, count in (
        ("without an MLP got one of zeros", sum(not x.mlp for x in shape.layers)),
        (
            "without attention got one head of zeros",
            sum(x.heads != y.heads for x, y in zip(layers, shape.layers, strict=True)),
        ),
        (
            f"got zeros to make neurons a multiple of {BLOCK}",
            sum(
                x.mlp and x.neurons != y.neurons for x, y in zip(shape.layers, layers, strict=True)
            ),
        ),
    ):
        if count:
            notes.append(f"{count} layer{'s' if count > 1 else ''} {what}")
    return Shape(shape.hidden, tuple(layers)), notes


def check_rows(shape: Shape, head_dim: int, type_name: str) -> None:
    """Refuse rows that a quantized type cannot hold: it stores blocks of `BLOCK` weights.

    Raises:
        UserError: naming the rows and what would make them fit.
    """
    instead = "pass --type f16 or bf16"
    if shape.hidden % BLOCK:
        raise UserError(
            f"--type {type_name} stores rows in blocks of {BLOCK}, and the width is "
            f"{shape.hidden}: {instead}, or prune with --set hidden_multiple={BLOCK}"
        )
    for i, layer in enumerate(shape.layers):
        if layer.heads * head_dim % BLOCK:
            raise UserError(
                f"--type {type_name} stores rows in blocks of {BLOCK}, and layer {i} has "
                f"{layer.heads} heads of {head_dim}, {layer.heads * head_dim} features: {instead}, "
                f"or keep heads in multiples of {BLOCK // gcd(BLOCK, head_dim)} (--shape)"
            )
        inner = [x for x in (layer.expert_neurons, layer.experts and layer.neurons) if x % BLOCK]
        if inner:
            raise UserError(
                f"--type {type_name} stores rows in blocks of {BLOCK}, and layer {i} has experts "
                f"of {inner[0]} neurons: {instead}, or prune with --neuron-multiple {BLOCK}"
            )


def torn_rows(shape: Shape, head_dim: int) -> list[str]:
    """Return a line on rows that K-quants cannot store whole, none where there are no such rows."""
    counts = ((x.neurons, x.expert_neurons, x.heads * head_dim) for x in shape.layers)
    rows = {shape.hidden, *(count for layer in counts for count in layer)}
    odd = sorted(x for x in rows if x % SUPER_BLOCK)
    more = f" and {len(odd) - 6} more" * (len(odd) > 6)
    return [
        f"K-quants store blocks of {SUPER_BLOCK}, so rows of {', '.join(map(str, odd[:6]))}{more} "
        "would be stored in other types, larger or coarser"
    ][: len(odd)]


def check_super_blocks(shape: Shape, head_dim: int, kinds: Collection[str]) -> None:
    """Refuse a cut after which K-quants could not store rows: they take blocks of `SUPER_BLOCK`.

    Args:
        shape: of the model before the cut.
        head_dim: features of a head.
        kinds: kinds of gates.

    Raises:
        UserError: naming what is no multiple, and what to do instead.
    """
    if shape.hidden % SUPER_BLOCK and "hidden" not in kinds:
        raise UserError(
            f"the width is {shape.hidden}, no multiple of the {SUPER_BLOCK} weights that K-quants "
            "store together, so no cut of other kinds makes its rows fit: leave "
            "--for-quantization out and export with --type q8_0 or q4_0, or add hidden to --gates"
        )
    for layer in filter(lambda x: x.heads, shape.layers):
        for kind, heads in (("heads", 1), ("kv_groups", layer.heads_per_group)):
            if kind in kinds and heads * head_dim % SUPER_BLOCK:
                raise UserError(
                    f"a unit of {kind} has {heads * head_dim} features, no multiple of the "
                    f"{SUPER_BLOCK} weights that K-quants store together: with --for-quantization "
                    "leave it out of --gates, such as --gates neurons"
                )

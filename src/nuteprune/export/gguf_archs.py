"""What llama.cpp's architectures can express: data, and the reasons why a model does not fit one.

A family names the architectures that compute what it does (`Family.gguf`); the first without a
reason against it is taken. llama.cpp reads most shapes from metadata and checks tensors against
them, but some it takes without a word and computes something else: those are what the flags below
are about. Found by running models through it (docs/gguf.md); sources: its `src/models/*.cpp`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

from nuteprune.errors import UserError
from nuteprune.model.families import Family
from nuteprune.model.shape import LayerShape, Shape

BLOCK = 32
"""Weights of a row that Q8_0 and Q4_0 quantize together."""

_SILU = frozenset({"silu", "swish"})
_GELU_TANH = frozenset({"gelu_pytorch_tanh", "gelu_new", "gelu_fast"})
_SLIDING, _FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Arch:
    """One of llama.cpp's architectures."""

    name: str
    per_layer: bool = False
    """Head counts and widths may differ between layers."""
    optional_attention: bool = False
    """A layer without attention can be stated; elsewhere a head of zeros stands in."""
    interleaved_rope: bool = False
    """Rotary pairs are neighbours, so the rows of queries and keys are reordered."""
    fused_qkv: bool = False
    fused_gate: bool = False
    """Gate and up projection are one tensor."""
    square_attention: bool = False
    """Heads x head_dim must be the width."""
    partial_rotary: bool = False
    """Part of each head may be left unrotated."""
    rope_types: frozenset[str] = frozenset({"default"})
    activations: frozenset[str] = _SILU
    head: str = "optional"
    """Tensor of the language head: `optional`, `always` there, or `never` (the embedding's)."""
    biases: frozenset[str] = frozenset()
    """Which biases it adds: those of `qkv`, `o`, `mlp`."""
    needs_biases: bool = False
    """All of these must be there."""
    softcaps: bool = False
    """Logits and attention logits are always bounded; elsewhere they never are."""
    window_period: int | None = None
    """Every so-manieth layer has full attention, the others a window; None: no windows."""
    multipliers: bool = False
    """Scales embeddings, residuals, attention and logits by metadata; elsewhere folded in."""
    wide_scale_at: int | None = None
    """With that many layers, attention is scaled by sqrt(heads / hidden), not by head_dim."""

    def attention_scale(self, shape: Shape, head_dim: int) -> float:
        """Return the factor that it puts on products of queries and keys."""
        if len(shape.layers) == self.wide_scale_at:
            return float((shape.hidden // shape.layers[0].heads) ** -0.5)
        return float(head_dim**-0.5)


_ALL_BIASES = frozenset({"qkv", "o", "mlp"})
_LLAMA = Arch(
    "llama",
    interleaved_rope=True,
    rope_types=frozenset({"default", "linear", "llama3"}),
    biases=_ALL_BIASES,
)
_QWEN3 = Arch("qwen3", rope_types=frozenset({"default", "linear"}))
_GEMMA2 = Arch(
    "gemma2", activations=_GELU_TANH, head="never", softcaps=True, window_period=2, wide_scale_at=46
)

ARCHS: dict[str, Arch] = {
    arch.name: arch
    for arch in (
        _LLAMA,
        replace(
            _LLAMA,
            name="deci",
            per_layer=True,
            optional_attention=True,
            biases=frozenset({"qkv", "o"}),
        ),
        replace(
            _QWEN3,
            name="qwen2",
            square_attention=True,
            biases=frozenset({"qkv"}),
            needs_biases=True,
        ),
        _QWEN3,
        replace(_QWEN3, name="openelm", per_layer=True, fused_qkv=True, head="never"),
        Arch(
            "phi3",
            fused_qkv=True,
            fused_gate=True,
            square_attention=True,
            partial_rotary=True,
            rope_types=frozenset({"default", "longrope"}),
        ),
        _GEMMA2,
        replace(
            _GEMMA2,
            name="gemma3",
            rope_types=frozenset({"default", "linear"}),
            softcaps=False,
            window_period=6,
            wide_scale_at=62,
        ),
        replace(_LLAMA, name="granite", multipliers=True),
        Arch(
            "gptneox",
            fused_qkv=True,
            square_attention=True,
            partial_rotary=True,
            activations=_GELU_TANH | {"gelu"},
            head="always",
            biases=_ALL_BIASES,
            needs_biases=True,
        ),
    )
}


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
    why = "; ".join(reasons) or "llama.cpp has no architecture that computes it"
    raise UserError(f"{source.family.model_type} cannot be written as GGUF: {why}")


def _misfits(arch: Arch, source: Source) -> Iterator[str]:
    """Yield why an architecture cannot express a model."""
    yield from _shape_misfits(arch, source)
    family, config, rope = source.family, source.config, source.rope
    if source.rotary_dimensions != source.head_dim and not arch.partial_rotary:
        yield (
            f"it rotates whole heads, not {source.rotary_dimensions} of {source.head_dim} features"
        )
    kind = rope.get("rope_type", "default")
    if kind not in arch.rope_types:
        known = ", ".join(sorted(arch.rope_types))
        yield f"rope_type {kind} is not among those that it is known to compute alike ({known})"
    activation = getattr(config, family.activation)
    if activation not in arch.activations:
        yield f"its activation is {min(arch.activations)}, not {activation}"
    if extra := source.biased - arch.biases:
        yield f"it has no biases on {', '.join(sorted(extra))}"
    if arch.needs_biases and (missing := arch.biases - source.biased):
        yield f"it needs biases on {', '.join(sorted(missing))}"
    yield from _special_misfits(arch, source)


def _shape_misfits(arch: Arch, source: Source) -> Iterator[str]:
    shape, first = source.shape, source.shape.layers[0]
    if not arch.per_layer:
        for i, layer in enumerate(shape.layers):
            if layer != first:
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


def _special_misfits(arch: Arch, source: Source) -> Iterator[str]:
    config, family = source.config, source.family
    caps = [
        getattr(config, name, None)
        for name in (family.logit_softcap, family.attention_softcap)
        if name
    ]
    if arch.softcaps and not all(caps):
        yield "it always bounds logits, and this config does not"
    if not arch.softcaps and any(caps):
        yield "it does not bound logits, and this config does"
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


def _counts(layer: LayerShape) -> str:
    return f"{layer.heads}/{layer.kv_heads} heads and {layer.neurons} neurons"


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
        heads = layer.attention or arch.optional_attention
        neurons = layer.neurons or BLOCK
        if quantized:
            neurons = -(-neurons // BLOCK) * BLOCK
        layers[i] = LayerShape(layer.heads if heads else 1, layer.kv_heads if heads else 1, neurons)
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

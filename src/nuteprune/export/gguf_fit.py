"""Whether llama.cpp can express a model: the architecture to write it as, or the reason why not.

A family names the architectures that compute what it does (`Family.gguf`); the first without a
reason against it is taken. What would be taken and computed wrong is refused here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

from nuteprune.errors import UserError
from nuteprune.export.gguf_arch import Arch, Experts
from nuteprune.export.gguf_archs import ARCHS
from nuteprune.model.family import Family
from nuteprune.model.shape import LayerShape, Shape

_ANY_STEP = (0.0, inf)
_DIRECT_QUERIES = (26, 27)
"""Layers of models whose queries come from no latent, which llama.cpp tells by the count."""
_SLIDING, _CHUNKED, _FULL = "sliding_attention", "chunked_attention", "full_attention"


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
        return self.family.head_dim(self.config)

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
        """Features per head that are rotated; of latent attention those that stand beside it."""
        if self.family.latent:
            return int(getattr(self.config, self.family.latent[1]))
        return int(self.head_dim * self.rope.get("partial_rotary_factor", 1.0))

    @property
    def rotates(self) -> bool:
        """Whether there is rotary embedding at all: Granite 4 can do without."""
        return getattr(self.config, "position_embedding_type", "rope") == "rope"

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
    why = "; ".join(reasons) or "no architecture of llama.cpp is known to compute it"
    raise UserError(f"{source.family.model_type} cannot be written as GGUF: {why}")


def _misfits(arch: Arch, source: Source) -> Iterator[str]:
    """Yield why an architecture cannot express a model."""
    if arch.experts is not None:
        yield from _expert_misfits(arch, arch.experts, source)
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
    if kind == "yarn":
        yield from _yarn_misfits(arch, rope)
    activation = getattr(config, family.activation, "silu")  # unsaid, it is built in
    if activation not in arch.activations:
        yield f"its activation is {min(arch.activations)}, not {activation}"
    if extra := source.biased - arch.biases:
        yield f"it has no biases on {', '.join(sorted(extra))}"
    if arch.needs_biases and (missing := arch.biases - source.biased):
        yield f"it needs biases on {', '.join(sorted(missing))}"
    yield from _special_misfits(arch, source)


def _yarn_misfits(arch: Arch, rope: Mapping[str, Any]) -> Iterator[str]:
    """Yield why an architecture scales attention otherwise than a model does under YaRN."""
    if rope.get("attention_factor") is not None:
        yield "it derives YaRN's factor on attention from the scaling factor (attention_factor)"
    given, expected = rope.get("mscale"), rope.get("mscale_all_dim") if arch.latent else None
    if given != expected or (arch.latent and not given):
        needs = "one mscale and mscale_all_dim" if arch.latent else "no mscale"
        yield f"it takes YaRN with {needs}"


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
    first = shape.layers[shape.first_attention if arch.mixer else 0]
    if not arch.per_layer and (pair := _uneven(arch, shape)) is not None:
        here, there = pair
        yield (
            f"it has one size for all layers, but layer {here} has {_counts(shape.layers[here])} "
            f"and layer {there} {_counts(shape.layers[there])}; prune with --shapes uniform"
        )
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


def _uneven(arch: Arch, shape: Shape) -> tuple[int, int] | None:
    """Return a layer and one before it of other sizes, though both are of one kind."""
    seen: dict[tuple[str, bool], tuple[int, tuple[int, ...]]] = {}
    for i, x in enumerate(shape.layers):
        for kind, size in (
            (("attention", bool(arch.mixer) and x.mixer), (x.heads, x.kv_heads)),
            (("mlp", x.experts > 0), (x.neurons, x.experts, x.expert_neurons)),
        ):
            before, expected = seen.setdefault(kind, (i, size))
            if size != expected:
                return i, before
    return None


def _special_misfits(arch: Arch, source: Source) -> Iterator[str]:
    config, family = source.config, source.family
    caps = [
        getattr(config, name, None)
        for name in (family.logit_softcap, family.attention_softcap)
        if name
    ]
    recurrent = any(x.mixer for x in source.shape.layers)
    if recurrent != bool(arch.mixer):
        yield (
            "it has recurrent layers, and this model none"
            if arch.mixer
            else "it has no recurrent layers"
        )
    if not (source.rotates or arch.optional_rope):
        yield "all of its layers have rotary embedding (position_embedding_type)"
    if arch.mixer == "convolution" and getattr(config, "conv_bias", False):
        yield "its convolutions have no biases (conv_bias)"
    if arch.mixer == "mamba2":
        yield from _mamba_misfits(config)
    if arch.mixer.endswith("delta_net"):
        yield from _delta_net_misfits(source)
    if arch.latent:
        yield from _latent_misfits(source)
    for name, value in arch.built_in.items():
        if getattr(config, name) != value:
            yield f"its {name} is {value}, not {getattr(config, name)}"
    if arch.softcaps and not all(caps):
        yield "it always bounds logits, and this config does not"
    if not arch.softcaps and any(caps):
        yield "it does not bound logits, and this config does"
    if arch.refuses_windows and source.window:
        yield "none of its layers has a window"
    if arch.window_period is not None:
        kinds = getattr(config, "layer_types", None) or []
        full_at = arch.window_period - 1
        other = _CHUNKED if arch.chunked else _SLIDING
        expected = [
            _FULL if i % arch.window_period == full_at else other for i in range(len(kinds))
        ]
        if list(kinds) != expected:
            yield f"every {arch.window_period}th of its layers has full attention, not {kinds}"
        sliding = dict(config.rope_parameters or {}).get(_SLIDING)
        if sliding and (sliding["rope_theta"], sliding["rope_type"]) != (10000.0, "default"):
            yield "its sliding layers rotate by theta 10000, unscaled"


def _mamba_misfits(config: Any) -> Iterator[str]:
    for name in ("mamba_proj_bias", "projectors_bias"):
        if getattr(config, name, False):
            yield f"its recurrent layers have no biases ({name})"
    if getattr(config, "mamba_rms_norm", False) and config.mamba_norm_before_gate:
        yield "its recurrent layers norm what is gated already (mamba_norm_before_gate)"
    if tuple(config.time_step_limit or _ANY_STEP) != _ANY_STEP:
        yield "it does not bound time steps of recurrent layers (time_step_limit)"


def _delta_net_misfits(source: Source) -> Iterator[str]:
    config, layers = source.config, source.shape.layers
    period = source.shape.first_attention + 1
    if [x.attention for x in layers] != [(i + 1) % period == 0 for i in range(len(layers))]:
        yield "every n-th of its layers has attention, and here they are at no such distance"
    if config.linear_key_head_dim != config.linear_value_head_dim:
        yield "heads of its recurrent layers have values as wide as keys (linear_value_head_dim)"


def _latent_misfits(source: Source) -> Iterator[str]:
    layers = len(source.shape.layers)
    if source.config.q_lora_rank is not None and layers in _DIRECT_QUERIES:
        yield f"with {layers} layers its queries come straight from the width (q_lora_rank)"


def _dense_at(experts: Experts, shape: Shape) -> list[int]:
    """Return which layers have an MLP in place of experts, as the architecture has them."""
    dense = [i for i, x in enumerate(shape.layers) if not x.experts]
    if experts.dense == "first":
        return list(range(len(dense)))
    if experts.dense == "between":
        step = expert_period(shape)
        return [i for i in range(len(shape.layers)) if (i + 1) % step]
    return []


def expert_period(shape: Shape) -> int:
    """Return n where every n-th layer has experts, if it is so."""
    return next((i for i, x in enumerate(shape.layers) if x.experts), 0) + 1


_WHERE = {
    "": "all of its layers have experts",
    "first": "all of its layers after the first ones have experts",
    "between": "every n-th of its layers has experts",
}


def _expert_misfits(arch: Arch, experts: Experts, source: Source) -> Iterator[str]:
    family, config, shape = source.family, source.config, source.shape
    dense = [i for i, layer in enumerate(shape.layers) if not layer.experts]
    if dense != _dense_at(experts, shape):
        yield f"{_WHERE[experts.dense]}, but layer {dense[0]} has none"
    if arch.unnormed_at is not None:
        count = max(x.experts for x in shape.layers)
        normed = count != arch.unnormed_at
        if config.use_qk_norm != normed:
            does = "norms queries and keys" if normed else "leaves queries and keys as they are"
            yield f"with {count} experts it {does} (use_qk_norm)"
    groups = family.experts.groups if family.experts else ""
    if groups and not experts.groups and (getattr(config, groups) or 1) > 1:
        yield f"its routers choose among all experts, not groups first ({groups})"
    sums = getattr(config, "norm_topk_prob", True)
    if not experts.states_weights and sums != experts.sums_to_one:
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

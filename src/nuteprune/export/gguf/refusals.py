"""Whether llama.cpp can express a model: the architecture to write it as, or the reason why not.

A family names the architectures that compute what it does (`Family.gguf`); the first without a
reason against it is taken. This module refuses models that llama.cpp would load and compute wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

from nuteprune.errors import UserError
from nuteprune.export.gguf.architectures import ARCHITECTURES, Architecture, ExpertRouting
from nuteprune.model.family import Family
from nuteprune.model.shape import LayerShape, Shape

_ANY_STEP = (0.0, inf)
_DIRECT_QUERIES = (26, 27)
"""With so many layers llama.cpp assumes that queries come from no latent."""
_SLIDING, _CHUNKED, _FULL = "sliding_attention", "chunked_attention", "full_attention"


@dataclass(frozen=True)
class ModelFacts:
    """Facts of a model that decide which programs can compute it.

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
    def rope(self) -> dict[str, Any]:
        """Rotary parameters; of full attention, where kinds of attention have their own."""
        rope = dict(getattr(self.config, "rope_parameters", None) or {})
        return dict(rope.get(_FULL, rope))

    @property
    def rotary_dimensions(self) -> int:
        """Rotated features per head; with latent attention, those beside the latents."""
        if self.family.latent:
            return int(getattr(self.config, self.family.latent[1]))
        return int(self.head_dim * self.rope.get("partial_rotary_factor", 1.0))

    @property
    def rotates(self) -> bool:
        """Whether there is rotary embedding at all: Granite 4 can do without."""
        return getattr(self.config, "position_embedding_type", "rope") == "rope"

    @property
    def window(self) -> int | None:
        """Tokens that layers with a window see, their own included; None if all layers see all."""
        window = getattr(self.config, "sliding_window", None)
        kinds = getattr(self.config, "layer_types", None)
        return window if window and (kinds is None or _SLIDING in kinds) else None

    @property
    def biased(self) -> frozenset[str]:
        """Which parts have biases, in `Architecture.biases`' words."""
        *qkv, o = self.family.attention
        parts = {"qkv": qkv, "o": [o], "mlp": self.family.mlp}
        return frozenset(k for k, ps in parts.items() if any(self.biases.get(p.path) for p in ps))


def choose_architecture(facts: ModelFacts) -> Architecture:
    """Return the architecture that a model is written as.

    Raises:
        UserError: if none can express it: which shape or property, and what would make it fit.
    """
    reasons = []
    for name in facts.family.gguf:
        reason = next(_misfits(ARCHITECTURES[name], facts), None)
        if reason is None:
            return ARCHITECTURES[name]
        reasons.append(f"{name}: {reason}")
    why = "; ".join(reasons) or "no architecture of llama.cpp is known to compute it"
    raise UserError(f"{facts.family.model_type} cannot be written as GGUF: {why}")


def _misfits(arch: Architecture, facts: ModelFacts) -> Iterator[str]:
    """Yield why an architecture cannot express a model."""
    if arch.experts is not None:
        yield from _expert_misfits(arch, arch.experts, facts)
    yield from _shape_misfits(arch, facts)
    yield from _rotary_misfits(arch, facts)
    activation = getattr(facts.config, facts.family.activation, "silu")  # unsaid, it is built in
    if activation not in arch.activations:
        yield f"its activation is {min(arch.activations)}, not {activation}"
    taken, biased = frozenset(arch.biases), facts.biased
    if extra := biased - taken:
        yield f"it has no biases on {', '.join(sorted(extra))}"
    if arch.needs_biases and (missing := taken - biased):
        yield f"it needs biases on {', '.join(sorted(missing))}"
    yield from _mixer_misfits(arch, facts)
    for name, value in arch.built_in.items():
        if (given := getattr(facts.config, name)) != value:
            yield f"its {name} is {value}, not {given}"
    yield from _attention_misfits(arch, facts)


def _rotary_misfits(arch: Architecture, facts: ModelFacts) -> Iterator[str]:
    """Yield how an architecture's rotary embedding differs from that of a model."""
    rope, rotated, head_dim = facts.rope, facts.rotary_dimensions, facts.head_dim
    if rotated != head_dim and not arch.partial_rotary:
        yield f"it rotates whole heads, not {rotated} of {head_dim} features"
    if facts.family.rope_pairs == "neighbours" and not arch.interleaved_rope:
        yield "it rotates features of a head's halves together, not neighbours"
    layers, period = facts.config.num_hidden_layers, arch.unrotated_period
    expected = [int(period is None or (i + 1) % period != 0) for i in range(layers)]
    given = getattr(facts.config, "no_rope_layers", None)  # 1 where a layer has it
    if list(given or [1] * layers) != expected:
        which = f"every {period}th" if period else "none"
        yield f"of its layers {which} has no rotary embedding, not those of no_rope_layers"
    kind = rope.get("rope_type", "default")
    if kind not in arch.rope_types:
        known = ", ".join(sorted(arch.rope_types))
        yield f"rope_type {kind} is not among those that it is known to compute alike ({known})"
    if kind == "yarn":
        if rope.get("attention_factor") is not None:
            yield "it derives YaRN's factor on attention from the scaling factor (attention_factor)"
        mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
        if facts.family.latent and not (mscale and mscale == all_dim):
            yield "it takes YaRN with one mscale and mscale_all_dim"
        if not facts.family.latent and mscale is not None:
            yield "it takes YaRN with no mscale"


def _shape_misfits(arch: Architecture, facts: ModelFacts) -> Iterator[str]:
    shape = facts.shape
    first = shape.layers[shape.first_attention if arch.mixer else 0]
    if not arch.per_layer and (pair := _uneven_layers(arch, shape)) is not None:
        here, there = (f"layer {i} has {_counts(shape.layers[i])}" for i in pair)
        yield (
            f"it has one size for all layers, but {here} and {there}; prune with --shapes uniform"
        )
    if not first.attention:
        yield "layer 0 has no attention"
    if arch.square_attention and first.heads * facts.head_dim != shape.hidden:
        yield (
            f"its heads must make up the width: {first.heads} x {facts.head_dim} is not "
            f"{shape.hidden}; leave heads and hidden as they are (--gates neurons)"
        )
    if arch.head == "never" and not facts.config.tie_word_embeddings:
        instead = "; prune with --shapes uniform" if arch.per_layer else ""
        yield f"its language head is the embedding, and this model's is not{instead}"


def _uneven_layers(arch: Architecture, shape: Shape) -> tuple[int, int] | None:
    """Return two layers of one kind whose sizes differ."""
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


def _counts(layer: LayerShape) -> str:
    mlp = f"{layer.neurons} neurons"
    if layer.experts:
        mlp = f"{layer.experts} experts of {layer.expert_neurons} neurons"
    return f"{layer.heads}/{layer.kv_heads} heads and {mlp}"


def _mixer_misfits(arch: Architecture, facts: ModelFacts) -> Iterator[str]:
    """Yield how mixers of an architecture differ from those of a model."""
    config, layers = facts.config, facts.shape.layers
    if any(x.mixer for x in layers) and not arch.mixer:
        yield "it has no recurrent layers"
    if arch.mixer and not any(x.mixer for x in layers):
        yield "it has recurrent layers, and this model none"
    if not (facts.rotates or arch.optional_rope):
        yield "all of its layers have rotary embedding (position_embedding_type)"
    if arch.mixer == "convolution" and getattr(config, "conv_bias", False):
        yield "its convolutions have no biases (conv_bias)"
    if arch.mixer == "mamba2":
        for name in ("mamba_proj_bias", "projectors_bias"):
            if getattr(config, name, False):
                yield f"its recurrent layers have no biases ({name})"
        if getattr(config, "mamba_rms_norm", False) and config.mamba_norm_before_gate:
            yield "its recurrent layers norm what is gated already (mamba_norm_before_gate)"
        if tuple(config.time_step_limit or _ANY_STEP) != _ANY_STEP:
            yield "it does not bound time steps of recurrent layers (time_step_limit)"
    if arch.mixer.endswith("delta_net"):
        period = facts.shape.first_attention + 1
        if [x.attention for x in layers] != [(i + 1) % period == 0 for i in range(len(layers))]:
            yield "every n-th of its layers has attention, and here they are at no such distance"
        if config.linear_key_head_dim != config.linear_value_head_dim:
            yield "its recurrent layers have values as wide as keys (linear_value_head_dim)"
    latent = facts.family.latent and config.q_lora_rank is not None
    if latent and len(layers) in _DIRECT_QUERIES:
        yield f"with {len(layers)} layers its queries come straight from the width (q_lora_rank)"


def _attention_misfits(arch: Architecture, facts: ModelFacts) -> Iterator[str]:
    """Yield how bounds on logits and windows of an architecture differ from those of a model."""
    config, family, period = facts.config, facts.family, arch.window_period
    names = (family.logit_softcap, family.attention_softcap)
    caps = [getattr(config, name, None) for name in names if name]
    if arch.softcaps and not all(caps):
        yield "it always bounds logits, and this config does not"
    if not arch.softcaps and any(caps):
        yield "it does not bound logits, and this config does"
    if arch.refuses_windows and facts.window:
        yield "none of its layers has a window"
    if period is not None:
        kinds = list(getattr(config, "layer_types", None) or [])
        other = _CHUNKED if arch.chunked else _SLIDING
        if kinds != [other if (i + 1) % period else _FULL for i in range(len(kinds))]:
            yield f"every {period}th of its layers has full attention, not {kinds}"
        sliding = dict(config.rope_parameters or {}).get(_SLIDING)
        if sliding and (sliding["rope_theta"], sliding["rope_type"]) != (10000.0, "default"):
            yield "its sliding layers rotate by theta 10000, unscaled"


_WITH_EXPERTS = {
    "": "all of its layers have experts",
    "first": "all of its layers after the first ones have experts",
    "between": "every n-th of its layers has experts",
}


def expert_period(shape: Shape) -> int:
    """Return n if every n-th layer has experts."""
    return next((i for i, x in enumerate(shape.layers) if x.experts), 0) + 1


def _expert_misfits(arch: Architecture, experts: ExpertRouting, facts: ModelFacts) -> Iterator[str]:
    family, config, layers = facts.family, facts.config, facts.shape.layers
    dense, period = [i for i, x in enumerate(layers) if not x.experts], expert_period(facts.shape)
    between = [i for i in range(len(layers)) if (i + 1) % period]
    expected = {"": [], "first": [*range(len(dense))], "between": between}[experts.dense]
    if dense != expected:
        yield f"{_WITH_EXPERTS[experts.dense]}, but layer {dense[0]} has none"
    if arch.unnormed_at is not None:
        count = max(x.experts for x in layers)
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
    if experts.joint_key_norm and layers[0].heads_per_group > 1:
        yield "each of its heads has keys of its own, and here heads share them"
    if family.attention_clip and getattr(config, family.attention_clip):
        yield f"it does not bound queries, keys and values ({family.attention_clip})"

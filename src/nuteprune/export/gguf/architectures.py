"""What llama.cpp's architectures can express: how each computes, and its limits.

llama.cpp reads most shapes from metadata and checks tensors against them, but some it takes
without a word and computes something else: those are what most fields below are about. Found by
running models through it (docs/gguf.md); source: its `src/models/*.cpp`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal

from nuteprune.model.family import config_number
from nuteprune.model.shape import Shape


@dataclass(frozen=True)
class ExpertRouting:
    """How one of llama.cpp's architectures routes tokens to experts."""

    sums_to_one: bool = True
    """Weights of a token's experts are made to sum to 1."""
    own_width: bool = True
    """Their width has a key of its own; elsewhere it is the feed-forward length."""
    shared: Literal["", "own", "times", "once"] = ""
    """There is a shared expert: of a width of its own and weighed by a gate, a whole number of
    times as wide as a routed one, or just as wide; "": none."""
    dense: Literal["", "first", "between"] = ""
    """Layers that have an MLP instead: the first ones, or all but every n-th; "": none."""
    states_weights: bool = False
    """The file states how experts are weighed: by sigmoids, whether they sum to 1, by which
    factor."""
    groups: bool = False
    """Routers may choose groups of experts first."""
    joint_key_norm: bool = False
    """Its norm of keys is as wide as the model."""


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's architectures."""

    name: str
    per_layer: bool = False
    """Head counts and widths may differ between layers."""
    optional_attention: bool = False
    """A layer without attention can be stated; elsewhere a head of zeros stands in."""
    interleaved_rope: bool = False
    """Rotary pairs are neighbours, so where a family's are halves apart, rows are reordered."""
    unrotated_period: int | None = None
    """Every n-th layer has no rotary embedding; None: all have it."""
    fused_qkv: bool = False
    fused_gate: bool = False
    """Gate and up projection are one tensor."""
    square_attention: bool = False
    """Heads x head_dim must be the width."""
    partial_rotary: bool = False
    """Part of each head may be left unrotated."""
    rope_types: tuple[str, ...] = ("default",)
    activations: tuple[str, ...] = ("silu", "swish")
    head: str = "optional"
    """Tensor of the language head: `optional`, `always` there, or `never` (the embedding's)."""
    biases: tuple[str, ...] = ()
    """Which biases it adds: those of `qkv`, `o`, `mlp`."""
    needs_biases: bool = False
    """All of these must be there."""
    softcaps: bool = False
    """Logits and attention logits are always bounded; elsewhere they never are."""
    window_period: int | None = None
    """Every n-th layer has full attention, the others a window; None: no windows."""
    chunked: bool = False
    """These windows are chunks of a built-in length, which do not slide."""
    refuses_windows: bool = False
    """It computes models with windows wrong, however short the text."""
    multipliers: bool = False
    """Scales embeddings, residuals, attention and logits by metadata; elsewhere folded in."""
    wide_scale_at: int | None = None
    """With that many layers, attention is scaled by sqrt(heads / hidden), not by head_dim."""
    mixer: Literal["", "convolution", "mamba2", "delta_net", "tiled_delta_net"] = ""
    """What layers without attention have instead: a short convolution over the width, Mamba 2, or a
    gated delta rule in every layer but the n-th. Tiled, its value heads are ordered by their place
    among those of a key head, then by key head."""
    optional_rope: bool = False
    """Whether heads rotate is stated."""
    unnormed_at: int | None = None
    """With that many experts queries and keys are not normed, otherwise they are."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Name of a norm's weight elsewhere -> its own."""
    experts: ExpertRouting | None = None
    """What its layers have in place of an MLP."""
    folded: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Role of a linear map -> config values that multiply it, and that the architecture knows
    nothing of; `NAME.i` is the i-th of a list."""
    built_in: Mapping[str, object] = field(default_factory=dict)
    """Config values that it takes for granted."""

    def folded_in(self, role: str, config: Any) -> float:
        """Return the factor of a role's map that the architecture lacks."""
        return prod((config_number(config, x) for x in self.folded.get(role, ())), start=1.0)

    def attention_scale(self, shape: Shape, head_dim: int) -> float:
        """Return the factor that it puts on products of queries and keys."""
        if len(shape.layers) == self.wide_scale_at:
            return float((shape.hidden // shape.layers[0].heads) ** -0.5)
        return float(head_dim**-0.5)


_GELU_TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
_ALL = ("qkv", "o", "mlp")
_LINEAR = ("default", "linear")
_POST_ATTENTION = {"ffn_norm.weight": "post_attention_norm.weight"}
_FALCON_H1: dict[str, tuple[str, ...]] = {
    "embedding": ("embedding_multiplier",),
    "q": ("attention_in_multiplier",),
    "k": ("attention_in_multiplier", "key_multiplier"),
    "v": ("attention_in_multiplier",),
    "o": ("attention_out_multiplier",),
    "gate": ("mlp_multipliers.0",),
    "down": ("mlp_multipliers.1",),
    **{f"mixer.{i}": ("ssm_in_multiplier", f"ssm_multipliers.{i}") for i in range(5)},
    "mixer.out": ("ssm_out_multiplier",),
}
_LLAMA4_BUILT_IN: dict[str, object] = {
    **{"attention_chunk_size": 8192, "attn_temperature_tuning": True},
    **{"floor_scale": 8192, "attn_scale": 0.1},
}

# What several have in common.
_LLAMA = Architecture("llama", interleaved_rope=True, rope_types=(*_LINEAR, "llama3"), biases=_ALL)
_GRANITE = replace(_LLAMA, name="granite", multipliers=True, optional_rope=True)
_QWEN3 = Architecture("qwen3", rope_types=_LINEAR)
_QWEN2 = replace(_QWEN3, name="qwen2", square_attention=True, biases=("qkv",))
_GEMMA = Architecture("gemma", activations=_GELU_TANH, head="never")
_QWEN3_5 = Architecture(
    "qwen35", partial_rotary=True, optional_attention=True, renamed=_POST_ATTENTION
)
_SQUARE = Architecture("", square_attention=True)
_NEIGHBOURS = replace(_SQUARE, interleaved_rope=True)
_PHI = replace(_SQUARE, partial_rotary=True, head="always", biases=_ALL, needs_biases=True)
_FUSED = replace(_SQUARE, fused_qkv=True, fused_gate=True, partial_rotary=True)
_COHERE = replace(_NEIGHBOURS, head="never")
_NORMED_AFTER = replace(_SQUARE, refuses_windows=True)
_GLM4 = Architecture("glm4", partial_rotary=True, biases=("qkv",))
_ROUTED_ALIKE = ExpertRouting(own_width=False)
_ROUTED_AS_SCORED = replace(_ROUTED_ALIKE, sums_to_one=False, joint_key_norm=True)
_LLAMA_EXPERTS = replace(_LLAMA, biases=("qkv", "o"), experts=_ROUTED_ALIKE)
_SHARED = ExpertRouting(shared="own")
_SHARED_TIMES = ExpertRouting(shared="times", dense="first", states_weights=True)

_KNOWN = (
    _LLAMA,
    replace(_LLAMA, name="deci", per_layer=True, optional_attention=True, biases=("qkv", "o")),
    replace(_QWEN2, needs_biases=True),
    _QWEN3,
    replace(_QWEN3, name="openelm", per_layer=True, fused_qkv=True, head="never"),
    replace(_FUSED, name="phi3", rope_types=("default", "longrope")),
    replace(_GEMMA, name="gemma2", softcaps=True, window_period=2, wide_scale_at=46),
    replace(_GEMMA, name="gemma3", rope_types=_LINEAR, window_period=6, wide_scale_at=62),
    _GRANITE,
    replace(
        _GRANITE,
        name="granitehybrid",
        rope_types=("default",),
        biases=(),
        optional_attention=True,
        mixer="mamba2",
        built_in={"mamba_expand": 2},
    ),
    Architecture(
        "falcon-h1", mixer="mamba2", renamed={"ffn_norm.weight": "ffn_norm"}, folded=_FALCON_H1
    ),
    _LLAMA_EXPERTS,
    replace(_LLAMA, name="granitemoe", multipliers=True, biases=(), experts=_ROUTED_ALIKE),
    replace(_QWEN3, name="qwen3moe", experts=ExpertRouting()),
    replace(_QWEN2, name="qwen2moe", experts=replace(_SHARED, sums_to_one=False)),
    replace(_QWEN2, name="olmoe", biases=(), head="always", experts=_ROUTED_AS_SCORED),
    replace(_GLM4, name="glm4moe", renamed=_POST_ATTENTION, experts=_SHARED_TIMES),
    Architecture(
        "gpt-oss",
        head="always",
        rope_types=("default", "yarn"),
        biases=("qkv", "o"),
        needs_biases=True,
        window_period=2,
        renamed=_POST_ATTENTION,
        experts=ExpertRouting(),
        built_in={"swiglu_alpha": 1.702, "swiglu_limit": 7.0},
    ),
    Architecture(
        "llama4",
        interleaved_rope=True,
        unrotated_period=4,
        rope_types=("default", "llama3"),
        biases=("qkv",),
        window_period=4,
        chunked=True,
        unnormed_at=128,
        experts=ExpertRouting(shared="once", dense="between"),
        built_in=_LLAMA4_BUILT_IN,
    ),
    Architecture(
        "deepseek2",
        interleaved_rope=True,
        partial_rotary=True,
        rope_types=("default", "yarn"),
        experts=replace(_SHARED_TIMES, groups=True),
        built_in={"rope_interleave": True},
    ),
    replace(_QWEN3_5, mixer="tiled_delta_net"),
    replace(_QWEN3_5, name="qwen35moe", mixer="tiled_delta_net", experts=_SHARED),
    replace(_QWEN3_5, name="qwen3next", mixer="delta_net", experts=_SHARED),
    replace(_PHI, name="gptneox", fused_qkv=True, activations=(*_GELU_TANH, "gelu")),
    _GEMMA,
    replace(_LLAMA, name="arcee", activations=("relu2",), biases=()),
    replace(_LLAMA, name="smollm3", biases=(), unrotated_period=4),
    replace(_GLM4, interleaved_rope=True, fused_gate=True),
    replace(_NORMED_AFTER, name="exaone4"),
    replace(_NORMED_AFTER, name="olmo2", head="always"),
    replace(_SQUARE, name="starcoder2", activations=_GELU_TANH, biases=_ALL, needs_biases=True),
    replace(_PHI, name="nemotron", activations=("relu2",), needs_biases=False),
    replace(_PHI, name="stablelm", biases=("qkv",), needs_biases=False),
    replace(_PHI, name="phi2", activations=_GELU_TANH),
    replace(_NEIGHBOURS, name="olmo"),
    replace(_COHERE, name="command-r"),
    replace(_COHERE, name="cohere2", window_period=4),
    replace(_FUSED, name="chatglm", interleaved_rope=True, biases=("qkv",)),
    Architecture("hunyuan-dense"),
    replace(
        _SQUARE,
        name="lfm2",
        optional_attention=True,
        mixer="convolution",
        renamed={"output_norm.weight": "token_embd_norm.weight"},
    ),
)
ARCHITECTURES = {"llama, experts" if x is _LLAMA_EXPERTS else x.name: x for x in _KNOWN}
"""Those that are known, by name; llama has two forms."""

"""What can be said of one of llama.cpp's architectures: how it computes, and what it takes.

llama.cpp reads most shapes from metadata and checks tensors against them, but some it takes
without a word and computes something else: those are what the flags below are about. Found by
running models through it (docs/gguf.md); source: its `src/models/*.cpp`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from nuteprune.model.family import config_number
from nuteprune.model.shape import Shape

BLOCK = 32
"""Weights of a row that Q8_0 and Q4_0 quantize together."""
SUPER_BLOCK = 256
"""Weights of a row that llama.cpp's K-quants store together."""

SILU = frozenset({"silu", "swish"})


@dataclass(frozen=True)
class Experts:
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
    """How experts are weighed is stated: by sigmoids, whether these sum to 1, times what."""
    groups: bool = False
    """Routers may choose groups of experts first."""
    joint_key_norm: bool = False
    """Its norm of keys is as wide as the model."""
    always: bool = True
    """It has no form without experts."""


@dataclass(frozen=True)
class Arch:
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
    pre_norms: bool = True
    """Blocks read a norm of the stream; elsewhere they read it as it is."""
    one_norm: bool = False
    """Both blocks read one norm."""
    fused_qkv: bool = False
    fused_gate: bool = False
    """Gate and up projection are one tensor."""
    square_attention: bool = False
    """Heads x head_dim must be the width."""
    partial_rotary: bool = False
    """Part of each head may be left unrotated."""
    rope_types: frozenset[str] = frozenset({"default"})
    activations: frozenset[str] = SILU
    head: str = "optional"
    """Tensor of the language head: `optional`, `always` there, or `never` (the embedding's)."""
    biases: frozenset[str] = frozenset()
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
    """A model with windows is none that it computes, however short the text."""
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
    latent: bool = False
    """Keys and values come from latents that heads share."""
    unnormed_at: int | None = None
    """With that many experts queries and keys are not normed, otherwise they are."""
    final_norm: str = "output_norm"
    """Name of the norm that the language head reads."""
    mlp_norm: str = "ffn_norm"
    """Name of the norm that the MLP reads."""
    bare_mlp_norm: bool = False
    """It is called so without `.weight`."""
    experts: Experts | None = None
    """What its layers have in place of an MLP."""
    folded: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    """Role of a linear map -> config values that multiply it, and that the architecture knows
    nothing of; `NAME.i` is the i-th of a list."""
    built_in: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    """Config values that it takes for granted."""

    def folded_in(self, role: str, config: Any) -> float:
        """Return what multiplies a role's map, as the architecture does not."""
        found = 1.0
        for name in self.folded.get(role, ()):
            found *= config_number(config, name)
        return found

    @property
    def key(self) -> str:
        """What tells it from the other entries: its name, but where experts are a way to use it."""
        return f"{self.name}, experts" if self.experts and not self.experts.always else self.name

    def attention_scale(self, shape: Shape, head_dim: int) -> float:
        """Return the factor that it puts on products of queries and keys."""
        if len(shape.layers) == self.wide_scale_at:
            return float((shape.hidden // shape.layers[0].heads) ** -0.5)
        return float(head_dim**-0.5)

"""What llama.cpp's architectures can express: data alone.

llama.cpp reads most shapes from metadata and checks tensors against them, but some it takes
without a word and computes something else: those are what the flags below are about. Found by
running models through it (docs/gguf.md); source: its `src/models/*.cpp`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from nuteprune.model.shape import Shape

BLOCK = 32
"""Weights of a row that Q8_0 and Q4_0 quantize together."""
SUPER_BLOCK = 256
"""Weights of a row that llama.cpp's K-quants store together."""

_SILU = frozenset({"silu", "swish"})
_GELU_TANH = frozenset({"gelu_pytorch_tanh", "gelu_new", "gelu_fast"})


@dataclass(frozen=True)
class Experts:
    """How one of llama.cpp's architectures routes tokens to experts."""

    sums_to_one: bool = True
    """Weights of a token's experts are made to sum to 1."""
    own_width: bool = True
    """Their width has a key of its own; elsewhere it is the feed-forward length."""
    shared: bool = False
    """There is a shared expert, weighed by a gate."""
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
    """Every n-th layer has full attention, the others a window; None: no windows."""
    refuses_windows: bool = False
    """A model with windows is none that it computes, however short the text."""
    multipliers: bool = False
    """Scales embeddings, residuals, attention and logits by metadata; elsewhere folded in."""
    wide_scale_at: int | None = None
    """With that many layers, attention is scaled by sqrt(heads / hidden), not by head_dim."""
    convolutions: bool = False
    """Layers without attention are short convolutions over the width, which has a key of theirs."""
    final_norm: str = "output_norm"
    """Name of the norm that the language head reads."""
    experts: Experts | None = None
    """What all of its layers have in place of an MLP."""

    @property
    def key(self) -> str:
        """What tells it from the other entries: its name, but where experts are a way to use it."""
        return f"{self.name}, experts" if self.experts and not self.experts.always else self.name

    def attention_scale(self, shape: Shape, head_dim: int) -> float:
        """Return the factor that it puts on products of queries and keys."""
        if len(shape.layers) == self.wide_scale_at:
            return float((shape.hidden // shape.layers[0].heads) ** -0.5)
        return float(head_dim**-0.5)


_ALL_BIASES = frozenset({"qkv", "o", "mlp"})
_QKV_O = frozenset({"qkv", "o"})
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
    arch.key: arch
    for arch in (
        _LLAMA,
        replace(
            _LLAMA,
            name="deci",
            per_layer=True,
            optional_attention=True,
            biases=_QKV_O,
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
        replace(_LLAMA, biases=_QKV_O, experts=Experts(own_width=False, always=False)),
        replace(
            _LLAMA,
            name="granitemoe",
            multipliers=True,
            biases=frozenset(),
            experts=Experts(own_width=False),
        ),
        replace(_QWEN3, name="qwen3moe", experts=Experts()),
        replace(
            _QWEN3,
            name="qwen2moe",
            square_attention=True,
            biases=frozenset({"qkv"}),
            experts=Experts(sums_to_one=False, shared=True),
        ),
        replace(
            _QWEN3,
            name="olmoe",
            square_attention=True,
            head="always",
            experts=Experts(sums_to_one=False, own_width=False, joint_key_norm=True),
        ),
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
        Arch("gemma", activations=_GELU_TANH, head="never"),
        replace(_LLAMA, name="arcee", activations=frozenset({"relu2"}), biases=frozenset()),
        replace(_LLAMA, name="smollm3", biases=frozenset(), unrotated_period=4),
        Arch(
            "glm4",
            interleaved_rope=True,
            fused_gate=True,
            partial_rotary=True,
            biases=frozenset({"qkv"}),
        ),
        Arch("exaone4", square_attention=True, pre_norms=False, refuses_windows=True),
        Arch("olmo2", pre_norms=False, refuses_windows=True),
        Arch(
            "starcoder2",
            square_attention=True,
            activations=_GELU_TANH,
            biases=_ALL_BIASES,
            needs_biases=True,
        ),
        Arch(
            "nemotron",
            square_attention=True,
            activations=frozenset({"relu2"}),
            partial_rotary=True,
            head="always",
            biases=_ALL_BIASES,
        ),
        Arch("stablelm", partial_rotary=True, head="always", biases=frozenset({"qkv"})),
        Arch(
            "phi2",
            square_attention=True,
            activations=_GELU_TANH,
            partial_rotary=True,
            head="always",
            biases=_ALL_BIASES,
            needs_biases=True,
            one_norm=True,
        ),
        Arch("olmo", square_attention=True, interleaved_rope=True),
        Arch(
            "command-r", square_attention=True, interleaved_rope=True, head="never", one_norm=True
        ),
        Arch(
            "cohere2",
            square_attention=True,
            interleaved_rope=True,
            head="never",
            one_norm=True,
            window_period=4,
        ),
        Arch(
            "chatglm",
            square_attention=True,
            interleaved_rope=True,
            fused_qkv=True,
            fused_gate=True,
            partial_rotary=True,
            biases=frozenset({"qkv"}),
        ),
        Arch("hunyuan-dense"),
        Arch(
            "lfm2",
            square_attention=True,
            optional_attention=True,
            convolutions=True,
            final_norm="token_embd_norm",
        ),
    )
}

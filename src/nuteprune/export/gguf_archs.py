"""What llama.cpp's architectures can express: data alone."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from nuteprune.export.gguf_arch import Arch, Experts

_GELU_TANH = frozenset({"gelu_pytorch_tanh", "gelu_new", "gelu_fast"})
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
_QWEN3_5 = Arch(
    "qwen35",
    partial_rotary=True,
    optional_attention=True,
    mixer="tiled_delta_net",
    mlp_norm="post_attention_norm",
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
        replace(_LLAMA, name="granite", multipliers=True, optional_rope=True),
        replace(
            _LLAMA,
            name="granitehybrid",
            multipliers=True,
            rope_types=frozenset({"default"}),
            biases=frozenset(),
            optional_attention=True,
            optional_rope=True,
            mixer="mamba2",
            built_in=MappingProxyType({"mamba_expand": 2}),
        ),
        Arch(
            "falcon-h1",
            mixer="mamba2",
            bare_mlp_norm=True,
            folded=MappingProxyType(
                {
                    "embedding": ("embedding_multiplier",),
                    "q": ("attention_in_multiplier",),
                    "k": ("attention_in_multiplier", "key_multiplier"),
                    "v": ("attention_in_multiplier",),
                    "o": ("attention_out_multiplier",),
                    "gate": ("mlp_multipliers.0",),
                    "down": ("mlp_multipliers.1",),
                    **{
                        f"mixer.{i}": ("ssm_in_multiplier", f"ssm_multipliers.{i}")
                        for i in range(5)
                    },
                    "mixer.out": ("ssm_out_multiplier",),
                }
            ),
        ),
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
            experts=Experts(sums_to_one=False, shared="own"),
        ),
        replace(
            _QWEN3,
            name="olmoe",
            square_attention=True,
            head="always",
            experts=Experts(sums_to_one=False, own_width=False, joint_key_norm=True),
        ),
        replace(
            _QWEN3,
            name="glm4moe",
            rope_types=frozenset({"default"}),
            partial_rotary=True,
            biases=frozenset({"qkv"}),
            mlp_norm="post_attention_norm",
            experts=Experts(shared="times", dense="first", states_weights=True),
        ),
        Arch(
            "gpt-oss",
            head="always",
            rope_types=frozenset({"default", "yarn"}),
            biases=_QKV_O,
            needs_biases=True,
            window_period=2,
            mlp_norm="post_attention_norm",
            experts=Experts(),
            built_in=MappingProxyType({"swiglu_alpha": 1.702, "swiglu_limit": 7.0}),
        ),
        Arch(
            "llama4",
            interleaved_rope=True,
            unrotated_period=4,
            rope_types=frozenset({"default", "llama3"}),
            biases=frozenset({"qkv"}),
            window_period=4,
            chunked=True,
            unnormed_at=128,
            experts=Experts(shared="once", dense="between"),
            built_in=MappingProxyType(
                {
                    "attention_chunk_size": 8192,
                    "attn_temperature_tuning": True,
                    "floor_scale": 8192,
                    "attn_scale": 0.1,
                }
            ),
        ),
        Arch(
            "deepseek2",
            interleaved_rope=True,
            partial_rotary=True,
            rope_types=frozenset({"default", "yarn"}),
            latent=True,
            experts=Experts(shared="times", dense="first", states_weights=True, groups=True),
            built_in=MappingProxyType({"rope_interleave": True}),
        ),
        _QWEN3_5,
        replace(_QWEN3_5, name="qwen35moe", experts=Experts(shared="own")),
        replace(_QWEN3_5, name="qwen3next", mixer="delta_net", experts=Experts(shared="own")),
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
        Arch(
            "olmo2",
            square_attention=True,
            pre_norms=False,
            head="always",
            refuses_windows=True,
        ),
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
        Arch(
            "stablelm",
            square_attention=True,
            partial_rotary=True,
            head="always",
            biases=frozenset({"qkv"}),
        ),
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
            mixer="convolution",
            final_norm="token_embd_norm",
        ),
    )
}

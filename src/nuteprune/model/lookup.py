"""Which family a model type is of, or why none, and which models wrap one of a family."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, TypeVar

from nuteprune.errors import UserError
from nuteprune.model.families import FAMILIES
from nuteprune.model.family import PREFIX, Family

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Counts of feed-forward networks that a router chooses from."""
LATENT = ("kv_lora_rank", "o_lora_rank")
"""Ranks of the projections by which queries, keys and values share a latent vector."""
RECURRENT = (
    "conv_L_cache",
    "linear_conv_kernel_dim",
    "lru_width",
    "mamba_d_state",
    "ssm_state_size",
    "state_size",
)
"""Sizes of layers that carry a state from token to token in place of attention."""
RECURRENT_LAYERS = {"conv", "hybrid", "linear_attention", "mamba", "recurrent"}
"""Words for them in lists of layer types."""
ENCODERS = ("type_vocab_size", "sinusoidal_pos_embds")
"""Settings that encoders such as BERT have, and no decoder."""
OTHER_MODALITIES = ("vision_config", "audio_config", "text_config")
"""Parts of a model for several modalities."""

_OWN: dict[str, Family] = {}
"""Entries that users brought along, for as long as this process runs."""


def family_named(model_type: str, config: Mapping[str, Any] | None = None) -> Family:
    """Return the family of a config's `model_type`.

    Args:
        model_type: its name, that of a pruned checkpoint too.
        config: all of the config, so that a refusal can say what the model is.

    Raises:
        UserError: if the type is not supported; says why, and what to do.
    """
    model_type = model_type.removeprefix(PREFIX)
    if found := _OWN.get(model_type) or FAMILIES.get(model_type):
        return found
    raise UserError(
        f"model type {model_type!r} is not supported{_why_not(model_type, config or {})}"
    )


def bring_along(family: Family) -> None:
    """Register a user's entry for a family in this process."""
    _OWN[family.model_type] = family


def brought_along(model_type: str) -> Family | None:
    """Return the entry that a user brought along for a model type, None if none did."""
    return _OWN.get(model_type.removeprefix(PREFIX))


def all_brought_along() -> tuple[Family, ...]:
    """Return the entries that users brought along."""
    return tuple(_OWN.values())


@contextmanager
def knowing(family: Family) -> Iterator[None]:
    """Register an entry for a family within the context."""
    before = dict(_OWN)
    bring_along(family)
    try:
        yield
    finally:
        _OWN.clear()
        _OWN.update(before)


def why_never(config: Mapping[str, Any]) -> str | None:
    """Return why no family entry can describe a config, None if one might."""
    within = language_model_within(config)
    if within in FAMILIES:
        return (
            f"it is a model of several modalities around a language model of type {within}, "
            f"which is supported. Pass a checkpoint of that language model alone"
        )
    if within is not None:
        around = f" around a language model of type {within}" if within else ""
        return f"it is a model of several modalities{around}"
    if is_encoder(config):
        return "it is an encoder, no decoder-only language model"
    if parts := parts_without_gates(config):
        return f"it has {', '.join(parts)}, which no gate here can cut"
    return None


def _why_not(model_type: str, config: Mapping[str, Any]) -> str:
    """Return what follows "not supported" in a refusal: what the model is, or what is like it."""
    supported = f"supported: {', '.join(FAMILIES)}"
    if never := why_never(config):
        return f": {never}" if "Pass a checkpoint" in never else f": {never}; {supported}"
    longer = [name for name in FAMILIES if name.startswith(f"{model_type}_")]
    near = longer or get_close_matches(model_type, FAMILIES, n=1)
    hint = f" (nearest: {near[0]})" if near else ""
    return (
        f"{hint}; {supported}. `nuteprune family MODEL` proposes an entry for it, which prune "
        "--family takes"
    )


def parts_without_gates(config: Mapping[str, Any]) -> list[str]:
    """Return the parts in a config that no gate can cut; empty for a plain decoder.

    Args:
        config: `config.json`, or a config's `to_dict()`.
    """
    experts = [of.get(x) for of in (config, config.get("ffn_config") or {}) for x in EXPERTS]
    listed = [config.get(x) for x in ("layer_types", "layers_block_type", "block_types")]
    kinds = {str(kind) for kinds in listed if isinstance(kinds, list) for kind in kinds}
    recurrent = kinds & RECURRENT_LAYERS or any(config.get(name) for name in RECURRENT)
    switched = config.get("activation_sparsity_pattern") or ()
    parts = {
        "a mixture of experts (MoE)": any(isinstance(x, int) and x > 1 for x in experts),
        "multi-head latent attention (MLA)": any(config.get(name) for name in LATENT),
        "state-space, recurrent or convolutional layers": recurrent,
        "embeddings that each layer reads besides the residual stream": config.get(
            "hidden_size_per_layer_input"
        ),
        "layers that attend to keys and values of earlier ones": config.get("num_kv_shared_layers"),
        "neurons that are switched off by how all of them compare": any(switched),
        "an encoder": config.get("is_encoder_decoder"),
    }
    return [part for part, there in parts.items() if there]


def language_model_within(config: Mapping[str, Any]) -> str | None:
    """Return the model type of the language model that a multimodal model wraps, None for others.

    It is empty where the config does not name it.
    """
    if not any(isinstance(config.get(name), Mapping) for name in OTHER_MODALITIES):
        return None
    text = config.get("text_config")
    return str(text.get("model_type", "")) if isinstance(text, Mapping) else ""


def is_encoder(config: Mapping[str, Any]) -> bool:
    """Return whether a config is of an encoder such as BERT, which reads text and writes none."""
    named = [str(name) for name in config.get("architectures") or ()]
    masked = any(name.endswith("ForMaskedLM") for name in named)
    alone = not (config.get("is_decoder") or config.get("is_encoder_decoder"))
    return alone and (masked or any(name in config for name in ENCODERS))


# -- models of several modalities, which hold a language model

_FILES = (("language_model.model.", "model."), ("model.language_model.", "model."))
"""What tensors of a language model begin with in a wrapper's files -> in its own."""
_HEADS = (("language_model.lm_head.", "lm_head."), ("lm_head.", "lm_head."))
KEY_MAPPING = {f"^{theirs}".replace(".", r"\."): own for theirs, own in (*_FILES, _HEADS[0])}
"""The same as transformers' `from_pretrained` takes it."""

T = TypeVar("T")


@dataclass(frozen=True)
class Wrapper:
    """A model type of several modalities around a language model of some family.

    Args:
        model_type: the config's.
        conditional: the class of its checkpoints.
        inside: what the names of the language model's base begin with in that class.
        head: what the names of its head begin with.
    """

    model_type: str
    conditional: str
    inside: str = "model.language_model."
    head: str = "lm_head."

    def name_of(self, name: str) -> str:
        """Return the name of a language model's tensor in the wrapper."""
        return _renamed(name, (("model.", self.inside), ("lm_head.", self.head))) or name


WRAPPERS = {
    x.model_type: x
    for x in (
        Wrapper("gemma3", "Gemma3ForConditionalGeneration"),
        Wrapper("qwen3_5", "Qwen3_5ForConditionalGeneration"),
        Wrapper("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration"),
        Wrapper("mistral3", "Mistral3ForConditionalGeneration"),
        Wrapper(
            "llama4",
            "Llama4ForConditionalGeneration",
            inside="language_model.model.",
            head="language_model.lm_head.",
        ),
    )
}


def wrapper_of(model_type: str) -> Wrapper | None:
    """Return the wrapper of a config's `model_type`, that of a pruned checkpoint too."""
    return WRAPPERS.get(model_type.removeprefix(PREFIX))


def own_name(name: str) -> str | None:
    """Return the name of a wrapper's tensor in its language model, None if it is not in it."""
    return _renamed(name, (*_FILES, *_HEADS))


def _renamed(name: str, beginnings: Iterable[tuple[str, str]]) -> str | None:
    """Return a name with another beginning, old -> new, None if it begins with none."""
    found = (new + name.removeprefix(old) for old, new in beginnings if name.startswith(old))
    return next(found, None)


def of_language_model(tensors: Mapping[str, T]) -> dict[str, T]:
    """Return the tensors of a checkpoint's language model, by its own names."""
    if not any("language_model." in name for name in tensors):
        return dict(tensors)
    return {own: x for name, x in tensors.items() if (own := own_name(name)) is not None}

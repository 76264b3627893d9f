"""Models of several modalities: which hold a language model, and what its tensors are called."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from nuteprune.model.family import PREFIX

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

"""Puts pruned language models back into the models of several modalities that they are from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from nuteprune.errors import UserError
from nuteprune.export import modeling_pruned
from nuteprune.export.config import FREE_SHAPE_KEYS, free_shape_names
from nuteprune.export.hub import file_of
from nuteprune.export.loading import class_of
from nuteprune.model.family import PREFIX
from nuteprune.model.lookup import Wrapper, own_name, wrapper_of

PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)
"""What turns images into tensors, beside the tokenizer's own files."""


def wrapped_config(whole: PreTrainedConfig, text: PreTrainedConfig) -> PreTrainedConfig:
    """Return a wrapper's config around a pruned language model's.

    Args:
        whole: the wrapper's config, stock or pruned; it is not changed.
        text: the pruned language model's.
    """
    wrapper = wrapper_of(whole.model_type)
    assert wrapper is not None
    stock: Any = CONFIG_MAPPING[wrapper.model_type]
    given = text.to_dict()
    dropped = (*FREE_SHAPE_KEYS, "architectures", "transformers_version")
    inner = {key: x for key, x in given.items() if key not in dropped}
    inner["model_type"] = given["model_type"].removeprefix(PREFIX)
    values = {key: x for key, x in whole.to_dict().items() if key not in FREE_SHAPE_KEYS}
    values |= {"model_type": wrapper.model_type, "architectures": [wrapper.conditional]}
    values["tie_word_embeddings"] = text.tie_word_embeddings  # the model's, whatever was stated
    if "pruned" not in given:
        return stock.from_dict({**values, "text_config": inner})  # type: ignore[no-any-return]
    path = wrapper.inside + given["pruned"]["layers"].partition(".")[2]
    inner["pruned"] = given["pruned"] | {"layers": path}
    inner["pruned"]["per_layer_config"] = given["per_layer_config"]
    # By the second, lm-evaluation-harness asks for it.
    autos = ("AutoModelForImageTextToText", "AutoModelForCausalLM")
    values |= free_shape_names(wrapper.model_type, **dict.fromkeys(autos, wrapper.conditional))
    config_class = getattr(modeling_pruned, f"Pruned{stock.__name__}")
    return config_class.from_dict({**values, "text_config": inner})  # type: ignore[no-any-return]


def processor_files(source: str) -> list[Path]:
    """Return the files of a checkpoint's image processor.

    Where the hub cannot be asked, these are the files in the cache.

    Raises:
        UserError: if the hub cannot be asked, and none is in the cache.
    """
    found, untold = [], None
    for name in PROCESSOR_FILES:
        try:
            path = file_of(source, name)
        except UserError as error:
            untold = error
        else:
            found += [path] if path else []
    if untold and not found:
        raise untold
    return found


class Around:
    """The parts of a checkpoint outside its language model; they stay bit for bit as they are.

    Args:
        source: the checkpoint, a folder or the name of a model on the hub.
        wrapper: the kind of wrapper that it is.

    Raises:
        UserError: if the hub cannot say which files read its images.
    """

    def __init__(self, source: str, wrapper: Wrapper) -> None:
        self.source, self.wrapper = source, wrapper
        # Now, so that a run does not end without them.
        self._processor = processor_files(source)

    def check(self) -> None:
        """Refuse a checkpoint that lacks tensors outside its language model.

        Raises:
            UserError: naming a tensor that is missing, or of another size.
        """
        self._load("auto")

    def put(self, small: PreTrainedModel) -> PreTrainedModel:
        """Return the whole model around a pruned language model, fit to be saved.

        Args:
            small: the language model, in the dtype that the checkpoint is stored in.

        Raises:
            UserError: if tensors of the checkpoint do not fit around this language model.
        """
        whole = self._load(small.dtype)
        outside = {k: x for k, x in whole.state_dict().items() if own_name(k) is None}
        config = wrapped_config(whole.config, small.config)
        with torch.device("meta"):
            model: Any = class_of(config.model_type)(config)
        inside = {self.wrapper.name_of(k): x for k, x in small.state_dict().items()}
        missing, unexpected = model.load_state_dict(outside | inside, strict=False, assign=True)
        head = f"{self.wrapper.head}weight"  # missing where it is the embedding
        if wrong := [*unexpected, *(x for x in missing if x != head)]:
            raise UserError(f"{self.source} does not go around its language model: {min(wrong)}")
        model.tie_weights()
        model.generation_config = whole.generation_config
        return model.eval()  # type: ignore[no-any-return]

    def _load(self, dtype: torch.dtype | str) -> PreTrainedModel:
        values, _ = PreTrainedConfig.get_config_dict(self.source)
        how: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        whole_class: Any = class_of(values["model_type"])
        whole, info = whole_class.from_pretrained(self.source, dtype=dtype, **how)
        unfit = {*info["missing_keys"], *(x[0] for x in info["mismatched_keys"])}
        if lost := sorted(x for x in unfit if own_name(x) is None):
            raise UserError(
                f"{self.source} has no {lost[0]} of the right size, so what is around its language "
                "model cannot be kept; pass a whole checkpoint, or --set text_only=true"
            )
        return whole  # type: ignore[no-any-return]

    def copy_processor(self, folder: Path) -> None:
        """Copy the image processor's files into a folder."""
        for path in self._processor:
            shutil.copyfile(path, folder / path.name)

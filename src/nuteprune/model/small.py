"""Small models from a config, with few layers and small sizes, and what flows where in them.

That is read off one forward pass: who reads what another puts out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from nuteprune.errors import UserError, in_one_line
from nuteprune.model.anatomy import silence_dropout
from nuteprune.model.family import NAMES

SIZES = {"hidden": 96, "heads": 4, "kv_heads": 2, "neurons": 112, "head_dim": 16}
"""Sizes of a small model: no two axes of a layer are alike, if the class has them apart."""
LAYERS, VOCABULARY, POSITIONS, WINDOW, ROTATED = 3, 128, 64, 6, 8
TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
LARGEST = 10_000_000
"""Parameters up to which a model counts as small."""
_LEFT_OUT = {
    *("architectures", "auto_map", "dtype", "quantization_config", "transformers_version"),
    *("_name_or_path", "torch_dtype", "per_layer_config", "decoder_start_token_id"),
}
_SCALING = {
    *("factor", "attention_factor", "short_factor", "long_factor", "beta_fast", "beta_slow"),
    *("low_freq_factor", "high_freq_factor", "mscale", "mscale_all_dim", "type", "truncate"),
    "max_position_embeddings",
}
"""Rotary parameters for longer texts, which the default kind has not."""


def names_of(values: Mapping[str, Any]) -> dict[str, str]:
    """Return our words for dimensions -> the attributes of a config that states them."""
    found = {word: [name for name in names if name in values] for word, names in NAMES.items()}
    return {word: names[0] for word, names in found.items() if names}


def small_config(config: PreTrainedConfig, **sizes: int | None) -> PreTrainedConfig:
    """Return a config of the same type with few layers and small sizes.

    Args:
        config: any config.
        **sizes: replacements for sizes of `SIZES`; None: not stated.

    Raises:
        UserError: if the config class does not take these sizes.
    """
    old = config.to_dict()
    names = names_of(old)
    wanted: dict[str, int | None] = {**SIZES, **sizes}
    values = {k: _shrunk(k, v) for k, v in old.items() if k not in _LEFT_OUT}
    width = old.get(names.get("hidden", ""))
    for key, value in old.items():  # as OPT's word_embed_proj_dim, which is the width
        if type(value) is int and SIZES["hidden"] < value == width:
            values[key] = wanted["hidden"]
    values |= {name: wanted[word] for word, name in names.items() if word in wanted}
    values["head_dim"] = wanted["head_dim"]
    if wanted["head_dim"] is None:
        del values["head_dim"]
    if "layers" in names:
        values[names["layers"]] = LAYERS
        whole = old[names["layers"]]
        lists = {k: v for k, v in old.items() if isinstance(v, list) and len(v) == whole}
        values |= {key: _some_of_each(items) for key, items in lists.items()}
    with _told(f"{type(config).__name__} takes no small sizes"):  # by validators
        return type(config).from_dict(values)


def _some_of_each(items: list[Any]) -> list[Any]:
    """Return as many items as a small model has layers, of every kind that there is."""
    kinds = list(dict.fromkeys(map(str, items)))
    firsts = [next(x for x in items if str(x) == kind) for kind in kinds]
    return [*firsts, *items][:LAYERS]


def _shrunk(key: str, value: Any) -> Any:
    """Return a config's value as a small model wants it, where its size follows from nothing."""
    if isinstance(value, dict) and key == "rope_parameters":
        return _plain_rope(value)
    if isinstance(value, float) and "drop" in key:
        return 0.0
    if key == "rotary_dim":
        return ROTATED
    if key in TOKENS:
        return TOKENS[key]
    if type(value) is not int:
        return value
    if key.endswith("_token_id"):
        return 0
    if key == "vocab_size" or key.startswith("vocab_size_"):
        return VOCABULARY
    if "position" in key and value > POSITIONS:
        return POSITIONS
    return WINDOW if "window" in key and value > WINDOW else value


def _plain_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return rotary parameters without values per feature or for longer texts."""
    if any(isinstance(x, dict) for x in rope.values()):  # one set for each kind of attention
        return {k: _plain_rope(x) if isinstance(x, dict) else x for k, x in rope.items()}
    kept = {k: v for k, v in rope.items() if k not in _SCALING}
    return {**kept, "rope_type": "default"}


def small_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a causal LM of a small config, all parameters random: norms and biases too.

    Raises:
        UserError: if transformers has no causal LM of that type, or it cannot be built.
    """
    with _told(f"no small {config.model_type} model can be built"):  # by its constructor
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if size > LARGEST:
            raise UserError(
                f"a small {config.model_type} would still have {size:,} parameters: its config "
                "states sizes by names that are not known here"
            )
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    silence_dropout(model)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            around_one = parameter.dim() == 1 and bool((parameter == 1).all())
            noise = 0.2 * torch.randn(parameter.shape, generator=random)
            parameter.copy_(noise + around_one)
    return model  # type: ignore[no-any-return]


def base_config(config: PreTrainedConfig) -> tuple[PreTrainedConfig, bool]:
    """Return a small config that runs, and whether heads must make up its width.

    Raises:
        UserError: if none is found.
    """
    problems = []
    filling = SIZES["hidden"] // SIZES["heads"]
    for head_dim in (SIZES["head_dim"], None, filling):
        try:
            small = small_config(config, head_dim=head_dim)
            with torch.no_grad():
                small_model(small)(torch.arange(3, 10)[None], use_cache=False)
            return small, head_dim == filling
        except UserError as error:
            problems.append(str(error))
        except Exception as error:  # whatever a forward pass of sizes that do not fit raises
            problems.append(f"a small {config.model_type} does not compute: {in_one_line(error)}")
    raise UserError(problems[0])


def config_named(model_type: str) -> PreTrainedConfig:
    """Return the default config of a model type.

    Raises:
        UserError: if transformers does not know it.
    """
    if model_type not in CONFIG_MAPPING:
        raise UserError(f"transformers knows no model type {model_type!r}")
    with _told(f"{model_type} has no default config"):  # by validators
        return CONFIG_MAPPING[model_type]()


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Raise whatever transformers raises as a UserError that says what failed."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: {type(error).__name__}: {in_one_line(error)}") from error


@dataclass(frozen=True)
class Passed:
    """What one forward pass showed; paths of modules in a layer are relative to the layer.

    Args:
        layers: path of the decoder layers.
        embedding: path of the token embedding.
        final_norm: path of the norm that the language head reads.
        called: linear modules of the first layer, in the order in which they were called.
        norms: norms of the first layer, in that order.
        inputs: the input of each module of the first layer.
        outputs: its output.
        embedded: the rows of the embedding matrix.
        entered: the input of the first layer.
        raw: the output of the head's matrix.
        logits: the output of the model.
    """

    layers: str
    embedding: str
    final_norm: str
    called: tuple[str, ...]
    norms: tuple[str, ...]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    embedded: Tensor
    entered: Tensor
    raw: Tensor
    logits: Tensor

    def reads(self, reader: str, source: str) -> bool:
        """Return whether a module read the output of another."""
        ours, theirs = self.inputs.get(reader), self.outputs.get(source)
        return ours is not None and theirs is not None and _same(ours, theirs)


@torch.no_grad()
def watch(model: PreTrainedModel) -> Passed:
    """Run a small model once, and return what was seen.

    Raises:
        UserError: if it has no list of decoder layers, or no head that reads a norm.
    """
    layers = _layers_of(model)
    first = next(model.get_submodule(layers).children())
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    inputs: dict[nn.Module, Tensor] = {}
    outputs: dict[nn.Module, Tensor] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
        given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        made = output[0] if isinstance(output, tuple) else output
        if given is not None and isinstance(made, Tensor):
            inputs.setdefault(module, given)
            outputs.setdefault(module, made)

    tokens = torch.arange(3, 3 + 9)[None] % VOCABULARY
    with ExitStack() as stack:
        for module in model.modules():
            stack.enter_context(module.register_forward_hook(note, with_kwargs=True))
        logits = model(input_ids=tokens, use_cache=False).logits
    names = {module: name for name, module in model.named_modules()}
    inside = {module: name for name, module in first.named_modules() if name}
    norms = [x for x in inputs if x in names and _is_norm(x)]
    outer = [x for x in norms if head in inputs and _same(outputs[x], inputs[head])]
    if not outer or embedding not in outputs:
        raise UserError(f"the language head of {model.config.model_type} reads no norm")
    return Passed(
        layers=layers,
        embedding=names[embedding],
        final_norm=names[outer[-1]],
        called=tuple(inside[x] for x in inputs if x in inside and isinstance(x, nn.Linear)),
        norms=tuple(inside[x] for x in norms if x in inside),
        inputs={inside[x]: value for x, value in inputs.items() if x in inside},
        outputs={inside[x]: value for x, value in outputs.items() if x in inside},
        embedded=embedding.weight[tokens],
        entered=inputs[first],
        raw=outputs[head],
        logits=logits,
    )


def _layers_of(model: PreTrainedModel) -> str:
    """Return the path of a model's decoder layers."""
    found: list[str] = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == LAYERS
        and all(any(isinstance(x, nn.Linear) for x in layer.modules()) for layer in module)
    ]
    outer = [x for x in found if not any(x.startswith(f"{y}.") for y in found)]
    if len(outer) != 1:
        raise UserError(
            f"{model.config.model_type} has {len(outer)} lists of layers with linear modules, "
            "where a decoder has one"
        )
    return outer[0]


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not list(module.children())


def _same(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and torch.equal(ours, theirs)

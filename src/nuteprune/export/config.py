"""Makes a config for a shape: a stock one if possible, else one with counts per layer.

And the config of the language model in a wrapper, which the wrapper's config states.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, MODEL_MAPPING, PreTrainedConfig

from nuteprune.errors import UserError
from nuteprune.export import modeling_pruned
from nuteprune.model.family import PREFIX, Family, Projection
from nuteprune.model.lookup import family_named, wrapper_of
from nuteprune.model.shape import COUNTS, LayerShape, Shape

FREE_SHAPE_KEYS = (
    "allow_global_per_layer_attribute_access",
    "auto_map",
    "per_layer_config",
    "pruned",
    "without_code",
)
"""What a config with counts per layer states beside the stock class's values."""
WITHOUT_CODE = {"without_code": {"model_type": ""}}
"""Read in place of all of config.json where its code may not be run, as for a tokenizer alone:
transformers then looks for a config of no type, and would warn of this one's type and counts."""
INVERSE_DIVISOR = "logit_scale"
"""Added where a family divides logits; elsewhere it may be the family's own. vLLM's Transformers
backend knows the inverse alone."""
LONG_ROPE = {"rope_type", "rope_theta", "short_factor", "long_factor", "partial_rotary_factor"}
"""Keys of a long rope that transformers 4 can read in its own form; other ropes have more keys."""
ORIGINAL = "original_max_position_embeddings"
"""The length before it was made longer: some configs state it beside their rope."""


def pruned_config(
    config: PreTrainedConfig, family: Family, shape: Shape, *, epsilon: float | None = None
) -> PreTrainedConfig:
    """Return the config of a model cut to `shape`.

    It is of the stock class wherever that can express the shape, so that every program that knows
    the model type serves the checkpoint. Otherwise it states the counts of each layer and names
    the modeling file that travels with the checkpoint.

    Args:
        config: the config before the cut, stock or pruned; it stays as it is.
        family: the family of the config's model type.
        shape: dimensions of the pruned model.
        epsilon: new epsilon of the norms, None to leave it.

    Returns:
        A new config.

    Raises:
        UserError: if layer 0 has no attention, or no layer has where layers are of several kinds.
    """
    counting = shape.layers if family.mixer else shape.layers[:1]
    if not any(layer.attention for layer in counting):
        raise UserError("layer 0 must keep its attention: generation counts cached tokens there")
    names = family.config_names
    added = {*FREE_SHAPE_KEYS, *([INVERSE_DIVISOR] if family.logit_divisor else [])}
    values = {k: v for k, v in config.to_dict().items() if k not in added}
    values |= family.settles
    values[names["hidden"]] = shape.hidden
    if "head_dim" not in names:  # else the config's `head_dim` is something else, and stays
        values["head_dim"] = family.head_dim(config)
    if epsilon is not None:
        values[names["epsilon"]] = epsilon
    # One count for all layers: what a uniform model has, and the upper bound of any other.
    for word in _count_names(family):
        where = [x for x in shape.layers if word != "neurons" or not x.experts]
        most = max((getattr(x, word) for x in where), default=0)
        if most or family.experts is None:  # no layer of a mixture may be dense
            values[names[word]] = max(1, most)
    if shared := [x.neurons for x in shape.layers if x.experts and "shared_neurons" in names]:
        values[names["shared_neurons"]] = max(shared)
    width = _mixer_width(config, family, shape)
    stock = _stock_config(values, family, shape) if width is None else None
    return stock or _free_config(values, family, shape, width)


def _mixer_width(config: PreTrainedConfig, family: Family, shape: Shape) -> int | None:
    """Return the hidden size that mixers are to be made for where it is not the model's own."""
    if not family.mixer_follows_width:
        return None
    earlier = getattr(config, "pruned", {}).get("blocks", {}).get("mixer", {})
    width: int = earlier.get("width", getattr(config, family.config_names["hidden"]))
    return None if width == shape.hidden else width


def _stock_config(values: dict[str, Any], family: Family, shape: Shape) -> PreTrainedConfig | None:
    """Return a config of the stock class, None if that cannot express the shape."""
    first = shape.layers[shape.first_attention]
    if not (shape.uniform and first.mlp and _shared_fits(values, family, shape)):
        return None
    values = values | {"model_type": family.model_type, "architectures": [family.causal_lm]}
    if family.head_dim_from_hidden:
        head_dim = values.pop("head_dim")
        if first.heads * head_dim != shape.hidden:
            return None
    if family.heads_fill_width and first.heads * values["head_dim"] != shape.hidden:
        return None
    stock = CONFIG_MAPPING[family.model_type]
    return _first_valid(stock, values, family.config_names["heads"], [first.heads])


def _shared_fits(values: dict[str, Any], family: Family, shape: Shape) -> bool:
    """Return whether the stock class gives shared experts the width that they have."""
    times = family.experts.shared_times if family.experts else ""
    if not times:
        return True
    count = values[times] if isinstance(times, str) else times
    return all(x.neurons == x.expert_neurons * count for x in shape.layers if x.experts)


def _free_config(
    values: dict[str, Any], family: Family, shape: Shape, mixer_width: int | None
) -> PreTrainedConfig:
    """Return a config with counts for each layer."""
    stock, name = CONFIG_MAPPING[family.model_type], family.config_names.get("head_dim")
    own_head_dim = {"head_dim": values[name]} if name else {}  # the config's is something else
    values = values | {
        **free_shape_names(family.model_type, AutoModelForCausalLM=family.causal_lm),
        "pruned": _layout(family, mixer_width) | own_head_dim,
        "per_layer_config": {str(i): _stated(family, x) for i, x in enumerate(shape.layers)},
        "allow_global_per_layer_attribute_access": True,
    }
    if family.logit_divisor:
        values[INVERSE_DIVISOR] = 1 / values[family.logit_divisor]
    # At the top level, any head count will do that the stock class takes.
    heads, hidden = family.config_names["heads"], shape.hidden
    choices = [max(1, hidden // values["head_dim"])]
    if not family.head_dim_from_hidden:
        divisors = (x for x in range(values[heads], hidden + 1) if hidden % x == 0)
        choices = [values[heads], *choices, *divisors]
    config_class = getattr(modeling_pruned, f"Pruned{stock.__name__}")
    config = _first_valid(config_class, values, heads, choices)
    if config is None:
        raise UserError(f"{stock.__name__} takes no head count at a hidden size of {hidden}")
    return config


def free_shape_names(model_type: str, **auto_classes: str) -> dict[str, Any]:
    """Return the names by which a config states that its model's layers differ.

    Args:
        model_type: the stock config's.
        auto_classes: transformers' auto classes -> the stock model classes that they give.
    """
    stock = CONFIG_MAPPING[model_type]
    classes = {
        "AutoConfig": stock.__name__,
        "AutoModel": MODEL_MAPPING[stock].__name__,  # type: ignore[attr-defined]
        **auto_classes,
    }
    return {
        "model_type": PREFIX + model_type,
        "architectures": [f"Pruned{next(iter(auto_classes.values()))}"],
        "auto_map": {auto: f"modeling_pruned.Pruned{name}" for auto, name in classes.items()},
        **WITHOUT_CODE,
    }


def _first_valid(
    config_class: type[PreTrainedConfig], values: dict[str, Any], name: str, choices: Iterable[int]
) -> PreTrainedConfig | None:
    """Return the config with the first choice of a value that passes the class's validators."""
    for choice in choices:
        try:
            config = config_class.from_dict(values | {name: choice})
            config.validate()  # subclasses validate only when they are saved
        except (ValueError, StrictDataclassError):
            continue
        return config
    return None


def _count_names(family: Family) -> dict[str, str]:
    """Return the words for a layer's counts that the family knows -> config attribute."""
    return {word: family.config_names[word] for word in COUNTS if word in family.config_names}


def _stated(family: Family, layer: LayerShape) -> dict[str, Any]:
    """Return a layer's entry of `per_layer_config`."""
    words = _count_names(family).items()
    present = {name: count for word, name in words if (count := getattr(layer, word))}
    blocks = {"attention": layer.mixes, "mlp": layer.mlp}
    blocks |= {"mixer": layer.mixes} if family.mixer else {}
    skip = [block for block, is_there in blocks.items() if not is_there]
    return {**present, "skip": skip} if skip else present


def _layout(family: Family, mixer_width: int | None) -> dict[str, Any]:
    """Return what `modeling_pruned.py` must know of a family; what is empty is left out."""

    def axes(projections: tuple[Projection, ...]) -> dict[str, str]:
        return {x.path: f"{x.columns} -> {' '.join(x.rows)}" for x in projections}

    def block(
        modules: Iterable[str],
        norms: Iterable[str],
        projections: tuple[Projection, ...],
        **more: Any,
    ) -> dict[str, Any]:
        stated = {"modules": [*modules], "norms": [*norms], "projections": axes(projections)}
        return stated | {key: x for key, x in more.items() if x}

    experts = family.experts
    mlp = family.mlp + family.mlp_of(mixture=True)
    pair = experts is not None and experts.gives_pair
    per_head = [*family.per_head]
    blocks = {
        "attention": block(
            [family.attention_module], family.attention_norms, family.attention, per_head=per_head
        ),
        "mlp": block(family.mlp_modules, family.mlp_norms, mlp, pair=pair),
    }
    if family.mixer:
        blocks["mixer"] = block([family.mixer_module], (), family.mixer, width=mixer_width)
    layout = {"layers": family.layers, "counts": _count_names(family), "blocks": blocks}
    if experts is not None:
        layout["experts"] = {
            "router": experts.router,
            "projections": axes(experts.projections),
            "transposed": experts.transposed,
        }
    return layout


def language_config(values: Mapping[str, Any]) -> PreTrainedConfig:
    """Return the config of the language model in a wrapper.

    Args:
        values: the wrapper's config.json.

    Raises:
        UserError: if it has none, or one of a type that is not supported.
    """
    wrapper = wrapper_of(str(values["model_type"]))
    assert wrapper is not None
    if not isinstance(values.get("text_config"), Mapping):
        raise UserError(f"a {wrapper.model_type} config without text_config has no language model")
    stock: Any = CONFIG_MAPPING[wrapper.model_type]
    config = stock.from_dict({**values, "model_type": wrapper.model_type})
    text: PreTrainedConfig = config.get_text_config()
    text.tie_word_embeddings = config.tie_word_embeddings
    family = family_named(text.model_type, text.to_dict())
    if (pruned := getattr(text, "pruned", None)) is None:
        return text
    layout = {**pruned, "layers": family.layers}
    free = {
        "model_type": PREFIX + family.model_type,
        "architectures": [f"Pruned{family.causal_lm}"],
        "per_layer_config": layout.pop("per_layer_config"),
        "pruned": layout,
        "allow_global_per_layer_attribute_access": True,
    }
    config_class = getattr(modeling_pruned, f"Pruned{type(text).__name__}")
    return config_class.from_dict({**text.to_dict(), **free})  # type: ignore[no-any-return]


def keys_of_4(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the keys of a config that transformers 4 calls by another name.

    Without them it silently takes defaults.
    """
    family = family_named(config.model_type)
    count = family.experts.count_in_4 if family.experts else ""
    experts = {count: getattr(config, family.config_names["experts"])} if count else {}
    return _rope_keys_of_4(config, family) | experts


def _rope_keys_of_4(config: PreTrainedConfig, family: Family) -> dict[str, Any]:
    """Return the rope keys of transformers 4."""
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return {}
    # Some types have one set of parameters per kind of attention.
    full, sliding = rope.get("full_attention", rope), rope.get("sliding_attention")
    names = family.rope_names
    keys = {name: full[key] for key, name in names.items() if key in full}
    if sliding:
        keys["rope_local_base_freq"] = sliding["rope_theta"]
    if full["rope_type"] == "default":
        return keys
    beside = {ORIGINAL} if hasattr(config, ORIGINAL) else set()
    if full["rope_type"] == "longrope" and not set(full) - LONG_ROPE - beside:  # just these three
        factors = {key: full[key] for key in ("short_factor", "long_factor")}
        return keys | {"rope_scaling": {"type": "longrope", **factors}}
    return keys | {"rope_scaling": {k: v for k, v in full.items() if k not in names}}

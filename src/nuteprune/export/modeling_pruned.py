# Copyright 2026 The nuteprune authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
# mypy: ignore-errors
"""Decoders whose layers differ in size: a stock transformers model with its layers resized.

This file travels with a checkpoint. It reads no file and opens no connection: it builds the stock
model and gives each decoder layer the dimensions that config.json states. `PrunedXyz` is made from
transformers' `Xyz` when asked for. What a layer consists of is data, under "pruned" in config.json:

    layers  path of the decoder layers in the causal LM
    counts  our word ("heads", "neurons", perhaps "kv_heads", "experts") -> the config's attribute
    blocks  for "attention", "mlp" and perhaps "mixer" (what else mixes tokens): the modules that
            make up the block, the norms that serve it alone, and its projections with their axes,
            "inputs -> outputs"; "width" is the hidden size that a mixer is made for, if another;
            "per_head" are parameters with an entry for each head; "pair": it gives two outputs
    head_dim  features of a head that are written, where the config's are others
    experts  where the model is a mixture: its router, and its projections, each one tensor for all
            experts of a layer; "transposed" where that is (experts, inputs, outputs)

An axis is "hidden", "neurons", "q" or "kv" (heads x head_dim), "qkv" or "qgate" (heads x 3 or 2
head_dim), "expert_neurons" (of each expert), or "mixer" or "latent" (whatever is there); "hidden ->
q kv kv" is one linear module that yields all three. Layers that lack a module stay as they are.
Each layer's counts are in "per_layer_config", as transformers >= 5.14 defines it; "skip" names
the blocks that were removed.
"""

import torch
import transformers
from torch import nn


class Zeros(nn.Module):
    """Stands where a removed MLP or mixer wrote to the residual stream: adds nothing to it."""

    def __init__(self, removed):
        super().__init__()
        for name, buffer in removed.named_buffers(recurse=False):  # models set some from outside
            self.register_buffer(name, buffer, persistent=False)

    def forward(self, hidden_states, *args, **kwargs):
        """Return zeros of the block's output shape."""
        return torch.zeros_like(hidden_states)


class ZerosAndNone(nn.Module):
    """Stands where attention, or an MLP that gives a pair, was removed: no output, no weights.

    Its name must not contain "Attention": transformers reads this file's text for classes that do,
    and would take the model for one whose attention implementation cannot be changed.
    """

    def __init__(self, removed):
        super().__init__()
        # Some decoder layers read plain attributes of the module, such as `is_sliding`.
        self.__dict__.update({k: v for k, v in vars(removed).items() if not k.startswith("_")})

    def forward(self, hidden_states, *args, **kwargs):
        """Return zeros of the block's output shape, and no attention weights."""
        names = ("cache", "past_key_values", "past_key_value", "layer_past")
        cache = next((kwargs[x] for x in names if kwargs.get(x) is not None), None)
        if cache is not None:  # masks are as long as what one layer has cached, perhaps this one
            layer = (*cache.layers[self.layer_idx : self.layer_idx + 1], None)[0]
            shape = layer.keys.shape if getattr(layer, "is_initialized", False) else (0, 1, 0, 1)
            rows, tokens = hidden_states.shape[:2]
            nothing = hidden_states.new_zeros(rows, shape[1], tokens, shape[3])
            cache.update(nothing, nothing, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class LayerConfig:
    """The config as one layer sees it: the layer's counts, and all else from the model's config.

    A view, not a copy, so that a later change of the attention implementation reaches the layer.
    """

    def __init__(self, config, counts):
        self.__dict__.update(counts, _shared=config)

    def __getattr__(self, name):
        if name.startswith("__") or name == "_shared":  # deepcopy asks before anything is set
            raise AttributeError(name)
        return getattr(self._shared, name)


def counts_by_layer(config):
    """Return each layer's counts by config attribute, and its "skip" list if it has one."""
    # A wrapper's language model states them with the rest; else they are where transformers looks.
    # The serialised form is the one that all versions share: {"0": {"intermediate_size": 8}, ...}
    per_layer = config.pruned.get("per_layer_config") or config.to_dict()["per_layer_config"]
    stated = {int(index): counts for index, counts in per_layer.items()}
    top = {name: getattr(config, name) for name in config.pruned["counts"].values()}
    return [top | stated.get(index, {}) for index in range(config.num_hidden_layers)]


def resize_layers(model, config):
    """Give every decoder layer of a stock model the dimensions that its config states."""
    # The path's first name leads from the causal LM to its base model, which may be the model.
    name, _, path = config.pruned["layers"].partition(".")
    layers = getattr(model, name, model).get_submodule(path)
    for layer, counts in zip(layers, counts_by_layer(config), strict=True):
        skip = counts.pop("skip", ())
        for name, block in config.pruned["blocks"].items():
            if name in skip:
                pair = name == "attention" or block.get("pair")
                remove_block(layer, block, ZerosAndNone if pair else Zeros)
            else:
                resize_block(layer, block, config, counts)
        if "experts" in config.pruned and "mlp" not in skip:
            resize_experts(layer, config.pruned["experts"], config, counts)


def remove_block(layer, block, nothing):
    """Take a block out of a layer, and the norms that served it alone."""
    *inner, last = block["modules"]
    for path in (*inner, *block["norms"]):
        put(layer, path, nn.Identity())
    if (removed := at(layer, last)) is not None:  # else the layer is of another kind
        put(layer, last, nothing(removed))
    if nothing is Zeros and getattr(layer, "is_moe_layer", False):  # it would expect two results
        layer.is_moe_layer = False


def resize_block(layer, block, config, counts):
    """Replace a block's projections by ones of the stated size, and tell its modules the counts."""
    first = block["modules"][0]
    module = at(layer, first)
    if module is None:  # the layer is of another kind
        return
    if "width" in block:
        view = LayerConfig(config, {"hidden_size": block["width"]})
        put(layer, first, type(module)(view, module.layer_idx))
    count = counts_by_word(config, counts)
    heads, kv_heads = count["heads"], count.get("kv_heads", count["heads"])
    head_dim = config.pruned.get("head_dim", config.head_dim)
    axes = {
        "hidden": config.hidden_size,
        "neurons": count.get("neurons", 0),
        "q": heads * head_dim,
        "kv": kv_heads * head_dim,
        "qkv": heads * head_dim * 3,
        "qgate": heads * head_dim * 2,
    }
    for path, shape in block["projections"].items():
        old = at(layer, path)
        if old is None:
            continue
        inputs, outputs = sizes_of(shape, axes, (old.in_features, old.out_features))
        kept = {
            "bias": old.bias is not None,
            "device": old.weight.device,
            "dtype": old.weight.dtype,
        }
        put(layer, path, nn.Linear(inputs, outputs, **kept))
    if any("mixer" in shape for shape in block["projections"].values()):
        return  # heads that it may count are not those of attention
    for path in block.get("per_head", ()):
        parent, _, name = path.rpartition(".")
        resize(layer.get_submodule(parent), name, (heads,))
    told = {
        "num_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_key_value_groups": heads // kv_heads,
        "config": LayerConfig(config, counts),
    }
    for path in block["modules"]:
        module = layer.get_submodule(path)
        for name in told.keys() & vars(module).keys():
            setattr(module, name, told[name])


def resize_experts(layer, experts, config, counts):
    """Give a layer's stacked experts, and its router, the stated sizes; a dense layer has none."""
    router, count = at(layer, experts["router"]), counts_by_word(config, counts)
    axes = {"hidden": config.hidden_size, "expert_neurons": count["expert_neurons"]}
    for path, shape in experts["projections"].items():
        inputs, outputs = sizes_of(shape, axes)
        parent, _, name = path.rpartition(".")
        module = at(layer, parent)
        if module is None or router is None:
            return
        sizes = (inputs, outputs) if experts["transposed"] else (outputs, inputs)
        resize(module, name, (count["experts"], *sizes))
        resize(module, f"{name}_bias", (count["experts"], outputs))
        module.num_experts = count["experts"]
    for name, tensor in (*router.named_parameters(), *router.named_buffers()):
        resize(router, name, (count["experts"], *tensor.shape[1:]))
    router.num_experts = count["experts"]


def resize(module, name, sizes):
    """Replace a module's parameter or buffer, if it has it, by one of other sizes."""
    old = getattr(module, name, None)
    if old is None:
        return
    new = torch.empty(sizes, device=old.device, dtype=old.dtype)
    setattr(module, name, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)


def counts_by_word(config, counts):
    """Return a layer's counts under our words."""
    return {word: counts[name] for word, name in config.pruned["counts"].items()}


def sizes_of(shape, axes, whole=(0, 0)):
    """Return the inputs and outputs of a projection, from its axes: of a mixer or latent, all."""
    sides = zip(shape.split("->"), whole, strict=True)
    return (sum(axes.get(axis, size) for axis in side.split()) for side, size in sides)


def at(module, path):
    """Return what is at a dotted path, None if it is not there."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def put(layer, path, module):
    """Set the module at a dotted path."""
    parent, _, name = path.rpartition(".")
    setattr(layer.get_submodule(parent), name, module)


AUTO_CLASSES = {
    "ForConditionalGeneration": "AutoModelForImageTextToText",
    "ForCausalLM": "AutoModelForCausalLM",
    "Model": "AutoModel",
}


class PrunedConfig:
    """What a pruned config adds to its stock class."""

    def __getattribute__(self, name):
        # The stock constructor and validators read the top level's counts, which is right here.
        # transformers >= 5.14 would warn each user of it, so read them past its check.
        read = super().__getattribute__
        own, stored = read("__dict__"), read("attribute_map").get(name, name)
        is_count = stored in own and stored in own.get("pruned", {}).get("counts", {}).values()
        return own[stored] if is_count else read(name)


class PrunedModel:
    """What a pruned model adds to its stock class."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        # transformers before 4.45 knows no config within another.
        resize_layers(self, getattr(config, "get_text_config", lambda: config)())

    @classmethod
    def is_custom_code(cls):
        """Return False: what stock models set up is set up as in those, buffers too."""
        return False


def keep_file_names(stock, pruned):
    """Read and write tensors under the names that the stock class uses in files."""
    try:
        from transformers import conversion_mapping
    except ImportError:  # transformers 4 uses the modules' own names
        return
    renamings = conversion_mapping.get_checkpoint_conversion_mapping(stock.__name__)
    if renamings is None and hasattr(stock.config_class, "text_config"):  # else by its own type
        stated = stock.config_class.model_type
        renamings = conversion_mapping.get_checkpoint_conversion_mapping(stated)
    if renamings:
        conversion_mapping.register_checkpoint_conversion_mapping(pruned, renamings, overwrite=True)


def __getattr__(name):
    """Make `PrunedXyz` from transformers' `Xyz`, when it is first asked for."""
    stock = getattr(transformers, name.removeprefix("Pruned"), None)
    if not name.startswith("Pruned") or not isinstance(stock, type):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    members = {"__module__": __name__, "__qualname__": name}
    if issubclass(stock, transformers.PretrainedConfig):
        bases = (PrunedConfig, stock)
        members.update(model_type=f"pruned_{stock.model_type}", _auto_class="AutoConfig")
    else:
        bases = (PrunedModel, stock)
        config_class = "Pruned" + stock.config_class.__name__
        members.update(
            config_class=globals().get(config_class) or __getattr__(config_class),
            _auto_class=next(auto for end, auto in AUTO_CLASSES.items() if name.endswith(end)),
        )
        keep_file_names(stock, name)
    globals()[name] = made = type(name, bases, members)
    return made

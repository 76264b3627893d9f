"""A family's entry as a YAML file: written, and read with each mistake told by its line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from torch import nn
from transformers import PreTrainedConfig

from nuteprune.errors import UserError, did_you_mean
from nuteprune.model.family import GATE_KINDS, Family, Projection
from nuteprune.model.shape import LayerShape, axis_sizes

AXES = ("hidden", "q", "kv", "qkv", "qgate", "mixer", "neurons")
ALWAYS = ("model_type", "causal_lm", "layers", "embedding", "final_norm", "norm")
"""Written even where they are what an entry has without them."""
NEEDED: dict[str, Any] = {"model_type": "", "causal_lm": "", "attention": (), "mlp": ()}
"""What each entry must say, as an entry that says nothing has it."""
MODULES = (
    *("attention_norms", "mlp_norms", "shared_norms", "post_norms", "qk_norms"),
    *("attention_module", "mlp_modules"),
)
"""Keys that name modules of a decoder layer."""
Key = tuple[str, ...]


class FamilyFile:
    """An entry that a user wrote.

    Args:
        content: plain data that describe it; see `to_dict`.
        path: the file that they are from, for errors.
        lines: key, and key within a key -> line.

    Raises:
        UserError: naming the line and the key of what is wrong.
    """

    def __init__(self, content: Any, path: Path, lines: Mapping[Key, int] | None = None) -> None:
        self._path, self._lines = path, lines or {}
        if not isinstance(content, dict):
            raise UserError(f"{path} must be a mapping of an entry's keys to values")
        hints = get_type_hints(Family)
        values = {}
        for key, value in content.items():
            if key not in hints:
                raise self.wrong((str(key),), f"no such key{did_you_mean(str(key), hints)}")
            values[key] = self._read((key,), hints[key], value)
        if missing := [key for key in NEEDED if key not in values]:
            raise UserError(f"{path}: the key {missing[0]} is missing")
        self.family = Family(**values)
        for kind in self.family.refused:
            if kind.removesuffix(" uniform") not in GATE_KINDS:
                raise self.wrong(("refused", kind), f"not one of {', '.join(GATE_KINDS)}")

    def wrong(self, key: Key, what: str) -> UserError:
        """Return an error that names a line and its key."""
        line = self._lines.get(key, self._lines.get(key[:1]))
        where = f"{self._path}, line {line}" if line else str(self._path)
        return UserError(f"{where}: {': '.join(key)}: {what}")

    def _read(self, key: Key, hint: Any, value: Any) -> Any:
        """Return a value as a field of an entry has it."""
        words = str(hint)
        if "Projection" in words:
            return self._projections(key, value)
        if "Literal" in words:
            if value not in hint.__args__:
                raise self.wrong(key, f"{value!r} is not one of {', '.join(hint.__args__)}")
            return value
        if "Mapping" in words:
            if not isinstance(value, dict):
                raise self.wrong(key, f"{value!r} must be a mapping")
            for name, item in value.items():
                if not isinstance(name, str):
                    raise self.wrong((*key, str(name)), "write this key in quotes")
                if "object" not in words and not isinstance(item, str):
                    raise self.wrong((*key, str(name)), f"{item!r} must be text")
            return value
        if value is None and "None" in words:
            return None
        if "Experts" in words:
            raise self.wrong(key, "a file describes no mixtures of experts")
        if "tuple" in words:
            if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
                raise self.wrong(key, f"{value!r} must be a list of names")
            if "..." not in words and len(value) != 2:
                raise self.wrong(key, f"{value!r} must be two names: the attention's, the MLP's")
            return tuple(value)
        kind, said = (bool, "true or false") if hint is bool else (str, "text")
        if not isinstance(value, kind):
            raise self.wrong(key, f"{value!r} must be {said}")
        return value

    def _projections(self, key: Key, value: Any) -> tuple[Projection, ...]:
        if not isinstance(value, dict) or not value:
            raise self.wrong(
                key, f"{value!r} must map paths to axes, such as 'mlp.up_proj: hidden -> neurons'"
            )
        found = []
        for path, axes in value.items():
            columns, arrow, rows = str(axes).partition("->")
            inputs, outputs = columns.split(), tuple(rows.split())
            within = (*key, str(path))
            if not arrow or len(inputs) != 1 or not outputs:
                raise self.wrong(within, f"{axes!r}: write it as 'hidden -> q'")
            if unknown := [x for x in (*inputs, *outputs) if x not in AXES]:
                raise self.wrong(within, f"{unknown[0]!r} is no axis; there are {', '.join(AXES)}")
            found.append(Projection(str(path), outputs, inputs[0]))
        if found[-1].rows != ("hidden",):
            raise self.wrong(
                (*key, found[-1].path),
                "the last projection must write to the residual stream: -> hidden",
            )
        if strays := [x for x in found[:-1] if x.columns != "hidden"]:
            raise self.wrong(
                (*key, strays[0].path), "all but the last must read the residual stream: hidden ->"
            )
        return tuple(found)

    def check_against(self, config: PreTrainedConfig, model: nn.Module) -> None:
        """Check that the entry's modules are in a model and have the stated sizes.

        Args:
            config: a config of the type.
            model: the causal LM that it makes, all layers alike.

        Raises:
            UserError: naming the line that is wrong.
        """
        family = self.family
        for key in ("layers", "embedding", "final_norm"):
            self._module(model, getattr(family, key), (key,))
        layers = model.get_submodule(family.layers)
        first = next(layers.children(), nn.Identity())
        for key in MODULES:
            paths = getattr(family, key) or ()
            for path in [paths] if isinstance(paths, str) else paths:
                self._module(first, path, (key,))
        sizes = self._sizes(config)
        for block in ("attention", "mlp"):
            for projection in getattr(family, block):
                self._check_size(first, block, projection, sizes)

    def _sizes(self, config: PreTrainedConfig) -> dict[str, int]:
        """Return the features of each axis in a model that a config makes."""
        names, counts = self.family.config_names, {}
        for word in ("heads", "neurons", "hidden"):
            if word not in names:
                raise self.wrong(("config_names",), f"it must name the config's {word}")
        for word, name in names.items():
            if not hasattr(config, name):
                raise self.wrong(("config_names", word), f"the config has no {name}")
            counts[word] = getattr(config, name)
        heads, hidden = counts["heads"], counts["hidden"]
        layer = LayerShape(heads, counts.get("kv_heads", heads), counts["neurons"])
        return {**axis_sizes(layer, self.family.head_dim(config)), "hidden": hidden}

    def _module(self, parent: nn.Module, path: str, key: Key) -> nn.Module:
        here = parent
        for name in path.split("."):
            children = dict(here.named_children())
            if name not in children:
                raise self.wrong(
                    key,
                    f"{path} is not in a {type(parent).__name__}: {type(here).__name__} has "
                    f"{', '.join(children) or 'no modules'}",
                )
            here = children[name]
        return here

    def _check_size(
        self, layer: nn.Module, block: str, projection: Projection, sizes: Mapping[str, int]
    ) -> None:
        key = (block, projection.path)
        module = self._module(layer, projection.path, key)
        if not isinstance(module, nn.Linear):
            raise self.wrong(key, f"it is a {type(module).__name__}, not a linear module")
        for side, axes, found in (
            ("inputs", (projection.columns,), module.in_features),
            ("outputs", projection.rows, module.out_features),
        ):
            if strange := set(axes) - set(sizes):
                raise self.wrong(key, f"{min(strange)} is an axis of mixers alone")
            expected = sum(sizes[axis] for axis in axes)
            if found != expected:
                raise self.wrong(
                    key,
                    f"{' '.join(axes)} would be {expected} {side} in the model that was tried, "
                    f"and it has {found}",
                )


def to_text(family: Family) -> str:
    """Return an entry as YAML, without defaults."""
    return yaml.safe_dump(to_dict(family), sort_keys=False, allow_unicode=True)


def to_dict(family: Family) -> dict[str, Any]:
    """Return an entry as plain data, without defaults."""
    values = {field.name: getattr(family, field.name) for field in fields(family)}
    without = Family(**NEEDED)
    stated = {k: v for k, v in values.items() if v != getattr(without, k) or k in ALWAYS}
    return {key: _plain(value) for key, value in stated.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, tuple) and value and isinstance(value[0], Projection):
        return {x.path: f"{x.columns} -> {' '.join(x.rows)}" for x in value}
    return list(value) if isinstance(value, tuple) else value


def read_family(path: Path) -> FamilyFile:
    """Return the entry that a file holds.

    Raises:
        UserError: if it cannot be read, or a line of it is wrong; names the line and its key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read --family {path}: {error}") from error
    try:
        content, node = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"--family {path} is not valid YAML: {error}") from error
    return FamilyFile(content, path, dict(_lines(node)))


def _lines(node: Any) -> list[tuple[Key, int]]:
    """Return the line of each key, and of each key within a key."""
    found: list[tuple[Key, int]] = []
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        found.append(((str(key.value),), key.start_mark.line + 1))
        for inner, _ in value.value if isinstance(value, yaml.MappingNode) else ():
            found.append(((str(key.value), str(inner.value)), inner.start_mark.line + 1))
    return found


def from_dict(content: Any, path: Path) -> Family:
    """Return the entry that plain data describe; errors as `FamilyFile`."""
    return FamilyFile(content, path).family

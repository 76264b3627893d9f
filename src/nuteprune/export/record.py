"""nuteprune.json: the record of a pruned checkpoint and of how it was made; its form when read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from nuteprune.errors import UserError
from nuteprune.export.card import LICENCE, model_card
from nuteprune.export.checkpoint import save
from nuteprune.export.hub import files_in
from nuteprune.export.loading import is_projection
from nuteprune.files import to_json, write_text
from nuteprune.model.family import PREFIX
from nuteprune.model.lookup import family_named, of_language_model
from nuteprune.run_folder import CARD, RECORD, TARGETS

if TYPE_CHECKING:
    from nuteprune.export.wrapping import Around

SCHEMA = 1
_ELSEWHERE = "take the file from where the checkpoint came"


def blocks_recount(tensors: Mapping[str, list[int]], model_type: str) -> int:
    """Count the parameters of decoder projections among the tensors of a written checkpoint."""
    family, own = family_named(model_type), of_language_model(tensors)
    return sum(math.prod(shape) for name, shape in own.items() if is_projection(name, family))


def write_again(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    record: Mapping[str, Any],
    around: Around | None,
) -> dict[str, Any]:
    """Write a pruned checkpoint whose weights have changed and whose shape has not.

    Args:
        folder: where to; see `checkpoint.save`.
        model: the model, in the dtype that it is to be stored in.
        tokenizer: its tokenizer.
        record: the record it had, with what has changed.
        around: as in `stages.save.save`.

    Returns:
        The record as it was written; sizes are those of the written files.
    """
    save(model, folder, tokenizer, around)
    return write_texts(folder, model, {**record, "bytes_on_disk": weights_size(folder)})


def write_texts(folder: Path, model: PreTrainedModel, full: Mapping[str, Any]) -> dict[str, Any]:
    """Write a checkpoint's card and its record; return the record as it was written."""
    card = model_card(full, remote_code=model.config.model_type.startswith(PREFIX))
    for name, text in ((CARD, card), (RECORD, to_json(full, indent=2) + "\n")):
        write_text(folder / name, text)
    return json.loads(to_json(full))  # type: ignore[no-any-return]


def origin_of(name: str | None, earlier: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the record's entry on where a model comes from.

    A checkpoint that is pruned already passes on its own origin, and adds itself to the history.

    Args:
        name: the model's folder or hub id.
        earlier: its record, if it is pruned.
    """
    if earlier is None:
        return {"base_model": name}
    origin = {key: earlier.get(key) for key in ("base_model", "license")}
    origin |= {key: earlier[key] for key in LICENCE if key in earlier}
    step = {key: value for key, value in earlier.items() if key != "history"}
    return {**origin, "history": [*earlier.get("history", []), step]}


def weights_size(folder: Path) -> int:
    """Return the bytes of a checkpoint's weight files, those that transformers would load."""
    whole = folder / SAFE_WEIGHTS_NAME
    names = {whole.name} if whole.is_file() else files_in(folder / SAFE_WEIGHTS_INDEX_NAME)
    return sum((folder / name).stat().st_size for name in names)


def inside(folder: Path) -> str:
    """Return which targets' checkpoints are in a folder, to end an error's line."""
    found = sorted(x.parent.name for name in TARGETS for x in folder.glob(f"{name}*/{RECORD}"))
    return f"; the run in it had several targets: pass {folder / found[0]}" if found else ""


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record of a pruned checkpoint.

    Raises:
        UserError: if the folder has none, or one that is damaged.
    """
    path = folder / RECORD
    if not path.is_file():
        raise UserError(
            f"{folder} has no {RECORD}: it is not a checkpoint that nuteprune wrote{inside(folder)}"
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}; {_ELSEWHERE}") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise UserError(f"{path} is not of schema {SCHEMA}; it needs another nuteprune version")
    if found := next(_damage(record), None):
        raise UserError(f"{path} is damaged: {found}; {_ELSEWHERE}")
    return record


class Leaf(NamedTuple):
    """A value: the name of its kind, and a check for it."""

    named: str
    fits: Callable[[Any], bool]


Form = Leaf | Mapping[str, Any] | list[Any]
"""A value, an object by key (`?` ends one that may be missing), or a list of one form."""


def several(named: str, form: Form) -> Leaf:
    """Return what a list is, which may be empty, whose values are of one form."""
    return Leaf(f"a list of {named}", lambda x: isinstance(x, list) and _are(x, form))


def _each(named: str, form: Form) -> Leaf:
    """Return what an object is whose keys are anything, and whose values are of one form."""
    return Leaf(f"an object of {named}", lambda x: isinstance(x, dict) and _are(x.values(), form))


def _are(values: Iterable[Any], form: Form) -> bool:
    return all(next(unlike(x, form), None) is None for x in values)


def _or_null(leaf: Leaf) -> Leaf:
    return Leaf(f"{leaf.named} or null", lambda x: x is None or leaf.fits(x))


NUMBER = Leaf("a finite number", lambda x: type(x) in (int, float) and math.isfinite(x))
COUNT = Leaf("a count", lambda x: type(x) is int and x >= 0)
SIZE = Leaf("a count above 0", lambda x: type(x) is int and x > 0)
ABOVE_0 = Leaf("a number above 0", lambda x: type(x) in (int, float) and x > 0)
TEXT = Leaf("text", lambda x: isinstance(x, str))
TEXTS = Leaf("text or a list of texts", lambda x: TEXT.fits(x) or several("texts", TEXT).fits(x))
KINDS = _each("texts", TEXT)
FIGURES = _each("numbers above 0", _or_null(ABOVE_0))
HASHES = Leaf("hexadecimal digits", lambda x: TEXT.fits(x) and not x.strip("0123456789abcdef"))
_BEFORE_AFTER = {"before": SIZE, "after": SIZE}
_LAYER = dict.fromkeys(("heads", "kv_heads", "neurons", "experts?", "expert_neurons?"), COUNT)
_JUDGED = {"before?": FIGURES, "after?": FIGURES, "protocol?": {"measure": TEXT}}
_BOTH = dict.fromkeys(("before", "after"), _or_null(NUMBER))
_ANSWERS = {
    **dict.fromkeys(("looping", "repeated", "length", "nats"), _BOTH),
    **dict.fromkeys(("kl", "agreement"), _or_null(NUMBER)),
    "protocol": {"measures": KINDS, "prompts": TEXT, "answers": SIZE, "most_tokens": SIZE}
    | {"tokens": SIZE},
}
_CONTEXT = {
    **dict.fromkeys(("tokens", "needing"), COUNT),
    **dict.fromkeys(("lost", "lost_elsewhere", "kept"), _or_null(NUMBER)),
    "gain": _BOTH,
    "protocol": {"measures": KINDS, "blocks": COUNT},
}
_COPIED = {"measure": TEXT, "tokens": COUNT, "seed": COUNT}
_READ = {"documents": HASHES, "files": HASHES, "names": TEXTS, "judged?": KINDS}
_TUNED: dict[str, Any] = {"steps": COUNT, "data": TEXT, "kind?": TEXT, "perplexity?": _JUDGED}
_TUNED["text?"] = _READ
_TUNED["earlier?"] = _TUNED
_COST = dict.fromkeys(("seconds", "cpu_seconds", "peak_memory_bytes"), NUMBER)
FORM: dict[str, Any] = {
    **dict.fromkeys(("target", "sparsity", "total_sparsity"), NUMBER),
    "params": {**_BEFORE_AFTER, "blocks_before": SIZE, "blocks_after": SIZE}
    | {"active_before?": SIZE, "active_after?": SIZE},
    "layers": [_LAYER],
    "layers_before": [_LAYER],
    "hidden": _BEFORE_AFTER,
    "shapes?": TEXT,
    **dict.fromkeys(("base_model?", "license?", "license_name?", "license_link?"), _or_null(TEXT)),
    "teachers?": {"count": COUNT, "sparsities?": several("numbers", NUMBER)},
    "perplexity?": _JUDGED,
    "copying?": {"before?": _or_null(NUMBER), "after?": _or_null(NUMBER), "protocol?": _COPIED},
    "text?": _READ,
    "answers?": _ANSWERS,
    "context?": _each("figures of context", _CONTEXT),
    "asked?": {"kind": TEXT, "value": NUMBER},
    "config?": {"model?": _or_null(TEXT), "data?": TEXTS, "length?": SIZE, "eval_blocks?": SIZE}
    | dict.fromkeys(("eval_data?", "text_column?"), _or_null(TEXT)),
    "vocab?": _BEFORE_AFTER,
    "recover?": _TUNED,
    "versions?": {"nuteprune?": TEXT},
    "bytes_on_disk?": SIZE,
    **dict.fromkeys(("peak_memory_bytes?", "seconds?"), NUMBER),
    "stages?": _each("what stages took", _COST),
    "seed?": COUNT,
}
"""The keys that readers of a record go by; see docs/json.md. It may have others."""
FORM["history?"] = [FORM]


def _damage(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with a record."""
    yield from unlike(record, FORM)
    for one in (record, *record.get("history", ())):
        before, after = len(one["layers_before"]), len(one["layers"])
        if before != after:
            yield f"layers are {after}, and layers_before {before}"


def unlike(value: Any, form: Form, where: str = "") -> Iterator[str]:
    """Yield what is wrong with a value that should have a form."""
    if isinstance(form, Leaf):
        if not form.fits(value):
            yield f"{where or 'it'} is not {form.named}"
    elif isinstance(form, list):
        if not isinstance(value, list) or not value:
            yield f"{where} is not a list, or an empty one"
        else:
            for i, x in enumerate(value):
                yield from unlike(x, form[0], f"{where}[{i}]")
    elif not isinstance(value, dict):
        yield f"{where} is not an object"
    else:
        for key, inner in form.items():
            name, prefix = key.removesuffix("?"), f"{where}." if where else ""
            if name in value:
                yield from unlike(value[name], inner, prefix + name)
            elif name == key:
                yield f"it lacks {prefix}{name}"

"""A smaller vocabulary: which tokens of a BPE tokenizer stay, and the tokenizer that is left.

What stays is closed: with a token stay both halves of every merge that yields it. Merges stay in
their order. So text that the full tokenizer spells with kept tokens alone is spelled alike, and
as all bytes stay, any other text is spelled with smaller parts, down to its bytes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenizers import pre_tokenizers

from nuteprune.errors import UserError

BYTES = 256


class Merges:
    """What the tokens of a BPE tokenizer are made of.

    Args:
        content: a tokenizer.json.

    Raises:
        UserError: if it is no BPE tokenizer that can spell any bytes.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.content = content
        model = content.get("model") or {}
        if model.get("type") != "BPE":
            raise UserError(
                f"the tokenizer is of type {model.get('type') or 'unknown'}; a vocabulary can be "
                "made smaller of BPE tokenizers (tokenizer.json) alone"
            )
        self.ids: dict[str, int] = dict(model["vocab"])
        self.added = {x["content"]: int(x["id"]) for x in content.get("added_tokens") or ()}
        for name in ("continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(name):
                raise UserError(
                    f"the tokenizer marks parts of words ({name} {model[name]!r}), and merges of "
                    "marked parts are not followed; only byte-level and SentencePiece-style BPE is"
                )
        self.alphabet = self._alphabet()
        self.halves: dict[str, list[tuple[str, str]]] = {}
        for a, b in map(_pair, model["merges"]):
            self.halves.setdefault(a + b, []).append((a, b))

    def _alphabet(self) -> list[str]:
        """Return the tokens that spell bytes, and what stands for a space."""
        if self.content["model"].get("byte_fallback"):
            needed = letters = [f"<0x{byte:02X}>" for byte in range(BYTES)]
        elif _has(self.content.get("pre_tokenizer"), "ByteLevel") or _has(
            self.content.get("normalizer"), "ByteLevel"
        ):
            letters = sorted(pre_tokenizers.ByteLevel.alphabet())
            used = {letter for token in self.ids if token not in self.added for letter in token}
            needed = [x for x in letters if x in used]  # no text has bytes such as 0xFF
        else:
            raise UserError(
                "the tokenizer spells text neither in bytes (ByteLevel) nor falls back to them "
                "(byte_fallback): with fewer tokens it could not spell all text"
            )
        if lost := [x for x in needed if x not in self.ids]:
            raise UserError(
                f"the tokenizer has no token for {len(lost)} of the {BYTES} bytes (the first is "
                f"{lost[0]!r}): with fewer tokens it could not spell all text"
            )
        return [x for x in (*letters, "▁") if x in self.ids]

    @property
    def required(self) -> set[str]:
        """Tokens that always stay: bytes, added and special tokens, the unknown token."""
        named = {*self.alphabet, *self.added, *_named(self.content.get("post_processor"))}
        if (unknown := self.content["model"].get("unk_token")) is not None:
            named.add(unknown)
        return {x for x in named if x in self.ids or x in self.added}

    @property
    def all_ids(self) -> dict[str, int]:
        """All tokens -> id, added ones included."""
        return {**self.ids, **self.added}

    def closure(self, tokens: Iterable[str], kept: set[str]) -> set[str]:
        """Return tokens and all that they are made of, without what is kept already."""
        found: set[str] = set()
        open_ = [x for x in tokens if x not in kept]
        while open_:
            token = open_.pop()
            if token in found or token in kept:
                continue
            found.add(token)
            open_ += [half for pair in self.halves.get(token, ()) for half in pair]
        return found


def choose(merges: Merges, used: Sequence[int], keep: int, more: Iterable[int] = ()) -> list[int]:
    """Return the ids of the tokens that stay, growing.

    Args:
        merges: the tokenizer.
        used: ids in the order in which they are wanted, the most used first.
        keep: how many tokens are to stay.
        more: ids that have to stay.

    Raises:
        UserError: if more than that have to stay.
    """
    names = {i: token for token, i in merges.all_ids.items()}
    kept = merges.closure(merges.required, set())
    kept |= merges.closure((names[i] for i in more if i in names), kept)
    if keep < len(kept):
        raise UserError(
            f"{len(kept)} tokens have to stay (bytes, special and template tokens, and what they "
            f"are made of), and --keep is {keep}: pass at least {len(kept)}"
        )
    if keep >= len(names):
        raise UserError(f"the tokenizer has {len(names)} tokens, and --keep is {keep}: pass fewer")
    # What the text does not use follows in the tokenizer's own order, in which frequent ones lead.
    for i in dict.fromkeys((*used, *sorted(names))):
        if len(kept) == keep:
            break
        if i in names:
            new = merges.closure([names[i]], kept)
            if len(kept) + len(new) <= keep:
                kept |= new
    ids = merges.all_ids
    return sorted({ids[token] for token in kept})


def cut_tokenizer(merges: Merges, kept: Sequence[int]) -> dict[str, Any]:
    """Return the tokenizer.json of what stays, ids counted anew in the old order.

    Args:
        merges: the tokenizer.
        kept: ids that stay, growing.
    """
    new = {old: i for i, old in enumerate(kept)}
    content = copy.deepcopy(dict(merges.content))
    model = content["model"]
    model["vocab"] = {x: new[i] for x, i in merges.ids.items() if i in new}
    there = model["vocab"].keys()
    pairs = [(pair, _pair(pair)) for pair in model["merges"]]
    model["merges"] = [x for x, (a, b) in pairs if {a, b, a + b} <= there]
    for token in content.get("added_tokens") or ():
        token["id"] = new[token["id"]]
    if content.get("post_processor"):
        content["post_processor"] = _renumbered(content["post_processor"], new)
    if content.get("padding"):
        padding = content["padding"]
        padding["pad_id"] = new.get(padding["pad_id"], 0)
    return content


def renumber(values: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """Return settings of a model with the token ids in them counted anew.

    Args:
        values: a config, or settings of generation.
        new: old id -> new id; what is not there is gone.
    """
    return {key: _ids(value, new) if names_tokens(key) else value for key, value in values.items()}


def names_tokens(key: str) -> bool:
    """Return whether a setting holds token ids."""
    return key.endswith(("_token_id", "_token_ids", "suppress_tokens", "bad_words_ids"))


def tokens_in(values: Mapping[str, Any]) -> set[int]:
    """Return the token ids that settings name."""
    found: set[int] = set()
    for key, value in values.items():
        if names_tokens(key):
            found |= {x for x in _flat(value) if _is_id(x)}
    return found


def _flat(value: Any) -> list[Any]:
    return [x for part in value for x in _flat(part)] if isinstance(value, list) else [value]


def _ids(value: Any, new: Mapping[int, int]) -> Any:
    if isinstance(value, list):
        if value and isinstance(value[0], list):  # sequences: one that lost a token cannot appear
            return [[new[x] for x in row] for row in value if new.keys() >= set(row)] or None
        return [new[x] for x in value if x in new]
    return new.get(value) if _is_id(value) else value


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    a, b = merge.split(" ") if isinstance(merge, str) else merge
    return a, b


def _parts(step: Any) -> list[Any]:
    """Return a step of a tokenizer and the steps in it."""
    if not isinstance(step, Mapping):
        return []
    inner = next((step[k] for k in ("pretokenizers", "normalizers", "processors") if k in step), ())
    return [step, *(x for one in inner for x in _parts(one))]


def _has(step: Any, kind: str) -> bool:
    return any(x.get("type") == kind for x in _parts(step))


def _named(processor: Any) -> set[str]:
    """Return the tokens that a post-processor adds."""
    found: set[str] = set()
    for step in _parts(processor):
        found |= {x for one in step.get("special_tokens", {}).values() for x in one["tokens"]}
        found |= {step[key][0] for key in ("cls", "sep") if key in step}
    return found


def _renumbered(processor: Any, new: Mapping[int, int]) -> Any:
    """Return a post-processor that adds the same tokens by their new ids."""
    step = dict(processor)
    if "processors" in step:
        step["processors"] = [_renumbered(x, new) for x in step["processors"]]
    if step.get("type") == "TemplateProcessing":
        step["special_tokens"] = {
            name: {**one, "ids": [new[i] for i in one["ids"]]}
            for name, one in step["special_tokens"].items()
        }
    for key in ("cls", "sep"):
        if key in step:
            token, i = step[key]
            step[key] = [token, new[i]]
    return step

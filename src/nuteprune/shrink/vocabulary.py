"""A smaller vocabulary: which tokens of a BPE tokenizer stay, and the tokenizer that is left.

A kept token keeps all tokens that BPE makes on the way to it. Merges stay in their order. So text
that the full tokenizer spells with kept tokens alone is spelled alike: within a token nothing that
stands around it was merged. As all bytes stay, any other text is spelled with smaller parts, down
to its bytes.
"""

from __future__ import annotations

import copy
import heapq
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

from tokenizers import pre_tokenizers

from nuteprune.errors import UserError

BYTES = 256
_PLACEHOLDER = re.compile(r"^\W*(unused|reserved)\D*\d+\W*$")
"""Added tokens that a tokenizer keeps free, such as `<unused7>` and `<|reserved_special_token_7|>`:
they stay where a template or a setting names them."""
_BLANKS = ({"▁", "Ġ", " "}, {"\t", "ĉ"}, {"\n", "Ċ"})
"""Characters of runs of spaces, tabs and newlines."""


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
                f"the tokenizer is of type {model.get('type')}; only BPE can be made smaller"
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
        self.ranks: dict[tuple[str, str], int] = {}
        for rank, pair in enumerate(map(_pair, model["merges"])):
            self.ranks.setdefault(pair, rank)

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
        """Tokens that always stay: bytes, ASCII, runs of blanks, special tokens, the unknown one.

        Added tokens that the tokenizer keeps free do not stay.
        """
        added = {x for x in self.added if not _PLACEHOLDER.match(x)}
        plain = {x for x in self.ids if (len(x) == 1 and x.isascii()) or (x and _is_blank(x))}
        named = {*self.alphabet, *added, *plain, *_named(self.content.get("post_processor"))}
        if (unknown := self.content["model"].get("unk_token")) is not None:
            named.add(unknown)
        return {x for x in named if x in self.ids or x in self.added}

    @cached_property
    def all_ids(self) -> dict[str, int]:
        """All tokens -> id, added ones included."""
        return {**self.ids, **self.added}

    @cached_property
    def parts(self) -> dict[int, tuple[int, ...]]:
        """The parts that spell each token when it is gone; tokens without parts are left out."""
        whole = {*self.alphabet, *self.added}
        return {i: self._parts(x) for x, i in self.all_ids.items() if x not in whole}

    def _parts(self, token: str) -> tuple[int, ...]:
        spelled = list(token)
        last: tuple[str, ...] = ()
        while len(spelled) > 1:
            pairs = pairwise(spelled)
            rank, at = min((self.ranks.get(x, len(self.ranks)), i) for i, x in enumerate(pairs))
            if rank == len(self.ranks):  # BPE does not make it: it is only taken whole
                last = tuple(spelled)
                break
            last = (spelled[at], spelled[at + 1])
            spelled[at : at + 2] = ["".join(last)]
        if not last:
            last = tuple(f"<0x{byte:02X}>" for byte in token.encode())
        return tuple(i for x in last if (i := self.ids.get(x)) is not None)


def choose(merges: Merges, use: Sequence[float], keep: int, more: Iterable[int] = ()) -> list[int]:
    """Return the ids of the tokens that stay, growing.

    One token after another goes, the one that costs least: how often it is used, times how many
    tokens longer text becomes where it is spelled with its parts. These are then used more.

    Args:
        merges: the tokenizer.
        use: how often each token is used, by id; 0 beyond its end.
        keep: how many tokens are to stay.
        more: ids that have to stay.

    Raises:
        UserError: if more than that have to stay.
    """
    names = set(merges.all_ids.values())
    if keep >= len(names):
        raise UserError(f"the tokenizer has {len(names)} tokens, not more than {keep}: pass fewer")
    parts = merges.parts
    stays = {merges.all_ids[x] for x in merges.required} | (set(more) & names)
    needed = Counter(x for i in names for x in parts.get(i, ()))
    used = dict(enumerate(use))

    def cost(i: int) -> float:
        return used.get(i, 0.0) * max(0, len(parts.get(i, ())) - 1)

    kept = set(names)
    heap = [(cost(i), -i) for i in names - stays if not needed[i]]
    heapq.heapify(heap)
    while len(kept) > keep and heap:
        found, i = heapq.heappop(heap)
        if found < cost(-i):  # its parts are used more since
            heapq.heappush(heap, (cost(-i), i))
            continue
        kept.remove(-i)
        for part in parts.get(-i, ()):
            used[part] = used.get(part, 0.0) + used.get(-i, 0.0)
            needed[part] -= 1
            if not needed[part] and part not in stays:
                heapq.heappush(heap, (cost(part), -part))
    if len(kept) > keep:
        raise UserError(
            f"{len(kept)} tokens have to stay (bytes, special and template tokens, and what they "
            f"are made of), and {keep} were asked for: pass at least {len(kept)}"
        )
    return sorted(kept)


def cut_tokenizer(merges: Merges, kept: Sequence[int]) -> dict[str, Any]:
    """Return the tokenizer.json of the tokens that stay, renumbered in the old order.

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
    if added := content.get("added_tokens"):
        content["added_tokens"] = [x | {"id": new[x["id"]]} for x in added if x["id"] in new]
    if content.get("post_processor"):
        content["post_processor"] = _renumbered(content["post_processor"], new)
    if content.get("padding"):
        padding = content["padding"]
        padding["pad_id"] = new.get(padding["pad_id"], 0)
    return content


def _is_blank(token: str) -> bool:
    return any(set(token) <= letters for letters in _BLANKS)


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

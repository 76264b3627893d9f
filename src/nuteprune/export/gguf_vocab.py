"""A tokenizer as llama.cpp reads it, and a check that it would split text in the same way.

llama.cpp has two tokenizers that matter here: `gpt2` (byte-level BPE: merges, and a split of the
text before them that the file can only name) and `llama` (SentencePiece's BPE: scores). A wrong
name or score gives other tokens without a word, so the tokenizer that the written metadata
describes is built here a second time and compared with the original on text that is hard to split.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from gguf import TokenType
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase

from nuteprune.errors import UserError
from nuteprune.export.gguf_splits import PROBES, SPLITS, find_split, pre_tokenizer


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer keys of a GGUF file."""

    model: str
    """`gpt2` or `llama`."""
    pre: str
    tokens: list[str]
    types: list[TokenType]
    special: dict[str, int]
    """`bos`, `eos`, `unk`, `pad` -> token id."""
    adds_bos: bool
    adds_eos: bool
    merges: list[str] | None = None
    scores: list[float] | None = None
    adds_space: bool = False
    """A space goes before the text."""
    chat_template: str | None = None


def read_vocabulary(
    tokenizer: PreTrainedTokenizerBase, size: int, pre: str | None = None
) -> Vocabulary:
    """Return what to write about a tokenizer.

    Args:
        tokenizer: a fast tokenizer with a BPE model.
        size: rows of the embedding; unused tokens fill them up.
        pre: llama.cpp's name of the split; None finds it.

    Raises:
        UserError: if llama.cpp has no such tokenizer, or is not known to.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    content = json.loads(backend.to_str()) if backend is not None else {}
    kind = content.get("model", {}).get("type")
    if kind != "BPE":
        raise UserError(
            f"the tokenizer is of type {kind or type(tokenizer).__name__}; "
            "the GGUF export knows BPE tokenizers (tokenizer.json)"
        )
    tokens, types = _tokens(content, size)
    merges = [x if isinstance(x, str) else " ".join(x) for x in content["model"]["merges"]]
    is_sentencepiece = bool(content["model"]["byte_fallback"])
    ids = tokenizer("a").input_ids
    ends = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    return Vocabulary(
        model="llama" if is_sentencepiece else "gpt2",
        pre="default" if is_sentencepiece else pre or find_split(backend),
        tokens=tokens,
        types=types,
        special={name: int(x) for name, x in ends.items() if x is not None and x < size},
        adds_bos=ids[0] == ends["bos"],
        adds_eos=ids[-1] == ends["eos"],
        merges=None if is_sentencepiece else merges,
        scores=_scores(tokens, merges) if is_sentencepiece else None,
        adds_space=is_sentencepiece and _leads_with_space(backend),
        chat_template=_chat_template(tokenizer),
    )


def _chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the template, the default one where there are several by name."""
    template: Any = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def _tokens(content: dict[str, Any], size: int) -> tuple[list[str], list[TokenType]]:
    """Return tokens and their types by id."""
    vocabulary: dict[str, int] = dict(content["model"]["vocab"])
    # Such as Gemma's token for images beside a model that sees none: no id that it could read.
    added = {x["id"]: x for x in content["added_tokens"] if x["id"] < size}
    by_id = {i: token for token, i in vocabulary.items()}
    by_id |= {i: x["content"] for i, x in added.items()}
    if max(by_id) >= size:
        raise UserError(
            f"the tokenizer has tokens up to number {max(by_id)}, the embedding only {size} rows: "
            "it belongs to another checkpoint"
        )
    tokens, types = [], []
    unknown = content["model"].get("unk_token")
    bytes_are_tokens = content["model"]["byte_fallback"]
    for i in range(size):
        token, kind = by_id.get(i, f"[PAD{i}]"), TokenType.NORMAL
        if i not in by_id:
            kind = TokenType.UNUSED
        elif bytes_are_tokens and token == unknown:
            kind = TokenType.UNKNOWN
        elif i in added:
            kind = TokenType.CONTROL if added[i]["special"] else TokenType.USER_DEFINED
            # Of SentencePiece: looked for in the text as it is.
            if kind == TokenType.USER_DEFINED and bytes_are_tokens:
                token = token.replace("▁", " ")
        elif bytes_are_tokens and len(token) == 6 and token.startswith("<0x"):
            kind = TokenType.BYTE
        tokens.append(token)
        types.append(kind)
    return tokens, types


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Return scores that make the best-first merging of SentencePiece that of a BPE."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _leads_with_space(backend: Tokenizer) -> bool:
    return str(backend.encode("a", add_special_tokens=False).tokens[0]).startswith("▁")


def check_vocabulary(vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase) -> int:
    """Compare the tokens of text as the file describes them with the tokenizer's own.

    Args:
        vocabulary: as it was read back from the file.
        tokenizer: the checkpoint's.

    Returns:
        How many texts were compared; 0 where the split was named by the user and is unknown here.

    Raises:
        UserError: if they differ.
    """
    if vocabulary.model == "gpt2" and vocabulary.pre not in SPLITS:
        return 0
    encode = _byte_level(vocabulary) if vocabulary.model == "gpt2" else _best_first(vocabulary)
    for text in PROBES:
        theirs = tokenizer(text, add_special_tokens=False).input_ids
        ours = encode(text)
        if ours != theirs:
            at = next(
                (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
                min(len(ours), len(theirs)),
            )
            raise UserError(
                f"llama.cpp would split {text!r} differently from token {at} on, "
                f"{[vocabulary.tokens[x] for x in ours[at : at + 3]]} instead of "
                f"{[vocabulary.tokens[x] for x in theirs[at : at + 3]]}: "
                "this tokenizer cannot be expressed in GGUF"
            )
    return len(PROBES)


def _user_defined(vocabulary: Vocabulary) -> list[str]:
    defined = zip(vocabulary.tokens, vocabulary.types, strict=True)
    return [token for token, kind in defined if kind == TokenType.USER_DEFINED]


def _byte_level(vocabulary: Vocabulary) -> Any:
    """Return an encoder that does what llama.cpp's `gpt2` does with the file's keys."""
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    merges = [(a, b) for a, _, b in (x.partition(" ") for x in vocabulary.merges or ())]
    split = SPLITS[vocabulary.pre]
    backend = Tokenizer(models.BPE(ids, merges, ignore_merges=split.ignores_merges))
    backend.pre_tokenizer = pre_tokenizer(vocabulary.pre)
    backend.add_tokens(_user_defined(vocabulary))
    return lambda text: backend.encode(text, add_special_tokens=False).ids


def _best_first(vocabulary: Vocabulary) -> Any:
    """Return an encoder that does what llama.cpp's `llama` does with the file's keys."""
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    scores = vocabulary.scores or []
    byte_ids = [ids.get(f"<0x{byte:02X}>", -1) for byte in range(256)]
    defined = _user_defined(vocabulary)

    def merged(pieces: list[str]) -> Iterable[int]:
        while True:
            pairs = [
                (-scores[ids[a + b]], i)
                for i, (a, b) in enumerate(pairwise(pieces))
                if a + b in ids
            ]
            if not pairs:
                break
            _, at = min(pairs)
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        for piece in pieces:
            yield from [ids[piece]] if piece in ids else (byte_ids[x] for x in piece.encode())

    def encode(text: str) -> list[int]:
        found, rest = [], " " * vocabulary.adds_space + text
        while rest:
            places = ((rest.find(x), -len(x), x) for x in defined if x in rest)
            at, _, token = min(places, default=(-1, 0, ""))
            plain = rest if at < 0 else rest[:at]
            found += list(merged(list(plain.replace(" ", "▁"))))
            found += [ids[token]] if token else []
            rest = "" if at < 0 else rest[at + len(token) :]
        return found

    return encode

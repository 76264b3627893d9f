"""A tokenizer as llama.cpp reads it, and a check that it would split text in the same way.

llama.cpp has two tokenizers that matter here: `gpt2` (byte-level BPE: merges, and a split of the
text before them that the file can only name) and `llama` (SentencePiece's BPE: scores). A wrong
name or score gives other tokens without a word, so the tokenizer that the written metadata
describes is built here a second time and compared with the original on text that is hard to split.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Any

from gguf import TokenType
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase

from nuteprune.errors import UserError
from nuteprune.export.gguf.splits import PROBES, SPLITS, find_split, pre_tokenizer

_KEYS = {
    "model": "tokenizer.ggml.model",
    "pre": "tokenizer.ggml.pre",
    "tokens": "tokenizer.ggml.tokens",
    "types": "tokenizer.ggml.token_type",
    "merges": "tokenizer.ggml.merges",
    "scores": "tokenizer.ggml.scores",
    "special": "tokenizer.ggml.{}_token_id",
    "adds_bos": "tokenizer.ggml.add_bos_token",
    "adds_eos": "tokenizer.ggml.add_eos_token",
    "adds_space": "tokenizer.ggml.add_space_prefix",
    "chat_template": "tokenizer.chat_template",
}
"""A field of `Vocabulary` -> its key, in the file's order; special tokens have one each."""
_SPECIAL = {x: x for x in ("bos", "eos", "eot", "eom")} | {"unk": "unknown", "pad": "padding"}
"""A special token -> what its key calls it."""
ENDS = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>"),
    *("<|endoftext|>", "<|eom_id|>", "<EOT>", "_<EOT>", "<|end_of_text|>", "<end_of_utterance>"),
)
"""Tokens by whose text llama.cpp knows that they end a generation; in `llama-vocab.cpp`."""
STRIPS = ("phi-3", "phi3")
"""Of models with one of these in their name llama.cpp drops white space after special tokens."""
_STRIPPED_BY_NAME = {"</s>", "<unk>", "<s>", "<|endoftext|>"}
"""Tokens that it then looks up, and does not load the file without."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer keys of a GGUF file."""

    model: str
    """`gpt2` or `llama`."""
    pre: str
    tokens: list[str]
    types: list[TokenType]
    special: dict[str, int]
    """`bos`, `eos`, `unk`, `pad`, `eot`, `eom` -> token id."""
    adds_bos: bool
    adds_eos: bool
    merges: list[str] | None = None
    scores: list[float] | None = None
    adds_space: bool = False
    """A space goes before the text."""
    chat_template: str | None = None

    def keys(self) -> dict[str, Any]:
        """Return the keys and values that a file states."""
        found: dict[str, Any] = {}
        for field, key in _KEYS.items():
            value = getattr(self, field)
            if field == "special":
                found |= {key.format(_SPECIAL[name]): i for name, i in value.items()}
            elif value is not None:
                found[key] = value
        return found

    @classmethod
    def of_keys(cls, keys: Mapping[str, Any]) -> Vocabulary:
        """Return the tokenizer that a file's keys describe."""
        fields: dict[str, Any] = {field: keys.get(key) for field, key in _KEYS.items()}
        ids = {name: keys.get(_KEYS["special"].format(x)) for name, x in _SPECIAL.items()}
        fields["special"] = {name: i for name, i in ids.items() if i is not None}
        fields["types"] = [TokenType(x) for x in keys[_KEYS["types"]]]
        return cls(**fields)


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
    ids, template = tokenizer("a").input_ids, tokenizer.chat_template
    first = str(backend.encode("a", add_special_tokens=False).tokens[0])
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
        adds_space=is_sentencepiece and first.startswith("▁"),
        chat_template=template.get("default") if isinstance(template, dict) else template,
    )


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
    """Return scores with which SentencePiece merges in the order of a BPE tokenizer."""
    ranks = {merges[i].replace(" ", ""): i for i in reversed(range(len(merges)))}
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def further_end_tokens(vocabulary: Vocabulary, settings: Any) -> dict[str, int]:
    """Return `eot` and `eom`: at most two tokens that end a model's text, but not llama.cpp's.

    Args:
        vocabulary: the tokenizer's keys.
        settings: of the model's generation.
    """
    given = getattr(settings, "eos_token_id", None)
    tokens, known = vocabulary.tokens, (None, vocabulary.special.get("eos"))
    ids = [x for x in (given if isinstance(given, list) else [given]) if x not in known]
    further = [i for i in ids if 0 <= i < len(tokens) and tokens[i] not in ENDS]
    return dict(zip(("eot", "eom"), further, strict=False))


def name_that_strips(
    name: str, vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[str]]:
    """Return a name for which llama.cpp strips as the tokenizer does, and notes on differences.

    GGUF has no key for stripping.

    Args:
        name: what the model is to be called.
        vocabulary: the tokenizer's keys.
        tokenizer: the checkpoint's.
    """
    added = tokenizer.added_tokens_decoder.values()
    strips = sorted(x.content for x in added if x.special and x.rstrip)
    known = set(vocabulary.tokens) >= _STRIPPED_BY_NAME
    named = any(x in name.lower() for x in STRIPS)
    if strips and known:
        return name if named else f"{name} (phi-3)", []
    note = "llama.cpp keeps white space after {}, which the tokenizer drops"
    return re.sub("(?i)phi-?3", "phi_3", name), [note.format(x) for x in strips[:1]]


def check_vocabulary(vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase) -> int:
    """Compare the tokens of text as the file describes them with the tokenizer's own.

    Args:
        vocabulary: as it was read back from the file.
        tokenizer: the checkpoint's.

    Returns:
        How many texts were compared; 0 if the user named a split unknown here.

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
            pairs = enumerate(zip_longest(ours, theirs))
            at = next(i for i, (a, b) in pairs if a != b)
            mine, own = ([vocabulary.tokens[i] for i in x[at : at + 3]] for x in (ours, theirs))
            raise UserError(
                f"llama.cpp would split {text!r} differently from token {at} on, {mine} instead "
                f"of {own}: this tokenizer cannot be expressed in GGUF"
            )
    return len(PROBES)


def _user_defined(vocabulary: Vocabulary) -> list[str]:
    kinds = zip(vocabulary.tokens, vocabulary.types, strict=True)
    return [token for token, kind in kinds if kind == TokenType.USER_DEFINED]


def _byte_level(vocabulary: Vocabulary) -> Callable[[str], list[int]]:
    """Return an encoder that does what llama.cpp's `gpt2` does with the file's keys."""
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    merges = [(a, b) for a, _, b in (x.partition(" ") for x in vocabulary.merges or ())]
    split = SPLITS[vocabulary.pre]
    backend = Tokenizer(models.BPE(ids, merges, ignore_merges=split.ignores_merges))
    backend.pre_tokenizer = pre_tokenizer(vocabulary.pre)
    backend.add_tokens(_user_defined(vocabulary))
    return lambda text: backend.encode(text, add_special_tokens=False).ids


def _best_first(vocabulary: Vocabulary) -> Callable[[str], list[int]]:
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

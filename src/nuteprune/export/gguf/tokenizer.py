"""A tokenizer as llama.cpp reads it, and a check that it would split text in the same way.

llama.cpp has two tokenizers that matter here: `gpt2` (byte-level BPE: merges, and a split of the
text before them that the file can only name) and `llama` (SentencePiece's BPE: scores). A wrong
name or score gives other tokens without a word, so the tokenizer that the written metadata
describes is built here a second time and compared with the original on text that is hard to split.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import pairwise, zip_longest
from typing import Any

from gguf import Keys, TokenType
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase

from nuteprune.errors import UserError
from nuteprune.export.gguf.splits import IGNORE_MERGES, PROBES, SPLITS, find_split, pre_tokenizer

KEY = Keys.Tokenizer
"""gguf's names for the keys of a file that describe a tokenizer."""
Vocabulary = Mapping[str, Any]
"""Such keys and their values."""
ENDS = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>"),
    *("<|endoftext|>", "<|eom_id|>", "<EOT>", "_<EOT>", "<|end_of_text|>", "<end_of_utterance>"),
)
"""Tokens by whose text llama.cpp knows that they end a generation; in `llama-vocab.cpp`."""
STRIPS = ("phi-3", "phi3")
"""Of models with one of these in their name llama.cpp drops white space after special tokens."""
_STRIPPED_BY_NAME = {"</s>", "<unk>", "<s>", "<|endoftext|>"}
"""Tokens that it then looks up, and does not load the file without."""


def read_vocabulary(
    tokenizer: PreTrainedTokenizerBase, size: int, pre: str | None = None, settings: Any = None
) -> dict[str, Any]:
    """Return the keys that describe a tokenizer, in the file's order.

    Args:
        tokenizer: a fast tokenizer with a BPE model.
        size: rows of the embedding; unused tokens fill them up.
        pre: llama.cpp's name of the split; None finds it.
        settings: of the model's generation; they may name further tokens that end a text.

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
    added, template = tokenizer("a").input_ids, tokenizer.chat_template
    first = str(backend.encode("a", add_special_tokens=False).tokens[0])
    ids = {x: getattr(tokenizer, f"{x}_token_id") for x in ("bos", "eos", "unk", "pad")}
    special = {x: int(i) for x, i in ids.items() if i is not None and i < size}
    special |= _further_end_tokens(tokens, special.get("eos"), settings)
    keys = {
        KEY.MODEL: "llama" if is_sentencepiece else "gpt2",
        KEY.PRE: "default" if is_sentencepiece else pre or find_split(backend),
        KEY.LIST: tokens,
        KEY.TOKEN_TYPE: types,
        KEY.MERGES: None if is_sentencepiece else merges,
        KEY.SCORES: _scores(tokens, merges) if is_sentencepiece else None,
        **{getattr(KEY, f"{x.upper()}_ID"): i for x, i in special.items()},
        KEY.ADD_BOS: added[0] == ids["bos"],
        KEY.ADD_EOS: added[-1] == ids["eos"],
        KEY.ADD_PREFIX: is_sentencepiece and first.startswith("▁"),
        KEY.CHAT_TEMPLATE: template.get("default") if isinstance(template, dict) else template,
    }
    return {key: value for key, value in keys.items() if value is not None}


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


def _further_end_tokens(tokens: list[str], eos: int | None, settings: Any) -> dict[str, int]:
    """Return `eot` and `eom`: at most two tokens that end a model's text, but not llama.cpp's."""
    given = getattr(settings, "eos_token_id", None)
    ids = [x for x in (given if isinstance(given, list) else [given]) if x not in (None, eos)]
    further = [i for i in ids if 0 <= i < len(tokens) and tokens[i] not in ENDS]
    return dict(zip(("eot", "eom"), further, strict=False))


def name_that_strips(
    name: str, tokens: Collection[str], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[str]]:
    """Return a name for which llama.cpp strips as the tokenizer does, and notes on differences.

    GGUF has no key for stripping.

    Args:
        name: what the model is to be called.
        tokens: those of the file.
        tokenizer: the checkpoint's.
    """
    added = tokenizer.added_tokens_decoder.values()
    strips = sorted(x.content for x in added if x.special and x.rstrip)
    known = set(tokens) >= _STRIPPED_BY_NAME
    named = any(x in name.lower() for x in STRIPS)
    if strips and known:
        return name if named else f"{name} (phi-3)", []
    note = "llama.cpp keeps white space after {}, which the tokenizer drops"
    return re.sub("(?i)phi-?3", "phi_3", name), [note.format(x) for x in strips[:1]]


def check_vocabulary(keys: Vocabulary, tokenizer: PreTrainedTokenizerBase) -> int:
    """Compare the tokens of text as the file describes them with the tokenizer's own.

    Args:
        keys: as they were read back from the file.
        tokenizer: the checkpoint's.

    Returns:
        How many texts were compared; 0 if the user named a split unknown here.

    Raises:
        UserError: if they differ.
    """
    is_byte_level = keys[KEY.MODEL] == "gpt2"
    if is_byte_level and keys[KEY.PRE] not in SPLITS:
        return 0
    encode = _byte_level(keys) if is_byte_level else _best_first(keys)
    for text in PROBES:
        theirs = tokenizer(text, add_special_tokens=False).input_ids
        ours = encode(text)
        if ours != theirs:
            pairs = enumerate(zip_longest(ours, theirs))
            at = next(i for i, (a, b) in pairs if a != b)
            mine, own = ([keys[KEY.LIST][i] for i in x[at : at + 3]] for x in (ours, theirs))
            raise UserError(
                f"llama.cpp would split {text!r} differently from token {at} on, {mine} instead "
                f"of {own}: this tokenizer cannot be expressed in GGUF"
            )
    return len(PROBES)


def _user_defined(keys: Vocabulary) -> list[str]:
    kinds = zip(keys[KEY.LIST], keys[KEY.TOKEN_TYPE], strict=True)
    return [token for token, kind in kinds if kind == TokenType.USER_DEFINED]


def _byte_level(keys: Vocabulary) -> Callable[[str], list[int]]:
    """Return an encoder that does what llama.cpp's `gpt2` does with the file's keys."""
    ids = {token: i for i, token in enumerate(keys[KEY.LIST])}
    merges = [(a, b) for a, _, b in (x.partition(" ") for x in keys.get(KEY.MERGES, ()))]
    backend = Tokenizer(models.BPE(ids, merges, ignore_merges=keys[KEY.PRE] in IGNORE_MERGES))
    backend.pre_tokenizer = pre_tokenizer(keys[KEY.PRE])
    backend.add_tokens(_user_defined(keys))
    return lambda text: backend.encode(text, add_special_tokens=False).ids


def _best_first(keys: Vocabulary) -> Callable[[str], list[int]]:
    """Return an encoder that does what llama.cpp's `llama` does with the file's keys."""
    ids = {token: i for i, token in enumerate(keys[KEY.LIST])}
    scores = keys[KEY.SCORES]
    byte_ids = [ids.get(f"<0x{byte:02X}>", -1) for byte in range(256)]
    longest_first = sorted(_user_defined(keys), key=len, reverse=True)
    defined = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

    def merged(pieces: list[str]) -> Iterable[int]:
        while pairs := [
            (-scores[ids[a + b]], i) for i, (a, b) in enumerate(pairwise(pieces)) if a + b in ids
        ]:
            _, at = min(pairs)
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        for piece in pieces:
            yield from [ids[piece]] if piece in ids else (byte_ids[x] for x in piece.encode())

    def encode(text: str) -> list[int]:
        found: list[int] = []
        # Between plain parts there are tokens that are looked for in the text as it is.
        for i, part in enumerate(defined.split(" " * keys[KEY.ADD_PREFIX] + text)):
            found += [ids[part]] if i % 2 else merged(list(part.replace(" ", "▁")))
        return found

    return encode

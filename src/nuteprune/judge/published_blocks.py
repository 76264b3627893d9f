"""The texts that `eval` measures perplexity on, read and cut into blocks by a protocol.

Shape suffixes: N blocks, T tokens of a block.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nuteprune.data.fingerprint import Fingerprint
from nuteprune.data.held_out import held_out_part
from nuteprune.data.readers import Documents
from nuteprune.data.specs import iter_documents, local_files
from nuteprune.data.tokens import after, bos_of, collect, tokens_of, too_short
from nuteprune.errors import UserError, in_one_line
from nuteprune.files import at_home
from nuteprune.judge.published import END_OF_TEXT, JOININGS, TEXTS, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Blocks:
    """A text, cut.

    Args:
        tokens_NT: token ids.
        context_N: how many of each block's first tokens are only read.
        described: how it was made, fit for JSON.
    """

    tokens_NT: Tensor
    context_N: Tensor
    described: Mapping[str, object]


def rows_of(
    spec: str,
    *,
    whole: bool = False,
    text_column: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> dict[str, Documents]:
    """Find the rows of a text, the empty ones too.

    Args:
        spec: a name in `TEXTS`, `name=FILE` for a local copy of one, or a DATA spec.
        whole: of a DATA spec, all of it, not only the held-out part.
        text_column: the column that holds the text; None finds it.
        tokenizer: renders rows of chat messages.

    Returns:
        Source name -> its documents, to be read as they are; their fingerprint is of all that is
        read of the source.

    Raises:
        UserError: if there is no such text, or (when read) it cannot be read.
    """
    name, is_copy, path = spec.partition("=")
    if spec in TEXTS:
        published = Documents(spec, partial(_hub_rows, spec), _published(spec))
        return {spec: Documents(spec, published.rows, published.fingerprint)}
    if is_copy and name in TEXTS:
        text = TEXTS[name]
        files = local_files(path)
        if files is not None and (at_home(path).is_dir() or files[0].suffix.lower() == ".txt"):
            raise UserError(
                f"{spec}: a copy of {name} is one Parquet or JSON file of its rows, which plain "
                "text and folders do not tell apart; pass that, or --data FILE as text of your own"
            )
        found = iter_documents(path, text_column=text_column or text.column, tokenizer=tokenizer)
        if len(found) != 1:
            raise UserError(
                f"{spec}: a copy of {name} is one text, and {path} has {len(found)} "
                f"({', '.join(found)}); pass one Parquet or JSON file of its rows"
            )
        (copy,) = found.values()
        copy.fingerprint.update(_published(name))
        first = Documents(name, lambda: islice(copy.rows(), text.rows), copy.fingerprint)
        return {name: first}
    sources = iter_documents(spec, text_column=text_column, tokenizer=tokenizer)
    return {
        name: Documents(name, x.rows if whole else partial(_held_out, name, x), x.fingerprint)
        for name, x in sources.items()
    }


def _published(name: str) -> Fingerprint:
    """Return the fingerprint of a published text before it is read."""
    return Fingerprint(names=[name, TEXTS[name].repo.lower()])


def _held_out(name: str, source: Iterable[str]) -> Iterator[str]:
    empty = True
    for text in held_out_part(source):
        empty = False
        yield text
    if empty:
        raise UserError(
            f"{name}: too few documents for one in twenty of them to be held out; pass --whole if "
            "none of it was trained on, or more text"
        )


def _hub_rows(name: str) -> Iterator[str]:
    import datasets

    text = TEXTS[name]
    try:
        rows = datasets.load_dataset(
            text.repo, data_files={"test": text.file}, revision=text.revision, split="test"
        )
        return iter(rows[text.column][: text.rows])
    # Whatever the hub client and the format's reader below `datasets` raise.
    except Exception as error:
        raise UserError(
            f"{name}: the hub does not give {text.file} of {text.repo} ({in_one_line(error)}); "
            f"pass a local copy as --data {name}=FILE, or other text"
        ) from error


def make_blocks(
    name: str, rows: Iterable[str], tokenizer: PreTrainedTokenizerBase, protocol: Protocol
) -> Blocks:
    """Cut the rows of a text into blocks.

    Args:
        name: what the text is called.
        rows: its rows.
        tokenizer: the model's tokenizer.
        protocol: how it is done.

    Returns:
        The blocks. Without overlap, tokens that fill no block are left out; with overlap, each
        token but the first is predicted once, the last block reaching back as far as it must.

    Raises:
        UserError: if the text is shorter than a block.
    """
    joining = protocol.joinings.get(name, protocol.joining)
    stride = protocol.stride or protocol.length
    most = protocol.blocks
    needed = sys.maxsize if most is None else protocol.length + stride * (most - 1)
    bos: list[int] = []
    if joining == END_OF_TEXT:  # as `data.training_text` makes its blocks
        bos = bos_of(tokenizer)
        special_tokens, documents = bool(bos), tokens_of(rows, tokenizer)
    else:  # published protocols have bos at the very start alone
        special_tokens, text = protocol.special_tokens, JOININGS[joining].join(rows)
        encoded = tokenizer(text, add_special_tokens=special_tokens, verbose=False)
        documents = iter([encoded["input_ids"]])
    tokens = collect(documents, needed).long()
    if len(tokens) < protocol.length - len(bos):
        raise too_short(name, len(tokens), protocol.length)
    tokens_NT, context_N = cut(tokens, protocol.length, stride, bos)
    described = {
        "joining": joining,
        "special_tokens": special_tokens,
        "block_length": protocol.length,
        "stride": stride,
        "block_count": len(tokens_NT[:most]),
    }
    return Blocks(tokens_NT[:most], context_N[:most], described)


def cut(tokens: Tensor, length: int, stride: int, bos: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
    """Cut tokens into blocks of a length, one every `stride`.

    Args:
        tokens: token ids (n,), n >= length.
        length: tokens per block.
        stride: tokens from start to start, at most the length.
        bos: what comes before the text in each block, and counts as part of its length.

    Returns:
        Blocks (N, T), and how many of each one's first tokens (N,) an earlier block predicts, or
        none can: the first of all, and without overlap the first of each.
    """
    read = length - len(bos)
    stride = min(stride, read)
    starts = torch.arange(0, len(tokens) - read + 1, stride)
    known_N = torch.full((len(starts),), read - stride)
    known_N[0] = 0
    left = len(tokens) - read - int(starts[-1])
    if stride < read and left:
        starts = torch.cat([starts, torch.tensor([len(tokens) - read])])
        known_N = torch.cat([known_N, torch.tensor([read - left])])
    blocks_NT = after(bos, tokens[starts[:, None] + torch.arange(read)])
    return blocks_NT, (known_N + len(bos)).clamp(min=1)

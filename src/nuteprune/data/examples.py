"""Instruction data as examples: the question is read, the answer is learned.

Shape suffixes: B examples of a batch, T tokens of the longest of them.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from nuteprune.data import readers
from nuteprune.data.columns import laid_out, row_document
from nuteprune.data.conversations import Row, encode, first_characters, stretches
from nuteprune.data.fingerprint import Fingerprint, split, split_long
from nuteprune.data.readers import shuffled
from nuteprune.data.specs import embedded, hub_parts, local_files
from nuteprune.data.tokens import check_ids
from nuteprune.distill.losses import IGNORED
from nuteprune.errors import UserError
from nuteprune.run_folder import SELF

HELD = 2**15
"""Rows that the next one is drawn from."""
_MULTIPLE = 8  # batches are padded to a multiple of so many tokens


@dataclass(eq=False, repr=False)
class Examples(Dataset[dict[str, Tensor]]):
    """Examples of different lengths.

    Args:
        ids: token ids of each example.
        labels: the same, `IGNORED` where a token is only read.
        skipped: rows that gave no example: without an answer, or with one that is cut off.
        fingerprint: that of the rows that they are made from, if there are any.
    """

    ids: Sequence[Tensor]
    labels: Sequence[Tensor]
    skipped: int
    fingerprint: Fingerprint = field(default_factory=Fingerprint)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index].long(), "labels": self.labels[index].long()}


def pad(examples: Sequence[Mapping[str, Tensor]], padding: int) -> dict[str, Tensor]:
    """Collate examples, each padded at its end to the length of the longest.

    Args:
        examples: `input_ids`, `labels` and, where they are padded, `attention_mask` (length of
            each,).
        padding: token id to fill up with; any will do, since nothing attends to it.

    Returns:
        `input_ids`, `labels` and `attention_mask`, all (B, T).
    """
    examples = [{"attention_mask": torch.tensor(1), **x} for x in examples]
    lengths = [len(x["input_ids"]) for x in examples]
    width = max(lengths)
    if min(lengths) < width:  # blocks of text, all of one length, stay as they are
        width = -(-width // _MULTIPLE) * _MULTIPLE
    batch = {}
    for name, value in {"input_ids": padding, "labels": IGNORED, "attention_mask": 0}.items():
        batch[name] = torch.full((len(examples), width), value)
        for row, example, length in zip(batch[name], examples, lengths, strict=True):
            row[:length] = torch.as_tensor(example[name])
    return batch


def holds_instructions(spec: str, text_column: str | None = None) -> bool:
    """Return whether a DATA spec is instruction data, by its first row; else it is plain text.

    Args:
        spec: the DATA spec.
        text_column: the column that holds the text; None finds it.

    Raises:
        UserError: a source cannot be read.
    """
    rows = _rows(spec, text_column, among_text=True)
    first = None if rows is None else next(iter(laid_out(rows, text_column)), None)
    return first is not None and _is_instruction(first)


def _is_instruction(found: Row) -> bool:
    _, row, layout = found
    return len(layout) > 1 or isinstance(row.get(layout[0]), list)


def _rows(
    spec: str, text_column: str | None, among_text: bool = False
) -> Iterator[tuple[str, object]] | None:
    """Return the rows of a DATA spec, None where it has none.

    Args:
        spec: the DATA spec.
        text_column: the column with the text or messages.
        among_text: whether files of plain text may lie among those of rows; they are left out.
    """
    if spec == SELF or embedded(spec):
        return None
    files = local_files(spec)
    if files is None:
        return readers.hub_rows(*hub_parts(spec))
    each = [(file, readers.file_rows(file, text_column)) for file in files]
    if all(rows is None for _, rows in each):
        return None
    text = [file for file, rows in each if rows is None]
    if text and not among_text:
        raise UserError(f"{text[0]}: plain text among files of rows; pass each in its own folder")
    return itertools.chain.from_iterable(rows for _, rows in each if rows is not None)


def read_examples(
    spec: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    most: int | None = None,
    template: str = "auto",
    text_column: str | None = None,
    vocab_size: int | None = None,
    seed: int = 0,
) -> Examples:
    """Read the training part of instruction data; labels mask the questions.

    A long row with held-out passages is cut off where the first of them begins.

    Args:
        spec: the DATA spec; rows of chat `messages`, or of instruction, input and output.
        tokenizer: the model's tokenizer.
        length: most tokens per example; longer ones are cut off.
        most: how many examples to draw at most, from all rows (of many, from the next `HELD`);
            None: all rows, in order.
        template: `auto`, `chat` or `alpaca`.
        text_column: the column with the messages; None finds it.
        vocab_size: the model's number of token ids; None does not check them.
        seed: draws the examples.

    Returns:
        The examples.

    Raises:
        UserError: a row is not instruction data, or no row gives an example.
    """
    if template == "auto":
        template = "chat" if tokenizer.chat_template else "alpaca"
    ids, labels, skipped, held_out = [], [], 0, 0
    files = local_files(spec)
    known = Fingerprint(names=[hub_parts(spec)[0].lower()] if files is None else [])
    rows = laid_out(_rows(spec, text_column) or (), text_column)
    for found in rows if most is None else shuffled(rows, random.Random(seed), HELD):
        where, row, layout = found
        if not _is_instruction(found):
            raise UserError(f"{where}: not instruction data, as the first row is; mend the row")
        document = row_document(row, layout, where, tokenizer)
        for text in split_long(document):
            known.add_document(text)
        held = split(document)[1]
        trained = document.find(held[0]) if held else None  # None: all of it
        if document.strip() and not document[:trained].strip():
            held_out += 1
            continue
        conversation = first_characters(stretches(found, tokenizer, template), trained)
        encoded = encode(conversation, tokenizer, length)
        if encoded is None:
            skipped += 1
            continue
        ids.append(encoded[0])
        labels.append(encoded[1])
        if len(ids) == most:
            break
    if not ids and held_out and not skipped:
        raise UserError(
            f"{spec}: all rows are held out to judge by ({held_out}): 5 % of any text are, and it "
            "has hardly more; pass more rows"
        )
    if not ids:
        raise UserError(
            f"{spec}: none of {skipped} rows has an answer within {length} tokens; "
            "pass a greater --length, or data with answers"
        )
    check_ids(torch.cat(ids), vocab_size)
    for file in files or ():
        known.add_file(file)
    return Examples(ids, labels, skipped, known)

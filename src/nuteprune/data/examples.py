"""Instruction data as examples: the question is read, the answer is learned.

Shape suffixes: B examples of a batch, T tokens of the longest of them.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from nuteprune.data import readers
from nuteprune.data.columns import cell_text, chat_turns, laid_out, render, row_document
from nuteprune.data.fingerprint import Fingerprint
from nuteprune.data.held_out import split
from nuteprune.data.readers import shuffled, split_long
from nuteprune.data.specs import embedded, hub_parts, local_files
from nuteprune.data.tokens import bos_of, check_ids, end_of, ids_of
from nuteprune.distill.losses import IGNORED
from nuteprune.errors import UserError
from nuteprune.run_folder import SELF

HELD = 2**15
"""Rows that the next one is drawn from."""
_MULTIPLE = 8  # batches are padded to a multiple of so many tokens
# The wording that models tuned on Alpaca-like data have seen (Taori et al. 2023).
_TASK = "Below is an instruction that describes a task"
_MORE = ", paired with an input that provides further context"
_WRITE = ". Write a response that appropriately completes the request.\n\n"
_ALPACA = _TASK + _WRITE + "### Instruction:\n{0}\n\n### Response:\n"
_ALPACA_INPUT = (
    _TASK + _MORE + _WRITE + "### Instruction:\n{0}\n\n### Input:\n{1}\n\n### Response:\n"
)

Row = tuple[str, Mapping[str, object], tuple[str, ...]]


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


# -- a row as text to read and text to learn


@dataclass(frozen=True)
class Stretch:
    """A stretch of a conversation, and whether it is learned or only read."""

    text: str
    learned: bool


def stretches(found: Row, tokenizer: PreTrainedTokenizerBase, template: str) -> list[Stretch]:
    """Return a row as text to read and text to learn.

    Args:
        found: where the row comes from, the row, and its columns.
        tokenizer: renders chats.
        template: `chat` or `alpaca`, for rows of instruction, input and output.
    """
    where, row, layout = found
    if len(layout) == 1:
        messages = row[layout[0]]
        assert isinstance(messages, list)
        return _chat_stretches(chat_turns(messages, where), where, tokenizer)
    instruction, more, answer = (cell_text(row, name, where, tokenizer) for name in layout)
    if template == "alpaca":
        asked = (_ALPACA_INPUT if more else _ALPACA).format(instruction, more)
        ends = "".join(tokenizer.convert_ids_to_tokens(end_of(tokenizer)))
        begins = str(tokenizer.bos_token) if bos_of(tokenizer) else ""
        return [Stretch(begins + asked, False), Stretch(answer + ends, bool(answer))]
    asked = "\n\n".join(filter(None, (instruction, more)))
    turns = [{"role": "user", "content": asked}]
    if answer:
        turns.append({"role": "assistant", "content": answer})
    return _chat_stretches(turns, where, tokenizer)


def _chat_stretches(
    turns: list[dict[str, str]], where: str, tokenizer: PreTrainedTokenizerBase
) -> list[Stretch]:
    """Learn every answer, or the last one alone where the template rewrites earlier turns."""
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    around = [_around(turns, i, where, tokenizer) for i in answers]
    before = ["", *(told for _, told in around)]
    each = zip(before, around, strict=False)
    if not all(asked.startswith(done) and told.startswith(asked) for done, (asked, told) in each):
        answers, around, before = answers[-1:], around[-1:], [""]
        if not around[0][1].startswith(around[0][0]):
            raise UserError(
                f"{where}: the model's chat template does not continue a question with its answer, "
                "so the two cannot be told apart; pass --template alpaca with rows of instruction "
                "and output, or plain text"
            )
    found: list[Stretch] = []
    for i, done, (asked, told) in zip(answers, before, around, strict=False):
        is_learned = bool(turns[i]["content"].strip())  # a call of a tool leaves it empty
        found += [Stretch(asked[len(done) :], False), Stretch(told[len(asked) :], is_learned)]
    return found


def _around(
    turns: list[dict[str, str]], answer: int, where: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, str]:
    """Return a chat up to an answer, and with it."""
    asked = render(turns[:answer], where, tokenizer, asks=True) if answer else ""
    return asked, render(turns[: answer + 1], where, tokenizer)


def first_characters(conversation: Iterable[Stretch], count: int | None) -> list[Stretch]:
    """Return the first `count` characters of a conversation, all of it for None."""
    kept: list[Stretch] = []
    for stretch in conversation:
        text = stretch.text[:count]
        kept.append(Stretch(text, stretch.learned))
        count = None if count is None else count - len(text)
    return kept


def encode(
    conversation: Iterable[Stretch], tokenizer: PreTrainedTokenizerBase, length: int
) -> tuple[Tensor, Tensor] | None:
    """Tokenize a conversation as in generation: each stretch continues the text before it.

    A stretch's tokens are cut from those of the whole text so far, since some tokenizers put a
    space before a text. Where the tokenizer joins tokens across a border, the stretch is tokenized
    alone.

    Args:
        conversation: text to read and text to learn; special tokens are part of it.
        tokenizer: the model's tokenizer.
        length: most tokens.

    Returns:
        Token ids and labels (T,), T <= length; None if nothing is learned within it.
    """
    ids: list[int] = []
    labels: list[int] = []
    text = ""
    for stretch in conversation:
        text += stretch.text
        whole, own = (ids_of(x, tokenizer) for x in (text, stretch.text))
        tokens = whole[len(ids) :] if whole[: len(ids)] == ids else own
        ids += tokens
        labels += tokens if stretch.learned else [IGNORED] * len(tokens)
    ids, labels = ids[:length], labels[:length]
    # The first token has nothing that it could be predicted from.
    if all(label == IGNORED for label in labels[1:]):
        return None
    return torch.tensor(ids, dtype=torch.int32), torch.tensor(labels, dtype=torch.int32)

"""Turns a row of instruction data into tokens: some only read, others learned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nuteprune.data.columns import cell_text, chat_turns, render
from nuteprune.data.tokens import bos_of, ids_of
from nuteprune.distill.losses import IGNORED
from nuteprune.errors import UserError

# The wording that models tuned on Alpaca-like data have seen (Taori et al. 2023).
_TASK = "Below is an instruction that describes a task"
_MORE = ", paired with an input that provides further context"
_WRITE = ". Write a response that appropriately completes the request.\n\n"
_ALPACA = _TASK + _WRITE + "### Instruction:\n{0}\n\n### Response:\n"
_ALPACA_INPUT = (
    _TASK + _MORE + _WRITE + "### Instruction:\n{0}\n\n### Input:\n{1}\n\n### Response:\n"
)

Row = tuple[str, Mapping[str, object], tuple[str, ...]]


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
        ends = tokenizer.eos_token or ""
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

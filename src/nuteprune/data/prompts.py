"""Prompts that models answer to be judged: a file's, or questions that a model writes itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nuteprune.data.columns import chat_turns, render
from nuteprune.data.decoding import TextInProgress, write_batch
from nuteprune.data.readers import file_rows
from nuteprune.data.tokens import Openings, bos_of, ids_of, openings, texts_of
from nuteprune.errors import UserError
from nuteprune.files import at_home
from nuteprune.processes import ALONE, Team, main_ones

COUNT: Final = 24
"""How many prompts are made if no file is given."""
SEED: Final = 1618
"""Draws the questions. A run draws its text with other seeds, so nothing was trained on these
prompts."""
QUESTION_TOKENS: Final = 48
"""Tokens of a question at most; one that the model does not end by then is left out."""
BEGINNING_TOKENS: Final = 32

_SPARE = 1.5  # times as many are begun as are wanted, since not all are ended


@dataclass(frozen=True)
class Prompts:
    """Prompts that models are to answer.

    Args:
        texts: each prompt as people read it, without the chat template.
        ids: token ids of each.
        source: where they come from, as the record states it.
    """

    texts: list[str]
    ids: list[list[int]]
    source: str


def read_prompts(path: Path, tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """Read prompts from a file of JSON lines.

    Args:
        path: its rows have `messages`, or `prompt`: a question where the tokenizer has a chat
            template, else the beginning of a text.
        tokenizer: the models'.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    file = at_home(path)
    rows = file_rows(file, None) if file.suffix.lower() in (".jsonl", ".json") else None
    if rows is None:
        raise UserError(f"--prompts {path}: pass a .jsonl file of rows with prompt or messages")
    texts, ids = [], []
    for where, row in rows:
        cells = row if isinstance(row, dict) else {}
        messages, prompt = cells.get("messages"), cells.get("prompt")
        if isinstance(messages, list) and messages:
            turns = chat_turns(messages, where)
            texts.append(turns[-1]["content"])
            ids.append(_chat(turns, where, tokenizer))
        elif isinstance(prompt, str) and prompt.strip():
            texts.append(prompt)
            ids.append(_ask(prompt, where, tokenizer))
        else:
            raise UserError(
                f"{where}: neither messages nor a prompt with text; pass rows such as "
                '{"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}'
            )
    if not ids:
        raise UserError(f"--prompts {path}: holds no rows; pass a file with some")
    return Prompts(texts, ids, f"of {file.name}")


def make_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Mapping[str, Tensor],
    count: int = COUNT,
    team: Team = ALONE,
) -> Prompts:
    """Return questions that a model writes, or beginnings of text where it has no chat template.

    Args:
        model: the dense model.
        tokenizer: its tokenizer.
        text: held-out blocks, source -> token ids (N, T); its sources have equal shares.
        count: most prompts.
        team: processes that share the questions out.

    Raises:
        UserError: if there is neither a chat template nor text.
    """
    asked = _questions(model, tokenizer, count, team) if tokenizer.chat_template else []
    if asked:
        ids = [_ask(question, "a question", tokenizer) for question in asked]
        return Prompts(asked, ids, f"questions written by the dense model, seed {SEED}")
    each = -(-count // max(len(text), 1))
    ids = [
        row[: min(BEGINNING_TOKENS, max(1, len(row) // 2))]
        for blocks_NT in text.values()
        for row in blocks_NT[:each].tolist()
    ]
    if not ids:
        raise UserError("the model has no chat template to ask with; pass text, or --prompts FILE")
    ids = ids[:count]
    told = texts_of(tokenizer, ids, skip_special_tokens=True)
    return Prompts(told, ids, "beginnings of held-out text")


def _questions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, team: Team
) -> list[str]:
    """Return questions that a model draws at temperature 1: those of a batch that it ends first."""
    opening = main_ones(openings(model, tokenizer, most=2**20, seed=SEED))
    if not opening.asks:
        return []
    batch = [TextInProgress(opening, None) for _ in range(round(count * _SPARE))]
    most = len(opening.asks) + QUESTION_TOKENS + len(opening.answers)
    generator = torch.Generator().manual_seed(SEED)
    for _ in write_batch(model, opening, batch, most, generator, team):
        if sum(not (text.asks or text.given) for text in batch) >= count:
            break
    texts = texts_of(tokenizer, filter(None, (_question(x.ids, opening) for x in batch)))
    return [text.strip() for text in texts if text.strip()][:count]


def _question(ids: list[int], opening: Openings) -> list[int]:
    """Return the tokens between what comes before a question and what comes after it."""
    first, answers = len(opening.asks), list(opening.answers)
    ends = (i for i in range(first, len(ids)) if ids[i : i + len(answers)] == answers)
    return ids[first : next(ends, first)]


def _ask(prompt: str, where: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if tokenizer.chat_template:
        return _chat([{"role": "user", "content": prompt}], where, tokenizer)
    return [*bos_of(tokenizer), *ids_of(prompt, tokenizer)]


def _chat(turns: list[dict[str, str]], where: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return ids_of(render(turns, where, tokenizer, asks=True), tokenizer)

"""What the student writes itself, late in a run: it unlearns to repeat itself.

A pruned model that only read given text predicts well, and still goes round in circles when it
writes. So in the last steps it answers what the training text asks, greedily, and tokens that
complete a 4-gram of an answer again are made less likely. A teacher does not help: once a loop has
begun, the dense model too goes on.
Source: unlikelihood training, Welleck et al. 2019 (arXiv 1908.04319).

Shape suffixes: B blocks of a batch, N blocks in all, T tokens of a block.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from nuteprune.data.decoding import seconds_per_token
from nuteprune.data.tokens import after, bos_of, chat_marks, ends_of
from nuteprune.judge.answers import repeats, write
from nuteprune.processes import Team

LAST = 0.15
"""Share of the steps, the last ones, that read own answers."""
EVERY = 6
"""Steps after which the student answers anew."""
ANSWERS = 24
"""Prompts that it answers each time."""
TOKENS = 128
"""Tokens of an answer at most."""
ENOUGH = 16
"""Repeats up to which an answer is read: more show no new way into a loop."""
PROMPTED = 1000
"""Blocks of the text that prompts are looked for in, at most."""
BEGINNING = 32
"""Tokens of a text's beginning, where there are no questions."""
WITHOUT_TEACHER = 0.65
"""Time of a batch of own answers, as a share of a step: about, by their products."""


@dataclass
class OwnAnswers:
    """Blocks of the student's answers to questions of the text.

    Args:
        prompts: token ids of each prompt.
        ends: tokens that end an answer.
        bos: tokens before each block.
        length: tokens per block.
        first: the first step that reads answers.
        seed: draws which prompts are answered.
        ids_NT: the blocks.
        repeats_NT: which of their tokens complete a 4-gram of the same answer again.
        read: how many batches of them were read.
    """

    prompts: Sequence[list[int]]
    ends: Collection[int]
    bos: Sequence[int]
    length: int
    first: int
    seed: int
    ids_NT: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.long))
    repeats_NT: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.bool))
    read: int = 0

    def read_in(self, step: int) -> bool:
        """Whether a step reads answers: one of the last of the run."""
        return step >= self.first

    def due(self, step: int) -> bool:
        """Whether the student answers before a step."""
        return self.read_in(step) and (step - self.first) % EVERY == 0

    def tensors(self) -> dict[str, Tensor]:
        """Return the answers of the moment, for a checkpoint."""
        read = torch.tensor(self.read)
        return {"ids": self.ids_NT, "repeats": self.repeats_NT, "read": read}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go back to answers that `tensors` returned."""
        self.ids_NT = tensors.get("ids", self.ids_NT)
        self.repeats_NT = tensors.get("repeats", self.repeats_NT)
        self.read = int(tensors.get("read", 0))

    def write(self, student: PreTrainedModel, step: int, team: Team) -> None:
        """Let the student answer some of the prompts; all processes call it.

        Answers without repeats are not kept, and others up to their first `ENOUGH` repeats.
        """
        rng = random.Random(f"{self.seed} {step}")
        asked = rng.sample(self.prompts, min(ANSWERS, len(self.prompts)))
        begun = [[*self.bos, *x] for x in asked]
        answers = write(student, begun, self.ends, min(TOKENS, self.length), team)
        marked: list[tuple[int, bool]] = []
        for prompt, answer in zip(asked, answers, strict=True):
            marks = list(repeats(answer))
            places = [i for i, x in enumerate(marks) if x][:ENOUGH]
            if places:
                marked += [(x, False) for x in prompt]
                marked += list(zip(answer, marks, strict=True))[: places[-1] + 1]
        size = self.length - len(self.bos)
        missing = -len(marked) % size
        marked += (marked * size)[:missing]
        whole = torch.tensor(marked, dtype=torch.long).view(len(marked) // size, size, 2)
        self.ids_NT = after(self.bos, whole[..., 0])
        self.repeats_NT = after([0] * len(self.bos), whole[..., 1]).bool()
        self.read = 0

    def next_blocks(self, args: TrainingArguments) -> tuple[Tensor, Tensor]:
        """Return token ids (B, T) of the next blocks, and which tokens repeat (B, T).

        Args:
            args: how many there are to a batch, and which process of how many reads them.
        """
        size, count = args.per_device_train_batch_size, len(self.ids_NT)
        first = (self.read * args.world_size + args.process_index) * size
        rows = [(first + i) % count for i in range(size * bool(count))]
        self.read += 1
        return self.ids_NT[rows].to(args.device), self.repeats_NT[rows].to(args.device)


def own_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks_NT: Tensor,
    steps: int,
    seed: int,
) -> OwnAnswers:
    """Return answers, none yet, to the questions in blocks of text; see `prompts_in`."""
    bos = bos_of(tokenizer)
    prompts = prompts_in(blocks_NT[:, len(bos) :], *chat_marks(tokenizer), bos)
    first = steps - own_steps(steps)
    return OwnAnswers(prompts, ends_of(model, tokenizer), bos, blocks_NT.shape[1], first, seed)


def can_be_asked(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it has a chat template that shows where a question begins and where it ends.

    Models without one continue text, and on Gemma 3 270M reading that gained nothing (docs/log.md).
    """
    return all(chat_marks(tokenizer))


def own_steps(steps: int) -> int:
    """Return how many of a run's steps, the last ones, read own answers.

    One alone is not worth the time to answer.
    """
    own = round(LAST * steps)
    return own if own > 1 else 0


def prompts_in(
    blocks_NT: Tensor, asks: list[int], answers: list[int], bos: list[int]
) -> list[list[int]]:
    """Return the questions in blocks, as they are put to a model, or beginnings where few are.

    None is longer than half of a block, so that an answer has room.

    Args:
        blocks_NT: token ids, without what comes before each block.
        asks: what comes before a question.
        answers: what comes between a question and its answer.
        bos: what comes before each block.
    """
    if bos and asks[: len(bos)] == bos:
        asks = asks[len(bos) :]
    found, most = [], blocks_NT.shape[1] // 2
    for row in blocks_NT.tolist() if asks else ():  # BOS may be all that asks
        start = len(row)
        for i in range(len(row)):
            if row[i : i + len(asks)] == asks:
                start = i
            if i >= start + len(asks) and row[i : i + len(answers)] == answers:
                found.append(row[start : i + len(answers)])
                start = len(row)
    found = [x for x in found if len(x) <= most]
    beginnings: list[list[int]] = blocks_NT[:, : min(BEGINNING, most)].tolist()
    return found if len(found) >= ANSWERS else beginnings


def seconds_to_answer(student: PreTrainedModel, length: int) -> float:
    """Return the seconds of a set of answers, timed on the first positions.

    Args:
        student: answers.
        length: tokens per block.
    """
    return min(TOKENS, length) * seconds_per_token(student, ANSWERS)

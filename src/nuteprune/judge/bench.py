"""Speed of models, measured side by side: timings, medians, and the bound of the cut.

Shape suffixes: B sequences of a batch, T tokens of a prompt.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nuteprune.gates.budget import Budget
from nuteprune.model.anatomy import Anatomy

GOOD = 0.9
"""Share of the bound that counts as reached."""
_EASY_MULTIPLE = 128  # matrix sizes that kernels of all kinds tile evenly


@dataclass(frozen=True)
class Setting:
    """What is timed.

    Args:
        batch_size: sequences at a time.
        length: tokens of each prompt.
        new_tokens: tokens decoded after it.
    """

    batch_size: int
    length: int
    new_tokens: int


@dataclass(frozen=True)
class Work:
    """How much of a model has to be moved and multiplied.

    Args:
        parameters: all of them, tied ones once.
        blocks: those of the decoder layers' projections.
        head: those of the language head.
        moved: those that every decoded token reads: all but an embedding of which it reads a row.
        bytes_per_parameter: as the model is held in memory.
        neurons: greatest common divisor of the layers' neuron counts.
    """

    parameters: int
    blocks: int
    head: int
    moved: int
    bytes_per_parameter: int
    neurons: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Work:
        """Count a model."""
        anatomy = Anatomy(model)
        everything = anatomy.parameters()
        table = 0 if anatomy.tied else anatomy.embedding.weight.numel()
        return cls(
            everything,
            Budget.of(anatomy).before,
            anatomy.head.weight.numel(),
            everything - table,
            model.dtype.itemsize,
            math.gcd(*(layer.neurons for layer in anatomy.shape.layers)),
        )

    def prefill(self, setting: Setting) -> int:
        """Multiply-adds with weights in a prefill; the head serves only the last token."""
        return setting.batch_size * (setting.length * self.blocks + self.head)

    def decode(self, setting: Setting) -> int:
        """Bytes of weights that a decoding step reads, whatever the batch."""
        return self.moved * self.bytes_per_parameter


@dataclass(frozen=True)
class Spread:
    """A median and the range that it comes from."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of values, of which there is at least one."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Timing:
    """One pass.

    Args:
        first_token: seconds until the first new token of each sequence is known.
        decode: seconds for the other new tokens.
        peak_memory: bytes; of the accelerator where one is used, else of the process.
    """

    first_token: float
    decode: float
    peak_memory: int = 0


@torch.inference_mode()
def time_once(model: PreTrainedModel, prompt_BT: Tensor, new_tokens: int) -> Timing:
    """Time greedy decoding with a KV cache.

    Args:
        model: a causal LM.
        prompt_BT: token ids to start from, on the model's device.
        new_tokens: tokens decoded after the first one.
    """
    _wait(model)
    started = time.perf_counter()
    output = model(input_ids=prompt_BT, use_cache=True, logits_to_keep=1)
    key = "cache" if "cache" in output else "past_key_values"  # named by version
    next_B1 = output.logits[:, -1:].argmax(-1)
    _wait(model)
    known = time.perf_counter()
    for _ in range(new_tokens):
        output = model(input_ids=next_B1, use_cache=True, logits_to_keep=1, **{key: output[key]})
        next_B1 = output.logits[:, -1:].argmax(-1)
    _wait(model)
    return Timing(known - started, time.perf_counter() - known)


def _wait(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def decode_rates(
    models: Mapping[str, PreTrainedModel],
    prompt_BT: Tensor,
    new_tokens: int = 32,
    repeats: int = 3,
) -> dict[str, float]:
    """Measure decoding of models in one process, in turn, so that drift hits all alike.

    Args:
        models: name -> model.
        prompt_BT: token ids that decoding starts from.
        new_tokens: tokens decoded per repeat.
        repeats: counted repeats, after one to warm up.

    Returns:
        Name -> median of tokens per second, over the whole batch, prompt not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(repeats + 1):
        for name, model in models.items():
            timing = time_once(model, prompt_BT.to(model.device), new_tokens)
            if repeat:
                seconds[name].append(timing.decode)
    tokens = new_tokens * prompt_BT.shape[0]
    return {name: tokens / statistics.median(times) for name, times in seconds.items()}


def summarize(setting: Setting, timings: Sequence[Timing]) -> dict[str, Any]:
    """Return one model's figures in one setting, fit for JSON.

    Args:
        setting: what was timed.
        timings: at least one pass.
    """
    read, made = setting.batch_size * setting.length, setting.batch_size * setting.new_tokens
    spreads = {
        "prefill_tokens_per_second": Spread.of([read / x.first_token for x in timings]),
        "decode_tokens_per_second": Spread.of([made / x.decode for x in timings]),
        "first_token_seconds": Spread.of([x.first_token for x in timings]),
    }
    peak = max(x.peak_memory for x in timings)
    return {**{k: asdict(v) for k, v in spreads.items()}, "peak_memory_bytes": peak}


def compare(
    setting: Setting,
    ours: Sequence[Timing],
    dense: Sequence[Timing],
    our_work: Work,
    dense_work: Work,
) -> dict[str, dict[str, float]]:
    """Return how many times faster a model is than the dense one, and what its size allows.

    Args:
        setting: what was timed.
        ours: the model's passes, each next to the dense one's of the same index.
        dense: the dense model's.
        our_work: what the model has to move and multiply.
        dense_work: what the dense one has.

    Returns:
        Phase (`prefill`, `decode`) -> `median`, `low`, `high` of the paired ratios, `bound` (the
        ratio of the work, that with the context left aside) and `reached`, the median's share of
        the bound.
    """
    pairs = list(zip(dense, ours, strict=True))
    ratios = {
        "prefill": [old.first_token / new.first_token for old, new in pairs],
        "decode": [old.decode / new.decode for old, new in pairs],
    }
    bounds = {
        "prefill": dense_work.prefill(setting) / our_work.prefill(setting),
        "decode": dense_work.decode(setting) / our_work.decode(setting),
    }
    found = {}
    for phase, values in ratios.items():
        spread, bound = Spread.of(values), bounds[phase]
        found[phase] = {**asdict(spread), "bound": bound, "reached": spread.median / bound}
    return found


def advice(comparisons: Sequence[Mapping[str, Mapping[str, float]]], work: Work) -> list[str]:
    """Return what to say where a model stays below its bound.

    Args:
        comparisons: of each setting, from `compare`.
        work: the model's.
    """
    lines = []
    for phase, why in (
        ("prefill", "attention within the prompt, norms and many small operations"),
        ("decode", "attention over the context, norms and the calls of many small operations"),
    ):
        reached = [found[phase]["reached"] for found in comparisons]
        if reached and min(reached) < GOOD:
            lines.append(
                f"{phase} reaches {min(reached):.0%} of its bound at worst: time goes into what "
                f"does not shrink ({why}), the more so the smaller the model"
            )
    if not lines:
        return []
    if work.neurons % _EASY_MULTIPLE == 0:
        return [*lines, f"neuron counts are multiples of {work.neurons}: no larger one would help"]
    remedy = (
        f"neuron counts are multiples of {work.neurons}; prune with --neuron-multiple "
        f"{_EASY_MULTIPLE}: kernels tile such matrices evenly"
    )
    return [*lines, remedy]

"""Speed of models, measured side by side: timings, medians, and their bound.

Shape suffixes: B sequences of a batch, T tokens of a prompt.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from nuteprune.judge.work import Work, Workload
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.forwards import cache_name

PASSES = 5
"""Fewer passes than this tell nothing of a difference."""


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
def time_once(model: PreTrainedModel, setting: Workload) -> Timing:
    """Time one pass of random tokens: greedy decoding with a KV cache.

    Args:
        model: a causal LM.
        setting: how many tokens are read, and decoded after the first one.
    """
    vocabulary = Anatomy(model).embedding.weight.shape[0]
    size, random = (setting.batch_size, setting.length), torch.Generator().manual_seed(0)
    prompt_BT = torch.randint(vocabulary, size, generator=random).to(model.device)
    started = now(model)
    output = model(input_ids=prompt_BT, use_cache=True, logits_to_keep=1)
    key = cache_name(output)
    next_B1 = output.logits[:, -1:].argmax(-1)
    known = now(model)
    for _ in range(setting.new_tokens):
        output = model(input_ids=next_B1, use_cache=True, logits_to_keep=1, **{key: output[key]})
        next_B1 = output.logits[:, -1:].argmax(-1)
    return Timing(known - started, now(model) - known)


def hardware_of(device: torch.device | str) -> str:
    """Return an accelerator's name, or `CPU`."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def now(model: PreTrainedModel) -> float:
    """Return the time, in seconds, when the model's device has done what it was told."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def _spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median of values, and the range that it comes from."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def summarize(setting: Workload, timings: Sequence[Timing]) -> dict[str, Any]:
    """Return one model's figures in one setting, fit for JSON.

    Args:
        setting: the timed setting.
        timings: at least one pass.
    """
    read, made = setting.batch_size * setting.length, setting.batch_size * setting.new_tokens
    return {
        "prefill_tokens_per_second": _spread([read / x.first_token for x in timings]),
        "decode_tokens_per_second": _spread([made / x.decode for x in timings]),
        "first_token_seconds": _spread([x.first_token for x in timings]),
        "peak_memory_bytes": max(x.peak_memory for x in timings),
    }


def compare(
    setting: Workload,
    ours: Sequence[Timing],
    dense: Sequence[Timing],
    our_work: Work,
    dense_work: Work,
) -> dict[str, dict[str, Any]]:
    """Return how many times faster a model is than the dense one, and what its size allows.

    Args:
        setting: the timed setting.
        ours: the model's passes, each next to the dense one's of the same index.
        dense: the dense model's.
        our_work: the model's bytes and multiply-adds.
        dense_work: the dense model's.

    Returns:
        Phase (`prefill`, `decode`, `both`) -> `median`, `low`, `high` of the paired ratios, `bound`
        (the most that the removed work and calls allow), `reached`, the median's share of the
        bound, and `verdict`.
    """
    pairs = list(zip(dense, ours, strict=True))
    ratios = {
        "prefill": [old.first_token / new.first_token for old, new in pairs],
        "decode": [old.decode / new.decode for old, new in pairs],
        "both": [
            (old.first_token + old.decode) / (new.first_token + new.decode) for old, new in pairs
        ],
    }
    calls = our_work.calls(dense_work)
    bounds = {
        "prefill": dense_work.prefill(setting) / our_work.prefill(setting),
        "decode": dense_work.decode(setting) / our_work.decode(setting),
    }
    bounds["both"] = max(bounds.values())
    found: dict[str, dict[str, Any]] = {}
    for phase, values in ratios.items():
        figures = {**_spread(values), "bound": max(bounds[phase], calls)}
        said = verdict(figures, len(values))
        reached = figures["median"] / figures["bound"] if said == "faster" else None
        found[phase] = {**figures, "reached": reached, "verdict": said}
    return found


def verdict(ratio: Mapping[str, float], passes: int = PASSES) -> str:
    """Return what a ratio of times says: `faster`, `slower`, `none` (no difference), or `noise`.

    A ratio above its bound says that the machine was not the same for both.

    Args:
        ratio: a mapping with `median`, `low`, `high` and `bound`.
        passes: how many pairs of passes were timed; too few say nothing.
    """
    if ratio["median"] > ratio["bound"]:
        return "noise"
    if passes < PASSES or ratio["low"] <= 1 <= ratio["high"]:
        return "none"
    return "faster" if ratio["median"] > 1 else "slower"


def say_ratio(ratio: Mapping[str, Any]) -> str:
    """Return a ratio of times in words, for people.

    Args:
        ratio: a mapping with `median` and `verdict`.
    """
    found = ratio["verdict"]
    said = {"noise": "noise, above its bound", "none": "no difference measured"}
    return said.get(found) or f"{ratio['median']:.2f} x"

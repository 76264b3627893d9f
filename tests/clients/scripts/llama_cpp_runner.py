"""Runs where nuteprune and llama.cpp's binding are: greedy tokens of several sequences, as JSON."""

from __future__ import annotations

import json
import sys

import numpy as np

from nuteprune.judge.llama_cpp import LlamaCppRunner
from nuteprune.judge.work import Work, Workload


def greedy(job: dict) -> list[list[int]]:
    """Return the tokens of a first pass over the prompts, and of `steps` more."""
    prompt_BT = np.array(job["prompt"])
    work = Work(0, 0, 0, 0, 4, 1, 0, 0, 1, 1)
    runner = LlamaCppRunner(job["file"], work, None, threads=1)
    runner._make_room(Workload(*prompt_BT.shape, job["steps"]))
    made = [runner._eval(prompt_BT, 0)]
    for step in range(job["steps"]):
        made.append(runner._eval(made[-1], prompt_BT.shape[1] + step))
    return np.concatenate(made, axis=1).tolist()


print(json.dumps(greedy(json.loads(sys.stdin.read()))))

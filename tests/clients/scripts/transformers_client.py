"""Runs where transformers is installed, and nuteprune is not: says what a checkpoint generates."""

from __future__ import annotations

import json
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


def run(job: dict) -> dict:
    """Return the greedy continuation of a prompt, a text's tokens, and the version."""
    how = {"trust_remote_code": True} if job["remote_code"] else {}
    model = AutoModelForCausalLM.from_pretrained(job["folder"], **how).eval()
    tokens = torch.tensor([job["prompt"]])
    steps = {"max_new_tokens": job["steps"], "min_new_tokens": job["steps"]}
    mask = torch.ones_like(tokens)
    made = model.generate(tokens, attention_mask=mask, do_sample=False, pad_token_id=0, **steps)
    return {
        "made": made[0, tokens.shape[1] :].tolist(),
        "tokens": AutoTokenizer.from_pretrained(job["folder"])(job["text"]).input_ids,
        "class": type(model).__name__,
        "version": transformers.__version__,
    }


for line in sys.stdin:
    print("RESULT", json.dumps(run(json.loads(line))), flush=True)

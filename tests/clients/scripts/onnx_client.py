"""Runs ONNX Runtime alone: feeds a graph by the names of its inputs, and says what came out."""

from __future__ import annotations

import json
import sys

import numpy as np
import onnxruntime


def run(job: dict) -> dict:
    """Return the logits of prompts' last tokens, and their greedy continuations with the cache."""
    session = onnxruntime.InferenceSession(job["file"], providers=["CPUExecutionProvider"])
    ids = np.array(job["prompts"])
    mask = np.array(job["mask"])
    shapes = {x.name: x.shape for x in session.get_inputs() if x.name.startswith("past")}
    cache = {n: np.zeros((len(ids), s[1], 0, s[3]), np.float32) for n, s in shapes.items()}
    made, first = [], None
    for _ in range(job["steps"]):
        positions = (mask.cumsum(1) - 1).clip(0)[:, -ids.shape[1] :]
        feed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **cache}
        output = dict(
            zip([x.name for x in session.get_outputs()], session.run(None, feed), strict=True)
        )
        cache = {name: output[name.replace("past_key_values", "present")] for name in cache}
        last = output["logits"][:, -1]
        first = last if first is None else first
        ids = last.argmax(-1)[:, None]
        mask = np.concatenate([mask, np.ones_like(ids)], 1)
        made.append(ids[:, 0].tolist())
    kv_heads = {name: shape[1] for name, shape in shapes.items()}
    return {"logits": first.tolist(), "made": np.array(made).T.tolist(), "kv_heads": kv_heads}


for line in sys.stdin:
    print("RESULT", json.dumps(run(json.loads(line))), flush=True)

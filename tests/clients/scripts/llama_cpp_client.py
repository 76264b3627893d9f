"""Runs where only llama.cpp is installed: loads GGUF files and says what came out, as JSON."""

from __future__ import annotations

import json
import sys

from llama_cpp_py_sync import Llama


def run(job: dict) -> dict:
    """Return the tokens of texts, the prompt's last logits, and the greedy continuation."""
    model = Llama(
        job["file"],
        n_ctx=job.get("context", 256),
        n_threads=2,
        flash_attn_type=0,
        type_k="f32",
        type_v="f32",
    )
    # The binding asks for embeddings too. A hybrid then gives no logits; others die without.
    if job.get("hybrid"):
        model._lib.llama_set_embeddings(model._ctx, False)
    texts = [model.tokenize(text, add_special=False) for text in job.get("texts", ())]
    tokens, past, logits, made = job["prompt"], 0, None, []
    for _ in range(job["steps"]):
        past = model._eval_tokens(tokens, past)
        values = model._lib.llama_get_logits_ith(model._ctx, -1)
        row = model._ffi.unpack(values, model.n_vocab)
        logits = logits or row
        tokens = [max(range(len(row)), key=row.__getitem__)]
        made += tokens
    model.close()
    return {"made": made, "logits": logits, "texts": texts}


for line in sys.stdin:
    print("RESULT", json.dumps(run(json.loads(line))), flush=True)

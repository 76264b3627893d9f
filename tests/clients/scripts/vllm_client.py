"""Runs where vLLM is installed: serves a checkpoint and says what it generates, as JSON."""

from __future__ import annotations

import json
import os
import sys

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


def run(job: dict) -> dict:
    """Return the greedy continuation of a prompt, and the log-probability of each token."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    model = LLM(
        job["folder"],
        trust_remote_code=job["remote_code"],
        model_impl=job["implementation"],
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype=job["dtype"],
        max_model_len=64,
        max_num_seqs=2,
        hf_overrides=job["overrides"],
    )
    steps = job["steps"]
    how = SamplingParams(
        max_tokens=steps, min_tokens=steps, temperature=0, logprobs=0, detokenize=False
    )
    output = model.generate([{"prompt_token_ids": job["prompt"]}], how)[0].outputs[0]
    chosen = zip(output.logprobs, output.token_ids, strict=True)
    model.llm_engine.engine_core.shutdown()  # the next job has a model of its own
    cleanup_dist_env_and_memory()
    return {"made": list(output.token_ids), "logprobs": [x[i].logprob for x, i in chosen]}


for line in sys.stdin:
    print("\nRESULT", json.dumps(run(json.loads(line))), flush=True)

"""The job of `write`: text that a dense model writes itself, in a file that runs can share."""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from nuteprune.console import Output
from nuteprune.data.decoding import WriteBatch
from nuteprune.data.tokens import check_positions
from nuteprune.errors import RunFailed, UserError
from nuteprune.files import at_home, partial_of, remove, writing
from nuteprune.jobs.guard import alone, check_file
from nuteprune.jobs.options import Writing
from nuteprune.jobs.sources import load_model, load_tokenizer, locate, pick_device, pick_dtype
from nuteprune.run import in_percent
from nuteprune.run_folder import SELF_WRITTEN
from nuteprune.stages.write import write


def run(asked: Writing, output: Output) -> dict[str, Any]:
    """Let a model write text; the written part of the same text is continued.

    Raises:
        UserError: for anything that cannot work; nothing is written then.
        RunFailed: if writing goes wrong on the way.
    """
    started = time.monotonic()
    path = at_home(asked.out)
    check_file("--out", path, [("model", asked.model)], asked.overwrite, SELF_WRITTEN)
    device, dtype = pick_device(asked.device), pick_dtype(asked.dtype, asked.device)
    tokenizer = load_tokenizer(asked.model, asked.trust_remote_code)
    model = load_model(asked.model, dtype)
    check_positions(asked.length, model.config)
    engine = engine_of(asked, dtype)
    # The stage writes a folder's file batch by batch, so that a killed command goes on.
    folder = partial_of(path)
    with alone(folder), output.bars() as bars:
        try:
            texts = write(
                model if engine else model.to(device),  # type: ignore[arg-type]
                tokenizer,
                tokens=asked.tokens,
                length=asked.length,
                seed=asked.seed,
                folder=folder,
                progress=in_percent(bars.update),
                engine=engine,
            )
        except RunFailed as error:  # the user knows the file by its own name
            why = getattr(error.__cause__, "strerror", None) or error
            hint = "make room, then give the same command again to go on"
            raise RunFailed(f"cannot write {asked.out}: {why}; {hint}") from error
        with writing(path):
            os.replace(folder / SELF_WRITTEN, path)
        remove(folder)
    tokens = sum(map(len, texts))
    output.line(f"Saved   {asked.out}: {len(texts)} texts, {tokens} tokens")
    output.line(f"Next    nuteprune prune {asked.model} --own-text {asked.out} ...")
    return {
        "out": str(asked.out),
        "model": asked.model,
        "texts": len(texts),
        "tokens": tokens,
        "seconds": round(time.monotonic() - started, 1),
    }


def engine_of(asked: Writing, dtype: torch.dtype) -> WriteBatch | None:
    """Return what writes in the model's place; None: the model does. Errors as of `run`."""
    if asked.engine == "torch":
        return None
    if asked.engine != "vllm":
        raise UserError(f"--engine is {asked.engine}; pass torch or vllm")
    if asked.device != "auto":
        raise UserError("--device is for --engine torch: vLLM finds its own; leave --device out")
    from nuteprune.data.vllm_writer import VllmWriter

    return VllmWriter(
        locate(asked.model),
        dtype,
        asked.length,
        seed=asked.seed,
        trust_remote_code=asked.trust_remote_code,
    )

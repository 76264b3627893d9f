"""`bench --engine llama.cpp` with the real llama.cpp."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nuteprune.export.checkpoint import save
from nuteprune.export.gguf.write import write_gguf
from tests.conftest import json_line
from tests.greedy import continuation

from .conftest import SCRIPTS

pytestmark = pytest.mark.clients
SOURCE = Path(__file__).parents[2] / "src"


@pytest.fixture
def run_there(python_of: Callable, client_environment: Callable) -> Callable[..., str]:
    """Runs Python where both packages are; returns stdout."""

    def run(*words: Any, told: str = "") -> str:
        done = subprocess.run(
            [str(python_of("ours-llama-cpp")), "-W", "ignore", *map(str, words)],
            input=told,
            capture_output=True,
            text=True,
            env=client_environment(PYTHONPATH=str(SOURCE)),
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return run


def test_sequences_of_a_batch_are_decoded_as_generate_does(
    tiny_model: Callable, tiny_tokenizer: Any, run_there: Callable, tmp_path: Path
) -> None:
    model = tiny_model("llama", vocab_size=300)
    write_gguf(model, tiny_tokenizer, tmp_path / "model.gguf", type_name="f32")
    prompt_BT = torch.randint(3, 300, (3, 9), generator=torch.Generator().manual_seed(0))
    job = {"file": str(tmp_path / "model.gguf"), "prompt": prompt_BT.tolist(), "steps": 5}
    made = json.loads(run_there(SCRIPTS / "llama_cpp_runner.py", told=json.dumps(job)))
    assert made == continuation(model, prompt_BT, 6, eos_token_id=None).tolist()


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_a_pruned_model_next_to_the_dense_one(
    dtype: str,
    tiny_model: Callable,
    tiny_tokenizer: Any,
    prune_at_random: Callable,
    run_there: Callable,
    tmp_path: Path,
) -> None:
    dense = tiny_model("llama", vocab_size=300)
    save(dense, tmp_path / "dense", tiny_tokenizer)
    save(
        prune_at_random(dense, ("kv_groups", "neurons"), "free"), tmp_path / "small", tiny_tokenizer
    )
    words = ["-m", "nuteprune.cli", "bench", tmp_path / "small", "--against", tmp_path / "dense"]
    words += ["--engine", "llama.cpp", "--batch-sizes", "1,2", "--lengths", "8", "--new-tokens", 4]
    stdout = run_there(*words, "--threads", 1, "--repeats", 1, "--dtype", dtype, "--json")
    found = json_line(stdout)
    assert found["engine"] == "llama.cpp b11739"
    assert [x["batch_size"] for x in found["settings"]] == [1, 2]
    for setting in found["settings"]:
        assert setting["speedup"]["decode"]["bound"] > 1
        for figures in setting["models"].values():
            assert figures["decode_tokens_per_second"]["median"] > 0
            assert figures["prefill_tokens_per_second"]["median"] > 0

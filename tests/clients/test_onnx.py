"""ONNX exports in ONNX Runtime: logits and greedy continuations with a cache as in transformers."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import nuteprune
from nuteprune.export.checkpoint import save
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.families import FAMILIES
from tests.conftest import json_line
from tests.greedy import continuation

pytestmark = pytest.mark.clients

FREE = ("kv_groups", "heads", "neurons", "hidden")
BLOCKS = ("attn_block", "mlp_block")
# model, what is pruned, shapes, bytes up to which weights are in the graph's own file
CASES: list[tuple[str, tuple[str, ...], str, int]] = [
    ("llama", FREE, "free", 10**9),
    ("qwen3", BLOCKS, "free", 0),
    ("gemma3_text", ("kv_groups", "neurons"), "uniform", 10**9),  # with sliding windows
    ("gpt_neox", ("heads", "neurons"), "free", 10**9),
    ("opt", ("heads", "neurons", *BLOCKS), "free", 10**9),
    ("gemma2", (*FREE, "attn_block"), "free", 10**9),
    *((name, FREE, "free", 10**9) for name in ("mistral", "qwen2", "phi3", "granite")),
]
EXPORT = """
import sys
from nuteprune.cli.app import main
from nuteprune.export import onnx

onnx.LARGEST_FILE = int(sys.argv.pop())
main()
"""
PROMPTS = [[0, 0, 5, 77, 12, 9, 33, 25, 61], [40, 14, 8, 90, 3, 17, 28, 55, 71]]
STEPS = 8


@pytest.mark.parametrize(("name", "gates", "shapes", "limit"), CASES)
def test_prompts_and_greedy_tokens(
    name: str,
    gates: tuple[str, ...],
    shapes: str,
    limit: int,
    tiny_model: Callable,
    prune_at_random: Callable,
    python_of: Callable,
    start: Callable,
    tmp_path: Path,
) -> None:
    more_heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    whole = tiny_model(name, **(more_heads if "kv_heads" in FAMILIES[name].config_names else {}))
    model = prune_at_random(whole, gates, shapes)
    assert (len(set(Anatomy(model).shape.layers)) > 1) == (shapes == "free")
    save(model, tmp_path / "model")
    out = tmp_path / "m.onnx"
    command = [str(python_of("onnx")), "-c", EXPORT, "export", str(tmp_path / "model"), "--json"]
    done = subprocess.run(
        [*command, "--to", "onnx", "--out", str(out), str(limit)],
        env=os.environ | {"PYTHONPATH": str(Path(nuteprune.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    written = json_line(done.stdout)
    assert written["error"] <= 1e-4
    assert {x.name for x in tmp_path.iterdir() if "onnx" in x.name} == set(written["files"])
    assert len(written["files"]) == (1 if limit else 2)
    for file in written["files"]:  # of this machine nothing is told
        assert str(Path(nuteprune.__file__).parent).encode() not in (tmp_path / file).read_bytes()

    tokens = torch.tensor(PROMPTS)
    mask = (tokens != 0).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(input_ids=tokens, attention_mask=mask, position_ids=positions).logits[:, -1]
    # Greedy tokens are compared with generation that forbids nothing, as the client does not.
    made = continuation(model, tokens, STEPS, attention_mask=mask, eos_token_id=None)
    answer = start("onnx", "onnx_client.py").ask(
        file=str(out), prompts=PROMPTS, mask=mask.tolist(), steps=STEPS
    )
    error = (torch.tensor(answer["logits"]) - logits).abs().max()
    assert error <= 1e-4 * logits.abs().max()
    assert answer["made"] == made.tolist()
    layers = Anatomy(model).shape.layers
    assert answer["kv_heads"] == {
        f"past_key_values.{i}.{part}": x.kv_heads
        for i, x in enumerate(layers)
        if x.attention
        for part in ("key", "value")
    }

"""Pruned checkpoints of free shapes go on in TRL: trained, saved, merged and loaded again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from nuteprune.export.checkpoint import save
from nuteprune.export.loading import load_pruned
from nuteprune.model.anatomy import Anatomy

pytestmark = pytest.mark.clients

PROMPT = [40, 5, 77, 12, 9, 33, 25, 61, 14, 8, 90, 3]
GATES = {
    "llama": ("kv_groups", "heads", "neurons", "mlp_block"),
    "gemma2": ("kv_groups", "neurons"),
    "qwen3_moe": ("experts", "kv_groups"),
}


@pytest.fixture(scope="module")
def ask(
    python_of: Callable[[str], Path], make_client: type, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., dict[str, Any]]]:
    """Asks one TRL that the tests share, since it takes long to import."""
    folder = tmp_path_factory.mktemp("trl")
    modules = {"HF_MODULES_CACHE": str(folder / "modules")}
    client = make_client(python_of("trl"), "trl_client.py", folder / "client.log", **modules)
    yield client.ask
    client.close()


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model.eval()(input_ids=torch.tensor([PROMPT])).logits


@pytest.mark.parametrize("peft", [False, True], ids=["whole", "adapter"])
@pytest.mark.parametrize("trainer", ["sft", "dpo"])
@pytest.mark.parametrize("name", list(GATES))
def test_what_it_trained_loads_with_the_trained_logits(
    name: str,
    trainer: str,
    peft: bool,
    tiny_model: Callable,
    tiny_tokenizer: Any,
    prune_at_random: Callable,
    ask: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    small = prune_at_random(tiny_model(name, vocab_size=300), GATES[name], "free")
    shape = Anatomy(small).shape
    assert not shape.uniform
    folder, out, merged = tmp_path / "small", tmp_path / "out", tmp_path / "merged"
    save(small, folder, tiny_tokenizer)
    told = {"folder": str(folder), "out": str(out), "merged": str(merged), "prompt": PROMPT}
    answer = ask(trainer=trainer, peft=peft, **told)
    trained = torch.tensor(answer["logits"])
    assert (trained - logits(small)).abs().max() > 1e-2

    saved = merged if peft else out
    assert answer["class"] == ("PeftModelForCausalLM" if peft else type(small).__name__)
    for again in (
        load_pruned(saved),
        AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True),
    ):
        assert Anatomy(again).shape == shape
        torch.testing.assert_close(logits(again), trained, atol=1e-4, rtol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=False)
    assert tokenizer("the student").input_ids == tiny_tokenizer("the student").input_ids

"""The stages, by processes that share them out; each counts its products.

shared_stages.py MODEL OUT BLOCKS SHARDED METHOD...

Of a model with a tokenizer: what it writes, and how it and another one are judged by BLOCKS. Of
others: scores by each METHOD, and the refit to the cut that they choose.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))

from nuteprune.gates import copying_losses
from nuteprune.judge.context import Span
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.weights import shard_base
from nuteprune.processes import rank
from nuteprune.stages import judge as judging
from nuteprune.stages.choose import choose
from nuteprune.stages.judge import entries, judge, judge_beside
from nuteprune.stages.refit import refit
from nuteprune.stages.score import score
from nuteprune.stages.write import write
from nuteprune.train.prepare import Prepared, prepare
from tests.stages.conftest import settings

aten = torch.ops.aten
COUNTED = {
    **{name: partial(count, out_val=None) for name, count in flop_registry.items()},
    aten.addmm_: lambda _, left, right, **__: 2 * left.numel() * right.shape[1],
    aten.linalg_cholesky_ex: lambda matrix, *_, **__: matrix.numel() * matrix.shape[-1] // 3,
    aten.cholesky_inverse: lambda factor, *_, **__: 2 * factor.numel() * factor.shape[-1] // 3,
    aten.cholesky_solve: lambda right, left, *_, **__: 2 * right.numel() * left.shape[-1],
}


class Products(TorchDispatchMode):
    """Counts products, as PyTorch's own counter does, and those of factors too; in less time."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (count := COUNTED.get(func._overloadpacket)) is not None:
            self.total += count(*args, **(kwargs or {}))
        return out


def written(prepared: Prepared, tokenizer: Any, folder: Path) -> dict[str, torch.Tensor]:
    """What the model writes."""
    how: dict[str, Any] = {"length": 24, "seed": 3, "team": prepared.team}
    texts = write(
        prepared.anatomy.model, tokenizer, tokens=1500, folder=folder / str(rank()), **how
    )
    return {"ids": torch.tensor([x for text in texts for x in text])}


def judged(
    prepared: Prepared, other: Any, tokenizer: Any, text: torch.Tensor
) -> dict[str, torch.Tensor]:
    """How the model is judged, alone and beside one with other values."""
    judging.SPANS = (Span(16, 4), Span(128, 8))
    dense, team = prepared.anatomy.model, prepared.team
    for i, parameter in enumerate(other.parameters()):
        random = torch.Generator().manual_seed(i)
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=random)
    if prepared.is_sharded:
        shard_base(Anatomy(other.requires_grad_(False)), torch.device("cpu"))
    blocks = {"a": text[:8].flatten().view(-1, 192), "b": text}
    figures = judge(dense, blocks, tokenizer, team=team)
    found = entries(blocks, figures, judge(other, blocks, tokenizer, team=team))
    found |= judge_beside(dense, other, tokenizer, blocks, tokens=12, team=team)
    names = ("looping", "repeated", "length", "kl", "agreement", "nats")
    told = [found["perplexity"], found["copying"], *(found["answers"][x] for x in names)]
    told += list(found["context"].values())
    return {"figures": torch.tensor(list(numbers(told)), dtype=torch.float64)}


def numbers(found: Any) -> Iterator[float]:
    """All numbers in a record's entry."""
    if isinstance(found, (int, float)):
        yield float(found)
    elif isinstance(found, (dict, list)):
        for value in found.values() if isinstance(found, dict) else found:
            yield from numbers(value)


def main(model: str, out: str, blocks: str, sharded: str, *methods: str) -> None:
    """Run the stages, and leave what they found and counted in a file of this process."""
    copying_losses.COPIES = 0.0  # random weights copy nothing: cut attention units all the same
    folder, count = Path(out), int(blocks)
    shares = {"sharded": bool(int(sharded))}
    dense = AutoModelForCausalLM.from_pretrained(model)
    experts = {"gates": "expert_neurons,kv_groups", "neuron_multiple": 8}
    gates = experts if dense.config.model_type == "qwen2_moe" else {}
    text = torch.randint(3, 96, (2 * count, 48), generator=torch.Generator().manual_seed(0))
    products: dict[str, int] = {}
    found: dict[str, torch.Tensor] = {}

    def counted(stage: str, work: Any) -> Any:
        with Products() as counter:
            result = work()
        products[stage] = counter.total
        here = {name: x for name, x in result.items() if not x.is_meta}  # sharded: the main one's
        found.update({f"{stage} {name}": value.clone() for name, value in here.items()})
        return result

    for method in methods:
        kind = {"similarity": {"gates": "attn_block,mlp_block"}}.get(method, gates)
        if method in ("reap", "reconstruction"):
            kind = {"gates": "experts"}
        how = settings(folder, **kind, **shares)
        own = prepare(AutoModelForCausalLM.from_pretrained(model), how)
        counted(method, lambda own=own, method=method: score(own, text[:count], method=method))
    prepared = prepare(dense, settings(folder, **gates, **shares))
    if (Path(model) / "tokenizer.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(model)
        other = AutoModelForCausalLM.from_pretrained(model)
        counted("write", lambda: written(prepared, tokenizer, folder))
        counted("judge", lambda: judged(prepared, other, tokenizer, text))
    else:
        # Beyond 30 %, so that what a first refit leaves is scored again.
        own = text[:count]
        scores = counted("score", lambda: score(prepared, own, target=0.4, refit_blocks=own))
        counted("refit", lambda: refit(prepared, choose(prepared, scores, 0.4), own))
    save_file({k: v.contiguous() for k, v in found.items()}, folder / f"{rank()}.safetensors")
    (folder / f"{rank()}.json").write_text(json.dumps(products))


main(*sys.argv[1:])

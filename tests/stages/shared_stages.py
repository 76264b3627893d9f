"""The stages before the first step, by processes that share them out; each counts its products.

shared_stages.py MODEL OUT BLOCKS METHOD...

With BLOCKS: scores by each METHOD, and the refit to the cut that they choose.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))

from nuteprune.gates import copying_losses
from nuteprune.processes import rank
from nuteprune.stages.choose import choose
from nuteprune.stages.refit import refit
from nuteprune.stages.score import score
from nuteprune.train.prepare import prepare
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


def main(model: str, out: str, blocks: str, *methods: str) -> None:
    """Run the stages, and leave what they found and counted in a file of this process."""
    copying_losses.COPIES = 0.0  # random weights copy nothing: cut attention units all the same
    folder, count = Path(out), int(blocks)
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
        found.update({f"{stage} {name}": value.clone() for name, value in result.items()})
        return result

    for method in methods:
        kind = {"similarity": {"gates": "attn_block,mlp_block"}}.get(method, gates)
        if method in ("reap", "reconstruction"):
            kind = {"gates": "experts"}
        own = prepare(AutoModelForCausalLM.from_pretrained(model), settings(folder, **kind))
        counted(method, lambda own=own, method=method: score(own, text[:count], method=method))
    prepared = prepare(dense, settings(folder, **gates))
    scores = counted("score", lambda: score(prepared, text[:count], target=0.2))
    counted("refit", lambda: refit(prepared, choose(prepared, scores, 0.2), text[:count]))
    save_file({k: v.contiguous() for k, v in found.items()}, folder / f"{rank()}.safetensors")
    (folder / f"{rank()}.json").write_text(json.dumps(products))


main(*sys.argv[1:])

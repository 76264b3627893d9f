"""A run of a tiny model whose weights are shared out: each process of torchrun checks its part.

sharded_run.py MODEL OUT
"""

from __future__ import annotations

import gc
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))

from nuteprune import UserError
from nuteprune.stages.choose import choose
from nuteprune.stages.refit import refit
from tests.train.conftest import make

model, out = sys.argv[1], Path(sys.argv[2])
trainer = make(
    AutoModelForCausalLM.from_pretrained(model), out / "run", sharded=True, ramp_share=0.5
)


def check() -> None:
    """Half of the frozen weights are here, and all of what is trained."""
    parameters = list(trainer.model.parameters())
    frozen = [p for p in parameters if not p.requires_grad]
    assert all(isinstance(p, DTensor) for p in frozen)
    assert not any(isinstance(p, DTensor) for p in parameters if p.requires_grad)
    held = sum(p.to_local().numel() for p in frozen)
    assert held * dist.get_world_size() == sum(p.numel() for p in frozen)


def release() -> None:
    """Let go of what a pass left whole for the next one."""
    for module in (*trainer.anatomy.layers, trainer.anatomy.model):
        module.reshard()
    gc.collect()


def bytes_alive() -> int:
    """Bytes of all tensors in this process, each memory once."""
    release()
    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]
    memory = [x.untyped_storage() for x in tensors if not (x.is_meta or isinstance(x, DTensor))]
    return sum({x.data_ptr(): x.nbytes() for x in memory}.values())


def comes_to(held: int) -> None:
    """So much is alive, once what was being sent is there."""
    until = time.monotonic() + 10
    while (found := bytes_alive()) != held:
        assert time.monotonic() < until, (found, held)
        time.sleep(0.05)


def check_refitted() -> None:
    """Refitted weights add a half of their bytes here, and go again."""
    prepared, blocks = trainer.prepared, torch.arange(3, 67).view(4, 16)
    weights = refit(prepared, choose(prepared, prepared.allocator.chance_scores(), 0.3), blocks)
    assert weights
    assert dist.get_rank() == 0 or all(x.is_meta for x in weights.values())
    before = min(bytes_alive() for _ in range(5))
    prepared.bank.install(weights)
    whole = sum(x.nbytes for x in weights.values())
    comes_to(before + whole // dist.get_world_size())
    prepared.bank.clear()
    comes_to(before)


check()
check_refitted()
trainer.train()
release()
check()
with pytest.raises(UserError, match="call finalize"):
    trainer.finalize()
small = trainer.finalize(AutoModelForCausalLM.from_pretrained(model))
trainer.save_pruned(out / "small")
if trainer.is_world_process_zero():  # the others' has no values
    with torch.no_grad():
        assert small(torch.arange(3, 15)[None]).logits.isfinite().all()
dist.destroy_process_group()

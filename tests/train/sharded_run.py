"""A run of a tiny model whose weights are shared out: each process of torchrun checks its part.

sharded_run.py MODEL OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))

from nuteprune import UserError
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


check()
trainer.train()
for layer in trainer.anatomy.layers:
    layer.reshard()  # what the last step left whole for the next one
trainer.anatomy.model.reshard()
check()
with pytest.raises(UserError, match="then finalize"):
    trainer.finalize()
if trainer.is_world_process_zero():
    small = trainer.finalize(AutoModelForCausalLM.from_pretrained(model))
    trainer.save_pruned(out / "small")
    with torch.no_grad():
        assert small(torch.arange(3, 15)[None]).logits.isfinite().all()
dist.destroy_process_group()

"""Sharded runs of tiny models, one after another: what is cut is what the student was.

sharded_families.py FOLDER NAME...
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import distributed as dist
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.train.conftest import make

folder, names = Path(sys.argv[1]), sys.argv[2:]
for name in names:
    model = folder / name
    settings = {"sharded": True, "max_steps": 1, "neuron_multiple": 8, "calibration_blocks": 4}
    trainer = make(AutoModelForCausalLM.from_pretrained(model), model / "run", **settings)
    trainer.train()
    ids = torch.arange(3, 15)[None]
    with torch.no_grad(), trainer.as_pruned():
        student = trainer.model(input_ids=ids, use_cache=False).logits
    small = trainer.finalize(AutoModelForCausalLM.from_pretrained(model))
    record = trainer.save_pruned(model / "small")
    if trainer.is_world_process_zero():  # the others' has no values
        assert record["sparsity"] >= 0.3, name
        with torch.no_grad():
            cut = small(input_ids=ids, use_cache=False).logits
        assert torch.allclose(cut, student, atol=1e-4 * float(student.abs().max())), name
        print("exact", name)
dist.destroy_process_group()

"""One step of a tiny model in each process; rank 0 writes the gradients to a file.

sharded_step.py MODEL OUT whole|sharded 0|1 (activation checkpointing)
"""

from __future__ import annotations

import sys

import torch
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from nuteprune.distill.coforward import CoForward, Role
from nuteprune.distill.losses import Head, token_kl
from nuteprune.gates.masks import Layout, Masks
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.hooks import MaskHooks
from nuteprune.model.lora import LoraBank
from nuteprune.model.trainable import add_lora
from nuteprune.model.weights import shard_base

folder, out, how, checkpointing = sys.argv[1:]
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
base = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
model = add_lora(Anatomy(base), r=2, lora_alpha=6).train()
if checkpointing == "1":
    base.gradient_checkpointing_enable()
random = torch.Generator().manual_seed(1)
lora = [p for p in model.parameters() if p.requires_grad]
for p in lora:
    p.data.normal_(generator=random).mul_(0.2)
anatomy = Anatomy(model)
coforward = CoForward(anatomy, MaskHooks(anatomy), LoraBank(anatomy))
of_masks = torch.Generator().manual_seed(5)  # all blocks keep something
layout = Layout(anatomy.shape, anatomy.head_dim)


def masks() -> dict[str, torch.Tensor]:
    """Values of KV groups, neurons and experts, soft or 0."""
    units = {kind: layout.units(kind) for kind in ("kv_groups", "neurons", "experts")}
    drawn = {k: torch.rand(count, generator=of_masks) for k, count in units.items() if count}
    return {kind: value * (value > 0.3) for kind, value in drawn.items()}


state = coforward.bank.state()
snapshot = {k: 0.2 * torch.randn(v.shape, generator=random) for k, v in state.items()}
teacher = Role(Masks(layout, masks()), snapshot)
fixed = Masks(layout, masks())
learned = Masks(layout, {kind: value.requires_grad_() for kind, value in masks().items()})
gates = list(learned.values.values())
if how == "sharded":
    shard_base(anatomy, torch.device("cpu"))
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert all(isinstance(p, DTensor) for p in frozen)
    assert not any(isinstance(p, DTensor) for p in lora)
    held = sum(p.to_local().numel() for p in frozen)
    assert held * world == sum(p.numel() for p in frozen)
ids = torch.randint(3, 96, (4, 10), generator=random).chunk(world)[rank]
weight = torch.ones_like(ids).float()
losses = []
for student in (fixed, learned):  # the second finds what the first has left
    for p in (*lora, *gates):
        p.grad = None
    with coforward.student(student):
        with coforward.roles(teacher, weight) as passage:
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
        head = Head.of(anatomy)
        loss = passage.layer_loss + token_kl(passage.student_BTD, passage.teacher_BTD, head, weight)
        loss.backward()
    for p in (*lora, *gates):
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        dist.all_reduce(p.grad)
        p.grad /= world
    dist.all_reduce(loss.detach_())
    losses.append(loss / world)
if rank == 0:
    torch.save({"losses": losses, "gradients": [p.grad for p in (*lora, *gates)]}, out)
dist.barrier()  # nobody leaves while another one still talks
dist.destroy_process_group()

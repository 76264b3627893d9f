"""The co-forward pass of mixtures of experts against two plain passes of separate models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from nuteprune.distill.coforward import DENSE, CoForward, Role
from nuteprune.distill.losses import layer_relative
from nuteprune.gates.masks import Layout, Masks
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.hooks import MaskHooks
from nuteprune.model.lora import LoraBank
from nuteprune.model.trainable import add_lora
from tests.families import MIXTURES

TOKENS = torch.randint(3, 96, (2, 10), generator=torch.Generator().manual_seed(0))
PADDING = torch.ones_like(TOKENS)
PADDING[1, 7:] = 0
CALL: dict[str, Any] = {"input_ids": TOKENS, "attention_mask": PADDING, "use_cache": False}


def adapted(model: Any) -> PeftModel:
    """With LoRA that matters, on routers too."""
    made = add_lora(Anatomy(model.requires_grad_(False)), r=2)
    random = torch.Generator().manual_seed(1)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=random)
    return made


def leaves_of(model: PeftModel, masks: Masks) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if "lora_" in n} | masks.values


def snapshot(model: PeftModel) -> Role:
    """A teacher with LoRA of its own that is without some experts too."""
    anatomy = Anatomy(model)
    random, layout = torch.Generator().manual_seed(5), Layout(anatomy.shape, anatomy.head_dim)
    state = LoraBank(anatomy).state()
    lora = {k: 0.2 * torch.randn(v.shape, generator=random) for k, v in state.items()}
    masks = Masks.open(layout, ["experts"])
    for layer in range(3):
        masks.part("experts", layer)[1:2] = 0
    return Role(masks, lora)


def learned_masks(model: PeftModel) -> Masks:
    """Of each sequence its own, with gradients; expert 2 goes."""
    layout = Layout(Anatomy(model).shape, Anatomy(model).head_dim)
    random, values = torch.Generator().manual_seed(2), {}
    for kind in ("experts", "expert_neurons"):
        values[kind] = 0.5 + torch.rand(2, layout.units(kind), generator=random)
    masks = Masks(layout, values)
    for layer in range(3):
        masks.part("experts", layer)[:, 2:3] = 0
    return Masks(layout, {k: v.clone().requires_grad_() for k, v in values.items()})


@pytest.mark.parametrize("teacher", ["dense", "snapshot"])
@pytest.mark.parametrize(
    "model_type",
    [pytest.param(x, marks=() if x == "mixtral" else pytest.mark.slow(0.3)) for x in MIXTURES],
)
def test_gradients_are_those_of_two_passes_with_checkpointing_or_without(
    model_type: str, teacher: str, tiny_model
) -> None:
    found = []
    for how in ("together", "checkpointing", "two passes"):
        base = tiny_model(model_type)
        model = adapted(base).train()
        masks = learned_masks(model)
        role = snapshot(model) if teacher == "snapshot" else DENSE
        if how == "checkpointing":
            model.enable_input_require_grads()
            base.activation_checkpointing_enable({"use_reentrant": False})
        if how == "two passes":
            loss = two_passes(model, masks, role, tiny_model(model_type))
            loss.backward()
        else:
            coforward = CoForward(a := Anatomy(model), MaskHooks(a), LoraBank(a))
            with coforward.student(masks):
                with coforward.roles(role, PADDING.float()) as passage:
                    model(**CALL)
                assert passage.layer_loss is not None
                (loss := passage.layer_loss).backward()
        grads = {k: v.grad for k, v in leaves_of(model, masks).items() if v.grad is not None}
        found.append((loss.detach().double(), grads))
    (loss, grads), checkpointed, expected = found
    assert float(loss) > 1e-3
    torch.testing.assert_close(loss, expected[0], rtol=1e-4, atol=1e-7)
    assert grads.keys() == expected[1].keys() == checkpointed[1].keys()
    for name, grad in grads.items():
        for other in (expected[1], checkpointed[1]):
            scale = float(other[name].abs().max())
            torch.testing.assert_close(grad, other[name], rtol=0, atol=1e-4 * max(scale, 1e-2))
    path = Anatomy(tiny_model(model_type)).family.experts.router
    of_routers = [x for name, x in grads.items() if f"{path}.lora_" in name]
    assert of_routers
    assert any(float(x.abs().max()) > 1e-5 for x in of_routers)


def two_passes(model: PeftModel, masks: Masks, role: Role, teacher: Any) -> Tensor:
    """The same by a pass of each, of which the teacher's is another model's."""
    if role.lora is not None:
        teacher = adapted(teacher)
        LoraBank(Anatomy(teacher)).load(role.lora)
    with torch.no_grad(), MaskHooks(Anatomy(teacher)).using(role.masks):
        theirs = outputs(teacher)
    with MaskHooks(Anatomy(model)).using(masks):
        ours = outputs(model)
    pairs = zip(ours, theirs, strict=True)
    return torch.stack([layer_relative(x, y, PADDING.float()) for x, y in pairs]).sum()


def outputs(model: Any) -> list[Tensor]:
    """What the layers give in a plain pass."""
    seen: list[Tensor] = []

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handles = [x.register_forward_hook(hook) for x in Anatomy(model).layers]
    model(**CALL)
    for handle in handles:
        handle.remove()
    return seen

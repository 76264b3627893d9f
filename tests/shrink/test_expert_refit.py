"""The refit of routed experts, beside least squares on what stock modules compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nuteprune.export.checkpoint import assemble
from nuteprune.gates.masks import Layout, Masks
from nuteprune.model.anatomy import Anatomy, Mixture
from nuteprune.model.family import Projection
from nuteprune.model.hooks import MaskHooks
from nuteprune.model.lora import LoraBank
from nuteprune.shrink.finalize import merge_layer
from nuteprune.shrink.least_squares import RIDGE, fit_projections
from nuteprune.stages import Prunable
from nuteprune.stages.refit import refit
from tests.families import MIXTURES
from tests.train.conftest import make, metrics

from .test_exactness import assert_same, logits
from .test_mixtures import with_random_lora

TEXT = torch.randint(3, 90, (40, 24), generator=torch.Generator().manual_seed(5))
UNSEEN = torch.randint(3, 90, (16, 24), generator=torch.Generator().manual_seed(6))
SHOWN = [x for x in MIXTURES if x != "llama4_text"]
each_shown = pytest.mark.parametrize(
    "model_type",
    [pytest.param(x, marks=() if x == "mixtral" else pytest.mark.slow(0.5)) for x in SHOWN],
)


def masks_of(anatomy: Anatomy, experts: bool = True) -> Masks:
    """Soft masks with 16 of 24 neurons of each expert, without an expert of each layer if asked."""
    layout, random = Layout(anatomy.shape, anatomy.head_dim), torch.Generator().manual_seed(4)
    drawn = torch.rand(layout.units("expert_neurons") // 24, 24, generator=random)
    kept = (drawn.argsort(-1) < 16) * (0.5 + torch.rand(drawn.shape, generator=random))
    values = {"expert_neurons": kept.flatten()}
    if experts:
        values["experts"] = torch.ones(len(drawn))
        values["experts"][::6] = 0
    return Masks(layout, values)


def stack_of(anatomy: Anatomy, layer: int) -> Tensor:
    """Down projections (E, D, F)."""
    mixture = anatomy.mixture(layer)
    assert mixture is not None
    down = mixture.experts.down_proj.detach()
    return down.transpose(1, 2) if mixture.entry.transposed else down


def layers_of(anatomy: Anatomy) -> list[int]:
    return [i for i in range(3) if anatomy.mixture(i) is not None]


def refitted(anatomy: Anatomy, masks: Masks, bank: LoraBank | None = None) -> MaskHooks:
    """In place of the model's own stacks, or by a bank."""

    def put(layer: int, _: Projection, stack: Tensor) -> None:
        anatomy.mixture(layer).experts.down_proj.data.copy_(stack)  # type: ignore[union-attr]

    def nothing(*_: Any) -> None:
        pytest.fail("nothing but experts lost inputs")

    hooks = MaskHooks(anatomy)
    if bank is None:
        fit_projections(anatomy, hooks, masks, TEXT.split(8), nothing, install_stack=put)
    else:
        allocator: Any = None  # masks are chosen
        prepared = Prunable(anatomy, hooks, bank, allocator, is_sharded=False)
        bank.install(refit(prepared, masks, TEXT))
    return hooks


@torch.no_grad()
def called(anatomy: Anatomy, hooks: MaskHooks, masks: Masks) -> dict[int, tuple[Tensor, ...]]:
    """What experts of each layer are called with in a pass of the masked model."""
    found: dict[int, tuple[Tensor, ...]] = {}
    handles = [
        anatomy.mixture(i).experts.register_forward_pre_hook(  # type: ignore[union-attr]
            lambda _, args, i=i: found.__setitem__(i, args)
        )
        for i in layers_of(anatomy)
    ]
    with hooks.using(masks):
        anatomy.model(TEXT, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def neurons(mixture: Mixture, expert: int, rows: Tensor) -> Tensor:
    """What an expert's neurons are (rows, F): its output where it writes them out unchanged."""
    experts = mixture.experts
    width = mixture.sizes[1]
    own = {name: p.data.clone() for name, p in experts.named_parameters()}
    stack, bias = experts.down_proj, getattr(experts, "down_proj_bias", None)
    stack.data.zero_()
    stack.data[:, range(width), range(width)] = 1.0
    if bias is not None:
        bias.data.zero_()
    index = torch.full((len(rows), 1), expert)
    output = experts(rows, index, torch.ones(len(rows), 1))[:, :width].double()
    for name, p in experts.named_parameters():
        p.data.copy_(own[name])
    return output


@each_shown
def test_each_expert_is_fitted_by_least_squares_on_its_own_tokens(
    model_type: str, tiny_model
) -> None:
    """Of the model as it is at the end: what is before a layer was final when that was fitted."""
    dense, anatomy = Anatomy(tiny_model(model_type)), Anatomy(tiny_model(model_type))
    masks = masks_of(anatomy)
    hooks = refitted(anatomy, masks)
    seen = called(anatomy, hooks, masks)
    hooks.remove()
    fitted = 0
    for layer in layers_of(anatomy):
        mixture, (hidden, index, weight) = anatomy.mixture(layer), seen[layer]
        assert mixture is not None
        gone = masks.part("experts", layer) <= 0
        for expert, mask in enumerate(masks.part("expert_neurons", layer).view(6, 24)):
            ours, own = (stack_of(x, layer)[expert].double() for x in (anatomy, dense))
            token, place = (index == expert).nonzero(as_tuple=True)
            kept = mask > 0
            if gone[expert] or not len(token):
                assert torch.equal(ours, own) or not gone[expert]
                continue
            g = weight[token, place].double().unsqueeze(-1)
            a = g * neurons(mixture, expert, hidden[token])
            ridge = (RIDGE * a[:, kept].square().sum(0)).sqrt()
            x = torch.cat([a[:, kept], ridge.diag()])
            y = torch.cat([a @ own.T, ridge.unsqueeze(-1) * own[:, kept].T])
            best = torch.linalg.lstsq(x, y).solution.T / mask[kept].double()
            scale = float(best.abs().max())
            torch.testing.assert_close(ours[:, kept], best, rtol=0, atol=2e-3 * scale)
            assert torch.equal(ours[:, ~kept], own[:, ~kept])
            fitted += 1
    assert fitted > 3


@each_shown
@torch.no_grad()
def test_the_student_is_nearer_and_the_teacher_intact(model_type: str, tiny_model) -> None:
    """So is what is merged, cut and written: the masked student."""
    stock = logits(tiny_model(model_type), UNSEEN)
    model = with_random_lora(tiny_model(model_type).requires_grad_(False))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    anatomy = Anatomy(model)
    masks, bank = masks_of(anatomy, experts=False), LoraBank(anatomy)
    with (hooks := MaskHooks(anatomy)).using(masks):
        plain = logits(model, UNSEEN)
    hooks.remove()
    hooks = refitted(anatomy, masks, bank)
    with hooks.using(masks):
        fitted = logits(model, UNSEEN)
    assert (fitted - stock).norm() < 0.95 * (plain - stock).norm()
    with bank.as_dense(0), bank.as_dense(1), bank.as_dense(2):
        assert torch.equal(logits(model, UNSEEN), stock)
    hooks.remove()
    state = {k: v.clone() for k, v in bank.state().items()}
    other = with_random_lora(tiny_model(model_type).requires_grad_(False))
    LoraBank(Anatomy(other)).load(state)
    with (hooks := MaskHooks(Anatomy(other))).using(masks):
        assert torch.equal(logits(other, UNSEEN), fitted)
    hooks.remove()
    learned, base = bank.learned(), Anatomy(tiny_model(model_type))
    for layer in range(3):
        merge_layer(base, layer, learned, torch.float32)
    assert not learned
    assert_same(logits(assemble(base, masks)[0], UNSEEN), fitted)
    bank.clear()
    assert torch.equal(logits(model, UNSEEN), stock)


def test_experts_that_do_not_show_their_neurons_stay_as_they_are(tiny_model) -> None:
    anatomy = Anatomy(tiny_model("llama4_text"))
    before = stack_of(anatomy, 0).clone()
    refitted(anatomy, masks_of(anatomy, experts=False))
    assert torch.equal(stack_of(anatomy, 0), before)


@pytest.mark.slow(3)
@pytest.mark.parametrize("more", [{}, {"ramp_share": 0.5}], ids=["one-shot", "ramp"])
def test_killed_and_resumed_is_never_interrupted(
    more: dict[str, Any], tiny_model, tmp_path: Path
) -> None:
    changes = {"gates": "expert_neurons", "neuron_multiple": 8, "shapes": "uniform", **more}
    changes |= {"max_steps": 4, "save_strategy": "steps", "save_steps": 3}
    ends = []
    for resumed in (False, True):
        trainer = make(tiny_model("qwen2_moe"), tmp_path / "run", **changes)
        checkpoint = str(tmp_path / "run" / "checkpoint-3") if resumed else None
        trainer.train(resume_from_checkpoint=checkpoint)
        assert any(name.endswith("experts.W") for name in trainer.prepared.bank.state())
        ends.append((metrics(tmp_path / "run"), trainer.finalize().state_dict()))
    (lines, state), (again, other) = ends
    keys = ("step", "loss", "token_kl", "layer", "grad_norm")
    assert [[x[k] for k in keys] for x in again] == [[x[k] for k in keys] for x in lines]
    assert all(torch.equal(state[name], other[name]) for name in state)


@pytest.mark.slow(2)
@pytest.mark.parametrize(
    ("model_type", "gates"),
    [
        ("mixtral", "expert_neurons"),
        ("qwen2_moe", "experts,expert_neurons,neurons,kv_groups"),
        ("gpt_oss", "expert_neurons,kv_groups"),
    ],
)
def test_what_a_run_writes_is_its_student(
    model_type: str, gates: str, tiny_model, tmp_path: Path
) -> None:
    trainer = make(tiny_model(model_type), tmp_path, gates=gates, neuron_multiple=8, max_steps=4)
    trainer.train()
    assert any(name.endswith("experts.W") for name in trainer.prepared.bank.state())
    with torch.no_grad(), trainer.as_pruned():
        masked = logits(trainer.model, UNSEEN)
    assert_same(logits(trainer.finalize(), UNSEEN), masked)

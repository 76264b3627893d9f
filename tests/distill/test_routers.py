"""The term of routers, beside plain passes of stock models and of the sliced one."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from nuteprune import UserError
from nuteprune.distill.coforward import CoForward, Passage
from nuteprune.distill.losses import layer_relative
from nuteprune.distill.routers import routing_kl
from nuteprune.distill.teachers import DENSE, Role
from nuteprune.export.checkpoint import assemble
from nuteprune.gates.masks import Layout, Masks
from nuteprune.model.adapters import add_lora
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.families import FAMILIES
from nuteprune.model.hooks import MaskHooks
from nuteprune.model.lora import LoraBank
from nuteprune.shrink.finalize import merge_layer
from nuteprune.train.setup import make_allocator
from tests.families import MIXTURES
from tests.shrink.test_exactness import settings, soft_masks
from tests.train.conftest import make, metrics

TOKENS = torch.randint(3, 96, (2, 10), generator=torch.Generator().manual_seed(0))
PADDING = torch.ones_like(TOKENS)
PADDING[1, 7:] = 0
CALL: dict[str, Any] = {"input_ids": TOKENS, "attention_mask": PADDING, "use_cache": False}
SIGMOIDS = ("glm4_moe", "deepseek_v3", "llama4_text")
each_mixture = pytest.mark.parametrize(
    "model_type",
    [pytest.param(x, marks=() if x == "mixtral" else pytest.mark.slow(0.3)) for x in MIXTURES],
)


def adapted(model: Any, seed: int = 1) -> PeftModel:
    """With LoRA that matters, on routers too."""
    made = add_lora(Anatomy(model.requires_grad_(False)), r=2)
    random = torch.Generator().manual_seed(seed)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=random)
    return made


def routers(model: nn.Module) -> list[nn.Module]:
    """By their kind, or in PEFT's wrapper: hooks of ours call that alone."""
    named = [(name.rpartition(".")[2], x) for name, x in model.named_modules()]
    bare = [(name, x, x.get_base_layer() if isinstance(x, LoraLayer) else x) for name, x in named]
    return [x for name, x, y in bare if name != "base_layer" and is_router(y)]


def is_router(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Router")


def routed(model: nn.Module) -> list[Tensor]:
    """What routers score (tokens, experts) in a plain pass: logits, found by their kind."""
    seen: list[Tensor] = []

    def hook(_: nn.Module, __: Any, output: tuple[Tensor, ...]) -> None:
        seen.append(output[1 if len(output) == 2 else 0])  # Llama 4 gives no indices

    handles = [x.register_forward_hook(hook) for x in routers(model)]
    model(**CALL)
    for handle in handles:
        handle.remove()
    return seen


def by_hand(ours: Iterable[Tensor], theirs: Iterable[Tensor], sigmoid: bool) -> Tensor:
    """The mean over layers, tokens that are there, and so on; removed experts are at -inf."""
    found = []
    for z, t in zip(ours, theirs, strict=True):
        for token in PADDING.flatten().nonzero().flatten().tolist():
            kept = z[token] > -torch.inf
            if sigmoid:
                p, q = (1 / (1 + (-x[token][kept].double()).exp()) for x in (t, z))
                found.append((kl(p, q) + kl(1 - p, 1 - q)).mean())
            else:
                # All shares of the teacher, then those of kept experts, made to sum to 1.
                p = t[token].double().softmax(-1)[kept]
                p, q = p / p.sum(), z[token][kept].double().softmax(-1)
                found.append(kl(p, q).sum())
    return torch.stack(found).mean()


def kl(p: Tensor, q: Tensor) -> Tensor:
    return torch.xlogy(p, p) - torch.xlogy(p, q)


def masks_of(anatomy: Anatomy, kinds: str, shapes: str) -> Masks:
    return soft_masks(make_allocator(anatomy, settings(kinds, shapes)), 0.5)[0]


def together(model: Any, masks: Masks | None, teacher: Role = DENSE) -> tuple[CoForward, Passage]:
    coforward = CoForward(
        anatomy := Anatomy(model), MaskHooks(anatomy), layer_relative, routing=True
    )
    with coforward.student(masks), coforward.roles(teacher, PADDING.float()) as passage:
        model(**CALL)
    return coforward, passage


def mean_of(passage: Passage) -> Tensor:
    assert passage.routing_loss is not None
    return passage.routing_loss / passage.routers


@each_mixture
def test_probabilities_are_those_that_the_stock_router_weighs_by(
    model_type: str, tiny_model
) -> None:
    """Of two experts that are chosen, the weights are as their sigmoids, or as shares."""
    model = tiny_model(model_type, num_experts_per_tok=2)
    hidden = torch.randn(50, 32, generator=torch.Generator().manual_seed(3))
    anatomy, router = Anatomy(model), routers(model)[0]
    with torch.no_grad():
        if model_type == "llama4_text":
            weight, logits = router(hidden)
            weight, index = weight.topk(2)
        else:
            logits, weight, index = router(hidden)
    chosen = logits.gather(1, index)
    p = chosen.sigmoid() if model_type in SIGMOIDS else chosen.exp()
    torch.testing.assert_close(weight[:, 0] / weight[:, 1], p[:, 0] / p[:, 1])
    assert anatomy.family.experts is not None
    assert anatomy.family.experts.sigmoid == (model_type in SIGMOIDS)


@pytest.mark.parametrize("shapes", ["free", "uniform"])
@pytest.mark.parametrize("kinds", ["experts", "expert_neurons", "experts,expert_neurons"])
@each_mixture
def test_the_term_compares_the_stock_model_with_the_sliced_one(
    model_type: str, kinds: str, shapes: str, tiny_model
) -> None:
    refusal = FAMILIES[model_type].refusal
    kinds = ",".join(x for x in kinds.split(",") if not refusal(x, uniform=shapes == "uniform"))
    if not kinds:
        return
    with torch.no_grad():
        theirs = routed(tiny_model(model_type))
    model = adapted(tiny_model(model_type))
    anatomy = Anatomy(model)
    masks = masks_of(anatomy, kinds, shapes)
    coforward, passage = together(model, masks)
    coforward.hooks.remove()
    bank = LoraBank(anatomy)
    learned, base = bank.learned(bank.state()), Anatomy(model.unload())
    for layer in range(3):
        merge_layer(base, layer, learned, torch.float32)
    small, _ = assemble(base, masks)
    with torch.no_grad():
        small_logits = routed(small)
    ours = []
    mixtures = [i for i in range(3) if base.mixture(i)]
    for layer, few, all_of_them in zip(mixtures, small_logits, theirs, strict=True):
        mask = masks.part("experts", layer)
        kept = torch.arange(6) if mask is None else (mask > 0).nonzero().flatten()
        whole = torch.full_like(all_of_them, -torch.inf)
        ours.append(whole.index_copy(1, kept, few))
    if "experts" in kinds.split(","):
        assert any(x.shape[1] < 6 for x in small_logits)
    expected = by_hand(ours, theirs, model_type in SIGMOIDS)
    assert float(expected) > 1e-3
    torch.testing.assert_close(mean_of(passage).double(), expected, rtol=1e-3, atol=0)


def leaves_of(model: PeftModel, masks: Masks | None) -> dict[str, Tensor]:
    lora = {n: p for n, p in model.named_parameters() if "lora_" in n}
    return lora | {k: v for k, v in (masks.values if masks else {}).items() if v.requires_grad}


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
    """Of each sequence its own, with gradients; experts 1 and 2 go for none or for all."""
    layout = Layout(Anatomy(model).shape, Anatomy(model).head_dim)
    random, values = torch.Generator().manual_seed(2), {}
    for kind in ("experts", "expert_neurons"):
        values[kind] = 0.5 + torch.rand(2, layout.units(kind), generator=random)
    masks = Masks(layout, values)
    for layer in range(3):
        masks.part("experts", layer)[:, 2:3] = 0
    return Masks(layout, {k: v.clone().requires_grad_() for k, v in values.items()})


@pytest.mark.parametrize("teacher", ["dense", "snapshot"])
@each_mixture
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
            loss = two_passes(model, masks, role, tiny_model(model_type), model_type in SIGMOIDS)
            loss.backward()
        else:
            coforward = CoForward(a := Anatomy(model), MaskHooks(a), routing=True)
            with coforward.student(masks):
                with coforward.roles(role, PADDING.float()) as passage:
                    model(**CALL)
                (loss := mean_of(passage)).backward()
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
    assert all(float(x.abs().max()) > 1e-5 for x in of_routers)


def two_passes(model: PeftModel, masks: Masks, role: Role, teacher: Any, sigmoid: bool) -> Tensor:
    """The same by a pass of each, of which the teacher's is another model's."""
    if role.lora is not None:
        teacher = adapted(teacher)
        LoraBank(Anatomy(teacher)).load(role.lora)
    with torch.no_grad(), MaskHooks(Anatomy(teacher)).using(role.masks):
        theirs = routed(teacher)
    hooks = MaskHooks(Anatomy(model))
    with hooks.using(masks):
        return by_hand(routed(model), theirs, sigmoid)


@each_mixture
def test_routers_that_agree_cost_nothing(model_type: str, tiny_model) -> None:
    model = add_lora(Anatomy(tiny_model(model_type).requires_grad_(False)), r=2)  # adds nothing
    loss = mean_of(together(model, None)[1])
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    loss.backward()
    grads = [p.grad for n, p in model.named_parameters() if "lora_B" in n and p.grad is not None]
    assert grads
    assert max(float(x.abs().max()) for x in grads) < 1e-5


def test_tokens_count_by_their_weight() -> None:
    """By hand: shares of 1/4 and 3/4 where the student has halves; the second token is padding."""
    ours, theirs = torch.zeros(2, 2), torch.tensor([[1.0, 3.0], [5.0, 1.0]]).log()
    loss = routing_kl(ours, theirs, torch.tensor([2.0, 0.0]), sigmoid=False)
    loss_of_both = routing_kl(ours, theirs, torch.tensor([3.0, 1.0]), sigmoid=False)
    first = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    second = 5 / 6 * math.log(5 / 3) + 1 / 6 * math.log(1 / 3)
    assert float(loss) == pytest.approx(first)
    assert float(loss_of_both) == pytest.approx(0.75 * first + 0.25 * second)


@pytest.mark.parametrize(("sigmoid", "expected"), [(False, math.log(2)), (True, math.log(2) / 2)])
def test_an_expert_that_only_the_student_has_is_never_the_teachers(
    sigmoid: bool, expected: float
) -> None:
    """By hand: halves for 0 and 1; two chances of 1/2 for one of 0 and one of 1/2."""
    ours = torch.zeros(1, 2, requires_grad=True)
    loss = routing_kl(ours, torch.tensor([[-torch.inf, 0.0]]), torch.ones(1), sigmoid)
    assert float(loss.detach()) == pytest.approx(expected)
    loss.backward()
    assert ours.grad is not None
    assert ours.grad.tolist() == ([[0.25, 0.0]] if sigmoid else [[0.5, -0.5]])


@pytest.mark.parametrize("model_type", ["mixtral", "glm4_moe"])
def test_in_half_precision_it_is_about_the_same(model_type: str, tiny_model) -> None:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model(model_type)
        if dtype != torch.float32:
            model = model.to(dtype)
        model = adapted(model)
        anatomy = Anatomy(model)
        coforward = CoForward(anatomy, MaskHooks(anatomy), routing=True)
        masks = masks_of(anatomy, "experts", "free")
        with coforward.student(masks):
            loss = mean_of(coforward.run(model, CALL, DENSE))
            loss.backward()
        assert loss.dtype == torch.float32
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        found.append((float(loss.detach()), torch.cat([x.flatten() for x in grads])))
    (loss, exact), (near, half) = found
    assert near == pytest.approx(loss, rel=0.05)
    assert float((half - exact).norm()) < 0.1 * float(exact.norm())


def test_a_block_that_is_gone_is_not_compared(tiny_model) -> None:
    model = adapted(tiny_model("mixtral"))
    anatomy = Anatomy(model)
    masks = Masks.open(Layout(anatomy.shape, anatomy.head_dim), ["mlp_block"])
    coforward, whole = together(model, masks)
    masks.part("mlp_block", 1)[:] = 0
    _, passage = together(model, masks)
    assert (whole.routers, passage.routers) == (3, 2)
    with torch.no_grad():
        theirs = routed(tiny_model("mixtral"))
        with coforward.hooks.using(masks):
            ours = routed(model)
    expected = by_hand(ours[::2], theirs[::2], sigmoid=False)
    torch.testing.assert_close(mean_of(passage).double(), expected, rtol=1e-4, atol=0)


def test_without_a_weight_nothing_watches_routers(tiny_model, tmp_path: Path) -> None:
    for weight in (0.0, 0.1):
        trainer = make(tiny_model("mixtral"), tmp_path, gates="experts", routing_weight=weight)
        before = [len(x._forward_hooks) for x in routers(trainer.model)]
        with trainer.coforward.student(None), trainer.coforward.roles(DENSE, PADDING.float()):
            within = [len(x._forward_hooks) for x in routers(trainer.model)]
        assert [x - y for x, y in zip(within, before, strict=True)] == [int(weight > 0)] * 3
        assert [len(x._forward_hooks) for x in routers(trainer.model)] == before


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        pytest.param("mixtral", {"gates": "experts", "shapes": "uniform"}, id="uniform"),
        pytest.param("mixtral", {"gates": "experts", "gate_type": "hard_concrete"}, id="soft"),
        pytest.param("qwen2_moe", {"ramp_share": 0.5, "shapes": "free"}, id="ramp"),
        pytest.param(
            "deepseek_v3", {"gates": "expert_neurons", "neuron_multiple": 8}, id="neurons"
        ),
    ],
)
@pytest.mark.slow(1)
def test_a_run_has_the_term_in_its_loss(
    model_type: str, changes: dict[str, Any], tiny_model, tmp_path: Path
) -> None:
    lines = []
    for weight in (0.0, 0.5):
        out = tmp_path / str(weight)
        make(tiny_model(model_type), out, max_steps=3, routing_weight=weight, **changes).train()
        lines.append(metrics(out))
    plain, near = lines
    assert "routing" not in plain[0]
    for line in near:
        parts = ("token_kl", "layer", "routing", "penalty")
        assert line["routing"] > 0
        assert line["loss"] == pytest.approx(sum(line.get(x, 0) for x in parts), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {}, r"routing_weight is 0.1, and the model has no routers.*: leave it out"),
        ("mixtral", {"routing_weight": -1}, "routing_weight is -1; it must be at least 0"),
        ("mixtral", {"routing_weight": math.nan}, "routing_weight is nan; it must be"),
        ("mixtral", {"routing_weight": math.inf}, "routing_weight is inf; it must be at most"),
        ("mixtral", {"teachers": "none"}, "no teacher whose routers to stay near: leave one of"),
    ],
)
def test_where_no_router_can_be_kept_near_it_is_refused(
    name: str, changes: dict[str, Any], message: str, tiny_model, tmp_path: Path
) -> None:
    model = tiny_model(name)
    before = [x for x, _ in model.named_modules()]
    with pytest.raises(UserError, match=message):
        make(model, tmp_path, **{"routing_weight": 0.1, **changes})
    assert [x for x, _ in model.named_modules()] == before

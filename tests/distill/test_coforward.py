"""The co-forward pass against two plain passes of separate models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from nuteprune.distill.coforward import DENSE, TEXT, CoForward, Role
from nuteprune.distill.losses import Head, token_kl
from nuteprune.gates.masks import Layout, Masks
from nuteprune.model.anatomy import Anatomy, no_logits
from nuteprune.model.hooks import MaskHooks
from nuteprune.model.lora import LoraBank, lora_in_base_dtype
from nuteprune.model.shape import LayerShape, Shape
from nuteprune.model.trainable import add_lora
from tests.families import DENSE_KINDS

RANDOM = torch.Generator().manual_seed(0)
TOKENS = torch.randint(3, 96, (2, 10), generator=RANDOM)
PADDING = torch.ones_like(TOKENS)
PADDING[1, 7:] = 0
CALL: dict[str, Any] = {"input_ids": TOKENS, "attention_mask": PADDING, "use_cache": False}
each_teacher = pytest.mark.parametrize("snapshot", [False, True], ids=["dense", "snapshot"])
each_student = pytest.mark.parametrize("fixed", [False, True], ids=["learned", "fixed"])


@pytest.fixture(autouse=True)
def small_multiple(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nuteprune.distill.coforward.TEACHERS_MULTIPLE", 5)


def adapted(model) -> PeftModel:
    model.requires_grad_(False)
    made = add_lora(Anatomy(model), r=2, lora_alpha=6)
    fill(made, seed=1)
    return made


@torch.no_grad()
def fill(model: nn.Module, seed: int) -> None:
    """Give LoRA weights that matter."""
    random = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=random))


def masks_of(anatomy: Anatomy, seed: int, *batch: int) -> Masks:
    """Masks of all kinds, 0 or soft; leaves of one row per sequence if `batch` is given."""
    layout, random = Layout(anatomy.shape, anatomy.head_dim), torch.Generator().manual_seed(seed)
    values = {}
    for kind in DENSE_KINDS:
        size = (*batch, layout.units(kind))
        values[kind] = torch.rand(size, generator=random) + 0.3
        if not kind.endswith("block"):  # else nothing may be left to compare
            values[kind] *= torch.rand(size, generator=random) > 0.2
        values[kind].requires_grad_(bool(batch))
    return Masks(layout, values)


def fixed_masks(anatomy: Anatomy, seed: int) -> Masks:
    """Masks that are not learned; of layers 1 and 2 blocks are gone, by their units or as such."""
    masks = masks_of(anatomy, seed)
    masks.part("kv_groups", 0)[1:2] = 0
    masks.part("kv_groups", 1)[:] = 0
    masks.part("mlp_block", 1)[:] = 0
    masks.part("attn_block", 2)[:] = 0
    masks.part("neurons", 2)[:] = 0
    return masks


@dataclass
class Student:
    model: PeftModel
    coforward: CoForward
    masks: Masks
    teacher: Role

    @property
    def lora(self) -> dict[str, Tensor]:
        return {n: p for n, p in self.model.named_parameters() if "lora_" in n}

    def student(self) -> AbstractContextManager[None]:
        return self.coforward.student(self.masks)

    def loss(self) -> Tensor:
        """What training minimises, by co-forward; to be called within `student`."""
        anatomy = self.coforward.anatomy
        weight_BT = PADDING.float()
        with self.coforward.roles(self.teacher, weight_BT) as passage:
            self.model(**CALL, logits_to_keep=no_logits(CALL["input_ids"]))
        assert passage.layer_loss is not None
        assert passage.student_BTD is not None
        assert passage.teacher_BTD is not None
        head = Head.of(anatomy)
        kl = token_kl(passage.student_BTD, passage.teacher_BTD, head, weight_BT, 2.0)
        return passage.layer_loss + kl

    def gradients(self) -> dict[str, Tensor | None]:
        leaves = self.lora | self.masks.values
        return {name: leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}


def student(tiny_model, name: str, snapshot: bool, fixed: bool = False) -> Student:
    model = adapted(tiny_model(name))
    anatomy = Anatomy(model)
    coforward = CoForward(anatomy, MaskHooks(anatomy), LoraBank(anatomy))
    teacher = DENSE
    if snapshot:
        random = torch.Generator().manual_seed(5)
        lora = {
            key: (0.2 * torch.randn(value.shape, generator=random)).requires_grad_()
            for key, value in coforward.bank.state().items()
        }
        teacher = Role(fixed_masks(anatomy, 16), lora)
    masks = fixed_masks(anatomy, 17) if fixed else masks_of(anatomy, 7, len(TOKENS))
    return Student(model, coforward, masks, teacher)


@contextmanager
def outputs_of_layers(anatomy: Anatomy) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    handles = [
        layer.register_forward_hook(
            lambda _, __, output: seen.append(output[0] if isinstance(output, tuple) else output)
        )
        for layer in anatomy.layers
    ]
    yield seen
    for handle in handles:
        handle.remove()


def run_alone(model, masks: Masks | None) -> tuple[list[Tensor], Tensor]:
    """Outputs of all layers, and logits."""
    anatomy = Anatomy(model)
    hooks = MaskHooks(anatomy)
    with hooks.using(masks), outputs_of_layers(anatomy) as layers:
        logits = model(**CALL).logits
    hooks.remove()
    return layers, logits


def install(model: PeftModel, lora: Mapping[str, Tensor]) -> None:
    """Copy a snapshot's weights, whose keys are layer.place.side, into a model."""
    anatomy = Anatomy(model)
    for key, value in lora.items():
        layer, place, side = key.split(".")
        module = list(anatomy.lora_layers(int(layer)).values())[int(place)]
        getattr(module, f"lora_{side}")["default"].weight.data.copy_(value)


def plain_loss(tiny_model, name: str, x: Student) -> Tensor:
    """The same loss by a pass of the student and a pass of another model, the teacher."""
    teacher = tiny_model(name)
    if x.teacher.lora is not None:
        teacher = adapted(teacher)
        install(teacher, x.teacher.lora)
    with torch.no_grad():
        theirs, their_logits = run_alone(teacher, x.teacher.masks)
    ours, our_logits = run_alone(x.model, x.masks)
    real = PADDING.bool()
    layers = sum(
        ((a - b)[real].square().sum(-1) / b[real].square().sum(-1)).mean()
        for a, b in zip(ours, theirs, strict=True)
    )
    p, q = ((z[real] / 2.0).log_softmax(-1) for z in (their_logits, our_logits))
    return layers + 4 * (p.exp() * (p - q)).sum(-1).mean()


@each_student
@each_teacher
def test_loss_and_gradients_are_those_of_two_passes(
    tiny_model, tiny_name: str, snapshot: bool, fixed: bool
) -> None:
    x = student(tiny_model, tiny_name, snapshot, fixed)
    with x.student():
        loss = x.loss()
        loss.backward()
    ours = x.gradients()
    assert all(value.grad is None for value in (x.teacher.lora or {}).values())
    for leaf in (*x.lora.values(), *x.masks.values.values()):
        leaf.grad = None
    expected = plain_loss(tiny_model, tiny_name, x)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for name, gradient in x.gradients().items():
        assert gradient is not None
        scale = float(gradient.abs().max())
        assert scale > 0 or fixed  # of a block that is gone
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=1e-5 * max(1, scale))


@each_student
def test_what_fixed_masks_keep_alone_is_computed(tiny_model, tiny_name: str, fixed: bool) -> None:
    x = student(tiny_model, tiny_name, snapshot=True, fixed=fixed)
    anatomy = x.coforward.anatomy
    seen: list[int] = []
    for layer in range(3):
        for block in (anatomy.family.attention, anatomy.family.mlp):
            linear = anatomy.linear(layer, block[-1])
            if linear is not None:
                linear.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[-1]))
    with x.student():
        x.loss()
    expected = []
    for layer in range(3):
        for masks in (x.masks, x.teacher.masks):
            groups, neurons = masks.part("kv_groups", layer), masks.part("neurons", layer)
            heads = anatomy.shape.layers[layer].heads
            features = [heads * anatomy.head_dim, anatomy.shape.layers[layer].neurons]
            if fixed or masks is not x.masks:
                features[1] = int((neurons > 0).sum()) if layer == 0 else 1
                if masks is x.teacher.masks:
                    features[1] += -features[1] % 5
                if heads and not anatomy.family.counts_heads:
                    served = (masks.heads(layer).reshape(len(groups), -1) > 0).any(1)
                    kept = max(1, int(served.sum())) if layer == 0 else 1
                    features[0] = features[0] // len(groups) * kept
                    assert kept < len(groups)
            expected += features[not heads :]
    assert seen == expected


def test_where_queries_and_values_alone_have_lora_fixed_masks_change_no_gradient(
    tiny_model, tiny_name: str
) -> None:
    found = []
    for narrow in (True, False):
        model = tiny_model(tiny_name).requires_grad_(False)
        made = add_lora(Anatomy(model), queries_and_values=True, r=2)
        fill(made, seed=1)
        anatomy = Anatomy(made)
        coforward = CoForward(anatomy, MaskHooks(anatomy), LoraBank(anatomy))
        x = Student(made, coforward, fixed_masks(anatomy, 17), DENSE)
        if not narrow:
            learned = {k: v.clone().requires_grad_() for k, v in x.masks.values.items()}
            x.masks = Masks(x.masks.layout, learned)
        with x.student():
            loss = x.loss()
            loss.backward()
        found.append([loss.detach(), *(leaf.grad for leaf in x.lora.values())])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_masks_of_single_sequences_need_no_gradients(tiny_model) -> None:
    x = student(tiny_model, "llama", snapshot=False)
    with x.student():
        loss = x.loss()
        with torch.no_grad():
            assert torch.equal(x.loss(), loss)
    x.masks = Masks(x.masks.layout, {k: v.detach() for k, v in x.masks.values.items()})
    with torch.no_grad(), x.student():
        assert torch.equal(x.loss(), loss)


def test_hooks_leave_no_trace_of_what_was_computed_narrow(tiny_model) -> None:
    x = student(tiny_model, "llama", snapshot=True, fixed=True)
    inner = MaskHooks(x.coforward.anatomy)
    inner.remove()
    with x.student():
        x.loss()
    x.coforward.hooks.remove()
    assert not any("forward" in vars(module) for module in x.model.modules())
    assert torch.equal(run_alone(x.model, None)[1], x.model(**CALL).logits)


def check_activation_checkpointing(tiny_model: Any, name: str, snapshot: bool, fixed: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        x = student(tiny_model, name, snapshot, fixed)
        x.model.train()
        if checkpointing:
            x.model.gradient_checkpointing_enable()
        with x.student():
            x.loss().backward()  # runs the student's layers again
        gradients.append(x.gradients())
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@each_student
def test_gradients_are_the_same_with_activation_checkpointing(
    tiny_model, tiny_name: str, fixed: bool
) -> None:
    check_activation_checkpointing(tiny_model, tiny_name, True, fixed)


# Of what a teacher does none is run again, so one family is enough for another teacher.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@each_student
def test_gradients_are_the_same_with_checkpointing_and_a_dense_teacher(
    tiny_model, fixed: bool
) -> None:
    check_activation_checkpointing(tiny_model, "llama", False, fixed)


def bytes_of(tensor: Tensor | None) -> bytes | None:
    return None if tensor is None else tensor.detach().numpy().tobytes()


def state_of(x: Student) -> list[Any]:
    """All in a student that a teacher could change."""
    modules = list(x.model.modules())
    return [
        {n: bytes_of(p) for n, p in x.model.named_parameters()},
        {n: bytes_of(p.grad) for n, p in x.model.named_parameters()},
        {n: (p.data_ptr(), p.requires_grad) for n, p in x.model.named_parameters()},
        [m.disable_adapters for m in modules if isinstance(m, LoraLayer)],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules],
    ]


@each_teacher
def test_a_teacher_leaves_no_trace(tiny_model, snapshot: bool) -> None:
    x = student(tiny_model, "llama", snapshot)
    with torch.no_grad():
        alone = run_alone(x.model, x.masks)[1]
    for leaf in x.lora.values():
        leaf.grad = torch.ones_like(leaf)
    before = state_of(x)
    with x.student():
        with x.coforward.roles(x.teacher, PADDING.float()) as passage:
            logits = x.model(**CALL).logits
        assert x.coforward.hooks.masks is x.masks  # for the backward pass
    assert passage.teacher_BTD is not None
    assert not passage.teacher_BTD.requires_grad
    assert torch.equal(logits, alone)
    assert state_of(x) == before
    assert x.coforward.hooks.masks is None


@each_teacher
def test_a_teacher_that_fails_leaves_no_trace(tiny_model, snapshot: bool) -> None:
    x = student(tiny_model, "llama", snapshot)
    before = state_of(x)
    too_few = {"neurons": torch.full((3 * 47,), 0.5)}
    layout = Layout(Shape(32, (LayerShape(4, 2, 47),) * 3), 8)
    role = Role(Masks(layout, too_few), x.teacher.lora)
    with (
        pytest.raises(RuntimeError, match="47"),
        x.student(),
        x.coforward.roles(role, PADDING.float()),
    ):
        x.model(**CALL)
    assert state_of(x) == before
    assert x.coforward.hooks.masks is None


def test_a_student_alone_is_the_plain_model(tiny_model) -> None:
    x = student(tiny_model, "llama", snapshot=False)
    with x.student(), x.coforward.roles(None, PADDING.float()) as passage:
        logits = x.model(**CALL).logits
    assert torch.equal(logits, x.coforward.anatomy.head(passage.student_BTD))
    assert torch.equal(logits, run_alone(x.model, x.masks)[1])
    assert passage.layer_loss is None
    assert passage.teacher_BTD is None


def test_without_a_layer_term_both_roles_still_reach_the_head(tiny_model) -> None:
    x = student(tiny_model, "llama", snapshot=True)
    with x.student(), x.coforward.roles(x.teacher, PADDING.float()) as passage:
        x.model(**CALL)
    plain = CoForward(x.coforward.anatomy, x.coforward.hooks, x.coforward.bank, TEXT)
    with plain.student(x.masks), plain.roles(x.teacher, PADDING.float()) as other:
        x.model(**CALL)
    assert other.layer_loss is None
    assert torch.equal(other.student_BTD, passage.student_BTD)
    assert torch.equal(other.teacher_BTD, passage.teacher_BTD)


@each_student
@each_teacher
def test_lora_computes_in_the_base_weights_dtype(tiny_model, snapshot: bool, fixed: bool) -> None:
    x = student(tiny_model, "llama", snapshot, fixed)
    anatomy = x.coforward.anatomy
    for name, weight in x.model.named_parameters():
        if "lora_" not in name:
            weight.data = weight.data.bfloat16()
    projection = anatomy.projection(0, anatomy.family.mlp[-1])
    seen: list[torch.dtype] = []
    side = projection.lora_A["default"]
    side.register_forward_hook(lambda _, args, output: seen.extend([args[0].dtype, output.dtype]))
    with x.student():
        plain = x.loss()
    assert seen[:2] == [torch.float32] * 2  # the student's comes before the teacher's
    seen.clear()
    with lora_in_base_dtype(anatomy), x.student():
        close = x.loss()
    assert set(seen) == {torch.bfloat16}
    assert close.item() == pytest.approx(plain.item(), rel=0.02)
    close.backward()
    assert side.weight.grad.dtype == torch.float32
    assert projection.cast_input_dtype_enabled


def test_where_no_logits_are_wanted_the_head_reads_nothing(tiny_model, tiny_name: str) -> None:
    model = tiny_model(tiny_name)
    seen: list[torch.Size] = []
    Anatomy(model).head.register_forward_hook(lambda _, args, __: seen.append(args[0].shape))
    logits = model(**CALL, logits_to_keep=no_logits(TOKENS)).logits
    assert logits.shape[:2] == (len(TOKENS), 0)
    assert seen[0][:2] == (len(TOKENS), 0)


def test_a_delta_set_by_hand_is_what_lora_adds(tiny_model) -> None:
    x = student(tiny_model, "llama", snapshot=False)
    bank, anatomy = x.coforward.bank, x.coforward.anatomy
    projection = anatomy.family.mlp[-1]
    out_OR, in_RI = torch.randn(32, 1), torch.randn(1, 48)  # of lower rank than the adapters
    others = {k: v.clone() for k, v in bank.state().items() if not k.startswith("1.6.")}
    bank.set_delta(1, projection, out_OR, in_RI)
    delta = anatomy.projection(1, projection).get_delta_weight("default")
    torch.testing.assert_close(delta, out_OR @ in_RI)
    state = bank.state()
    assert (state["1.6.B"][:, 1:] == 0).all()  # the others add nothing yet ...
    assert (state["1.6.A"][1:] != 0).any(dim=1).all()  # ... but B has gradients to grow by
    for key, value in others.items():
        assert torch.equal(bank.state()[key], value)

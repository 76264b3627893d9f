from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nuteprune.distill import losses
from nuteprune.distill.coforward import Objective
from nuteprune.distill.losses import (
    Head,
    amplified,
    language_model_loss,
    layer_mse,
    layer_relative,
    token_kl,
    unlikelihood,
)
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.families import FAMILIES

B, T, D, V = 2, 5, 8, 32
WEIGHT_BT = torch.tensor([[1.0, 1, 1, 1, 1], [1, 2, 1, 0, 0]])


def normal(*size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def plain_kl(student: Tensor, teacher: Tensor, head: Head, weight: Tensor, t: float) -> Tensor:
    """Hinton's formula, all logits at once."""

    def log_p(hidden_BTD: Tensor) -> Tensor:
        z = hidden_BTD @ head.weight.T
        z = z if head.bias is None else z + head.bias
        z = z / head.divisor
        z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
        return torch.log_softmax(z / t, -1)

    p, q = log_p(teacher), log_p(student)
    kl_BT = (p.exp() * (p - q)).sum(-1)
    return t * t * (kl_BT * weight).sum() / weight.sum()


@pytest.mark.parametrize(
    ("chunk", "rows"),
    [(256, 256), (256, 3), (4, 3), (1, 1)],
    ids=str,
)
@pytest.mark.parametrize("temperature", [1.0, 2 / 3, 2.0])
@pytest.mark.parametrize(
    "settings",
    [{}, {"bias": normal(V, seed=3)}, {"divisor": 4.0}, {"softcap": 2.0, "divisor": 0.5}],
    ids=["plain", "bias", "divisor", "softcap"],
)
def test_token_kl_is_the_plain_formula(
    settings: dict, temperature: float, chunk: int, rows: int, monkeypatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK_TOKENS", (1, chunk))
    monkeypatch.setattr(losses, "ROW_ELEMENTS", rows * V)
    head = Head(normal(V, D, seed=0), **settings)
    student = normal(B, T, D, seed=1).requires_grad_()
    teacher = normal(B, T, D, seed=2)
    results = []
    for kl in (token_kl, plain_kl):
        value = kl(student, teacher, head, WEIGHT_BT, temperature)
        (3 * value).backward()
        results.append((value.detach(), student.grad))
        student.grad = None
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    assert (results[0][1][1, 3:] == 0).all()


def test_token_kl_by_hand() -> None:
    """Logits ln 3, 0 against 0, 0: KL((3/4, 1/4) || (1/2, 1/2)) = ln 2 - H(1/4) = 0.130812."""
    head = Head(torch.eye(2))
    teacher, student = torch.tensor([[[3.0, 1.0]]]).log(), torch.zeros(1, 1, 2)
    one = token_kl(student, teacher, head, torch.ones(1, 1))
    assert float(one) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)
    assert float(one) == pytest.approx(0.130812, abs=1e-6)
    # At T = 1/2 the teacher's odds are 9 : 1, and KL counts T^2 times.
    half = token_kl(student, teacher, head, torch.ones(1, 1), temperature=0.5)
    expected = 0.25 * (0.9 * math.log(1.8) + 0.1 * math.log(0.2))
    assert float(half) == pytest.approx(expected, rel=1e-6)


def test_token_kl_of_a_model_with_itself_is_nothing() -> None:
    hidden_BTD = normal(B, T, D, seed=1).requires_grad_()
    kl = token_kl(hidden_BTD, hidden_BTD.detach(), Head(normal(V, D, seed=0)), WEIGHT_BT)
    kl.backward()
    assert kl == 0
    assert (hidden_BTD.grad == 0).all()


def test_token_kl_in_half_precision_has_gradients_of_its_input_type() -> None:
    head = Head(normal(V, D, seed=0).bfloat16())
    student = normal(B, T, D, seed=1).bfloat16().requires_grad_()
    teacher = normal(B, T, D, seed=2).bfloat16()
    token_kl(student, teacher, head, WEIGHT_BT).backward()
    exact = student.detach().float().requires_grad_()
    plain_kl(exact, teacher.float(), Head(head.weight.float()), WEIGHT_BT, 1.0).backward()
    assert student.grad.dtype == torch.bfloat16
    error = (student.grad.float() - exact.grad).norm() / exact.grad.norm()
    assert error < 0.02


def test_token_kl_of_many_tokens_has_gradients_in_float16() -> None:
    """Each token's is far below what float16 holds, until the loss is scaled."""
    tokens, scale = 2**17, 2.0**14
    head = Head(normal(V, D, seed=0).half())
    student = (0.1 * normal(1, tokens, D, seed=1)).half().requires_grad_()
    teacher = student.detach() + (0.01 * normal(1, tokens, D, seed=2)).half()
    weight_BT = torch.ones(1, tokens)
    amplified(token_kl(student, teacher, head, weight_BT), scale).backward()
    exact = student.detach().float().requires_grad_()
    plain_kl(exact, teacher.float(), Head(head.weight.float()), weight_BT, 1.0).backward()
    error = (student.grad.float() / scale - exact.grad).norm() / exact.grad.norm()
    assert error < 0.05


@pytest.mark.parametrize("name", FAMILIES)
def test_a_models_logits_are_its_heads(tiny_model, name: str) -> None:
    model = tiny_model(name)
    anatomy = Anatomy(model)
    seen = []
    anatomy.final_norm.register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        logits = model(torch.arange(3, 12)[None]).logits
    logits_found = Head.of(anatomy).logits(seen[0])
    torch.testing.assert_close(logits_found, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_language_model_loss_is_the_models_own(
    chunk: int, tiny_model, tiny_name: str, monkeypatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK_TOKENS", (1, chunk))
    monkeypatch.setattr(losses, "ROW_ELEMENTS", 1)
    model = tiny_model(tiny_name)
    anatomy = Anatomy(model)
    anatomy.head.weight.requires_grad_(False)
    seen = []
    anatomy.final_norm.register_forward_hook(lambda _, __, output: seen.append(output))
    ids = torch.arange(3, 21).reshape(2, 9)
    labels = ids.clone()
    labels[0, :4] = labels[1, 6:] = losses.IGNORED
    expected = model(ids, labels=labels).loss
    (expected_grad,) = torch.autograd.grad(expected, seen[0])
    model(ids)
    found = language_model_loss(seen[1], Head.of(anatomy), labels)
    (grad,) = torch.autograd.grad(found, seen[1])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-6)
    nothing = torch.full_like(ids, losses.IGNORED)
    assert language_model_loss(seen[1], Head.of(anatomy), nothing) == 0


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_unlikelihood_is_its_formula(softcap: float | None, monkeypatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_TOKENS", (1, 2))
    head = Head(normal(V, D, seed=0), softcap=softcap)
    hidden = normal(B, T, D, seed=1).requires_grad_()
    ids = torch.arange(B * T).view(B, T)
    repeats = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 0, 0, 1]]).bool()
    z = hidden[:, :-1] @ head.weight.T
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    p = torch.softmax(z, -1).gather(-1, ids[:, 1:, None])[..., 0]
    expected = -torch.log(1 - p)[repeats[:, 1:]].sum() / ids.numel()
    (expected_grad,) = torch.autograd.grad(expected, hidden)
    found = unlikelihood(hidden, head, ids, repeats)
    (grad,) = torch.autograd.grad(found, hidden)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(grad, expected_grad)
    assert unlikelihood(hidden, head, ids, torch.zeros_like(repeats)) == 0


def test_a_token_that_is_sure_to_repeat_has_a_finite_loss() -> None:
    head, hidden = Head(100 * torch.eye(D)), torch.eye(D)[None, :2].clone().requires_grad_()
    found = unlikelihood(hidden, head, torch.zeros(1, 2, dtype=int), torch.ones(1, 2).bool())
    found.backward()
    assert found.isfinite()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


def test_layer_terms_by_hand() -> None:
    student = torch.tensor([[[1.0, 2.0], [0.0, 0.0], [9.0, 9.0]]])
    teacher = torch.tensor([[[1.0, 4.0], [3.0, 4.0], [0.0, 1.0]]])
    weight = torch.tensor([[1.0, 3.0, 0.0]])
    # squared differences 4 and 25, squared norms of the teacher 17 and 25
    assert layer_mse(student, teacher, weight) == pytest.approx((1 * 2 + 3 * 12.5) / 4)
    assert layer_relative(student, teacher, weight) == pytest.approx((4 / 17 + 3 * 1) / 4)
    assert Objective(as_published=True).layer_distance is layer_mse
    assert Objective().layer_distance is layer_relative
    assert Objective(layer_weight=0.0).layer_distance is None


def test_padding_alone_is_not_a_division_by_zero() -> None:
    student, teacher, none = normal(B, T, D, seed=1), normal(B, T, D, seed=2), torch.zeros(B, T)
    assert layer_mse(student, teacher, none) == 0
    assert layer_relative(student, teacher, none) == 0
    assert token_kl(student, teacher, Head(normal(V, D, seed=0)), none) == 0

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nuteprune.gates.masks import Layout, Masks
from nuteprune.model import layerwise
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.family import BLOCK_KINDS
from nuteprune.model.hooks import MaskHooks
from nuteprune.model.lora import LoraBank
from nuteprune.model.trainable import add_lora
from nuteprune.shrink import least_squares
from nuteprune.shrink.least_squares import (
    FEEDBACK,
    LEAST_GAIN,
    RIDGE,
    _inverse_gain,
    fit_projections,
    ridge_fit,
    ridge_of,
)
from nuteprune.stages import Prunable
from nuteprune.stages.refit import refit
from nuteprune.train.config import NutePruneConfig
from nuteprune.train.constraints import make_allocator
from tests.refits import install_weight


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def correlated(rows: int = 400, columns: int = 12) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    mix = torch.randn(columns, columns, generator=random)
    return torch.randn(rows, columns, generator=random) @ mix


def test_ridge_fit_is_least_squares_as_the_ridge_vanishes(monkeypatch) -> None:
    monkeypatch.setattr(least_squares, "RIDGE", 0.0)
    x, weight = correlated(), torch.randn(5, 12)
    mask = torch.ones(12)
    mask[[1, 4, 7]] = 0
    kept = mask > 0
    fitted = ridge_fit(weight, x.T @ x, mask, weight)
    best = torch.linalg.lstsq(x[:, kept], x @ weight.T).solution.T
    assert torch.allclose(fitted[:, kept], best, atol=1e-3)
    assert (fitted[:, ~kept] == 0).all()


def test_a_gain_of_zero_asks_for_nothing() -> None:
    """Nor does a norm whose gains are all 0, which hears nothing of its block."""
    assert _inverse_gain(torch.tensor([0.0, 2.0]))[0] == 0
    assert (_inverse_gain(torch.zeros(3)) == 0).all()


def test_few_tokens_for_each_input_mean_more_ridge() -> None:
    assert ridge_of(1536, None) == ridge_of(1536, 144 * 256) == RIDGE
    assert ridge_of(1536, 36 * 256) == pytest.approx(0.3)
    assert ridge_of(1536, 1) == 1


def test_ridge_fit_leaves_alone_what_makes_up_for_the_loss_already() -> None:
    x, target = correlated(), torch.randn(5, 12)
    mask = torch.ones(12)
    mask[[1, 4, 7]] = 0
    kept = mask > 0
    learned = torch.randn(5, 12)  # its own columns that are gone must not matter
    learned[:, kept] = torch.linalg.lstsq(x[:, kept], x @ target.T).solution.T
    fitted = ridge_fit(learned, x.T @ x, mask, target)
    assert torch.allclose(fitted[:, kept], learned[:, kept], atol=1e-3)


def test_ridge_fit_undoes_soft_masks() -> None:
    x, weight = correlated(), torch.randn(5, 12)
    mask = torch.ones(12)
    mask[2], mask[3] = 0.0, 0.5
    fitted = ridge_fit(weight, x.T @ x, mask, weight)
    plain = ridge_fit(weight, x.T @ x, (mask > 0).float(), weight)
    assert torch.allclose((x * mask) @ fitted.T, x @ plain.T, atol=1e-3)


def pruned(tiny_model) -> tuple[Anatomy, MaskHooks, Masks]:
    anatomy = Anatomy(tiny_model("llama"))
    args = NutePruneConfig(output_dir="unused", neuron_multiple=8)
    allocator = make_allocator(anatomy, args)
    random = torch.Generator().manual_seed(3)
    scores = {
        k: torch.rand(allocator.layout.units(k), generator=random)
        for k in allocator.constraints.kinds
    }
    masks = allocator.masks(allocator.shape(scores, 0.3), scores)
    return anatomy, MaskHooks(anatomy), masks


def test_refit_lowers_the_distance_to_the_intact_model(tiny_model) -> None:
    anatomy, hooks, masks = pruned(tiny_model)
    random = torch.Generator().manual_seed(5)
    batches = list(torch.randint(3, 90, (64, 24), generator=random).split(8))
    unseen = torch.randint(3, 90, (16, 24), generator=random)
    with torch.no_grad():
        dense = anatomy.model(unseen).logits
        with hooks.using(masks):
            plain = anatomy.model(unseen).logits
        fit_projections(anatomy, hooks, masks, batches, install_weight(anatomy))
        with hooks.using(masks):
            fitted = anatomy.model(unseen).logits
    assert (fitted - dense).norm() < (plain - dense).norm()


def test_fits_know_how_many_tokens_they_read(tiny_model, monkeypatch) -> None:
    anatomy, hooks, masks = pruned(tiny_model)
    seen = []

    def noting(*args: Any) -> torch.Tensor:
        seen.append(args[5])
        return ridge_fit(*args)

    monkeypatch.setattr("nuteprune.shrink.least_squares.ridge_fit", noting)
    batches = torch.randint(3, 90, (6, 8)).split(4)  # of different sizes
    fit_projections(anatomy, hooks, masks, batches, install_weight(anatomy))
    assert seen
    assert set(seen) == {48}


def test_no_text_is_read_where_nothing_has_lost_inputs(tiny_model) -> None:
    anatomy, ticks = Anatomy(tiny_model("mixtral")), []
    masks = Masks.open(Layout(anatomy.shape, anatomy.head_dim), ["experts"])
    masks.values["experts"][0] = 0
    read = anatomy.layers[0].register_forward_pre_hook(lambda *_: pytest.fail("text was read"))
    text, install = [torch.arange(3, 12)[None]], install_weight(anatomy)
    fit_projections(anatomy, MaskHooks(anatomy), masks, text, install, lambda: ticks.append(1))
    read.remove()
    assert len(ticks) == 3  # a bar gets to its end all the same


# What differs in a refit: grouped queries, biases, blocks side by side, norms after the blocks,
# shared experts beside routed ones, and such that are weighed; multiples of what blocks write, in
# the layer (granite) or in the block itself (falcon_h1).
WRITES = {
    "llama": ("model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"),
    "granite": ("model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"),
    "gpt_neox": ("gpt_neox.layers.{}.attention.dense", "gpt_neox.layers.{}.mlp.dense_4h_to_h"),
    "falcon_h1": (
        "model.layers.{}.self_attn.o_proj",
        "model.layers.{}.feed_forward.down_proj",
    ),
    "gemma2": ("model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"),
    "glm4_moe": (
        "model.layers.{}.self_attn.o_proj",
        "model.layers.{}.mlp.shared_experts.down_proj",
    ),
    "qwen2_moe": (
        "model.layers.{}.self_attn.o_proj",
        "model.layers.{}.mlp.shared_expert.down_proj",
    ),
}
CHANGES: dict[str, dict[str, Any]] = {
    "glm4_moe": {"first_k_dense_replace": 0},
    "qwen2_moe": {"mlp_only_layers": []},
    "falcon_h1": {"mlp_multipliers": [0.9, 0.6]},
}
"""All layers have experts; an MLP multiplies what it gives."""
SCALES = {"granite": (0.5, 0.5), "falcon_h1": (1.5, 0.6)}
"""By what attention and MLP are multiplied on their way to the stream, where that is not 1."""
NORMS = ("input_layernorm", "post_attention_layernorm")
GEMMA_NORMS = ("input_layernorm", "pre_feedforward_layernorm")
READS = {
    "llama": [f"model.layers.{{}}.{norm}" for norm in NORMS],
    "granite": [f"model.layers.{{}}.{norm}" for norm in NORMS],
    "gpt_neox": [f"gpt_neox.layers.{{}}.{norm}" for norm in NORMS],
    "falcon_h1": ["model.layers.{}.input_layernorm", "model.layers.{}.pre_ff_layernorm"],
    "gemma2": [f"model.layers.{{}}.{norm}" for norm in GEMMA_NORMS],
    "glm4_moe": [f"model.layers.{{}}.{norm}" for norm in NORMS],
    "qwen2_moe": ["model.layers.{}.input_layernorm", None],
}
"""What blocks read the residual stream through, where what they write is added to it."""


def times_behind(layer: Any, block: str) -> Tensor | float:
    """Return what a wish for the stream is multiplied by, where Gemma's norm multiplies after."""
    kind = "attention" if block == "attn_block" else "feedforward"
    gain_D = 1 + layer.get_submodule(f"post_{kind}_layernorm").weight
    least = (LEAST_GAIN**2 * gain_D.square().mean()).item()
    return 1 / (gain_D + least / gain_D)


KIND_OF_HEADS = {"gpt_neox": "heads"}


def chosen(anatomy: Anatomy, heads: str) -> Masks:
    """Soft masks of what is left; layer 1 keeps all heads, layer 2 has none."""
    layout, random = Layout(anatomy.shape, anatomy.head_dim), torch.Generator().manual_seed(3)
    values = {}
    for kind in (heads, "neurons"):
        soft = 0.5 + torch.rand(layout.units(kind), generator=random)
        values[kind] = soft * (torch.rand(layout.units(kind), generator=random) > 0.4)
    each = layout.sizes[heads][0]
    values[heads][: each - 1], values[heads][each - 1] = 0.7, 0.0
    values[heads][each : 2 * each] = 1.0
    values[heads][2 * each :] = 0.0
    return Masks(layout, values)


def reads(model: nn.Module, path: str, tokens_NT: Tensor) -> Tensor:
    """Return what a module of a model reads, rows (M, I)."""
    read: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_pre_hook(
        lambda _, args: read.append(args[0].reshape(-1, args[0].shape[-1]))
    )
    model(tokens_NT, use_cache=False)
    hook.remove()
    return read[0]


@torch.no_grad()
def fitted_anew(
    model: nn.Module,
    intact: nn.Module,
    name: str,
    bases: dict[str, Tensor],
    masks: Masks,
    tokens_NT: Tensor,
) -> dict[str, Tensor]:
    """Fit a plain model by least squares, in place, in float64.

    The whole model runs anew for each projection. Rows of the ridge are below those of the inputs.
    Where a norm follows, a row is divided by what the norm divides the projection's output by.

    Args:
        model: the stock model in float64, LoRA merged.
        intact: the same without LoRA.
        name: of its family.
        bases: path -> weight without LoRA, whose outputs are wanted.
        masks: the masks; they are multiplied into the weights.
        tokens_NT: calibration text.
    """
    found = {}
    for i in range(3):
        both = masks.inputs(i).values()
        for place, norm, mask, scale, block in zip(
            WRITES[name], READS[name], both, SCALES.get(name, (1, 1)), BLOCK_KINDS, strict=True
        ):
            path = place.format(i)
            linear: Any = model.get_submodule(path)
            x_MI = reads(model, path, tokens_NT)
            if Anatomy(intact).post_norm(i, block) is not None:
                x_MI = x_MI / (x_MI @ bases[path].T).square().mean(-1, keepdim=True).sqrt()
            kept_I = mask > 0
            weight_OI = linear.weight.clone()
            if not kept_I.all() or norm is not None:  # heads of the first layer are gone
                x_MK = x_MI[:, kept_I]
                missing_MO = x_MI @ bases[path].T - x_MK @ weight_OI[:, kept_I].T
                if norm is not None:
                    theirs, ours = (reads(x, norm.format(i), tokens_NT) for x in (intact, model))
                    wish_MO = FEEDBACK / scale * (theirs - ours)
                    if name == "gemma2":
                        wish_MO *= times_behind(intact.get_submodule(f"model.layers.{i}"), block)
                    missing_MO += wish_MO
                size = x_MK.shape[1]
                share = ridge_of(x_MI.shape[1], len(x_MI))
                inputs = torch.cat([x_MK, (share * x_MK.square().sum(0)).sqrt().diag()])
                outputs = torch.cat([missing_MO, torch.zeros(size, len(weight_OI)).double()])
                if size:
                    weight_OI[:, kept_I] += torch.linalg.lstsq(inputs, outputs).solution.T
                weight_OI[:, ~kept_I] = 0
                linear.weight.copy_(weight_OI)  # soft masks are undone by the fit
            else:
                linear.weight.copy_(weight_OI * mask)
            found[path] = linear.weight
    return found


# LoRA does not ask what the family is: one shows it quickly.
REFITS = [
    pytest.param(name, how, marks=() if name == "llama" or how == "plain" else pytest.mark.slow)
    for name in WRITES
    for how in ("plain", "lora", "in place")
]


@pytest.mark.parametrize(("name", "how"), REFITS)
def test_refit_is_least_squares_layer_by_layer(name: str, how: str, tiny_model) -> None:
    random = torch.Generator().manual_seed(5)
    tokens_NT = torch.randint(3, 90, (40, 24), generator=random)
    changes = CHANGES.get(name, {})
    intact = tiny_model(name, **changes).double().requires_grad_(False)
    intact.set_experts_implementation("eager")  # which alone takes float64
    reference = deepcopy(intact)
    paths = [place.format(i) for i in range(3) for place in WRITES[name]]
    bases = {path: reference.get_submodule(path).weight.clone() for path in paths}
    model: Any = tiny_model(name, **changes).requires_grad_(False)
    if lora := how != "plain":
        model = add_lora(Anatomy(model), r=32, lora_alpha=64)
        for path, module in model.get_base_model().named_modules():
            if hasattr(module, "lora_A"):
                down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
                up.data.copy_(0.05 * torch.randn(up.shape, generator=random))
                down.data.copy_(0.1 * torch.randn(down.shape, generator=random))
                reference.get_submodule(path).weight.data += 2.0 * (up @ down).detach().double()
    anatomy = Anatomy(model)
    masks = chosen(anatomy, KIND_OF_HEADS.get(name, "kv_groups"))
    hooks = MaskHooks(anatomy)
    if how == "plain":
        fit_projections(anatomy, hooks, masks, tokens_NT.split(8), install_weight(anatomy))
    else:
        allocator: Any = None  # masks are chosen
        prepared = Prunable(anatomy, hooks, LoraBank(anatomy), allocator, is_sharded=how == "lora")
        prepared.bank.install(refit(prepared, masks, tokens_NT))
    expected = fitted_anew(reference, intact, name, bases, masks, tokens_NT)
    for i in range(3):
        for place, mask in zip(WRITES[name], masks.inputs(i).values(), strict=True):
            path = place.format(i)
            module = anatomy.model.get_submodule(path)
            weight = module.weight if not lora else module.base_layer.weight
            delta = module.get_delta_weight("default") if lora else 0
            ours, theirs = (weight + delta) * mask, expected[path].float()
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3 * float(theirs.abs().max()))
    with torch.no_grad(), hooks.using(masks):
        ours, theirs = (x(tokens_NT[:4]).logits for x in (anatomy.model, reference))
    atol = 1e-3 * float(theirs.abs().max())
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=atol)


# Of the last size a layer's last batch fits, which is of one block, and the others do not.
@pytest.mark.parametrize(("kept_bytes", "times"), [(2**30, 1), (0, 2), (3 * 2 * 24 * 48 * 4, 2)])
def test_a_layer_goes_on_from_inputs_that_were_kept(
    kept_bytes: int, times: int, tiny_model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a block computes before its last projection, it computes once where there is room."""
    monkeypatch.setattr(layerwise, "KEPT_BYTES", kept_bytes)
    anatomy, hooks, masks = pruned(tiny_model)
    assert all(not masks.part("neurons", i).all() for i in range(3))
    random = torch.Generator().manual_seed(5)
    batches = list(torch.randint(3, 90, (9, 24), generator=random).split(4))
    calls = [0, 0, 0]

    def count(layer: int) -> Any:
        return lambda *_: calls.__setitem__(layer, calls[layer] + 1)

    for i in range(3):
        anatomy.model.get_submodule(f"model.layers.{i}.mlp.up_proj").register_forward_hook(count(i))
    fit_projections(anatomy, hooks, masks, batches, install_weight(anatomy))
    # In the dense model too; and the first batch of each size goes through the first layer, to see
    # how layers are called.
    assert calls == [(1 + times) * 3 + 4, (1 + times) * 3, (1 + times) * 3]

"""Mixtures of experts: masked = sliced = saved and loaded; tokens that lose all their experts."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from nuteprune.errors import UserError
from nuteprune.export.checkpoint import assemble, save
from nuteprune.export.onnx import obstacles
from nuteprune.gates.budget import Budget
from nuteprune.gates.masks import Layout, Masks, NarrowMasks
from nuteprune.judge.block_times import cost_table
from nuteprune.judge.work import Workload
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.families import FAMILIES
from nuteprune.model.family import GATE_KINDS
from nuteprune.model.hooks import MaskHooks
from nuteprune.model.lora import LoraBank
from nuteprune.model.trainable import add_lora
from nuteprune.shrink.finalize import merge_layer
from nuteprune.train.config import NutePruneConfig
from nuteprune.train.constraints import make_allocator
from nuteprune.train.targets import Prices, run_targets
from tests.conftest import cache_of
from tests.families import MIXTURES

from .test_exactness import assert_same, check, logits, settings, soft_masks

TOKENS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))
each_mixture = pytest.mark.parametrize(
    "model_type",
    [pytest.param(x, marks=() if x == "mixtral" else pytest.mark.slow(0.3)) for x in MIXTURES],
)


def layout_of(anatomy: Anatomy) -> Layout:
    return Layout(anatomy.shape, anatomy.head_dim)


def test_all_families_with_experts_are_tested() -> None:
    assert {x for x, family in FAMILIES.items() if family.experts} == set(MIXTURES)


@pytest.mark.parametrize("shapes", ["free", "uniform"])
@pytest.mark.parametrize("kinds", ["experts", "expert_neurons", "experts,expert_neurons", "all"])
@each_mixture
def test_masked_folded_sliced_and_saved_models_agree(
    model_type: str, kinds: str, shapes: str, tiny_model, tmp_path: Path
) -> None:
    refusal = FAMILIES[model_type].refusal
    taken = [x for x in GATE_KINDS if not refusal(x, uniform=shapes == "uniform")]
    check(model_type, ",".join(taken) if kinds == "all" else kinds, shapes, tiny_model, tmp_path)


@pytest.mark.parametrize("shapes", ["free", "uniform"])
def test_a_mixture_without_dense_layers_where_its_family_may_have_some(
    shapes: str, tiny_model, tmp_path: Path
) -> None:
    """As Qwen3-30B-A3B."""

    def all_of_experts(model_type: str) -> PreTrainedModel:
        return tiny_model(model_type, mlp_only_layers=[])

    check("qwen3_moe", "experts,kv_groups", shapes, all_of_experts, tmp_path)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "glm4_moe"])
def test_experts_go_where_that_costs_least(model_type: str, tiny_model) -> None:
    anatomy = Anatomy(tiny_model(model_type))
    allocator = make_allocator(anatomy, NutePruneConfig(output_dir="unused", gates="experts"))
    layers = [i for i, x in enumerate(allocator.budget.shape.layers) if x.experts]
    for seed in range(5):
        random = torch.Generator().manual_seed(seed)
        scores = {"experts": torch.rand(6 * len(layers), generator=random)}
        parts = [x.sort().values for x in scores["experts"].split(6)]
        shape = allocator.shape(scores, 0.25)
        masks = allocator.masks(shape, scores)
        for i, part in zip(layers, scores["experts"].split(6), strict=True):
            kept = masks.part("experts", i).nonzero().flatten()
            assert set(kept.tolist()) == set(part.topk(shape.layers[i].experts).indices.tolist())

        def loss(counts: Sequence[int], parts: list[Tensor] = parts) -> float:
            pairs = zip(parts, counts, strict=True)
            return sum(float(part[: 6 - count].sum()) for part, count in pairs)

        found = [shape.layers[i].experts for i in layers]
        gone = 6 * len(layers) - sum(found)
        others = itertools.product(range(anatomy.per_token, 7), repeat=len(layers))
        best = min(loss(x) for x in others if 6 * len(layers) - sum(x) == gone)
        assert loss(found) == pytest.approx(best)
        # One expert less would not be enough.
        fewer = allocator.budget.sparsity(shape) - allocator.budget.sparsity(shape) / gone
        assert allocator.budget.sparsity(shape) >= 0.25 > fewer


@each_mixture
def test_open_gates_are_the_stock_model_bit_for_bit(model_type: str, tiny_model) -> None:
    model = tiny_model(model_type)
    stock = logits(model, TOKENS)
    layout = layout_of(Anatomy(model))
    ones = {kind: torch.ones(layout.units(kind)) for kind in GATE_KINDS}
    for values in (ones, {k: v.expand(2, -1) for k, v in ones.items()}):
        hooks = MaskHooks(Anatomy(model))
        with hooks.using(Masks(layout, values)):
            assert torch.equal(logits(model, TOKENS), stock)
        hooks.remove()
    assert not any("forward" in vars(module) for module in model.modules())


def chosen(model: PreTrainedModel, anatomy: Anatomy, layer: int, tokens: Tensor) -> Tensor:
    """The experts (tokens, k) that a layer's router picks."""
    seen = []
    mixture = anatomy.mixture(layer)
    assert mixture is not None
    hook = mixture.router.register_forward_hook(lambda _, __, output: seen.append(output))
    logits(model, tokens)
    hook.remove()
    if mixture.entry.weighed_first:  # it gives weights of all, 0 where they are not chosen
        return seen[0][0].topk(anatomy.per_token).indices
    return seen[0][-1]


@each_mixture
def test_a_token_whose_experts_are_all_gone_is_routed_as_in_the_sliced_model(
    model_type: str, tiny_model
) -> None:
    model = tiny_model(model_type)
    anatomy = Anatomy(model)
    layout = layout_of(anatomy)
    first = next(i for i in range(3) if anatomy.mixture(i))
    lost = chosen(model, anatomy, first, TOKENS)[4]
    masks = Masks.open(layout, ["experts"])
    masks.part("experts", first)[lost] = 0
    with (hooks := MaskHooks(anatomy)).using(masks):
        masked = logits(model, TOKENS)
        now = chosen(model, anatomy, first, TOKENS)
    hooks.remove()
    assert not set(now.flatten().tolist()) & set(lost.tolist())
    assert now.shape == (18, anatomy.per_token)
    small, shape = assemble(anatomy, masks)
    assert shape.layers[first].experts == 6 - anatomy.per_token
    assert_same(logits(small, TOKENS), masked)


def test_removed_experts_lose_before_the_softmax(tiny_model) -> None:
    """Mixtral by hand: scores of removed experts at -inf, then softmax, top 2, shares of 1."""
    anatomy = Anatomy(tiny_model("mixtral"))
    mixture = anatomy.mixture(1)
    hidden = torch.randn(50, 32, generator=torch.Generator().manual_seed(3))
    masks = Masks.open(layout_of(anatomy), ["experts"])
    masks.part("experts", 1)[torch.tensor([0, 3])] = 0
    with MaskHooks(anatomy).using(masks), torch.no_grad():
        scores, weights, index = mixture.router(hidden)
        expected = hidden @ mixture.router.weight.T
    expected[:, [0, 3]] = -torch.inf
    torch.testing.assert_close(scores, expected)
    best = expected.softmax(-1).topk(2)
    assert torch.equal(index, best.indices)
    torch.testing.assert_close(weights, best.values / best.values.sum(-1, keepdim=True))


@each_mixture
def test_padding_changes_nothing(model_type: str, tiny_model) -> None:
    # Llama 4 takes padding for positions where it tunes its attention by them.
    changes = {"attn_temperature_tuning": False} if model_type == "llama4_text" else {}
    model = tiny_model(model_type, **changes)
    anatomy = Anatomy(model)
    masks, _ = soft_masks(make_allocator(anatomy, settings("experts", "free")), 0.5)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), TOKENS], 1)
    seen = (padded > 0).long()
    small, _ = assemble(anatomy, masks)
    with torch.no_grad():
        ours = small(input_ids=padded, attention_mask=seen, use_cache=False).logits[:, 3:]
    assert_same(ours, logits(small, TOKENS))


@each_mixture
def test_each_sequence_can_have_masks_of_its_own(model_type: str, tiny_model) -> None:
    """Soft ones: an expert goes only where it is at 0 for all."""
    model = tiny_model(model_type)
    layout, hooks = layout_of(Anatomy(model)), MaskHooks(Anatomy(model))
    random = torch.Generator().manual_seed(2)
    values = {
        kind: 0.5 + torch.rand(2, layout.units(kind), generator=random)
        for kind in ("experts", "expert_neurons")
    }
    with hooks.using(Masks(layout, values)):
        together = logits(model, TOKENS)
    for i, row in enumerate(TOKENS):
        with hooks.using(Masks(layout, {k: v[i] for k, v in values.items()})):
            alone = logits(model, row[None])[0]
        torch.testing.assert_close(together[i], alone, atol=5e-5, rtol=1e-5)
    assert not torch.allclose(together, logits(model, TOKENS), atol=0.01)


@each_mixture
def test_the_student_computes_what_is_masked_with_checkpointing_or_without(
    model_type: str, tiny_model
) -> None:
    """LoRA's gradients too."""
    grads, outputs = [], []
    for checkpointing in (False, True):
        model = tiny_model(model_type).requires_grad_(False)
        adapted = with_random_lora(model).train()
        lora = {n: p for n, p in adapted.named_parameters() if "lora_" in n}
        if checkpointing:
            adapted.enable_input_require_grads()
            model.activation_checkpointing_enable({"use_reentrant": False})
        anatomy = Anatomy(adapted)
        masks, _ = soft_masks(
            make_allocator(anatomy, settings("experts,expert_neurons", "free")), 0.5
        )
        with MaskHooks(anatomy).using(NarrowMasks(masks, anatomy.family)):
            output = adapted(input_ids=TOKENS, use_cache=False).logits
            output.square().mean().backward()
        outputs.append(output.detach())
        grads.append({n: p.grad for n, p in lora.items()})
    assert_same(outputs[0], outputs[1])
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-6)
    assert max(float(x.abs().max()) for x in grads[0].values()) > 1e-3


def with_random_lora(model: PreTrainedModel) -> PeftModel:
    torch.manual_seed(0)
    adapted = add_lora(Anatomy(model), r=2)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return adapted


@each_mixture
def test_lora_is_on_all_that_is_no_stack(model_type: str, tiny_model) -> None:
    """But on what mixers write by, and on the gate of one row that weighs a shared expert."""
    model = tiny_model(model_type)
    without = ("shared_expert_gate", "linear_attn.out_proj")
    expected = {
        name
        for name, module in model.model.layers.named_modules()
        if (isinstance(module, torch.nn.Linear) or "Router" in type(module).__name__)
        and not name.endswith(without)
    }
    adapted = add_lora(Anatomy(model), r=2, lora_dropout=0.5)
    names = [n for n, p in adapted.named_parameters() if p.requires_grad]
    assert {n.partition("layers.")[2].partition(".lora_")[0] for n in names} == expected
    assert all(".lora_" in n for n in names)


@each_mixture
def test_what_lora_learned_is_cut_with_its_experts(model_type: str, tiny_model) -> None:
    """Rows of routers too; the teacher has nothing of it."""
    model = tiny_model(model_type).requires_grad_(False)
    stock = logits(model, TOKENS)
    adapted = with_random_lora(model)
    anatomy = Anatomy(adapted)
    bank, hooks = LoraBank(anatomy), MaskHooks(anatomy)
    with ExitStack() as stack:
        for layer in range(3):
            stack.enter_context(bank.as_dense(layer))
        assert torch.equal(logits(anatomy.model, TOKENS), stock)
    refusal = anatomy.family.refusal
    kinds = ",".join(x for x in GATE_KINDS if not refusal(x) and "block" not in x)
    masks, _ = soft_masks(make_allocator(anatomy, settings(kinds, "free")), 0.5)
    with hooks.using(NarrowMasks(masks, anatomy.family)):
        masked = logits(adapted, TOKENS)
        first = next(i for i in range(3) if anatomy.mixture(i))
        anatomy.lora_layers(first)[anatomy.family.experts.router].enable_adapters(False)
        assert not torch.allclose(logits(adapted, TOKENS), masked, atol=0.01)
    hooks.remove()
    learned, base = bank.learned(), Anatomy(adapted.unload())
    for layer in range(3):
        merge_layer(base, layer, learned, torch.float32)
    assert not learned
    small, shape = assemble(base, masks)
    assert min(x.experts for x in shape.layers if x.experts) < 6
    assert_same(logits(small, TOKENS), masked)


def test_what_recovery_learned_is_merged_into_routers_too(tiny_model) -> None:
    adapted = with_random_lora(tiny_model("qwen2_moe").requires_grad_(False))
    expected, stock = logits(adapted, TOKENS), tiny_model("qwen2_moe")
    learned, merged = LoraBank(Anatomy(adapted)).learned(), adapted.unload()
    for layer in range(3):
        merge_layer(Anatomy(merged), layer, learned, torch.float32)
    assert_same(logits(merged, TOKENS), expected)
    routers = [x for x, _ in stock.named_parameters() if x.endswith("mlp.gate.weight")]
    assert routers
    assert not any(torch.equal(merged.get_parameter(x), stock.get_parameter(x)) for x in routers)


@pytest.mark.parametrize(
    "model_type",
    [pytest.param(x, marks=() if x == "mixtral" else pytest.mark.hard) for x in MIXTURES],
)
def test_a_free_mixture_loads_as_remote_code(model_type: str, tiny_model, tmp_path: Path) -> None:
    anatomy = Anatomy(tiny_model(model_type))
    taken = [x for x in GATE_KINDS if not FAMILIES[model_type].refusal(x)]
    masks, _ = soft_masks(make_allocator(anatomy, settings(",".join(taken), "free")), 0.4)
    small, shape = assemble(anatomy, masks)
    assert not shape.uniform
    save(small, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert_same(logits(loaded, TOKENS), logits(small, TOKENS))
    assert type(loaded).__module__.startswith("transformers_modules.")
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(logits(again, TOKENS), logits(loaded, TOKENS))


@pytest.mark.parametrize("model_type", ["gpt_oss", "mixtral"])
def test_a_mixture_without_an_mlp_takes_any_number_of_sequences(
    model_type: str, tiny_model
) -> None:
    anatomy = Anatomy(tiny_model(model_type))
    allocator = make_allocator(anatomy, settings("mlp_block", "free"))
    kept = allocator.budget.shape.cut_to({"layers": [{}, {"mlp": False}, {}]})
    masks = allocator.masks(kept, allocator.equal_scores())
    tokens = torch.randint(3, 90, (3, 9), generator=torch.Generator().manual_seed(1))
    with (hooks := MaskHooks(anatomy)).using(masks):
        masked = logits(anatomy.model, tokens)
    hooks.remove()
    small, _ = assemble(anatomy, masks)
    for rows in (1, 2, 3):  # a pair of sequences could be taken for a pair of outputs
        assert_same(logits(small, tokens[:rows]), masked[:rows])


def test_a_mixture_can_be_pruned_again(tiny_model) -> None:
    first = Anatomy(tiny_model("gpt_oss"))
    masks, _ = soft_masks(make_allocator(first, settings("experts", "free")), 0.4)
    again = Anatomy(assemble(first, masks)[0])
    allocator = make_allocator(again, settings("experts,expert_neurons", "free"))
    masks, _ = soft_masks(allocator, 0.5)
    with (hooks := MaskHooks(again)).using(masks):
        masked = logits(again.model, TOKENS)
    hooks.remove()
    smaller, shape = assemble(again, masks)
    assert_same(logits(smaller, TOKENS), masked)
    assert allocator.budget.parameters(shape) < allocator.budget.before


@each_mixture
def test_active_parameters_are_those_of_the_experts_of_a_token(model_type: str, tiny_model) -> None:
    """As many as a model has that holds no more experts than a token goes through."""
    anatomy = Anatomy(tiny_model(model_type))
    budget = Budget.of(anatomy)
    fewer = {budget.family.config_names["experts"]: anatomy.per_token}
    few = Budget.of(Anatomy(tiny_model(model_type, **fewer)))
    assert budget.before - budget.idle(budget.shape) == few.before < budget.before


@each_mixture
def test_parameters_are_counted_with_the_rows_of_routers(model_type: str, tiny_model) -> None:
    dense = Anatomy(tiny_model(model_type))
    wanted = ("kv_groups", "experts", "expert_neurons")
    args = settings(",".join(x for x in wanted if not dense.family.refusal(x)), "free")
    priced = Prices.of(dense, torch.float32, args)
    masks, _ = soft_masks(make_allocator(dense, args), 0.5)
    assert priced.params.total(dense.shape) == dense.parameters()
    small, shape = assemble(dense, masks)
    assert priced.params.total(shape) == sum(p.numel() for p in small.parameters())
    found = priced.of_a_token(shape)
    assert found["active_after"] == sum(p.numel() for p in small.parameters()) - sum(
        p.numel() // len(p) * (len(p) - dense.per_token)
        for name, p in small.named_parameters()
        if ".experts." in name
    )


def test_latent_attention_is_priced_by_what_it_caches(tiny_model) -> None:
    anatomy = Anatomy(tiny_model("deepseek_v3"))
    args = NutePruneConfig(output_dir="unused", gates="experts", target_memory="1GiB@2x9")
    prices = Prices.of(anatomy, torch.float32, args)
    kept = cache_of(anatomy.model, TOKENS).layers
    held = sum(x.keys.nbytes + x.values.nbytes for x in kept)
    assert prices.cache(anatomy.shape) == held


def test_active_parameters_can_be_asked_for(tiny_model) -> None:
    anatomy = Anatomy(tiny_model("mixtral"))
    args = NutePruneConfig(
        output_dir="unused", gates="expert_neurons", target_active_params=26_000, neuron_multiple=8
    )
    priced, allocator = Prices.of(anatomy, torch.float32, args), make_allocator(anatomy, args)
    (target,) = run_targets(allocator, args, priced)
    shape = allocator.shape(allocator.chance_scores(), target.goal)
    assert 22_000 < priced.of_a_token(shape)["active_after"] <= 26_000
    few = NutePruneConfig(output_dir="unused", gates="experts", target_active_params=20_000)
    with pytest.raises(UserError, match=r"leave at least .* a token goes through"):
        run_targets(make_allocator(anatomy, few), few, priced)


@pytest.mark.parametrize("gates", ["experts", "experts,expert_neurons", "kv_groups"])
@pytest.mark.parametrize("kind", ["params", "size"])
def test_what_an_error_says_can_be_reached_can_be_asked_for(
    kind: str, gates: str, tiny_model
) -> None:
    anatomy = Anatomy(tiny_model("mixtral"))

    def ask(value: str) -> None:
        args = NutePruneConfig(output_dir="unused", gates=gates, **{f"target_{kind}": value})
        run_targets(make_allocator(anatomy, args), args, Prices.of(anatomy, torch.float32, args))

    with pytest.raises(UserError, match="out of reach") as error:
        ask("1k" if kind == "params" else "1kB")
    least, *others = re.findall(r"at least ([\d.]+) ?(kB?)", str(error.value))
    assert all(len(number.replace(".", "")) >= 3 for number, _ in (least, *others))
    ask("".join(least))
    with pytest.raises(UserError, match="out of reach"):
        ask(f"{0.99 * float(least[0])}{least[1]}")


@pytest.mark.parametrize(
    ("model_type", "asked", "words"),
    [
        ("llama", {"gates": "experts"}, "no mixture of experts; use --gates neurons"),
        ("mixtral", {"gates": "neurons"}, "those of experts; use --gates expert_neurons"),
        ("mixtral", {"shape": {"experts": 1}}, "1 experts, and each token is routed to 2: keep"),
        ("mixtral", {"shape": {"experts": 0}}, "0 experts of 24 neurons; to remove all"),
        ("mixtral", {"gates": "expert_neurons", "neuron_multiple": 4}, "experts of 4 cannot be mu"),
        ("mixtral", {"gates": "hidden", "hidden_multiple": 12}, "and counts as multiples of 8"),
        ("mixtral", {"target_speedup": 1.5}, "not of a mixture of experts: use --sparsity"),
        ("mixtral", {"gates": "experts,heads", "method": "reap"}, "reap cannot score gates on he"),
        ("deepseek_v3", {"gates": "experts"}, "among 2 groups of experts first, which would have"),
        ("deepseek_v3", {"gates": "heads"}, "latents that heads share"),
    ],
)
def test_what_a_mixture_cannot_take_is_refused_in_a_line(
    model_type: str, asked: dict, words: str, tiny_model
) -> None:
    grouped = {"n_group": 2} if model_type == "deepseek_v3" else {}
    with pytest.raises(UserError, match=words):
        make_allocator(
            Anatomy(tiny_model(model_type, **grouped)),
            NutePruneConfig(output_dir="unused", **asked),
        )


@pytest.mark.slow(0.3)
@pytest.mark.parametrize("shapes", ["free", "uniform"])
def test_experts_in_groups_stay_whole_and_can_be_thinned(
    shapes: str, tiny_model, tmp_path: Path
) -> None:
    """Where queries come from no latent, too."""

    def grouped(model_type: str) -> PreTrainedModel:
        changes = {"n_group": 3, "topk_group": 2, "q_lora_rank": None}
        return tiny_model(model_type, **changes)

    kinds = "hidden" if shapes == "uniform" else "expert_neurons,hidden"
    check("deepseek_v3", kinds, shapes, grouped, tmp_path)
    usual = make_allocator(
        Anatomy(grouped("deepseek_v3")), NutePruneConfig(output_dir="unused", shapes="free")
    )
    assert usual.constraints.kinds == ("expert_neurons",)


def test_onnx_and_tables_of_costs_are_refused(tiny_model) -> None:
    (reason,) = obstacles(FAMILIES["mixtral"], tiny_model("mixtral").config)
    assert "mixtral routes tokens to experts, and a graph would keep" in reason
    with pytest.raises(UserError, match="cannot be timed by count: it routes to experts; ask for"):
        cost_table(tiny_model("mixtral"), Workload(1, 8, 2), "cpu", torch.float32)


def test_quantised_experts_are_refused(tiny_model) -> None:
    model = tiny_model("mixtral")
    model.is_quantized = True
    with pytest.raises(UserError, match="stacked experts are not cut in that form: leave out"):
        make_allocator(Anatomy(model), NutePruneConfig(output_dir="unused"))

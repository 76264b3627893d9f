"""Each method beside a second, naive implementation: weights and activations unit by unit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nuteprune.errors import UserError
from nuteprune.export.checkpoint import assemble
from nuteprune.gates import METHOD, METHOD_NAMES
from nuteprune.gates.allocate import Allocator
from nuteprune.gates.allowed_shapes import Constraints
from nuteprune.gates.budget import Budget, unit_parameters
from nuteprune.gates.importance import METHODS, check_scorable
from nuteprune.gates.masks import Masks
from nuteprune.gates.scores import Probe, losses_of
from nuteprune.gates.surgeon import (
    LIKELIEST,
    SOFTER,
    TEMPERATURE,
    draw_tokens,
    surgeon_scores,
)
from nuteprune.gates.surgeon_costs import (
    ROUNDS,
    inverse_of_correlations,
    removal_costs,
    removals,
)
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.hooks import MaskHooks
from nuteprune.model.shape import LayerShape, Shape

TOKENS = torch.randint(3, 96, (3, 8), generator=torch.Generator().manual_seed(0))
BATCHES = [TOKENS[:2], TOKENS[2:]]
INPUTS = ("kv_groups", "heads", "neurons")
ALL = (*INPUTS, "hidden", "attn_block", "mlp_block")


def probe(model: Any, kinds: tuple[str, ...], **settings: Any) -> Probe:
    anatomy = Anatomy(model.requires_grad_(False))
    budget = Budget.of(anatomy)
    return Probe(anatomy, MaskHooks(anatomy), budget, kinds, BATCHES, BATCHES, **settings)


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert set(ours) == set(theirs)
    for kind, expected in theirs.items():
        assert expected.max() > 0, kind
        limit = 1e-4 * float(expected.abs().max())
        torch.testing.assert_close(ours[kind], expected.float(), rtol=1e-4, atol=limit)


def llama_inputs(model: Any) -> list[tuple[Tensor, Tensor]]:
    """(input of o_proj, input of down_proj) of each layer, for all tokens, batch after batch."""
    seen: dict[tuple[int, str], list[Tensor]] = {}
    handles = []
    for i, layer in enumerate(model.model.layers):
        for name, module in (("o", layer.self_attn.o_proj), ("down", layer.mlp.down_proj)):
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, key=(i, name): seen.setdefault(key, []).append(args[0])
                )
            )
    with torch.no_grad():
        for row in TOKENS:
            model(row[None], use_cache=False)
    for handle in handles:
        handle.remove()
    flat = {key: torch.cat([x.reshape(-1, x.shape[-1]) for x in xs]) for key, xs in seen.items()}
    return [(flat[i, "o"], flat[i, "down"]) for i in range(len(model.model.layers))]


def by_rank(rows: list[list[float]]) -> Tensor:
    """(place + 1/2) / count of each entry among those of its row; ties in their order."""
    places = []
    for row in rows:
        pairs = sorted((x, i) for i, x in enumerate(row))
        places += [(pairs.index((x, i)) + 0.5) / len(row) for i, x in enumerate(row)]
    return torch.tensor(places)


def units_of(values: Tensor, kind: str) -> list[Tensor]:
    """The columns of the tiny llama's projection that each unit feeds: 4 heads of 8, 2 groups."""
    width = {"heads": 8, "kv_groups": 16, "neurons": 1}[kind]
    return [values[i : i + width] for i in range(0, len(values), width)]


def expected_losses(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """(score - lowest of all) x parameters, counted by hand for the tiny llama."""
    # q and o rows of 8 per head, k and v of 8 per group, gate, up and down per neuron; width 32
    size = {"heads": 2 * 8 * 32, "kv_groups": (4 + 2) * 8 * 32, "neurons": 3 * 32}
    size |= {"attn_block": 12 * 8 * 32, "mlp_block": 3 * 48 * 32}
    size |= {"hidden": 3 * (12 * 8 + 3 * 48)}
    lowest = min(float(x.min()) for x in scores.values())
    return {kind: (x - lowest) * size[kind] for kind, x in scores.items()}


def test_fisher_and_taylor_are_means_over_gradients_of_one_sequence_at_a_time(
    tiny_model, tiny_name: str
) -> None:
    model = tiny_model(tiny_name)
    kinds = ("kv_groups", "heads", "neurons", "hidden")
    ticks: list[int] = []
    it = probe(model, kinds, progress=lambda: ticks.append(1))
    fisher = METHODS["fisher"].score(it)
    assert len(ticks) == 2

    squares, sizes = ({k: torch.zeros(it.layout.units(k)) for k in kinds} for _ in range(2))
    for row in TOKENS:
        ones = {kind: torch.ones(it.layout.units(kind), requires_grad=True) for kind in kinds}
        with it.hooks.using(Masks(it.layout, ones)):
            logits = model(input_ids=row[None], use_cache=False).logits[0]
        torch.nn.functional.cross_entropy(logits[:-1], row[1:]).backward()
        for kind, leaf in ones.items():
            squares[kind] += leaf.grad.square() / len(TOKENS)
            sizes[kind] += leaf.grad.abs() / len(TOKENS)
    close(fisher, squares)
    assert it.hooks.masks is None

    taylor = METHODS["taylor"].score(it)
    placed = {}
    for kind, value in sizes.items():
        placed[kind] = by_rank([value.tolist()])
    lowest = min(float(x.min()) for x in placed.values())
    close(taylor, {k: (v - lowest) * unit_parameters(it.budget, k) for k, v in placed.items()})


def test_the_names_of_the_methods_are_those_of_the_list() -> None:
    assert tuple(METHODS) == METHOD_NAMES
    assert METHOD in METHODS


def test_wanda_is_weights_times_norms_of_inputs(tiny_model) -> None:
    model = tiny_model("llama")
    ours = METHODS["wanda"].score(probe(model, INPUTS))
    scores: dict[str, list[list[float]]] = {kind: [] for kind in INPUTS}
    for layer, inputs in zip(model.model.layers, llama_inputs(model), strict=True):
        for kind in INPUTS:
            x, weight = inputs[kind == "neurons"], layer.self_attn.o_proj.weight
            weight = layer.mlp.down_proj.weight if kind == "neurons" else weight
            metric = torch.zeros(weight.shape[1])
            for j in range(weight.shape[1]):
                for i in range(weight.shape[0]):
                    metric[j] += abs(float(weight[i, j])) * float(x[:, j].norm())
            scores[kind].append([float(unit.sum()) for unit in units_of(metric, kind)])
    close(ours, expected_losses({kind: by_rank(rows) for kind, rows in scores.items()}))


def test_flap_is_standardised_variance_times_weights_squared_in_attention(tiny_model) -> None:
    model = tiny_model("llama")
    ours = METHODS["flap"].score(probe(model, INPUTS))
    scores: dict[str, list[Tensor]] = {kind: [] for kind in INPUTS}
    for layer, inputs in zip(model.model.layers, llama_inputs(model), strict=True):
        for kind in INPUTS:
            linear = layer.mlp.down_proj if kind == "neurons" else layer.self_attn.o_proj
            x = inputs[kind == "neurons"]
            metric = x.double().var(0, unbiased=False) * linear.weight.double().norm(dim=0) ** 2
            metric = metric if kind == "neurons" else metric**2
            metric = (metric - metric.mean()) / metric.std()
            scores[kind] += [unit.mean() for unit in units_of(metric, kind)]
    close(ours, expected_losses({kind: torch.stack(x) for kind, x in scores.items()}))


def test_similarity_is_the_turn_of_the_residual_stream(tiny_model, tiny_name: str) -> None:
    model = tiny_model(tiny_name)  # granite scales what its blocks add
    blocks = ("attn_block", "mlp_block")
    it = probe(model, blocks)
    ours = METHODS["similarity"].score(it)

    scores = {kind: torch.zeros(3) for kind in blocks}
    for i, layer in enumerate(it.anatomy.layers):
        seen: list[Any] = []
        handles = [
            layer.register_forward_pre_hook(
                lambda _, args, kwargs, seen=seen: seen.append((args, kwargs)), with_kwargs=True
            )
        ]
        with torch.no_grad():
            model(TOKENS, use_cache=False)
            handles[0].remove()
            (args, kwargs) = seen[0]

            def stream(
                attention: float, mlp: float, i: int = i, args: Any = args, kwargs: Any = kwargs
            ) -> Tensor:
                gates = {"attn_block": torch.ones(3), "mlp_block": torch.ones(3)}
                gates["attn_block"][i], gates["mlp_block"][i] = attention, mlp
                with it.hooks.using(Masks(it.layout, gates)):
                    out = it.anatomy.layers[i](*args, **kwargs)
                return (out[0] if isinstance(out, tuple) else out).double()

            before, between, after = stream(0, 0), stream(1, 0), stream(1, 1)
            torch.testing.assert_close(before, args[0].double())
        for kind, a, b in (("attn_block", before, between), ("mlp_block", between, after)):
            cosine = (a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)
            scores[kind][i] = float((1 - cosine).mean())
    lowest = min(float(x.min()) for x in scores.values())
    close(ours, {k: (v - lowest) * unit_parameters(it.budget, k) for k, v in scores.items()})


def test_random_depends_on_the_seed_alone_and_spares_no_part(tiny_model) -> None:
    model = tiny_model("llama")
    score = METHODS["random"].score
    first, again, other = (score(probe(model, INPUTS, seed=s)) for s in (1, 1, 2))
    assert all(torch.equal(first[k], again[k]) for k in INPUTS)
    assert not torch.equal(first["neurons"], other["neurons"])
    means = [first[k].mean() / unit_parameters(probe(model, INPUTS).budget, k)[0] for k in INPUTS]
    assert all(0.25 < mean < 0.75 for mean in means)


def test_unit_parameters_are_what_cutting_one_unit_saves(tiny_model, tiny_name: str) -> None:
    anatomy = Anatomy(tiny_model(tiny_name))
    budget, shape = Budget.of(anatomy), anatomy.shape
    old = shape.layers[1]
    inner = old.heads_per_group
    fewer = {
        "neurons": replace(old, neurons=old.neurons - 1),
        "kv_groups": replace(old, heads=old.heads - inner, kv_heads=old.kv_heads - 1),
        "attn_block": LayerShape(0, 0, old.neurons),
        "mlp_block": replace(old, neurons=0),
    }
    # One head of every group goes, or under plain attention a head with its keys and values.
    cut = (old.kv_heads, old.kv_heads) if inner > 1 else (1, old.kv_heads - 1)
    fewer["heads"] = replace(old, heads=old.heads - cut[0], kv_heads=cut[1])
    for kind, layer in fewer.items():
        saved = budget.before - budget.parameters(
            Shape(shape.hidden, (shape.layers[0], layer, shape.layers[2]))
        )
        sizes = unit_parameters(budget, kind)
        count = old.kv_heads if kind == "heads" and inner > 1 else 1
        assert float(sizes[len(sizes) // 2]) * count == saved, kind
    assert unit_parameters(budget, "hidden")[0] == budget.before - budget.parameters(
        Shape(shape.hidden - 1, shape.layers)
    )


def test_the_allocator_follows_a_ranking_whatever_the_size_of_units(tiny_model) -> None:
    """All neurons of low rank go before any group of higher rank, though a group is much larger."""
    budget = Budget.of(Anatomy(tiny_model("llama")))
    allocator = Allocator(budget, Constraints(("kv_groups", "neurons"), neuron_multiple=4))
    groups = torch.tensor([0.9, 0.8] * 3)
    neurons = torch.linspace(0, 0.7, 3 * 48)
    scores = losses_of(budget, {"kv_groups": groups, "neurons": neurons})
    shape = allocator.shape(scores, 0.4)
    assert all(layer.kv_heads == 2 for layer in shape.layers)
    lowest = losses_of(budget, {"kv_groups": groups - 0.8, "neurons": neurons + 0.05})
    assert any(layer.kv_heads == 1 for layer in allocator.shape(lowest, 0.4).layers)


def test_a_method_that_ranks_in_a_layer_takes_the_same_share_from_each(tiny_model) -> None:
    it = probe(tiny_model("llama"), ("neurons",))
    allocator = Allocator(it.budget, Constraints(("neurons",), neuron_multiple=4))
    shape = allocator.shape(METHODS["wanda"].score(it), 0.3)
    shares = [layer.neurons for layer in shape.layers]
    assert max(shares) - min(shares) <= 4
    assert min(shares) < 48


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("similarity", "neurons", "whole blocks; use --gates attn_block,mlp_block"),
        ("wanda", "hidden", "inputs of the output and down projections; use --gates heads"),
        ("flap", "attn_block", "use --gates heads,kv_groups,neurons"),
    ],
)
def test_kinds_that_a_method_cannot_score_are_refused(name: str, kind: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_scorable(name, (kind,))


OF_DENSE = [x for x in METHODS if METHODS[x].kinds != ("experts",)]


@pytest.mark.parametrize("name", OF_DENSE)
def test_scores_are_losses_that_the_allocator_takes(
    name: str, tiny_model: Callable[..., Any], tiny_name: str
) -> None:
    kinds = METHODS[name].default_kinds or ("heads", "neurons")
    it = probe(tiny_model(tiny_name), kinds)
    scores = METHODS[name].score(it)
    for kind in kinds:
        assert scores[kind].shape == (it.layout.units(kind),)
        assert (scores[kind] >= 0).all()
        assert torch.isfinite(scores[kind]).all()
    allocator = Allocator(it.budget, Constraints(kinds, neuron_multiple=4))
    assert it.budget.sparsity(allocator.shape(scores, 0.2)) >= 0.2


@pytest.mark.parametrize("name", OF_DENSE)
def test_a_model_that_has_lost_blocks_is_scored_like_any_other(name: str, tiny_model) -> None:
    whole = Anatomy(tiny_model("llama"))
    kinds = ("attn_block", "mlp_block")
    allocator = Allocator(Budget.of(whole), Constraints(kinds))
    rows = [{}, {"attention": False}, {"mlp": False}]
    masks = allocator.masks(whole.shape.cut_to({"layers": rows}), allocator.equal_scores())
    small, _ = assemble(whole, masks)
    it = probe(small, METHODS[name].default_kinds or ("kv_groups", "neurons"))
    scores = METHODS[name].score(it)
    assert {k: len(v) for k, v in scores.items()} == {k: it.layout.units(k) for k in it.kinds}
    assert all(bool(v.isfinite().all()) for v in scores.values())


def least_rise(v_OI: Tensor, c_II: Tensor, gone: Tensor) -> float:
    """tr(E C E^T) of the best change E of V that leaves nothing of some columns, by `lstsq`."""
    kept = c_II.diagonal() > 1e-20  # inputs that are always 0 (a ReLU's) cost nothing
    kept[gone] = False
    root_II = torch.linalg.cholesky(c_II)
    lost_IO = (v_OI[:, gone] @ root_II[gone]).T
    change_OI = torch.zeros_like(v_OI)
    change_OI[:, gone] = -v_OI[:, gone]
    change_OI[:, kept] = torch.linalg.lstsq(root_II[kept].T, lost_IO).solution.T
    return float(torch.trace(change_OI @ c_II @ change_OI.T))


def test_surgeon_takes_first_what_costs_least(tiny_model, tiny_name: str) -> None:
    """Against least squares: the other columns of the weight are moved by `lstsq`."""
    model = tiny_model(tiny_name)
    it = probe(model, INPUTS)
    ours = surgeon_scores(it)
    lasts = {"heads": Anatomy(model).family.attention[-1], "neurons": Anatomy(model).family.mlp[-1]}
    linears: dict[tuple[str, int], Any] = {}
    for kind in INPUTS:
        last = lasts["neurons" if kind == "neurons" else "heads"]
        found = {
            (kind, i): Anatomy(model).linear(i, last) for i in range(len(it.layout.sizes[kind]))
        }
        linears |= {key: x for key, x in found.items() if x is not None}  # else of another kind
    read = {linear: inputs_and_slopes(model, linear) for linear in set(linears.values())}
    changes = {
        linear: (d @ linear.weight.double() * x).view(len(TOKENS), -1, x.shape[-1])
        for linear, (x, d) in read.items()
    }
    square: Any = sum(x.square().sum(-1) for x in changes.values())
    softer = square ** (SOFTER / 2 - 1)
    softer *= square.sum() / (square * softer).sum()
    for kind in INPUTS:
        parts = dict(enumerate(ours[kind].split(it.layout.sizes[kind])))
        for i, costs_U in parts.items():
            linear = linears.get((kind, i))
            if linear is None:
                continue
            x, weight = read[linear][0], linear.weight.double()
            divided = x
            if Anatomy(model).post_norm(i, "mlp_block" if kind == "neurons" else "attn_block"):
                divided = x / (x @ weight.T).square().mean(-1, keepdim=True).sqrt()
            c = divided.T @ divided / len(x)
            change = changes[linear] * softer.sqrt()[:, :, None]
            alone, together = change.square().sum((0, 1)), change.sum(1).square().sum(0)
            ratio = together / alone
            slopes = alone / len(TOKENS) / c.diagonal() * ratio[ratio.isfinite()].median()
            slopes[~slopes.isfinite()] = 0
            c += torch.diag(0.01 * c.diagonal() + 1e-30)
            v = weight / weight.norm(dim=0) * slopes.sqrt()
            units = torch.arange(len(c)).view(len(costs_U), -1)
            alone = torch.tensor([least_rise(v, c, unit) for unit in units])
            first = alone.argsort()[: -(-len(units) // ROUNDS)]
            together = least_rise(v, c, units[first].flatten())
            assert float(costs_U[first].sum()) == pytest.approx(together, rel=1e-3, abs=1e-12)
            assert float(costs_U.sort()[0][: len(first)].sum()) == pytest.approx(
                together, rel=1e-3, abs=1e-12
            )


@pytest.mark.parametrize(("count", "width"), [(8, 1), (6, 3), (60, 1)])
def test_each_unit_that_goes_leaves_the_others_dearer(count: int, width: int) -> None:
    """Each round takes what costs least beyond what is gone, against `lstsq` on all that is."""
    random = torch.Generator().manual_seed(count)
    inputs = count * width
    x = torch.randn(200, inputs, generator=random, dtype=torch.float64)
    x[:, : inputs // 2] += x[:, -1:] + x[:, -2:-1]
    c = x.T @ x / len(x)
    v = torch.randn(5, inputs, generator=random, dtype=torch.float64)
    units, gone = torch.arange(inputs).view(count, width), torch.tensor([], dtype=torch.long)
    before, left = 0.0, set(range(count))
    for round_, costs in removals(v, torch.linalg.inv(c), count):
        alone = {u: least_rise(v, c, torch.cat([gone, units[u]])) - before for u in left}
        cheapest = sorted(left, key=lambda u: alone[u])[: len(round_)]
        assert round_.tolist() == cheapest
        gone = torch.cat([gone, units[round_].flatten()])
        after, left = least_rise(v, c, gone), left - set(cheapest)
        assert float(costs.sum()) == pytest.approx(after - before, rel=1e-6)
        shares = torch.tensor([alone[u] for u in cheapest], dtype=torch.float64)
        torch.testing.assert_close(costs / costs.sum(), shares / shares.sum())
        before = after
    assert not left
    assert before == pytest.approx(float(torch.trace(v @ c @ v.T)))


def test_of_two_units_that_do_the_same_one_is_free() -> None:
    x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    x[:, 1] = x[:, 0]
    weight, lengths = torch.tensor([[1.0, 1.0, 0.6]]), torch.tensor([1.0, 1.0, 0.6])
    (costs,) = removal_costs(weight, lengths, x.T @ x / len(x), [3])
    twins, other = costs[:2].sort()[0], costs[2]
    assert twins[0] < 0.05 * other
    # The other of the two does the work of both, twice the weight: it goes last.
    assert other < twins[1]
    assert twins[1] == pytest.approx(4, rel=0.3)


@pytest.mark.parametrize("spread", [1.0, 1e5])
def test_correlations_are_inverted_as_exactly_as_they_are(spread: float) -> None:
    """In fp32 where that will do, else in fp64; against an inverse by singular values."""
    random = torch.Generator().manual_seed(0)
    rows_MI = torch.randn(60, 40, generator=random)
    rows_MI[:, 1:] += spread * rows_MI[:, :1]
    covariance_II = (rows_MI.double().T @ rows_MI.double()).fill_diagonal_(0)
    size_I = rows_MI.double().square().sum(0).sqrt()
    correlation_II = (covariance_II / size_I / size_I[:, None]).fill_diagonal_(1 + 1e-5).float()
    found_II = inverse_of_correlations(correlation_II)
    assert found_II.dtype == (torch.float32 if spread == 1 else torch.float64)
    expected_II = torch.linalg.pinv(correlation_II.double(), rtol=0)
    torch.testing.assert_close(
        found_II.diag(), expected_II.diag(), rtol=1e-3, atol=0, check_dtype=False
    )


def test_the_surgeon_takes_the_first_layer_s_attention_last(tiny_model) -> None:
    it = probe(tiny_model("llama"), ("kv_groups", "heads", "neurons"))
    plain, ours = surgeon_scores(it), METHODS["surgeon"].score(it)
    for kind in ("kv_groups", "heads"):
        size = it.layout.sizes[kind][0]
        first, rest = ours[kind][:size], ours[kind][size:]
        # All of them above the rest, and in their own order still.
        torch.testing.assert_close(rest, plain[kind][size:], rtol=0, atol=0)
        torch.testing.assert_close(first, plain[kind][:size] + rest.max(), rtol=0, atol=0)


def test_a_model_of_one_layer_keeps_the_surgeon_s_scores(tiny_model) -> None:
    it = probe(tiny_model("llama", num_hidden_layers=1), ("kv_groups", "neurons"))
    scores = METHODS["surgeon"].score(it)
    close(scores, surgeon_scores(it))


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0], [2.0, 0.0, 0.0]]).expand(4000, 2, 3)
    chances, ids = logits.softmax(-1), torch.arange(3).expand_as(logits)
    drawn = draw_tokens(chances, ids, torch.Generator().manual_seed(0))
    assert drawn.shape == (4000, 2)
    found = torch.stack([(drawn == token).float().mean(0) for token in range(3)], -1)
    torch.testing.assert_close(found, logits[0].softmax(-1), rtol=0, atol=0.03)


def test_the_order_of_tokens_does_not_change_which_are_drawn() -> None:
    random = torch.Generator().manual_seed(0)
    chances = torch.rand(2, 50, 7, generator=random)
    ids, order = torch.randint(0, 40000, (2, 50, 7), generator=random), torch.randperm(7)
    drawn = draw_tokens(chances, ids, torch.Generator().manual_seed(1))
    again = draw_tokens(chances[..., order], ids[..., order], torch.Generator().manual_seed(1))
    assert torch.equal(
        ids.gather(-1, drawn.unsqueeze(-1)), ids[..., order].gather(-1, again.unsqueeze(-1))
    )


def inputs_and_slopes(model: Any, linear: Any) -> tuple[Tensor, Tensor]:
    """What a projection reads, and the gradients by what it writes of tokens drawn by sequence."""
    generator = torch.Generator().manual_seed(0)
    likely = [model(x, use_cache=False).logits.detach().topk(LIKELIEST) for x in BATCHES]
    numbers = [
        draw_tokens((x.values / TEMPERATURE).softmax(-1), x.indices, generator) for x in likely
    ]
    drawn = torch.cat(numbers)
    tokens = torch.cat([x.indices for x in likely])
    seen: dict[str, list[Tensor]] = {"x": [], "d": []}

    def hook(_: Any, args: Any, output: Tensor) -> None:
        seen["x"].append(args[0].detach().double().flatten(0, -2))
        output.requires_grad_(True).register_hook(
            lambda grad: seen["d"].append(grad.double().flatten(0, -2))
        )

    handle = linear.register_forward_hook(hook)
    for row, some, labels in zip(TOKENS, tokens, drawn, strict=True):
        logits = model(row[None], use_cache=False).logits[0].gather(1, some)
        chances = (logits / TEMPERATURE).log_softmax(-1)
        (-TEMPERATURE * chances.gather(1, labels[:, None]).mean()).backward()
    handle.remove()
    return torch.cat(seen["x"]), torch.cat(seen["d"])

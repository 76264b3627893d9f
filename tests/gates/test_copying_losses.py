"""Copying without a unit of attention, against a model whose weights were cut by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from nuteprune.gates import copying_losses
from nuteprune.gates.budget import Budget
from nuteprune.gates.importance import METHODS
from nuteprune.gates.scores import Probe
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.hooks import MaskHooks


def all_losses(probe: Probe, kind: str, dense: copying_losses.DenseRun) -> Tensor:
    units_N = torch.ones(probe.layout.units(kind), dtype=torch.bool)
    return copying_losses.copying_losses(probe, kind, dense, units_N)


def a_probe(model, kinds: tuple[str, ...], told: list[int] | None = None, **more) -> Probe:
    anatomy = Anatomy(model)
    told = [] if told is None else told
    tick = lambda: told.append(1)  # noqa: E731
    return Probe(anatomy, MaskHooks(anatomy), Budget.of(anatomy), kinds, progress=tick, **more)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama", "kv_groups"),
        ("llama", "heads"),
        ("gpt_neox", "heads"),  # a layer gives a tuple
        ("gemma3_text", "kv_groups"),  # windows
        ("qwen3_moe", "kv_groups"),
        ("lfm2", "kv_groups"),  # layers without attention
    ],
)
def test_losses_are_those_of_models_cut_by_hand(
    name: str, kind: str, tiny_model, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, told = tiny_model(name), []
    monkeypatch.setattr(copying_losses, "CACHED", 3 * model.config.vocab_size)
    probe = a_probe(model, (kind,), told)
    dense = copying_losses.run_dense(probe)
    ids_ST = dense.ids_ST
    length = ids_ST.shape[1] // 2
    assert torch.equal(ids_ST[:, :length], ids_ST[:, length:])
    found = all_losses(probe, kind, dense)
    assert len(told) == len(probe.anatomy.layers)

    def log_chances(of) -> Tensor:
        with torch.no_grad():
            return of(ids_ST).logits[:, length - 1 : -1].double().log_softmax(-1)

    expected = []
    whole = log_chances(model)
    for layer, size in enumerate(probe.layout.sizes[kind]):
        for unit in range(size):
            cut = Anatomy(copy.deepcopy(model))
            weight = cut.linear(layer, cut.ends(layer)["attn_block"]).weight.data
            width = weight.shape[1] // size
            weight[:, unit * width : (unit + 1) * width] = 0
            nats = whole.exp() * (whole - log_chances(cut.model))
            expected.append(float(nats.sum(-1).mean()))
    assert found.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_a_run_without_a_unit_begins_at_its_layer(tiny_model) -> None:
    model, calls = tiny_model("llama"), [0, 0, 0]
    probe = a_probe(model, ("kv_groups",))
    dense = copying_losses.run_dense(probe)
    for i, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(
            lambda *_, i=i: calls.__setitem__(i, calls[i] + 1)  # type: ignore[misc]
        )
    all_losses(probe, "kv_groups", dense)
    each = copying_losses.SEQUENCES  # two groups of a layer go together
    assert calls == [each, 2 * each, 3 * each]
    with torch.no_grad():  # and the model is as it was
        length = dense.ids_ST.shape[1] // 2
        logits_STV = model(dense.ids_ST, use_cache=False).logits[:, length - 1 : -1]
    given_STV = dense.logits_STV
    torch.testing.assert_close(logits_STV, given_STV)


def test_what_copying_hangs_on_is_raised_on_the_scale_of_the_scores(
    tiny_model, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = a_probe(tiny_model("llama"), ("kv_groups",))
    scores = {"kv_groups": torch.tensor([1.0, 2, 3, 4, 5, 6])}
    losses = torch.tensor([0.1, 0.1, 0.1, 0.1, 9.0, 9.0])
    monkeypatch.setattr(copying_losses, "copying_losses", lambda *_: losses)
    # A random model does not copy: there is nothing to lose, and what is measured is noise.
    assert copying_losses.copying_kept(probe, scores) == scores
    monkeypatch.setattr(copying_losses, "COPIES", 0.0)
    raised = copying_losses.copying_kept(probe, scores)["kv_groups"]
    assert raised.tolist() == pytest.approx([3, 3, 3, 4, 270, 270])
    assert copying_losses.copying_kept(probe, {}) == {}
    # What has gone before is no measure of the others.
    gone = torch.tensor([0.0, 0, 0, 4, 5, 6])
    losses = torch.tensor([0.0, 0, 0, 0.1, 0.1, 9.0])
    raised = copying_losses.copying_kept(probe, {"kv_groups": gone})["kv_groups"]
    assert raised.tolist() == pytest.approx([0, 0, 0, 5, 5, 450])
    nothing = copying_losses.copying_kept(probe, {"kv_groups": 0 * gone})
    assert nothing["kv_groups"].tolist() == [0] * 6


def test_only_units_near_the_cut_are_measured(tiny_model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The three cheapest go. What copying needs stays, so others go, and are measured too."""
    monkeypatch.setattr(copying_losses, "COPIES", 0.0)
    losses_N, seen = torch.tensor([0.1, 9.0, 0.1, 0.1, 0.1, 9.0]), []

    def measure(probe, kind, dense, units_N) -> Tensor:
        seen.append(units_N.tolist())
        return losses_N * units_N

    def cut_by(scores):
        return {k: (x.argsort().argsort() >= 3).float() for k, x in scores.items()}

    monkeypatch.setattr(copying_losses, "copying_losses", measure)
    probe = a_probe(tiny_model("llama"), ("kv_groups",), cut_by=cut_by)
    scores = torch.tensor([1.0, 2, 3, 3.9, 4.5, 9])
    raised = copying_losses.copying_kept(probe, {"kv_groups": scores})["kv_groups"]
    rounds = [[i for i, x in enumerate(units) if x] for units in seen]
    assert rounds == [[0, 1, 2], [3, 4]]  # 3.9 is not less than 1.25 x 3, but goes for 2
    assert raised.tolist() == pytest.approx([3, 270, 3, 3.9, 4.5, 9])


def test_the_surgeon_asks_what_copying_loses(tiny_model, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = list(torch.randint(3, 90, (2, 2, 16), generator=torch.Generator().manual_seed(0)))
    found = []
    for copies in (0.1, 0.0):  # a random model copies nothing, and counts as one that does
        monkeypatch.setattr(copying_losses, "COPIES", copies)
        model = tiny_model("llama").requires_grad_(False)
        probe = a_probe(model, ("kv_groups", "neurons"), batches=ids, plain_batches=ids)
        found.append(METHODS["surgeon"].score(probe))
    plain, raised = found
    assert torch.equal(plain["neurons"], raised["neurons"])
    assert (raised["kv_groups"] >= plain["kv_groups"]).all()
    assert (raised["kv_groups"] > plain["kv_groups"]).any()


def test_a_change_of_units_changes_no_score(tiny_model) -> None:
    """A neuron's up row x a, its down column / a: the same function, so the same cost."""
    ids = list(torch.randint(3, 90, (4, 2, 16), generator=torch.Generator().manual_seed(0)))
    found = []
    for scaled in (False, True):
        model = tiny_model("llama").double()
        if scaled:
            factors = torch.tensor([1e3 if i % 5 == 0 else 0.1 for i in range(48)]).double()
            for layer in model.model.layers:
                layer.mlp.up_proj.weight.data *= factors[:, None]
                layer.mlp.down_proj.weight.data /= factors
        model.requires_grad_(False)
        probe = a_probe(model, ("kv_groups", "neurons"), batches=ids, plain_batches=ids)
        found.append(METHODS["surgeon"].score(probe))
    for kind, plain in found[0].items():
        torch.testing.assert_close(found[1][kind], plain, rtol=1e-3, atol=0)

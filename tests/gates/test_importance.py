from __future__ import annotations

import torch

from nuteprune.gates.importance import fisher
from nuteprune.gates.masks import Layout, Masks
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.hooks import MaskHooks


def test_fisher_is_the_mean_of_squared_gradients_one_sequence_at_a_time(
    tiny_model, tiny_name: str
) -> None:
    model = tiny_model(tiny_name).requires_grad_(False)
    anatomy = Anatomy(model)
    hooks, layout = MaskHooks(anatomy), Layout(anatomy.shape, anatomy.head_dim)
    kinds = ("kv_groups", "heads", "neurons", "hidden")
    tokens = torch.randint(3, 96, (3, 8), generator=torch.Generator().manual_seed(0))
    ticks = []
    scores = fisher(model, hooks, layout, kinds, [tokens[:2], tokens[2:]], lambda: ticks.append(1))
    assert len(ticks) == 2

    expected = {kind: torch.zeros(layout.units(kind)) for kind in kinds}
    for row in tokens:
        ones = {kind: torch.ones(layout.units(kind), requires_grad=True) for kind in kinds}
        with hooks.using(Masks(layout, ones)):
            logits = model(input_ids=row[None], use_cache=False).logits[0]
        torch.nn.functional.cross_entropy(logits[:-1], row[1:]).backward()
        for kind, leaf in ones.items():
            expected[kind] += leaf.grad.square() / len(tokens)
    for kind in kinds:
        assert expected[kind].max() > 0
        limit = 1e-4 * float(expected[kind].max())
        torch.testing.assert_close(scores[kind], expected[kind], rtol=1e-4, atol=limit)
    assert hooks.masks is None

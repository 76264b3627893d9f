"""Logits of the last tokens: those that the stock model gives of all, from one block of memory."""

from __future__ import annotations

import pytest
import torch

from nuteprune.model.forwards import last_logits


def test_last_logits_are_the_stock_model_s_and_read_what_lies_together(
    tiny_model, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("gemma2")  # which caps its logits
    ids = torch.arange(3, 39).view(3, 12)
    with torch.no_grad():
        whole = model(ids).logits
        read, forward = [], model.lm_head.forward
        monkeypatch.setattr(model.lm_head, "forward", lambda x: read.append(x) or forward(x))
        apart = model(ids, logits_to_keep=5).logits
        ours = last_logits(model, ids, 5)
    assert [x.is_contiguous() for x in read] == [False, True]
    torch.testing.assert_close(ours, whole[:, -5:])
    torch.testing.assert_close(ours, apart)
    assert not model.lm_head._forward_pre_hooks

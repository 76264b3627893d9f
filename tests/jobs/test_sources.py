from __future__ import annotations

import pytest

from nuteprune.errors import UserError
from nuteprune.jobs.sources import pick_device


def test_one_accelerator_is_chosen_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert pick_device("cuda:0") == pick_device("cuda") == pick_device("auto") == "cuda"
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES=1"):
        pick_device("cuda:1")

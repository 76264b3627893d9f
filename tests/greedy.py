from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def continuation(model: PreTrainedModel, tokens_BT: Tensor, steps: int, **how: Any) -> Tensor:
    """The tokens (B, steps) that transformers goes on with, each the likeliest.

    The end of a text is not chosen; with `eos_token_id=None` it is a token as any other.
    """
    how = {"attention_mask": torch.ones_like(tokens_BT), "pad_token_id": 0, **how}
    made_BT = model.generate(
        tokens_BT, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, **how
    )
    return made_BT[:, tokens_BT.shape[1] :]

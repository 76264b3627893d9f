"""What we override of `transformers.Trainer` is there, and takes what we pass on."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import pytest
from transformers import Trainer

from nuteprune.progressive.trainer import ProgressiveTrainer
from nuteprune.train.recover import RecoverTrainer

# Method -> parameters that upstream passes by position, in this order, or by name.
PRIVATE = {
    "_clip_grad_norm": ("model",),
    "_get_num_items_in_batch": ("batch_samples", "device"),
    "_get_output_dir": ("trial",),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_move_model_to_device": ("model", "device"),
    "_save": ("output_dir", "state_dict"),
    "_save_checkpoint": ("model", "trial"),
    "_wrap_model": ("model", "training", "dataloader"),
}
OURS = {
    base
    for trainer in (ProgressiveTrainer, RecoverTrainer)
    for base in trainer.__mro__
    if base.__module__.startswith("nuteprune.")
}


def private(kind: Any) -> set[str]:
    return {name for name in vars(kind) if name.startswith("_") and not name.startswith("__")}


def of_upstream() -> set[str]:
    return set().union(*(private(base) for base in Trainer.__mro__ if base is not object))


def test_each_private_method_that_is_overridden_is_on_the_list() -> None:
    overridden = set().union(*(private(kind) & of_upstream() for kind in OURS))
    assert overridden == set(PRIVATE)


@cache
def source_of_upstream() -> str:
    return "".join(inspect.getsource(base) for base in Trainer.__mro__ if base is not object)


@pytest.mark.parametrize("name", PRIVATE)
def test_upstream_has_it_and_calls_it_as_we_expect(name: str) -> None:
    theirs = inspect.signature(getattr(Trainer, name)).parameters
    assert tuple(theirs)[1:] == PRIVATE[name]
    for kind in OURS:
        if name in vars(kind):
            values = {parameter: object() for parameter in PRIVATE[name]}
            inspect.signature(vars(kind)[name]).bind(None, *values.values())
            inspect.signature(vars(kind)[name]).bind(None, **values)
    assert source_of_upstream().count(f"self.{name}(") >= 1, (
        "nobody calls it: what we override has no effect"
    )

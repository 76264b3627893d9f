"""All phases on a second device: nothing sits on the CPU by accident, and no step waits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nuteprune.distill.coforward import Objective
from nuteprune.gates import surgeon_costs
from nuteprune.products import read_tensors
from nuteprune.shrink import least_squares
from tests.second_device import DEVICE, There, second_device

from .conftest import make, metrics

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is dep:FutureWarning")


def run(model: Any, out: Path, **settings: Any) -> tuple[Any, dict[str, torch.Size]]:
    """Go through all phases; return the trainer and the shapes of the smaller model's tensors."""
    trainer = make(model, out, max_steps=2, logging_steps=1, calibration_blocks=4, **settings)
    trainer.train()
    small = trainer.finalize()
    return trainer, {name: x.shape for name, x in small.state_dict().items()}


@pytest.fixture
def tiny(tiny_model: Callable[..., Any]) -> Callable[[], Any]:
    return lambda: tiny_model("llama", attn_implementation="eager")


@pytest.mark.slow(seconds=4)
@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (torch.float32, {}),
        (torch.float32, {"ramp_share": 1.0}),
        (torch.bfloat16, {}),
        (torch.float16, {"ramp_share": 1.0}),
    ],
    ids=str,
)
def test_a_run_elsewhere_gives_what_one_here_gives(
    dtype: torch.dtype,
    settings: dict[str, Any],
    tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here, expected = run(tiny().to(dtype), tmp_path / "here", **settings)
    with second_device(monkeypatch):
        there, shapes = run(tiny().to(dtype).to(DEVICE), tmp_path / "there", **settings)
        assert all(isinstance(x, There) for x in there.final_masks().values.values())
        masks = there.final_masks().to("cpu").values
    rounding = 1e-4 if dtype == torch.float32 else 0.1
    ours, theirs = (read_tensors(tmp_path / x / "score.safetensors")[0] for x in ("there", "here"))
    for kind, scores in theirs.items():
        assert (ours[kind] - scores).abs().max() / scores.max() < rounding
    losses = [[row["loss"] for row in metrics(tmp_path / x)] for x in ("here", "there")]
    assert losses[1] == pytest.approx(losses[0], rel=max(rounding, 1e-2))
    if dtype == torch.float32:
        snapshot = here.final_masks().values
        assert all(torch.equal(masks[kind], mask) for kind, mask in snapshot.items())
        assert shapes == expected


def beside(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that gives what another gives, plus zeros made without a device."""

    def broken(*args: Any, **kwargs: Any) -> Any:
        found = function(*args, **kwargs)
        if isinstance(found, dict):
            return {name: x + torch.zeros(1) for name, x in found.items()}
        return found + torch.zeros(found.shape)

    return broken


@pytest.mark.slow(seconds=4)
@pytest.mark.parametrize(
    ("place", "name"),
    [
        (Objective, "parts"),
        (surgeon_costs, "inverse_of_correlations"),
        (least_squares, "ridge_fit"),
    ],
    ids=["step", "scoring", "refit"],
)
def test_a_tensor_made_without_a_device_is_caught(
    place: Any, name: str, tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, name, beside(getattr(place, name)))
    with second_device(monkeypatch), pytest.raises(RuntimeError, match="cuda:0 and on cpu"):
        run(tiny().to(DEVICE), tmp_path)


@pytest.mark.slow(seconds=4)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_with_fixed_masks_reads_nothing(
    checkpointing: bool, tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs that differ in their number of steps: what one reads more is read in a step."""
    reads = []
    for steps in (2, 4):
        with second_device(monkeypatch) as device:
            trainer = make(
                tiny().to(DEVICE),
                tmp_path / str(steps),
                max_steps=steps,
                logging_steps=100,
                method="random",
                calibration_blocks=2,
                gradient_checkpointing=checkpointing,
            )
            trainer.begin()
            device.reads.clear()
            trainer.train()
        reads.append(device.reads)
    assert reads[0]  # at the beginning, to choose what is computed
    # transformers looks whether positions begin anew: once a pass, which both roles share.
    assert reads[1] - reads[0] == {"transformers.masking_utils.find_packed_sequence_indices": 2}

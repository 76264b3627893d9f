"""A trainer checkpoint, loaded to be judged, is the student that the trainer had at that step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from nuteprune import UserError
from nuteprune.train.midway import load_midway, run_config

from .conftest import make

pytestmark = pytest.mark.slow

TOKENS = torch.arange(3, 43).view(2, 20)


class StudentAt(TrainerCallback):
    """Notes the logits of the trainer's student at the end of a step."""

    def __init__(self, trainer: Any, step: int) -> None:
        self.trainer, self.step = trainer, step

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            trainer = self.trainer
            with torch.no_grad(), trainer.ready.hooks.using(trainer.final_masks()):
                trainer.model.eval()
                self.logits = trainer.anatomy.model(TOKENS).logits.clone()


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_rank": 128},
        {"lora_rank": 4, "ramp_share": 0.75},
        {"gate_type": "hard_concrete", "lora_rank": 128},
        {"gates": "neurons", "lora_targets": "qv", "refit": False, "shapes": "uniform"},
    ],
    ids=["rank-128", "ramp", "hard-concrete", "qv"],
)
def test_a_checkpoint_is_the_student_of_its_step(
    settings: dict[str, Any], tiny_model, tmp_path: Path
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer = make(tiny_model("llama"), tmp_path, **saving, **settings)
    trainer.add_callback(student := StudentAt(trainer, 4))
    trainer.train()
    model, sparsity = load_midway(tiny_model("llama"), tmp_path / "checkpoint-4")
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, student.logits)
    assert sparsity is not None
    assert 0 <= sparsity < 0.4
    file = tmp_path / "checkpoint-4" / "nuteprune_state.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"is damaged or was changed.*judge another checkpoint"):
        load_midway(tiny_model("llama"), tmp_path / "checkpoint-4")


def test_the_settings_are_those_of_the_run_to_the_letter(tiny_model, tmp_path: Path) -> None:
    settings = {"lora_rank": 16, "method": "taylor", "learning_rate": 3e-3}
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer = make(tiny_model("llama"), tmp_path, max_steps=2, **saving, **settings)
    trainer.train()
    found = run_config(tmp_path / "checkpoint-2")
    assert {name: getattr(found, name) for name in settings} == settings
    path = tmp_path / "settings.json"
    kept = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in kept.items() if k != "schema"}))
    with pytest.raises(UserError, match=r"most likely 0\.1\.0"):
        load_midway(tiny_model("llama"), tmp_path / "checkpoint-2")
    resumed = make(tiny_model("llama"), tmp_path, max_steps=4, **settings)
    with pytest.raises(UserError, match=r"most likely 0\.1\.0"):
        resumed.train(resume_from_checkpoint=True)
    path.write_text(json.dumps(kept))
    other = make(tiny_model("llama"), tmp_path, max_steps=4, **{**settings, "lora_rank": 8})
    with pytest.raises(UserError, match="was started with lora_rank 16, not 8"):
        other.train(resume_from_checkpoint=True)


def test_steps_are_fixed_where_a_ramp_shares_them_out(tiny_model, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    make(tiny_model("llama"), tmp_path, max_steps=4, ramp_share=0.5, **saving).train()
    other = make(tiny_model("llama"), tmp_path, max_steps=6, ramp_share=0.5)
    with pytest.raises(UserError, match="was started with max_steps 4, not 6"):
        other.train(resume_from_checkpoint=True)

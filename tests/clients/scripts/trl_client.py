"""Runs where TRL is installed, and nuteprune is not: trains a checkpoint for two steps."""

from __future__ import annotations

import json
import sys

import torch
import transformers
import trl
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import AutoTokenizer

transformers.logging.disable_progress_bar()

TEXTS = ["the student learns", "a teacher that is less pruned", "than the student", "a little less"]
# Without a task, PEFT's auto classes want the model's class, which they import from few places.
LORA = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def train(job: dict) -> trl.SFTTrainer | trl.DPOTrainer:
    """Return the trainer after its two steps; its model is in eval mode."""
    how = {
        "output_dir": job["out"],
        "trust_remote_code": True,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "max_length": 32,
        "use_cpu": True,
        "bf16": False,  # TRL's default; logits would be rounded
        "router_aux_loss_coef": 0.0,  # transformers sums it over layers of as many experts
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if job["trainer"] == "sft":
        kind, config, rows = trl.SFTTrainer, trl.SFTConfig, [{"text": x} for x in TEXTS]
    else:
        kind, config = trl.DPOTrainer, trl.DPOConfig
        rows = [{"prompt": x, "chosen": " learns", "rejected": " less"} for x in TEXTS]
    trainer = kind(
        job["folder"],
        args=config(**how),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(job["folder"], trust_remote_code=False),
        peft_config=LoraConfig(**LORA) if job["peft"] else None,
    )
    trainer.train()
    trainer.model.eval()
    return trainer


def run(job: dict) -> dict:
    """Train, save, and return the trained logits; an adapter is merged, and that saved too."""
    trainer = train(job)
    trainer.save_model(job["out"])
    with torch.no_grad():
        logits = trainer.model(input_ids=torch.tensor([job["prompt"]])).logits
    model = trainer.accelerator.unwrap_model(trainer.model)
    answer = {"class": type(model).__name__, "logits": logits.tolist()}
    if job["peft"]:
        adapted = AutoPeftModelForCausalLM.from_pretrained(job["out"], trust_remote_code=True)
        adapted.merge_and_unload().save_pretrained(job["merged"])
    return answer


for line in sys.stdin:
    print("RESULT", json.dumps(run(json.loads(line))), flush=True)

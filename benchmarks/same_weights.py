"""Whether a change of the code changes what is written: hashes of pruned weights, before and after.

    python benchmarks/same_weights.py OUT.json [--demo 0.2 0.5] [--against BEFORE.json]

Ten tiny families are pruned through the trainer; with `--demo` the demo's model too, 8 steps at
each sparsity. Sums depend on the machine and its threads: compare two runs of one machine, with
the same OMP_NUM_THREADS.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

import nuteprune
from nuteprune.data.training_text import BlockDataset
from nuteprune.model.families import FAMILIES

TYPES = (
    *("llama", "mistral", "qwen2", "qwen3", "phi3"),
    *("gemma2", "gemma3_text", "granite", "gpt_neox", "opt"),
)
LENGTH = 16


def tiny(model_type: str) -> PreTrainedModel:
    """Return a small model with random weights."""
    family = FAMILIES[model_type]
    names = family.config_names
    counts = {"hidden": 32, "heads": 4, "neurons": 48}
    settings = {names[word]: count for word, count in counts.items()}
    settings |= {"vocab_size": 96, "num_hidden_layers": 3, "max_position_embeddings": 64}
    settings |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if "kv_heads" in names:
        settings |= {"num_key_value_heads": 2, "head_dim": 8}
    if model_type == "opt":
        settings |= {"word_embed_proj_dim": 32, "dropout": 0.0}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**settings)).eval()
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.25 * torch.randn(parameter.shape, generator=random))
    return model


def pruned(model: PreTrainedModel, sparsity: float) -> str:
    """Return the hash of a tiny model's weights, pruned and taught for a few steps."""
    random = torch.Generator().manual_seed(0)
    blocks = BlockDataset(torch.randint(3, 90, (64, LENGTH), generator=random))
    with tempfile.TemporaryDirectory() as folder:
        args = nuteprune.NutePruneConfig(
            output_dir=folder,
            target_sparsity=sparsity,
            max_steps=8,
            per_device_train_batch_size=2,
            neuron_multiple=4,
            calibration_blocks=8,
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            seed=0,
        )
        trainer = nuteprune.NutePruneTrainer(model, args, blocks)
        trainer.train()
        return hash_of(trainer.finalize().state_dict())


def hash_of(weights: dict[str, torch.Tensor]) -> str:
    """Return the hash of tensors by their names."""
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(name.encode())
        found.update(weights[name].contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def demo(sparsity: float) -> str:
    """Return the hash of the demo's pruned weight file."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "small"
        nuteprune.prune(
            "demo", data="demo", sparsity=sparsity, steps=8, seed=0, out=out, quiet=True
        )
        return hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()


def main() -> int:
    """Write the hashes, and name those that differ from an earlier run's."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--demo", type=float, nargs="*", default=[])
    parser.add_argument("--against", type=Path)
    asked = parser.parse_args()
    found = {f"{name} {s}": pruned(tiny(name), s) for name in TYPES for s in (0.3, 0.5)}
    found |= {f"demo {s}": demo(s) for s in asked.demo}
    asked.out.write_text(json.dumps(found, indent=1) + "\n")
    before = json.loads(asked.against.read_text()) if asked.against else found
    differ = [name for name in found if before.get(name, found[name]) != found[name]]
    print(f"{len(found) - len(differ)} of {len(found)} are the same", *differ, sep="\n  ")
    return bool(differ)


if __name__ == "__main__":
    sys.exit(main())

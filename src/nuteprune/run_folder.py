"""Every name in an output folder: of a checkpoint, and of the run beside it.

OUT/
config.json, model.safetensors, tokenizer files    the pruned checkpoint
nuteprune.json  README.md  SHA256SUMS              its record, its card, its sums
sparsity-0.2/, sparsity-0.3/                       checkpoints of several targets, instead, each
                                                   with a run/ beside the shared one; or
                                                   params-100M/ and so on: see `train.asked`
run/
settings.json                                    what the run is
vocab/                                           the model with fewer tokens, if asked for
self.jsonl                                       write: text that the dense model wrote
score.safetensors                                score: what each unit costs
choose.safetensors                               choose: masks, kind -> (N,)
refit.safetensors                                refit: the weights that stay
judge.json                                       judge: figures of the dense model
metrics.jsonl  checkpoint-N/                     teach: a line per step, and what is resumed from
teachers/                                        snapshots that teach, of recipes that ask for them
samples.json  speed.json  report.html            what the report shows, and the report
"""

from __future__ import annotations

from pathlib import Path

RECORD = "nuteprune.json"
CARD = "README.md"
SUMS = "SHA256SUMS"
TARGETS = ("sparsity-", "params-", "active_params-", "size-", "memory-", "speedup-")
"""How the folders of several targets begin: each is a checkpoint, beside one run."""
RUN = "run"
SETTINGS = "settings.json"
METRICS = "metrics.jsonl"
CHECKPOINT = "checkpoint-"
STATE = "nuteprune_state.safetensors"
"""In a trainer checkpoint: what the method adds to what `transformers.Trainer` saves."""
TEACHERS = "teachers"
SELF = "self"
"""What a DATA spec, and so the record, calls text that the dense model writes itself."""
SELF_WRITTEN = f"{SELF}.jsonl"
SAMPLES = "samples.json"
SPEED = "speed.json"
REPORT = "report.html"
VOCAB = "vocab"
HALF_WRITTEN = ".cut-"
"""How the names of folders begin in which weights wait for their tensors to be mapped."""


def hidden(path: Path) -> bool:
    """Return whether a file or folder is out of sight, such as `.git`."""
    return path.name.startswith(".")

"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nuteprune.errors import UserError
from nuteprune.files import at_home
from nuteprune.jobs.job import Job
from nuteprune.jobs.settings import RUN_KEYS, read_mapping, read_settings

Model = Annotated[str, typer.Argument(help="Hub id, checkpoint folder, or 'demo'.")]
Sparsity = Annotated[
    str | None,
    typer.Option(
        help="Share of the decoder layers' parameters to remove, such as 0.2; several "
        "(0.2,0.3,0.5) give several checkpoints from one run."
    ),
]
ShapeFile = Annotated[
    Path | None,
    typer.Option(
        "--shape",
        help="YAML or JSON file with the dimensions to cut to, instead of --sparsity; another "
        "checkpoint's nuteprune.json serves too.",
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        help="Training text: a .txt, .jsonl, .json or .parquet file, a folder of them, a hub "
        "dataset id[:config[:split]], or 'demo' (default: three small English texts)."
    ),
]
EvalData = Annotated[
    str | None, typer.Option(help="Text to judge by; default: the held-out part of the data.")
]
Out = Annotated[Path, typer.Option(help="Folder for the result.")]
OptionalOut = Annotated[Path | None, typer.Option(help="Folder for the result.")]
Config = Annotated[Path | None, typer.Option(help="YAML file with settings.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="One setting, key=value; may be repeated.")
]
Steps = Annotated[
    int | None, typer.Option(help="Optimizer steps; 0: one-shot; default 80, of the demo 60.")
]
BatchSize = Annotated[
    int | None, typer.Option(help="Sequences per forward pass of each process; default 4.")
]
Length = Annotated[int | None, typer.Option(help="Tokens per sequence; default 256.")]
Method = Annotated[
    str | None,
    typer.Option(
        help="nuteprune, or a one-shot method: random, magnitude, wanda, flap, taylor, fisher, "
        "surgeon, similarity; with the same distillation after it."
    ),
]
Gates = Annotated[
    str | None,
    typer.Option(
        help="heads, kv_groups, neurons, hidden, attn_block, mlp_block; comma separated; "
        "default: heads (KV groups where heads share one) and neurons."
    ),
]
Shapes = Annotated[str | None, typer.Option(help="free (default) or uniform.")]
NeuronMultiple = Annotated[
    int | None, typer.Option(help="Neurons kept per layer are a multiple of it; default 32.")
]
HiddenMultiple = Annotated[
    int | None, typer.Option(help="The width kept is a multiple of it; default 64.")
]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")]
Bits = Annotated[
    int | None,
    typer.Option(
        help="8 or 4: hold the dense model's projections in so many bits while training; what "
        "is written is cut from the full weights."
    ),
]
TextColumn = Annotated[str | None, typer.Option(help="Column of the text in structured files.")]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random.")]
ReportTo = Annotated[
    str | None,
    typer.Option(
        help="Trackers that follow the run: tensorboard, wandb, trackio or another of Trainer's, "
        "with commas; install them yourself."
    ),
]
Checkpointing = Annotated[
    bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in --out.")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that comes with MODEL, where its tokenizer needs some.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="End with one machine-readable line.")]


FLAGS = ("dry_run", "resume", "overwrite", "trust_remote_code")
"""What a job is told by options alone: no file of settings can say so."""


def make_job(
    model: str,
    out: Path,
    config: Path | None,
    assignments: list[str] | None,
    sparsity: str | None,
    shape: Path | None,
    **given: Any,
) -> Job:
    """Return a job from a settings file, `--set`, and options, the later winning.

    Args:
        model: as the user named it.
        out: the output folder.
        config: settings file or None.
        assignments: `--set` values.
        sparsity: one target or several, comma separated; None where not given.
        shape: file with dimensions to cut to, None where not given.
        **given: options under their settings' full names; None where not given. Those of `Job`
            itself (`dry_run`, `resume`, `overwrite`, `trust_remote_code`) are flags.
    """
    flags = {k: given.pop(k) for k in FLAGS if k in given}
    out = at_home(out)  # of `--out=~/x` the shell leaves it
    settings = read_settings(config and at_home(config), assignments or ())
    if sparsity is not None and shape is not None:
        raise UserError("--sparsity and --shape both say how much is to go; pass one of them")
    if sparsity is not None:
        for key in ("shape", "stops"):  # of a settings file, over which options win
            settings.pop(key, None)
        *stops, given["target_sparsity"] = _shares(sparsity)
        given["stops"] = stops or None
    if shape is not None:
        given["shape"] = read_mapping(at_home(shape), "--shape")
    settings |= {key: value for key, value in given.items() if value is not None}
    own = {key: settings.pop(key) for key in list(settings) if key in RUN_KEYS}
    own.setdefault("data", "demo")
    return Job(model=model, out=out, settings=settings, **own, **flags)


def trackers(text: str | None) -> list[str] | None:
    """Return the names of `--report-to`, None where it is not given."""
    return None if text is None else [name.strip() for name in text.split(",")]


def _shares(text: str) -> list[float]:
    try:
        return sorted(float(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(
            f"--sparsity {text} is neither a share nor several: write 0.2, or 0.2,0.3,0.5"
        ) from error

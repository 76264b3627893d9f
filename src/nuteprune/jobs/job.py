"""What a job is asked to do: its settings, each declared once.

The command line, the Python calls, `--set`, YAML files and records are derived from what the
dataclasses here and in `train.config` declare.
"""

from __future__ import annotations

import time
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from nuteprune.data.specs import DEMO
from nuteprune.errors import UserError
from nuteprune.run_folder import RUN, SELF, VOCAB
from nuteprune.train.declared import CALL, HOW, WHAT, check_declared, declared, option, setting
from nuteprune.train.settings import RecoverSettings

DTYPES = ("float32", "bfloat16", "float16")
BITS = (8, 4)
AUTO = "auto"
"""In place of a number of tokens: the fewest that cost little."""
AUTO_MEANS = f"or '{AUTO}': the fewest that cost at most 1 % on held-out DATA."
"""The end of help on the number of tokens that are to stay."""
TEMPLATES = ("auto", "chat", "alpaca")
"""How rows of instruction, input and output become text; `auto`: `chat` if the model has one."""
INSTRUCTIONS, TEXT = "instructions", "text"
"""Kinds of data that `recover` learns."""
RATES = {INSTRUCTIONS: 1e-4, TEXT: 1e-3}
"""Rates of its LoRA; the paper's for instructions, many of which take many steps."""
EPOCHS, STEPS = 2, 200
"""How long it learns: passes over instructions, steps on plain text."""


@dataclass
class Job:
    """What `prune` and `recover` have in common.

    Args:
        model: hub id, checkpoint folder, or `demo`.
        out: folder for the result.
        data: training text; see `data.specs`.
        eval_data: text to judge by; None: the held-out part of `data`.
        text_column: column of the text in structured files.
        length: tokens per block.
        eval_blocks: held-out blocks per source.
        device: `auto`, `cpu`, `cuda`.
        dtype: `auto`, `float32`, `bfloat16`, `float16`: what the run computes in.
        resume: go on from the last checkpoint in `out`.
        overwrite: replace what is in `out`.
        trust_remote_code: run Python code that comes with the model's tokenizer.
        files: input files, which the settings name or were read from.
    """

    model: str = setting("Hub id, checkpoint folder, or 'demo'.", MISSING)
    out: Path = option("Folder for the result.", MISSING, role=CALL)
    data: list[str] | str = option(
        "Calibration and training text: a .txt, .jsonl, .json or .parquet file, a folder of them, "
        "a hub dataset id[:config[:split]], 'demo' (default: three small English texts), or 'self' "
        "(text that the model writes itself). May be repeated. By default half of the text is "
        "'self'; to change that, name 'self' or pass --shares.",
        DEMO,
    )
    eval_data: str | None = option(
        "Text to judge by; about 5 % of it, the held-out part, is read. Default: that of --data.",
        role=HOW,
    )
    text_column: str | None = option("Column that holds the text, in files with columns.")
    length: int = option("Tokens per sequence (default {default}).", 256, bounds=(2, 1e7))
    eval_blocks: int = setting(
        "Held-out blocks of each source to judge by.", 24, bounds=(1, 1e6), role=HOW
    )
    device: str = option("auto (default), cpu or cuda.", "auto", role=HOW)
    dtype: str = option(
        f"Dtype to compute in: auto (default), {', '.join(DTYPES)}.",
        "auto",
        choices=("auto", *DTYPES),
    )
    resume: bool = option("Go on from the last checkpoint in --out.", False, role=CALL)
    overwrite: bool = option("Replace what is in --out.", False, role=CALL)
    trust_remote_code: bool = option(
        "Run Python code that comes with MODEL, where its tokenizer needs some.", False, role=CALL
    )
    files: tuple[Path, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        check_declared(self)

    @property
    def specs(self) -> list[str]:
        """The DATA specs that are named."""
        return [self.data] if isinstance(self.data, str) else list(self.data)

    def recorded(self) -> dict[str, Any]:
        """Return the job's settings for the record: name -> value, left out where not given."""
        fields = declared(type(self)).items()
        kept = [name for name, x in fields if x.role in (WHAT, HOW)]
        return {name: x for name in kept if (x := getattr(self, name)) is not None}


@dataclass
class PruneJob(Job):
    """What `prune` is asked to do.

    Args:
        family: YAML file with the entry of a model type that is not listed; None: it is.
        bits: 8 or 4 bits for the dense model's projections; None: `dtype`.
        text_only: of a model of several modalities, write the language model alone.
        dry_run: say what would be done, and write nothing.
        shares: of the tokens, one for each of `data`; None: see `jobs.prune_run.mixture`.
        vocab: tokens that the model is cut to first, or `AUTO`; None: all stay.
        minutes: see `jobs.minutes`; None: `settings` say how long it takes.
        own_text: file of text that the model has written; None: the run lets it write.
        settings: those of `NutePruneConfig` that are given.
        started: time of the command, by `time.monotonic`.
        after: time that the written results still take, in blocks that are taught.
        may_exceed: whether a run that has too few minutes takes longer.
    """

    shares: list[float] | str | None = option(
        "Share of the tokens for each --data, comma separated, such as 0.7,0.3. With one "
        "--data, 1 uses only that text: the model writes none."
    )
    own_text: str | None = option(
        "File of text that MODEL has written itself, from nuteprune write; the run then writes "
        "none.",
        role=HOW,
    )
    family: str | None = option(
        "YAML file with the entry of MODEL's type, where it is not a listed one; "
        "nuteprune family writes it."
    )
    bits: int | None = option(
        f"{' or '.join(map(str, BITS))}: load the frozen dense model in this many bits while "
        "training; the result keeps full precision.",
        choices=BITS,
    )
    text_only: bool | None = setting(
        "Of a model of several modalities, write the pruned language model alone."
    )
    vocab: int | str | None = option(
        "Number of tokens that the vocabulary is cut to first, as nuteprune vocab does, such as "
        f"16384, {AUTO_MEANS}"
    )
    minutes: float | str | None = option(
        "Time for the whole run, instead of --steps: minutes, or 90s or 2h. The run divides it "
        "between writing text, scoring and steps.",
        role=CALL,
    )
    dry_run: bool = option("Say what the run would do and take; write nothing.", False, role=CALL)
    settings: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic, compare=False)
    after: float = 0.0
    may_exceed: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocab is not None:
            self.vocab = tokens_asked(self.vocab, "--vocab")

    @property
    def dense(self) -> str:
        """The model that is pruned: MODEL, or what is left of it with fewer tokens.

        A dry run writes none, and cuts MODEL in memory.
        """
        cut = self.vocab is not None and not self.dry_run
        return str(self.out / RUN / VOCAB) if cut else self.model

    @property
    def share_values(self) -> list[float] | None:
        """The shares that are given.

        Raises:
            UserError: if they are no numbers.
        """
        given = self.shares
        parts = given.split(",") if isinstance(given, str) else given
        try:
            return None if parts is None else [float(x) for x in parts]
        except (TypeError, ValueError) as error:
            raise UserError(
                f"shares are {given!r}; write one number for each --data, such as 0.7,0.3"
            ) from error


@dataclass
class RecoverJob(RecoverSettings, Job):
    """What `recover` is asked to do.

    Args:
        steps: optimizer steps; None: by epochs, for plain text `STEPS`.
        epochs: passes over instruction data; None: `EPOCHS`.
        learning_rate: None: by the kind of data, `RATES`.
        lora_rank: rank of LoRA, on all projections.
        batch_size: sequences per forward pass.
        accumulation: forward passes per step.
        template: one of `TEMPLATES`.
        seed: draws everything random.
        report_to: trackers, comma separated.
        gradient_checkpointing: less memory, more time.
        save_steps: steps between checkpoints of the run.
    """

    data: list[str] | str = option(
        "What to learn: rows of chat messages or of instruction, input and output, or plain text; "
        "a file, a folder, a hub dataset id[:config[:split]], or 'demo' (default).",
        DEMO,
    )
    eval_data: str | None = option(
        "Text to judge by; about 5 % of it, the held-out part, is read. Default: the text that "
        "the pruned model was judged by.",
        role=HOW,
    )
    steps: int | None = option(f"Optimizer steps (plain text: {STEPS}).", bounds=(1, 1e9), role=HOW)
    epochs: float | None = option(
        f"Passes over instruction data ({EPOCHS}).", bounds=(1e-9, 1e9), role=HOW
    )
    learning_rate: float | None = option(
        f"Learning rate of LoRA ({RATES[INSTRUCTIONS]}; plain text: {RATES[TEXT]}).",
        bounds=(1e-12, 1e3),
    )
    batch_size: int = option(
        "Sequences per forward pass (default {default}).", 8, bounds=(1, 1e6), role=HOW
    )
    accumulation: int = option(
        "Forward passes per step (default {default}).", 1, bounds=(1, 1e6), role=HOW
    )
    template: str = option(
        "Template of instruction rows: chat, alpaca, or auto (chat if the model has it).",
        "auto",
        choices=TEMPLATES,
    )
    seed: int = option("Seed of everything random (default {default}).", 42, bounds=(0, 2**31 - 1))
    report_to: str = option(
        "Trackers that follow the run: tensorboard, wandb, trackio; comma separated.",
        "none",
        role=CALL,
    )
    gradient_checkpointing: bool = option("Less memory, more time.", False, role=HOW)
    save_steps: int = option(
        "Steps between checkpoints of the run (default {default}).", 50, bounds=(1, 1e9), role=HOW
    )

    @property
    def text(self) -> str:
        """The one DATA spec.

        Raises:
            UserError: if several are named, or text that a dense model would write.
        """
        if len(self.specs) != 1:
            raise UserError(
                f"recover learns from one text; pass one --data, not {', '.join(self.specs)}"
            )
        if self.specs[0] == SELF:
            raise UserError(
                f"recover writes no text itself: pass --data FILE, or prune with --data {SELF}"
            )
        return self.specs[0]


@dataclass
class VocabJob(Job):
    """What `vocab` is asked to do.

    Args:
        data: text that tells which tokens stay.
    """

    NOT_HERE: ClassVar = ("eval_data", "eval_blocks", "device", "dtype", "resume")
    """Settings of other jobs that it has no use for."""

    data: list[str] | str = option(
        "Text whose tokens are kept, beside those that the model expects: a .txt, .jsonl, "
        ".json or .parquet file, a folder of them, a hub dataset id[:config[:split]], 'demo' "
        "(default: three small English texts), or 'self' (nothing but text that the model writes). "
        "May be repeated.",
        DEMO,
    )


def tokens_asked(asked: int | str, option: str) -> int | str:
    """Return the number of tokens that are to stay, or `AUTO`.

    Raises:
        UserError: if it is neither.
    """
    try:
        return AUTO if asked == AUTO else int(asked)
    except ValueError:
        raise UserError(f"{option} is {asked}; pass a number of tokens, or {AUTO}") from None


def what_it_is(job: Job) -> dict[str, Any]:
    """Return the job's settings for settings.json, each spelled in one way."""
    from nuteprune.console import dtype_name  # these load rich and torch, which help never needs
    from nuteprune.jobs.sources import pick_dtype, place

    named: dict[str, Any] = {"model": place(job.model), "data": [place(x) for x in job.specs]}
    named["dtype"] = dtype_name(pick_dtype(job.dtype, job.device))
    if isinstance(job, PruneJob):
        files = {x: getattr(job, x) and place(getattr(job, x)) for x in ("family", "own_text")}
        named |= {"shares": job.share_values, **files}
    return {**job.recorded(), **{name: x for name, x in named.items() if x is not None}}

"""The options of `eval`, `bench`, `export` and `write`, each declared once."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from pathlib import Path

from nuteprune.errors import UserError
from nuteprune.jobs.job import PruneJob
from nuteprune.judge import published
from nuteprune.run_folder import RUN, SPEED
from nuteprune.train.declared import check_declared, declared, option, setting
from nuteprune.train.settings import PruneSettings

REPLACE = "Replace the file if it exists."
TYPES = {"gguf": ("f16", "bf16", "q8_0", "q4_0", "f32"), "onnx": ("f32",)}
"""Format -> how it stores weights, the default first; see `export.gguf.write.FILE_TYPES`."""
_HELP = {name: x.help for name, x in declared(PruneJob).items()}


@dataclass(frozen=True)
class Evaluation:
    """What `eval` is asked to do."""

    model: str = setting(_HELP["model"], MISSING)
    against: str | None = option(
        "The dense model, to compare quality, answers and use of context with."
    )
    data: list[str] | None = option(
        f"Text, may be repeated: {', '.join(published.TEXTS)} (from the hub; NAME=FILE "
        "reads a local copy), a file, a folder, a hub dataset id[:config[:split]], or 'demo'."
    )
    protocol: str | None = option(f"How text is cut into blocks: {', '.join(published.PROTOCOLS)}.")
    length: int | None = option("Tokens per block.")
    stride: int | None = option("Tokens between starts of blocks; below --length they overlap.")
    joining: str | None = option(f"Between documents: {', '.join(published.JOININGS)}.")
    blocks: int | None = option("Most blocks per text; 0: all.")
    whole: bool = option("All of the text, not only its held-out part.", False)
    tasks: str | None = option(
        "Tasks of lm-evaluation-harness, comma separated; commonsense7 names seven."
    )
    include_path: Path | None = option("Folder with task files of your own.")
    limit: int | None = option("Most questions per task.")
    fewshot: int | None = option("Examples before each question.")
    prompts: Path | None = option(
        "Prompts that both models answer, JSON lines with 'prompt' or 'messages'; without "
        "it questions that the dense model writes, or beginnings of the text."
    )
    answer_tokens: int | None = option("Tokens of an answer at most (default 64).")
    batch_size: int = option("Blocks or questions per forward pass (default {default}).", 4)
    device: str = option(_HELP["device"], "auto")
    dtype: str = option(_HELP["dtype"], "auto")
    text_column: str | None = option(_HELP["text_column"])
    copying_seed: int | None = option(
        "Seed of the tokens to copy. Pass 0 to 9 while you choose a model."
    )
    family: str | None = option(_HELP["family"])
    trust_remote_code: bool = option(_HELP["trust_remote_code"], False)

    @property
    def changes(self) -> dict[str, object]:
        """What of the protocol is to be otherwise; None where not given."""
        return {x: getattr(self, x) for x in ("length", "stride", "joining", "blocks")}


@dataclass(frozen=True)
class Benchmark:
    """What `bench` is asked to do."""

    model: str = setting(_HELP["model"], MISSING)
    against: str | None = option("The dense model, timed in turns.")
    batch_sizes: str = option("Sequences at a time, with commas (default {default}).", "1,4")
    lengths: str = option("Tokens of the prompt, with commas (default {default}).", "256")
    new_tokens: int = option("Tokens to decode (default {default}).", 32, bounds=(1, 1e6))
    repeats: int = option("Timed passes after the first (default {default}).", 5, bounds=(1, 1e6))
    threads: int | None = option("Threads on a CPU.", bounds=(1, 1e4))
    device: str = option(_HELP["device"], "auto")
    dtype: str = option(_HELP["dtype"], "auto")
    save: bool = option(f"Also write MODEL/{RUN}/{SPEED} for the report.", False)
    save_costs: Path | None = option(
        "Only time MODEL's blocks and write this file, for prune --speedup. Of "
        "--batch-sizes and --lengths the first counts; --repeats is ignored."
    )
    overwrite: bool = option(REPLACE, False)
    family: str | None = option(_HELP["family"])

    def __post_init__(self) -> None:
        check_declared(self)


@dataclass(frozen=True)
class Exporting:
    """What `export` is asked to do.

    Args:
        model: hub id, checkpoint folder, or `demo`.
        to: one of `TYPES`.
        out: the file.

    Raises:
        UserError: for a format, or a way to store weights in it, that is none.
    """

    model: str
    to: str
    out: Path
    type: str | None = option(
        f"How weights are stored. gguf: {', '.join(TYPES['gguf'])}; onnx: f32. Default: the first."
    )
    pre_tokenizer: str | None = option(
        "For gguf: llama.cpp's name for how the tokenizer splits text. Default: found."
    )
    overwrite: bool = option(REPLACE, False)
    family: str | None = option(_HELP["family"])
    trust_remote_code: bool = option(_HELP["trust_remote_code"], False)

    def __post_init__(self) -> None:
        if self.to not in TYPES:
            raise UserError(f"--to {self.to} is not a known format; pass one of {', '.join(TYPES)}")
        if self.stored_as not in (known := TYPES[self.to]):
            raise UserError(
                f"--type {self.type} is unknown to --to {self.to}; pass one of {', '.join(known)}"
            )
        for name in ("pre_tokenizer", "trust_remote_code"):
            if getattr(self, name) and self.to != "gguf":
                option_name = f"--{name.replace('_', '-')}"
                raise UserError(
                    f"{option_name} is for the tokenizer that --to gguf writes; leave it out with "
                    f"--to {self.to}"
                )

    @property
    def stored_as(self) -> str:
        """How weights are stored."""
        return TYPES[self.to][0] if self.type is None else self.type


@dataclass(frozen=True)
class Writing:
    """What `write` is asked to do.

    Args:
        model: hub id, checkpoint folder, or `demo`.
        tokens: how many are written at least.
        out: the file.
    """

    model: str
    tokens: int
    out: Path
    length: int = option(_HELP["length"], PruneJob.length)
    seed: int = option("Seed of what is drawn (default {default}).", PruneSettings.seed)
    device: str = option(_HELP["device"], "auto")
    dtype: str = option(_HELP["dtype"], "auto")
    engine: str = option(
        "What draws the tokens: torch (default), or vllm where that is installed, to other bytes.",
        "torch",
    )
    overwrite: bool = option(REPLACE, False)
    trust_remote_code: bool = option(_HELP["trust_remote_code"], False)

"""settings.md and json.md, made from what is declared: `python docs/reference.py` writes both."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer
import yaml

from nuteprune.cli.app import make_app
from nuteprune.jobs.job import PruneJob
from nuteprune.progressive.config import ProgressiveConfig
from nuteprune.train.config import NutePruneConfig
from nuteprune.train.declared import declared

DOCS = Path(__file__).parent
KEYS = DOCS / "json.yaml"
_MADE = "This page is generated from the code (`python docs/reference.py`).\n"
_TRAINERS = {
    "lr_scheduler_type": "How the learning rate falls; the default by the square root of what is "
    "left.",
    "max_grad_norm": "Norm that LoRA's gradients are clipped to.",
    "save_steps": "Steps between checkpoints of the run.",
}
"""What is said of settings of `transformers.TrainingArguments` whose defaults differ here."""
_COMMANDS = """\
- Exit codes: 0 success, 1 a failed run or a missed target, 2 wrong input, 130 interrupted (143 by
  SIGTERM). What you can fix is one line on stderr. `NUTEPRUNE_DEBUG=1` shows where an unexpected
  error came from.
- Downloads and tables of block costs are in the user's cache folder. `NUTEPRUNE_CACHE` names
  another.
- Some commands need more packages: `pip install '.[eval]'` in the checkout for `eval --tasks`,
  `[onnx]` for `export --to onnx`, `[bits]` for `prune --bits`. They say so too.
- [Reliability](reliability.md#what-a-command-writes-or-removes) has what each command writes or
  removes.
"""
_FILE = """\
## A file of settings

`prune --config FILE.yaml` reads one; options and `--set` override it. An option is a key too, but
for `--out`, `--minutes`, `--dry-run`, `--resume`, `--overwrite` and `--trust-remote-code`: leave
out the leading `--`, and write `_` for `-`, as in `batch_size`. Every run leaves such a file. The
report's last section, and `config` in `nuteprune.json`, state all settings that were not defaults.

`recipes/` has files for [7B and 8B models](large-models.md#recipes-for-7b-and-8b-models),
`recipes/progressive.yaml` for a
[ramp with numerous teachers](how-it-works.md#on-a-ramp-the-numerous-teachers), and
`recipes/paper.yaml` for [the paper's own setting](papers.md#the-papers-setting-word-by-word).
"""
_SETTINGS = """\
## Settings without an option

These go into a file or after `--set`, as `--set key=value`. All other settings of
`transformers.TrainingArguments` are keys too. A run refuses those that it cannot use, and says why.
"""


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    text = [" | ".join(x.replace("|", "\\|") for x in line) for line in lines]
    return "".join(f"| {line} |\n" for line in text)


def _commands() -> dict[str, Any]:
    found: dict[str, Any] = typer.main.get_command(make_app()).commands  # type: ignore[attr-defined]
    return {"prune": found["prune"], **found}


def _options() -> Iterator[list[str]]:
    told: dict[tuple[str, str], list[str]] = {}
    for command, x in _commands().items():
        for option in (x for x in x.params if x.param_type_name == "option"):
            said, default = option.help, option.default
            if default is not None and not isinstance(default, bool) and "default" not in said:
                said += f" Default: {default}."
            told.setdefault((option.opts[0], said), []).append(command)
    everywhere = sorted(_commands())
    for (name, said), commands in told.items():
        of = "all" if sorted(commands) == everywhere else ", ".join(commands)
        yield [f"`{name}`", of, said]


def without_option(*kinds: type) -> list[list[str]]:
    """Return name, default and help of the settings that only a file, or --set, can set."""
    rows = []
    for kind in kinds:
        for name, x in declared(kind).items():
            if not x.option and x.default is not dataclasses.MISSING:
                rows.append([f"`{name}`", _shown(x.default), x.help])
    return rows


def _shown(default: Any) -> str:
    return "none" if default is None else f"`{str(default).lower()}`"


def settings_page() -> str:
    """Return the text of docs/settings.md."""
    commands = [[f"`{name}`", x.help.partition("\n")[0]] for name, x in _commands().items()]
    defaults = {x.name: x.default for x in dataclasses.fields(NutePruneConfig)}
    ours = without_option(NutePruneConfig, PruneJob)
    ours += [[f"`{k}`", _shown(defaults[k]), said] for k, said in _TRAINERS.items()]
    moving = [x for x in without_option(ProgressiveConfig) if x not in ours]
    parts = [
        "# Commands and settings\n",
        _MADE,
        "## Commands\n",
        table(["command", "does"], commands),
        _COMMANDS,
        "## Options\n",
        table(["option", "of", "what"], [*_options()]),
        _FILE,
        _SETTINGS,
        table(["key", "default", "what"], sorted(ours)),
        "Masks that move (`progressive: true`) have settings of their own:\n",
        table(["key", "default", "what"], moving),
    ]
    return "\n".join(parts)


def json_page() -> str:
    """Return the text of docs/json.md."""
    told = yaml.safe_load(KEYS.read_text(encoding="utf-8"))
    made = _MADE.replace("the code", "[json.yaml](json.yaml)")
    parts = ["# Record and JSON\n", made, told["introduction"]]
    for section in told["sections"]:
        parts.append(f"{'#' * section.get('level', 2)} {section['title']}\n")
        parts.append(section.get("before", ""))
        if keys := section.get("keys"):
            rows = [[f"`{key}`", kind, *_rest(more)] for key, (kind, *more) in keys.items()]
            parts.append(table(["key", "type", "what", "when"], rows))
        parts.append(section.get("after", ""))
    return "\n".join(x for x in parts if x)


def _rest(more: list[str]) -> list[str]:
    return [*more, "", ""][:2]


PAGES = {"settings.md": settings_page, "json.md": json_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")

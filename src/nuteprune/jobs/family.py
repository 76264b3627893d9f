"""The job of `family`: an entry for a model type that is not listed, proposed and checked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from nuteprune.console import Output
from nuteprune.errors import RunFailed, UserError, in_one_line
from nuteprune.files import at_home, write_text, writing
from nuteprune.jobs.exactness import SHAPES, Found, examine, settled
from nuteprune.jobs.guard import check_file
from nuteprune.jobs.sources import locate
from nuteprune.model.family import Family
from nuteprune.model.family_file import FamilyFile, read_family, to_dict, to_text
from nuteprune.model.lookup import why_never
from nuteprune.model.proposal import propose
from nuteprune.model.small import base_config, config_named, small_config, small_model


def run(
    model: str,
    output: Output,
    file: Path | None = None,
    out: Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Propose an entry for a model's type, or take one from a file, and check it.

    Args:
        model: hub id, folder or config.json, or the name of a model type.
        output: where to print.
        file: an entry to check in place of proposing one.
        out: where to write the entry, which refuses what failed its check.
        overwrite: replace a file that is there.

    Raises:
        UserError: if no entry can describe the type, with the reason; or nothing can be written
            at `out`.
        RunFailed: if the entry passes no check, or writing fails.
    """
    if out is not None:
        reads = [("model", model), ("entry", str(file) if file else None)]
        check_file("--out", at_home(out), reads, overwrite, "family.yaml")
    config = config_of(model)
    entry, found = checked(config, read_family(at_home(file)) if file else None)
    rows = [[kind, *(_cell(found, kind, shapes) for shapes in SHAPES)] for kind in found]
    output.table(f"Gates on {config.model_type}", ["kind", *SHAPES], rows)
    for why in dict.fromkeys(
        entry.refusal(k, uniform=x == "uniform") for k in found for x in SHAPES
    ):
        if why is not None:
            output.line(f"refused    {why}")
    if out is not None:
        path = at_home(out)
        with writing(out):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, to_text(entry))
        output.line(f"Entry      {out}; pass it as --family {out}")
    else:
        output.line(to_text(entry))
    return {
        "model_type": config.model_type,
        "entry": to_dict(entry),
        "held": {kind: [x for x, why in by.items() if why is None] for kind, by in found.items()},
        "failed": {
            kind: {x: why for x, why in by.items() if why is not None}
            for kind, by in found.items()
            if any(by.values())
        },
    }


def config_of(model: str) -> PreTrainedConfig:
    """Return the config that a user names, checked to be of a decoder of attention and MLPs.

    Raises:
        UserError: if there is none, or it is of a model that no entry can describe.
    """
    path = at_home(model)
    if path.exists() or "/" in model:
        where = str(path) if path.exists() else locate(model)
        try:
            config: PreTrainedConfig = AutoConfig.from_pretrained(where, trust_remote_code=False)
        except Exception as error:  # whatever readers of configs raise
            raise UserError(f"cannot load the config of {model}: {error}") from error
    else:
        config = config_named(model)
    if never := why_never(config.to_dict()):
        raise UserError(f"no entry can describe {config.model_type}: {never}")
    return config


def checked(config: PreTrainedConfig, file: FamilyFile | None = None) -> tuple[Family, Found]:
    """Return an entry and the results of its checks; gates that pass none are refused.

    Raises:
        UserError: if no entry can describe the type, or the file's does not fit it.
        RunFailed: if no entry passes a check.
    """
    problems, best = [], None
    for family in [file.family] if file else _proposed(config):
        if family.head_dim_from_hidden:
            small = small_config(config, head_dim=None)
        else:
            small, _ = base_config(config)
        if file:
            _check_file(file, config, small)
        try:
            entry = settled(family, small)
        except Exception as error:  # of modelling code, on sizes that it was not made for
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            problems.append(kind + in_one_line(error))
            continue
        found = examine(entry, small)
        held = sum(why is None for by in found.values() for why in by.values())
        if held > (best[0] if best else 0):
            best = held, replace(entry, refused=_refused(entry, found)), found
        problems += [f"{kind}: {why}" for kind, by in found.items() for why in by.values() if why]
    if best:
        return best[1:]
    raise RunFailed(f"no entry for {config.model_type} holds: {problems[0] if problems else ''}")


def _proposed(config: PreTrainedConfig) -> list[Family]:
    try:
        return propose(config)
    except UserError:
        raise
    except Exception as error:  # modelling code that is none of ours, on sizes it was not made for
        said = f"{type(error).__name__}: {in_one_line(error)}"
        raise UserError(f"a small {config.model_type} cannot be looked at: {said}") from error


def _check_file(file: FamilyFile, config: PreTrainedConfig, small: PreTrainedConfig) -> None:
    if file.family.model_type != config.model_type:
        raise file.wrong(
            ("model_type",), f"it is {file.family.model_type}, and the model {config.model_type}"
        )
    from nuteprune.export.gguf.architectures import ARCHITECTURES

    if unknown := set(file.family.gguf) - ARCHITECTURES.keys():
        raise file.wrong(("gguf",), f"{min(unknown)} is not one of {', '.join(ARCHITECTURES)}")
    file.check_against(small, small_model(small))


def _refused(entry: Family, found: Found) -> dict[str, str]:
    """Return the entry's refusals, and what did not hold when it was tried."""
    failed = {
        kind if shapes == "free" else f"{kind} {shapes}": f"when tried, {why}"
        for kind, by in found.items()
        for shapes, why in by.items()
        if why is not None
    }
    return {**entry.refused, **failed}


def _cell(found: Found, kind: str, shapes: str) -> str:
    if shapes not in found[kind]:
        return "refused"
    return "holds" if found[kind][shapes] is None else "does not hold"

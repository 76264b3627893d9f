"""The folder that a job writes to: what runs have written there, and how it is cleared."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from nuteprune.files import atomic, read_sums, remove, writing
from nuteprune.jobs.job import Job
from nuteprune.processes import is_main, main_ones, somewhere
from nuteprune.run_folder import (
    CARD,
    HALF_WRITTEN,
    RECORD,
    RUN,
    SELF_WRITTEN,
    SETTINGS,
    SUMS,
    TARGETS,
    VOCAB,
    hidden,
)
from nuteprune.train.state import last_checkpoint

_TARGET = re.compile(rf"({'|'.join(TARGETS)})\d[\w.+-]*")
"""Names of the folders of several targets, as `train.asked` spells them."""
_ASIDE = ".old.removed"
"""Where the old content of a folder waits until a job that replaces it has begun."""
DEMOS = Path("nuteprune-demo")
"""Where a demo writes that is told nothing else."""


def begun(out: Path) -> bool:
    """Return whether a folder has a run that `--resume` can continue or begin anew."""
    run = out / RUN
    kept = (run / SELF_WRITTEN, run / SETTINGS, run / VOCAB / RECORD)
    return last_checkpoint(run) is not None or any(x.is_file() for x in kept)


def demo_folder(resume: bool) -> Path:
    """Return `DEMOS`, or a numbered sibling: the first that is not taken, or of the newest run."""
    if resume:
        found = [x for x in Path().glob(f"{DEMOS}*") if begun(x)]
        return max(found, key=lambda x: (x / RUN).stat().st_mtime, default=DEMOS)
    folder, number = DEMOS, 1
    while folder.exists() and any(folder.iterdir()):
        number += 1
        folder = Path(f"{DEMOS}-{number}")
    return folder


def goes_on(job: Job) -> bool:
    """Return whether a job goes on from a checkpoint of its run.

    A run without a checkpoint begins anew when resumed, with the text that its model wrote.
    """
    return job.resume and last_checkpoint(job.out / RUN) is not None


def is_stated(job: Job) -> bool:
    """Return whether a job resumes a run whose settings in `run` must equal its own."""
    return goes_on(job) or (job.resume and (job.out / RUN / SETTINGS).is_file())


def share_run(out: Path) -> None:
    """Copy the main process's run to machines that do not share its disk; all processes take part.

    Tensors that stages leave are not copied, since the main process alone reads them.

    Raises:
        RunFailed: if another process has ended, or a file cannot be written.
    """
    found = sorted(x for x in out.rglob("*") if x.is_file() and _is_shared(x.relative_to(out)))
    for name in main_ones([str(x.relative_to(out)) for x in found]):
        path = out / name
        if not somewhere(not path.is_file()):
            continue
        content = main_ones(path.read_bytes() if is_main() else b"")
        if not path.is_file():
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic(path) as partial:
                    partial.write_bytes(content)


def _is_shared(name: Path) -> bool:
    inside = RUN in name.parts[:-1] and not any(x.startswith(".") for x in name.parts)
    return inside and not (name.parent.name == RUN and name.suffix == ".safetensors")


def written_in(out: Path) -> set[str]:
    """Return the names of files in a folder that runs write.

    The file of sums names a checkpoint's files. It is written first and removed last.
    """
    named = {RUN, SUMS, RECORD, CARD, "additional_chat_templates", *read_sums(out)}
    matching = {x.name for pattern in (".*partial", ".*removed") for x in out.glob(pattern)}
    targets = {x.name for x in out.iterdir() if _TARGET.fullmatch(x.name) and x.is_dir()}
    return {x.name for x in out.iterdir()} & (named | matching | targets)


def clear_result(out: Path, overwrite: bool = False) -> None:
    """Remove a run's results and what a kill left half written; keep the run, each target's too.

    Args:
        out: the output folder.
        overwrite: remove what is not the run's as well.
    """
    visible = {x.name for x in out.iterdir() if not hidden(x)} if overwrite else set()
    names = (written_in(out) | visible) - {RUN}
    begun_targets = {x for x in names if _TARGET.fullmatch(x) and (out / x / RUN).is_dir()}
    for name in begun_targets:
        clear_result(out / name, overwrite=True)  # a checkpoint is written beside `run` alone
    _remove(out, names - begun_targets)
    _remove(out / RUN, [x.name for x in (out / RUN).glob(f"{HALF_WRITTEN}*")])


def _remove(out: Path, names: Iterable[str]) -> None:
    with writing(out):
        # First what makes a folder a checkpoint, lest one that is gone in part look whole.
        order = {"config.json": 0, SUMS: 2}
        for name in sorted(names, key=lambda name: order.get(name, 1)):
            remove(out / name)


def clear(out: Path) -> None:
    """Remove all that is in a folder; if that is interrupted, the rest cannot be resumed."""
    with writing(out):
        doomed = out / f".{RUN}.removed"
        remove(doomed)
        if (out / RUN).exists():
            (out / RUN).replace(doomed)
    _remove(out, [path.name for path in out.iterdir()])


def set_aside(out: Path) -> None:
    """Move all that is in a folder to a hidden one within it, for `put_back` or `drop_aside`."""
    with writing(out):
        remove(out / _ASIDE)
        paths = list(out.iterdir())
        (out / _ASIDE).mkdir()
        for path in paths:
            path.replace(out / _ASIDE / path.name)


def put_back(out: Path) -> None:
    """Put what was set aside in place of a run that was refused."""
    if not (out / _ASIDE).is_dir():
        return
    with writing(out):
        remove(out / RUN)
        for path in list((out / _ASIDE).iterdir()):
            path.replace(out / path.name)
        (out / _ASIDE).rmdir()


def drop_aside(out: Path) -> None:
    """Remove what was set aside, if anything was."""
    _remove(out, [_ASIDE])

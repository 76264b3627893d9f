"""What `prune --vocab` does first: it cuts the vocabulary, and the run's folder keeps the rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from nuteprune.console import Output
from nuteprune.errors import UserError
from nuteprune.export.record import read_record
from nuteprune.files import remove
from nuteprune.jobs import vocab
from nuteprune.jobs.folder import is_stated, put_back, set_aside
from nuteprune.jobs.job import AUTO, PruneJob, what_it_is
from nuteprune.jobs.prune_run import make_run, trainer_config
from nuteprune.jobs.show import print_tokens
from nuteprune.jobs.sources import use_family
from nuteprune.processes import several_started
from nuteprune.run_folder import RECORD, RUN, SETTINGS
from nuteprune.train.declared import check_same, declared, read_settings


@contextmanager
def fewer_tokens(job: PruneJob, scratch: Path, output: Output) -> Iterator[None]:
    """Cut the vocabulary of a job's model, unless that is done; a job that is refused leaves none.

    What the job replaces is set aside until it begins: it may be refused after the cut.

    Args:
        job: the job, whose `dense` is written.
        scratch: a folder for what nobody keeps.
        output: prints.

    Raises:
        UserError: for anything that cannot work.
    """
    run, folder, keep = job.out / RUN, Path(job.dense), job.vocab
    assert keep is not None
    _check(job)
    vocab.check_whole(job.model)
    if job.dry_run:
        yield
        return
    use_family(job.family, job.model)
    stated = is_stated(job)
    if stated:
        now = dict.fromkeys(declared(PruneJob)) | what_it_is(job)
        check_same(run, read_settings(run) | now, PruneJob)
    record = read_record(folder) if job.resume and (folder / RECORD).is_file() else None
    is_new = record is None or not (stated or record["config"] == vocab.asked_for(job, keep))
    if is_new:
        if isinstance(keep, int) and job.bits is None:  # refuse before text is written
            trial = replace(job, dry_run=True)
            with output.bars() as bars:
                make_run(trial, trainer_config(trial, scratch / RUN), bars)
        if job.resume:  # what is half written, or of other settings
            remove(folder)
        replaces = job.overwrite and not job.resume
        make_room = partial(set_aside, job.out) if replaces else None
        record = vocab.cut(job, keep, folder, output, make_room)
    else:
        output.line("Resumed vocab: done before")
    assert record is not None
    print_tokens(record["vocab"], output)
    try:
        yield
    except UserError:
        if is_new and not (run / SETTINGS).is_file():
            remove(folder)
            put_back(job.out)
        raise


def _check(job: PruneJob) -> None:
    """Refuse what a smaller vocabulary does not go together with.

    Raises:
        UserError: naming what to do instead.
    """
    refused = {
        "--vocab works in one process alone: run nuteprune vocab first, then prune its "
        "result": several_started(),
        f"--own-text {job.own_text} was written with all tokens, and --vocab leaves fewer: run "
        "nuteprune vocab first, and write and prune with its result": job.own_text is not None,
        "a dry run reads no text, which tells how many tokens can go: pass a number in place of "
        "--vocab auto": job.dry_run and job.vocab == AUTO,
        "a dry run cuts the vocabulary of whole weights: leave out --bits, or --vocab": job.dry_run
        and job.bits is not None,
    }
    for said, holds in refused.items():
        if holds:
            raise UserError(said)

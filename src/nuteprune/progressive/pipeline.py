"""The paper's way through a run: masks are learned while the student is taught."""

from __future__ import annotations

from pathlib import Path

from nuteprune.processes import is_main
from nuteprune.progressive.trainer import ProgressiveTrainer
from nuteprune.run import Record, Run

TRAINER = ProgressiveTrainer


def pipeline(run: Run) -> dict[Path, Record]:
    """Make a smaller checkpoint for each of a run's goals; see `nuteprune.pipeline`.

    Gates start from scores or all alike. `ProgressiveTrainer` chooses and refits on the way.
    """
    run.write()
    dense = run.judge_dense()
    records = {}
    for goal in run.each_goal():
        trainer = run.teach(goal)
        if is_main():
            sliced = run.slice(trainer, goal)
            judged = run.judge(sliced, dense)
            folder, records[folder] = run.save(trainer, judged)
    return records

"""The main job on one screen: eight stages in order, modules of `stages` but for teach.

    write    the dense model writes its share of the text
    score    what each unit costs
    choose   which units go
    refit    the weights that stay, by least squares
    teach    LoRA, distilled from the dense model: `train.trainer`
    slice    merge, fold, cut
    judge    the smaller model beside the dense one, which was judged before it was scored
    save     checkpoint, record, card

`Run` gives each stage the run's settings. What the stages up to teach return stays in the run's
folder, so that a run that was killed goes on with the first whose product is not there.
"""

from __future__ import annotations

from pathlib import Path

from nuteprune.run import Record, Run
from nuteprune.train.trainer import NutePruneTrainer

TRAINER = NutePruneTrainer


def pipeline(run: Run) -> dict[Path, Record]:
    """Make a smaller checkpoint for each of a run's targets; the run's own model is used up.

    Returns:
        Folder -> record; of the main process alone.

    Raises:
        RunFailed: if training breaks down, or what is measured is not finite.
    """
    run.write()
    dense = run.judge_dense()
    stages = run.first_stages()
    scores = stages.score()
    records: dict[Path, Record] = {}
    for target in run.each_target():
        masks = stages.choose(scores, target)
        weights = stages.refit(masks, target)
        trainer = run.teach(target, masks, weights)
        sliced = run.slice(trainer, target)
        judged = run.judge(sliced, dense)
        records |= run.save(trainer, judged)
    return records

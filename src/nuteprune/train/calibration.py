"""Scoring and re-fit on calibration text: what a run measures outside of training."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from nuteprune.data.blocks import collated
from nuteprune.errors import UserError
from nuteprune.gates.allocate import Allocator
from nuteprune.gates.importance import METHODS, Method
from nuteprune.gates.masks import Masks
from nuteprune.gates.probe import Probe, Scores, check_finite
from nuteprune.gates.surgeon import INPUTS
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.hooks import MaskHooks
from nuteprune.model.packed import is_packed
from nuteprune.shrink.compensate import Install, InstallStack, Note, refit
from nuteprune.train.config import NutePruneConfig
from nuteprune.train.pricing import Measure, changes_of, following

Progress = Callable[[str, int, int], None]
"""Told (what is being done, units done, units in all) during long work outside of training."""
FIRST = 32
"""Items of the text that are looked at before a run."""
PLAIN_BATCH = 4
"""Blocks that go through a layer together: no gradients, no logits, so more than one fits."""

Trial = Callable[[], AbstractContextManager[Install]]
"""Lets a re-fit change the model's weights for a while."""
MOST_AT_ONCE = 0.3
"""Most of the projections that goes by scores of one model. They say little of what is left then;
see docs/log.md."""


def silent(what: str, done: int, total: int) -> None:
    """Tell nobody of progress."""


def stops_before(
    target: float, args: NutePruneConfig, kinds: Collection[str], packed: bool = False
) -> list[float]:
    """Return the sparsities on the way to a target at which what is left is scored again.

    There are none on a ramp, which re-estimates scores itself, and none without a re-fit of whole
    weights: heads and neurons alone have one.
    """
    if not (METHODS[args.method].reads and tries(args, kinds, packed)):
        return []
    rounds = math.ceil(target / MOST_AT_ONCE - 1e-9)
    return [target * i / rounds for i in range(1, rounds)]


def tries(args: NutePruneConfig, kinds: Collection[str], packed: bool) -> bool:
    """Return whether cuts of these kinds can be tried; see `NutePruneConfig.tried`."""
    return args.tried and set(kinds) <= set(INPUTS) and not packed


def priced(args: NutePruneConfig, kinds: Collection[str], packed: bool = False) -> bool:
    """Return whether scores follow what is measured at the target."""
    return METHODS[args.method].priced and tries(args, kinds, packed)


def refits(
    targets: Sequence[float], args: NutePruneConfig, kinds: Collection[str], packed: bool = False
) -> int:
    """Return how often projections are re-fitted: at stops, to measure there, at each target."""
    stops = stops_before(targets[-1], args, kinds, packed)
    return (len(stops) + priced(args, kinds, packed) + len(targets)) * args.compensation


def score_in_rounds(
    dataset: Any,
    args: NutePruneConfig,
    anatomy: Anatomy,
    hooks: MaskHooks,
    allocator: Allocator,
    target: float,
    trial: Trial,
    progress: Progress = silent,
    dense: Callable[[int], AbstractContextManager[Any]] = nullcontext,
) -> Scores:
    """Score the units of a dense model, and those that are left at each stop once more.

    At a stop the units that go by the scores so far are cut and the others re-fitted, for a while.
    Units that have gone keep the scores by which they went. See `Method.settled` for what is made
    of the scores in the end; then they may follow what is measured at the target
    (`train.pricing`).

    Args:
        dataset: the training text.
        args: the run's settings.
        anatomy: the dense model.
        hooks: where masks multiply in it.
        allocator: which shapes it can be cut to.
        target: the largest sparsity that is to be reached.
        trial: a context that gives what installs a re-fit, and takes the re-fit back at its end.
        progress: told about scoring and re-fit.
        dense: see `shrink.compensate.refit`.

    Raises:
        RunFailed: if scores are not finite.
    """
    scores = score_on(dataset, args, anatomy, hooks, allocator, progress)
    packed, kinds = is_packed(anatomy.model), allocator.constraints.kinds
    for sparsity in stops_before(target, args, kinds, packed):
        masks = allocator.masks(allocator.shape(scores, sparsity), scores)
        with trial() as install:
            on_device = masks.to(str(anatomy.embedding.weight.device))
            refit_on(dataset, args, anatomy, hooks, on_device, install, progress, dense)
            again = score_on(dataset, args, anatomy, hooks, allocator, progress)
        scores = {k: torch.where(masks.values[k] > 0, again[k], scores[k]) for k in scores}
    scores = METHODS[args.method].settled(allocator.layout, scores)
    if not priced(args, kinds, packed):
        return scores
    # The beginning of the text tells: the re-fit reads its end.
    batches = calibration_batches(dataset, args.priced_blocks, PLAIN_BATCH, first=True)
    masks = allocator.masks(allocator.shape(scores, target), scores)
    changes = changes_of(masks, scores, allocator.constraints.neuron_multiple)
    on_device = masks.to(str(anatomy.embedding.weight.device))
    measure = Measure(anatomy, hooks, batches, Path(cast(str, args.output_dir)))
    with trial() as install:
        note = measure.note(on_device, changes)
        refit_on(dataset, args, anatomy, hooks, on_device, install, progress, dense, note=note)
        # Counted from here, so that the re-fit is not taken for the time of a change.
        tick = counted(progress, "cutting more and less", len(changes))
        prices = measure.prices(install, tick)
    check_finite([torch.tensor(list(prices.values()))], args.method)
    return following(scores, prices, allocator.layout)


def score_on(
    dataset: Any,
    args: NutePruneConfig,
    anatomy: Anatomy,
    hooks: MaskHooks,
    allocator: Allocator,
    progress: Progress = silent,
) -> Scores:
    """Score the units of a dense model by the settings' one-shot scoring.

    Raises:
        RunFailed: if scores are not finite.
    """
    method, kinds = METHODS[args.method], allocator.constraints.kinds
    text = scoring_text(method, dataset, args.calibration_blocks)
    cut = sum(kind in kinds for kind in ("heads", "kv_groups")) * method.cuts
    turns = len(text.batches) + len(anatomy.layers) * (bool(text.plain_batches) + cut)
    tick = counted(progress, f"scoring {' and '.join(kinds)}", turns)
    probe = Probe(anatomy, hooks, allocator.budget, kinds, *text, args.seed, tick)
    with frozen_parameters(anatomy.model):
        scores = method.score(probe)
    check_finite(scores.values(), args.method)
    return scores


def refit_on(
    dataset: Any,
    args: NutePruneConfig,
    anatomy: Anatomy,
    hooks: MaskHooks,
    masks: Masks,
    install: Install,
    progress: Progress = silent,
    dense: Callable[[int], AbstractContextManager[Any]] = nullcontext,
    install_stack: InstallStack | None = None,
    note: Note | None = None,
) -> None:
    """Re-fit the output and down projections to frozen masks; see `shrink.compensate.refit`."""
    blocks, size = args.refit_blocks, args.per_device_train_batch_size
    batches = calibration_batches(dataset, blocks, size)
    tick = counted(progress, "re-fitting projections", len(anatomy.layers))
    refit(anatomy, hooks, masks, batches, install, tick, dense, install_stack, note)


def check_text(dataset: Any, alike: bool = False) -> None:
    """Refuse what no training text can be read from at any place, as calibration does.

    Args:
        dataset: the text.
        alike: whether its items have to be of one length; the first ones tell.

    Raises:
        UserError: naming what is missing.
    """
    if dataset is None:
        raise UserError("there is no training text: pass train_dataset")
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise UserError(
            f"train_dataset is a {type(dataset).__name__}, which can only be read in order, and "
            "calibration reads its end: pass a list of its first items, such as "
            "list(itertools.islice(dataset, args.blocks))"
        )
    if not len(dataset):
        raise UserError("train_dataset is empty: pass at least one item with input_ids")
    if "input_ids" not in (item := dataset[0]):
        raise UserError(
            f"items of train_dataset have {', '.join(map(str, item))} and no input_ids: pass "
            "tokenized text"
        )
    if alike:
        collated([dataset[i] for i in range(min(FIRST, len(dataset)))])


def calibration_batches(
    dataset: Any, count: int, batch_size: int, first: bool = False
) -> list[Tensor]:
    """Return token ids (B, T) of `count` blocks from the end of the training text.

    Padding is left out, and what follows moves up.

    Args:
        dataset: items with `input_ids` (T,) and, where there is padding, `attention_mask` (T,);
            blocks are as long as the longest of the last `count`.
        count: blocks wanted; a short dataset gives some of them twice.
        batch_size: blocks per batch.
        first: take them from its beginning.

    Raises:
        UserError: if there is no text, or nothing but padding.
    """
    check_text(dataset)
    size = len(dataset)
    order = range(size) if first else range(size - 1, -1, -1)
    length = max(len(dataset[i]["input_ids"]) for i in order[:count])
    parts: list[Tensor] = []
    missing, read = count * length, 0
    while missing > 0:
        if read == size and not any(map(len, parts)):
            raise UserError("the training text is nothing but padding: check its attention_mask")
        item = dataset[order[read % size]]
        ids = torch.as_tensor(item["input_ids"])
        if "attention_mask" in item:
            ids = ids[torch.as_tensor(item["attention_mask"]).bool()]
        parts.append(ids)
        missing, read = missing - len(ids), read + 1
    return list(torch.cat(parts)[: count * length].view(count, length).split(batch_size))


class ScoringText(NamedTuple):
    """Token ids (B, T) for a `Probe`: what gradients may be taken on, and what only runs."""

    batches: list[Tensor]
    plain_batches: list[Tensor]


def scoring_text(method: Method, dataset: Any, blocks: int) -> ScoringText:
    """Return what a method reads of a dataset, given the calibration blocks asked for."""
    if not method.reads:
        return ScoringText([], [])
    # One block at a time where a scoring may need all logits of a batch.
    batches = calibration_batches(dataset, blocks, 1)
    more = blocks * method.reads_plain
    return ScoringText(batches, calibration_batches(dataset, more, PLAIN_BATCH) if more else [])


@contextmanager
def frozen_parameters(model: nn.Module) -> Iterator[None]:
    """Take gradients of activations alone for a while."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def counted(progress: Progress, what: str, total: int) -> Callable[[], None]:
    """Return a function that tells `progress` of one more unit done each time it is called."""
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        progress(what, done, total)

    progress(what, 0, total)
    return tick

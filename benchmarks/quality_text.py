"""The text of the quality table: what its cells are calibrated and trained on, and judged by."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nuteprune import NutePruneConfig, UserError
from nuteprune.data.demo import TEXTS
from nuteprune.data.fingerprint import IN_DOMAIN, Fingerprint, kind_of
from nuteprune.data.held_out import HeldOut, held_out_blocks, held_out_part
from nuteprune.data.specs import DEMO, iter_documents
from nuteprune.data.training_text import BlockDataset, training_blocks
from nuteprune.jobs.job import PruneJob
from nuteprune.jobs.prune_run import mixture
from nuteprune.judge.context import SEED, copying
from nuteprune.judge.perplexity import mean, perplexities
from nuteprune.judge.published import HELD_OUT, PROTOCOLS
from nuteprune.judge.published_blocks import make_blocks
from nuteprune.run_folder import SELF
from nuteprune.stages.write import tokens_to_write, write

CHOOSING_SEED = 9
"""Draws the sequences of `copying` where settings are chosen; reported figures have another."""
OTHER = PROTOCOLS[HELD_OUT]
"""How other text is cut: 24 blocks of 256 tokens."""


@dataclass(frozen=True)
class Setting:
    """What all cells of a table share; a folder holds the table of one setting.

    Args:
        model: hub id, checkpoint folder, or `demo`.
        data: text that is trained on, and whose held-out part is judged; as `prune` takes it.
        length: tokens per block.
        eval_blocks: held-out blocks per source.
        device: `cpu`, `cuda`.
        dtype: what is computed in.
        settings: of `NutePruneConfig`, for all cells.
        shares: of the tokens, one for each of `data`; None: as `prune` shares them out.
        other_text: domain of other text -> checksum of its file; the folder may be anywhere.
        leave_out: the embedded source that is not trained on, and judges as other text.
        choose: judge by what settings are chosen by, not by what accepts them.
    """

    model: str = DEMO
    data: list[str] = field(default_factory=lambda: [DEMO])
    length: int = 256
    eval_blocks: int = 24
    device: str = "cpu"
    dtype: str = "float32"
    settings: dict[str, Any] = field(default_factory=dict)
    shares: list[float] | None = None
    other_text: dict[str, str] = field(default_factory=dict)
    leave_out: str | None = None
    choose: bool = False

    @classmethod
    def read(cls, path: Path) -> Setting:
        """Read the setting of a folder; before there were shares, the data was all of the text."""
        found = json.loads(path.read_text(encoding="utf-8"))
        if "shares" not in found:
            found |= {"data": [found["data"]], "shares": [1.0]}
        return cls(**found)

    def mixture(self) -> tuple[list[str], list[float]]:
        """Return what is calibrated and trained on: DATA specs and their shares.

        Raises:
            UserError: if shares are not as many as the data, or something is left out of other
                text than the demo's.
        """
        data = self.data
        if self.leave_out:
            if data != [DEMO]:
                raise UserError(f"leave-out is of the text {DEMO}; leave {', '.join(data)} out")
            data = [f"{DEMO}:{','.join(name for name in TEXTS if name != self.leave_out)}"]
        job = PruneJob(self.model, Path(), data=data, shares=self.shares)
        return mixture(job)


class Texts:
    """What cells are calibrated and trained on: the mixture that `prune` uses.

    Text depends on the seed and the number of steps, not on the method, so that all methods share
    it. What the dense model writes is kept in the table's folder. As for `prune`, longer runs have
    more of it, and untrained cells less.

    Args:
        setting: what cells share.
        tokenizer: the model's tokenizer.
        folder: of the table.
    """

    def __init__(self, setting: Setting, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        self._setting, self._tokenizer, self._folder = setting, tokenizer, folder
        self.specs, self.shares = setting.mixture()
        self._made: dict[tuple[int, int, int], BlockDataset] = {}

    def training(
        self, model: PreTrainedModel, config: NutePruneConfig, plain: NutePruneConfig
    ) -> BlockDataset:
        """Return the text of a cell.

        Args:
            model: the dense model; it writes what it has not written yet.
            config: the cell's settings; more text is read only where they need more.
            plain: the default's settings, for the same seed and steps.
        """
        length, share, tokens = self._setting.length, 0.0, 0
        if SELF in self.specs:
            share = self.shares[self.specs.index(SELF)] / sum(self.shares)
            tokens = max(
                tokens_to_write(x.blocks, x.calibrated_blocks, share, length)
                for x in (config, plain)
            )
        key = (config.seed, max(config.blocks, plain.blocks), tokens)
        if key not in self._made:
            seed, count, _ = key
            self._made[key] = training_blocks(
                self.specs,
                self._tokenizer,
                length=length,
                count=count,
                seed=seed,
                shares=self.shares,
                written=self._written(model, seed, tokens) if tokens else (),
            )
        return self._made[key]

    def _written(self, model: PreTrainedModel, seed: int, tokens: int) -> Sequence[list[int]]:
        folder = self._folder / "self-written" / f"seed-{seed}_{tokens}-tokens"
        length = self._setting.length
        return write(model, self._tokenizer, tokens=tokens, length=length, seed=seed, folder=folder)


class Judge:
    """Judges all models of a table alike.

    Args:
        setting: what cells share.
        tokenizer: of all models.
        specs: what cells are trained on.
        folder: of other text; None: none.

    Raises:
        UserError: if the other text is not there, or is trained on.
    """

    def __init__(
        self,
        setting: Setting,
        tokenizer: PreTrainedTokenizerBase,
        specs: Sequence[str],
        folder: Path | None,
    ) -> None:
        self._setting, self._tokenizer = setting, tokenizer
        self._specs, self._folder = specs, folder

    @cached_property
    def held_out(self) -> HeldOut:
        """Blocks of text of the sources that are trained on, but of its held-out part."""
        s = self._setting
        return held_out_blocks(self._specs, self._tokenizer, length=s.length, count=s.eval_blocks)

    @cached_property
    def other(self) -> dict[str, Tensor]:
        """Blocks of text of sources that are not trained on, domain -> (N, T)."""
        s = self._setting
        known = self.held_out.fingerprints.values()
        domains = domains_of(self._folder, known) if self._folder else {}
        if s.leave_out:
            (source,) = iter_documents(f"{DEMO}:{s.leave_out}").values()
            domains[s.leave_out] = list(held_out_part(source))
        return {
            name: make_blocks(name, half(texts, s.choose), self._tokenizer, OTHER).tokens_NT
            for name, texts in domains.items()
        }

    def figures(self, model: PreTrainedModel) -> dict[str, Any]:
        """Return what is found of a model.

        Returns:
            `perplexity` (source -> perplexity, in-domain), its `mean`, `copying` (percent; None
            where it cannot be measured), and `other` (domain -> perplexity, of other text).
        """
        found = perplexities(model, self.held_out, batch_size=4)
        other = perplexities(model, self.other, batch_size=4)
        seed = CHOOSING_SEED if self._setting.choose else SEED
        copied = copying(model, self._tokenizer, seed=seed)
        percent = copied.percent if copied else None
        return {"perplexity": found, "mean": mean(found), "copying": percent, "other": other}

    def protocol(self) -> dict[str, Any]:
        """Describe how other text and copying are judged, fit for JSON."""
        lines = "odd" if self._setting.choose else "even"
        return {
            "other_text": f"{lines} lines, or held-out stretches of a source that is left out",
            "other_length": OTHER.length,
            "other_blocks": {name: len(x) for name, x in self.other.items()},
            "copying_seed": CHOOSING_SEED if self._setting.choose else SEED,
        }


def half(texts: Sequence[str], choose: bool) -> list[str]:
    """Return the 1st, 3rd, ... texts to choose by, or else the 2nd, 4th, ... to accept by."""
    return list(islice(texts, 0 if choose else 1, None, 2))


def domains_of(folder: Path, trained: Iterable[Fingerprint]) -> dict[str, list[str]]:
    """Return other text: a jsonl file of a folder is a domain, a line of it a text.

    Args:
        folder: the folder; each line of its files is `{"text": ...}`.
        trained: what the sources that are trained on are known by.

    Raises:
        UserError: if there are no such files, a line is another one, or the file is trained on.
    """
    found, trained = {}, list(trained)
    for file in files_of(folder):
        try:
            lines = file.read_text(encoding="utf-8").split("\n")  # not at other line separators
            found[file.stem] = [str(json.loads(x)["text"]) for x in lines if x.strip()]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f'{file}: a line is not {{"text": ...}} ({error!r})') from error
        known = Fingerprint()
        known.add_file(file)
        for text in found[file.stem]:
            known.add_document(text)
        if kind_of(known, trained) == IN_DOMAIN:
            raise UserError(f"{file} is trained on, so it is no other text; pass another folder")
    return found


def files_of(folder: Path) -> list[Path]:
    """Return the files of other text in a folder.

    Raises:
        UserError: if there are none.
    """
    if files := sorted(folder.glob("*.jsonl")):
        return files
    raise UserError(f"{folder}: no jsonl files; each is one domain of other text")


def times_dense(record: Mapping[str, Any], dense: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record's figures ÷ the dense model's.

    Args:
        record: has `mean` and, unless it is an old one, `other`.
        dense: the same of the dense model.

    Returns:
        `in_domain`, `other` (by domain) and its geometric mean, `other_mean`; None without other
        text.
    """
    ours, theirs = record.get("other") or {}, dense.get("other") or {}
    other = {name: x / theirs[name] for name, x in ours.items() if name in theirs}
    middle = statistics.geometric_mean(other.values()) if other else None
    in_domain = record["mean"] / dense["mean"]
    return {"in_domain": in_domain, "other": other, "other_mean": middle}


def rated(record: Mapping[str, Any], dense: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record with `times_dense`, also of its refitted stage; refused ones as they are."""
    if "mean" not in record:
        return dict(record)
    found = {**record, "times_dense": times_dense(record, dense)}
    if "refitted" in record:
        found["refitted"] = rated(record["refitted"], dense)
    return found

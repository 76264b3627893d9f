"""All settings of a run that prunes, each declared once: what a recipe may set.

Nothing heavy is imported, since help, usage errors and most refusals come from here alone.
`train.config.NutePruneConfig` adds what `transformers.TrainingArguments` has.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import lcm
from typing import Any

from nuteprune.errors import UserError
from nuteprune.gates import METHOD, METHOD_NAMES
from nuteprune.model.family import GATE_KINDS
from nuteprune.model.shape import SUPER_BLOCK
from nuteprune.train.asked import DECODE, KINDS, MOMENT, Asked, all_asked, check_one, sparsities
from nuteprune.train.declared import CALL, HOW, check_declared, option, setting

RATE = 4e-4
"""Learning rate of LoRA for projections whose outputs are as large as their inputs; see
`train.prepare.usual_rate`."""


@dataclass
class PruneSettings:
    """Settings of a run that prunes; see `train.config.NutePruneConfig`."""

    target_sparsity: float | str | list[float] = option(
        "Share of the decoder layers' parameters to remove, such as 0.2 (demo's default). "
        "Several (0.2,0.3,0.5) give several checkpoints from one run.",
        0.2,
    )
    target_params: float | str | list[Any] | None = option(
        "Parameters of the result, instead of --sparsity, such as 100M; tied ones count once."
    )
    target_active_params: float | str | list[Any] | None = option(
        "Active parameters of the result, instead of --sparsity, such as 3B: those that one token "
        "uses in a mixture of experts."
    )
    target_size: float | str | list[Any] | None = option(
        "Size of the result's weight file, instead of --sparsity, such as 200MB or 190MiB; in "
        "the checkpoint's dtype."
    )
    target_memory: float | str | list[Any] | None = option(
        "Memory of the result's weights and KV cache, instead of --sparsity: 4GiB@8192 is 4 GiB "
        "with 8192 tokens cached, 4GiB@2x8192 with two such sequences; in the checkpoint's dtype."
    )
    target_speedup: float | str | list[Any] | None = option(
        "Speed to end at, instead of --sparsity, as a multiple of the dense model's: 1.5 is for "
        f"{DECODE} at {MOMENT} (sequences x prompt tokens + new tokens), 1.5@prefill, 1.5@both or "
        "1.5@prefill:1x512+64 for other work. Measured on the run's device, or by --costs. Whole "
        "blocks may go too."
    )
    costs: dict[str, Any] | str | None = option(
        "For --speedup: a table of block times, from nuteprune bench MODEL --save-costs FILE "
        "on any machine. Default: the run measures them.",
        role=CALL,
    )
    shape: dict[str, Any] | str | None = option(
        "YAML or JSON file with the dimensions to cut to, instead of --sparsity. Another "
        "checkpoint's nuteprune.json works too."
    )
    gates: str | None = option(
        f"Kinds of gates, comma separated: {', '.join(GATE_KINDS)}. Default: heads (KV groups "
        "where heads share one) and neurons; of a mixture of experts, experts."
    )
    shapes: str = option(
        "free (default): each layer keeps its own counts. uniform: the same in all layers, a "
        "stock model.",
        "free",
        choices=("free", "uniform"),
    )
    neuron_multiple: int = setting(
        "Each layer keeps a multiple of this many neurons.", 32, bounds=(1, 1e6)
    )
    hidden_multiple: int = setting("The width stays a multiple of this.", 64, bounds=(1, 1e6))
    for_quantization: bool = setting(
        f"Neurons and width in multiples of {SUPER_BLOCK}, which llama.cpp's K-quants need.", False
    )

    method: str = option(
        f"How units are ranked (default {METHOD}): {', '.join(METHOD_NAMES)}.",
        METHOD,
        choices=METHOD_NAMES,
    )
    calibration_blocks: int = setting(
        "Blocks of text for the scores; the refit reads 4.5 times as many.", 32, bounds=(1, 1e6)
    )
    text_blocks: int | None = setting(
        "Blocks of text that the run reads. Default: as many as it needs.", bounds=(1, 1e9)
    )
    teacher: str = setting(
        "Who teaches: dense, or none (learn the text itself).", "dense", choices=("dense", "none")
    )
    progressive: bool = setting(
        "Masks move while the student learns, as in the paper: see recipes/paper.yaml and "
        "nuteprune.progressive.",
        False,
    )
    unlikelihood: float = setting(
        "Weight by which what repeats in the student's own answers is made less likely, in the "
        "last seventh of the steps. At 0, without a chat template, with teacher: none, or with "
        "progressive: true the student reads none.",
        0.3,
        bounds=(0, 1e3),
    )
    lora_rank: int = setting("Rank of the adapters.", 32, bounds=(1, 1e5))
    refit: bool = setting(
        "Refit output and down projections in closed form once units are chosen.", True
    )
    sharded: bool = setting("Shard the dense model's weights over the processes (FSDP2).", False)
    offload: bool = option(
        "Keep the dense model's layers in main memory or on disk; each comes to the device as it "
        "is needed.",
        False,
        role=HOW,
    )

    # Of TrainingArguments: those that recipes set, or that have an option.
    max_steps: int = option(
        "Optimizer steps (default {default}; demo: what --minutes 5 has time for). 0 prunes "
        "without training.",
        160,
        bounds=(0, 1e9),
        name="--steps",
        role=HOW,
    )
    per_device_train_batch_size: int = option(
        "Sequences per forward pass of each process (default {default}; demo 2, with 2 "
        "accumulated).",
        4,
        bounds=(1, 1e6),
        name="--batch-size",
        role=HOW,
    )
    gradient_accumulation_steps: int = setting("Forward passes per step.", 1, role=HOW)
    learning_rate: float | None = setting(
        "Learning rate of LoRA. By default it goes with the size of the weights: 0.002 for the "
        "demo's model, 0.0004 where projections give as much as they take.",
        bounds=(1e-12, 1e3),
    )
    gradient_checkpointing: bool | None = option("Less memory, more time.", role=HOW)
    seed: int = setting("Seed of everything random.", 42, bounds=(0, 2**31 - 1))

    def __post_init__(self) -> None:
        """Check what was given.

        Raises:
            UserError: naming a setting that cannot work.
        """
        check_declared(self)
        for kind in (self.gates or "").split(",") if self.gates else ():
            if kind.strip() not in GATE_KINDS:
                known = ", ".join(GATE_KINDS)
                raise UserError(f"{kind.strip()!r} is not a kind of gate; known kinds: {known}")
        if self.for_quantization:
            self.neuron_multiple = lcm(self.neuron_multiple, SUPER_BLOCK)
            self.hidden_multiple = lcm(self.hidden_multiple, SUPER_BLOCK)
        self._spell_targets()
        self._check_targets()

    def _spell_targets(self) -> None:
        """Bring targets into their canonical spelling, for the record."""
        default = PruneSettings.target_sparsity  # which says nothing
        given = {k: v for k, v in vars(self).items() if (k, v) != ("target_sparsity", default)}
        check_one(given, ["target_sparsity", *(f"target_{x}" for x in KINDS), "shape"])
        targets = self.targets
        self.target_sparsity = targets[0] if len(targets) == 1 else list(targets)
        *larger, last = self.asked
        if last.kind in KINDS:
            told = [*(x.text for x in larger), last.text + last.at]
            setattr(self, f"target_{last.kind}", told if larger else told[0])

    def _check_targets(self) -> None:
        """Refuse targets outside (0, 1), or in falling order."""
        for target in self.targets:
            if not 0 < target < 1:
                raise UserError(
                    f"sparsity is {target:g}; it must lie between 0 and 1, such as 0.2 for 20 %"
                )
        if any(a >= b for a, b in pairwise(self.targets)):
            told = ", ".join(f"{t:g}" for t in self.targets)
            raise UserError(f"targets are {told}; they must grow")

    @property
    def targets(self) -> tuple[float, ...]:
        """The sparsities to reach, growing, where it is sparsity that is asked for."""
        return sparsities(self.target_sparsity)

    @property
    def asked(self) -> tuple[Asked, ...]:
        """The targets, the largest model first; a chosen shape replaces them."""
        for kind in KINDS:
            if (given := getattr(self, f"target_{kind}")) is not None:
                return all_asked(kind, given)
        return tuple(Asked("sparsity", value) for value in self.targets)


@dataclass
class RecoverSettings:
    """What a recovery's trainer and its job have in common."""

    lora_rank: int = option(
        "Rank of LoRA, on all projections (default {default}).", 8, bounds=(1, 1e5)
    )

"""Settings that only the paper's own dynamics have; nothing heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass

from nuteprune.train.declared import setting
from nuteprune.train.settings import PruneSettings


@dataclass
class ProgressiveSettings(PruneSettings):
    """Settings of a run whose masks move; see `progressive.config.ProgressiveConfig`."""

    gate_type: str = setting(
        "ranked (hard masks, whose scores follow gradients), or hard_concrete (the paper's).",
        "ranked",
        choices=("ranked", "hard_concrete"),
    )
    ramp_share: float = setting(
        "Share of the steps after which the target is reached.", 0.5, bounds=(0, 1)
    )
    freeze_share: float | None = setting(
        "Share of the steps after which masks are frozen, if later than ramp_share.", bounds=(0, 1)
    )
    teacher: str = setting(
        "Who teaches: snapshots of the student, dense, or none (learn the text itself).",
        "snapshots",
        choices=("snapshots", "dense", "none"),
    )
    objective: str = setting(
        "relative (layer terms over the teacher's norm), or paper (its own terms and weights).",
        "relative",
        choices=("relative", "paper"),
    )
    lora_targets: str = setting(
        "all projections, or qv: queries and values alone, as in the paper.",
        "all",
        choices=("all", "qv"),
    )

"""Settings that only the paper's own dynamics have; nothing heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass

from nuteprune.train.prune_settings import PruneSettings
from nuteprune.train.settings import setting


@dataclass
class ProgressiveSettings(PruneSettings):
    """Settings of a run whose masks move; see `progressive.config.ProgressiveConfig`."""

    gate_type: str = setting(
        "ranked",
        "ranked (hard masks, whose scores follow gradients), or hard_concrete (the paper's).",
        choices=("ranked", "hard_concrete"),
    )
    ramp_share: float = setting(
        0.5, "Share of the steps by which the target is reached.", bounds=(0, 1)
    )
    freeze_share: float | None = setting(
        None, "Share of the steps by which masks are frozen, if later.", bounds=(0, 1)
    )
    teacher: str = setting(
        "snapshots",
        "snapshots (of the student on its way), dense, or none (the text itself is learned).",
        choices=("snapshots", "dense", "none"),
    )
    objective: str = setting(
        "relative",
        "relative, or paper (its weights and layer terms).",
        choices=("relative", "paper"),
    )
    lora_targets: str = setting("all", "all, or qv (the paper's).", choices=("all", "qv"))

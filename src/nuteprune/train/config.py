"""All settings of a run, with their defaults: what a recipe may set."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import SchedulerType, TrainingArguments

from nuteprune.errors import UserError
from nuteprune.gates.importance import METHODS
from nuteprune.train.checks import (
    GATE_TYPES,
    NUTEPRUNE,
    check_choices,
    check_trainer_settings,
    check_values,
)

FALLS_LATE = {"power": 0.5, "lr_end": 0.0}
"""`lr_scheduler_kwargs` of `polynomial` by default: the square root of what is left."""


@dataclass
class NutePruneConfig(TrainingArguments):
    """Settings of a `NutePruneTrainer`: those below, and all of `transformers.TrainingArguments`.

    Parameters that control what is removed:

    Args:
        target_sparsity: share of the decoder layers' projection parameters to remove, in (0, 1).
        stops: smaller targets on the way, growing, comma separated or a list; the run rests at
            each, and each gives a checkpoint of its own.
        shape: dimensions to cut to, instead of a target: see `model.shape.Shape.cut_to`.
        gates: kinds of gates, comma separated (`heads`, `kv_groups`, `neurons`, `hidden`,
            `attn_block`, `mlp_block`); None: heads (KV groups under grouped-query attention) and
            neurons, or what the scoring is made for (`similarity`: both blocks).
        shapes: `free` (each layer its own counts) or `uniform` (the same in all).
        neuron_multiple: neurons kept per layer are a multiple of it.
        hidden_multiple: the width kept is a multiple of it.

    Parameters that control how gates are learned:

    Args:
        method: `nuteprune` (masks start from `importance` and, on a ramp, are learned), or a
            one-shot scoring of `gates.importance.METHODS` (`random`, `magnitude`, `wanda`, `flap`,
            `taylor`, `fisher`, `surgeon`, `similarity`) whose masks are frozen at the target before
            the first step; the steps then train LoRA alone, by the same distillation.
        importance: `nuteprune` only: the one-shot scoring that gates start from.
        gate_type: `ranked` (hard masks by the scores, which a ramp re-estimates from gradients),
            `hard_concrete` (the paper's stochastic gates) or `deterministic` (rectified multipliers
            without noise).
        warm_start: start gates from the one-shot importance.
        solved_schedule: soft gates only: solve each step for expected sparsity equal to the
            schedule's; False: the Lagrangian, as published.
        calibration_blocks: blocks of text for the one-shot importance.
        ramp_share: share of the steps by which the target is reached; masks are frozen there. 0:
            at the first step; without a ramp there are no teachers on the way. None: 0 for ranked
            gates, 0.5 for soft ones.
        freeze_share: share of the steps by which masks are frozen, if later than the ramp's end;
            None: as `ramp_share`. Both 0: masks are frozen, and LoRA starts from the re-fit, before
            the first step.
        ramp_power: 1: the schedule rises linearly; 3: cubically, slower towards the target.
        score_decay: `ranked` only: weight of the past in the moving average of scores.
        gate_learning_rate: soft gates only: rate of log-alpha and of the Lagrangian's multipliers;
            deterministic gates move at a quarter of it.

    Parameters that control distillation:

    Args:
        teachers: `numerous` (snapshots on the way), `dense` (the dense model alone), `none`.
        token_weight: weight of the token-level KL divergence.
        layer_weight: weight of the mean (`mse`: sum) of the layers' terms.
        layer_term: `relative` (per token, relative to the teacher's norm) or `mse` (the paper's).
        kd_temperature: softening of both token distributions.
        lm_weight: weight of the language-model loss; 0: none, which is the default, since on
            in-domain text it lowers perplexity without preserving the model.

    Parameters that control LoRA and the re-fit:

    Args:
        lora_rank: rank of the adapters.
        lora_alpha: their scale is alpha / rank.
        lora_targets: `all` projections or `qv` (queries and values, the paper's).
        compensation: re-fit the output and down projections in closed form: `start` (when masks
            freeze, as low-rank start of LoRA), `finalize`, or `none`.
        compensation_blocks: blocks of text for the re-fit.

    Parameters of the run:

    Args:
        sharded: share the dense model's weights out over the run's processes (FSDP2); gates and
            LoRA stay whole in each.
        max_bad_steps: stop after so many steps in a row whose loss or gradients are not finite.
    """

    target_sparsity: float = field(default=0.2, metadata={"help": "Share to remove, in (0, 1)."})
    stops: list[float] | str | None = field(
        default=None, metadata={"help": "Smaller targets on the way."}
    )
    shape: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Dimensions to cut to, instead of a target."}
    )
    gates: str | None = field(default=None, metadata={"help": "Kinds of gates, comma separated."})
    shapes: str = field(default="free", metadata={"help": "free or uniform."})
    neuron_multiple: int = field(default=32, metadata={"help": "Multiple of neurons kept."})
    hidden_multiple: int = field(default=64, metadata={"help": "Multiple of the width kept."})

    method: str = field(default=NUTEPRUNE, metadata={"help": "nuteprune, or a one-shot scoring."})
    importance: str = field(default="surgeon", metadata={"help": "Scoring that gates start from."})
    gate_type: str = field(
        default="ranked", metadata={"help": "ranked, hard_concrete or deterministic."}
    )
    warm_start: bool = field(default=True, metadata={"help": "Start from one-shot importance."})
    solved_schedule: bool = field(default=True, metadata={"help": "Solve instead of Lagrangian."})
    calibration_blocks: int = field(default=32, metadata={"help": "Blocks for importance."})
    ramp_share: float | None = field(
        default=None, metadata={"help": "Steps until the target, as a share."}
    )
    freeze_share: float | None = field(default=None, metadata={"help": "Steps until masks freeze."})
    ramp_power: float = field(default=1.0, metadata={"help": "1 linear, 3 cubic."})
    score_decay: float = field(default=0.99, metadata={"help": "Weight of past scores."})
    gate_learning_rate: float = field(default=0.1, metadata={"help": "Learning rate of log-alpha."})

    teachers: str = field(default="numerous", metadata={"help": "numerous, dense or none."})
    token_weight: float = field(default=1.0, metadata={"help": "Weight of the token KL."})
    layer_weight: float = field(default=1.0, metadata={"help": "Weight of the layer terms."})
    layer_term: str = field(default="relative", metadata={"help": "relative or mse."})
    kd_temperature: float = field(default=1.0, metadata={"help": "Softening of distributions."})
    lm_weight: float = field(default=0.0, metadata={"help": "Weight of the LM loss."})

    lora_rank: int = field(default=32, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale is alpha / rank."})
    lora_targets: str = field(default="all", metadata={"help": "all or qv."})
    compensation: str = field(default="start", metadata={"help": "none, start or finalize."})
    compensation_blocks: int = field(default=48, metadata={"help": "Blocks for the re-fit."})
    sharded: bool = field(default=False, metadata={"help": "Share weights out over processes."})
    max_bad_steps: int = field(default=3, metadata={"help": "Non-finite steps in a row allowed."})

    # Defaults of TrainingArguments that differ here.
    learning_rate: float = field(default=2e-3, metadata={"help": "Learning rate of LoRA."})
    lr_scheduler_type: SchedulerType | str = field(
        default="polynomial", metadata={"help": "How the learning rate falls."}
    )
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Settings of the schedule; power 0.5 for polynomial."}
    )
    weight_decay: float = field(default=0.01, metadata={"help": "Of LoRA; gates have none."})
    max_steps: int = field(default=80, metadata={"help": "Optimizer steps."})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Sequences per step."})
    logging_steps: float = field(default=1, metadata={"help": "Steps between logs."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide NaN losses."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Drop columns."})
    report_to: str | list[str] | None = field(default="none", metadata={"help": "Trackers."})

    def __post_init__(self) -> None:
        if self.lr_scheduler_kwargs is None and self.lr_scheduler_type == SchedulerType.POLYNOMIAL:
            self.lr_scheduler_kwargs = dict(FALLS_LATE)
        super().__post_init__()
        check_trainer_settings(self)
        check_choices(self)
        if self.ramp_share is None:
            self.ramp_share = GATE_TYPES[self.gate_type]
        if self.freeze_share is None:
            self.freeze_share = self.ramp_share
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = self.gate_type != "ranked"  # frozen gates are unused
        check_values(self)

    @property
    def targets(self) -> tuple[float, ...]:
        """The stops, then the target."""
        stops = self.stops or ()
        parts = stops.split(",") if isinstance(stops, str) else stops
        try:
            return (*(float(part) for part in parts), self.target_sparsity)
        except (TypeError, ValueError) as error:
            raise UserError(f"stops are {stops!r}; write shares such as 0.2,0.3") from error

    @property
    def one_shot(self) -> bool:
        """Whether masks are those of a one-shot scoring from the first step on."""
        return self.method != NUTEPRUNE

    @property
    def shares(self) -> tuple[float, float]:
        """Shares of a target's steps by which it is reached, and masks are frozen."""
        if self.one_shot:
            return 0.0, 0.0
        assert self.ramp_share is not None
        assert self.freeze_share is not None
        return self.ramp_share, self.freeze_share

    @property
    def scoring(self) -> str:
        """The one-shot scoring: a key of `METHODS`."""
        return self.method if self.one_shot else self.importance

    @property
    def scored_blocks(self) -> int:
        """Blocks that the one-shot importance reads, those without gradients among them."""
        method = METHODS[self.scoring]
        return self.calibration_blocks * max(int(method.reads), method.reads_plain)

    @property
    def blocks(self) -> int:
        """Blocks that the run needs: its steps, its scores and its re-fit share them."""
        each = int(self.train_batch_size * self.gradient_accumulation_steps * self.world_size)
        return max(self.max_steps * each, self.scored_blocks, self.compensation_blocks)

    @property
    def gate_kinds(self) -> tuple[str, ...] | None:
        """Kinds of gates asked for, None to let the model decide."""
        if not self.gates:
            return METHODS[self.scoring].default_kinds
        return tuple(k.strip() for k in self.gates.split(","))

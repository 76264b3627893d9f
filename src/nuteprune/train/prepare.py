"""A dense model made ready for a run: LoRA on it, hooks in it, its targets checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer_utils import set_seed

from nuteprune.distill.coforward import CoForward
from nuteprune.errors import UserError
from nuteprune.export.record import origin_of, read_record
from nuteprune.model.anatomy import Anatomy, silence_dropout
from nuteprune.model.hooks import MaskHooks
from nuteprune.model.lora import LoraBank
from nuteprune.model.trainable import add_lora, leave_out
from nuteprune.model.weights import is_packed, offload, shard_base, weight_of
from nuteprune.run_folder import RECORD
from nuteprune.simulated import has_data
from nuteprune.stages import Prunable
from nuteprune.train.checks import check_checkpointing, check_given, check_placement
from nuteprune.train.config import NutePruneConfig
from nuteprune.train.constraints import check_stock, make_allocator
from nuteprune.train.settings import RATE
from nuteprune.train.targets import Prices, Target, run_targets


@dataclass(frozen=True)
class Origin:
    """Facts of the dense model, which a run uses up.

    Args:
        parameters: all of it, tied ones once.
        entries: the record's entry on where it comes from; see `export.record.origin_of`.
        stored_dtype: dtype of the source checkpoint, which the result keeps.
        computed_dtype: of the model itself.
        tokens: how many of the parameters went with tokens before the run.
    """

    parameters: int
    entries: Mapping[str, Any]
    stored_dtype: torch.dtype
    computed_dtype: torch.dtype
    tokens: int = 0

    @classmethod
    def of(cls, dense: Anatomy, stored_dtype: torch.dtype | None = None) -> Origin:
        """Look at a model before anything is changed in it.

        Args:
            dense: the model.
            stored_dtype: of its checkpoint; None: the model's own.
        """
        name = dense.config._name_or_path
        pruned_before = bool(name) and (Path(name) / RECORD).is_file()
        earlier = read_record(Path(name)) if pruned_before else None
        return cls(
            dense.parameters(),
            origin_of(name or None, earlier),
            stored_dtype or dense.model.dtype,
            dense.embedding.weight.dtype,
        )


@dataclass(frozen=True)
class Prepared(Prunable):
    """A dense model with the hooks, LoRA and targets of a run.

    Args:
        origin: facts of the dense model.
        model: the dense model with LoRA.
        coforward: the two roles that it plays.
        prices: the costs of a model of any shape.
        targets: the sizes to cut it to, the largest first.
    """

    origin: Origin
    model: PeftModel
    coforward: CoForward
    prices: Prices
    targets: tuple[Target, ...]

    @property
    def must_be_reloaded(self) -> bool:
        """Whether the dense model must be loaded anew to be cut.

        It must if the run's own is sharded, packed, or of a narrower dtype than its file.
        """
        stored, own = self.origin.stored_dtype, self.origin.computed_dtype
        return not self.has_whole_weights or torch.promote_types(stored, own) != own

    def check_can_be_cut(self) -> None:
        """Refuse to cut the run's own model if the dense one must be loaded anew.

        Raises:
            UserError: saying how to load it.
        """
        if self.must_be_reloaded:
            raise UserError(
                "weights that are sharded, in 8 or 4 bits, or narrower than they are stored cannot "
                "be cut: load the model again, whole and in full precision, and call "
                "finalize(dense=...), in all processes"
            )

    def unwrapped(self) -> PreTrainedModel:
        """Return the dense model without hooks and LoRA."""
        self.hooks.remove()
        self.bank.release()
        return cast(PreTrainedModel, self.model.unload())

    def free(self) -> None:
        """Drop the model's own weights, to make room for another; LoRA stays."""
        self.hooks.remove()
        self.bank.release()
        for name, module in self.model.get_base_model().named_modules():
            if "lora_" not in name:
                module._parameters = dict.fromkeys(module._parameters)
                state = cast(Any, getattr(module, "state", None))
                if hasattr(state, "CB"):  # 8 bits have copies beside the parameters
                    state.CB = state.SCB = None


def offload_if_asked(anatomy: Anatomy, args: NutePruneConfig, origin: Origin) -> None:
    """Offload the frozen layers of a run's model, dense or pruned, if its settings ask for it.

    Args:
        anatomy: the model.
        args: the run's settings, which may ask for it.
        origin: facts of the dense model.
    """
    if not args.offload:
        return
    # Else the checkpoint's own files stand behind them.
    converted = origin.computed_dtype != origin.stored_dtype
    on_disk = converted and args.device.type == "cpu"
    offload(anatomy, args.device, Path(cast(str, args.output_dir)) if on_disk else None)


def usual_rate(anatomy: Anatomy) -> float:
    """Return the learning rate where none is given: `RATE` times the mean gain of the projections.

    Adam changes LoRA by about the rate in each step, and so the output of a projection by the same
    amount whatever its weights are. For the change to be as large a share of the output in every
    model, the rate goes with the gain. That of two models differs fivefold: see docs/log.md.

    Args:
        anatomy: the dense model.

    Returns:
        The rate, rounded to two digits.
    """
    layers = range(len(anatomy.layers))
    found = (anatomy.linear(i, p) for i in layers for p in anatomy.family.projections)
    gains = [gain(x) for x in found if x is not None]
    return float(f"{RATE * fmean(gains or [1.0]):.2g}")


def gain(linear: nn.Linear) -> float:
    """Return how much larger a projection's outputs are than its inputs, if these are random.

    That is the root mean square of its weights times the root of its number of inputs. Without
    data it is 1.
    """
    weight: Tensor = weight_of(linear)
    if not has_data(weight) or weight.is_meta:
        return 1.0
    size = torch.linalg.vector_norm(weight, dtype=torch.float32)
    return float(size) / math.sqrt(weight.numel() / linear.in_features)


def _make_trainable(model: PreTrainedModel) -> None:
    """Let gradients pass through packed weights; other weights stay as they are.

    Raises:
        UserError: if they were packed by another quantizer, or cannot be unpacked here.
    """
    if not is_packed(model):
        return
    # The quantizer whose weights can be computed with, differentiated through and unpacked.
    if getattr(model, "quantization_method", None) != "bitsandbytes":
        raise UserError(
            "the model's weights are quantised, and not by bitsandbytes, with which alone it can "
            "be pruned in 8 or 4 bits; load it in bfloat16, or with BitsAndBytesConfig"
        )
    for name, module in model.named_modules():
        packed, weight = cast(Any, module), cast(Any, getattr(module, "weight", None))
        state = getattr(weight, "quant_state", None)
        if state is None:  # whole, or in 8 bits
            continue
        # On CPUs, bitsandbytes 0.50 takes the scales of rows that no block ends with wrongly ...
        if weight.device.type == "cpu" and packed.in_features % state.blocksize:
            raise UserError(
                f"{name} has {packed.in_features} inputs, and in 4 bits a CPU unpacks rightly only "
                f"multiples of {state.blocksize}; use 8 bits, or another device"
            )
        # ... and packs anew, into a form without gradients, what runs without them once.
        packed.support_avx512bf16_for_cpu = False


def prepare(
    model: PreTrainedModel,
    args: NutePruneConfig,
    stored_dtype: torch.dtype | None = None,
    given: Mapping[str, Any] | None = None,
) -> Prepared:
    """Wrap a dense model for a run.

    Args:
        model: a dense causal LM; it is changed in place.
        args: the run's settings; a learning rate that is left open is set.
        stored_dtype: of the checkpoint that it is from; None: the model's own.
        given: what its trainer will be given beside these.

    Raises:
        UserError: for an unsupported model, gates that its family cannot take, a target out of the
            gates' reach, or what no run can do; before anything is changed.
    """
    check_given(model, given or {})
    check_placement(args, is_packed(model))
    check_checkpointing(model, args)
    _make_trainable(model)
    dense = Anatomy(model)
    origin = Origin.of(dense, stored_dtype)
    allocator = make_allocator(dense, args)
    # Fails early, before the model is touched, if a target is out of reach.
    prices = Prices.of(dense, origin.stored_dtype, args)
    targets = run_targets(allocator, args, prices)
    check_stock(dense, allocator, targets[-1].goal)
    if args.learning_rate is None:
        args.learning_rate = usual_rate(dense)
    silence_dropout(model)
    set_seed(args.seed)
    rank, narrow = args.lora_rank, args.has_narrow_lora
    peft_model = add_lora(dense, r=rank, lora_alpha=rank, queries_and_values=narrow)
    anatomy = Anatomy(peft_model)
    hooks = MaskHooks(anatomy)
    bank = LoraBank(anatomy, Path(cast(str, args.output_dir)))
    if args.sharded:
        shard_base(anatomy, args.device)
    leave_out(peft_model)
    offload_if_asked(anatomy, args, origin)
    return Prepared(
        anatomy=anatomy,
        hooks=hooks,
        bank=bank,
        allocator=allocator,
        is_sharded=args.sharded,
        origin=origin,
        model=peft_model,
        coforward=CoForward(anatomy, hooks, bank, args.losses),
        prices=prices,
        targets=targets,
    )

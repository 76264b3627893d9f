"""Refuses settings that no run supports, and settings that do not go together."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from accelerate.utils import parse_flag_from_env
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from nuteprune.errors import UserError

if TYPE_CHECKING:
    from nuteprune.train.config import NutePruneConfig

SHARDING = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
"""How `accelerate launch` asks for it, whatever the settings say."""
UNSUPPORTED = {
    "load_best_model_at_end": "is not supported: checkpoints of a run are not models; leave it out",
    "push_to_hub": "would upload a run's state, which is no model: leave it out, and upload the "
    "folder of the result with hf upload",
    "save_only_model": "is not supported: a run could not go on from its checkpoints; leave it out",
    "label_smoothing_factor": "is {value}, and no loss here smooths labels: leave it out",
    "use_liger_kernel": "patches the model's own forward passes, which masks and two roles have "
    "never been tested with: leave it out",
    "torch_compile": "is not supported: hooks come and go in each step, which compiled code would "
    "not see; leave it out",
}
"""transformers' settings that no run supports -> why, and what to do."""
UNSUPPORTED_HERE = {
    "auto_find_batch_size": "would begin anew in the middle: pass a smaller batch",
    "fp16": "with loss scaling is not supported: use bf16, or load the model in another dtype",
    "bf16_full_eval": "would round the model: leave it out",
    "fp16_full_eval": "would round the model: leave it out",
}
"""The same of runs that prune."""
UNSUPPORTED_ARGUMENTS = {
    "optimizers": "would not have what is trained, since LoRA is added here: use the settings "
    "optim and lr_scheduler_type, or optimizer_cls_and_kwargs",
    "compute_loss_func": "is not called: the losses are those of objective",
    "compute_metrics": "needs logits, which are never held: leave it out; there is eval_loss",
}
"""The same of the arguments of `transformers.Trainer`."""


def check_given(model: PreTrainedModel, kwargs: Mapping[str, Any]) -> None:
    """Refuse a model with adapters, and settings of Trainer that runs do not support.

    Raises:
        UserError: naming what to do instead.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise UserError("the model has adapters already: load it anew, or merge_and_unload() them")
    places = set((getattr(model, "hf_device_map", None) or {}).values())
    if len(places) > 1:
        raise UserError(
            f"the model's weights are spread over {', '.join(sorted(map(str, places)))}: load it "
            "without device_map, and use the settings sharded or offload"
        )
    given = {**kwargs, "optimizers": any(kwargs.get("optimizers") or ())}
    _refuse(given, UNSUPPORTED_ARGUMENTS)


def check_whole(args: TrainingArguments) -> None:
    """Refuse Trainer's own sharding: on CPU it would silently be DDP, and it knows no two roles.

    Raises:
        UserError: if settings or the launcher ask for it.
    """
    if args.fsdp or args.deepspeed or any(map(parse_flag_from_env, SHARDING)):
        raise UserError(
            "fsdp and deepspeed are not supported: leave them out, of accelerate's config too; "
            "pruning shares weights out over processes by the setting sharded"
        )


def check_placement(args: NutePruneConfig, packed: bool) -> None:
    """Refuse sharding and offloading where they cannot work, or would save nothing.

    Args:
        args: the run's settings.
        packed: whether weights are in 8 or 4 bits.

    Raises:
        UserError: saying what to leave out.
    """
    check_whole(args)
    if args.offload and packed:
        raise UserError("weights in 8 or 4 bits cannot be offloaded: leave out --bits or --offload")
    if args.offload and (args.sharded or args.world_size > 1):
        raise UserError("offload is for one process, sharded for several: leave out one of the two")
    if args.offload and args.bf16:
        raise UserError("bf16 keeps casts on the device: with offload use --dtype bfloat16 instead")
    if args.sharded and args.world_size < 2:
        raise UserError(
            "sharded is for several processes: start them with torchrun, or leave it out"
        )
    if args.sharded and packed:
        raise UserError("weights in 8 or 4 bits cannot be sharded: leave out one of the two")


def check_checkpointing(model: PreTrainedModel, args: TrainingArguments) -> None:
    """Refuse activation checkpointing that hooks of layers and shared masks do not support.

    In the re-entrant form backward passes end at each layer's edge. All layers share one set of
    masks, whose graph the first of those passes would free. Older releases of transformers
    checkpoint a layer with its hooks, which compare it with the teacher's in the forward pass
    alone.

    Raises:
        UserError: if the settings ask for it, or the model has it already.
    """
    if args.gradient_checkpointing and "__call__" in vars(GradientCheckpointingLayer):
        raise UserError(
            f"gradient checkpointing does not work here with transformers {version('transformers')}"
            ": pip install --upgrade transformers"
        )
    asked = args.gradient_checkpointing_kwargs if args.gradient_checkpointing else None
    there = () if args.gradient_checkpointing else model.modules()  # else the settings' replaces it
    functions = (
        getattr(module, "_gradient_checkpointing_func", None)
        for module in there
        if getattr(module, "gradient_checkpointing", False)
    )
    found = [asked, *(getattr(function, "keywords", None) for function in functions)]
    # Where it is left out, torch takes True.
    if any(isinstance(x, dict) and x.get("use_reentrant", True) for x in found):
        raise UserError(
            "activation checkpointing is re-entrant (use_reentrant is not False), so each layer "
            "would go back on its own through the masks that all share: pass "
            "gradient_checkpointing=True alone, or use_reentrant=False"
        )


def check_trainer_settings(args: TrainingArguments) -> None:
    """Refuse unsupported settings, and keep each process to one accelerator.

    Trainer would spread a process over all that it sees (DataParallel), but hooks and masks belong
    to one copy of the model; several accelerators need several processes.

    Raises:
        UserError: naming the setting.
    """
    _refuse(vars(args), UNSUPPORTED)
    if args.n_gpu > 1:
        args._n_gpu = 1


def check_combinations(args: NutePruneConfig) -> None:
    """Refuse settings that do not go together.

    Args:
        args: the settings.

    Raises:
        UserError: saying which to leave out.
    """
    if args.num_train_epochs != TrainingArguments.num_train_epochs:
        raise UserError("num_train_epochs is not counted by: pass max_steps")
    _refuse(vars(args), UNSUPPORTED_HERE)


def _refuse(given: Mapping[str, Any], unsupported: Mapping[str, str]) -> None:
    for name, why in unsupported.items():
        if value := given.get(name):
            raise UserError(f"{name} {why.format(value=value)}")

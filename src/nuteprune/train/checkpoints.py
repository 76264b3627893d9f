"""A Trainer that can be stopped or killed at any moment, and resumed."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from peft import PeftModel
from torch import distributed as dist
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from nuteprune.errors import Interrupted, UserError
from nuteprune.files import (
    sync,
    sync_tree,
    to_json,
    write_json,
    write_sums,
    writing,
)
from nuteprune.model.forwards import special_tokens_kept
from nuteprune.processes import several
from nuteprune.run_folder import METRICS, SETTINGS
from nuteprune.train.config import RunArguments
from nuteprune.train.declared import check_same, run_settings
from nuteprune.train.state import (
    RunState,
    check_checkpoint,
    check_places,
    cut_metrics,
    last_checkpoint,
    own_checkpoints,
)

PARTIAL = ".partial"
"""A checkpoint that is being written or removed, in a run's folder."""


class StopSignals(TrainerCallback):
    """On Ctrl-C or SIGTERM: let the step end, save, stop. A second signal stops at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received = self.obeyed = 0
        self._before: dict[int, Any] = {}

    def _note(self, number: int, _: Any) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = number

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Listen, where Python lets us: in the main thread."""
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._note) for n in self.SIGNALS}

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:
        """Save and stop, in all processes alike."""
        stop = self.received
        if several():
            flag = torch.tensor(stop, device=args.device)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            stop = int(flag)
        if stop:  # its own first signal may still come, and is not a second one
            self.obeyed = stop
            control.should_save = control.should_training_stop = True

    def restore(self) -> None:
        """Restore the earlier signal handlers, if Python knew them."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}


class AtomicTrainer(Trainer):
    """`transformers.Trainer` for runs that may be stopped or killed at any moment.

    Trainer writes into `checkpoint-N` directly, and would resume from a half-written one; here a
    checkpoint is written beside its place and moved there when it is complete. Each step's line is
    in `metrics.jsonl`, cut back to the checkpoint on resume. Signals that ask to stop are obeyed at
    the end of the step. A subclass defines its state; the base model is not stored.

    Args:
        model: what is trained, LoRA on it.
        args: the run's settings.
        job: the job's settings, which go into run/settings.json too.
        **kwargs: passed on to `transformers.Trainer`.
    """

    args: RunArguments
    how_to_write = "call finalize(), then save_pruned(FOLDER)"
    """How a checkpoint that others load is written."""
    _checkpoint_dir: Path | None = None

    def settings(self) -> dict[str, Any]:
        """Return the run's settings in their canonical spelling; see `run_settings`."""
        return run_settings(self.args, self._job)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Refuse to save a model during a run, whose state is in its checkpoints.

        Raises:
            UserError: unless Trainer writes a checkpoint.
        """
        if not _internal_call:
            raise UserError(f"save_model would write no model: {self.how_to_write}")
        super().save_model(output_dir, _internal_call)

    def push_to_hub(self, *_: Any, **__: Any) -> Any:
        """Refuse to upload a run's state.

        Raises:
            UserError: saying how to upload the result.
        """
        raise UserError(
            f"push_to_hub would upload no model: {self.how_to_write}, and upload that folder with "
            "hf upload"
        )

    def run_state(self) -> RunState:
        """Return the state that a checkpoint holds besides Trainer's own."""
        raise NotImplementedError

    def take_state(self, state: RunState) -> None:
        """Go back to a state that `run_state` returned."""
        raise NotImplementedError

    def __init__(
        self,
        model: PeftModel,
        args: RunArguments,
        job: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        config: Any = model.config
        self._job = dict(job or {"model": config._name_or_path})
        caches = getattr(config, "use_cache", None)
        super().__init__(model=model, args=args, **kwargs)
        if caches is not None:  # Trainer sets its own, and the result would come with it
            config.use_cache = caches

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Run the steps; see `transformers.Trainer.train`.

        Steps and checkpoints of an earlier run of this kind in the same folder are removed, unless
        the run resumes from one of them.

        Raises:
            Interrupted: if a signal asked to stop; a checkpoint is written before.
            UserError: if there is nothing to resume from, or it is damaged.
            RunFailed: if a checkpoint cannot be written.
        """
        checkpoint = self._to_resume(resume_from_checkpoint)
        run = self.run_folder
        if checkpoint is not None:
            check_checkpoint(Path(checkpoint))
            if (home := Path(checkpoint).resolve().parent) != run.resolve():
                raise UserError(f"{checkpoint} is of a run elsewhere: set output_dir to {home}")
            now = self.settings()
            also = ["max_steps"] if now.get("progressive") else []
            if self.args.max_steps <= 0:  # passes over the text are counted in steps of this size
                also = ["sequences_per_step"]
            check_same(run, now, type(self.args), also=also)
            state = trainer_state(Path(checkpoint))
            if self.args.should_save:
                self._remove_old()  # a kill may have come between
            if 0 < self.steps() <= state.global_step:  # Trainer would take one more
                self._load_from_checkpoint(checkpoint)
                self.state = state
                return TrainOutput(state.global_step, 0.0, {})
        elif self.args.should_save:
            self.metrics_file.unlink(missing_ok=True)
            for folder in own_checkpoints(run):  # else a resumed run would go on from them
                shutil.rmtree(folder)
            check_places(run, self.steps())
            write_json(run / SETTINGS, self.settings())
        set_seed(self.args.seed)  # the order of the text is drawn from torch's seed of the moment
        signals = StopSignals()
        self.add_callback(signals)
        try:
            with special_tokens_kept(cast(nn.Module, self.model)):
                result = super().train(checkpoint, *args, **kwargs)
        except UnpicklingError as error:  # torch's own words say how to run the code after all
            raise UserError(
                f"cannot resume: a file in {checkpoint} asks for more than tensors, which "
                "nuteprune did not write; resume only runs of your own"
            ) from error
        finally:
            signals.restore()
            self.remove_callback(signals)
        if signals.obeyed:
            raise Interrupted(
                f"stopped after step {self.state.global_step} of {self.state.max_steps}, which is "
                "saved; go on with the same command and --resume",
                signals.obeyed,
            )
        if signals.received:  # it came after the last step
            signal.raise_signal(signals.received)
        return result

    def steps(self) -> int:
        """Return how many steps there are in all, also where passes over the text are counted."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        counted = self.set_initial_training_values(self.args, self.get_train_dataloader())
        return int(counted[-1])

    def _to_resume(self, asked: str | bool | None) -> str | None:
        """Return the checkpoint that is asked for, True being the newest one."""
        if asked is not True:
            return str(asked) if asked else None
        if (found := last_checkpoint(self.run_folder)) is None:
            raise UserError(f"nothing to resume: no complete checkpoint is in {self.run_folder}")
        return str(found)

    @property
    def run_folder(self) -> Path:
        """Where the run's files are."""
        return Path(cast(str, self.args.output_dir))

    @property
    def metrics_file(self) -> Path:
        """Where each step's line goes."""
        return self.run_folder / METRICS

    def figures(self) -> dict[str, float]:
        """Return the method's figures for a step's line in the logs."""
        return {}

    def note(self, logs: Mapping[str, Any]) -> str:
        """Return the note to show beside the progress bar, from a step's logs."""
        return f"loss {logs['loss']:.3f}"

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the method's figures to the logs, and each step's line to metrics.jsonl."""
        if "loss" in logs:
            logs |= self.figures()
            if self.args.should_save:
                line = to_json({"step": self.state.global_step, **logs}) + "\n"
                with writing(self.metrics_file, self._how_to_go_on()):
                    self.metrics_file.parent.mkdir(parents=True, exist_ok=True)
                    with self.metrics_file.open("a", encoding="utf-8") as file:
                        file.write(line)
        super().log(logs, start_time)

    def _how_to_go_on(self) -> str:
        last = last_checkpoint(self.run_folder)
        begin = "begin anew" if last is None else f"go on from {last.name}"
        return f"make room, then {begin} with the same command and --resume"

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:  # Trainer asks all processes
            return
        folder = Path(output_dir or self.run_folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.run_state().save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        self.take_state(RunState.load(folder))
        if self.args.should_save and self.metrics_file.exists():
            cut_metrics(self.metrics_file, trainer_state(folder).global_step)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint beside its place, and move it there when it is complete."""
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        run, partial = self.run_folder, self.run_folder / PARTIAL
        with writing(run / name, self._how_to_go_on()):
            if self.args.should_save:
                shutil.rmtree(partial, ignore_errors=True)
            self.accelerator.wait_for_everyone()  # each process adds its own random state
            self._checkpoint_dir = partial
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._checkpoint_dir = None
            if self.state.best_model_checkpoint is not None:  # a folder that will not be there
                self.state.best_model_checkpoint = None
                if self.args.should_save:
                    self.state.save_to_json(str(partial / name / TRAINER_STATE_NAME))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                write_sums(partial / name)
                sync_tree(partial)
                if self.metrics_file.exists():  # its lines up to this step as well
                    sync(self.metrics_file)
                shutil.rmtree(run / name, ignore_errors=True)
                os.replace(partial / name, run / name)
                sync(run)
                self._remove_old()
            self.accelerator.wait_for_everyone()

    def _remove_old(self) -> None:
        """Remove checkpoints beyond `save_total_limit`, each at once, and what a kill left."""
        partial, most = self.run_folder / PARTIAL, self.args.save_total_limit or 0
        shutil.rmtree(partial, ignore_errors=True)
        for folder in own_checkpoints(self.run_folder)[:-most] if most > 0 else ():
            with suppress(OSError):  # one that is kept does no harm
                os.replace(folder, partial)
            shutil.rmtree(partial, ignore_errors=True)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._checkpoint_dir or super()._get_output_dir(trial))


def trainer_state(checkpoint: Path) -> TrainerState:
    """Return Trainer's state in a checkpoint, even if its folder was renamed.

    Raises:
        UserError: if that cannot be read.
    """
    path = checkpoint / TRAINER_STATE_NAME
    try:
        return cast(TrainerState, TrainerState.load_from_json(str(path)))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot resume from {checkpoint}: {path.name} is damaged") from error

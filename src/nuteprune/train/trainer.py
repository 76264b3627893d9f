"""NutePruneTrainer: a run on top of `transformers.Trainer`, from masks to the smaller checkpoint.

The trainer is given masks and refitted weights, or calls the stages that make them. Its steps are
those of `train.distiller`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nuteprune.console import Progress, silent
from nuteprune.data.training_text import collated
from nuteprune.distill.coforward import text_loss
from nuteprune.distill.losses import Head
from nuteprune.errors import UserError
from nuteprune.files import write_json
from nuteprune.gates.masks import Masks
from nuteprune.model.lora import Learned, Weights
from nuteprune.model.weights import bring_home
from nuteprune.products import Products
from nuteprune.run_folder import SETTINGS
from nuteprune.stages.save import save
from nuteprune.stages.slice import Sliced, slice_model
from nuteprune.train.config import NutePruneConfig
from nuteprune.train.declared import chosen_settings
from nuteprune.train.distiller import Distiller
from nuteprune.train.first_stages import FirstStages, calibration_blocks, check_text
from nuteprune.train.own_answers import PROMPTED, OwnAnswers, can_be_asked, own_answers
from nuteprune.train.prepare import Prepared, prepare
from nuteprune.train.targets import Target


class NutePruneTrainer(Distiller):
    """Distils the dense model into the cut one.

    Args:
        model: a dense causal LM of a supported family, which is wrapped with LoRA, or one that is
            prepared; `finalize` uses it up.
        args: the run's settings.
        train_dataset: items with `input_ids` (T,) of equal length and, where there is padding,
            `attention_mask` (T,).
        processing_class: the tokenizer, saved with the result.
        masks: the units to keep; None: the stages decide.
        weights: what `refit` returned for these masks.
        target: which of the model's targets they are for; None: the last one.
        products: where the stages leave what they make; None: in the run's folder.
        progress: told about long work outside of training.
        stored_dtype: of the checkpoint that the model is from, which the result keeps; None: the
            model's own.
        **kwargs: `job`, the job's settings (model, data and so on), which go into
            run/settings.json too; the others are passed on to `transformers.Trainer`.

    Raises:
        UserError: for an unsupported model, gates that its family cannot take, a target out of the
            gates' reach, or a dataset that is empty or has no length; before anything is changed.
    """

    def __init__(
        self,
        model: PreTrainedModel | Prepared,
        args: NutePruneConfig,
        train_dataset: Dataset[Any] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        masks: Masks | None = None,
        weights: Weights | None = None,
        target: Target | None = None,
        products: Products | None = None,
        progress: Progress = silent,
        stored_dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        collator = kwargs.pop("data_collator", None) or collated
        if train_dataset is not None:
            check_text(train_dataset, alike=collator is collated)
        if isinstance(model, PreTrainedModel):
            model = prepare(model, args, stored_dtype, kwargs)
        self.target, self.weights, self.products = target or model.targets[-1], weights, products
        self.sliced: Sliced | None = None
        self._progress, self._used_up = progress, False
        self.add_to(model, args)
        super().__init__(
            model,
            args,
            masks,
            train_dataset=train_dataset,
            processing_class=processing_class,
            # Items are of equal length; the default would ask the tokenizer for a padding token.
            data_collator=collator,
            **kwargs,
        )

    def add_to(self, prepared: Prepared, args: NutePruneConfig) -> None:
        """Add to the model what a subclass trains beside LoRA, before Trainer looks at it."""

    # -- before the first step

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Run the steps; see `AtomicTrainer.train`.

        Raises:
            UserError: if the model is used up or trained, or there are no steps or no text.
        """
        self.check_unused()
        if self._step >= 0 and not resume_from_checkpoint:
            raise UserError(
                "this trainer has trained already: pass resume_from_checkpoint=True to go on, or "
                "make a new one from the dense model"
            )
        if self.args.max_steps == 0:
            raise UserError("max_steps is 0: call finalize() at once, or set max_steps above 0")
        check_text(self.train_dataset)
        self.begin(resumes=bool(resume_from_checkpoint))
        self.answers = self._own_answers()
        # Of `AtomicTrainer`, and in it transformers' loop; each batch calls `training_step`.
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def begin(self, resumes: bool = False) -> None:
        """Put the refitted weights into the model; all processes take part.

        A trainer that was given no masks calls the stages for masks and weights first.

        Args:
            resumes: whether to use the products of an earlier run in the folder.
        """
        if self.masks is None:
            first = self.first_stages(resumes)
            scores = first.score()
            self.masks = first.choose(scores, self.target)
            self.weights = first.refit(self.masks, self.target)
        if self.weights is not None:
            self.prepared.bank.install(self.weights)
            self.weights = None

    @property
    def reads_own_answers(self) -> bool:
        """Whether the student reads its own answers in the end: to questions, as chats ask them."""
        tokenizer = self.processing_class
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            return False
        return self.args.reads_own_answers and can_be_asked(tokenizer)

    def _own_answers(self) -> OwnAnswers | None:
        if not self.reads_own_answers:
            return None
        args, tokenizer = self.args, cast(PreTrainedTokenizerBase, self.processing_class)
        blocks_NT = calibration_blocks(self.train_dataset, min(args.blocks, PROMPTED))
        return own_answers(self.anatomy.model, tokenizer, blocks_NT, self.steps(), args.seed)

    def first_stages(self, resumes: bool) -> FirstStages:
        """Return the stages before the first step; see `begin`."""
        products = self.products or Products(self.run_folder, self.settings(), resumes)
        return FirstStages(self.prepared, self.args, self.train_dataset, products, self._progress)

    def check_optimizer(self) -> None:
        """Make optimizer, schedule and loader once, so that settings fail before a run begins."""
        if self.train_dataset is not None:
            self.get_train_dataloader()
        self.create_optimizer_and_scheduler(max(1, self.args.max_steps))
        self.optimizer = self.lr_scheduler = None

    def as_pruned(self) -> AbstractContextManager[None]:
        """Return a context in which `model` uses the current masks; outside of it, none.

        Raises:
            UserError: if the model is used up.
        """
        self.check_unused()
        return self.coforward.student(self.final_masks())

    @torch.no_grad()
    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None, None]:
        """Return the language-model loss of the student as it is now; see `Trainer.evaluate`."""
        inputs = self._prepare_inputs(inputs)
        with self.as_pruned():
            passage = self.coforward.run(model, inputs, teacher=None)
        return text_loss(passage, Head.of(self.anatomy), inputs), None, None

    def settings(self) -> dict[str, Any]:
        """Return the run's settings in their canonical spelling."""
        found = super().settings() | {"gates": ",".join(self.prepared.kinds)}
        targets = self.prepared.targets
        if targets[0].asked.kind == "sparsity":
            found["target_sparsity"] = [target.sparsity for target in targets]
        else:
            del found["target_sparsity"]  # a default, which says nothing
        return found

    # -- after the last step

    def check_unused(self) -> None:
        """Refuse a model that `finalize` has already taken apart.

        Raises:
            UserError: if it is.
        """
        if self._used_up:
            raise UserError(
                "finalize() has used the trainer's model up, and what was learned with it: keep "
                "what it returned. To go on from a checkpoint of the run, make a new trainer and "
                "call train(resume_from_checkpoint=True)"
            )

    def settle(self) -> None:
        """Do without steps what `train` does before them; nothing after it. All take part."""
        self.begin()
        if self.args.max_steps == 0 and self.args.should_save:  # else `train` has written it
            write_json(self.run_folder / SETTINGS, self.settings())

    def finalize(
        self, dense: PreTrainedModel | Callable[[], PreTrainedModel] | None = None
    ) -> PreTrainedModel:
        """Merge, fold and slice; uses the trainer's model up. All processes take part.

        Args:
            dense: the dense model, loaded anew with whole weights in their stored dtype, or a
                function that loads it once the trainer has freed its own. It is used up.
                None: the trainer's own.

        Returns:
            The smaller model, of a stock class if its shape allows, else of a subclass of it. Of a
            sharded run the main process alone has its values.

        Raises:
            UserError: if the trainer's own model cannot be cut and no other is given; at a second
                call.
        """
        self.check_unused()
        if dense is None:
            self.prepared.check_can_be_cut()
        self.settle()
        if self.optimizer is not None:
            self.optimizer.state.clear()  # moments of what is not trained any more
        learned = self.prepared.bank.learned()
        self._used_up = True
        if dense is None:
            base = self.prepared.unwrapped()
            if self.args.offload:
                bring_home(base)
        else:
            self.prepared.free()
            base = dense if isinstance(dense, PreTrainedModel) else dense()
        return self._cut(base, learned)

    def cut_copy(self, dense: PreTrainedModel) -> PreTrainedModel:
        """Return the smaller model, cut from the dense model loaded anew.

        Args:
            dense: see `finalize`.
        """
        self.settle()
        return self._cut(dense, self.prepared.bank.learned())

    def _cut(self, base: PreTrainedModel, learned: Learned) -> PreTrainedModel:
        origin, masks = self.prepared.origin, self.final_masks()
        assert masks is not None
        self.sliced = slice_model(
            base,
            masks,
            learned,
            computed_dtype=origin.computed_dtype,
            stored_dtype=origin.stored_dtype,
            folder=self.run_folder,
            sharded=self.prepared.is_sharded,
        )
        return self.sliced.model

    def final_masks(self) -> Masks | None:
        """Return the masks of the moment, by which the model is cut in the end."""
        return self.masks

    def save_pruned(self, folder: str | os.PathLike[str], **record: Any) -> dict[str, Any]:
        """Write the finalized model, its tokenizer, record and card.

        Args:
            folder: absent, empty, or with nothing but `run/` in it.
            **record: further keys of the record, such as `perplexity`; `base_model` where it
                is not the folder or hub id that the model was loaded from; `around` where the
                source checkpoint has other parts, see `stages.save`.

        Returns:
            The record as it was written; parameter counts are those of the written files. The main
            process alone writes: in others it is empty.

        Raises:
            UserError: if nothing was finalized yet, or the folder holds other files.
        """
        if not self.is_world_process_zero():
            return {}
        if self.sliced is None:
            raise UserError("there is nothing to save yet: call finalize() first")
        tokenizer = cast(PreTrainedTokenizerBase | None, self.processing_class)
        about = self._about(self.sliced) | record  # the job's entries win
        return save(self.sliced, Path(folder), tokenizer, **about)

    def _about(self, sliced: Sliced) -> dict[str, Any]:
        """Return the run's arguments for `stages.save`."""
        prepared, origin, shape = self.prepared, self.prepared.origin, sliced.shape
        budget = prepared.allocator.budget
        if active := prepared.prices.of_a_token(shape):
            active["active_before"] += origin.tokens
        return {
            **origin.entries,
            "budget": budget,
            "parameters": {"before": origin.parameters, **active},
            "stored_dtype": origin.stored_dtype,
            "config": chosen_settings(self.args),
            "shapes": self.args.shapes,
            "teachers": {"count": len(self.teachers_met()), "sparsities": self.teachers_met()},
            "bad_steps": self.bad_steps.read()[0],
            "seed": self.args.seed,
            **self.target.record(budget.sparsity(shape), prepared.prices.cache(shape)),
        }

    def teachers_met(self) -> list[float]:
        """Return the sparsities of the teachers used so far: none here."""
        return []

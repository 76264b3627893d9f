"""A Trainer that pushes the finished checkpoint to the hub, not the state of its run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import Trainer

from nuteprune.errors import UserError
from nuteprune.run_folder import RUN


class PushesCheckpoint(Trainer):
    """`transformers.Trainer` whose result is a checkpoint that is written after training."""

    saved: Path | None = None
    """The folder that was written last."""
    how_to_write = "call finalize(), then save_pruned(FOLDER)"
    """How a checkpoint that others load is written."""

    def push_to_hub(  # type: ignore[override]
        self,
        commit_message: str | None = "Add a pruned model",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> Any:
        """Upload what `save_pruned` wrote last as it is, so that the hub has what was judged.

        From `run/` it uploads only the plots that the card shows, not teachers, trainer checkpoints
        and metrics. Without `hub_model_id` the repository has the folder's name.

        Args:
            commit_message: message of the commit.
            blocking: return after the upload; False: return a future at once.
            token: one with write permission; None: `hub_token` of the settings, or the stored one.
            revision: branch to commit to; None: `hub_revision`.
            private: whether a new repository is private; None: `hub_private_repo`.

        Returns:
            The commit's `CommitInfo` or its future; None in all processes but the main one.

        Raises:
            UserError: if nothing was saved yet.
        """
        if not self.is_world_process_zero():
            return None
        if self.saved is None:
            raise UserError(f"there is nothing to push yet: {self.how_to_write}")
        args, folder = self.args, self.saved.resolve()
        api = HfApi(token=token or args.hub_token)
        private = args.hub_private_repo if private is None else private
        repo = api.create_repo(args.hub_model_id or folder.name, private=private, exist_ok=True)
        of_the_run = (x for x in (folder / RUN).rglob("*") if x.is_file() and x.suffix != ".png")
        return api.upload_folder(  # type: ignore[call-overload]
            repo_id=repo.repo_id,
            folder_path=folder,
            # Else weights of an earlier push would be loaded in place of these.
            delete_patterns=["*.safetensors", "*.safetensors.index.json", "modeling_pruned.py"],
            ignore_patterns=[x.relative_to(folder).as_posix() for x in of_the_run],
            revision=revision or args.hub_revision,
            commit_message=commit_message,
            run_as_future=not blocking,
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Refuse to save a model during a run, whose state is in its checkpoints.

        Raises:
            UserError: unless Trainer writes a checkpoint.
        """
        if not _internal_call:
            raise UserError(f"save_model would write no model: {self.how_to_write}")
        super().save_model(output_dir, _internal_call)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make no repository before there is something to push."""

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push nothing in the middle of a run: its state is no model that anybody could load."""

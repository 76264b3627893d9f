"""What jobs find out of models: perplexity, copying, and of a pruned one beside the dense one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nuteprune.console import Bars
from nuteprune.data.blocks import JUDGED
from nuteprune.errors import RunFailed, UserError
from nuteprune.judge.beside import Beside, judge_beside
from nuteprune.judge.copying import Copying, copying
from nuteprune.judge.perplexity import mean, perplexities, protocol


@dataclass(frozen=True)
class Figures:
    """What is known of a model.

    Args:
        perplexity: source -> perplexity on held-out text.
        copying: how it copies from its context; None where that cannot be measured.
    """

    perplexity: dict[str, float]
    copying: Copying | None


def copies(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **how: int
) -> Copying | None:
    """Return how a model copies; None where it has too few ids or positions to tell.

    Args:
        model: a causal LM.
        tokenizer: its tokenizer.
        **how: `seed` and `batch_size`, as `copying` takes them.
    """
    try:
        return copying(model, tokenizer, **how)
    except UserError:
        return None


class Judge:
    """Judges the models of a job alike.

    Args:
        held_out: text to judge by, source -> (N, T).
        tokenizer: of all models.
        bars: where progress is shown.
    """

    def __init__(
        self, held_out: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerBase, bars: Bars
    ) -> None:
        self.held_out, self.tokenizer, self._bars = held_out, tokenizer, bars

    def figures(self, what: str, model: PreTrainedModel) -> Figures:
        """Return what is found of a model.

        Raises:
            RunFailed: if its perplexity is no finite number.
        """
        title = f"measuring {what}"
        self._bars.update(title, 0, 1)
        found = perplexities(model, self.held_out, batch_size=JUDGED)
        if not all(map(math.isfinite, found.values())):
            raise RunFailed(
                f"the perplexity of {what} is not finite ({found}); use --dtype float32, or a "
                "lower learning rate"
            )
        copied, note = copies(model, self.tokenizer), f"perplexity {mean(found):.2f}"
        if copied is not None:
            note += f"  copying {copied.percent:.0f} %"
        self._bars.update(title, 1, 1, note)
        return Figures(found, copied)

    def entries(self, before: Figures, after: Figures) -> dict[str, Any]:
        """Return what the record says of a model beside the dense one."""
        ppl = {"before": before.perplexity, "after": after.perplexity}
        entries: dict[str, Any] = {"perplexity": {**ppl, "protocol": protocol(self.held_out)}}
        if before.copying is not None and after.copying is not None:
            entries["copying"] = {
                "before": before.copying.percent,
                "after": after.copying.percent,
                "protocol": before.copying.protocol,
            }
        return entries

    def beside(self, dense: PreTrainedModel, pruned: PreTrainedModel) -> Beside:
        """Return what is found of a pruned model beside the dense one; see `judge_beside`."""
        title = "answers and context"
        self._bars.update(title, 0, 1)
        found = judge_beside(dense, pruned, self.tokenizer, self.held_out)
        self._bars.update(title, 1, 1)
        return found

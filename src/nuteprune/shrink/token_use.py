"""Estimates how often each token is used, in the user's text and beyond it.

Shape suffixes: T positions of a text, V token ids.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from nuteprune.model.anatomy import Anatomy
from nuteprune.model.forwards import evaluating
from nuteprune.shrink.vocabulary import Merges

POSITIONS = 6000
"""Positions of each kind of text at which the model predicts the next token."""
WINDOW = 64
"""Tokens of a text that the model reads together, at most."""
_FOREIGN = 0.02
"""Weight of the model's probabilities for tokens with letters that the text does not have."""
_FORMS = 0.25
"""Share of the unseen use that is estimated by other forms of the text's words."""
_LETTER = 1e-6
"""Share of the text's characters from which on a letter belongs to it."""


class Windows:
    """A few windows of many texts, each text as likely as any other, for one pass over them.

    Args:
        length: tokens of a window.
    """

    def __init__(self, length: int = WINDOW) -> None:
        self.length = length
        self.texts: list[list[int]] = []
        self._draws, self._seen = random.Random(0), 0

    def add(self, ids: Sequence[int]) -> None:
        """Take in a text's token ids."""
        if not ids:
            return
        self._seen += 1
        most = POSITIONS // self.length
        at = len(self.texts) if len(self.texts) < most else self._draws.randrange(self._seen)
        if at < most:
            start = self._draws.randrange(max(1, len(ids) - self.length))
            self.texts[at : at + 1] = [list(ids[start : start + self.length])]


@torch.no_grad()
def expected_use(
    anatomy: Anatomy, texts: Iterable[Sequence[int]], start: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return a model's next-token probabilities, averaged over the positions of texts.

    A mean of probabilities also counts tokens that the text does not show.

    Args:
        anatomy: the model.
        texts: token ids; read up to `POSITIONS`.
        start: token ids that each text is read after.

    Returns:
        The mean probability of each token (V,), and the same at temperature 2, where rarer tokens
        count for more.
    """
    model, rows = anatomy.model, anatomy.embedding.weight.shape[0]
    expected_V, flat_V = torch.zeros(2, rows)
    read = 0
    with evaluating(model):
        for ids in texts:
            ids_1T = torch.tensor([[*start, *ids]])
            logits_TV = model(input_ids=ids_1T, use_cache=False).logits[0].float()
            roots_TV = (logits_TV - logits_TV.amax(-1, keepdim=True)).div_(2).exp_()
            flat_V += (roots_TV / roots_TV.sum(-1, keepdim=True)).sum(0)
            squares_TV = roots_TV.square_()
            expected_V += (squares_TV / squares_TV.sum(-1, keepdim=True)).sum(0)
            read += ids_1T.shape[1]
            if read >= POSITIONS:
                break
    return expected_V / max(1, read), flat_V / max(1, read)


def use_of(
    merges: Merges, counted_V: Tensor, expected_V: Tensor, flat_V: Tensor, guard: float
) -> list[float]:
    """Return how often each token will be used.

    The text shows its counts, and the model's expectations in it. Two weak signs, by their
    geometric mean, stand for the use that it does not show. One is the tokenizer's order, in
    which frequent tokens lead. The other is what the model thinks possible, or how often the text
    has the same word in another form: with or without a space, in capitals or not.

    Args:
        merges: the tokenizer.
        counted_V: how often the text uses each token.
        expected_V: what the model expects in the text.
        flat_V: its probabilities at temperature 2, there and in self-written text.
        guard: share of the use that the text does not show.
    """
    order_V = 1 / torch.arange(1, len(flat_V) + 1)
    shown_V = (_shares(counted_V) + _shares(expected_V)) / 2
    familiar_V = _foreign(merges, counted_V)
    thought_V = _shares((order_V * flat_V).sqrt() * familiar_V)
    alike_V = _shares((order_V * _of_all_forms(merges, shown_V)).sqrt() * familiar_V)
    known_V = (1 - _FORMS) * thought_V + _FORMS * alike_V
    use_V = (1 - guard) * shown_V + guard * known_V
    return use_V.double().tolist()


def _of_all_forms(merges: Merges, shown_V: Tensor) -> Tensor:
    """Return for each token how often the text uses it in any form."""
    forms = [""] * len(shown_V)
    for token, i in merges.ids.items():
        if i < len(forms):
            forms[i] = token.lstrip("▁Ġ").lower()
    used: dict[str, float] = {}
    for form, share in zip(forms, shown_V.tolist(), strict=True):
        used[form] = used.get(form, 0.0) + share
    return torch.tensor([used[form] if form else 0.0 for form in forms])


def _shares(x_V: Tensor) -> Tensor:
    return x_V / x_V.sum().clamp(min=1e-30)


def _foreign(merges: Merges, counted_V: Tensor) -> Tensor:
    """Return a weight for each token: less where it has letters that the text does not have."""
    weights_V, counts = torch.zeros(len(counted_V)), counted_V.tolist()
    letters: dict[str, float] = {}
    tokens = [(x, i) for x, i in merges.ids.items() if i < len(counts) and x not in merges.added]
    for token, i in tokens:
        if counts[i]:
            for letter in token:
                letters[letter] = letters.get(letter, 0.0) + counts[i]
    least = _LETTER * sum(letters.values())
    known = {x for x, count in letters.items() if count >= least}
    for token, i in tokens:
        weights_V[i] = 1.0 if known.issuperset(token) else _FOREIGN
    return weights_V

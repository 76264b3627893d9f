"""The published training loss, beside the default's."""

from __future__ import annotations

from nuteprune.distill.objective import RELATIVE, Objective

PAPER = Objective(token_weight=0.1, layer_weight=0.9, as_published=True, temperature=2 / 3)
"""The sum over layers of plain squared errors, the sum over tokens of the KL divergence, and no
language-model loss; the last layer's outputs behind the final norm, as in the authors' code."""
OBJECTIVES = {"relative": RELATIVE, "paper": PAPER}
"""Name, as the setting `objective` has it, -> the terms where a teacher takes part."""

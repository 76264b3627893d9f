"""How a model becomes small: merge and fold, re-fit what is left, cut the rest out."""

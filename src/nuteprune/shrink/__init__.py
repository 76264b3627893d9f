"""How a model becomes small: refit, merge, fold, slice."""

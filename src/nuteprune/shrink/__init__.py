"""How a model becomes small: re-fit, merge, fold, slice."""

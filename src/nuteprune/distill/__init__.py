"""Who teaches: one backbone in two roles, and the losses."""

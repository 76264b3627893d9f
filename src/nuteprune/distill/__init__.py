"""Who teaches: the teachers, one backbone in two roles, the losses."""

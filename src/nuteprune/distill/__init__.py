"""Who teaches: the queue of numerous teachers, one backbone in two roles, the losses."""

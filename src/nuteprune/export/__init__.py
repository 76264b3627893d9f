"""Checkpoints that other programs load: the pruned model's config and weights, on disk and back.

`modeling_pruned.py` is both a module of this package and the file that travels with every
checkpoint whose layers differ; it imports nothing from here.
"""

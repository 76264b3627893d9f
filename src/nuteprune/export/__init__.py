"""What others load: checkpoints, model cards, GGUF and ONNX files, and loading them back.

`modeling_pruned.py` is both a module of this package and the file that travels with every
checkpoint whose layers differ; it imports nothing from here.
"""

"""What flows where in a small model, read off one forward pass: who reads what another puts out."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nuteprune.errors import UserError
from nuteprune.model.small import LAYERS, VOCABULARY


@dataclass(frozen=True)
class Passed:
    """What one forward pass showed; paths of modules in a layer are relative to the layer.

    Args:
        layers: path of the decoder layers.
        embedding: path of the token embedding.
        final_norm: path of the norm that the language head reads.
        called: linear modules of the first layer, in the order in which they were called.
        norms: norms of the first layer, in that order.
        inputs: the input of each module of the first layer.
        outputs: its output.
        embedded: the rows of the embedding matrix.
        entered: the input of the first layer.
        raw: the output of the head's matrix.
        logits: the output of the model.
    """

    layers: str
    embedding: str
    final_norm: str
    called: tuple[str, ...]
    norms: tuple[str, ...]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    embedded: Tensor
    entered: Tensor
    raw: Tensor
    logits: Tensor

    def reads(self, reader: str, source: str) -> bool:
        """Return whether a module read the output of another."""
        ours, theirs = self.inputs.get(reader), self.outputs.get(source)
        return ours is not None and theirs is not None and _same(ours, theirs)


@torch.no_grad()
def watch(model: PreTrainedModel) -> Passed:
    """Run a small model once, and return what was seen.

    Raises:
        UserError: if it has no list of decoder layers, or no head that reads a norm.
    """
    layers = _layers_of(model)
    first = next(model.get_submodule(layers).children())
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    inputs: dict[nn.Module, Tensor] = {}
    outputs: dict[nn.Module, Tensor] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
        given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        made = output[0] if isinstance(output, tuple) else output
        if given is not None and isinstance(made, Tensor):
            inputs.setdefault(module, given)
            outputs.setdefault(module, made)

    tokens = torch.arange(3, 3 + 9)[None] % VOCABULARY
    with ExitStack() as stack:
        for module in model.modules():
            stack.enter_context(module.register_forward_hook(note, with_kwargs=True))
        logits = model(input_ids=tokens, use_cache=False).logits
    names = {module: name for name, module in model.named_modules()}
    inside = {module: name for name, module in first.named_modules() if name}
    norms = [x for x in inputs if x in names and _is_norm(x)]
    outer = [x for x in norms if head in inputs and _same(outputs[x], inputs[head])]
    if not outer or embedding not in outputs:
        raise UserError(f"the language head of {model.config.model_type} reads no norm")
    return Passed(
        layers=layers,
        embedding=names[embedding],
        final_norm=names[outer[-1]],
        called=tuple(inside[x] for x in inputs if x in inside and isinstance(x, nn.Linear)),
        norms=tuple(inside[x] for x in norms if x in inside),
        inputs={inside[x]: value for x, value in inputs.items() if x in inside},
        outputs={inside[x]: value for x, value in outputs.items() if x in inside},
        embedded=embedding.weight[tokens],
        entered=inputs[first],
        raw=outputs[head],
        logits=logits,
    )


def _layers_of(model: PreTrainedModel) -> str:
    """Return the path of a model's decoder layers."""
    found: list[str] = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == LAYERS
        and all(any(isinstance(x, nn.Linear) for x in layer.modules()) for layer in module)
    ]
    outer = [x for x in found if not any(x.startswith(f"{y}.") for y in found)]
    if len(outer) != 1:
        raise UserError(
            f"{model.config.model_type} has {len(outer)} lists of layers with linear modules, "
            "where a decoder has one"
        )
    return outer[0]


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not list(module.children())


def _same(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and torch.equal(ours, theirs)

"""Changes modules for a while: evaluation mode, another forward, other tokens.

Shape suffixes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

Forward = Callable[..., Any]


def put_forward(module: nn.Module, forward: Forward) -> Callable[[], None]:
    """Replace a module's forward, but not its hooks; return a function that restores it.

    Several may be put in one module; restore them in the opposite order.
    """
    before = vars(module).get("forward")
    module.forward = forward

    def give_back() -> None:
        if before is None:
            del module.forward
        else:
            module.forward = before

    return give_back


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and restore each module's mode afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def in_place_of(modules: Sequence[nn.Module], forwards: Sequence[Forward]) -> Iterator[None]:
    """Within this context, modules compute something else."""
    with ExitStack() as stack:
        for module, forward in zip(modules, forwards, strict=True):
            stack.callback(put_forward(module, forward))
        yield


def giving(modules: Sequence[nn.Module], outputs: Sequence[Any]) -> AbstractContextManager[None]:
    """Return a context in which modules return known outputs, whatever they read."""
    return in_place_of(modules, [lambda *_, known=output, **__: known for output in outputs])


@contextmanager
def noting_outputs(modules: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """Within this context, collect outputs of modules, in the order in which they run."""
    outputs: list[Any] = []
    with ExitStack() as stack:
        for module in modules:
            hook = module.register_forward_hook(lambda _, __, output: outputs.append(output))
            stack.enter_context(hook)
        yield outputs


@contextmanager
def special_tokens_kept(model: nn.Module) -> Iterator[None]:
    """Restore a model's special tokens, which Trainer replaces by the tokenizer's.

    Such a token may be beyond the vocabulary, and the result could not be loaded.
    """
    configs: list[Any] = [getattr(model, "config", None), getattr(model, "generation_config", None)]
    configs += [x.get_text_config() for x in configs[:1] if x is not None]
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    before = [(x, n, getattr(x, n)) for x in configs for n in names if hasattr(x, n)]
    try:
        yield
    finally:
        for config, name, value in before:
            setattr(config, name, value)


def last_logits(model: PreTrainedModel, ids_BT: Tensor, count: int) -> Tensor:
    """Return the logits (B, count, V) of the last tokens.

    The last tokens of several sequences do not lie beside each other. So torch multiplies them
    sequence by sequence, in half precision each with a copy of the whole head.

    Args:
        model: a causal LM.
        ids_BT: token ids.
        count: tokens of each sequence.
    """
    head: Any = model.get_output_embeddings()
    with head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:])):
        output: Any = model(input_ids=ids_BT, use_cache=False, logits_to_keep=count)
    logits_BTV: Tensor = output.logits
    return logits_BTV

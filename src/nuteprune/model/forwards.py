"""Changes how a model runs: evaluation mode, another forward, attention of one token per text.

Shape suffixes: B sequences, H query heads, K KV heads, G query heads of a KV head, S tokens of
queries, T tokens of keys or of a sequence, D features of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Forward = Callable[..., Any]
Value = tuple[dict[str, Any], str, Any]
"""A dictionary, a key of it, and another value for that."""
_UNGROUPED = nn.Module()  # what is packed has as many query heads as KV heads


def put(held: dict[str, Any], key: str, value: Any) -> Callable[[], None]:
    """Put a value into a dictionary; return a function that restores what was there.

    Several may be put in one place; restore them in the opposite order.
    """
    before = {key: held[key]} if key in held else {}
    held[key] = value

    def give_back() -> None:
        if before:
            held.update(before)
        else:
            del held[key]

    return give_back


def put_forward(module: nn.Module, forward: Forward) -> Callable[[], None]:
    """Replace a module's forward, but not its hooks; return as `put`."""
    return put(vars(module), "forward", forward)


@contextmanager
def replaced(values: Iterable[Value]) -> Iterator[None]:
    """Within this context, dictionaries have other values."""
    with ExitStack() as stack:
        for value in values:
            stack.callback(put(*value))
        yield


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


def in_place_of(
    modules: Sequence[nn.Module], forwards: Sequence[Forward]
) -> AbstractContextManager[None]:
    """Return a context in which modules compute something else."""
    return replaced((vars(x), "forward", f) for x, f in zip(modules, forwards, strict=True))


def giving(modules: Sequence[nn.Module], outputs: Sequence[Any]) -> AbstractContextManager[None]:
    """Return a context in which modules return known outputs, whatever they read."""
    return in_place_of(modules, [lambda *_, known=output, **__: known for output in outputs])


def hidden_of(output: Any) -> Tensor:
    """Return a module's hidden states, whether it returns them alone or in a tuple."""
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)


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
def noting_calls(module: nn.Module | None) -> Iterator[list[tuple[Any, ...]]]:
    """Within this context, collect what a module is called with; None: nothing."""
    calls: list[tuple[Any, ...]] = []
    with ExitStack() as stack:
        if module is not None:
            note = module.register_forward_pre_hook(lambda _, args: calls.append(args))
            stack.enter_context(note)
        yield calls


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


def head_at_once(model: PreTrainedModel) -> AbstractContextManager[Any]:
    """Within this context, a causal LM's head reads all tokens in one product.

    The last tokens of sequences do not lie beside each other. Where the head is frozen, torch then
    multiplies them sequence by sequence, in half precision each with a copy of the whole head
    (figures in docs/log.md). It does so with one sequence too, which `contiguous` leaves as it is.
    """
    head: Any = model.get_output_embeddings()

    def packed(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return args[0].clone(memory_format=torch.contiguous_format), *args[1:]

    return head.register_forward_pre_hook(packed)  # type: ignore[no-any-return]


def last_logits(model: PreTrainedModel, ids_BT: Tensor, count: int) -> Tensor:
    """Return the logits (B, count, V) of the last tokens.

    Args:
        model: a causal LM.
        ids_BT: token ids.
        count: tokens of each sequence.
    """
    with head_at_once(model):
        output: Any = model(input_ids=ids_BT, use_cache=False, logits_to_keep=count)
    logits_BTV: Tensor = output.logits
    return logits_BTV


def cache_name(names: Collection[str]) -> str:
    """Return the name of the KV cache among names in a model's calls or outputs."""
    return "cache" if "cache" in names else "past_key_values"  # by version of transformers


@contextmanager
def heads_as_tokens() -> Iterator[None]:
    """Within this context, torch's attention decodes with the heads of a group as tokens.

    Under grouped-query attention the stock function reads the keys and values of a group once for
    each query head on CPUs, in a kernel made for many tokens. For one token the heads of a group
    can take the place of tokens: the same sums, a fifth of the time at 64 texts of 256 tokens.

    Nothing changes for passes of several tokens, for models without groups, or on accelerators,
    whose kernels know groups.
    """
    ALL_ATTENTION_FUNCTIONS["sdpa"] = _attend
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def _attend(
    module: nn.Module,
    query_BHSD: Tensor,
    key_BKTD: Tensor,
    value_BKTD: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return attention, (B, S, H, D), as `sdpa_attention_forward` does."""
    batch, heads, tokens, _ = query_BHSD.shape
    groups = key_BKTD.shape[1]
    shared = attention_mask is None or attention_mask.shape[1] == 1
    if tokens > 1 or heads == groups or not shared or query_BHSD.device.type != "cpu":
        return sdpa_attention_forward(
            module, query_BHSD, key_BKTD, value_BKTD, attention_mask, **kwargs
        )
    query_BKGD = query_BHSD.reshape(batch, groups, heads // groups, -1)
    packed = {**kwargs, "is_causal": False}
    made_BGKD, _ = sdpa_attention_forward(
        _UNGROUPED, query_BKGD, key_BKTD, value_BKTD, attention_mask, **packed
    )
    return made_BGKD.transpose(1, 2).reshape(batch, 1, heads, -1), None

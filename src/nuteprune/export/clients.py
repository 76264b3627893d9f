"""What other programs would object to in a pruned checkpoint; docs/support.py lists all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import islice

from nuteprune.errors import UserError, some
from nuteprune.export.config import INVERSE_DIVISOR
from nuteprune.export.gguf.refusals import ModelFacts, choose_architecture
from nuteprune.export.gguf.rows import check_rows, padded_shape, torn_rows
from nuteprune.export.onnx import obstacles


def _vllm(facts: ModelFacts) -> Iterator[str]:
    family, shape = facts.family, facts.shape
    if bare := [i for i, x in enumerate(shape.layers) if not x.mixes]:
        yield f"it refuses layers without attention ({some(bare, 6)}); prune without attn_block"
    if not shape.uniform:
        if not family.vllm_backend:
            yield (
                "free shapes need its Transformers backend, which does not run "
                f"{family.model_type} as transformers does; prune with --shapes uniform"
            )
        return
    square = shape.layers[shape.first_attention].heads * facts.head_dim == shape.hidden
    if family.vllm_head_dim_from_hidden and not square:
        instead = "prune without heads, kv_groups and hidden"
        if family.vllm_backend:
            instead = "pass --model-impl transformers"
            if family.logit_divisor:  # which the backend knows by the inverse alone
                stated = {INVERSE_DIVISOR: 1 / getattr(facts.config, family.logit_divisor)}
                instead += f" --hf-overrides '{json.dumps(stated)}'"
        yield (
            f"its own {family.model_type} class takes head_dim to be width / heads, which is not "
            f"so here; {instead}"
        )


def _batching(facts: ModelFacts) -> Iterator[str]:
    if len({x.kv_heads for x in facts.shape.layers}) > 1:
        yield "its paged cache wants the same number of KV heads in all layers"


def _one_size(facts: ModelFacts) -> Iterator[str]:
    first = facts.shape.layers[0]
    if not (facts.shape.uniform and first.mixes and first.mlp):
        yield "it wants all layers whole and of one size; prune with --shapes uniform"


def _llama_cpp(facts: ModelFacts) -> Iterator[str]:
    try:
        shape, notes = padded_shape(facts.shape, choose_architecture(facts), quantized=True)
        yield from notes
        check_rows(shape, facts.head_dim, "q8_0")
    except UserError as error:
        yield str(error)
        return
    yield from torn_rows(shape, facts.head_dim)


_OBJECTIONS: dict[str, Callable[[ModelFacts], Iterator[str]]] = {
    "transformers `generate_batch`": _batching,
    "vLLM": _vllm,
    "llama.cpp": _llama_cpp,
    "ONNX Runtime": lambda facts: islice(obstacles(facts.family, facts.config), 1),
    **dict.fromkeys(("SGLang", "TGI", "TensorRT-LLM"), _one_size),
}


def warnings(facts: ModelFacts) -> list[str]:
    """Return what programs would object to in a model's shapes, each line with its name."""
    return [f"{name}: {x}" for name, objects in _OBJECTIONS.items() for x in objects(facts)]

"""Programs that load pruned checkpoints: what each takes, and what it would object to."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from nuteprune.errors import UserError
from nuteprune.export.config import INVERSE_DIVISOR
from nuteprune.export.gguf.choose import ModelFacts, choose_architecture
from nuteprune.export.gguf.rows import check_rows, padded_shape, torn_rows
from nuteprune.export.onnx_graph import check_mixers, check_rope
from nuteprune.model.families import FAMILIES


@dataclass(frozen=True)
class Client:
    """A program, and how it loads the two kinds of shapes."""

    name: str
    uniform: str
    free: str
    run_by: str
    """The test that runs it, or that it was not run here."""
    objections: Callable[[ModelFacts], Iterator[str]]


def _none(_: ModelFacts) -> Iterator[str]:
    yield from ()


def _vllm(source: ModelFacts) -> Iterator[str]:
    bare = [i for i, x in enumerate(source.shape.layers) if not x.mixes]
    if bare:
        yield f"it refuses layers without attention ({_listed(bare)}); prune without attn_block"
    family, shape = source.family, source.shape
    if not shape.uniform:
        if not family.vllm_backend:
            yield (
                "free shapes need its Transformers backend, which does not run "
                f"{family.model_type} as transformers does; prune with --shapes uniform"
            )
        return
    square = shape.layers[shape.first_attention].heads * source.head_dim == shape.hidden
    if family.vllm_head_dim_from_hidden and not square:
        instead = "prune without heads, kv_groups and hidden"
        if family.vllm_backend:
            instead = f"pass --model-impl transformers{_inverse_divisor(source)}"
        yield (
            f"its own {family.model_type} class takes head_dim to be width / heads, which is not "
            f"so here; {instead}"
        )


def _inverse_divisor(source: ModelFacts) -> str:
    """Return the option that tells the Transformers backend what logits are divided by."""
    if not (name := source.family.logit_divisor):
        return ""
    stated = {INVERSE_DIVISOR: 1 / getattr(source.config, name)}
    return f" --hf-overrides '{json.dumps(stated)}'"


def _batching(source: ModelFacts) -> Iterator[str]:
    if len({x.kv_heads for x in source.shape.layers}) > 1:
        yield "its paged cache wants the same number of KV heads in all layers"


def _one_size(source: ModelFacts) -> Iterator[str]:
    first = source.shape.layers[0]
    if not (source.shape.uniform and first.mixes and first.mlp):
        yield "it wants all layers whole and of one size; prune with --shapes uniform"


def _llama_cpp(source: ModelFacts) -> Iterator[str]:
    try:
        shape, notes = padded_shape(source.shape, choose_architecture(source), quantized=True)
        yield from notes
        check_rows(shape, source.head_dim, "q8_0")
    except UserError as error:
        yield str(error)
        return
    yield from torn_rows(shape, source.head_dim)


def _onnx(source: ModelFacts) -> Iterator[str]:
    try:
        check_mixers(source.family)
        check_rope(source.config)
    except UserError as error:
        yield str(error)


def _listed(numbers: list[int]) -> str:
    few = ", ".join(map(str, numbers[:6]))
    return few + (f" and {len(numbers) - 6} more" if len(numbers) > 6 else "")


_STOCK = "as the stock class"
_REMOTE = "`trust_remote_code=True`, or `load_pruned`"
_WITHOUT_BACKEND = ", ".join(name for name, x in FAMILIES.items() if not x.vllm_backend)

CLIENTS = (
    Client("transformers 5", _STOCK, _REMOTE, "tests/export", _none),
    Client(
        "transformers 4.57",
        f"{_STOCK}, of families that it has; no hybrids",
        f"{_REMOTE}; no hybrids, mixtures, apertus, stablelm",
        "tests/clients/test_transformers_4.py",
        _none,
    ),
    Client(
        "transformers `generate_batch`", _STOCK, "equal KV heads only", "not run here", _batching
    ),
    Client("lm-evaluation-harness", _STOCK, _REMOTE, "tests/clients/test_lm_eval.py", _none),
    Client(
        "vLLM",
        _STOCK,
        f"its Transformers backend, `--trust-remote-code`; not {_WITHOUT_BACKEND}",
        "tests/clients/test_vllm.py",
        _vllm,
    ),
    Client(
        "llama.cpp",
        "`nuteprune export --to gguf`",
        "`nuteprune export --to gguf`, by family (below)",
        "tests/clients/test_llama_cpp.py",
        _llama_cpp,
    ),
    Client(
        "ONNX Runtime",
        "`nuteprune export --to onnx`",
        "`nuteprune export --to onnx`",
        "tests/clients/test_onnx.py",
        _onnx,
    ),
    Client("SGLang", _STOCK, "no", "not run here", _one_size),
    Client("TGI", _STOCK, "no", "not run here", _one_size),
    Client("TensorRT-LLM", _STOCK, "no", "not run here", _one_size),
)


def warnings(source: ModelFacts) -> list[str]:
    """Return what programs would object to in a model's shapes, each line with its name."""
    return [f"{x.name}: {line}" for x in CLIENTS for line in x.objections(source)]

"""support.md, made from the code: `python docs/support.py > docs/support.md`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nuteprune.export.gguf.architectures import ARCHITECTURES, Architecture
from nuteprune.model.families import FAMILIES
from nuteprune.model.family import GATE_KINDS, Family
from nuteprune.model.lookup import WRAPPERS

_INTRO = """\
# What is supported

This page is generated from the code (`python docs/support.py`). A test holds it to
that.

Tests run every cell of the first table: `tests/shrink/test_exactness.py`, and for mixtures of
experts `tests/shrink/test_mixtures.py`. Either the masked, the sliced and the reloaded model give
the same logits, or the combination is refused for the reason given.

## Families and gates

- `free`: each layer keeps its own counts.
- `uniform`: all layers keep the same counts. The result is a model of the stock class.
- Kinds of gates combine freely. A combination is refused where one of its kinds is.
"""

_ALWAYS = """\
What holds for all:

- The first layer with attention keeps it.
- Each layer keeps one KV group and one multiple of neurons, unless a block gate removes the block.
- A layer keeps at least as many experts as a token is routed to.
- Where routers choose among groups of experts first (`n_group` above 1, as in DeepSeek-V3),
  `experts` is refused; `expert_neurons` is not, with free shapes.
- Where each head has its own keys and values, `kv_groups` is the same as `heads`.
- Some stock configs demand that the head count divides the width (llama, gemma2). Uniform shapes
  then keep head counts that do.
- In hybrids, heads and KV groups are those of layers with attention. A mixer (a recurrence, a
  convolution) stays whole, or goes with `attn_block`.
"""

_WRAPPERS = """\
## Models of several modalities

`prune` knows such a checkpoint by its `architectures`. It prunes the language model inside, and
writes the whole back: a model of the same class (uniform), or one with the modeling file (free).

- All else that transformers loads stays as it is, bit for bit. Qwen3.5's tensors for multi-token
  prediction (`mtp.*`) are not loaded, and so not written. The processor's files are copied.
- Calibration sees no images.
- Gates on `hidden` are refused: what is made of images is as wide as the language model.
- `--set text_only=true` writes the language model alone, with any gates.
- `eval`, `bench` and `export` take the language model. `vocab` and `prune --vocab` refuse.

`tests/export/test_wrapping.py` runs each type with an image.
"""

_GGUF = """\
## GGUF

The architecture of llama.cpp that `nuteprune export --to gguf` writes. Where several are named, it
is the first that fits. [gguf.md](gguf.md) has the details.
"""


_STOCK = "as the stock class"
_REMOTE = "`trust_remote_code=True`, or `load_pruned`"
_WITHOUT_BACKEND = ", ".join(name for name, x in FAMILIES.items() if not x.vllm_backend)
_EXPORT = "`nuteprune export --to {}`"
_PROGRAMS = [
    ["transformers 5", _STOCK, _REMOTE, "tests/export"],
    [
        "transformers 4.57",
        f"{_STOCK}, of families that it has; no hybrids",
        f"{_REMOTE}; no hybrids, mixtures, apertus, stablelm",
        "tests/clients/test_transformers_4.py",
    ],
    ["transformers `generate_batch`", _STOCK, "equal KV heads only", "not run here"],
    ["lm-evaluation-harness", _STOCK, _REMOTE, "tests/clients/test_lm_eval.py"],
    [
        "vLLM",
        _STOCK,
        f"its Transformers backend, `--trust-remote-code`; not {_WITHOUT_BACKEND}",
        "tests/clients/test_vllm.py",
    ],
    [
        "llama.cpp",
        _EXPORT.format("gguf"),
        f"{_EXPORT.format('gguf')}, by family (below)",
        "tests/clients/test_llama_cpp.py",
    ],
    ["ONNX Runtime", *[_EXPORT.format("onnx")] * 2, "tests/clients/test_onnx.py"],
    *([name, _STOCK, "no", "not run here"] for name in ("SGLang", "TGI", "TensorRT-LLM")),
]
"""A program, how it loads uniform and free shapes, and the test that runs it."""


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _gates() -> Iterator[str]:
    reasons: list[str] = []

    def cell(family: Family, kind: str) -> str:
        taken, notes = [], []
        for shapes in ("free", "uniform"):
            reason = family.refusal(kind, uniform=shapes == "uniform")
            if reason is None:
                taken.append(shapes)
                continue
            if reason not in reasons:
                reasons.append(reason)
            if (number := f"[{reasons.index(reason) + 1}]") not in notes:
                notes.append(number)
        return " ".join([", ".join(taken) or "no", *notes])

    rows = [[name, *(cell(x, kind) for kind in GATE_KINDS)] for name, x in FAMILIES.items()]
    yield _table(["family", *(f"`{kind}`" for kind in GATE_KINDS)], rows)
    yield "".join(f"{i}. {reason}.\n" for i, reason in enumerate(reasons, 1))


_NO_ARCH = "no architecture"


def _conditions(arch: Architecture, family: Family) -> str:
    said = [
        (arch.square_attention and not family.head_dim_from_hidden, "heads and width whole"),
        (arch.head == "never", "tied embeddings"),
        (arch.refuses_windows, "no windows"),
        (arch.experts is not None and not arch.experts.dense, "experts in all layers"),
        (not arch.partial_rotary and "phi3" in family.gguf, "fully rotary heads"),
        (bool(family.mixer) and not arch.mixer, "no recurrent layers"),
        (family.multipliers and not arch.multipliers, "multipliers folded into the weights"),
    ]
    found = ", ".join(text for holds, text in said if holds)
    return f"`{arch.name}`" + (f" ({found})" if found else "")


def _gguf() -> str:
    rows = []
    for name, family in FAMILIES.items():
        archs = [ARCHITECTURES[x] for x in family.gguf]
        uniform, free = (
            ", else ".join(_conditions(x, family) for x in archs if x.per_layer == per_layer)
            for per_layer in (False, True)
        )
        without = "no: `--shapes uniform`" if archs else _NO_ARCH
        rows.append([name, uniform or _NO_ARCH, free or without])
    return _table(["family", "uniform", "free"], rows)


def _wrappers() -> str:
    rows = [[x.model_type, f"`{x.conditional}`"] for x in WRAPPERS.values()]
    return _table(["model type", "class"], rows)


def support_page() -> str:
    """Return the text of docs/support.md."""
    clients = _table(["program", "uniform", "free", "run by"], _PROGRAMS)
    parts = [
        _INTRO,
        *_gates(),
        _ALWAYS,
        "## Programs\n",
        clients,
        _WRAPPERS,
        _wrappers(),
        _GGUF,
        _gguf(),
    ]
    return "\n".join(parts)


if __name__ == "__main__":
    print(support_page(), end="")

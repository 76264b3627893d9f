"""Writes a decoder as an ONNX file, once ONNX Runtime has computed the same with it.

It is one graph for prompts and decoding: the KV cache is in its inputs and outputs, which have the
names that exporters of decoders agree on (docs/serving.md). Shapes: B sequences, T tokens, P tokens
in the cache, S = P + T, K KV heads of the layer, H features per head, V vocabulary.
"""

from __future__ import annotations

import inspect
import logging
import secrets
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from nuteprune.errors import RunFailed, UserError
from nuteprune.files import check_room, data_files, partial_of, remove, sync, sync_tree, writing
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.family import Family
from nuteprune.model.forwards import cache_name
from nuteprune.model.weights import refuse_packed

NEEDED = ("onnx", "onnxscript", "onnxruntime")
"""Packages of the extra `onnx`."""
LARGEST_ERROR = 1e-3
"""How far ONNX Runtime's logits may be off, relative to the largest: a wrong graph is off by more,
rounding by less (SmolLM2: 2e-6; badly cut: 3e-4, as are torch's two kinds of attention there)."""
LARGEST_FILE = 2**31 - 2**24
"""Bytes of weights up to which they are in the file itself: protobuf ends at 2 GiB."""
KeyValue = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class WrittenOnnx:
    """The result of an export."""

    files: list[str]
    parameters: int
    bytes: int
    error: float
    """Largest deviation of ONNX Runtime's logits from torch's, relative to the largest logit."""


def require_packages() -> None:
    """Refuse to export without the extra `onnx`.

    Raises:
        UserError: naming what is missing.
    """
    if missing := [x for x in NEEDED if find_spec(x) is None]:
        raise UserError(
            f"an ONNX export needs {' and '.join(missing)}, not installed here; "
            "run: pip install 'nuteprune[onnx]'"
        )


def write_onnx(model: PreTrainedModel, path: Path) -> WrittenOnnx:
    """Write a model as an ONNX file, after ONNX Runtime has computed the same with it.

    Weights of 2 GB and more are in a second file, `NAME.*.data` beside it.

    Args:
        model: a causal LM of a supported family, pruned or not, in float32 on the CPU.
        path: the file; one that is there is replaced.

    Returns:
        What was written.

    Raises:
        UserError: if the extra `onnx` is not installed, the model is not in float32, or a graph
            cannot compute it.
        RunFailed: if ONNX Runtime computes something else, or writing went wrong on the way.
    """
    require_packages()
    refuse_packed(model)
    if model.dtype != torch.float32:
        raise UserError(f"the model is in {model.dtype}; load it with dtype=torch.float32")
    exporter = Exporter(model)
    graph = exporter.graph()
    parameters = exporter.anatomy.parameters()
    data = f"{path.name}.{secrets.token_hex(4)}.data" if 4 * parameters > LARGEST_FILE else None
    partial = partial_of(path)
    with writing(path, "make room and do the same again"):
        try:
            remove(partial)  # what a killed export left
            partial.mkdir(parents=True)
            check_room(path, 4 * parameters)
            _save(graph, partial / path.name, data)
            error = exporter.error(partial / path.name)
            if not error <= LARGEST_ERROR:
                raise RunFailed(
                    f"ONNX Runtime's logits are off by {error:.1e} of the largest, more than "
                    f"{LARGEST_ERROR:g}; {path} was not written"
                )
            files = _move(partial, path, data)
        finally:
            remove(partial)
    size = sum(x.stat().st_size for x in files)
    return WrittenOnnx([x.name for x in files], parameters, size, error)


def _save(graph: Any, file: Path, data: str | None) -> None:
    import onnx_ir

    onnx_ir.save(graph, file, external_data=data)
    sync_tree(file.parent)


def _move(partial: Path, path: Path, data: str | None) -> list[Path]:
    """Move a finished file into place, weights first: an old graph stays valid until then."""
    names = filter(None, (data, path.name))
    moved = [(partial / name).replace(path.with_name(name)) for name in names]
    sync(path.parent)
    for old in set(data_files(path)) - set(moved):
        old.unlink()
    return moved[::-1]


def obstacles(family: Family, config: Any) -> Iterator[str]:
    """Yield why no graph computes a model: it would keep what one short text is computed by.

    A comparison over a short text would miss rotary frequencies that change with its length.
    """
    if family.experts:
        yield (
            f"{family.model_type} routes tokens to experts, and a graph would keep the routes of "
            "the text that it is traced with; serve the checkpoint itself"
        )
    if family.mixer:
        yield (
            f"{family.model_type} carries states from token to token in {family.mixer_module}, "
            "which the graph's cache of keys and values does not hold; load the checkpoint itself"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    # Some types have one set of parameters per kind of attention.
    kinds = {x.get("rope_type") for x in (rope, *rope.values()) if isinstance(x, dict)}
    if found := kinds & {"dynamic", "longrope"}:
        yield (
            f"rope_type {found.pop()} changes its frequencies with the length of the text, which "
            "a traced graph cannot; export --to gguf, or load the checkpoint itself"
        )


class Exporter(nn.Module):
    """A causal LM as a pure function, to trace: its cache is passed in and returned as tensors.

    Args:
        model: a float32 causal LM of a supported family.

    Raises:
        UserError: if a graph cannot compute it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model, self.anatomy = model, Anatomy(model)
        if reason := next(obstacles(self.anatomy.family, model.config), None):
            raise UserError(reason)
        layers = self.anatomy.shape.layers
        self.kv_heads = {i: x.kv_heads for i, x in enumerate(layers) if x.attention}
        self.cache_name = cache_name(inspect.signature(model.forward).parameters)
        parts = [f"{i}.{part}" for i in self.kv_heads for part in ("key", "value")]
        past = [f"past_key_values.{part}" for part in parts]
        self.inputs = ["input_ids", "attention_mask", "position_ids", *past]
        self.outputs = ["logits", *(f"present.{part}" for part in parts)]
        self.eval()

    def forward(
        self, ids_BT: Tensor, mask_BS: Tensor, position_BT: Tensor, past: Sequence[KeyValue]
    ) -> tuple[Tensor, list[KeyValue]]:
        """Return the logits (B, T, V) and the cache with the new tokens, (B, K, S, H) each.

        Args:
            ids_BT: the new tokens.
            mask_BS: 0 for padding, over cached and new tokens.
            position_BT: the new tokens' positions.
            past: keys and values (B, K, P, H) of each layer that has attention.
        """
        # Without a config, windowed layers keep all they have seen; their masks hide the rest.
        cache = DynamicCache()
        for layer, (key_BKPH, value_BKPH) in zip(self.kv_heads, past, strict=True):
            cache.update(key_BKPH, value_BKPH, layer)
        given = {"input_ids": ids_BT, "attention_mask": mask_BS, "position_ids": position_BT}
        logits_BTV = self.model(**given, **{self.cache_name: cache}).logits
        layers: list[Any] = cache.layers
        return logits_BTV, [(layers[i].keys, layers[i].values) for i in self.kv_heads]

    def past(self, batch: int, length: int) -> list[KeyValue]:
        """Return a cache of zeros for each layer that has attention."""
        shapes = ((batch, k, length, self.anatomy.head_dim) for k in self.kv_heads.values())
        return [(torch.zeros(x), torch.zeros(x)) for x in shapes]

    def graph(self) -> Any:
        """Trace the model and return it as an `onnx_ir.Model`, which holds the model's weights."""
        batch, tokens, past, total = (
            torch.export.Dim(x) for x in ("batch", "tokens", "past", "total")
        )
        # Any sizes do, but 0 and 1, which tracing would take for constants.
        ids_BT, position_BT = torch.ones(2, 3, dtype=torch.long), torch.tensor([[2, 3, 4]] * 2)
        mask_BS = torch.ones(2, 5, dtype=torch.long)
        new, seen, cached = {0: batch, 1: tokens}, {0: batch, 1: total}, {0: batch, 2: past}
        with _tracing(self.model):
            program: Any = torch.onnx.export(
                self,
                (ids_BT, mask_BS, position_BT, self.past(2, 2)),
                dynamo=True,
                dynamic_shapes=(new, seen, new, [(cached, cached) for _ in self.kv_heads]),
                input_names=self.inputs,
                output_names=self.outputs,
                verbose=False,
            )
        _forget_origins(program.model)
        return program.model

    @torch.no_grad()
    def error(self, file: Path) -> float:
        """Run a file in ONNX Runtime: a padded prompt, then token by token with the cache.

        Returns:
            Largest deviation from the model's own logits without a cache, relative to the largest.
        """
        import onnxruntime

        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        read = {x.name for x in session.get_inputs()}  # some graphs read no positions
        random = torch.Generator().manual_seed(0)
        ids_BS = torch.randint(3, self.model.config.vocab_size, (2, 12), generator=random)
        mask_BS = torch.ones_like(ids_BS)
        mask_BS[0, :3] = 0
        position_BS = (mask_BS.cumsum(1) - 1).clamp(min=0)
        expected_BSV = self.model(
            input_ids=ids_BS, attention_mask=mask_BS, position_ids=position_BS, use_cache=False
        ).logits.numpy()
        cache = [x.numpy() for pair in self.past(2, 0) for x in pair]
        worst = 0.0
        for start, end in ((0, 9), (9, 10), (10, 12)):
            new = slice(start, end)
            given = (ids_BS[:, new], mask_BS[:, :end], position_BS[:, new])
            feed = zip(self.inputs, [x.numpy() for x in given] + cache, strict=True)
            logits_BTV, *cache = session.run(None, {k: v for k, v in feed if k in read})
            seen = mask_BS[:, new].numpy().astype(bool)
            off = np.abs(logits_BTV - expected_BSV[:, new])[seen].max()
            worst = float(np.maximum(worst, off))  # `max` would pass over NaN
        return worst / float(np.abs(expected_BSV).max())


def _forget_origins(graph: Any) -> None:
    """Remove nodes' notes on their origin: they are large and name folders of this machine."""
    for part in (graph, graph.graph, *graph.graph.all_nodes(), *graph.graph.initializers.values()):
        part.metadata_props.clear()
        for value in getattr(part, "outputs", ()):
            value.metadata_props.clear()


@contextmanager
def _tracing(model: PreTrainedModel) -> Iterator[None]:
    """Let attention be plain products and softmax, which every runtime computes, and torch quiet.

    Torch would warn of deprecations and packages that do not matter here.
    """
    before, logger = model.config._attn_implementation, logging.getLogger("torch.onnx")
    level = logger.level
    model.set_attn_implementation("eager")
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        model.set_attn_implementation(before)

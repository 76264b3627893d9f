"""What llama.cpp's Q4_K_M makes of a pruned model, with and without `--set for_quantization=true`.

    python benchmarks/k_quants.py --json benchmarks/results/k-quants.json    # two minutes
    python benchmarks/k_quants.py --show benchmarks/results/k-quants.json    # runs nothing

A random LLaMA of width 1,024 is pruned, exported as f16, and quantized by llama.cpp itself, through
its Python binding (`pip install llama-cpp-py-sync`). Sizes need no quality: every layer loses the
same share, and nothing is refitted or trained.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from gguf import GGUFReader
from gguf_file import require_binding
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nuteprune import prune
from nuteprune.cli.app import quiet_libraries
from nuteprune.errors import RunFailed
from nuteprune.export.gguf.write import write_gguf
from nuteprune.files import to_json
from nuteprune.jobs.sources import load_model, load_tokenizer

SPARSITY, LAYERS = 0.3, 8
SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
"""A KV group has 256 features, and neurons are 11 x 256."""
Q4_K_M = 15  # llama.cpp's number of that kind of file
WORDS = ["student", "teacher", "gate", "mask", "head", "layer", "width", "neuron"]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, print the table, and return the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="file of results")
    parser.add_argument("--show", type=Path, help="print the table of such a file")
    parser.add_argument("--layers", type=int, default=LAYERS)
    args = parser.parse_args(arguments)
    quiet_libraries()
    if args.show:
        result: dict[str, Any] = json.loads(args.show.read_text(encoding="utf-8"))
    else:
        require_binding()
        with tempfile.TemporaryDirectory() as folder:
            rows = made(Path(folder), args.layers)
        result = {"sizes": {**SIZES, "layers": args.layers}, "sparsity": SPARSITY, "rows": rows}
        if args.json:
            args.json.write_text(to_json(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))
    return result


def made(folder: Path, layers: int) -> list[dict[str, Any]]:
    """Return a row for the dense model, and for each way to prune it."""
    dense, text = folder / "dense", folder / "text.jsonl"
    drawn = random.Random(0)
    lines = [" ".join(drawn.choices(WORDS, k=40)) for _ in range(400)]
    text.write_text("".join(to_json({"text": x}) + "\n" for x in lines), encoding="utf-8")
    write_dense(dense, layers, lines)
    how = {"steps": 0, "method": "wanda", "refit": False, "device": "cpu"}
    less = {"length": 32, "eval_blocks": 1, "calibration_blocks": 2, "shares": [1.0], "quiet": True}
    for name, asked in (("cut", False), ("cut for quantization", True)):
        prune(
            model=str(dense),
            data=str(text),
            sparsity=SPARSITY,
            out=folder / name,
            for_quantization=asked,
            **how,
            **less,
        )
    return [row(folder / name) for name in ("dense", "cut", "cut for quantization")]


def write_dense(folder: Path, layers: int, lines: Sequence[str]) -> None:
    """Write a random model with a byte-level tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    torch.manual_seed(0)
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "vocab_size": tokenizer.get_vocab_size()}
    config = LlamaConfig(num_hidden_layers=layers, dtype="float16", **SIZES, **tokens)
    LlamaForCausalLM(config).half().save_pretrained(folder)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


def row(model: Path) -> dict[str, Any]:
    """Return the sizes of a model's files, and how the quantized one stores its matrices."""
    plain, packed = (model / name for name in ("f16.gguf", "q4_k_m.gguf"))
    tokenizer = load_tokenizer(str(model))
    written = write_gguf(load_model(str(model), None), tokenizer, plain, type_name="f16")
    quantize(plain, packed)
    matrices = [x for x in GGUFReader(packed).tensors if len(x.shape) > 1]
    weights, size = sum(int(x.n_elements) for x in matrices), sum(int(x.n_bytes) for x in matrices)
    return {
        "model": model.name,
        "parameters": written.parameters,
        "f16_bytes": written.bytes,
        "q4_k_m_bytes": packed.stat().st_size,
        "bits_per_weight": 8 * size / weights,
        "matrices": dict(Counter(x.tensor_type.name for x in matrices).most_common()),
        "torn": sorted({int(x.shape[0]) for x in matrices if x.shape[0] % 256}),
    }


def quantize(source: Path, target: Path, kind: int = Q4_K_M) -> None:
    """Let llama.cpp quantize a GGUF file.

    Args:
        source: the file, with unquantized weights.
        target: what to write.
        kind: llama.cpp's number of the kind of file.

    Raises:
        RunFailed: if it cannot.
    """
    from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

    ffi, lib = get_ffi(), get_lib()
    quiet = ffi.callback("ggml_log_callback", lambda *_: None)
    lib.llama_log_set(quiet, ffi.NULL)
    params = ffi.new("llama_model_quantize_params *", lib.llama_model_quantize_default_params())
    params.ftype, params.nthread = kind, torch.get_num_threads()
    code = lib.llama_model_quantize(str(source).encode(), str(target).encode(), params)
    lib.llama_log_set(ffi.NULL, ffi.NULL)
    if code:
        raise RunFailed(f"llama.cpp ended with code {code} at quantizing {source}")


def table(result: dict[str, Any]) -> str:
    """Return the rows as a page shows them."""
    lines = [
        "| | parameters | f16 | Q4_K_M | bits per weight | matrices stored as |",
        "|---" * 6 + "|",
    ]
    for x in result["rows"]:
        kinds = ", ".join(f"{count} {name}" for name, count in x["matrices"].items())
        sizes = (f"{x[key] / 1e6:.1f} MB" for key in ("f16_bytes", "q4_k_m_bytes"))
        cells = (x["model"], f"{x['parameters'] / 1e6:.1f}M", *sizes)
        lines.append(f"| {' | '.join(cells)} | {x['bits_per_weight']:.2f} | {kinds} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main() is None)

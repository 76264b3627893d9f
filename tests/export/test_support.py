"""What is said to be supported: the committed page, and the objections of programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from nuteprune.export.clients import warnings
from nuteprune.export.gguf.refusals import ModelFacts
from nuteprune.model.families import FAMILIES
from nuteprune.model.shape import LayerShape, Shape
from tests.forked import python
from tests.scripts import script

REPOSITORY = Path(__file__).parents[2]


def support_page() -> str:
    return script("support", "docs").support_page()


def test_the_page_is_what_the_code_says() -> None:
    page = (REPOSITORY / "docs" / "support.md").read_text(encoding="utf-8")
    assert page == support_page(), "python docs/support.py > docs/support.md"


def test_tests_that_the_page_names_exist() -> None:
    named = [x for x in support_page().split() if x.startswith("tests/")]
    assert named
    assert not [x for x in named if not (REPOSITORY / x.strip("`:,.")).exists()]


def objections(name: str, *layers: LayerShape, hidden: int = 256, **config: Any) -> str:
    family = FAMILIES[name]
    stock = CONFIG_MAPPING[name](hidden_size=hidden, num_attention_heads=4, **config)
    return "\n".join(warnings(ModelFacts(family, stock, Shape(hidden, layers), {})))


def test_nothing_is_said_of_shapes_that_all_take() -> None:
    assert objections("llama", *[LayerShape(4, 2, 512)] * 2, head_dim=64) == ""


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (
            (LayerShape(4, 2, 512), LayerShape(0, 0, 512)),
            ["vLLM: it refuses layers without attention (1)", "SGLang", "`generate_batch`"],
        ),
        (
            (LayerShape(4, 2, 512), LayerShape(4, 2, 500)),
            ["llama.cpp: 1 layer got zeros to make neurons a multiple of 32", "TGI"],
        ),
        (
            [LayerShape(2, 1, 544)] * 2,
            ["llama.cpp: K-quants store blocks of 256, so rows of 128, 544"],
        ),
    ],
)
def test_objections_name_program_and_shape(layers: Any, expected: list[str]) -> None:
    found = objections("llama", *layers, head_dim=64)
    assert all(x in found for x in expected), found


def test_uniform_heads_that_vllms_own_class_would_not_see_are_said() -> None:
    line = "vLLM: its own qwen2 class takes head_dim to be width / heads"
    fewer, whole = [LayerShape(2, 1, 512)] * 2, [LayerShape(4, 2, 256)] * 2
    assert line in objections("qwen2", *fewer, head_dim=64)
    assert line not in objections("qwen2", *whole, head_dim=64)
    assert line not in objections("qwen2", *fewer[:1], *whole[:1], head_dim=64)  # not its class
    assert "vLLM" not in objections("llama", *fewer, head_dim=64)


def test_heads_that_it_would_not_see_are_counted_where_attention_is() -> None:
    mixer = LayerShape(0, 0, 512, mixer=True)
    fewer, whole = (mixer, LayerShape(2, 1, 512)), (mixer, LayerShape(4, 2, 512))
    line = "vLLM: its own lfm2 class takes head_dim to be width / heads, which is not so here; "
    assert line + "prune without heads" in objections("lfm2", *fewer, head_dim=64)
    assert "vLLM" not in objections("lfm2", *whole, head_dim=64)


def test_vllms_backend_is_told_what_logits_are_divided_by() -> None:
    fewer = [LayerShape(2, 1, 0, 4, 64)] * 2
    found = objections("granitemoe", *fewer, head_dim=64, logits_scaling=8.0)
    assert """pass --model-impl transformers --hf-overrides '{"logit_scale": 0.125}'""" in found


@pytest.mark.parametrize("name", ["qwen3_next", "deepseek_v3", "llama4_text", "lfm2"])
def test_free_shapes_that_vllms_backend_does_not_load_are_said(name: str) -> None:
    free = LayerShape(4, 4, 512), LayerShape(4, 4, 256)
    line = f"vLLM: free shapes need its Transformers backend, which does not run {name} as "
    assert line in objections(name, *free)
    assert line not in objections(name, *free[:1] * 2)
    assert "vLLM" not in objections("qwen3_moe", *free)


def test_what_gguf_cannot_express_is_said() -> None:
    layers = LayerShape(4, 4, 512), LayerShape(4, 4, 256)
    assert "llama.cpp: gemma2 cannot be written as GGUF" in objections("gemma2", *layers)
    found = objections("llama", *[LayerShape(4, 2, 512)] * 2, hidden=100, head_dim=64)
    assert "llama.cpp: --type q8_0 stores rows in blocks of 32, and the width is 100" in found


def test_frequencies_that_follow_the_length_are_said_to_be_no_graph() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 5e3, "factor": 2.0}
    found = objections("llama", *[LayerShape(4, 2, 512)] * 2, head_dim=64, rope_parameters=rope)
    assert "ONNX Runtime: rope_type dynamic changes its frequencies" in found


@pytest.mark.slow
def test_a_run_loads_no_format_that_it_does_not_write() -> None:
    code = "import sys, nuteprune.cli.commands, nuteprune.jobs.prune; print(*sys.modules)"
    loaded = python("-c", code).out.split()
    assert "nuteprune.export.checkpoint" in loaded
    assert not [
        x for x in loaded if x.startswith(("nuteprune.export.gguf", "nuteprune.export.onnx"))
    ]

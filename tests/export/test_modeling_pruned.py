from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from nuteprune.export import modeling_pruned
from nuteprune.export.checkpoint import save
from nuteprune.export.config import pruned_config
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.families import FAMILIES
from nuteprune.model.shape import LayerShape, Shape
from tests.families import MORE, QUICK, dense, each, each_family
from tests.greedy import continuation

from .conftest import HEADS, HIDDEN, NEURONS, logits, randomize, stock_config

MAX_ERROR = 1e-5

# Runs where nuteprune cannot be imported: loads each folder as a user would and says what came out.
CLIENT = """
import sys
from pathlib import Path
import torch, transformers
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

print("transformers", transformers.__version__)
old = transformers.__version__ < "5"
how = {"trust_remote_code": True}
if old:  # with sdpa, its Gemma 2 leaves out the bound on attention logits
    how["attn_implementation"] = "eager"
for folder in sorted(Path(sys.argv[1]).iterdir()):
    saved = load_file(folder / "expected.st")
    model = AutoModelForCausalLM.from_pretrained(folder, **how).eval()
    with torch.no_grad():
        error = (model(saved["tokens"]).logits - saved["logits"]).abs().max()
    print(folder.name, "logits", float(error))
    if not old:  # its Gemma 3 cannot be loaded like this, pruned or not
        base = AutoModel.from_pretrained(folder, **how).eval()
        with torch.no_grad():
            error = (base(saved["tokens"])[0] - model.base_model(saved["tokens"])[0]).abs().max()
        print(folder.name, "hidden", float(error))
    mask = torch.ones_like(saved["tokens"])
    greedy = dict(attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    for cache in (None, "static"):
        made = model.generate(saved["tokens"], cache_implementation=cache, **greedy)
        print(folder.name, "generated", bool((made == saved["generated"]).all()))
    if len(sys.argv) > 2:
        model.save_pretrained(Path(sys.argv[2]) / folder.name)
assert not any(name.startswith("nuteprune") for name in sys.modules)
"""


@contextmanager
def attention(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    try:
        yield
    finally:
        model.set_attn_implementation(before)


greedy = partial(continuation, steps=4)


@pytest.mark.parametrize(
    ("model_type", "implementation"),
    # transformers has no sdpa for those that bound their attention logits
    each(
        (x, y)
        for x in dense()
        for y in ("sdpa", "eager")
        if y == "eager" or not FAMILIES[x].attention_softcap
    ),
)
def test_logits_are_those_of_the_zero_padded_stock_model(
    case: Callable, tokens: Tensor, model_type: str, implementation: str
) -> None:
    x = case(model_type)
    with attention(x.pruned, implementation), attention(x.reference, implementation):
        ours, theirs = logits(x.pruned, tokens), logits(x.reference, tokens)
    assert theirs.std() > 0.1  # else the comparison says nothing
    torch.testing.assert_close(ours, theirs, atol=MAX_ERROR, rtol=MAX_ERROR)


@each_family
def test_nothing_is_left_of_removed_blocks(case: Callable, model_type: str) -> None:
    x = case(model_type)
    assert Anatomy(x.pruned).shape == x.shape
    names = [name for name, _ in x.pruned.named_parameters()]
    no_attention, no_mlp = f"{x.family.layers}.1.", f"{x.family.layers}.2."
    for path in (*x.family.attention_modules, *x.family.attention_norms):
        assert not [name for name in names if name.startswith(f"{no_attention}{path}.")]
    for path in (*x.family.mlp_modules, *x.family.mlp_norms):
        assert not [name for name in names if name.startswith(f"{no_mlp}{path}.")]


@each_family
def test_caches_beams_and_padding_generate_what_no_cache_does(
    case: Callable, tokens: Tensor, model_type: str
) -> None:
    x = case(model_type)
    expected = greedy(x.reference, tokens, use_cache=False)
    assert torch.equal(greedy(x.pruned, tokens, use_cache=False), expected)
    assert torch.equal(greedy(x.pruned, tokens), expected)
    beams = greedy(x.reference, tokens, num_beams=2, use_cache=False)
    assert torch.equal(greedy(x.pruned, tokens, num_beams=2), beams)
    padding = torch.zeros(2, 3, dtype=torch.long)
    left, mask = torch.cat([padding, tokens], 1), torch.cat([padding, torch.ones_like(tokens)], 1)
    for cache in ("dynamic", "static"):
        made = greedy(x.pruned, left, attention_mask=mask, cache_implementation=cache)
        assert torch.equal(made, expected)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@each_family
def test_checkpointed_gradients_are_the_same(
    case: Callable, tokens: Tensor, model_type: str
) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = copy.deepcopy(case(model_type).pruned).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(tokens, labels=tokens).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_copy_switches_its_attention_by_itself(case: Callable, tokens: Tensor) -> None:
    original = case("phi3").pruned
    twin = copy.deepcopy(original)
    twin.set_attn_implementation("eager")
    seen = [m.config._attn_implementation for m in twin.modules() if hasattr(m, "config")]
    assert set(seen) == {"eager"}
    first, last = (original.model.layers[i].self_attn.config for i in (0, 2))
    assert first._attn_implementation == last._attn_implementation == "sdpa"
    assert (first.num_attention_heads, last.num_attention_heads) == (4, 3)
    torch.testing.assert_close(logits(twin, tokens), logits(original, tokens))


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_type", ["gemma2", "gpt_neox", pytest.param("phi3", marks=pytest.mark.hard)]
)
def test_decoding_compiles_into_one_graph(case: Callable, tokens: Tensor, model_type: str) -> None:
    model = case(model_type).pruned
    expected = logits(model, tokens)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    cache = StaticCache(config=model.config, max_cache_len=32)
    for start, end in ((0, 11), (11, 12)):
        positions = torch.arange(start, end)
        made = logits(
            compiled, tokens[:, start:end], past_key_values=cache, position_ids=positions[None]
        )
        torch.testing.assert_close(made, expected[:, start:end], atol=MAX_ERROR, rtol=MAX_ERROR)


def test_classes_are_made_once_and_only_from_transformers() -> None:
    made = modeling_pruned.PrunedLlamaForCausalLM
    assert made is modeling_pruned.PrunedLlamaForCausalLM
    assert pickle.loads(pickle.dumps(made)) is made
    for name in ("LlamaConfig", "PrunedNothing", "Pruned", "__path__"):
        with pytest.raises(AttributeError):
            getattr(modeling_pruned, name)


def test_the_file_needs_only_torch_and_transformers() -> None:
    text = Path(modeling_pruned.__file__).read_text(encoding="utf-8")
    imports = [line for line in text.splitlines() if line.startswith(("import ", "from "))]
    assert imports == ["import torch", "import transformers", "from torch import nn"]
    assert len(text.splitlines()) < 300
    assert not [x for x in FAMILIES if x in text]


@pytest.fixture
def checkpoints(case: Callable, tokens: Tensor, tmp_path: Path) -> Callable[[list[str]], Path]:
    """`checkpoints(model_types)`: a folder of them, with what a client should compute."""

    def write(model_types: list[str]) -> Path:
        for model_type in model_types:
            x, folder = case(model_type), tmp_path / "families" / model_type
            save(x.pruned, folder)
            expected = {
                "tokens": tokens,
                "logits": logits(x.reference, tokens),
                "generated": torch.cat([tokens, greedy(x.reference, tokens)], 1),
            }
            save_file(expected, folder / "expected.st")
        return tmp_path / "families"

    return write


def run_client(folders: Path, tmp_path: Path, *arguments: str, **environment: str) -> list[str]:
    """Run the client in a fresh interpreter and return its lines; it must not warn of anything."""
    script = tmp_path / "client.py"
    script.write_text(CLIENT, encoding="utf-8")
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    modules = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-P", str(script), str(folders), *arguments],
        env=kept | modules | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Reading global config value" not in done.stderr
    assert "newly initialized" not in done.stderr
    return done.stdout.splitlines()


def check_client(lines: list[str], per_family: int, families: int) -> None:
    names = Counter(line.split()[0] for line in lines[1:])
    assert len(names) == families
    assert set(names.values()) == {per_family}
    for line in lines[1:]:
        _, what, value = line.split()
        assert value == "True" if what == "generated" else float(value) < 3 * MAX_ERROR, line


USUAL = [x for x in dense() if x in (*QUICK, *MORE)]
OTHERS = [x for x in dense() if x not in USUAL]


@pytest.mark.parametrize(
    "model_types",
    [
        pytest.param(USUAL, marks=pytest.mark.slow(8), id="usual"),
        pytest.param(OTHERS, marks=pytest.mark.hard(30), id="others"),
    ],
)
def test_a_fresh_process_needs_nothing_but_the_folder(
    model_types: list[str], checkpoints: Callable, tmp_path: Path
) -> None:
    folders, again = checkpoints(model_types), tmp_path / "again"
    lines = run_client(folders, tmp_path, str(again))
    check_client(lines, per_family=4, families=len(model_types))
    shipped = Path(modeling_pruned.__file__).read_bytes()
    for model_type in model_types:
        first, second = folders / model_type, again / model_type
        assert (first / "modeling_pruned.py").read_bytes() == shipped
        assert (second / "modeling_pruned.py").read_bytes() == shipped
        before, after = (json.loads((x / "config.json").read_text()) for x in (first, second))
        assert before["per_layer_config"] == after["per_layer_config"]
        assert before["auto_map"] == after["auto_map"]


NOT_IN_4_57 = {
    "apertus": "its activation is another one there",
    "stablelm": "takes heads x head size for the width",
    "ministral3": "younger",
    "qwen3_5_text": "younger",
    "granitemoehybrid": "names kinds of layers otherwise",
    "falcon_h1": "keeps its state in another class",
}
"""Families whose free shapes transformers 4.57 cannot load, and why."""


@pytest.mark.clients
def test_transformers_4_57_computes_the_same(
    checkpoints: Callable, tmp_path: Path, transformers_4: Path
) -> None:
    names = [x for x in dense() if x not in NOT_IN_4_57]
    lines = run_client(checkpoints(names), tmp_path, PYTHONPATH=str(transformers_4))
    assert lines[0] == "transformers 4.57.6"
    check_client(lines, per_family=3, families=len(names))


KINDS = {
    "lfm2": ["full_attention", "conv"],
    "qwen3_5_text": ["full_attention", "linear_attention"],
}
SLIDING = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0}


@pytest.mark.parametrize("removed", [1, 2, 3])
@pytest.mark.parametrize(
    "model_type", ["llama", "mistral", "gemma2", "qwen2", "gpt_neox", "lfm2", "qwen3_5_text"]
)
def test_masks_are_right_where_the_layer_they_are_sized_by_has_no_attention(
    model_type: str, removed: int, tokens: Tensor
) -> None:
    family = FAMILIES[model_type]
    config = stock_config(family)
    changes = {"num_hidden_layers": 4, **(SLIDING if model_type == "qwen2" else {})}
    if hasattr(config, "layer_types"):
        kinds = KINDS.get(model_type, ["sliding_attention", "full_attention"])
        changes["layer_types"] = [kinds[i % 2] for i in range(4)]
    config = type(config).from_dict(config.to_dict() | changes)
    rows = [LayerShape(HEADS, getattr(config, "num_key_value_heads", HEADS), NEURONS)] * 4
    if family.mixer:
        rows[1] = rows[3] = LayerShape(0, 0, NEURONS, mixer=True)
    rows[removed] = LayerShape(0, 0, NEURONS)
    config = pruned_config(config, family, Shape(HIDDEN, tuple(rows)))
    model = getattr(modeling_pruned, f"Pruned{family.causal_lm}")(config).eval()
    randomize(model)
    expected = logits(model, tokens, use_cache=False)
    cache = DynamicCache(config=model.config)
    parts = [logits(model, x, cache=cache, use_cache=True) for x in tokens.split([7, 3, 2], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-4, rtol=1e-4)
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0  # padded at the left
    plain = greedy(model, tokens, attention_mask=mask, use_cache=False)
    assert torch.equal(greedy(model, tokens, attention_mask=mask), plain)
    static = greedy(model, tokens, attention_mask=mask, cache_implementation="static")
    assert torch.equal(static, plain)

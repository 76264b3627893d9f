from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from nuteprune.errors import UserError
from nuteprune.export import checkpoint, modeling_pruned
from nuteprune.export.checkpoint import recount, save
from nuteprune.export.config import pruned_config
from nuteprune.export.loading import build, load_pruned
from nuteprune.export.record import weights_size
from nuteprune.files import write_sums
from nuteprune.gates.budget import Budget
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.families import FAMILIES
from nuteprune.model.lookup import knowing
from nuteprune.model.shape import LayerShape, Shape
from nuteprune.stages.save import save as stage_save
from nuteprune.stages.slice import Sliced
from tests.families import MORE, QUICK, each, each_family

from .conftest import logits, tensors, whole_shape

LLAMA = FAMILIES["llama"]


def uniform(heads: int, kv_heads: int, neurons: int, hidden: int = 96) -> Shape:
    return Shape(hidden, (LayerShape(heads, kv_heads, neurons),) * 3)


@pytest.fixture
def model(case: Callable) -> PreTrainedModel:
    return case("llama").pruned


# --- configs ---------------------------------------------------------------------------------


@each_family
def test_uniform_shapes_are_stock_models(case: Callable, tokens: Tensor, model_type: str) -> None:
    x = case(model_type)
    heads = 6 if x.family.refusal("heads", uniform=True) else 2
    kv_heads = 2 if "kv_heads" in x.family.config_names else heads
    config = pruned_config(x.reference.config, x.family, whole_shape(x.family, heads, kv_heads, 32))
    assert config.model_type == model_type
    assert type(config) is type(x.reference.config)
    stock = getattr(transformers, x.family.causal_lm)
    random = stock(copy.deepcopy(config)).eval().float()
    model = build(config, tensors(random))
    assert type(model) is stock
    assert torch.equal(logits(model, tokens), logits(random, tokens))


@pytest.mark.parametrize(
    "shape",
    [
        uniform(5, 5, 32),  # 96 hidden dimensions are no multiple of 5 heads
        uniform(4, 2, 0),
        replace(uniform(4, 2, 32), layers=(*uniform(4, 2, 32).layers[:2], LayerShape(4, 2, 31))),
    ],
)
def test_what_the_stock_class_cannot_express_is_stated_by_layer(
    case: Callable, shape: Shape
) -> None:
    config = pruned_config(case("llama").reference.config, LLAMA, shape)
    assert config.model_type == "pruned_llama"
    assert config.architectures == ["PrunedLlamaForCausalLM"]
    config.validate()


def test_families_that_derive_head_dim_are_stock_only_with_all_heads(case: Callable) -> None:
    x = case("opt")
    assert pruned_config(x.reference.config, x.family, uniform(2, 2, 32)).num_attention_heads == 6
    stock = pruned_config(x.reference.config, x.family, uniform(6, 6, 32))
    assert stock.model_type == "opt"
    assert not hasattr(stock, "head_dim")


def long_rope_config(case: Callable) -> PreTrainedConfig:
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}  # of half of 16 dimensions
    rope = {"rope_type": "longrope", "rope_theta": 5e3, "partial_rotary_factor": 0.5, **factors}
    config = case("phi3").reference.config
    return type(config).from_dict(config.to_dict() | {"rope_parameters": rope})


def test_long_rope_keeps_its_factors_valid(case: Callable) -> None:
    for shape in (case("phi3").shape, uniform(2, 2, 32), uniform(5, 5, 32, hidden=72)):
        pruned = pruned_config(long_rope_config(case), FAMILIES["phi3"], shape)
        pruned.validate()
        assert pruned.head_dim == 16


def test_hidden_size_and_epsilon_are_set_and_the_original_is_left(case: Callable) -> None:
    config = case("llama").reference.config
    before = config.to_dict()
    shape = replace(case("llama").shape, hidden=48)
    pruned = pruned_config(config, LLAMA, shape, epsilon=2e-6)
    assert (pruned.hidden_size, pruned.head_dim, pruned.rms_norm_eps) == (48, 16, 2e-6)
    assert config.to_dict() == before
    again = pruned_config(pruned, LLAMA, uniform(2, 1, 32, hidden=32))
    assert again.model_type == "llama"
    assert not {"pruned", "per_layer_config", "auto_map"} & again.to_dict().keys()
    assert (again.head_dim, again.rms_norm_eps) == (16, 2e-6)


def test_the_divisor_of_logits_is_stated_as_vllm_reads_it(case: Callable) -> None:
    x = case("granite")
    config = type(x.reference.config).from_dict(
        x.reference.config.to_dict() | {"logits_scaling": 4.0}
    )
    pruned = pruned_config(config, x.family, x.shape)
    assert (pruned.logits_scaling, pruned.logit_scale) == (4.0, 0.25)
    stock = pruned_config(pruned, x.family, uniform(4, 2, 32))
    assert stock.model_type == "granite"
    assert not hasattr(stock, "logit_scale")


def test_the_first_layer_must_keep_its_attention(case: Callable) -> None:
    shape = Shape(96, (LayerShape(0, 0, 32), *uniform(4, 2, 32).layers[1:]))
    with pytest.raises(UserError, match="layer 0"):
        pruned_config(case("llama").reference.config, LLAMA, shape)


# --- save and load ---------------------------------------------------------------------------


@each_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_comes_back(
    case: Callable, tmp_path: Path, tokens: Tensor, model_type: str, dtype: torch.dtype
) -> None:
    model = copy.deepcopy(case(model_type).pruned).to(dtype)
    save(model, tmp_path / "model")
    loaded = load_pruned(tmp_path / "model")
    ours, theirs = tensors(model), tensors(loaded)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    if dtype is torch.float32:  # a cast model has cast its rotary frequencies too
        assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    before, after = model.config.to_dict(), loaded.config.to_dict()
    assert {key: after[key] for key in before} == before | {"_name_or_path": after["_name_or_path"]}
    counted = recount(tmp_path / "model")
    parameters = list(model.parameters())  # tied weights once
    assert counted["total"] == sum(x.numel() for x in parameters)
    assert len(counted["tensors"]) == len(parameters)
    if model.config.tie_word_embeddings:
        head, embedding = loaded.get_output_embeddings(), loaded.get_input_embeddings()
        assert head.weight.data_ptr() == embedding.weight.data_ptr()


def test_large_weights_are_split(model: PreTrainedModel, tmp_path: Path, tokens: Tensor) -> None:
    save(model, tmp_path / "whole")
    save(model, tmp_path / "split", max_shard_size="20KB")
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 2
    assert recount(tmp_path / "split") == recount(tmp_path / "whole")
    assert torch.equal(logits(load_pruned(tmp_path / "split"), tokens), logits(model, tokens))


@each_family
def test_tensors_have_the_names_that_stock_checkpoints_use(
    case: Callable, tmp_path: Path, model_type: str
) -> None:
    x = case(model_type)
    save(x.pruned, tmp_path / "pruned")
    save(x.reference, tmp_path / "stock")
    ours, theirs = (recount(tmp_path / name)["tensors"] for name in ("pruned", "stock"))
    assert ours.keys() < theirs.keys()


@pytest.mark.parametrize("model_type", each([*QUICK, *MORE[1:]]))
def test_configs_state_rope_as_transformers_4_reads_it(
    case: Callable, tmp_path: Path, model_type: str
) -> None:
    save(case(model_type).pruned, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    keys = ("rope_theta", "partial_rotary_factor", "rotary_emb_base", "rotary_pct")
    found = {key: config[key] for key in (*keys, "rope_local_base_freq") if key in config}
    assert found == {
        "llama": {"rope_theta": 5e3},
        "qwen2": {"rope_theta": 1e6},
        "phi3": {"rope_theta": 5e3, "partial_rotary_factor": 0.5},
        "gemma3_text": {"rope_theta": 1e5, "rope_local_base_freq": 5e3},
        "gpt_neox": {"rotary_emb_base": 5e3, "rotary_pct": 0.5},
        "opt": {},
    }.get(model_type, {"rope_theta": 1e4})
    scaling = {"rope_type": "linear", "factor": 8.0} if model_type == "gemma3_text" else None
    assert config.get("rope_scaling") == scaling


def test_configs_state_experts_as_transformers_4_reads_them(
    tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    """In transformers 4 `num_experts` is a setting of its own, and 128 without."""
    model = tiny_model("qwen3_moe")
    save(model, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    count = model.config.num_local_experts
    assert config["num_experts"] == config["num_local_experts"] == count != 128
    assert load_pruned(tmp_path / "model").config.num_local_experts == count


def test_long_rope_is_stated_as_transformers_4_demands(case: Callable, tmp_path: Path) -> None:
    x = case("phi3")
    config = pruned_config(long_rope_config(case), x.family, x.shape)
    save(modeling_pruned.PrunedPhi3ForCausalLM(config), tmp_path / "model")
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    factors = {key: config.rope_parameters[key] for key in ("short_factor", "long_factor")}
    assert written["rope_scaling"] == {"type": "longrope", **factors}
    loaded = load_pruned(tmp_path / "model").config.rope_parameters
    assert loaded.items() >= config.rope_parameters.items()


def test_the_tokenizer_is_saved_under_names_that_all_know(
    model: PreTrainedModel, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|one|>"]})
    save(model, tmp_path / "model", tokenizer)
    config = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<|one|>"]
    loaded = AutoTokenizer.from_pretrained(tmp_path / "model", trust_remote_code=True)
    assert loaded.extra_special_tokens == ["<|one|>"]
    text = "café 1234<|one|> def f(x):"
    assert loaded(text).input_ids == tokenizer(text).input_ids


@pytest.mark.clients
def test_transformers_4_57_reads_the_tokenizer(
    model: PreTrainedModel, tmp_path: Path, tiny_tokenizer: Any, transformers_4: Path
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|one|>"]})
    save(model, tmp_path / "model", tokenizer)
    text = "café 1234<|one|> def f(x):"
    script = (
        "import sys, transformers; assert transformers.__version__ < '5';"
        "print(transformers.AutoTokenizer.from_pretrained(sys.argv[1])(sys.argv[2]).input_ids)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model"), text],
        env={"PYTHONPATH": str(transformers_4), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == tokenizer(text).input_ids


def test_only_free_folders_are_written_to(model: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "model" / "run").mkdir(parents=True)
    save(model, tmp_path / "model")
    names = {x.name for x in (tmp_path / "model").iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors", "modeling_pruned.py"),
        *("run", "SHA256SUMS"),
    }
    assert [x.name for x in tmp_path.iterdir()] == ["model"]
    before = (tmp_path / "model" / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"not empty \(SHA256SUMS, config.json, "):
        save(model, tmp_path / "model")
    assert (tmp_path / "model" / "config.json").read_bytes() == before


def test_nothing_is_written_beside_the_folder_which_may_be_another_disk(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(folder: Path) -> None:
        assert folder.is_relative_to(tmp_path / "model")
        assert [x.name for x in tmp_path.iterdir()] == ["model"]
        write_sums(folder)

    monkeypatch.setattr(checkpoint, "write_sums", look)
    save(model, tmp_path / "model")


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"factor": 4.0, "original_max_position_embeddings": 16},
        {"original_max_position_embeddings": 16},
        {"attention_factor": 1.5},
    ],
    ids=lambda more: "-".join(more) or "plain",
)
@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_long_rope_is_judged_as_it_is_written(
    name: str, more: dict[str, Any], tiny_model: Callable, tmp_path: Path
) -> None:
    partial = {"partial_rotary_factor": 0.5} if name == "phi3" else {}
    pairs = 2 if name == "phi3" else 4
    rope = {
        **{"rope_type": "longrope", "rope_theta": 5e3, **partial, **more},
        **{"short_factor": [1.0] * pairs, "long_factor": [2.0] * pairs},
    }
    original = {"original_max_position_embeddings": 16} if name == "phi3" else {}
    whole = tiny_model(name, rope_parameters=rope, **original)
    tokens = torch.arange(3, 43)[None]
    save(whole, tmp_path / "model")
    again = load_pruned(tmp_path / "model", trust_remote_code=True, use_safetensors=True)
    assert torch.equal(again(tokens).logits, whole(tokens).logits)


def test_the_weights_that_would_be_loaded_are_counted(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    save(model, tmp_path / "one")
    save(model, tmp_path / "many", max_shard_size="100kB")
    size = (tmp_path / "one/model.safetensors").stat().st_size
    assert weights_size(tmp_path / "one") == size
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    shards = weights_size(tmp_path / "many")
    assert size <= shards < 1.1 * size
    (tmp_path / "many/consolidated.safetensors").write_bytes(b"all of it once more")
    assert weights_size(tmp_path / "many") == shards


def test_the_working_folder_can_be_written_to(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    save(model, ".")
    assert (tmp_path / "here" / "config.json").exists()


@pytest.mark.parametrize("step", ["model", "sums", *range(5)])
def test_a_save_cut_short_leaves_no_checkpoint(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str | int
) -> None:
    moved = 0
    replace_file = Path.replace

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    def move(self: Path, target: Path) -> Path:
        nonlocal moved
        moved += 1
        return stop() if moved > int(step) else replace_file(self, target)

    if step == "model":
        monkeypatch.setattr(transformers.GenerationConfig, "save_pretrained", stop)
    elif step == "sums":
        monkeypatch.setattr(checkpoint, "write_sums", stop)
    else:
        monkeypatch.setattr(Path, "replace", move)
    with pytest.raises(KeyboardInterrupt):
        save(model, tmp_path / "model")
    assert not (tmp_path / "model" / "config.json").exists()
    assert {x.name for x in tmp_path.iterdir()} <= {"model"}


def test_what_a_killed_save_left_behind_is_replaced(model: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "model" / checkpoint.PARTIAL).mkdir(parents=True)
    (tmp_path / "model" / checkpoint.PARTIAL / "old.safetensors").write_text("old")
    save(model, tmp_path / "model")
    assert checkpoint.PARTIAL not in {x.name for x in (tmp_path / "model").iterdir()}
    assert not (tmp_path / "model" / "old.safetensors").exists()
    assert [x.name for x in tmp_path.iterdir()] == ["model"]


def test_an_unwritable_place_is_named(model: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file"):
        save(model, tmp_path / "file" / "model")


def test_a_folder_without_weights_has_no_count(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no weights"):
        recount(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    with pytest.raises(UserError, match="header too small"):
        recount(tmp_path)


def test_buffers_that_an_entry_of_ones_own_names_are_no_parameters(tmp_path: Path) -> None:
    family = replace(LLAMA, model_type="mine", buffers=("mlp.scale",))
    layer = "model.layers.0.mlp"
    held = {f"{layer}.up_proj.weight": torch.full((4, 3), 0.3), f"{layer}.scale": torch.tensor(0.3)}
    save_file(held, tmp_path / "model.safetensors")
    assert recount(tmp_path)["total"] == 13
    with knowing(family):
        assert recount(tmp_path)["total"] == 12
        rounded = checkpoint.rounded_as_stored(held, torch.bfloat16)
    same = {name: torch.equal(x, rounded[name]) for name, x in held.items()}
    assert same == {f"{layer}.up_proj.weight": False, f"{layer}.scale": True}


def test_code_that_came_with_a_stock_model_is_not_asked_for(
    tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model = tiny_model("llama")
    model.config.auto_map = {"AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    anatomy, folder = Anatomy(model), tmp_path / "out"
    how: dict[str, Any] = {"parameters": {"before": anatomy.parameters()}, "target": 0.0}
    how |= {"budget": Budget.of(anatomy), "stored_dtype": model.dtype}
    stage_save(Sliced(model, anatomy.shape), folder, None, **how)
    assert "auto_map" not in json.loads((folder / "config.json").read_text())
    assert "remote" not in (folder / "README.md").read_text()
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

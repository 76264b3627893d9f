from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from nuteprune.errors import UserError
from nuteprune.export import modeling_pruned
from nuteprune.export.checkpoint import build, load_pruned, pruned_config, recount, save
from nuteprune.model.families import FAMILIES
from nuteprune.model.shape import LayerShape, Shape

LLAMA = FAMILIES["llama"]
all_families = pytest.mark.parametrize("model_type", FAMILIES)


def uniform(heads: int, kv_heads: int, neurons: int, hidden: int = 96) -> Shape:
    return Shape(hidden, (LayerShape(heads, kv_heads, neurons),) * 3)


def tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """A model's tensors as a state dict holds them, tied ones once."""
    return dict(model.named_parameters())


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    return model(tokens).logits


@pytest.fixture
def model(case: Callable) -> PreTrainedModel:
    return case("llama").pruned


@pytest.fixture
def folder(model: PreTrainedModel, tmp_path: Path) -> Path:
    save(model, tmp_path / "model")
    return tmp_path / "model"


def change_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


# --- configs ---------------------------------------------------------------------------------


@all_families
def test_uniform_shapes_are_stock_models(case: Callable, tokens: Tensor, model_type: str) -> None:
    x = case(model_type)
    heads = 6 if x.family.head_dim_from_hidden else 2
    kv_heads = 2 if "kv_heads" in x.family.config_names else heads
    config = pruned_config(x.reference.config, x.family, uniform(heads, kv_heads, 32))
    assert config.model_type == model_type
    assert type(config) is type(x.reference.config)
    stock = getattr(transformers, x.family.causal_lm)
    random = stock(copy.deepcopy(config)).eval()
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


# --- build -----------------------------------------------------------------------------------


@all_families
def test_build_holds_the_given_tensors(case: Callable, tokens: Tensor, model_type: str) -> None:
    original = case(model_type).pruned
    state = {name: x.detach().clone() for name, x in tensors(original).items()}
    model = build(copy.deepcopy(original.config), state)
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == state[name].data_ptr()
        assert parameter.requires_grad
    assert not [x for x in model.buffers() if x.is_meta]
    assert torch.equal(logits(model, tokens), logits(original, tokens))
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == original.config.tie_word_embeddings


def test_build_names_tensors_that_do_not_fit(model: PreTrainedModel) -> None:
    state = tensors(model)
    state["extra"] = torch.ones(1)
    state["model.layers.0.mlp.up_proj.weight"] = torch.ones(7, 96)
    del state["model.norm.weight"]
    with pytest.raises(UserError) as error:
        build(copy.deepcopy(model.config), state)
    message = str(error.value)
    assert "missing: model.norm.weight" in message
    assert "unexpected: extra" in message
    assert "model.layers.0.mlp.up_proj.weight [7, 96], not [40, 96]" in message


# --- save and load ---------------------------------------------------------------------------


@all_families
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
    assert counted["total"] == sum(x.numel() for x in ours.values())
    assert len(counted["tensors"]) == len(ours)  # tied weights once
    if model.config.tie_word_embeddings:
        head, embedding = loaded.get_output_embeddings(), loaded.get_input_embeddings()
        assert head.weight.data_ptr() == embedding.weight.data_ptr()


def test_large_weights_are_split(model: PreTrainedModel, tmp_path: Path, tokens: Tensor) -> None:
    save(model, tmp_path / "whole")
    save(model, tmp_path / "split", max_shard_size="20KB")
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 2
    assert recount(tmp_path / "split") == recount(tmp_path / "whole")
    assert torch.equal(logits(load_pruned(tmp_path / "split"), tokens), logits(model, tokens))


def test_stock_models_load_as_stock_models(case: Callable, tmp_path: Path, tokens: Tensor) -> None:
    reference = case("qwen3").reference
    save(reference, tmp_path / "model")
    loaded = load_pruned(tmp_path / "model", dtype=torch.float32)
    assert type(loaded) is type(reference)
    assert torch.equal(logits(loaded, tokens), logits(reference, tokens))
    assert not (tmp_path / "model" / "modeling_pruned.py").exists()


def test_code_in_a_checkpoint_is_not_run(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "modeling_pruned.py").write_text("raise SystemExit('was run')")
    assert isinstance(load_pruned(folder), modeling_pruned.PrunedLlamaForCausalLM)
    change_config(folder, lambda config: config.update(model_type="something_else"))
    with pytest.raises(UserError, match="contains custom code"):
        load_pruned(folder)
    assert "Do you wish to run" not in capfd.readouterr().out


@all_families
def test_tensors_have_the_names_that_stock_checkpoints_use(
    case: Callable, tmp_path: Path, model_type: str
) -> None:
    x = case(model_type)
    save(x.pruned, tmp_path / "pruned")
    save(x.reference, tmp_path / "stock")
    ours, theirs = (recount(tmp_path / name)["tensors"] for name in ("pruned", "stock"))
    assert ours.keys() < theirs.keys()


@all_families
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
    save(model, tmp_path / "model", files={"README.md": "# Größe\n", "nuteprune.json": "{}"})
    names = {x.name for x in (tmp_path / "model").iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors", "modeling_pruned.py"),
        *("README.md", "nuteprune.json", "run", "SHA256SUMS"),
    }
    assert (tmp_path / "model" / "README.md").read_text(encoding="utf-8") == "# Größe\n"
    assert [x.name for x in tmp_path.iterdir()] == ["model"]
    before = (tmp_path / "model" / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"not empty \(README.md, "):
        save(model, tmp_path / "model")
    assert (tmp_path / "model" / "config.json").read_bytes() == before


def test_the_working_folder_can_be_written_to(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    save(model, ".")
    assert (tmp_path / "here" / "config.json").exists()


@pytest.mark.parametrize("step", ["model", "file", *range(5)])
def test_a_save_cut_short_leaves_no_checkpoint(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str | int
) -> None:
    moved = 0
    replace_file, write_text = Path.replace, Path.write_text

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    def move(self: Path, target: Path) -> Path:
        nonlocal moved
        moved += 1
        return stop() if moved > int(step) else replace_file(self, target)

    def write(self: Path, *arguments: Any, **kwargs: Any) -> int:
        return stop() if self.name == "a.txt" else write_text(self, *arguments, **kwargs)

    if step == "model":
        monkeypatch.setattr(transformers.GenerationConfig, "save_pretrained", stop)
    elif step == "file":
        monkeypatch.setattr(Path, "write_text", write)
    else:
        monkeypatch.setattr(Path, "replace", move)
    with pytest.raises(KeyboardInterrupt):
        save(model, tmp_path / "model", files={"a.txt": "a"})
    assert not (tmp_path / "model" / "config.json").exists()
    assert {x.name for x in tmp_path.iterdir()} <= {"model"}


def test_what_a_killed_save_left_behind_is_replaced(model: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.partial" / "old.safetensors").write_text("old")
    save(model, tmp_path / "model")
    assert not (tmp_path / "model" / "old.safetensors").exists()
    assert [x.name for x in tmp_path.iterdir()] == ["model"]


def test_an_unwritable_place_is_named(model: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file"):
        save(model, tmp_path / "file" / "model")


# --- damage ----------------------------------------------------------------------------------


def cut_weights(folder: Path, size: int) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def replace_weights_by_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights cut short": (lambda x: cut_weights(x, -100), "cannot load .*not fully covered"),
    "weights cut to nothing": (lambda x: cut_weights(x, 5), "cannot load .*header too small"),
    "no weights": (lambda x: (x / "model.safetensors").unlink(), "cannot load .*safetensors"),
    "a pickle for weights": (replace_weights_by_pickle, "cannot load .*safetensors"),
    "a tensor less": (
        lambda x: change_weights(x, lambda w: w.pop("model.norm.weight")),
        "disagree: missing: model.norm.weight",
    ),
    "a tensor more": (
        lambda x: change_weights(x, lambda w: w.update(more=torch.ones(1))),
        "disagree: unexpected: more",
    ),
    "other heads": (
        lambda x: change_config(
            x, lambda c: c["per_layer_config"]["2"].update(num_attention_heads=2)
        ),
        r"of another size: model.layers.2.self_attn.o_proj.weight \[96, 48\], not \[96, 32\]",
    ),
    "another hidden size": (
        lambda x: change_config(x, lambda c: c.update(hidden_size=48)),
        "of another size: .* and .* more",
    ),
    "a block restored": (
        lambda x: change_config(x, lambda c: c["per_layer_config"]["2"].pop("skip")),
        "missing: model.layers.2.mlp.down_proj.weight, .*",
    ),
    "a block skipped": (
        lambda x: change_config(x, lambda c: c["per_layer_config"]["0"].update(skip=["mlp"])),
        "unexpected: model.layers.0.mlp.down_proj.weight, .*",
    ),
    "a layer more": (
        lambda x: change_config(x, lambda c: c.update(num_hidden_layers=4)),
        "missing: model.layers.3",
    ),
    "no layout": (lambda x: change_config(x, lambda c: c.pop("pruned")), "cannot load .*pruned"),
    "a word for a number": (
        lambda x: change_config(x, lambda c: c.update(hidden_size="many")),
        "cannot load .*hidden_size",
    ),
    "no JSON": (lambda x: (x / "config.json").write_text('{"a'), "cannot load .*JSON"),
    "no config": (lambda x: (x / "config.json").unlink(), "cannot load .*config.json"),
    "an unknown type": (
        lambda x: change_config(x, lambda c: c.update(model_type="pruned_llamas")),
        "nearest: llama",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_told_in_one_line(
    folder: Path, damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    harm, message = DAMAGE[damage]
    harm(folder)
    capfd.readouterr()
    with pytest.raises(UserError) as error:
        load_pruned(folder)
    assert re.search(message, str(error.value))
    assert "\n" not in str(error.value)
    assert "REPORT" not in capfd.readouterr().err


@pytest.mark.parametrize("shapes", ["stock", "uniform"])
@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            lambda x: change_config(x, lambda c: c.update(num_hidden_layers=2)),
            r"disagree: unexpected: model.layers.2.mlp.down_proj.weight, .* and \d more",
        ),
        (
            lambda x: change_weights(
                x, lambda w: w.update({"model.layers.1.self_attn.q_proj.bias": torch.ones(32)})
            ),
            "disagree: unexpected: model.layers.1.self_attn.q_proj.bias$",
        ),
        (
            lambda x: change_config(x, lambda c: c.update(intermediate_size=24)),
            r"of another size: model.layers.0.mlp.down_proj.weight \[32, \d\d\], not \[32, 24\]",
        ),
        (lambda x: cut_weights(x, -100), "cannot load .*not fully covered"),
    ],
    ids=["a layer less", "a bias more", "fewer neurons", "cut short"],
)
def test_stock_classes_are_not_given_what_they_would_drop_in_silence(
    harm: Callable[[Path], object],
    message: str,
    shapes: str,
    tiny_model: Callable,
    prune_at_random: Callable,
    tmp_path: Path,
) -> None:
    model = tiny_model("llama")
    if shapes == "uniform":
        model = prune_at_random(model, ("kv_groups", "neurons"), "uniform")
    model.save_pretrained(tmp_path / "model")
    harm(tmp_path / "model")
    with pytest.raises(UserError, match=message):
        load_pruned(tmp_path / "model")


def test_stock_files_may_hold_what_is_no_weight_of_a_layer(
    tiny_model: Callable, tokens: Tensor, tmp_path: Path
) -> None:
    model = tiny_model("gpt_neox", vocab_size=128)
    model.save_pretrained(tmp_path / "model")
    more = {
        "gpt_neox.layers.0.attention.masked_bias": torch.ones(1),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(2),
        "value_head.weight": torch.ones(1, 32),
    }
    change_weights(tmp_path / "model", lambda w: w.update(more))
    assert torch.equal(logits(load_pruned(tmp_path / "model"), tokens), logits(model, tokens))


def test_a_missing_shard_is_named(model: PreTrainedModel, tmp_path: Path) -> None:
    save(model, tmp_path / "split", max_shard_size="20KB")
    gone = sorted((tmp_path / "split").glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(UserError, match=rf"cannot load .*{gone.name}"):
        load_pruned(tmp_path / "split")


def test_a_folder_without_weights_has_no_count(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no weights"):
        recount(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    with pytest.raises(UserError, match="header too small"):
        recount(tmp_path)


def test_a_user_without_remote_code_is_refused_in_plain_words(folder: Path) -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)

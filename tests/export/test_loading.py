from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from nuteprune.errors import UserError
from nuteprune.export import hub, loading, modeling_pruned
from nuteprune.export.checkpoint import save
from nuteprune.export.loading import (
    bring_recorded_family,
    build,
    in_dtype,
    load_config,
    load_pruned,
)
from nuteprune.files import file_sum
from nuteprune.jobs.sources import read_config
from nuteprune.model import lookup
from nuteprune.model.families import FAMILIES
from nuteprune.model.family_file import to_dict
from nuteprune.run_folder import RECORD
from tests.families import each_family

from .conftest import logits, tensors


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


# --- build -----------------------------------------------------------------------------------


@each_family
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


@each_family
def test_in_another_dtype_a_model_is_what_its_file_is(
    case: Callable, tmp_path: Path, tokens: Tensor, model_type: str
) -> None:
    model = case(model_type).pruned
    save(model, tmp_path / "model")
    loaded = load_pruned(tmp_path / "model", dtype=torch.bfloat16)
    before = model.config.to_dict()
    half = in_dtype(model, torch.bfloat16)
    assert torch.equal(logits(half, tokens), logits(loaded, tokens))
    assert {x.dtype for x in tensors(half).values()} == {torch.bfloat16}
    assert model.config.to_dict() == before
    assert {x.dtype for x in tensors(model).values()} == {torch.float32}
    tied = half.get_output_embeddings().weight is half.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings
    assert in_dtype(model, torch.float32) is model


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_routers_that_files_keep_in_float32_are_not_rounded(
    name: str, tiny_model: Callable, tmp_path: Path
) -> None:
    model, tokens = tiny_model(name), torch.arange(3, 35)[None]
    save(model, tmp_path / "model")
    loaded = load_pruned(tmp_path / "model", dtype=torch.bfloat16)
    half = in_dtype(model, torch.bfloat16)
    gates = [x for x, p in loaded.named_parameters() if p.dtype == torch.float32]
    assert gates
    assert all(torch.equal(half.get_parameter(x), model.get_parameter(x)) for x in gates)
    assert torch.equal(logits(half, tokens), logits(loaded, tokens))


def test_layers_that_predict_further_tokens_are_passed_over(
    tiny_model: Callable, tmp_path: Path
) -> None:
    model = tiny_model("deepseek_v3")
    save(model, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    state = load_file(file)
    ahead = {k.replace(".2.", ".3."): v for k, v in state.items() if ".layers.2." in k}
    save_file(state | {k: v.clone() for k, v in ahead.items()}, file, {"format": "pt"})
    (tmp_path / "model" / "SHA256SUMS").unlink(missing_ok=True)
    change_config(tmp_path / "model", lambda x: x.update(num_nextn_predict_layers=0))
    with pytest.raises(UserError, match=r"unexpected: model\.layers\.3"):
        load_pruned(tmp_path / "model")
    change_config(tmp_path / "model", lambda x: x.update(num_nextn_predict_layers=1))
    assert load_pruned(tmp_path / "model").config.num_hidden_layers == 3


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


# --- files ---------------------------------------------------------------------------------


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


def test_a_user_without_remote_code_is_refused_in_plain_words(folder: Path) -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)


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


GPTQ = {"quant_method": "gptq", "bits": 4}
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
    "padding beyond the vocabulary": (
        lambda x: change_config(x, lambda c: c.update(pad_token_id=1_000_000)),
        "cannot load .*[Pp]adding_idx",
    ),
    "a quantizer that is not here": (
        lambda x: change_config(x, lambda c: c.update(quantization_config=GPTQ)),
        "cannot load .*requires optimum",
    ),
    "no JSON": (lambda x: (x / "config.json").write_text('{"a'), "cannot load .*JSON"),
    "JSON, but no config": (lambda x: (x / "config.json").write_text("null"), "no mapping"),
    "a list for a config": (lambda x: (x / "config.json").write_text("[1]"), "no mapping"),
    "a number for a type": (
        lambda x: change_config(x, lambda c: c.update(model_type=5)),
        "no mapping that names a model_type",
    ),
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
    if "no mapping" in message:
        for read in (load_config, read_config):
            with pytest.raises(UserError, match=message):
                read(str(folder))
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
            lambda x: change_weights(
                x,
                lambda w: w.update({"model.layers.1.mlp.up_proj.weight_scale_inv": torch.ones(1)}),
            ),
            "disagree: unexpected: model.layers.1.mlp.up_proj.weight_scale_inv$",
        ),
        (
            lambda x: change_config(x, lambda c: c.update(intermediate_size=24)),
            r"of another size: model.layers.0.mlp.down_proj.weight \[32, \d\d\], not \[32, 24\]",
        ),
        (lambda x: cut_weights(x, -100), "cannot load .*not fully covered"),
    ],
    ids=["a layer less", "a bias more", "scales", "fewer neurons", "cut short"],
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


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w1.weight"),
        ("qwen3_moe", "model.layers.2.mlp.experts.0.up_proj.weight"),
    ],
)
def test_an_expert_that_does_not_go_with_the_others_is_named(
    name: str, tensor: str, tiny_model: Callable, prune_at_random: Callable, tmp_path: Path
) -> None:
    model = prune_at_random(tiny_model(name), ("experts",), "uniform")
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    change_weights(folder, lambda w: w.update({tensor: w[tensor][:-1].clone()}))
    size = r"is \[\d+, \d+\], not \[\d+, \d+\]$"
    with pytest.raises(UserError, match=f"cannot be stacked: {re.escape(tensor)} {size}"):
        load_pruned(folder)
    change_weights(folder, lambda w: w.pop(tensor))
    with pytest.raises(UserError, match=f"cannot be stacked: no {re.escape(tensor)}$"):
        load_pruned(folder)


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


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("wanted", [0, 7])
def test_a_token_that_is_routed_to_more_experts_than_there_are_is_refused(
    name: str, wanted: int, tiny_model: Callable, tmp_path: Path
) -> None:
    tiny_model(name).save_pretrained(tmp_path)
    for count, message in ((6, None), (wanted, f"routes each token to {wanted} of 6 experts;")):
        change_config(tmp_path, lambda config, x=count: config.update(num_experts_per_tok=x))
        for load in (load_config, load_pruned):
            with pytest.raises(UserError, match=message) if message else nullcontext():
                load(tmp_path)


@pytest.mark.parametrize("ids", ["2", [[]], [None], 2.0, True])
def test_special_tokens_of_a_generation_config_are_numbers(folder: Path, ids: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(UserError, match=r"eos_token_id in generation_config\.json"):
        load_pruned(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3], "pad_token_id": 0}')
    load_pruned(folder)


def test_more_layers_than_any_model_has_are_refused_before_they_are_counted(folder: Path) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "num_hidden_layers": 2**63}))
    with pytest.raises(UserError, match="num_hidden_layers is 9223372036854775808"):
        load_pruned(str(folder))


def test_layers_that_contradict_their_list_of_kinds_are_refused_in_a_line(tmp_path: Path) -> None:
    values = {"model_type": "lfm2", "num_hidden_layers": 4, "layer_types": ["conv"] * 3}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"`num_hidden_layers` \(4\) must be equal") as told:
        load_config(tmp_path)
    assert "\n" not in str(told.value)


def test_an_entry_that_travels_in_a_record_is_found_on_the_hub_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = replace(FAMILIES["llama"], model_type="mine")
    path, asked = tmp_path / RECORD, []
    path.write_text(json.dumps({"family": to_dict(family)}))

    def fetch(*args: str, **where: str) -> str:
        asked.append((*args, where))
        return str(path)

    monkeypatch.setattr(hub, "hf_hub_download", fetch)
    monkeypatch.setattr(lookup, "_OWN", {})
    bring_recorded_family("me/small", revision="v2")
    assert asked == [("me/small", RECORD, {"revision": "v2"})]
    assert lookup.brought_along("mine") == family
    bias = "model.layers.0.self_attn.q_proj.bias"  # which a config may not deny
    for model_type in ("mine", "pruned_mine", "llama", "pruned_llama"):
        config = PreTrainedConfig.from_dict({"model_type": model_type})
        assert loading._is_lost(bias, config)
    missing = LocalEntryNotFoundError("no such file")
    monkeypatch.setattr(hub, "hf_hub_download", lambda *_, **__: (_ for _ in ()).throw(missing))
    bring_recorded_family("me/other")
    assert lookup.all_brought_along() == (family,)


def test_an_adapter_beside_the_weights_is_refused(tiny_model: Callable, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    load_pruned(tmp_path)
    get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(
        tmp_path
    )
    with pytest.raises(UserError, match=r"has an adapter beside its weights .*merge_and_unload"):
        load_pruned(tmp_path)


def test_sums_may_be_written_as_other_programs_do(tiny_model: Callable, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    value = file_sum(tmp_path / "model.safetensors").upper()
    (tmp_path / "SHA256SUMS").write_text(f"# of today\n\n{value} *model.safetensors\n")
    load_pruned(tmp_path)
    (tmp_path / "SHA256SUMS").write_text(f"{value[::-1]} *model.safetensors\n")
    with pytest.raises(UserError, match="changed"):
        load_pruned(tmp_path)

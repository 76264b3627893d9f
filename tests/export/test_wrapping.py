"""Language models inside of models of several modalities: pruned, with all around them kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from nuteprune.errors import UserError
from nuteprune.export import hub
from nuteprune.export.checkpoint import assemble, recount, save
from nuteprune.export.loading import load_config, load_pruned
from nuteprune.export.record import blocks_recount
from nuteprune.export.wrapping import PROCESSOR_FILES, Around
from nuteprune.gates.masks import Masks
from nuteprune.jobs.sources import around, read_config
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.hooks import MaskHooks
from nuteprune.model.lookup import WRAPPERS, of_language_model, own_name
from nuteprune.train.config import NutePruneConfig
from nuteprune.train.constraints import make_allocator
from tests.wrapped import CONFIGS, inputs, wrapper

from .conftest import said_by_transformers


@pytest.fixture
def saved(tiny_tokenizer: Any, tmp_path: Path) -> Callable[[str], Path]:
    def save_it(name: str) -> Path:
        folder = tmp_path / name
        wrapper(name).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text('{"do_resize": true}')
        return folder

    return save_it


def cut(language_model: PreTrainedModel, shapes: str) -> tuple[PreTrainedModel, Masks]:
    kinds = ["kv_groups", "neurons", *(["attn_block", "mlp_block"] if shapes == "free" else ())]
    anatomy = Anatomy(language_model)
    kinds += ["experts"] if anatomy.per_token else []
    refusal, uniform = anatomy.family.refusal, shapes == "uniform"
    taken = ",".join(x for x in kinds if not refusal(x, uniform=uniform))
    settings = {"gates": taken, "shapes": shapes, "neuron_multiple": 8}
    allocator = make_allocator(anatomy, NutePruneConfig(output_dir="unused", **settings))
    random = torch.Generator().manual_seed(0)
    units = {k: allocator.layout.units(k) for k in allocator.constraints.kinds}
    scores = {k: torch.rand(n, generator=random) for k, n in units.items()}
    shape = allocator.shape(scores, 0.5 * allocator.maximum())
    masks = allocator.masks(shape, scores)
    return assemble(anatomy, masks)[0], masks


@torch.no_grad()
def through_masks(name: str, folder: Path, masks: Masks, given: dict[str, Tensor]) -> Tensor:
    """Logits of the dense language model under masks, of what the dense wrapper puts into it."""
    whole, seen = wrapper(name), {}
    inner = whole.get_submodule(WRAPPERS[name].inside.removesuffix("."))
    handle = inner.register_forward_pre_hook(
        lambda _, __, kwargs: seen.update(kwargs), with_kwargs=True
    )
    whole(**given, use_cache=False)
    handle.remove()
    alone = load_pruned(folder, dtype=torch.float32)
    names = ("inputs_embeds", "position_ids", "attention_mask")
    with MaskHooks(Anatomy(alone)).using(masks):
        return alone(**{k: seen[k] for k in names}, use_cache=False).logits


MIXTURES = ("qwen3_5_moe", "llama4")
UNIFORM = [pytest.param(name, "uniform", marks=pytest.mark.slow) for name in CONFIGS]


@pytest.mark.parametrize(
    ("name", "shapes"), [*((x, "free") for x in CONFIGS if x not in MIXTURES), *UNIFORM]
)
def test_the_whole_around_a_pruned_language_model_is_the_masked_one(
    name: str, shapes: str, saved: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Llama 4's class reads it in vain in transformers 5.24, so none of them computes without.
    monkeypatch.setattr(MoeCausalLMOutputWithPast, "image_outputs", None, raising=False)
    source, given = saved(name), inputs(name)
    small, masks = cut(load_pruned(source, dtype=torch.float32), shapes)
    around = Around(str(source), WRAPPERS[name])
    save(small, tmp_path / "out", around=around)
    expected = through_masks(name, source, masks, given)

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    how = {"trust_remote_code": shapes == "free"}
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", **how).eval()
    assert type(loaded).__name__.removeprefix("Pruned") == WRAPPERS[name].conditional
    with torch.no_grad():
        ours = loaded(**given, use_cache=False).logits
    assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert not torch.allclose(
        ours,
        loaded(**given | {"pixel_values": 0 * given["pixel_values"]}, use_cache=False).logits,
        atol=1e-3,
    )

    if shapes == "free":  # as lm-evaluation-harness asks for it
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **how)
        assert type(found).__name__ == type(loaded).__name__

    dense = wrapper(name)
    kept = {k: x for k, x in loaded.named_parameters() if own_name(k) is None}
    assert all(torch.equal(x, dense.get_parameter(k)) for k, x in kept.items())
    again = load_pruned(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        alone = again(input_ids=ids, use_cache=False).logits
        assert torch.allclose(loaded(input_ids=ids, use_cache=False).logits, alone, atol=1e-5)
    assert load_config(tmp_path / "out").model_type == again.config.model_type
    tensors = recount(tmp_path / "out")["tensors"]
    outside = sum(prod(x) for k, x in tensors.items() if own_name(k) is None)
    assert outside == sum(x.numel() for x in kept.values()) > 0
    assert blocks_recount(tensors, again.config.model_type) == sum(
        p.numel()
        for n, p in again.named_parameters()
        if any(x in n for x in Anatomy(again).family.files)
    )
    of_it = [x for x in of_language_model(tensors) if ".experts." not in x]
    assert len(of_it) == sum(".experts." not in x for x, _ in again.named_parameters())
    text = (tmp_path / "out" / "preprocessor_config.json").read_text()
    assert text == '{"do_resize": true}'

    # What transformers 4 reads of the rope.
    stated = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    rope = stated["rope_parameters"]
    assert stated["rope_theta"] == rope.get("full_attention", rope)["rope_theta"]

    greedy = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    cached, plain = (loaded.generate(**given, use_cache=use, **greedy) for use in (True, False))
    assert torch.equal(cached, plain)
    if shapes == "free":  # layers follow a change of the attention implementation
        loaded.set_attn_implementation("eager")
        with torch.no_grad():
            eager = loaded(**given, use_cache=False).logits
        assert (eager - ours).abs().max() <= 1e-4 * ours.abs().max()
        inner = loaded.model.language_model.modules()
        assert {m.config._attn_implementation for m in inner if hasattr(m, "config")} == {"eager"}


@pytest.mark.slow
def test_transformers_has_nothing_to_say_of_free_shapes_inside_of_a_wrapper(
    saved: Callable, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    source = saved("gemma3")
    small, _ = cut(load_pruned(source, dtype=torch.float32), "free")
    around = Around(str(source), WRAPPERS["gemma3"])
    save(small, tmp_path / "out", tiny_tokenizer, around)
    assert said_by_transformers(tmp_path / "out", "AutoModelForImageTextToText") == (0, "", "")


@pytest.mark.parametrize("shapes", ["free", "uniform"])
def test_a_head_of_its_own_stays_where_the_config_says_that_there_is_none(
    shapes: str, saved: Callable, tmp_path: Path
) -> None:
    source = saved("mistral3")
    dense: Any = wrapper("mistral3")
    dense.lm_head.weight = torch.nn.Parameter(torch.randn(300, 32))
    assert dense.config.tie_word_embeddings
    dense.save_pretrained(source)
    small, _ = cut(load_pruned(source, dtype=torch.float32), shapes)
    around = Around(str(source), WRAPPERS["mistral3"])
    save(small, tmp_path / "out", around=around)
    save(small, tmp_path / "alone")
    for name in ("out", "alone"):
        again = load_pruned(tmp_path / name, dtype=torch.float32)
        assert not again.config.tie_word_embeddings
        assert torch.equal(again.get_output_embeddings().weight, dense.lm_head.weight)
        assert torch.equal(again.get_input_embeddings().weight, dense.get_input_embeddings().weight)


def test_what_is_no_language_model_is_refused(saved: Callable) -> None:
    folder = saved("gemma3")
    values = json.loads((folder / "config.json").read_text())
    for change, told in (
        ({"text_config": None}, "without text_config has no language model"),
        ({"architectures": ["Gemma3Model"]}, "is a Gemma3Model, not a causal language model"),
        ({"text_config": {"model_type": "mamba"}}, "'mamba' is not supported"),
    ):
        (folder / "config.json").write_text(json.dumps(values | change))
        with pytest.raises(UserError, match=told):
            read_config(str(folder))


def test_what_is_around_has_to_be_whole(saved: Callable) -> None:
    folder = saved("gemma3")
    whole = around(str(folder))
    assert whole is not None
    whole.check()
    tensors = load_file(folder / "model.safetensors")
    name = next(x for x in sorted(tensors) if "vision" in x and tensors[x].dim() > 1)
    for harmed in (tensors[name][:-1].clone(), None):
        changed = {k: x for k, x in tensors.items() if k != name}
        changed |= {} if harmed is None else {name: harmed}
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match="of the right size, so what is around"):
            whole.check()


def test_files_for_images_are_left_out_only_where_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *others = PROCESSOR_FILES
    (tmp_path / first).write_text("{}")

    def answer(error: Exception, cached: object = None) -> None:
        def download(_: str, name: str) -> str:
            if name in others:
                raise error
            return str(tmp_path / name)

        monkeypatch.setattr(hub, "hf_hub_download", download)
        monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_: cached)

    unreachable = LocalEntryNotFoundError("no network")
    marked = object()  # what the cache gives for a file that it knows the hub does not have
    # Of a download that is complete nothing may be known but what it has.
    for error, cached in (
        (EntryNotFoundError("404"), None),
        (unreachable, marked),
        (unreachable, None),
    ):
        answer(error, cached)
        (out := tmp_path / f"{type(error).__name__}-{cached is None}").mkdir()
        Around("owner/model", WRAPPERS["gemma3"]).copy_processor(out)
        assert [x.name for x in out.iterdir()] == [first]
    others.append(first)
    answer(unreachable)
    with pytest.raises(UserError, match=r"it cannot be told whether .*\(no network\); try again"):
        Around("owner/model", WRAPPERS["gemma3"])

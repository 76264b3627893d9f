"""What a run cannot do is said before the model is touched."""

from __future__ import annotations

from pathlib import Path

import pytest

from nuteprune import NutePruneConfig, NutePruneTrainer, UserError


def test_fsdp_would_quietly_be_ddp_here(tiny_model, tmp_path: Path) -> None:
    args = NutePruneConfig(output_dir=str(tmp_path), use_cpu=True)
    args.fsdp = True
    with pytest.raises(UserError, match=r"deepspeed are not supported.*by the setting sharded"):
        NutePruneTrainer(tiny_model("llama"), args)


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_a_launcher_cannot_ask_for_sharding_either(
    name: str, tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = NutePruneConfig(output_dir=str(tmp_path), use_cpu=True)
    monkeypatch.setenv(name, "true")
    with pytest.raises(UserError, match=r"are not supported: .*accelerate's config"):
        NutePruneTrainer(tiny_model("llama"), args)


def test_one_process_shares_nothing_out(tiny_model, tmp_path: Path) -> None:
    args = NutePruneConfig(output_dir=str(tmp_path), use_cpu=True, sharded=True)
    with pytest.raises(UserError, match="several processes: start them with torchrun"):
        NutePruneTrainer(tiny_model("llama"), args)


def test_weights_quantised_by_others_are_refused(tiny_model, tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.is_quantized, model.quantization_method = True, "gptq"  # as transformers marks them
    names = list(dict(model.named_modules()))
    with pytest.raises(UserError, match=r"not by bitsandbytes.*; load it in bfloat16"):
        NutePruneTrainer(model, NutePruneConfig(output_dir=str(tmp_path), use_cpu=True))
    assert list(dict(model.named_modules())) == names

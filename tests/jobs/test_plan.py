"""Plans without weights, against the same code with weights, and against arithmetic."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.backends import mkldnn
from torch.profiler import ProfilerActivity, profile
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from nuteprune.console import Output, megabytes
from nuteprune.data.training_text import JUDGED
from nuteprune.errors import UserError
from nuteprune.export.checkpoint import save
from nuteprune.export.loading import load_config
from nuteprune.gates import copying_losses
from nuteprune.gates.importance import METHODS
from nuteprune.jobs.job import PruneJob
from nuteprune.jobs.plan import Devices, _with, config_of, run
from nuteprune.jobs.planned import in_bits, offloaded, sharded
from nuteprune.jobs.read_settings import make_job
from nuteprune.model.lookup import WRAPPERS
from nuteprune.plan.live import Live
from nuteprune.plan.need import (
    KERNEL,
    KERNELS,
    ONE_BY_ONE,
    PARTS_OF_LAYERS,
    SHORT,
    Need,
    extended,
    in_batches,
    on_cpu,
)
from nuteprune.plan.phases import Phase, Plan
from nuteprune.plan.walk import Walk, model_of
from nuteprune.progressive.config import ProgressiveConfig
from nuteprune.stages.score import with_gradients
from nuteprune.stages.write import tokens_to_write
from nuteprune.train.config import NutePruneConfig
from tests.unplanned import leave_unplanned
from tests.wrapped import CONFIGS

pytestmark = [
    # torch looks at what it is going to turn into a tensor without data.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning"),
]

FP32 = torch.float32
TINY: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 192,
    "vocab_size": 300,
    "tie_word_embeddings": False,
    "max_position_embeddings": 512,
}
QWEN3_8B = {
    **TINY,
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 12288,
    "vocab_size": 151936,
}
LLAMA_70B = {
    **TINY,
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
}


def config(**changes: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(**{**TINY, **changes})


def settings(tmp_path: Path, **changes: Any) -> NutePruneConfig:
    known = {"target_sparsity": 0.2, "use_cpu": True, "per_device_train_batch_size": 2}
    kind = ProgressiveConfig if changes.get("progressive") else NutePruneConfig
    return kind(output_dir=str(tmp_path / "run"), **known | changes)


def written(folder: Path, values: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


def job(model: Path, **given: Any) -> PruneJob:
    asked = {"model": str(model), "out": Path("unused"), "target_sparsity": 0.2, **given}
    return make_job(PruneJob, asked)


ROWS = [{"neurons": 160}] * 4 + [{"kv_heads": 1}]


@pytest.mark.slow
@pytest.mark.parametrize(
    "asked",
    [
        {"target_params": "270K,250K"},
        {"target_size": "1000KB"},
        {"target_memory": "1200KB@64"},
        {"shape": {"layers": ROWS}},
        {"shape": {"layers": [{}, {"mlp": False}, {}, {"attention": False}, {}]}},
        {"target_sparsity": 0.1, "gates": "attn_block"},
    ],
    ids=["several params", "size", "memory", "rows", "blocks", "no-block-of-one-layer"],
)
def test_any_target_is_planned_for_the_layers_that_a_model_has(
    asked: dict[str, Any], tmp_path: Path
) -> None:
    tiny, length = config(), 16
    planned = Plan.of(tiny, settings(tmp_path, **asked), length, FP32)
    (step,) = planned.teach()
    kinds = ",".join(planned.allocator.constraints.kinds)
    by_share = settings(tmp_path, target_sparsity=list(planned.targets), gates=kinds)
    (same,) = Plan.of(tiny, by_share, length, FP32).teach()
    assert step.need.peak == pytest.approx(same.need.peak, rel=0.3)


def test_a_config_that_no_class_takes_is_refused_in_words(tmp_path: Path) -> None:
    odd = config()
    odd.rope_parameters = {"rope_type": "odd", "rope_theta": 1e4}
    with pytest.raises(UserError, match="no model can be made of this config"):
        Plan.of(odd, settings(tmp_path, target_sparsity=0.2), 16, FP32)


def test_a_size_is_in_the_checkpoints_dtype(tmp_path: Path) -> None:
    args = settings(tmp_path, target_size="500KB")
    shares = {
        Plan.of(config(dtype=torch.bfloat16), args, 16, computed).targets
        for computed in (FP32, torch.bfloat16)
    }
    assert len(shares) == 1


def test_what_lives_is_counted_while_it_lives() -> None:
    with Live() as live:
        a = torch.zeros(1000)
        b = a.view(10, 100)[2:]  # of the same memory
        assert live.now == live.peak == 4000
        c = torch.ones(500, dtype=torch.float64)
        del a
        assert live.now == 8000  # `b` holds it
        del b, c
        assert (live.now, live.peak) == (0, 8000)
        torch.ones(20, 30) @ torch.ones(30, 7)
        assert live.flops == 2 * 20 * 30 * 7
        torch.cholesky_inverse(torch.linalg.cholesky_ex(torch.eye(30))[0])
        assert live.flops == 2 * 20 * 30 * 7 + 30**3 // 3 + 2 * 30**3 // 3


def test_sizes_of_products_in_half_precision_are_counted_once() -> None:
    with Live() as live:
        for rows, columns in ((4, 5), (4, 5), (4, 6)):
            nn.functional.linear(torch.ones(rows, 3).half(), torch.ones(columns, 3).half())
            torch.ones(rows, 3) @ torch.ones(3, columns)
    assert len(live.sizes) == 2


def test_what_a_file_stands_behind_is_not_counted() -> None:
    with Live() as live:
        a = torch.zeros(1000)
        live.leave(a)
        b = a.view(10, 100)
        assert live.now == 0
        c = torch.ones(10)
        assert (live.now, live.peak) == (40, 4000)
        del a, b, c
        assert live.now == 0


INSIDE: dict[str, Callable[[], Any]] = {
    "multinomial": lambda: torch.multinomial(torch.ones(64, 5000), 1),
    "cholesky_solve": lambda: torch.cholesky_solve(torch.ones(500, 3), torch.eye(500)),
}


@pytest.mark.parametrize("operation", INSIDE)
def test_what_operations_hold_inside_is_counted(operation: str) -> None:
    """PyTorch's profiler sees each allocation, and counts them on its own."""
    act, now, most = INSIDE[operation], 0, 0
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        act()
    for event in seen.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    with Live() as live:
        act()
    assert live.peak == pytest.approx(most, rel=0.02)


def test_a_cpu_keeps_kernels() -> None:
    needs = {"score": 3, "refit": 0, "teach": 2}
    held = on_cpu({name: Need((1e9,), sizes=sizes) for name, sizes in needs.items()})
    assert held["score"] == held["refit"] == 1e9 + 3 * KERNEL
    assert held["teach"] == 1e9 + 5 * KERNEL
    many = on_cpu({"score": Need((0,), sizes=700), "refit": Need((0,), sizes=700)})
    assert many == {"score": 700 * KERNEL, "refit": KERNELS * KERNEL}


@pytest.mark.slow(seconds=5)
def test_kernels_are_counted_as_the_library_makes_them(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In a step on data: oneDNN says by itself for which sizes it wants one."""
    # Not sdpa, which multiplies inside of itself.
    values, half = config(attn_implementation="eager"), torch.bfloat16
    real = Walk(values, settings(tmp_path, refit=False), 24, half, model_of(values, half))
    capfd.readouterr()
    with mkldnn.verbose(mkldnn.VERBOSE_ON_CREATION):
        counted = real.teach().sizes
    lines = [x.split(",") for x in capfd.readouterr().out.splitlines() if ",create:" in x]
    wanted = {tuple(x[i] for i in (8, 9, 11)) for x in lines if x[5] == "matmul"}
    if not wanted:
        pytest.skip("this processor's products in half precision are not oneDNN's")
    assert counted == pytest.approx(len(wanted), rel=0.1)


@pytest.mark.slow(seconds=5)
def test_layers_of_the_same_width_share_kernels(tmp_path: Path) -> None:
    values, half = config(num_hidden_layers=8, intermediate_size=96), torch.bfloat16
    args = settings(tmp_path, neuron_multiple=16)
    (step,) = Plan.of(values, args, 24, half, stored=half).teach()
    whole = Walk(values, args, 24, half, stored=half).teach()
    assert step.need.sizes == pytest.approx(whole.sizes, rel=0.1)


@pytest.mark.slow(seconds=5)
def test_a_cpu_maps_weights(tmp_path: Path) -> None:
    def of(dtype: torch.dtype, stored: torch.dtype | None, layers: int = 2, rank: int = 32) -> Walk:
        values, args = config(num_hidden_layers=layers), settings(tmp_path, lora_rank=rank)
        return Walk(values, args, 24, dtype, stored=stored)

    half, whole = torch.bfloat16, torch.float32
    layer = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 192 + 2 * 64
    weights, downs = 2 * layer + 2 * 300 * 64 + 64, 2 * 64 * 192
    last = downs + 2 * 64 * 64  # output projections, where heads go
    assert of(half, None).judge().peak - of(half, half).judge().peak == 2 * weights
    gone = of(half, None).teach().peak - of(half, half).teach().peak
    assert 2 * (weights + downs) <= gone <= 2 * (weights + last)  # refitted ones too
    gone = of(whole, None).teach().peak - of(whole, half).teach().peak
    assert 4 * downs <= gone <= 4 * last  # weights are a copy in another dtype
    gone = of(half, None).refit(4).peak - of(half, half).refit(4).peak
    assert 2 * weights < gone <= 2 * (weights + last)
    assert not list(tmp_path.rglob("*.safetensors"))
    # Cut layers go to files one by one: two layers more are two layers' LoRA and moments more.
    more = of(half, half, 4).slice().peak - of(half, half).slice().peak
    lora = 4 * 32 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 192))
    assert more == pytest.approx(3 * 2 * lora, abs=2 * layer / 4)
    # Nor does the model that they are assembled to hold them once more.
    more = of(half, half, 6, rank=1).slice().peak - of(half, half, rank=1).slice().peak
    assert more < 4 * 2 * layer / 4


def test_what_is_saved_on_a_cpu_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_unplanned(monkeypatch.setattr)

    def saved(dtype: torch.dtype, stored: torch.dtype | None) -> tuple[float, float]:
        run = Plan.of(config(), settings(tmp_path), 24, dtype, stored=stored)
        return run.phases()[-1].need.peak - run.sizes.adapters, run.results[-1]

    half, whole = torch.bfloat16, torch.float32
    held, small = saved(half, None)
    assert held == small
    assert saved(half, half)[0] == 0
    held, small = saved(whole, half)
    assert held == pytest.approx(small / 2)  # a copy in the file's dtype


STAGES: dict[str, Callable[[Walk], Need]] = {
    "judge": Walk.judge,
    "score": lambda x: x.score(6, 2),
    "refit": lambda x: x.refit(4),
    "teach": Walk.teach,
    "moving": lambda x: x.teach("moving"),
    "taught": lambda x: x.teach("taught"),
    "fixed": lambda x: x.teach("fixed"),
    "slice": Walk.slice,
}
RAMP: dict[str, Any] = {"progressive": True, "ramp_share": 0.5}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.slow(seconds=3)
def test_a_stage_without_data_holds_what_it_holds_with_data(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying_losses, "COPIES", 0.0)  # the model copies nothing
    values, found = config(num_hidden_layers=3), []
    more = RAMP if stage in ("moving", "taught", "fixed") else {}
    for model in (None, model_of(values, torch.float32)):
        walk = Walk(values, settings(tmp_path, **more), 24, torch.float32, model)
        found.append(STAGES[stage](walk))
    without, having = found
    assert without.peaks == pytest.approx(having.peaks, rel=0.02)
    assert without.flops == pytest.approx(having.flops, rel=0.02)


@pytest.mark.parametrize(
    ("stage", "short"),
    [("score", PARTS_OF_LAYERS), ("refit", ONE_BY_ONE), ("teach", SHORT)],
)
@pytest.mark.slow(seconds=5)
def test_few_layers_tell_of_many(stage: str, short: tuple[int, ...], tmp_path: Path) -> None:
    args = settings(tmp_path, gradient_checkpointing=stage == "teach")

    def of(values: PreTrainedConfig) -> Need:
        return STAGES[stage](Walk(values, args, 24, torch.float32))

    ours, whole = extended(config(), of, short), of(config())
    assert ours.peak == pytest.approx(whole.peak, rel=0.03)
    assert ours.flops == pytest.approx(whole.flops, rel=0.03)


@pytest.mark.slow(seconds=3)
def test_few_layers_tell_of_the_cut_of_many(tmp_path: Path) -> None:
    """Where weights are copies, few layers hold less than what is in none, and many hold more."""
    values = config(num_hidden_layers=8, vocab_size=2000)
    args = settings(tmp_path, lora_rank=1)  # else moments, which go before the cut, are the most
    run = Plan.of(values, args, 24, torch.float32, stored=torch.bfloat16)
    ours = run.cut()[0].need.peak
    real = Walk(values, args, 24, torch.float32, stored=torch.bfloat16)
    assert ours == pytest.approx(real.slice().peak, rel=0.03)


@pytest.mark.slow(seconds=8)
def test_few_layers_and_blocks_tell_of_the_scoring_of_many(tmp_path: Path) -> None:
    """Few layers hold most of what is scored layer by layer, many hold most of gradients."""
    values = config(num_hidden_layers=5)
    args = settings(tmp_path, calibration_blocks=4)
    (ours,) = Plan.of(values, args, 24, torch.float32).score()
    blocks = 4 * METHODS[args.method].reads
    gradients = with_gradients(args.method, blocks)
    whole = Walk(values, args, 24, torch.float32).score(blocks, gradients)
    assert ours.need.peak == pytest.approx(whole.peak, rel=0.02)
    assert ours.need.flops == pytest.approx(whole.flops, rel=0.02)


@pytest.mark.parametrize(
    ("model_type", "which"),
    [
        ("glm4_moe", {"first_k_dense_replace": 2}),
        ("deepseek_v3", {"first_k_dense_replace": 2, "kv_lora_rank": 16, "q_lora_rank": None}),
        ("qwen2_moe", {"decoder_sparse_step": 2}),
    ],
)
@pytest.mark.slow(seconds=5)
def test_few_layers_have_all_kinds_that_many_have(
    model_type: str, which: dict[str, Any], tmp_path: Path
) -> None:
    """Some layers have experts and some have none, which these configs do not list."""
    dense = {k: x for k, x in TINY.items() if k not in ("model_type", "architectures")}
    experts = {"n_routed_experts": 8, "num_experts": 8, "moe_intermediate_size": 64}
    narrow = {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "v_head_dim": 8}
    split = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "num_key_value_heads": 4}
    values = AutoConfig.for_model(
        model_type, **{**dense, **experts, **narrow, **split, **which, "num_hidden_layers": 8}
    )
    args = settings(tmp_path, target_sparsity=0.03, unlikelihood=0)
    run = Plan.of(values, args, 24, torch.bfloat16)
    ours = run.teach()[0].need
    whole = Walk(values, args, 24, torch.bfloat16).teach().times(args.max_steps)
    assert ours.peak == pytest.approx(whole.peak, rel=0.02)
    assert ours.flops == pytest.approx(whole.flops, rel=0.02)


@pytest.mark.slow(seconds=3)
def test_gradients_of_many_blocks_hold_no_more_than_of_one(tmp_path: Path) -> None:
    """Logits of a block are gone before the next one's are there."""
    values, half = config(vocab_size=5000, num_hidden_layers=2), torch.bfloat16

    def held(blocks: int) -> float:
        return (
            Walk(values, settings(tmp_path), 24, half, stored=half)
            .score(blocks, blocks // 3)
            .peaks[0]
        )

    assert held(9) == pytest.approx(held(3), rel=0.01)


def test_layers_that_are_not_alike_are_gone_through_all() -> None:
    pruned, seen = config(), []

    def note(of: PreTrainedConfig) -> Need:
        seen.append(of.num_hidden_layers)
        return Need((of.num_hidden_layers,))

    assert extended(pruned, note).peak == pytest.approx(5)
    pruned.pruned = {}  # as a checkpoint with counts per layer states them
    assert extended(pruned, note).peak == 5
    assert seen == [*SHORT, 5]


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [0.1, 0.4])
def test_a_refit_of_any_masks_holds_no_more(sparsity: float, tmp_path: Path) -> None:
    args = settings(tmp_path, target_sparsity=sparsity)
    planned = Walk(config(), args, 24, torch.float32).refit(4)
    real = Walk(config(), args, 24, torch.float32)
    real._widest = lambda: real._masks  # type: ignore[method-assign]
    assert real.refit(4).peak < planned.peak


@pytest.mark.slow
def test_few_batches_tell_of_many(tmp_path: Path) -> None:
    values = config(num_hidden_layers=2)

    def of(blocks: int) -> Need:
        return Walk(values, settings(tmp_path), 24, torch.float32).refit(blocks)

    ours, whole = in_batches(of, 20, (8, 12)), of(20)
    assert ours.peak == pytest.approx(whole.peak, rel=0.01)
    assert ours.flops == pytest.approx(whole.flops, rel=0.01)


def test_many_batches_have_the_products_of_few() -> None:
    of = {6: Need((1e9,), flops=6e9, sizes=35), 9: Need((1e9,), flops=9e9, sizes=30)}
    many = in_batches(of.__getitem__, 96, (6, 9))
    assert many.sizes == 35  # and not fewer than none
    assert many.flops == pytest.approx(96e9)


def test_each_token_that_is_written_reads_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_unplanned(monkeypatch.setattr)
    layer = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 192 + 2 * 64
    weights = 5 * layer + 300 * 64 + 64  # of the embedding a token reads a row
    cache = 5 * 2 * 32  # keys and values of a token
    # Half are the model's own, a fifth of these repeats; of many each is read four times.
    for length, blocks, texts, batches in (
        (24, 7, 4, 1),
        (24, 150, 60, 1),
        (24, 200, 64, 2),
        (24, 8000, 64, 13),
        (128, 7, 8, 1),  # texts of 64 tokens
        (128, 150, 120, 1),
        (128, 800, 64, 10),
    ):
        short = min(length, 64)
        args = settings(tmp_path, max_steps=1, calibration_blocks=1)
        args.gradient_accumulation_steps = 1
        args.per_device_train_batch_size = blocks
        run = Plan.of(config(), args, length, torch.bfloat16)
        writing = run.phases()[0]
        assert writing.read == batches * short * 2 * (weights + texts * cache * short / 2)


@pytest.mark.parametrize(
    ("given", "between"),
    [({}, False), ({"progressive": True, "ramp_share": 0.5}, True)],
)
def test_a_refit_between_steps_finds_their_moments(
    given: dict[str, Any], between: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_unplanned(monkeypatch.setattr)
    run = Plan.of(config(), settings(tmp_path, max_steps=20, **given), 24, torch.bfloat16)
    (refit,) = (x for x in run.phases() if x.name == "refit")
    lora = 5 * 32 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 192))
    assert refit.need.peak == pytest.approx(1e9 + 2 * 4 * lora * between)


@pytest.mark.slow(seconds=10)
def test_a_config_alone_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {**TINY, "num_hidden_layers": 3}
    model = written(tmp_path / "model", few)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    asked = Devices(devices=2, memory=4e6, rate=1e9)
    quiet = Output(quiet=True)
    plan = run(job(model, length=24, dtype="float32", calibration_blocks=2), asked, quiet)
    assert sorted(tmp_path.rglob("*")) == before
    layer = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 192 + 2 * 64
    assert plan["parameters"] == 3 * layer + 2 * 300 * 64 + 64
    assert plan["weights_bytes"] == 4 * plan["parameters"]
    names = [phase["phase"] for phase in plan["phases"]]
    assert names == ["write", "judge", "score", "refit", "teach", "slice", "save"]
    assert plan["main_memory_bytes"] == plan["weights_bytes"]
    work = {x["phase"]: x["flops"] / 1e9 for x in plan["phases"]}
    assert plan["seconds"] == pytest.approx(sum(work.values()))
    halved = sum(work[x] for x in ("write", "judge", "score", "refit", "teach")) / 2
    assert plan["seconds_on_devices"] == pytest.approx(plan["seconds"] - halved)
    assert all(x["sent_bytes"]["sharded"] > x["sent_bytes"]["whole"] for x in plan["phases"][:-1])
    alone = ("slice", "save")
    shares = [x["device_flops"] * (1 + (x["phase"] not in alone)) for x in plan["phases"]]
    assert shares == [x["flops"] for x in plan["phases"]]
    sharded = next(x for x in plan["settings"] if "sharded" in x["settings"])
    assert sharded["how"] == "formula"
    assert not [x for x in plan["settings"] if "--offload" in x["settings"]]  # of one process
    peaks = [x["peak_bytes"] for x in plan["settings"][:3]]
    assert peaks == sorted(peaks, reverse=True)
    leave_unplanned(monkeypatch.setattr)  # what comes next is told without the stages
    alone = run(job(model, length=24, dtype="float32"), replace(asked, devices=1), quiet)
    asked_for, *_, away = alone["settings"]
    assert away["settings"].endswith("--offload")
    assert away["how"] == "formula"
    # Two of three layers are there.
    assert away["peak_bytes"] <= asked_for["peak_bytes"] - 4 * layer
    again = run(job(model / "config.json", length=24), asked, quiet)
    assert again["parameters"] == plan["parameters"]
    assert again["weights_bytes"] == plan["weights_bytes"] / 2  # bfloat16 where nothing is said
    assert again["main_memory_bytes"] == again["weights_bytes"]
    stored = written(tmp_path / "stored", {**few, "dtype": "float32"})
    again = run(job(stored, length=24), asked, quiet)
    assert again["main_memory_bytes"] == plan["weights_bytes"]  # of files, whatever is computed in


@pytest.mark.slow(seconds=2)
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_the_language_model_of_several_modalities_is_planned(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its facts are a level deeper in the config, and published ones leave some out."""
    if name != "gemma3":  # which goes through all stages
        monkeypatch.setattr(Plan, "phases", lambda plan: [plan.judge(), *plan.teach()])
    given = {"calibration_blocks": 2}
    values = CONFIG_MAPPING[name](**CONFIGS[name]).to_dict()
    kinds = CONFIGS[name]["text_config"].keys() & {"num_experts", "num_local_experts"}
    given |= {"gates": "experts"} if kinds else {}
    model = written(tmp_path, values | {"architectures": [WRAPPERS[name].conditional]})
    found = run(job(model, length=24, **given), Devices(rate=1e9), Output(quiet=True))
    with torch.device("meta"):
        language = AutoModelForCausalLM.from_config(load_config(model))
    assert found["parameters"] == sum(x.numel() for x in set(language.parameters()))


def test_a_pruned_checkpoint_is_planned_without_the_code_that_comes_with_it(
    tiny_model: Callable, prune_at_random: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_unplanned(monkeypatch.setattr)
    small = prune_at_random(tiny_model("llama"), ("neurons",), "free")
    save(small, tmp_path / "small", None)
    found = run(job(tmp_path / "small", length=24), Devices(rate=1e9), Output(quiet=True))
    assert found["parameters"] == sum(x.numel() for x in small.parameters())


@pytest.mark.parametrize(
    ("given", "share"),
    [({}, 0.5), ({"shares": [1.0]}, 0), ({"data": ["a", "self"], "shares": "9,1"}, 0.1)],
)
def test_what_the_model_writes_is_its_share(
    given: dict[str, Any], share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_unplanned(monkeypatch.setattr)
    asked = job(written(tmp_path, TINY), length=24, **given)
    found = run(asked, Devices(rate=1e9), Output(quiet=True))
    flops = {x["phase"]: x["flops"] for x in found["phases"]}
    assert ("write" in flops) == bool(share)
    args = NutePruneConfig(output_dir=str(tmp_path), use_cpu=True, **asked.settings)
    if share:
        block = flops["judge"] / JUDGED
        written_tokens = tokens_to_write(args.blocks, args.calibrated_blocks, share, 24)
        assert flops["write"] == pytest.approx(block * (written_tokens // 24))


MIXTURE = {
    **TINY,
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "head_dim": 16,
}


@pytest.mark.slow
def test_a_mixture_is_planned_on_a_ramp(tmp_path: Path) -> None:
    """Which experts its masks leave is data; that some are there takes the same."""
    found = []
    values = AutoConfig.for_model(**MIXTURE)
    for model in (None, model_of(values, torch.bfloat16)):
        args = settings(tmp_path, **RAMP)
        found.append(Walk(values, args, 24, torch.bfloat16, model).teach("moving"))
    without, having = found
    assert without.peak == pytest.approx(having.peak, rel=0.05)
    assert without.flops == pytest.approx(having.flops, rel=0.05)


def test_a_mixture_is_planned_with_what_a_token_goes_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Plan, "phases", lambda _: [Phase("any", Need((1,), 1))]
    )  # the others tell of them
    model = written(tmp_path / "model", MIXTURE)
    given = {"target_sparsity": None, "shape": {"experts": 4}, "shapes": "uniform"}
    plan = run(job(model, **given), Devices(rate=1e9), Output(quiet=True))
    expert, row, layers = 3 * 64 * 32, 64, 5
    assert plan["targets"] == [pytest.approx(4 * expert / (8 * expert + 2 * 64 * 64 + 2 * 32 * 64))]
    gone = layers * (4 * (expert + row) + 2 * expert)  # two stay and are idle
    assert plan["active_parameters"] == [plan["parameters"] - gone]


def test_a_run_with_a_ramp_is_planned_with_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_unplanned(monkeypatch.setattr)  # other tests go through its kinds of steps
    model = written(tmp_path / "model", TINY)
    given = job(model, length=24, teacher="snapshots", max_steps=20, **RAMP)
    plan = run(given, Devices(rate=1e9), Output(quiet=True))
    names = [phase["phase"] for phase in plan["phases"]]
    assert names == ["write", "judge", "score", "refit", "teach", "slice", "save"]
    assert plan["disk_bytes"]["teachers"] > 0


def test_each_target_has_steps_and_a_refit_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_unplanned(monkeypatch.setattr)

    def phases(**more: Any) -> dict[str, Phase]:
        args = settings(tmp_path, max_steps=100, **more)
        return {x.name: x for x in Plan.of(config(), args, 24, torch.float32).phases()}

    for more in ({}, RAMP):
        one, two = phases(target_sparsity=0.2, **more), phases(target_sparsity=[0.1, 0.2], **more)
        assert one["teach"].steps == 100
        assert two["teach"].steps == 200
        for name in ("teach", "refit"):
            assert two[name].need.flops == pytest.approx(2 * one[name].need.flops)
        assert two["score"].need == one["score"].need


def test_masks_that_are_learned_are_planned_without_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_unplanned(monkeypatch.setattr)
    args = settings(tmp_path, progressive=True, gate_type="hard_concrete", max_steps=100)
    names = [x.name for x in Plan.of(config(), args, 24, torch.float32).phases()]
    assert names == ["write", "judge", "refit", "teach", "slice", "save"]


def test_each_round_of_scoring_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Units that are left are scored again; on a device refitted weights stand beside then."""
    leave_unplanned(monkeypatch.setattr)

    def needs(sparsity: float, **more: Any) -> dict[str, Need]:
        how = {x: more.pop(x) for x in ("packed", "stored") if x in more}
        args = settings(tmp_path, target_sparsity=sparsity, **more)
        run = Plan.of(config(), args, 24, torch.bfloat16, **how)
        return {x.name: x.need for x in run.phases()} | {"": Need((run.refitted,))}

    one, three, ramp = needs(0.3), needs(0.7), needs(0.7, **RAMP)
    assert one["score"].flops == pytest.approx(1e9)
    assert three["score"].flops == pytest.approx(3e9 + 2e9)  # two refits on the way
    assert three["score"].peak - one["score"].peak == pytest.approx(three[""].peak)
    assert three[""].peak > 0
    assert ramp["score"] == one["score"]
    packed = needs(0.7, packed=True)  # in few bits units are scored once
    assert packed["score"] == one["score"]
    assert needs(0.7, stored=torch.bfloat16)["score"].peak == pytest.approx(1e9)  # they are mapped


def test_the_smaller_model_is_judged_with_the_dense_one_on_its_device(tmp_path: Path) -> None:
    def planned(target: Any, **more: Any) -> Plan:
        args = settings(tmp_path, target_sparsity=target)
        return Plan.of(config(), args, 24, torch.bfloat16, **more)

    one, several = planned(0.2), planned([0.1, 0.2])
    mapped = planned(0.2, stored=torch.bfloat16)
    passed = one.walked(Walk.judge).peak
    weights = one.sizes.weights
    assert passed > weights
    assert mapped.judge().need.peak == mapped.walked(Walk.judge).peak
    assert one.judge().need.peak == passed + one.results[0]
    # The run's own dense model waits for the second target.
    assert several.judge().need.peak == passed + several.results[0] + weights
    peaks = {"judge": one.judge().need.peak, "write": passed}
    for saved in (sharded(one, peaks, 4), offloaded(one, peaks), in_bits(one, peaks, 8)):
        assert saved["judge"] < peaks["judge"] - (passed - saved["write"])
    assert sharded(one, peaks, 4)["judge"] - sharded(one, peaks, 4)["write"] == pytest.approx(
        one.results[0] / 4
    )
    bits = in_bits(one, peaks, 8)
    assert bits["judge"] == pytest.approx(bits["write"])  # judged in main memory


def test_files_are_in_the_dtype_of_the_checkpoint(tmp_path: Path) -> None:
    def written_by(dtype: torch.dtype) -> dict[str, float]:
        args = settings(tmp_path, target_sparsity=[0.1, 0.2])
        return Plan.of(config(dtype=torch.float32), args, 24, dtype).disk()

    half, whole = written_by(torch.bfloat16), written_by(torch.float32)
    for what in ("result", "cut"):
        assert half[what] == pytest.approx(whole[what], rel=1e-6), what


def test_four_bits_have_scales(tmp_path: Path) -> None:
    run = Plan.of(config(), settings(tmp_path), 24, torch.bfloat16)
    saved = {bits: -in_bits(run, {"write": 0.0}, bits)["write"] for bits in (8, 4)}
    assert saved[8] == run.sizes.projections / 2
    assert saved[4] == run.sizes.projections * (1 - 4.5 / 16)


def test_the_disk_of_a_device_has_none_of_what_cpus_alone_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_unplanned(monkeypatch.setattr)
    model = written(tmp_path / "model", {**TINY, "num_hidden_layers": 50})
    disk = run(job(model, length=24), Devices(rate=1e9), Output())["disk_bytes"]
    kept = sum(disk.values()) - disk["cut"]
    assert f"Disk    {megabytes(kept)}; main memory" in capsys.readouterr().out


@pytest.mark.slow(seconds=3)
def test_settings_that_take_less_are_planned_as_if_asked_for(tmp_path: Path) -> None:
    less, few = {"gradient_checkpointing": True}, config(num_hidden_layers=2)
    plain = Plan.of(few, settings(tmp_path), 96, torch.float32)
    asked = Plan.of(few, settings(tmp_path, **less), 96, torch.float32)
    peaks = {phase.name: phase.need.peak for phase in plain.teach()}
    (step,) = asked.teach()
    assert _with(plain, peaks, less) == {step.name: step.need.peak}
    assert step.need.peak < 0.9 * peaks[step.name]


def test_what_cannot_be_planned_is_refused(tmp_path: Path) -> None:
    less = {k: v for k, v in TINY.items() if k not in ("intermediate_size", "vocab_size")}
    with pytest.raises(UserError, match="no intermediate_size, vocab_size"):
        config_of(str(written(tmp_path / "less", less)))
    model = written(tmp_path / "model", TINY)
    with pytest.raises(UserError, match="cannot hold even one layer"):
        run(job(model), Devices(memory=50_000), Output(quiet=True))
    with pytest.raises(UserError, match="--devices"):
        run(job(model, sharded=True), Devices(), Output(quiet=True))
    with pytest.raises(UserError, match="what offload saves: use --device-memory"):
        run(job(model, offload=True), Devices(), Output(quiet=True))
    with pytest.raises(UserError, match="what bits saves: use --device-memory"):
        run(replace(job(model), bits=8), Devices(), Output(quiet=True))
    with pytest.raises(UserError, match="length"):
        run(replace(job(model), length=1), Devices(), Output(quiet=True))
    with pytest.raises(UserError, match="length is 513, and the model knows 512 positions"):
        run(replace(job(model), length=513), Devices(), Output(quiet=True))
    for given in ({"shares": "0.5,0.5"}, {"data": ["a", "self"], "shares": [0, 0]}):
        with pytest.raises(UserError, match="pass one number above 0 for each"):
            run(job(model, **given), Devices(), Output(quiet=True))
    with pytest.raises(UserError, match="neither a folder nor a hub id"):
        config_of("./nothing")


@pytest.mark.hard
@pytest.mark.parametrize(
    ("values", "billions"), [(QWEN3_8B, 8.19), (LLAMA_70B, 70.55)], ids=["8b", "70b"]
)
def test_large_models_are_planned(values: dict[str, Any], billions: float, tmp_path: Path) -> None:
    """Their weights would not fit here; parameters by the published count."""
    model = written(tmp_path / "model", values)
    plan = run(job(model), Devices(8, 80e9, 4e14), Output(quiet=True))
    assert plan["parameters"] / 1e9 == pytest.approx(billions, abs=0.01)
    assert plan["peak_bytes"] > plan["weights_bytes"]
    assert plan["fits"] is not None


@pytest.mark.slow
def test_what_devices_send_each_other_is_told_by_the_stages(tmp_path: Path) -> None:
    asked = settings(tmp_path, max_steps=20, unlikelihood=0)
    run = Plan.of(config(num_hidden_layers=2), asked, 24, torch.float32)
    layers, adapters = run.sizes.layers, run.sizes.adapters
    judged, taught, (refit,) = run.judge().need, run.teach()[0].need, run._refit()
    assert judged.moved["passed"] == layers
    micro_batches = 20 * asked.gradient_accumulation_steps
    assert taught.moved["passed"] == 2 * micro_batches * layers  # forward and backward
    assert taught.moved["gathered"] == 0  # the teacher's layer is there for the student's pass
    assert taught.sent(4, sharded=False) == pytest.approx(20 * adapters * 2 * 3 / 4)
    # Of each of two projections: X^T X, the lack (fp64), and the fitted weight (fp32).
    sums = [8 * (x * x + 64 * x) + 4 * 64 * x for x in (64, 192)]
    assert refit.need.moved["summed"] == pytest.approx(2 * sum(sums))
    # The dense model's pass, two sums, the second one's target, and the pass on.
    assert refit.need.moved["gathered"] == pytest.approx(5 * layers)
    own = refit.need.sent(4, sharded=True) - refit.need.sent(4, sharded=False)
    gathered = refit.need.moved["gathered"] + refit.need.moved["passed"] / 4
    assert own == pytest.approx(gathered * 3 / 4)


def test_own_answers_are_in_the_plan(tmp_path: Path) -> None:
    """They are written a token at a time, and read without a teacher."""
    values, half = config(num_hidden_layers=2), torch.bfloat16
    with_them, without = (
        Plan.of(values, settings(tmp_path, unlikelihood=x), 24, half).teach()[0] for x in (0.3, 0)
    )
    assert with_them.need.peak == without.need.peak
    assert with_them.need.flops > without.need.flops
    assert with_them.read > without.read == 0

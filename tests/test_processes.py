"""Real processes through the command line: two do the work of one; signals stop in good order."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from nuteprune import load_pruned
from nuteprune.model.anatomy import Anatomy, Mixture
from nuteprune.processes import Team

from .forked import Ended, Forked, python, ranks

pytestmark = pytest.mark.slow(4)

OPTIONS = ["--sparsity", "0.3", "--length", "16", "--device", "cpu", "--dtype", "float32"]
SETTINGS = {
    "max_steps": 6,
    "neuron_multiple": 4,
    "calibration_blocks": 8,
    "save_steps": 3,
    "logging_steps": 1,
}


Inputs = tuple[Path, Path]
Tensors = dict[str, torch.Tensor]


REAL = ["-m", "nuteprune.cli"]
QUICK = [str(Path(__file__).with_name("undrawn.py"))]


def command(inputs: Inputs, out: Path, **more: Any) -> list[str]:
    """A command line of nuteprune, without what comes before `prune`."""
    settings = [f"--set={k}={v}" for k, v in {**SETTINGS, **more}.items()]
    model, text = inputs
    return ["prune", str(model), "--data", str(text), *OPTIONS, *settings, "--out", str(out)]


def torchrun(*arguments: object) -> Ended:
    """Start two processes with the launcher itself."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return python(*launcher, *arguments)


def said(done: Ended) -> str:
    assert done.code == 0, done.err
    return done.out


def metrics(out: Path) -> list[dict[str, float]]:
    lines = (out / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(out: Path) -> list[float]:
    return [x["loss"] for x in metrics(out)]


SOFT = {"progressive": True, "gate_type": "hard_concrete"}


@pytest.mark.parametrize(
    ("gates", "shared"),
    [
        ({}, {}),
        (SOFT, {}),
        ({"progressive": True, "gradient_checkpointing": True}, {"sharded": True}),
        (SOFT, {"sharded": True}),
        ({"method": "wanda"}, {"sharded": True}),
    ],
    ids=lambda settings: "-".join(str(v) for v in settings.values()) or "whole",
)
def test_two_processes_of_batch_4_are_one_of_batch_8(
    gates: dict[str, Any],
    shared: dict[str, Any],
    tiny_inputs: Inputs,
    tmp_path: Path,
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    # With the usual epsilon Adam divides rounding by rounding where gradients are near zero, and
    # hides a gradient of the wrong size everywhere else.
    same = {**gates, "adam_epsilon": 1e-2}
    said(python(*QUICK, *command(tiny_inputs, one, batch_size=8, **same)))
    asked = command(tiny_inputs, two, batch_size=4, **same, **shared)
    assert said(python(*QUICK, *asked, processes=2)).count("Saved") == 1
    records = [json.loads((x / "nuteprune.json").read_text()) for x in (one, two)]
    assert records[0]["layers"] == records[1]["layers"]
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    written = [(x / "run" / "self.jsonl").read_bytes() for x in (one, two)]
    assert written[0] == written[1]
    tokens = torch.arange(3, 15)[None]
    with torch.no_grad():
        ours, theirs = (load_pruned(x)(tokens).logits for x in (one, two))
    assert torch.allclose(ours, theirs, atol=1e-3 * float(ours.abs().max()))


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("mixtral", {"shapes": "uniform", "method": "reap", "gates": "experts"}),
        ("qwen2_moe", {"gates": "experts,expert_neurons,neurons,kv_groups"}),
    ],
    ids=["reap, uniform", "surgeon, free"],
)
def test_a_sharded_run_of_a_mixture_writes_what_one_process_does(
    name: str, how: dict[str, Any], tiny_inputs: Inputs, tiny_model: Callable, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    tiny_model(name, vocab_size=512).save_pretrained(tiny_inputs[0])
    same = {**how, "adam_epsilon": 1e-2, "shares": 1, "neuron_multiple": 8}
    said(python(*QUICK, *command(tiny_inputs, one, batch_size=8, **same)))
    asked = command(tiny_inputs, two, batch_size=4, sharded=True, **same)
    assert said(python(*QUICK, *asked, processes=2)).count("Saved") == 1
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    files = [load_file(x / "model.safetensors") for x in (one, two)]
    assert_alike(*({k: v for k, v in x.items() if ".experts." in k} for x in files))
    models = [load_pruned(x) for x in (one, two)]
    counts = [[mixture.sizes for mixture in mixtures(model)] for model in models]
    assert counts[0] == counts[1]
    assert any(experts < 6 for experts, _ in counts[0])
    tokens = torch.arange(3, 35)[None]
    with torch.no_grad():
        ours, theirs = (x(tokens).logits for x in models)
    assert torch.allclose(ours, theirs, atol=1e-4 * float(ours.abs().max()))


@pytest.mark.parametrize(
    ("name", "steps", "sparsity"),
    [("gemma2", 0, 0.3), ("llama", 10, 0.4)],
    ids=["untrained", "10 steps, scored in rounds"],
)
def test_a_sharded_run_writes_the_weights_of_one_process(
    name: str,
    steps: int,
    sparsity: float,
    tiny_inputs: Inputs,
    tiny_model: Callable,
    tiny_chat_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    tiny_model(name, vocab_size=512).save_pretrained(tiny_inputs[0])
    tiny_chat_tokenizer.save_pretrained(tiny_inputs[0])
    same = {"max_steps": steps, "save_steps": 2, "adam_epsilon": 1e-2, "shares": 1}
    same |= {"unlikelihood": 10}  # of what the last steps read
    asked = ["--sparsity", str(sparsity)]
    said(python(*QUICK, *command(tiny_inputs, one, batch_size=8, **same), *asked))
    asked += ["--set", "sharded=true"]
    said(python(*QUICK, *command(tiny_inputs, two, batch_size=4, **same), *asked, processes=2))
    records = [json.loads((x / "nuteprune.json").read_text()) for x in (one, two)]
    assert all(x["sparsity"] >= sparsity for x in records)
    for name in ("model.safetensors", "run/refit.safetensors"):
        assert_alike(*(load_file(x / name) for x in (two, one)))
    if steps:
        assert all(metrics(x)[-1]["repeats"] > 0 for x in (two, one))


JUDGES = """
import runpy, sys
from torch.distributed.fsdp import FSDPModule
from nuteprune import run
inner = run.judge_beside
def judge_beside(dense, pruned, *args, **kwargs):
    for model in (dense, pruned):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # the last pass left what is outside of layers whole
        held = [(x.to_local().numel(), x.numel()) for x in model.parameters()]
        here, whole = map(sum, zip(*held))
        print("held", here / whole)
    return inner(dense, pruned, *args, **kwargs)
run.judge_beside = judge_beside
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_sharded_run_is_judged_as_by_one_process_that_holds_half_of_each_model(
    tiny_inputs: Inputs, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    same = {"max_steps": 2, "adam_epsilon": 1e-2, "eval_blocks": 8}
    said(python(*QUICK, *command(tiny_inputs, one, batch_size=8, **same)))
    asked = command(tiny_inputs, two, batch_size=4, sharded=True, **same)
    lines = said(python("-c", JUDGES, *QUICK, *asked, processes=2)).splitlines()
    held = [float(x.split()[1]) for x in lines if x.startswith("held")]
    assert held == pytest.approx([0.5] * 4, abs=0.1)
    found = [judged(json.loads((x / "nuteprune.json").read_text())) for x in (one, two)]
    assert len(found[0]) > 10
    assert found[1] == pytest.approx(found[0], rel=1e-3)
    samples = [(x / "run" / "samples.json").read_bytes() for x in (one, two)]
    assert samples[0] == samples[1]


ANSWERS = """
import sys, torch
from transformers import AutoModelForCausalLM
from nuteprune.judge.answers import write
from nuteprune.model.anatomy import Anatomy
from nuteprune.model.weights import shard_base
from nuteprune.processes import everyone
torch.distributed.init_process_group("gloo")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).requires_grad_(False)
prompts = [[5, 9, 7], [40, 3]]
first, second = write(model, prompts, (), 12)
end = next(x for x in first[:6] if x not in second)
shard_base(Anatomy(model), torch.device("cpu"))
found = write(model, prompts, [end], 12, everyone())
assert found == [first[:first.index(end) + 1], second], (found, first, second)
"""


def test_an_answer_that_ends_in_one_process_keeps_no_other_from_going_on(
    tiny_inputs: Inputs,
) -> None:
    said(python("-c", ANSWERS, tiny_inputs[0], processes=2))


def judged(record: dict[str, Any]) -> dict[str, Any]:
    """What a record says of the smaller model and the dense one, without protocols."""

    def numbers(found: Any, name: str) -> Iterator[tuple[str, float]]:
        for key, value in found.items():
            if isinstance(value, dict) and key != "protocol":
                yield from numbers(value, f"{name}.{key}")
            elif isinstance(value, (int, float)):
                yield f"{name}.{key}", value

    return dict(numbers({x: record[x] for x in ("perplexity", "copying", "answers")}, ""))


def assert_alike(ours: Tensors, theirs: Tensors) -> None:
    """The same weights, but for rounding."""
    assert ours.keys() == theirs.keys()
    assert theirs
    for key, value in theirs.items():
        assert ours[key].shape == value.shape
        assert (ours[key] - value).norm() <= 1e-4 * value.norm(), key


@pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "sharded"])
def test_two_processes_re_fit_experts_as_one_does(
    sharded: bool, tiny_inputs: Inputs, tiny_model: Callable, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    tiny_model("qwen2_moe", vocab_size=512).save_pretrained(tiny_inputs[0])
    same = {"gates": "expert_neurons", "neuron_multiple": 8, "adam_epsilon": 1e-2, "shares": 1}
    said(python(*QUICK, *command(tiny_inputs, one, batch_size=8, **same)))
    asked = command(tiny_inputs, two, batch_size=4, sharded=sharded, **same)
    said(python(*QUICK, *asked, processes=2))
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert any(".experts." in k for k in load_file(one / "run" / "refit.safetensors"))
    for name in ("model.safetensors", "run/refit.safetensors"):
        assert_alike(*(load_file(x / name) for x in (two, one)))


def mixtures(model: PreTrainedModel) -> list[Mixture]:
    """The routed experts of each layer that has them."""
    anatomy = Anatomy(model)
    return list(filter(None, map(anatomy.mixture, range(len(anatomy.layers)))))


@pytest.mark.parametrize(
    "how",
    [
        SOFT,
        {"sharded": True, "progressive": True, "shares": 1},
        {"sharded": True, "shares": 1},
    ],
    ids=["learned masks", "sharded, masks that move", "sharded"],
)
def test_two_processes_resume_as_if_never_interrupted(
    how: dict[str, Any], tiny_inputs: Inputs, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    asked = command(tiny_inputs, out, batch_size=2, save_total_limit=2, **how)
    said(python(*QUICK, *asked, processes=2))
    whole, steps = (out / "model.safetensors").read_bytes(), losses(out)
    shutil.rmtree(out / "run" / "checkpoint-6")
    left = (out / "run" / "checkpoint-3").stat()
    assert said(python(*QUICK, *asked, "--resume", processes=2)).count("Saved") == 1
    again = (out / "run" / "checkpoint-3").stat()
    assert (again.st_ino, again.st_mtime_ns) == (left.st_ino, left.st_mtime_ns)  # not run anew
    assert (out / "model.safetensors").read_bytes() == whole
    assert losses(out) == steps


def test_weights_are_shared_out_by_the_trainer(tiny_inputs: Inputs, tmp_path: Path) -> None:
    script = Path(__file__).parent / "train" / "sharded_run.py"
    said(python(script, tiny_inputs[0], tmp_path, processes=2))
    assert load_pruned(tmp_path / "small").config.num_hidden_layers == 3


FAMILIES = (
    *("llama", "qwen3", "gemma2", "phi3", "opt", "gpt_neox"),
    *("falcon_h1", "lfm2"),
    *("mixtral", "qwen2_moe"),
)


def test_sharded_runs_of_ten_families_cut_what_the_student_was(
    tiny_model: Callable, tmp_path: Path
) -> None:
    for name in FAMILIES:
        tiny_model(name).save_pretrained(tmp_path / name)
    script = Path(__file__).parent / "train" / "sharded_families.py"
    lines = said(python(script, tmp_path, *FAMILIES, processes=2)).splitlines()
    assert [x.split()[1] for x in lines if x.startswith("exact")] == list(FAMILIES)


def test_torchrun_starts_two_that_score_and_freeze_together_where_nothing_is_trained(
    tiny_inputs: Inputs, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    asked = command(tiny_inputs, two, batch_size=4, max_steps=0)
    assert said(torchrun(*REAL, *asked)).count("Saved") == 1
    said(python(*QUICK, *command(tiny_inputs, one, batch_size=4, max_steps=0)))
    layers = [json.loads((x / "nuteprune.json").read_text())["layers"] for x in (one, two)]
    assert layers[0] == layers[1]


ON_NODES = """
import os, runpy, sys
place, sys.argv = sys.argv[1 + int(os.environ["RANK"])], sys.argv[3:]
os.makedirs(place, exist_ok=True)
os.chdir(place)
os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "sharded"])
def test_two_nodes_that_share_no_folder_do_what_two_processes_do(
    sharded: bool, tiny_inputs: Inputs, tmp_path: Path
) -> None:
    one = tmp_path / "one"
    how = {"batch_size": 2, "sharded": sharded, "save_total_limit": 2}
    said(python(*QUICK, *command(tiny_inputs, one, **how), processes=2))
    places = [tmp_path / "first", tmp_path / "second"]
    asked = ["-c", ON_NODES, *places, *QUICK, *command(tiny_inputs, Path("out"), **how)]
    assert said(python(*asked, processes=2)).count("Saved") == 1
    files = [x / "model.safetensors" for x in (one, places[0] / "out")]
    assert files[0].read_bytes() == files[1].read_bytes()
    # What the main node has is enough to go on.
    shutil.rmtree(places[1])
    shutil.rmtree(places[0] / "out" / "run" / "checkpoint-6")
    assert said(python(*asked, "--resume", processes=2)).count("Saved") == 1
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_machine_that_is_lost_ends_the_others_with_a_line(
    tiny_inputs: Inputs, tmp_path: Path
) -> None:
    places = [tmp_path / "first", tmp_path / "second"]
    long = {"batch_size": 2, "max_steps": 4000, "save_steps": 1000}
    asked = ["-c", ON_NODES, *places, *QUICK, *command(tiny_inputs, Path("out"), **long)]
    started = []
    for number, rank in enumerate(ranks(2)):
        (said := tmp_path / f"said by {number}").mkdir()
        started.append(Forked(asked, said, **rank))
    first, second = started
    reaches(5, places[0] / "out", first)
    second.send(signal.SIGKILL)
    ended = first.wait(60)
    assert ended.code > 0
    assert "process 0: another process of this run has ended" in ended.err
    assert second.wait().code == -signal.SIGKILL


def reaches(steps: int, out: Path, process: Forked) -> None:
    """Wait until a run has done so many steps."""
    metrics = out / "run" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < steps:
        assert process.running()
        time.sleep(0.01)


def test_a_signal_saves_and_resume_ends_as_if_never_interrupted(
    tiny_inputs: Inputs, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    long = {"batch_size": 2, "max_steps": 40, "save_steps": 1000}
    said(python(*QUICK, *command(tiny_inputs, whole, **long)))
    cut = tmp_path / "cut"
    asked = command(tiny_inputs, cut, **long)
    for number, more in ((signal.SIGINT, []), (signal.SIGTERM, ["--resume"])):
        errors = interrupted([*QUICK, *asked, *more], cut, number)
        assert "which is saved; go on with the same command and --resume" in errors
        assert not (cut / "config.json").exists()
    said(python(*QUICK, *asked, "--resume"))
    weights = [(x / "model.safetensors").read_bytes() for x in (cut, whole)]
    assert weights[0] == weights[1]
    assert len(losses(whole)) == 40
    assert losses(cut) == losses(whole)


def interrupted(parts: list[str], out: Path, number: signal.Signals) -> str:
    """Send a run a signal after some steps; return what it says of that."""
    with TemporaryDirectory() as said:
        process = Forked(parts, Path(said))
        reaches(5 + (len(losses(out)) if out.exists() else 0), out, process)
        process.send(number)
        ended = process.wait()
    assert ended.code == 128 + number
    return ended.err


@pytest.mark.parametrize("size", [1, 3, 8])
def test_what_is_dealt_out_is_somebodys_and_nobody_elses(size: int) -> None:
    team = [Team(i, size) for i in range(size)]
    items = list(range(7))
    assert sorted(x for each in team for x in each.mine(items)) == items
    assert all([x for x in items if each.is_mine(x)] == each.mine(items) for each in team)


WRITES = """
import sys, torch
from transformers import AutoModelForCausalLM
from nuteprune.data.tokens import Openings
from nuteprune.data.decoding import TextInProgress, write_batch
torch.distributed.init_process_group("gloo")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
opening = Openings((1,), (3, 4, 5), (), (), frozenset({2}), frozenset(), 500)
batch = [TextInProgress(opening, i) for i in range(3)]
generator = torch.Generator().manual_seed(torch.distributed.get_rank())
list(write_batch(model, opening, batch, 6, generator))
print([x.ids for x in batch])
"""


def test_what_the_main_process_draws_is_what_all_write(tiny_inputs: Inputs) -> None:
    lines = said(python("-c", WRITES, tiny_inputs[0], processes=2)).splitlines()
    assert len(lines) == 2
    assert lines[0] == lines[1]


ADDS = """
import sys, torch
from nuteprune.processes import everyone
torch.distributed.init_process_group("gloo")
team = everyone()
seen = []
whole = team.by_rows(7, lambda rows: seen.append(rows) or torch.arange(14.0).view(7, 2)[rows])
assert torch.equal(whole, torch.arange(14.0).view(7, 2))
pairs = []
whole = team.by_rows(7, lambda rows: pairs.append(rows) or torch.arange(7.0)[rows], together=2)
assert torch.equal(whole, torch.arange(7.0)) and pairs[0].start in (0, 4)
apart = torch.full((2, 3), 1.0 + team.rank).T  # rows are not next to each other
count = torch.tensor(team.rank)
team.add_up([apart, count])
assert torch.equal(apart, torch.full((3, 2), 6.0)) and count == 3
print(seen)
if team.rank == 1:
    sys.exit(3)
team.add_up([count])
"""


def test_what_each_process_has_done_is_added_up_until_one_ends() -> None:
    done = python("-c", ADDS, processes=3)
    assert done.code  # within the minutes that `python` waits for
    for rows in ((0, 3), (3, 6), (4, 7)):
        assert f"slice({rows[0]}, {rows[1]}, None)" in done.out
    assert done.err.count("RunFailed: another process of this run has ended") == 2

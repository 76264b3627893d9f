"""Long runs, huge files, odd sizes, a disk that is really full."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from nuteprune import load_pruned
from nuteprune.data.training_text import BlockDataset
from nuteprune.progressive.config import ProgressiveConfig
from nuteprune.progressive.trainer import ProgressiveTrainer

from .conftest import Server

pytestmark = pytest.mark.hard(10)

OPTIONS = ["--length", "16", "--device", "cpu", "--dtype", "float32", "--batch-size", "2"]
SETTINGS = ["--set=calibration_blocks=2", "--set=lora_rank=2"]


# --- a long run ------------------------------------------------------------------------------


class Watch(TrainerCallback):
    """Notes memory and open files of this process every hundred steps, just after a checkpoint."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, int]] = []

    def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step % 100 == 1:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            held = pages * os.sysconf("SC_PAGE_SIZE")
            self.seen.append((state.global_step, held, len(os.listdir("/proc/self/fd"))))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_3000_steps_hold_memory_and_open_files_flat(tiny_model, tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    dataset = BlockDataset(torch.randint(3, 90, (64, 8), generator=random))
    args = ProgressiveConfig(
        output_dir=str(tmp_path),
        target_sparsity=0.5,
        max_steps=3000,
        ramp_share=0.8,
        freeze_share=0.9,
        per_device_train_batch_size=2,
        neuron_multiple=1,
        gate_type="hard_concrete",
        lora_rank=2,
        calibration_blocks=2,
        save_strategy="steps",
        save_steps=50,
        save_total_limit=2,
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
    )
    watch = Watch()
    trainer = ProgressiveTrainer(
        tiny_model("llama", num_hidden_layers=2), args, dataset, callbacks=[watch]
    )
    trainer.train()
    steps, held, files = zip(*watch.seen, strict=True)
    assert (len(steps), steps[-1]) == (30, 2901)
    assert len(trainer.teachers) >= 30
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3000
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2
    # The first thousand steps warm caches up; after them nothing may grow with the steps.
    growth = max(held[20:]) - max(held[5:15])
    print(f"memory {held[10] / 2**20:.0f} -> {held[-1] / 2**20:.0f} MiB, files {set(files[1:])}")
    assert growth < 24 * 2**20
    assert max(files[15:]) <= max(files[1:15])


# --- a huge file -----------------------------------------------------------------------------

READ = """
import resource, sys
from nuteprune.data.specs import iter_documents
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
(documents,) = iter_documents(sys.argv[1]).values()
count = characters = 0
for document in documents:
    count += 1
    characters += len(document)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(count, characters, (after - before) * 1024)
"""


@pytest.mark.parametrize(
    "separator", ["\n\n\n", " "], ids=["many documents", "one document, one line"]
)
def test_two_gigabytes_of_text_are_read_in_bounded_memory(separator: str, tmp_path: Path) -> None:
    path = tmp_path / "huge.txt"
    piece = (" ".join(f"word{i}" for i in range(1000)) + separator).encode()
    block = piece * (2**24 // len(piece))
    with path.open("wb") as file:
        while file.tell() < 2 * 10**9:
            file.write(block)
    size = path.stat().st_size
    try:
        done = subprocess.run(
            [sys.executable, "-c", READ, str(path)], capture_output=True, text=True, check=True
        )
    finally:
        path.unlink()
    count, characters, memory = map(int, done.stdout.split())
    print(f"{size / 1e9:.2f} GB: {count} documents, {memory / 1e6:.0f} MB more memory")
    documents = size // len(piece)
    # All of the text came by, but for what separates documents.
    assert characters == size - (documents * len(separator) if separator == "\n\n\n" else 0)
    assert count == documents if separator == "\n\n\n" else count >= characters // 2**20
    assert memory < 100e6


# --- odd sizes -------------------------------------------------------------------------------

SIZES: dict[str, tuple[dict[str, int], list[str]]] = {
    "200 layers": ({"num_hidden_layers": 200}, ["--sparsity=0.4", "--set=neuron_multiple=4"]),
    "1 layer": ({"num_hidden_layers": 1}, ["--sparsity=0.4", "--set=neuron_multiple=4"]),
    "1 head": (
        {"num_attention_heads": 1, "num_key_value_heads": 1},
        ["--sparsity=0.3", "--set=neuron_multiple=4"],
    ),
    "1 neuron left": ({}, ["--sparsity=0.5", "--gates=neurons", "--set=neuron_multiple=1"]),
    "1 neuron": ({"intermediate_size": 1}, ["--sparsity=0.2", "--set=neuron_multiple=1"]),
}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("shapes", ["free", "uniform"])
def test_models_of_odd_sizes_work(
    name: str,
    shapes: str,
    tiny_model,
    tiny_inputs: tuple[Path, Path],
    tmp_path: Path,
    server: Server,
) -> None:
    changes, asked = SIZES[name]
    model, text = tiny_inputs
    tiny_model("llama", vocab_size=512, **changes).save_pretrained(model)
    out = tmp_path / "out"
    if name == "1 neuron left":  # as much as can go
        args = ["prune", model, "--data", text, "--out", out, *OPTIONS, *SETTINGS, *asked[1:]]
        most = server.run([*args, "--sparsity=0.99", f"--shapes={shapes}", "--steps=2"])
        assert most.code == 2, most.said
        reach = float(most.last_line.split("at most ")[1].split()[0].rstrip("%;,.")) / 100
        asked = [f"--sparsity={reach - 0.001:.4f}", *asked[1:]]
    args = ["prune", model, "--data", text, "--out", out, *OPTIONS, *SETTINGS, *asked]
    ended = server.run([*args, f"--shapes={shapes}", "--steps=3", "--set=save_steps=2"])
    assert ended.code == 0, ended.said
    record = json.loads((out / "nuteprune.json").read_text())
    target = float(asked[0].split("=")[1])
    assert record["sparsity"] >= target
    if name == "1 neuron left":
        assert min(layer["neurons"] for layer in record["layers"]) == 1
    loaded = load_pruned(out)
    logits = loaded(torch.arange(3, 15)[None]).logits
    assert torch.isfinite(logits).all()
    assert sum(p.numel() for p in loaded.parameters()) == record["params"]["after"]


def test_a_model_with_nothing_to_spare_is_refused(
    tiny_model, tiny_inputs: tuple[Path, Path], tmp_path: Path, server: Server
) -> None:
    model, text = tiny_inputs
    sizes = {"num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 1}
    tiny_model("llama", vocab_size=512, **sizes).save_pretrained(model)
    out = tmp_path / "out"
    asked = ["prune", model, "--data", text, "--out", out, *OPTIONS, "--sparsity=0.1"]
    ended = server.run([*asked, "--set=neuron_multiple=1"])
    assert (ended.code, len(ended.said.strip().splitlines())) == (2, 1), ended.said
    assert not out.exists()


# --- a disk that is really full ---------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, where this user may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a file system; a failing writer stands in, see test_faults")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("kibibytes", [1, 80, 160, 240, 320, 400])
def test_a_disk_that_is_full_ends_the_run_in_one_line_and_room_mends_it(
    kibibytes: int, small_disk: Path, tiny_inputs: tuple[Path, Path], tmp_path: Path, server: Server
) -> None:
    model, text = tiny_inputs
    out, ballast = small_disk / "out", small_disk / "ballast"
    args = ["prune", model, "--data", text, *OPTIONS, *SETTINGS, "--sparsity=0.3", "--steps=8"]
    args += ["--set=neuron_multiple=4", "--set=save_steps=2", "--set=progressive=true", "--out"]
    whole = tmp_path / "whole"
    assert server.run([*args, whole]).code == 0
    ballast.write_bytes(bytes(2**20 - kibibytes * 1024))
    ended = server.run([*args, out])
    assert ended.code == 1, ended.said
    assert "Traceback" not in ended.said
    assert ended.last_line.startswith("nuteprune: ")
    assert "--overwrite" not in ended.last_line
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    ended = server.run([*args, out, "--resume"])
    if ended.code == 2:
        assert "start anew" in ended.last_line, ended.said
        ended = server.run([*args, out, "--overwrite"])
    assert ended.code == 0, ended.said
    for name in ("model.safetensors", "run/metrics.jsonl"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()

from __future__ import annotations

from pathlib import Path

import torch

from nuteprune.console import Output
from nuteprune.export.loading import load_pruned
from nuteprune.jobs import recover
from nuteprune.jobs.job import STEPS, TEXT, RecoverJob
from nuteprune.jobs.recover import judged_again
from nuteprune.jobs.recover_text import judged_text
from nuteprune.judge.perplexity import protocol


def test_float16_is_not_rounded_to_bfloat16(tiny_inputs: tuple[Path, Path], tmp_path: Path) -> None:
    half = load_pruned(tiny_inputs[0], dtype=torch.float16)
    half.save_pretrained(tmp_path / "half")
    job = RecoverJob(str(tmp_path / "half"), tmp_path / "out", device="cpu", dtype="bfloat16")
    loaded, autocast = recover._load(job)
    assert autocast["bf16"]
    for ours, theirs in zip(loaded.parameters(), half.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_step_learns_from_what_all_its_passes_read(tmp_path: Path) -> None:
    job = RecoverJob("model", tmp_path, device="cpu", batch_size=2, accumulation=3)
    config = recover._config(job, TEXT)
    assert (config.sequences_per_step, config.max_steps) == (6, STEPS)


def test_other_text_of_the_same_name_and_size_is_not_the_same() -> None:
    name, numbers = "text.txt", torch.arange(16)
    first, other = (protocol({name: x.view(2, 8)}) for x in (numbers, numbers.flip(0)))
    assert first == protocol({name: numbers.int().view(2, 8)})
    perplexity = {"before": {name: 2.0}, "after": {name: 3.0}, "protocol": first}
    old = {k: x for k, x in first.items() if k != "block_hash"}  # as earlier releases wrote it
    for how, dense in ((first, {name: 2.0}), (other, {}), (old, {})):
        entry = {"perplexity": {"before": {name: 3.0}, "after": {name: 2.5}, "protocol": how}}
        assert judged_again({"perplexity": perplexity}, entry)["before"] == dense


def test_what_judges_is_named_where_the_text_of_the_record_is_gone(
    tiny_inputs: tuple[Path, Path], tiny_tokenizer, tmp_path: Path
) -> None:
    text = str(tiny_inputs[1])
    job = RecoverJob("model", tmp_path, data=text, length=16)
    for data, named in ((text, None), (str(tmp_path / "gone.txt"), text)):
        record = {"config": {"data": data, "length": 16}}
        found, blocks = judged_text(job, record, tiny_tokenizer, Output(quiet=True))
        assert found == named
        assert list(blocks) == ["text.jsonl"]

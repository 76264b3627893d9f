from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

from nuteprune.data.fingerprint import MOST, Fingerprint
from nuteprune.data.held_out import split


def independent(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8, person=b"fingerprint").hexdigest()


def test_the_smallest_hashes_are_kept_in_whatever_order_documents_come() -> None:
    texts = [f"document {i}" for i in range(2 * MOST)]
    expected = "".join(sorted(map(independent, texts))[:MOST])
    for seed in range(2):
        random.Random(seed).shuffle(texts)
        found = Fingerprint()
        for text in [*texts, *texts[:9]]:
            found.add_document(f" {text}\n")
        assert found.to_dict()["documents"] == expected
    assert Fingerprint(found.to_dict()).to_dict() == found.to_dict()


def test_what_is_kept_is_not_what_is_held_out() -> None:
    """Both go by small hashes: of one hash, nothing that was trained on would be kept."""
    texts = [f"document {i}" for i in range(40_000)]
    found = Fingerprint()
    for text in texts:
        found.add_document(text)
    sample = found.to_dict()["documents"]
    kept = [x for x in texts if independent(x) in sample]
    held_out = [x for x in kept if split(x)[1]]
    assert len(kept) == MOST
    assert 0.03 < len(held_out) / MOST < 0.07


@pytest.mark.parametrize("size", [0, 10, 3 * 2**20])
def test_files_are_known_by_size_and_ends(size: int, tmp_path: Path) -> None:
    content = random.Random(0).randbytes(size)

    def of(content: bytes) -> str:
        (tmp_path / "file").write_bytes(content)
        found = Fingerprint()
        found.add_file(tmp_path / "file")
        return found.to_dict()["files"]

    assert len(of(content)) == 16
    assert of(content) == of(content)
    for other in (content + b"x", b"x" + content, content[:-1] + b"\0" if size else b"y"):
        assert of(other) != of(content)

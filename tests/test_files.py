"""Files that are on the disk when a call returns, where the system can tell."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from nuteprune.files import atomic, cache_folder, sync


@pytest.mark.parametrize(
    ("number", "folder", "forgiven"),
    [(errno.EINVAL, True, True), (errno.EINVAL, False, False), (errno.EIO, True, False)],
)
def test_only_a_folder_that_cannot_be_waited_for_is_forgiven(
    number: int, folder: bool, forgiven: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path if folder else tmp_path / "file"
    if not folder:
        path.write_bytes(b"")

    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    if forgiven:
        sync(path)
        return
    with pytest.raises(OSError, match=os.strerror(number)):
        sync(path)


@pytest.mark.parametrize("name", ["plain", "n" * 255])
def test_what_goes_wrong_is_told_by_the_files_own_name(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with pytest.raises(FileNotFoundError) as told, atomic(path):
        pass  # nothing was written
    assert told.value.filename == str(path)
    assert ".partial" not in str(told.value)


def test_the_cache_is_where_the_system_keeps_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NUTEPRUNE_CACHE", raising=False)
    assert "nuteprune" in cache_folder().parts
    monkeypatch.setenv("NUTEPRUNE_CACHE", "here")
    assert cache_folder() == Path.cwd() / "here"

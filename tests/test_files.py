"""Files that are on the disk when a call returns, where the system can tell."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from nuteprune.files import sync


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

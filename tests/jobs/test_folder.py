from __future__ import annotations

from pathlib import Path

from nuteprune.jobs.folder import clear_result


def test_what_is_only_called_like_a_target_stays(tmp_path: Path) -> None:
    for name in ("size-200MB", "sparsity-1e-05", "memory-4GiB", "speedup-1.25"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    mine = ("memory-notes", "size-2.txt", "params-old")
    for name in (mine[0], mine[2]):
        (tmp_path / name).mkdir()
    (tmp_path / mine[1]).write_text("the user's")
    clear_result(tmp_path)
    assert sorted(x.name for x in tmp_path.iterdir()) == sorted(mine)

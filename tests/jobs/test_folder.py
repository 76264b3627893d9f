from __future__ import annotations

from pathlib import Path

import pytest

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


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_of_several_targets_keeps_what_it_has_of_each(
    overwrite: bool, tmp_path: Path
) -> None:
    kept = {"run/settings.json", "sparsity-0.2/run/choose.safetensors"}
    written = {"sparsity-0.2/config.json", "sparsity-0.2/.0.partial", "sparsity-0.3/config.json"}
    written |= {f"{x}run/.cut-0/part.safetensors" for x in ("", "sparsity-0.2/")}  # it was killed
    for name in kept | written:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    clear_result(tmp_path, overwrite)
    assert {str(x.relative_to(tmp_path)) for x in tmp_path.rglob("*") if x.is_file()} == kept
    assert not (tmp_path / "sparsity-0.3").exists()

from __future__ import annotations

from pathlib import Path

import pytest

from nuteprune.errors import UserError
from nuteprune.jobs.folder import check_out
from nuteprune.jobs.job import Job


def test_a_folder_with_the_text_to_judge_by_is_not_overwritten(tmp_path: Path) -> None:
    text = tmp_path / "out" / "eval.txt"
    text.parent.mkdir()
    text.write_text("What is judged by.")
    job = Job("demo", tmp_path / "out", eval_data=str(text), overwrite=True)
    with pytest.raises(UserError, match="holds the eval data"):
        check_out(job)

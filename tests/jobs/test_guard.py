from __future__ import annotations

import errno
import tempfile
from contextlib import nullcontext
from pathlib import Path

import pytest

from nuteprune.errors import RunFailed, UserError
from nuteprune.files import at_home
from nuteprune.jobs.folder import clear_result
from nuteprune.jobs.guard import alone, check_file, check_out, check_writable, nothing_left
from nuteprune.jobs.job import Job, PruneJob, VocabJob
from nuteprune.jobs.read_settings import make_job


@pytest.fixture(autouse=True)
def _cache_with_nothing_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's may hold thousands of files, each of which is one that a job may read."""
    monkeypatch.setenv("NUTEPRUNE_CACHE", str(tmp_path / "cache"))


def test_a_folder_with_the_text_to_judge_by_is_not_overwritten(tmp_path: Path) -> None:
    text = tmp_path / "out" / "eval.txt"
    text.parent.mkdir()
    text.write_text("What is judged by.")
    job = Job("demo", tmp_path / "out", eval_data=str(text), overwrite=True)
    with pytest.raises(UserError, match="holds the eval data"):
        check_out(job)


def test_resuming_is_offered_where_there_is_a_run_to_go_on_with(tmp_path: Path) -> None:
    for name, offered in (
        ("notes.txt", False),
        ("run/metrics.jsonl", False),
        ("run/settings.json", True),
        ("run/self.jsonl", True),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        with pytest.raises(UserError, match="is not empty") as told:
            check_out(Job("demo", tmp_path))
        assert ("or --resume to go on with it" in str(told.value)) == offered
        with pytest.raises(UserError, match=r"to replace it$"):
            check_out(VocabJob("demo", tmp_path))


@pytest.mark.parametrize("setting", ["config", "shape", "family", "costs"])
def test_a_folder_with_a_file_of_settings_is_not_overwritten(setting: str, tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "out" / "mine.yaml"
    out.mkdir()
    file.write_text("seed: 3")
    given: dict[str, object] = {"model": "demo", "out": out, "overwrite": True}
    config = str(file) if setting == "config" else None
    given |= {} if config else {setting: str(file)}
    job = make_job(PruneJob, given, config)
    with pytest.raises(UserError, match=rf"holds the settings {file}; name another folder"):
        check_out(job)


@pytest.mark.parametrize("what", ["data", "eval_data"])
def test_text_is_not_read_from_around_the_result(what: str, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    given = {"model": "demo", "out": texts / "out", what: str(texts)}
    with pytest.raises(UserError, match=r"is inside the .*data .*; name a folder outside"):
        check_out(Job(**given))  # type: ignore[arg-type]
    check_out(Job("demo", texts / "out", data=str(tmp_path / "texts" / "one.txt")))
    check_out(Job(str(texts), texts / "out"))  # a model's folder is no text


def test_a_file_system_that_locks_no_folders_is_no_hindrance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:  # NFS locks what is open for writing, which no folder is
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr("fcntl.flock", refuse)
    with alone(tmp_path / "out"):
        assert (tmp_path / "out").is_dir()


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("gone")
    with pytest.raises(UserError, match="link is a link to gone, which is not there"), alone(link):
        pass


def test_a_folder_is_locked_wherever_temporary_files_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, link = tmp_path / "new" / "out", tmp_path / "link"
    link.symlink_to(out)
    with alone(out):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        for name in (out, link):
            with pytest.raises(UserError, match="another run is at work"), alone(name):
                pass
    out.rmdir()
    with alone(out):
        (out / "result").touch()
    with alone(link):
        assert [x.name for x in out.iterdir()] == ["result"]


@pytest.mark.parametrize("error", [None, UserError, KeyboardInterrupt])
def test_folders_stay_if_a_run_can_begin(error: type | None, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with pytest.raises(error) if error else nullcontext(), nothing_left(out):
        (out / "run").mkdir(parents=True)
        if error:
            raise error
    assert (out / "run").exists() == (error is None)
    assert out.parent.exists() == (error is None)


@pytest.mark.parametrize("out", ["..", "../..", "~", "~/.."])
def test_what_is_around_the_user_is_not_overwritten(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("here/small", "home"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here" / "small")
    check_out(Job("demo", Path(), overwrite=True))  # but an output folder that the user is in
    with pytest.raises(UserError, match="--overwrite would remove all of it; name another"):
        check_out(Job("demo", at_home(out), overwrite=True))


@pytest.mark.parametrize("what", ["model", "data"])
def test_a_folder_with_a_part_of_what_is_read_is_not_overwritten(what: str, tmp_path: Path) -> None:
    """A model in three files, or a folder of texts, of which one is a link into `out`."""
    (tmp_path / "read" / "below").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "third").write_text("read")
    for name in ("first", "second"):
        (tmp_path / "read" / name).write_text("read")
    place = tmp_path / "read" if what == "model" else tmp_path / "read" / "below"
    (place / "third").symlink_to(tmp_path / "out" / "third")
    given = {"model": "some/model", what: str(tmp_path / "read")}
    job = Job(out=tmp_path / "out", overwrite=True, **given)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f"holds the {what} .*read; name another folder"):
        check_out(job)
    (place / "third").unlink()
    check_out(job)


def test_the_demos_files_are_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUTEPRUNE_CACHE", str(tmp_path / "caches" / "ours"))
    (tmp_path / "caches" / "ours" / "model").mkdir(parents=True)
    (tmp_path / "caches" / "ours" / "model" / "config.json").touch()
    for out in ("caches", "caches/ours", "caches/ours/model"):
        with pytest.raises(UserError, match="holds the model demo"):
            check_out(Job("demo", tmp_path / out, overwrite=True))
    check_out(Job("demo", tmp_path / "caches" / "ours" / "out", overwrite=True))


def test_caches_of_models_are_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUTEPRUNE_CACHE", str(tmp_path / "ours" / "cache"))
    monkeypatch.setattr("nuteprune.jobs.guard.HF_HUB_CACHE", str(tmp_path / "hub" / "cache"))
    for out in ("ours", "hub"):
        (tmp_path / out).mkdir()
        job = Job("some/model", tmp_path / out, data="some/data", overwrite=True)
        with pytest.raises(UserError, match="a cache of models"):
            check_out(job)


def test_a_model_in_the_hubs_cache_is_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--some--model"
    snapshot = repo / "snapshots" / ("0" * 40)
    for folder in (repo / "blobs", repo / "refs", snapshot):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    (repo / "blobs" / "1").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/1")
    for file in (repo / "blobs" / "1", snapshot / "config.json"):
        with pytest.raises(UserError, match="belongs to the model some/model, which would be lost"):
            check_file("--out", file, [("model", "some/model")], True, "model.gguf")
    check_file("--out", file, [("model", "no model's name")], True, "model.gguf")


def test_links_in_a_circle_are_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "loop").symlink_to("loop")
    check_out(Job(str(tmp_path / "model"), tmp_path / "out", overwrite=True))


def test_a_disk_that_takes_names_and_no_bytes_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Path("/dev/full").open("wb", buffering=0) as full:
        monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: nullcontext(full))
        with pytest.raises(RunFailed, match=r"cannot write --out .*new: No space left"):
            check_writable("--out", tmp_path / "new")


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

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest

from nuteprune.data.specs import iter_documents
from nuteprune.errors import UserError

from .conftest import only, write_rows, write_text


class TestSources:
    def test_demo_has_its_three_sources(self, demo: dict[str, list[str]]) -> None:
        found = iter_documents("demo")
        assert {name: list(texts) for name, texts in found.items()} == demo

    def test_some_of_them_can_be_named(self, demo: dict[str, list[str]]) -> None:
        for spec in ("demo:recipes,wikipedia", "demo:wikipedia,recipes"):
            found = iter_documents(spec)
            assert list(found) == ["wikipedia", "recipes"]
            assert all(list(texts) == demo[name] for name, texts in found.items())
        for spec in ("demo:", "demo:poems", "demo:recipes,", "demo:recipes:train"):
            with pytest.raises(UserError, match="no embedded source is called"):
                iter_documents(spec)

    def test_a_folder_is_one_source(self, tmp_path: Path) -> None:
        folder = tmp_path / "corpus"
        (folder / "deep").mkdir(parents=True)
        (folder / ".cache").mkdir()
        write_text(folder, ["three"], "deep/b.txt")
        write_rows(folder, [{"content": "one"}], "a.jsonl")
        write_rows(folder, [{"text": "two"}], "b.json")
        write_rows(folder, [{"nothing": 1}], ".cache/c.json")
        (folder / "empty.txt").touch()
        (folder / "README.md").write_text("no text")
        (name,) = iter_documents(str(folder))
        assert name == "corpus"
        assert only(str(folder)) == ["one", "two", "three"]


class TestHub:
    def test_is_streamed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[object] = []

        def rows() -> Iterator[dict[str, str]]:
            for i in itertools.count():
                yield {"text": f"document {i}"}

        def load(*arguments: object, **options: object) -> datasets.IterableDataset:
            asked.append((arguments, options))
            return datasets.IterableDataset.from_generator(rows)

        monkeypatch.setattr(datasets, "load_dataset", load)
        for spec in ("a/b", "b:c", "b:c:validation"):
            found = iter_documents(spec)
            assert list(found) == [spec]
            assert list(itertools.islice(found[spec], 2)) == ["document 0", "document 1"]
        assert asked == [
            (("a/b", None), {"split": "train", "streaming": True}),
            (("b", "c"), {"split": "train", "streaming": True}),
            (("b", "c"), {"split": "validation", "streaming": True}),
        ]

    def test_what_the_hub_says_is_passed_on_in_a_line(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def load(*_: object, **__: object) -> None:
            raise ConnectionError("cannot\nreach")

        monkeypatch.setattr(datasets, "load_dataset", load)
        with pytest.raises(UserError, match=r"a/b: neither .*\(cannot reach\); pass a path"):
            only("a/b")


class TestErrors:
    @pytest.mark.parametrize(
        "spec", [" ", "no.txt", "./no/where", "/no/where", "a/b/c", "a:b:c:d", "C:\\x", "a\0"]
    )
    def test_a_spec_that_is_nothing(self, spec: str) -> None:
        with pytest.raises(UserError, match="no such file or folder; pass demo, a path"):
            iter_documents(spec)

    def test_an_empty_spec(self) -> None:
        with pytest.raises(UserError, match="is a variable not set"):
            iter_documents("")

"""The report of a run: its page, its plots, its command, and the place in the model card."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from nuteprune.data.fingerprint import text_kind
from nuteprune.errors import UserError
from nuteprune.export.card import model_card
from nuteprune.jobs.job import RecoverJob
from nuteprune.judge import plots
from nuteprune.judge.plots import COLOURS, POINTS
from nuteprune.judge.report import TUNED, kept_rows, recoveries, settings, verdict, write_report
from nuteprune.judge.run_files import read_run
from nuteprune.train.declared import CALL, declared
from tests.export.test_card import BESIDE
from tests.undrawn import leave_blank

pytestmark = pytest.mark.slow


@pytest.fixture
def drawn() -> None:
    """For tests whose plots are drawn."""


@pytest.fixture(autouse=True)
def _blank(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave plots blank elsewhere: they take most of a report's time."""
    if "drawn" not in request.fixturenames:
        leave_blank(monkeypatch.setattr)


EVIL = "<script>alert(1)</script>"
NASTY = [
    EVIL,
    "\"quoted\" 'name' onload=alert(1)",
    "{{ 7 * 7 }}{% raw %}",
    "$\\frac{1}{$",
    "#1f5c99 url(#x) ]]>&amp;",
    "\u202eelpmaxe\u202c \U0001f9ea\u200d \u4e2d\u6587 \x07\x00 \ufffe",
    "lone \udc80 surrogate",
    "line\nbreak",
]


def layer(heads: int, kv_heads: int, neurons: int) -> dict[str, Any]:
    blocks = {"attention": heads > 0, "mlp": neurons > 0}
    return {"heads": heads, "kv_heads": kv_heads, "neurons": neurons, **blocks}


def judged(*kinds: str) -> dict[str, Any]:
    """What a record says of a run's text, of which nothing was kept but what judged."""
    nothing = {"documents": "", "files": "", "names": []}
    return {**nothing, "judged": {f"text {i}": kind for i, kind in enumerate(kinds)}}


def a_record(depth: int = 3, **changes: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "target": 0.2,
        "sparsity": 0.2,
        "total_sparsity": 0.15,
        "params": {"before": 2000, "after": 1700, "blocks_before": 1500, "blocks_after": 1200},
        "layers": [layer(4, 2, 96 - 8 * i) for i in range(depth)],
        "layers_before": [{"heads": 4, "kv_heads": 2, "neurons": 128}] * depth,
        "hidden": {"before": 64, "after": 64},
        "teachers": {"count": 2, "sparsities": [0.05, 0.1]},
        "perplexity": {
            "before": {"news": 20.0, "poems": 30.0},
            "after": {"news": 25.0, "poems": 45.0},
            "protocol": {"measure": "how it was measured"},
        },
        "base_model": "owner/model",
        "config": {"model": "owner/model", "data": "text.txt", "target_sparsity": 0.2},
        "text": judged("in-domain"),
        "seconds": 100.0,
        "bytes_on_disk": 3400,
        "seed": 7,
        "versions": {"nuteprune": "0"},
        **changes,
    }


def some_steps(count: int = 6) -> list[dict[str, Any]]:
    return [
        {
            "step": i + 1,
            "loss": 0.5 + i,
            "token_kl": 0.3 + i,
            "layer": 0.2,
            "sparsity": min(0.2, 0.1 * i),
            "target": min(0.2, 0.1 * i),
            "teacher": min(i, 1) - 1,
            "teachers": min(i, 2),
            "bad_steps": 0,
        }
        for i in range(count)
    ]


def a_run(
    folder: Path,
    record: Mapping[str, Any] | None,
    metrics: list[dict[str, Any]] | None,
    **files: Any,
) -> Path:
    """Write a run's folder; `files`: further JSON files of run/ by stem."""
    run = folder / "run"
    run.mkdir(parents=True)
    if record is not None:
        (folder / "nuteprune.json").write_text(json.dumps(record))
    if metrics is not None:
        (run / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    for stem, content in files.items():
        (run / f"{stem}.json").write_text(json.dumps(content))
    return folder


class Page(HTMLParser):
    """A page taken apart by the standard library: elements, ids, text."""

    VOID = frozenset({"meta", "link", "br"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def sections(self) -> list[str]:
        return [attributes["aria-labelledby"] for attributes in self.all("section")]


def page_of(folder: Path) -> Page:
    return Page(write_report(folder))


SPEED = {
    "conditions": "cpu, 2 threads",
    "rows": [
        {
            **{"name": "decode", "unit": "tokens/s", "dense": 10, "pruned": 12},
            # The median of ratios, pass by pass, and its spread.
            **{"better": "higher", "gain": 1.25, "low": 1.2, "high": 1.3, "bound": 1.33},
            "verdict": "faster",
        },
        {
            **{"name": "first token", "unit": "ms", "dense": 90.0, "pruned": 60.0},
            **{"better": "lower", "gain": 1.5, "low": 1.4, "high": 1.6, "bound": 1.7},
            "verdict": "faster",
        },
    ],
    "notes": ["decode reaches 80% of its bound at worst"],
}


# --- the page --------------------------------------------------------------------------------


def test_answers_and_context_stand_beside_how_they_were_judged(tmp_path: Path) -> None:
    samples = [{"which": "worst", "prompt": "Why?", "dense": "So.", "pruned": "So so so"}]
    folder = a_run(tmp_path / "out", a_record(**BESIDE), some_steps(), samples=samples)
    page = page_of(folder)
    for expected in (
        "17.19 % of its answers loop (3.12 % of the dense model's)",
        "looping, % 3.1 17.2 × 5.50",
        "KL divergence, nats per token 0.450",
        "nats gained by context 3.00 1.50 × 0.50",
        "nats lost, 12 tokens that need it 1.25",
        "Context: the last tokens of 3 blocks of 256.",
        "kl: how far.",
        "The worst answer",
        "So so so",
    ):
        assert expected in page.text
    several = BESIDE["context"] | {"1152": BESIDE["context"]["256"]}
    folder = a_run(tmp_path / "several", a_record(context=several), some_steps())
    assert "gain kept, %, blocks of 1152 50.0" in page_of(folder).text


@pytest.mark.usefixtures("drawn")
def test_a_finished_run_has_all_that_is_known_and_nothing_from_outside(tmp_path: Path) -> None:
    samples = [{"prompt": "Once", "dense": "upon a time", "pruned": "there was"}]
    folder = a_run(tmp_path / "out", a_record(), some_steps(), samples=samples, speed=SPEED)
    page = page_of(folder)
    assert page.sections == ["dense-and-pruned", "quality", "training", "samples", "reproduce"]
    for expected in (
        "owner/model",
        "20.0 % of the decoder is gone",
        "2.00 k 1.70 k −15.0 %",
        "≈ 4.00 kB 3.40 kB −15.0 %",
        "news 20.00 25.00 × 1.25",
        "mean 25.00 35.00 × 1.40",
        "decode reaches 80% of its bound",
        "decode, tokens/s 10.00 12.00 × 1.25",
        "and it runs 1.25 × as fast",
        "first token, ms 90.00 60.00 × 1.50",
        "upon a time",
        "nuteprune prune owner/model --config FILE",
        "seed: 7",
    ):
        assert expected in page.text
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.elements:
        assert tag not in {"script", "iframe", "img", "object", "form"}
        for name in ("src", "href", "xlink:href", "action", "srcset"):
            target = attributes.get(name, "#")
            assert target.startswith("#") or target == "data:,"
            if target.startswith("#") and target != "#":
                assert target[1:] in ids
        assert "url(" not in attributes.get("style", "")
    assert not re.search(r"@import|https?:", (folder / "run/report.html").read_text())


def test_pictures_have_words_and_tables_have_headers(tmp_path: Path) -> None:
    page = page_of(a_run(tmp_path / "out", a_record(), some_steps()))
    pictures = [a for _, a in page.elements if a.get("role") == "img"]
    assert len(pictures) == len(page.all("svg")) == 2
    assert all(len(a["aria-label"]) > 30 for a in pictures)
    assert "least in layer 2 (80 of 128)" in pictures[0]["aria-label"]
    assert all(a.get("scope") in {"col", "row", "rowgroup"} for a in page.all("th"))
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("h1")) == 1


@pytest.mark.usefixtures("drawn")
def test_plots_take_every_colour_and_font_from_the_page(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "out", a_record(), some_steps())
    html = write_report(folder).read_text()
    drawings = re.findall(r"<svg.*?</svg>", html, flags=re.S)
    assert len(drawings) == 2
    for drawing in drawings:
        used = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", drawing))
        assert used <= {f"var(--{name})" for name in COLOURS} | {"none"}
    for scheme in (html[: html.index("@media")], html[html.index("@media screen") :]):
        assert all(re.search(rf"--{name}: #[0-9a-f]{{6}};", scheme) for name in COLOURS)
    light = dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", html[: html.index("@media")]))
    assert COLOURS.items() <= light.items()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(scheme: str, tmp_path: Path) -> None:
    html = write_report(a_run(tmp_path / "out", a_record(), None)).read_text()
    start = html.index("@media screen") if scheme == "dark" else 0
    colours = dict(re.findall(r"--(\w+): #([0-9a-f]{6});", html[start : html.index("}", start)]))

    def luminance(name: str) -> float:
        parts = (int(colours[name][i : i + 2], 16) / 255 for i in (0, 2, 4))
        r, g, b = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    for ground in ("paper", "wash"):
        for name in ("ink", "muted", "blue", "orange", "green", "violet"):
            low, high = sorted((luminance(name), luminance(ground)))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (name, ground)  # WCAG 2, level AA


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize("nasty", NASTY)
def test_words_of_others_do_no_harm(nasty: str, tmp_path: Path) -> None:
    perplexity = {"before": {nasty: 2.0}, "after": {nasty: 3.0}, "protocol": {"measure": nasty}}
    config = {"model": nasty, "data": nasty, nasty: nasty}
    folder = a_run(
        tmp_path / "out",
        a_record(
            base_model=nasty, perplexity=perplexity, config=config, versions={"nuteprune": nasty}
        ),
        None,
        samples=[{"prompt": nasty, "dense": nasty, "pruned": nasty}],
        speed={
            "conditions": nasty,
            "rows": [{**SPEED["rows"][0], "name": nasty, "unit": nasty}],  # type: ignore[index]
            "notes": [nasty],
        },
    )
    page = page_of(folder)
    assert not page.all("script")
    assert not [a for _, a in page.elements if any(name.startswith("on") for name in a)]
    shown = re.sub("[\x00\x07]", "\ufffd", nasty).encode("utf-8", "replace").decode()
    assert page.text.count(" ".join(shown.split())) >= 9


# --- runs of every kind ----------------------------------------------------------------------


def test_an_unfinished_run_shows_its_training(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "half", None, some_steps(4))
    with (folder / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # cut off while it was written
    page = page_of(folder)
    assert page.sections == ["training"]
    assert "has not been finished: its last step on record is 4" in page.text
    assert "half" in page.text
    assert not (folder / "README.md").exists()


def test_without_training_there_is_no_section_of_it(tmp_path: Path) -> None:
    page = page_of(a_run(tmp_path / "out", a_record(), None))
    assert page.sections == ["dense-and-pruned", "quality", "reproduce"]


@pytest.mark.parametrize(
    "broken",
    [
        {"perplexity": {"before": {"news": 20.0}}},
        {"perplexity": {"before": {"news": 20.0}, "after": {"news": None}}},
        {"versions": None},
        {"perplexity": None},
        {"teachers": {"count": 2}},
    ],
)
def test_what_is_missing_of_a_record_is_left_out(broken: dict[str, Any], tmp_path: Path) -> None:
    record = {k: v for k, v in (a_record() | broken).items() if v is not None}
    steps = some_steps()
    steps[0] |= {"loss": None}
    del steps[0]["sparsity"]
    page = page_of(a_run(tmp_path / "out", record, steps, speed=SPEED))
    assert {"dense-and-pruned", "training"} <= set(page.sections)


def test_a_record_of_the_python_api_may_know_little(tmp_path: Path) -> None:
    record = a_record()
    for key in ("perplexity", "base_model", "config", "seconds", "bytes_on_disk", "seed"):
        del record[key]
    page = page_of(a_run(tmp_path / "out", record, some_steps()))
    assert page.sections == ["dense-and-pruned", "quality", "training"]
    assert "Perplexity" not in page.text


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize(("count", "layers"), [(1, 1), (2, 1), (POINTS, 2), (3 * POINTS + 1, 80)])
def test_short_and_long_runs_of_small_and_large_models(
    count: int, layers: int, tmp_path: Path
) -> None:
    record = a_record(layers, layers=[layer(4, 2, 64)] * layers)
    page = page_of(a_run(tmp_path / "out", record, some_steps(count)))
    assert len(page.all("svg")) == 2
    assert ("mean of neighbouring steps" in page.text) == (count > POINTS)
    assert (tmp_path / "out/run/report.html").stat().st_size < 400_000


@pytest.mark.usefixtures("drawn")
def test_removed_blocks_width_and_figures_that_are_no_numbers(tmp_path: Path) -> None:
    record = a_record(
        layers=[layer(4, 2, 96), layer(0, 0, 128), layer(2, 1, 0)],
        hidden={"before": 64, "after": 48},
        perplexity={"before": {"a": 2.0, "b": 3.0}, "after": {"a": math.inf, "b": 3.0}},
    )
    steps = some_steps()
    steps = [m | {"lm": 2.0, "penalty": 0.1} for m in steps]
    steps[2] |= {"loss": math.nan, "token_kl": math.inf, "penalty": -0.2, "bad_steps": 1}
    steps[-1] |= {"bad_steps": 1}
    page = page_of(a_run(tmp_path / "out", record, steps))
    assert "width 64 48 −25.0 %" in page.text
    assert "In 1 step the gradients were not finite" in page.text
    assert "a 2.00 inf × inf" in page.text


def test_a_block_that_was_not_there_before_is_not_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = a_record(
        layers=[layer(4, 2, 96), layer(0, 0, 96), layer(2, 1, 96)],
        layers_before=[layer(4, 2, 128), layer(0, 0, 128), layer(4, 2, 128)],
    )
    page = page_of(a_run(tmp_path / "out", record, None))
    words = " ".join(a["aria-label"] for _, a in page.elements if a.get("role") == "img")
    assert "heads: 6 of 8 kept, least in layer 2 (2 of 4)." in words
    assert "0 of 0" not in f"{words} {page.text}"
    shares: list[float] = []
    monkeypatch.setattr(plots, "_cell", lambda *given: shares.append(given[-1]))
    plots.layers_plot(kept_rows(record))
    assert min(shares) > 0  # what is drawn of 0 is a cross


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "it runs 1.25\u202f× as fast"),
        ({"gain": 0.8, "verdict": "slower"}, "it runs 0.80\u202f× as fast"),
        ({"gain": 1.34, "verdict": "noise"}, None),
        ({"low": 0.98, "verdict": "none"}, None),
    ],
)
def test_the_verdict_states_no_speed_that_cannot_be_told(
    changes: dict[str, Any], said: str | None, tmp_path: Path
) -> None:
    sure = SPEED["rows"][0]  # type: ignore[index]
    row = {**sure, **changes}  # type: ignore[dict-item]
    files = read_run(a_run(tmp_path / "one", a_record(), None, speed={**SPEED, "rows": [row]}))
    assert said is None or said in verdict(files)
    assert ("as fast" in verdict(files)) == (said is not None)
    # One that can be told does not make up for one that cannot.
    both = read_run(a_run(tmp_path / "two", a_record(), None, speed={**SPEED, "rows": [sure, row]}))
    assert ("as fast" in verdict(both)) == (said is not None)


def test_the_table_shows_no_gain_that_cannot_be_told(tmp_path: Path) -> None:
    sure = SPEED["rows"][0]  # type: ignore[index]
    verdicts = {"a": "noise", "b": "none"}
    rows = [{**sure, "name": x, "verdict": verdict} for x, verdict in verdicts.items()]  # type: ignore[dict-item]
    page = page_of(a_run(tmp_path / "out", a_record(), None, speed={**SPEED, "rows": rows}))
    assert "a, tokens/s 10.00 12.00 noise, above its bound" in page.text
    assert "b, tokens/s 10.00 12.00 no difference measured" in page.text


def test_the_report_says_what_text_is_judged_and_how_it_copies(tmp_path: Path) -> None:
    copying = {
        **{"before": 64.0, "after": 32.0},
        "protocol": {"measure": "a sequence, repeated", "tokens": 3200, "seed": 77},
    }
    page = page_of(a_run(tmp_path / "in", a_record(copying=copying), None))
    for expected in (
        "perplexity on held-out in-domain text is 1.40",
        "Perplexity on in-domain text, lower is better",
        "and it copies 32.00 % of random tokens from its context (64.00 % before)",
        "tokens right, % 64.00 32.00 × 0.50",
        "a sequence, repeated; 3,200 tokens, seed 77",
    ):
        assert expected in page.text
    page = page_of(a_run(tmp_path / "other", a_record(text=judged("other text")), None))
    assert "Perplexity on other text, lower is better" in page.text
    assert "Copying" not in page.text


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        ({"text": judged("in-domain", "other text")}, "in-domain text"),
        ({"text": judged("other text")}, "other text"),
        ({"text": judged("other text", "not known")}, None),
        (
            {"text": judged("other text"), "recover": {"text": judged("in-domain")}},
            "in-domain text",
        ),
        ({"text": judged("in-domain"), "recover": {"text": judged("other text")}}, "other text"),
        ({"text": judged("in-domain"), "recover": {}}, None),
        ({}, None),
    ],
)
def test_the_kind_of_text_is_that_of_the_last_run_that_judged(
    record: dict[str, Any], kind: str | None
) -> None:
    assert text_kind(record) == kind


def test_a_missed_target_is_said(tmp_path: Path) -> None:
    files = read_run(a_run(tmp_path / "out", a_record(target=0.25), None))
    assert verdict(files).endswith("The target of 25.0\u202f% was missed.")
    rounded = read_run(a_run(tmp_path / "other", a_record(sparsity=0.19999999999999996), None))
    assert "missed" not in verdict(rounded)


def test_a_model_that_was_cut_before_is_not_called_the_dense_one(tmp_path: Path) -> None:
    first = a_record(
        params={"before": 4000, "after": 2000, "blocks_before": 3200, "blocks_after": 1500}
    )
    page = page_of(a_run(tmp_path / "out", a_record(history=[first]), None)).text
    assert "20.0 % of the decoder is gone" in page
    assert "(with the runs before, 62.5 % and 57.5 % of the dense model)" in page
    assert "× what it was before this run" in page
    assert "dense is the model that this run began with" in page


def test_a_change_from_nothing_is_no_ratio(tmp_path: Path) -> None:
    copying = {"before": 0.0, "after": 1.0}
    page = page_of(a_run(tmp_path / "out", a_record(copying=copying), None)).text
    assert "tokens right" in page
    assert "nan" not in page


def test_of_a_vocabulary_no_file_of_settings_is_shown(tmp_path: Path) -> None:
    config = {"model": "owner/model", "data": ["text.txt"], "keep": 290}
    page = page_of(a_run(tmp_path / "out", a_record(config=config), None)).text
    assert "nuteprune vocab owner/model" in page
    assert "--config" not in page


def test_kv_heads_are_shown_where_they_tell_more_than_heads() -> None:
    record = a_record()
    assert [row.name for row in kept_rows(record)] == ["heads", "neurons"]
    record["layers"] = [layer(3, 2, 96)] * 3
    assert [row.name for row in kept_rows(record)] == ["heads", "KV heads", "neurons"]


def test_a_model_without_a_teacher_is_told_of_none(tmp_path: Path) -> None:
    steps = [{k: v for k, v in m.items() if k != "token_kl"} for m in some_steps()]
    untaught = a_run(tmp_path / "c", a_record(teachers={"count": 0, "sparsities": []}), steps)
    assert "its teacher" not in page_of(untaught).text
    assert "its teacher" in page_of(a_run(tmp_path / "a", a_record(), some_steps())).text


def test_of_several_targets_each_has_its_own_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for share, steps in ((0.2, 3), (0.5, 5)):
        a_run(tmp_path / f"sparsity-{share}", a_record(target=share), some_steps(steps))
    assert write_report(tmp_path / "sparsity-0.2").parents[1].name == "sparsity-0.2"
    assert len(read_run(tmp_path / "sparsity-0.2").metrics) == 3
    for folder in (tmp_path, tmp_path / "run"):  # the highest
        assert write_report(folder) == (tmp_path / "sparsity-0.5/run/report.html").resolve()


def test_what_each_stage_took_is_a_table(tmp_path: Path) -> None:
    cost = {"seconds": 90.4, "cpu_seconds": 170.2, "peak_memory_bytes": 2_000_000_000}
    page = page_of(a_run(tmp_path / "out", a_record(stages={"score": cost}), None))
    assert "score 90 s 3 min 2.00 GB" in page.text
    with pytest.raises(UserError, match="stages"):
        page_of(a_run(tmp_path / "bad", a_record(stages={"score": {"seconds": 1}}), None))


# --- files -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("drawn")
def test_the_run_folder_will_do_and_writing_leaves_nothing_else(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "out", a_record(), some_steps())
    page = write_report(folder)
    first = page.read_bytes()
    assert write_report(folder / "run") == page == folder.resolve() / "run/report.html"
    assert page.read_bytes() == first
    assert {path.name for path in (folder / "run").iterdir()} == {
        *("metrics.jsonl", "report.html", "plots"),
    }
    pictures = {path.name: path.read_bytes() for path in (folder / "run/plots").iterdir()}
    assert set(pictures) == {f"{x}.png" for x in ("layers", "loss")}
    assert all(content.startswith(b"\x89PNG\r\n") for content in pictures.values())


def test_a_trainers_own_folder_will_do(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/metrics.jsonl").write_text(json.dumps(some_steps(1)[0]) + "\n")
    assert write_report(tmp_path / "mine") == (tmp_path / "mine/report.html").resolve()


@pytest.mark.parametrize("below", ["", "run"])
def test_an_output_folder_may_be_called_run(below: str, tmp_path: Path) -> None:
    out = a_run(tmp_path / "run", a_record(), some_steps())
    a_run(tmp_path / "sparsity-0.5", a_record(target=0.5), None)  # none of its targets
    assert write_report(out / below) == out / "run" / "report.html"
    assert (files := read_run(out / below)).record is not None
    assert (files.record["target"], len(files.metrics)) == (0.2, 6)


def test_what_cannot_be_read_is_said_in_a_line(tmp_path: Path) -> None:
    def refusal(folder: Path) -> str:
        with pytest.raises(UserError) as error:
            write_report(folder)
        return str(error.value)

    assert "is not a folder" in refusal(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "neither nuteprune.json nor" in refusal(empty)
    assert not list(empty.iterdir())
    broken = a_run(tmp_path / "broken", a_record(), some_steps())
    for line in ("[2]", '{"loss": 1.0}', '{"step": "two"}', '{"step": 2, "loss": "low"}'):
        (broken / "run/metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
        assert "damaged in line 2" in refusal(broken)
    record = a_record()
    del record["params"]
    assert "lacks params" in refusal(a_run(tmp_path / "partial", record, None))
    assert "samples.json cannot be shown" in refusal(
        a_run(tmp_path / "samples", a_record(), None, samples=[{"prompt": "x"}])
    )
    rows = [{**SPEED["rows"][0], "dense": "fast"}]  # type: ignore[index]
    assert "speed.json cannot be shown" in refusal(
        a_run(tmp_path / "speed", a_record(), None, speed={"rows": rows})
    )
    assert "notes is not a list of texts" in refusal(
        a_run(tmp_path / "notes", a_record(), None, speed={**SPEED, "notes": "slow"})
    )
    blocked = a_run(tmp_path / "blocked", a_record(), None)
    (blocked / "run/report.html").mkdir()
    assert "cannot write the report" in refusal(blocked)


def test_plots_go_into_the_place_that_the_card_keeps(tmp_path: Path) -> None:
    record = a_record(base_model=EVIL)
    folder = a_run(tmp_path / "out", record, some_steps())
    card = model_card(record, remote_code=True)
    (folder / "README.md").write_text(card + "\nA sentence of mine.\n")
    for _ in range(2):
        write_report(folder)
        written = (folder / "README.md").read_text()
        images = re.findall(r"!\[.+\]\((.+)\)", written)
        assert sorted(images) == [f"run/plots/{x}.png" for x in ("layers", "loss")]
        assert all((folder / image).is_file() for image in images)
        assert written.endswith("\nA sentence of mine.\n")
    (folder / "README.md").write_text("# My own card\n")
    write_report(folder)
    assert (folder / "README.md").read_text() == "# My own card\n"


# --- the settings ----------------------------------------------------------------------------


def test_the_settings_of_a_run_are_told() -> None:
    config = {"model": "m", "target_sparsity": [0.1, 0.2], "save_steps": 50, "eval_data": None}
    record = {"config": config, "seed": 7}
    assert settings(record) == {"target_sparsity": [0.1, 0.2], "seed": 7}
    assert settings({"config": {"model": "m", "keep": 300}, "seed": 0}) == {"keep": 300}
    assert settings({}) == {}


def test_all_that_a_recovery_was_asked_for_is_told() -> None:
    asked = {x.word for x in declared(RecoverJob).values() if x.option and not x.flag}
    here = {x.word for x in declared(RecoverJob).values() if x.role == CALL}
    assert set(TUNED) == asked - here - {"accumulation", "save_steps", "device", "epochs"}


def test_recoveries_are_told_in_their_order(tmp_path: Path) -> None:
    first = {"data": "a b.txt", "eval_data": None, "steps": 5, "sequences": 9, "seed": 3}
    second = {"data": "demo", "steps": 7, "earlier": first}
    told = list(recoveries({"recover": second}))
    assert told == [{"data": "a b.txt", "steps": 5, "seed": 3}, {"data": "demo", "steps": 7}]
    page = page_of(a_run(tmp_path / "out", a_record(recover=second), None))
    assert "data: a b.txt steps: 5 seed: 3" in page.text


def test_reports_do_not_depend_on_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = a_run(tmp_path / "out", a_record(), some_steps())
    monkeypatch.chdir(folder)
    assert write_report(Path()) == folder.resolve() / "run/report.html"
    assert os.listdir(tmp_path) == ["out"]

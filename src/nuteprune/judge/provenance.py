"""What text made a model what it is, and so which text says nothing about any other text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from nuteprune.data.specs import embedded
from nuteprune.files import at_home
from nuteprune.judge.protocols import TEXTS

IN_DOMAIN: Final = "in-domain"
OTHER_TEXT: Final = "other text"


def calibrated_on(record: Mapping[str, Any]) -> list[str]:
    """Return the DATA specs that a model was calibrated, trained or fine-tuned on, from its record.

    Args:
        record: its nuteprune.json. Earlier prunings and recoveries count too.
    """
    return list(dict.fromkeys(_specs(record)))


def _specs(record: Mapping[str, Any]) -> Iterator[str]:
    for earlier in record.get("history", ()):
        yield from _specs(earlier)
    yield from named(record.get("config", {}).get("data"))
    entry = record.get("recover")
    while entry:
        yield from named(entry.get("data"))
        entry = entry.get("earlier")


def named(data: Any) -> list[str]:
    """Return the specs of a setting: one, several, or none."""
    return [data] if isinstance(data, str) else [str(x) for x in data or ()]


def kind_of(spec: str, calibrated: Iterable[str]) -> str:
    """Return whether a text is `IN_DOMAIN` or `OTHER_TEXT` for a model.

    Args:
        spec: what names the text: a DATA spec, a published text, or `name=FILE`.
        calibrated: the DATA specs that the model was calibrated on.
    """
    return IN_DOMAIN if any(_same_source(spec, x) for x in calibrated) else OTHER_TEXT


def _same_source(spec: str, calibrated: str) -> bool:
    """Return whether two texts may be of one source; where it cannot be told, they are."""
    if spec == calibrated:
        return True
    name, is_copy, path = spec.partition("=")
    if name in TEXTS:
        published = _hub_id(calibrated) in (name, TEXTS[name].repo.lower())
        return published or (bool(is_copy) and _same_source(path, calibrated))
    if (ours := embedded(spec)) or embedded(calibrated):
        return bool({*ours} & {*embedded(calibrated)})
    judged, trained = (at_home(x).absolute().resolve() for x in (spec, calibrated))
    if judged.exists():
        # A path in a record may be of another machine or folder: then its name has to do.
        inside = _within(judged, trained) or _within(trained, judged)
        return inside or (not trained.exists() and judged.name == trained.name)
    return _hub_id(spec) == _hub_id(calibrated)


def _within(path: Path, folder: Path) -> bool:
    return path == folder or folder in path.parents


def _hub_id(spec: str) -> str:
    """Return the dataset that a spec names; its configurations and splits are one source."""
    return spec.partition(":")[0].lower()

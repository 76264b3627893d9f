"""What users ask for: read, told in one way, and refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nuteprune.errors import UserError
from nuteprune.train.asked import KINDS, Asked, all_asked, spelled, value_of
from nuteprune.train.config import NutePruneConfig
from nuteprune.train.settings import PruneSettings


@pytest.mark.parametrize(
    ("kind", "written", "value"),
    [
        ("params", "100M", 100_000_000),
        ("params", "1.5b", 1_500_000_000),
        ("params", 350_000, 350_000),
        ("params", 1e8, 100_000_000),
        ("size", "200MB", 200_000_000),
        ("size", "200 mib", 200 * 1024 * 1024),
        ("size", "0.5GB", 500_000_000),
        ("size", "12345", 12_345),
        ("memory", "4GiB", 4 * 1024**3),
        ("memory", "300kB", 300_000),
        ("params", 1e17, 10**17),
        ("speedup", 1.2, 1.2),  # of a YAML file, or a keyword
        ("speedup", "1.3x", 1.3),
        ("speedup", 0.1 + 0.2 + 1, 1.3),
    ],
)
def test_values_are_read_as_they_are_written(kind: str, written: Any, value: float) -> None:
    at = "@8192" if kind == "memory" else ""
    for given_ in (f"{written}{at}", [f"{written}{at}"], spelled(kind, value) + at):
        assert [x.value for x in all_asked(kind, given_)] == [value]
    assert value_of(kind, written) == value


@given(
    kind=st.sampled_from([kind for kind, of in KINDS.items() if of.whole]),
    value=st.integers(1, 10**15),
)
def test_what_is_told_can_be_asked_for(kind: str, value: int) -> None:
    assert value_of(kind, spelled(kind, value)) == value


def test_values_are_told_in_the_unit_that_suits_them() -> None:
    assert spelled("size", 200_000_000) == "200MB"
    assert spelled("memory", 3 * 2**29) == "1.5GiB"
    assert spelled("params", 134_515_008) == "134515.008K"
    assert Asked("sparsity", 0.2).folder == "sparsity-0.2"
    assert Asked("params", 1e8).folder == "params-100M"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "written",
    [
        "-5M",
        "0",
        "12 apples",
        "M",
        "",
        "nan",
        "inf",
        float("nan"),
        -1,
        True,
        None,
        "1e999M",
        "1e9999999",
        "4G",
    ],
)
def test_what_is_no_value_is_refused_with_an_example(kind: str, written: Any) -> None:
    with pytest.raises(UserError, match=f"^{kind} is .*such as {KINDS[kind].such}") as error:
        value_of(kind, written)
    assert "\n" not in str(error.value)


def test_several_fall(tmp_path: Path) -> None:
    assert [x.value for x in all_asked("size", "200MB,100MB")] == [200_000_000, 100_000_000]
    for given_ in ("100MB,200MB", [1000, "1kB"]):
        with pytest.raises(UserError, match="largest model comes first"):
            all_asked("size", given_)


def config(tmp_path: Path, **settings: Any) -> NutePruneConfig:
    return NutePruneConfig(output_dir=str(tmp_path), use_cpu=True, **settings)


def test_a_config_tells_its_targets_in_one_way(tmp_path: Path) -> None:
    args = config(tmp_path, target_params=["120000K", 1e8])
    assert args.target_params == ["120M", "100M"]
    assert args.asked == (Asked("params", 120_000_000), Asked("params", 100_000_000))
    args = config(tmp_path, target_memory=["2097152KiB", "1048576KiB@4x2048"])
    assert args.target_memory == ["2GiB", "1GiB@4x2048"]
    assert args.asked[0].about == {"context": 2048, "sequences": 4}
    assert config(tmp_path, target_memory=args.target_memory).asked == args.asked
    assert config(tmp_path, target_memory="1GiB@1x64").target_memory == "1GiB@64"
    assert config(tmp_path, target_sparsity="0.2,0.3").asked == (
        Asked("sparsity", 0.2),
        Asked("sparsity", 0.3),
    )


@pytest.mark.parametrize(
    ("written", "told", "faster", "at"),
    [
        ("1.5", "1.5", "decode", "1x256+32"),
        (1.5, "1.5", "decode", "1x256+32"),
        ("1.5@decode:1x256+32", "1.5", "decode", "1x256+32"),
        ("1.5x@prefill", "1.5@prefill", "prefill", "1x256+32"),
        ("1.5@2x64+8", "1.5@2x64+8", "decode", "2x64+8"),
        ("1.5@both:2x64+8", "1.5@both:2x64+8", "both", "2x64+8"),
    ],
)
def test_a_speedup_tells_what_is_to_be_faster_and_when(
    written: Any, told: str, faster: str, at: str
) -> None:
    args = PruneSettings(target_speedup=written)
    assert args.target_speedup == told
    assert args.asked == (Asked("speedup", 1.5, {"for": faster, "at": at}),)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_params": "1M", "target_size": "1MB"}, "--params and --size both say how much"),
        ({"target_memory": "1MB@4", "shape": {"neurons": 8}}, "--memory and --shape"),
        ({"target_sparsity": 0.3, "target_params": "1M"}, "--sparsity and --params both say"),
        ({"target_sparsity": [0.1, 0.3], "shape": {"neurons": 8}}, "--sparsity and --shape"),
        ({"target_memory": "1MB"}, "say for how many tokens, such as 4GiB@8192"),
        ({"target_memory": "1MB@0"}, "@0 says for no number of tokens"),
        ({"target_memory": "1MB@0x1"}, "@0x1 says for no number of tokens"),
        ({"target_memory": ["2MB@4", "1MB@4"]}, "memory is '2MB@4'"),
        ({"target_params": "1M@4"}, "params is '1M@4'"),
    ],
)
def test_settings_that_contradict_are_refused(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        config(tmp_path, **settings)

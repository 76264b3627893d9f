"""What quantizing and pruning cost: the page's figures are those of the committed results."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, quants

from tests.scripts import script

quantized, tables = map(script, ("quantized", "quantized_table"))
RESULT: dict[str, Any] = json.loads(tables.RESULTS.read_text(encoding="utf-8"))
ROWS = {(x["subject"], x["model"], x["type"]): x for x in RESULT["rows"]}


def test_the_page_says_what_follows_from_the_results() -> None:
    page = tables.PAGE.read_text(encoding="utf-8")
    text = " ".join(page[page.index("## Should I prune") : page.index("![Perplexity")].split())
    small, gemma = "smollm2-135m", "gemma3-270m"
    ratios = {key: tables.times_dense(row, RESULT)[0] for key, row in ROWS.items()}
    sizes = {key: f"{row['bytes'] / 1e6:.0f} MB" for key, row in ROWS.items()}
    whole, d8, d4 = ((small, tables.DENSE, kind) for kind in (tables.PLAIN, "q8_0", "q4_k_m"))
    assert f"Q8_0 makes {sizes[d8]} of SmolLM2-135M's {sizes[whole]} at {ratios[d8]:.3f} ×" in text
    assert f"Q4_K_M makes {sizes[d4]} at {ratios[d4]:.3f} ×" in text
    fewer, fewer8 = ((gemma, "131,072 tokens", kind) for kind in (tables.PLAIN, "q8_0"))
    all_of_it = sizes[gemma, tables.DENSE, tables.PLAIN].removesuffix(" MB")
    assert f"{sizes[fewer]} of {all_of_it}, at {ratios[fewer]:.3f} ×" in text
    assert f"and {sizes[fewer8]} in Q8_0" in text
    for subject, model, words in (
        (small, "10 %, 160 steps", "leaves {} at {:.3f} ×"),
        (small, "20 %, 160 steps", "20 % {} at {:.3f} ×"),
        (gemma, "20 %, 80 steps", "20 % of Gemma's {} at {:.3f} ×"),
    ):
        key = (subject, model, tables.PLAIN)
        assert words.format(sizes[key], ratios[key]) in text
    for model, words in (
        ("20 %, 160 steps", "cut {:.1f} % and Q4_K_M {:.1f} % of its own F16"),
        ("50 %, 160 steps", "At 50 % that is {:.1f} % and {:.1f} %"),
        (tables.DENSE, "(dense: {:.1f} % and {:.1f} %)"),
    ):
        own = ratios[small, model, tables.PLAIN]
        costs = (100 * (ratios[small, model, x] / own - 1) for x in ("q8_0", "q4_k_m"))
        assert words.format(*costs) in text
    for subject, model, kind, what, words in (
        (small, "50 %, 160 steps", "f16", "prefill", "50 % of SmolLM2 {:.1f} times"),
        (small, tables.DENSE, "q4_k_m", "prefill", "slower than F16 ({:.1f} and"),
        (small, tables.DENSE, "q5_k_m", "prefill", "and {:.1f})"),
        (small, tables.DENSE, "q8_0", "decode", "Q8_0 writes {:.1f} times"),
        (small, "20 %, 160 steps", "q8_0", "decode", "cut of SmolLM2 in Q8_0 {:.1f} times"),
        (gemma, "131,072 tokens", "f16", "decode", "131,072 tokens alone gain {:.1f},"),
        (gemma, "131,072 tokens", "q8_0", "decode", "with Q8_0 {:.1f}"),
    ):
        assert words.format(tables.speed(ROWS[subject, model, kind], RESULT, what)) in text
    loops = [x["looping"] for x in RESULT["rows"] if x["subject"] == small]
    assert f"at most {max(loops)} loop" in page
    assert ROWS[whole]["looping"] == 0


def test_no_row_is_there_twice_and_each_model_has_its_plain_file() -> None:
    assert len(ROWS) == len(RESULT["rows"])
    for subject, model, _ in ROWS:
        assert (subject, model, tables.PLAIN) in ROWS
        assert (subject, tables.DENSE, tables.PLAIN) in ROWS


@pytest.mark.parametrize("key", ROWS, ids="-".join)
def test_what_a_file_holds(key: tuple[str, str, str]) -> None:
    row, plain = ROWS[key], ROWS[(*key[:2], tables.PLAIN)]
    count = sum(row["matrices"].values())
    assert count == sum(plain["matrices"].values())
    assert row["parameters"] == plain["parameters"]
    whole = sum(n for name, n in row["matrices"].items() if name.endswith("_K"))
    assert whole <= count - row["torn"]  # a torn row is in no K-quant
    # All but vectors and the tokenizer is in the matrices.
    size = row["parameters"] * row["bits_per_weight"] / 8
    assert size < row["bytes"] < size + 12e6
    if key[2] != tables.PLAIN:
        assert row["bytes"] < plain["bytes"]
    for domain, nats in row["nats"].items():
        assert len(nats) == len(plain["nats"][domain]) == RESULT["settings"]["text"]["blocks"]


def test_perplexity_is_divided_domain_by_domain() -> None:
    base = {"subject": "s", "model": tables.DENSE, "type": tables.PLAIN}
    plain = base | {"nats": {"a": [1.0, 3.0], "b": [2.0, 2.0]}}
    row = base | {"type": "q4_0", "nats": {"a": [1.5, 3.7], "b": [2.1, 2.3]}}
    ratio, error = tables.times_dense(row, {"rows": [plain, row]})
    # Domain a loses 0.6 nats, b 0.2: perplexities grow by e^0.6 and e^0.2.
    assert ratio == pytest.approx(math.sqrt(math.exp(0.6) * math.exp(0.2)))
    # The means over two blocks are known to 0.1 and 0.1, so half of their sum to 0.1 x sqrt(2) / 2.
    assert error == pytest.approx(ratio * 0.1 / math.sqrt(2))
    assert tables.times_dense(plain, {"rows": [row, plain]}) == (1, 0)


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    tables.draw(RESULT, tmp_path / "drawn.png")
    assert 10_000 < (tmp_path / "drawn.png").stat().st_size < 100_000


def test_types_and_torn_rows_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_tensor("norm", np.zeros(96, np.float32))
    writer.add_tensor("whole", np.zeros((4, 512), np.float16))
    packed = quants.quantize(np.zeros((4, 96), np.float32), GGMLQuantizationType.Q8_0)
    writer.add_tensor("torn", packed, raw_dtype=GGMLQuantizationType.Q8_0)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file):
        write()
    writer.write_tensors_to_file()
    writer.close()
    found = quantized.stored(path)
    assert found["bytes"] == path.stat().st_size
    assert found["tensors"] == {"F32": 1, "F16": 1, "Q8_0": 1}
    assert found["matrices"] == {"F16": 1, "Q8_0": 1}
    assert found["torn"] == 1
    # 2,048 weights of 16 bits, and 384 of 8 with a scale of 16 bits for each 32.
    assert found["bits_per_weight"] == round((2048 * 16 + 384 * 8.5) / 2432, 4)

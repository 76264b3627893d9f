"""The model card: what the hub reads, what a person reads, and other people's words in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from nuteprune.export import card
from nuteprune.export.card import inherited_licence, model_card, with_plots

BESIDE: dict[str, Any] = {
    "answers": {
        "looping": {"before": 3.125, "after": 17.1875},
        **{key: {"before": 1.0, "after": 2.0} for key in ("repeated", "length", "nats")},
        **{"kl": 0.45, "agreement": 80.0},
        "protocol": {"prompts": "questions", "answers": 64, "most_tokens": 32, "tokens": 900}
        | {"measures": {"kl": "how far"}},
    },
    "context": {
        "256": {
            **{"tokens": 100, "needing": 12, "lost": 1.25, "lost_elsewhere": None, "kept": 50.0},
            "gain": {"before": 3.0, "after": 1.5},
            "protocol": {"blocks": 3, "measures": {"kept": "how much"}},
        },
    },
}


def a_record(**changes: Any) -> dict[str, Any]:
    return {
        "sparsity": 0.25,
        "total_sparsity": 0.15,
        "params": {"before": 2000, "after": 1700, "blocks_before": 1200, "blocks_after": 900},
        "layers": [
            {"heads": 4, "kv_heads": 2, "neurons": 96},
            {"heads": 4, "kv_heads": 2, "neurons": 64},
        ],
        "layers_before": [{"heads": 4, "kv_heads": 2, "neurons": 128}] * 2,
        "hidden": {"before": 64, "after": 64},
        "perplexity": {
            "before": {"news": 20.0},
            "after": {"news": 25.0},
            "protocol": {"measure": "how"},
        },
        "base_model": "owner/model",
        "license": "apache-2.0",
        "config": {"data": "owner/text:en"},
        "versions": {"nuteprune": "1.2.3"},
        **changes,
    }


def test_the_hub_reads_base_model_licence_and_metrics() -> None:
    data = ModelCard(model_card(a_record(), remote_code=False)).data
    assert (data.base_model, data.license) == ("owner/model", "apache-2.0")
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert data.model_name == "model-pruned-25"
    assert data.eval_results is not None
    [result] = data.eval_results
    assert (result.metric_type, result.metric_value) == ("perplexity", 25.0)
    assert (result.task_type, result.dataset_type) == ("text-generation", "news")


def test_a_person_reads_what_changed_and_how_to_load_it() -> None:
    text = model_card(a_record(), remote_code=True)
    for expected in (
        "# model, 25.0% of its decoder removed",
        "| parameters | 2,000 | 1,700 | -15.0% |",
        "| perplexity, news | 20.00 | 25.00 | × 1.25 |",
        "2, with 4 of 4 query heads, 2 of 2 KV heads, 64 to 96 of 128 neurons; width 64 of 64.",
        "from_pretrained(folder, trust_remote_code=True)",
        "modeling_pruned.py",
        "Text: owner/text:en.",
    ):
        assert expected in text
    assert "trust_remote_code" not in model_card(a_record(), remote_code=False)


def test_the_card_says_what_text_is_judged_and_how_it_copies() -> None:
    assert "Perplexity, on held-out text of what it was calibrated on (in-domain): how." in (
        model_card(a_record(), remote_code=False)
    )
    config = {"data": "owner/text:en", "eval_data": "/home/me/other.txt"}
    copying = {
        **{"before": 64.0, "after": 31.25},
        "protocol": {"measure": "a sequence, repeated", "tokens": 3200},
    }
    text = model_card(a_record(config=config, copying=copying), remote_code=False)
    assert "Perplexity, on held-out text of other.txt: how." in text
    recover = {"data": "a", "steps": 9, "eval_data": "/home/me/other.txt"}
    recovered = model_card(a_record(recover=recover), remote_code=False)
    assert "Perplexity, on held-out text of other.txt: how." in recovered
    assert "| copying, tokens right | 64.0 % | 31.2 % | × 0.49 |" in text
    assert "Copying from context: a sequence, repeated; 3,200 tokens." in text
    nothing = {"before": 0.0, "after": 0.0, "protocol": copying["protocol"]}
    assert "| 0.0 % | 0.0 % |  |" in model_card(a_record(copying=nothing), remote_code=False)


def test_the_card_has_answers_and_context_with_how_they_are_judged() -> None:
    text = model_card(a_record(**BESIDE), remote_code=False)
    for expected in (
        "| answers, looping, % | 3.1 | 17.2 | |",
        "| answers, KL divergence, nats per token |  | 0.450 | |",
        "| context, nats lost, 12 tokens that need it |  | 1.25 | |",
        "| context, nats lost, the other 88 |  |  | |",
        "| context, nats gained by context | 3.00 | 1.50 | |",
        "to 64 prompts (questions), of 32 tokens at most; the dense model's have 900.",
        "\n- kl: how far.\n",
        "\n- Context: the last tokens of 3 blocks of 256.\n",
    ):
        assert expected in text
    assert "context" not in model_card(a_record(), remote_code=False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teachers": {"count": 0}}, "structured pruning with distillation from the dense model"),
        ({"teachers": {"count": 7}}, "structured pruning with distillation from numerous teachers"),
        ({"config": {"max_steps": 0}}, "structured pruning\n"),
        ({"config": {"teacher": "none"}}, "structured pruning\n"),
        ({"vocab": {"after": 9}, "config": {"keep": 9}}, "a vocabulary of 9 tokens\n"),
        (
            {"history": [a_record(teachers={"count": 7})], "config": {"max_steps": 0}},
            "structured pruning with distillation from numerous teachers, in 2 runs",
        ),
    ],
)
def test_who_taught_it(changes: dict[str, Any], words: str) -> None:
    assert words in model_card(a_record(**changes), remote_code=False)


def test_a_smaller_vocabulary_alone_is_told_without_what_pruning_is() -> None:
    counts = {"before": 2000, "after": 1700, "blocks_before": 1200, "blocks_after": 1200}
    nothing = {"before": {}, "after": {}}
    vocab = {"sparsity": 0.0, "vocab": {"after": 9}, "perplexity": nothing, "params": counts}
    asked = {"kind": "vocab", "value": 9}
    text = model_card(a_record(**vocab, asked=asked), remote_code=False)
    assert "owner/model with a vocabulary of 9 tokens, made with `nuteprune` 1.2.3." in text
    assert "| | before | after | |" in text
    assert "| parameters | 2,000 | 1,700 | -15.0% |" in text
    assert "may add to the latter, and has not been judged." in text
    for foreign in ("2402.09773", "in decoder layers", "+0.0%", "pruned |", "figures above"):
        assert foreign not in text
    pruned_before = model_card(a_record(**vocab, history=[a_record()]), remote_code=False)
    assert "2402.09773" in pruned_before
    assert "judged by the figures above alone." in model_card(a_record(), remote_code=False)


def test_a_model_pruned_twice_is_told_from_the_intact_one() -> None:
    counts = {"before": 4000, "after": 2000, "blocks_before": 3200, "blocks_after": 1200}
    active = {"active_before": 1000, "active_after": 800}
    first, again = a_record(params=counts | active), a_record()
    last = again["params"] | {"active_before": 800, "active_after": 600}
    text = model_card(again | {"params": last, "history": [first]}, remote_code=False)
    assert "| active per token | 1,000 | 600 | -40.0% |" in text
    text = model_card(a_record(history=[a_record(params=counts)]), remote_code=False)
    assert "# model, 71.9% of its decoder removed" in text  # 900 of 3200 are left
    assert "in 2 runs one after the other" in text
    assert "| parameters | 4,000 | 1,700 | -57.5% |" in text
    assert "| perplexity of the last run, news | 20.00" in text


def test_a_fine_tuning_between_two_prunings_is_told_of() -> None:
    tuned = a_record(recover={"steps": 5, "data": "demo"})
    assert "Fine-tuned afterwards: 5 steps on demo" in model_card(tuned, remote_code=False)
    again = model_card(a_record(history=[tuned]), remote_code=False)
    assert "Fine-tuned between: 5 steps on demo" in again


def test_perplexities_of_one_model_alone_are_not_compared() -> None:
    for perplexity in (
        {"before": {"a": 2.0}, "after": {"b": 3.0}},
        {"before": {"a": 2.0}},
        {"before": {"a": 2.0}, "after": {"a": None}},
    ):
        assert "| perplexity" not in model_card(a_record(perplexity=perplexity), remote_code=False)


def test_a_card_of_little() -> None:
    record = a_record()
    for key in ("perplexity", "base_model", "license", "config"):
        del record[key]
    text = model_card(record, remote_code=False)
    data = ModelCard(text).data
    assert (data.base_model, data.license, data.eval_results) == (None, None, None)
    assert "the dense model" in text
    assert "None" not in text


def test_paths_of_this_machine_stay_here(tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    changes = {"base_model": str(tmp_path / "secret/model"), "config": {"data": str(tmp_path)}}
    text = model_card(a_record(**changes), remote_code=False)
    assert str(tmp_path.parent) not in text
    assert ModelCard(text).data.base_model is None


@pytest.mark.parametrize(
    "nasty", ["<script>alert(1)</script>", "a|b\n# c", "![x](y)", "*a* `b` [c](d)", "q\"'{x}\\"]
)
def test_words_of_others_stay_words(nasty: str) -> None:
    perplexity = {"before": {nasty: 2.0}, "after": {nasty: 3.0}, "protocol": {"measure": "how"}}
    text = model_card(
        a_record(base_model=nasty, perplexity=perplexity, config={"data": nasty}, license=nasty),
        remote_code=False,
    )
    loaded = ModelCard(text)
    assert loaded.data.license == nasty
    assert loaded.data.eval_results is not None
    assert loaded.data.eval_results[0].dataset_type == nasty
    body = loaded.text
    assert "<script" not in body
    assert "![x]" not in body
    assert "`b`" not in body
    assert [line for line in body.splitlines() if line.startswith("# ")] == [
        line for line in body.splitlines() if "of its decoder removed" in line
    ]
    rows = [line for line in body.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {5}


def test_plots_have_one_place() -> None:
    text = model_card(a_record(), remote_code=False)
    once = with_plots(text, {"a line [1]": "run/plots/a.png"})
    assert "![a line \\[1\\]](run/plots/a.png)" in once
    twice = with_plots(once, {"another": "run/plots/b.png"})
    assert "a.png" not in twice
    assert with_plots(twice, {"a line [1]": "run/plots/a.png"}) == once
    assert ModelCard(once).data.to_dict() == ModelCard(text).data.to_dict()
    assert with_plots("# another card", {"a": "b"}) == "# another card"


@pytest.mark.parametrize("name", ["./gone", "../gone"])
def test_a_relative_path_is_no_hub_id(name: str) -> None:
    read = ModelCard(model_card(a_record(base_model=name), remote_code=False))
    assert read.data.base_model is None


def test_the_licence_is_that_of_the_base_models_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Model\n")
    assert inherited_licence(str(tmp_path)) == {"license": "mit"}
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert inherited_licence(str(tmp_path)) == {"license": None}
    (tmp_path / "README.md").write_text("# No metadata\n")
    assert inherited_licence(str(tmp_path)) == {"license": None}

    said = {"license": "other", "license_name": "research", "license_link": "https://x.org/l"}
    text = "".join(f"{key}: {value}\n" for key, value in said.items())
    (tmp_path / "README.md").write_text(f"---\n{text}---\n# Model\n")
    assert inherited_licence(str(tmp_path)) == said
    read = ModelCard(model_card(a_record(**said), remote_code=False))
    assert said.items() <= read.data.to_dict().items()
    assert "Licence: research (https://x.org/l), that of the base model." in read.text

    asked = []

    def load(source: object, **_: object) -> ModelCard:
        asked.append(source)
        return ModelCard("---\nlicense: gemma\n---\n")

    monkeypatch.setattr(card.ModelCard, "load", load)
    assert inherited_licence("owner/model") == {"license": "gemma"}
    assert inherited_licence(None) == {"license": None}
    assert inherited_licence("demo") == {"license": None}
    assert inherited_licence(str(tmp_path / "nowhere")) == {"license": None}
    assert asked == ["owner/model"]


def test_without_the_hub_the_licence_is_unknown() -> None:
    assert inherited_licence("owner/there-is-no-such-model") == {"license": None}


def test_layers_that_never_had_a_block_did_not_lose_it() -> None:
    whole, mixer = ({"heads": n, "kv_heads": n // 4, "neurons": 128} for n in (8, 0))
    after = [whole | {"neurons": 96}, mixer | {"neurons": 64}]
    text = model_card(a_record(layers_before=[whole, mixer], layers=after), remote_code=False)
    assert "2, with 8 of 8 query heads, 2 of 2 KV heads, 64 to 96 of 128 neurons;" in text


def test_layers_that_are_alike_are_not_said_to_differ() -> None:
    alike = [{"heads": 3, "kv_heads": 3, "neurons": 100}] * 2
    text = model_card(a_record(layers=alike, shapes="uniform"), remote_code=True)
    assert "The stock class cannot state its sizes, so a short modeling file travels" in text
    assert "differ" not in text


def test_the_hub_is_told_of_images() -> None:
    wrapped = a_record(wrapper="Gemma3ForConditionalGeneration")
    data = ModelCard(model_card(wrapped, remote_code=False)).data
    assert data.pipeline_tag == "image-text-to-text"


def test_shares_of_the_text_are_those_on_record() -> None:
    config = {"data": ["owner/a", "self"], "shares": [3.0, 1.0]}
    text = model_card(a_record(config=config), remote_code=False)
    assert "Text: 75% owner/a, 25% text of the dense model's own." in text
    for more in ({}, {"shares": [1.0]}):  # none, or by hand
        config = {"data": ["owner/a", "owner/b"], **more}
        assert "Text: owner/a, owner/b." in model_card(a_record(config=config), remote_code=False)

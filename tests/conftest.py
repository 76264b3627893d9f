"""Shared set-up: offline, two threads, one small tokenizer, one tiny model per family."""

from __future__ import annotations

import copy
import gc
import json
import multiprocessing.process
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

from tests.families import HYBRIDS, MIXTURES, each

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# Read when the libraries are imported, so set here first; commands that tests start inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("OMP_NUM_THREADS", "2")  # sums come out the same on any machine's core count

Run = Callable[..., tuple[int, str, str]]
"""Calls the command line; see `run`."""
QUICK = 0.05
"""Seconds of a test without a marker, about."""
STARTS_PYTHON = ("slow", "network", "clients", "hard")
"""Markers of tests that may start interpreters, which import for seconds."""

# A busy machine has no deadlines. Of make check, make test and make test-hard.
settings.register_profile("quick", max_examples=20, deadline=None)
settings.register_profile("suite", max_examples=50, deadline=None)
settings.register_profile("hard", max_examples=100, deadline=None)
settings.load_profile("suite")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Import the tests; bitsandbytes would load torch's compiler meanwhile, for a second.

    What is imported is no garbage: looking for some in it would take a third of the time.
    """
    gc.disable()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        result = yield
    gc.freeze()
    gc.enable()
    return result


def _seconds_of(mark: pytest.Mark) -> float:
    return float(mark.args[0] if mark.args else mark.kwargs.get("seconds", 1))


@pytest.hookimpl(trylast=True)  # of what -m has left
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first: what is quick fills up the end of a run."""
    seconds: dict[Path, float] = defaultdict(float)
    for item in items:
        mark = item.get_closest_marker("hard") or item.get_closest_marker("slow")
        seconds[item.path] += QUICK if mark is None else _seconds_of(mark)
    items.sort(key=lambda item: -seconds[item.path])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Let a test that has none of the markers, or a fixture of it, fail where it starts Python."""

    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("this starts a process of Python, so mark the test `slow`")

    popen = subprocess.Popen.__init__

    def start(self: Any, args: Any, *rest: Any, **named: Any) -> None:
        words = [args] if isinstance(args, str | bytes | os.PathLike) else args
        if sys.executable in map(str, words):
            refuse()
        popen(self, args, *rest, **named)

    with pytest.MonkeyPatch.context() as patch:
        if not any(map(item.get_closest_marker, STARTS_PYTHON)):
            patch.setattr(subprocess.Popen, "__init__", start)
            patch.setattr(multiprocessing.process.BaseProcess, "start", refuse)
        return (yield)


@pytest.fixture(scope="session", autouse=True)
def disks_are_not_waited_for() -> Generator[None]:
    """Leave writing to the system: waiting is a tenth of the time.

    tests/hard ends the machine by itself: of files that were not synced it loses a half.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="module", autouse=True)
def libraries_are_no_garbage() -> None:
    """Keep what is there at the start of a file out of later collections of garbage.

    Trainer collects at each end of a training, and looks through all of the libraries for it.
    """
    gc.collect()
    gc.freeze()


def json_line(stdout: str) -> dict[str, Any]:
    """What a command says in JSON: the last line that it prints."""
    return json.loads(stdout.splitlines()[-1])


def json_of(run: Run, *words: Any) -> dict[str, Any]:
    """What a command says in JSON that is called without failing."""
    code, stdout, stderr = run(*words, "--json")
    assert code == 0, stderr
    return json_line(stdout)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Calls the command line; returns exit code, stdout and stderr."""
    from nuteprune.cli.app import main

    def call(*args: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["nuteprune", *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return call


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most 300 tokens: any text goes through it and back."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        ["the student learns from a teacher that is a little less pruned than the student"],
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<pad>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="session")
def tiny_chat_tokenizer(tiny_tokenizer) -> PreTrainedTokenizerFast:
    """`tiny_tokenizer` with a chat template."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}a{% endif %}"
    )
    return tokenizer


@pytest.fixture(scope="session")
def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE tokenizer in SentencePiece's manner, as Llama 2 and Gemma have, of 300 tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    text = "the student learns from a teacher that is a little less pruned than the student"
    learner = Tokenizer(models.BPE())
    learner.train_from_iterator(
        ["▁" + text.replace(" ", "▁")], trainers.BpeTrainer(vocab_size=60, show_progress=False)
    )
    learned = json.loads(learner.to_str())["model"]
    special = ["<unk>", "<s>", "</s>"]
    tokens = special + [f"<0x{byte:02X}>" for byte in range(256)]
    tokens += [x for x in learned["vocab"] if x not in tokens][: 300 - len(tokens)]
    merges = [tuple(x) for x in learned["merges"] if "".join(x) in tokens]
    tokenizer = Tokenizer(
        models.BPE(
            {x: i for i, x in enumerate(tokens)},
            merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def cache_of(model: PreTrainedModel, ids_BT: Any) -> Any:
    """Return the KV cache that a model makes for itself of a prompt."""
    import torch

    with torch.no_grad():
        output = model(input_ids=ids_BT, use_cache=True)
    return output["cache" if "cache" in output else "past_key_values"]  # named by version


DELTA_NET: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 8,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "mrope_section": [1, 1, 0],
    },
}

# What sets a family's tiny model apart; without it each would have the sizes in `tiny_model` alone.
TINY: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama_mha": {"model_type": "llama", "num_key_value_heads": 4, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 6},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "phi3": {"rope_parameters": {"rope_theta": 5e3, "partial_rotary_factor": 0.5}},
    "gemma2": {"sliding_window": 6, "final_logit_softcapping": 5.0},
    "gemma3_text": {
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "granite": {
        "attention_bias": True,
        "mlp_bias": True,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 4.0,
    },
    "gpt_neox": {},
    "opt": {"word_embed_proj_dim": 32, "dropout": 0.0},
    "smollm3": {"no_rope_layer_interval": 2},
    "seed_oss": {"attention_out_bias": True, "attention_dropout": 0.0, "residual_dropout": 0.0},
    "ernie4_5": {"use_bias": True},
    "ministral": {"sliding_window": 6},
    "ministral3": {},
    "hunyuan_v1_dense": {},
    "arcee": {"mlp_bias": True},
    "apertus": {},
    "gemma": {},
    "vaultgemma": {"sliding_window": 6, "final_logit_softcapping": 5.0},
    "glm": {"rope_parameters": {"rope_theta": 5e3, "partial_rotary_factor": 0.5}},
    "glm4": {},
    "exaone4": {"sliding_window": 6, "sliding_window_pattern": 2},
    "olmo2": {"attention_bias": True},
    "olmo3": {
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "helium": {},
    "starcoder2": {},
    "nemotron": {},
    "olmo": {"clip_qkv": 1.0},
    "stablelm": {"use_qkv_bias": True},
    "phi": {},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, "sliding_window": 6},
    "mixtral": {},
    "olmoe": {"clip_qkv": 1.0, "num_experts_per_tok": 2},
    "qwen3_moe": {"mlp_only_layers": [1], "norm_topk_prob": True, "num_experts_per_tok": 3},
    "qwen2_moe": {
        "mlp_only_layers": [0],
        "num_experts_per_tok": 2,
        "shared_expert_intermediate_size": 40,
    },
    "glm4_moe": {
        "num_experts_per_tok": 2,
        "n_shared_experts": 2,
        "use_qk_norm": True,
        "routed_scaling_factor": 1.5,
    },
    "granitemoe": {"embedding_multiplier": 2.0, "logits_scaling": 4.0, "residual_multiplier": 0.5},
    "gpt_oss": {
        "num_experts_per_tok": 2,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "head_dim": 4,
        "q_lora_rank": 20,
        "kv_lora_rank": 12,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
    },
    "llama4_text": {
        "moe_layers": [0, 2],
        "no_rope_layers": [1, 0, 1],
        "attention_chunk_size": 6,
        "floor_scale": 4,
        "attention_bias": True,
    },
    "qwen3_5_text": DELTA_NET,
    "qwen3_next": DELTA_NET | {"mlp_only_layers": [2], "num_experts_per_tok": 2},
    "qwen3_5_moe_text": DELTA_NET | {"num_experts_per_tok": 3},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "num_local_experts": 0,
        "mamba_n_heads": 8,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
        "residual_multiplier": 0.5,
        "logits_scaling": 4.0,
    },
    "falcon_h1": {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
        "mamba_rms_norm": True,
        "ssm_multipliers": [0.5, 0.7, 0.9, 1.1, 1.3],
        "ssm_out_multiplier": 0.7,
        "attention_out_multiplier": 1.5,
        "key_multiplier": 0.8,
        "lm_head_multiplier": 0.5,
    },
}


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., PreTrainedModel]:
    """Makes a new model: `tiny_model(name, **config)`, name being a model type or `llama_mha`.

    Hidden 32, 3 layers, 4 heads of 8 (2 KV heads where the family groups), 48 neurons, 96 tokens;
    mixtures have 6 experts of 24 neurons;
    all parameters random, norms and biases too, so that each of them matters to the output.
    """
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from nuteprune.model.families import FAMILIES

    def make(name: str, **overrides: Any) -> PreTrainedModel:
        settings = {"model_type": name} | TINY[name] | overrides
        family = FAMILIES[settings.pop("model_type")]
        names = family.config_names
        counts = {"hidden": 32, "heads": 4, "neurons": 48, "experts": 6, "expert_neurons": 24}
        sizes = {names[word]: count for word, count in counts.items() if word in names}
        grouped = {"num_key_value_heads": 2, "head_dim": 8} if "kv_heads" in names else {}
        common = {"vocab_size": 96, "num_hidden_layers": 3, "max_position_embeddings": 64}
        tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        config = CONFIG_MAPPING[family.model_type](
            **sizes | grouped | common | tokens | {"tie_word_embeddings": False} | settings
        )
        model = AutoModelForCausalLM.from_config(config).eval()
        random = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                is_scale = "norm" in path and path.endswith("weight") and family.norm != "rms_1p"
                noise = 0.25 * torch.randn(parameter.shape, generator=random)
                parameter.copy_(is_scale + noise)
            for path, buffer in model.named_buffers():
                if path.endswith("e_score_correction_bias"):
                    buffer.copy_(0.25 * torch.randn(buffer.shape, generator=random))
        return model

    return make


@pytest.fixture(params=each(name for name in TINY if name not in MIXTURES))
def tiny_name(request: pytest.FixtureRequest) -> str:
    """Each name of a dense model that `tiny_model` takes in turn."""
    return request.param


@pytest.fixture(params=each(x for x in TINY if x not in (*HYBRIDS, *MIXTURES)))
def plain_name(request: pytest.FixtureRequest) -> str:
    """Those of them whose layers all are attention and an MLP."""
    return request.param


@pytest.fixture
def tiny_inputs(tiny_model, tiny_tokenizer, tmp_path: Path) -> tuple[Path, Path]:
    """A tiny Llama with its tokenizer, and a file of text: what the command line takes."""
    import torch

    model, text = tmp_path / "model", tmp_path / "text.jsonl"
    tiny_model("llama", vocab_size=512).save_pretrained(model)
    tiny_tokenizer.save_pretrained(model)
    random = torch.Generator().manual_seed(0)
    letters = [chr(97 + int(i)) for i in torch.randint(0, 26, (6000,), generator=random)]
    documents = ["".join(letters[i : i + 60]) for i in range(0, 6000, 60)]
    text.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    return model, text


@pytest.fixture(scope="session")
def prune_at_random() -> Callable[..., PreTrainedModel]:
    """`prune_at_random(model, kinds, shapes, share=0.5)`: without that share of what may go.

    Counts left are multiples of 8; the model that is passed in is used up.
    """
    import torch

    from nuteprune.export.checkpoint import assemble
    from nuteprune.model.anatomy import Anatomy
    from nuteprune.train.config import NutePruneConfig
    from nuteprune.train.constraints import make_allocator

    def prune(
        model: PreTrainedModel, kinds: Iterable[str], shapes: str, share: float = 0.5
    ) -> PreTrainedModel:
        anatomy = Anatomy(model)
        settings = {"gates": ",".join(kinds), "shapes": shapes}
        multiples = {"neuron_multiple": 8, "hidden_multiple": 8}
        allocator = make_allocator(
            anatomy, NutePruneConfig(output_dir="unused", **settings, **multiples)
        )
        random = torch.Generator().manual_seed(0)
        units = {k: allocator.layout.units(k) for k in allocator.constraints.kinds}
        scores = {k: torch.rand(n, generator=random) for k, n in units.items()}
        shape = allocator.shape(scores, share * allocator.maximum())
        return assemble(anatomy, allocator.masks(shape, scores))[0]

    return prune

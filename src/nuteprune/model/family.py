"""What a family's entry says: where the parts of a model type are, and what they mean.

A *projection* is a linear module of a decoder layer. Its `rows` (outputs) and `columns` (inputs)
are named by axis, so that counting and slicing need no knowledge of any model type:

    hidden   the residual stream           q        query heads x head_dim
    neurons  the MLP's inner width         kv       KV heads x head_dim
    qkv      per head: query, key, value (head_dim each), interleaved
    expert_neurons  the inner width of each routed expert
    qgate    per head: query and its gate (head_dim each), interleaved
    mixer    what is inside of a recurrent or convolutional mixer, which no gate cuts
    latent   what is inside of latent attention: shared by heads, or theirs, which no gate cuts

Only the entries know a model type; nobody but `anatomy.py` follows these paths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

PREFIX = "pruned_"
"""Prefix of the model type in a config with counts per layer."""

BLOCK_KINDS = ("attn_block", "mlp_block")
"""Kinds of gates on whole blocks."""
GATE_KINDS = ("heads", "kv_groups", "neurons", "experts", "expert_neurons", "hidden", *BLOCK_KINDS)

NAMES = {
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num"),
    "neurons": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "ffn_dim_base"),
    "hidden": ("hidden_size", "n_embd", "d_model", "embed_dim"),
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "epsilon": (
        *("rms_norm_eps", "layer_norm_eps", "norm_eps", "layer_norm_epsilon", "norm_epsilon"),
        *("layernorm_epsilon", "rms_norm_epsilon"),
    ),
}
"""Our word for a dimension -> what configs call it, the usual name first."""
CONFIG_NAMES = {k: names[0] for k, names in NAMES.items() if k != "layers"}
"""What most configs call what an entry names."""
ROPE_NAMES = {x: x for x in ("rope_theta", "partial_rotary_factor")}


@dataclass(frozen=True)
class Projection:
    """A linear module of a decoder layer, its path relative to the layer."""

    path: str
    rows: tuple[str, ...]
    columns: str

    @property
    def inside(self) -> bool:
        """Whether the projection neither reads nor writes the residual stream."""
        return "hidden" not in (self.columns, *self.rows)

    def inner_size(self, rows: int, columns: int) -> int:
        """Return the features on the side that is not the stream, or of both sides the weights."""
        if self.inside:
            return rows * columns
        return rows if self.columns == "hidden" else columns

    @property
    def serves_queries_or_values(self) -> bool:
        """Whether the outputs are queries or values, alone or fused with keys."""
        return self.columns == "hidden" and "k_proj" not in self.path


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: stacked weights, and the router that picks some for each token.

    A projection of theirs is one tensor for all experts of a layer, (experts, rows, columns); its
    biases, if it has any, are beside it, under the same name with `_bias`.
    """

    projections: tuple[Projection, ...] = (
        Projection("mlp.experts.gate_up_proj", ("expert_neurons", "expert_neurons"), "hidden"),
        Projection("mlp.experts.down_proj", ("hidden",), "expert_neurons"),
    )
    """The last one writes what an expert adds to the residual stream."""
    router: str = "mlp.gate"
    """The module with a row for each expert. It returns logits, weights and indices; if experts
    weigh their inputs first, it returns scores of all experts and logits."""
    shared: tuple[Projection, ...] = ()
    """Projections of the expert that all tokens go through; the last one writes what it adds."""
    shared_gate: str = ""
    """The linear module that weighs it, if there is one."""
    shared_times: str | int = ""
    """How many times as wide as a routed expert the stock class makes it, or the config attribute
    that says so; "": it has a width of its own."""
    groups: str = ""
    """Config attribute: into how many groups of one size the router divides them, if it may."""
    weighed_first: bool = False
    """All of them read all tokens, weighed before: by 0 where they are not chosen."""
    count_in_4: str = ""
    """Config attribute: how many there are, where transformers 4 has another name for it."""
    per_token: str = "num_experts_per_tok"
    """Config attribute: how many experts a token is routed to."""
    transposed: bool = False
    """Stacks are (experts, columns, rows)."""
    gives_pair: bool = False
    """The layer takes the block's output apart: what it adds, and the router's scores."""
    interleaved: bool = False
    """Rows of the same neuron, such as gate and up, stand side by side."""
    files: tuple[str, ...] = (".experts.",)
    """Part of a name that all their tensors have in files."""

    @property
    def module(self) -> str:
        """Path of the module that holds the stacks."""
        return self.projections[-1].path.rpartition(".")[0]


@dataclass(frozen=True)
class Family:
    """Where the parts of one model type are, and what they mean."""

    model_type: str
    causal_lm: str
    attention: tuple[Projection, ...]
    """Projections of the attention block; the last one writes to the residual stream."""
    mlp: tuple[Projection, ...]
    """Projections of the MLP block; the last one writes to the residual stream. In a family with
    experts, these are the projections of layers without experts."""
    experts: Experts | None = None
    """The mixture that replaces the MLP's projections in layers with routed experts."""
    mixer: tuple[Projection, ...] = ()
    """Projections of what mixes tokens in other layers than attention, or beside it: a recurrence
    or a convolution; the last one writes to the residual stream."""

    mixer_follows_width: bool = False
    """The stock class derives the mixer's inner width from the hidden size."""
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    norm: Literal["rms", "rms_1p", "layer", "layer_1p"] = "rms"
    """`rms`: x/rms * w; `layer`: LayerNorm; with `_1p` 1 + w takes the place of w."""
    attention_norms: tuple[str, ...] = ("input_layernorm",)
    """Norms over the hidden width that serve the attention block alone."""
    mlp_norms: tuple[str, ...] = ("post_attention_layernorm",)
    shared_norms: tuple[str, ...] = ()
    """Norms over the hidden width that both blocks read: they stay with either."""
    post_norms: tuple[str, str] | None = None
    """Norms of what the attention and the MLP add to the residual stream, if there are any."""
    attention_module: str = "self_attn"
    mlp_modules: tuple[str, ...] = ("mlp",)
    """Modules that make up the MLP; when it is removed, the last one yields zeros."""
    counts_heads: bool = False
    """The attention counts its heads, or normalises all: a step cannot skip masked heads."""
    per_head: tuple[str, ...] = ()
    """Parameters of a decoder layer with an entry for each query head."""
    qk_norms: tuple[str, ...] = ()
    """Norms on queries and keys, in this order, that share the block norms' epsilon."""
    joint_qk_norms: bool = False
    """These run over all heads together, not over each."""
    scaled_embedding: bool = False
    """Embeddings are multiplied by the square root of the config's hidden size."""
    head_dim_from_hidden: bool = False
    """The stock class derives head_dim from hidden size and head count."""
    heads_fill_width: bool = False
    """The stock class's output projection is as wide as it is high: heads x head_dim = hidden."""
    vllm_head_dim_from_hidden: bool = False
    """vLLM's own class derives it so, whatever the config says."""

    latent: tuple[str, ...] = ()
    """Config attributes whose sum is what a cache holds of a token, whatever the heads: the size
    of the latent, and the features that are rotated beside it."""
    latent_norms: tuple[str, ...] = ()
    """Norms of the latents of queries, and of keys and values."""
    heads_divide_hidden: bool = False
    """The stock config demands that the head count divides the hidden size."""
    config_names: Mapping[str, str] = field(default_factory=lambda: CONFIG_NAMES)
    """Our word for a dimension -> the config's attribute."""
    rope_names: Mapping[str, str] = field(default_factory=lambda: ROPE_NAMES)
    """Key of `rope_parameters` -> top-level key of config.json up to transformers 4."""
    logit_divisor: str | None = None
    """Config attribute by which logits are divided."""
    logit_multiplier: str | None = None
    """Config attribute by which logits are multiplied."""
    logit_softcap: str | None = None
    """Config attribute of the tanh bound on logits."""
    attention_softcap: str | None = None
    """Config attribute of the tanh bound on attention logits."""
    rope_pairs: Literal["halves", "neighbours"] = "halves"
    """Features of a head that rotate together: of its two halves, or neighbours."""
    attention_clip: str | None = None
    """Config attribute of the bound on queries, keys and values."""
    multipliers: tuple[str, str] | None = None
    """Config attributes by which embeddings, and what blocks write, are multiplied."""
    block_multipliers: tuple[str, str] | None = None
    """The same of what attention, and what the MLP writes, where each has its own; NAME.INDEX is an
    item of a list."""
    buffers: tuple[str, ...] = ()
    """Tensors of a decoder layer that files hold and that are no parameters."""
    activation: str = "hidden_act"
    """Config attribute that names the MLP's activation function."""
    gguf: tuple[str, ...] = ()
    """llama.cpp's architectures that compute the same (`export.gguf.architectures`), best first."""
    requires: Mapping[str, object] = field(default_factory=dict)
    """Config values that this entry describes; other checkpoints of the type are refused."""
    settles: Mapping[str, object] = field(default_factory=dict)
    """Config values of a cut model, where the dense one's would change its counts."""

    refused: Mapping[str, str] = field(default_factory=dict)
    """Kind of gate, or "KIND uniform" -> why it is not exact, where no other fact says so."""

    def mlp_of(self, mixture: bool) -> tuple[Projection, ...]:
        """Return the projections of a layer's neurons: with routed experts, of the shared one."""
        if not mixture:
            return self.mlp
        return self.experts.shared if self.experts else ()

    @property
    def projections(self) -> tuple[Projection, ...]:
        """All projections of a decoder layer, attention first; a layer has those of its kind."""
        return self.attention + self.mixer + self.mlp + self.mlp_of(mixture=True)

    @property
    def adapted(self) -> tuple[str, ...]:
        """Paths of the modules in a decoder layer that LoRA may be on."""
        routers = (self.experts.router,) if self.experts else ()
        return (*(p.path for p in self.projections), *routers)

    @property
    def uncut(self) -> tuple[Projection, ...]:
        """Projections with at least one side that no gate cuts."""
        sides = ((p, {p.columns, *p.rows}) for p in self.attention + self.mixer)
        return tuple(p for p, axes in sides if axes & {"mixer", "latent"})

    @property
    def mixer_module(self) -> str:
        """The module that the mixer's projections are part of, "" without a mixer."""
        return self.mixer[-1].path.rpartition(".")[0] if self.mixer else ""

    @property
    def vllm_backend(self) -> bool:
        """Whether vLLM's Transformers backend computes the type in free shapes.

        It keeps no state of mixers, knows latent attention by stock model types, and does not load
        stacks of experts that weigh their inputs (Llama 4's).
        """
        experts = self.experts
        return not (self.mixer or self.latent or (experts and experts.weighed_first))

    @property
    def attention_modules(self) -> tuple[str, ...]:
        """Modules that mix tokens: a layer has one of them, or both side by side."""
        return (self.attention_module, *([self.mixer_module] if self.mixer else []))

    @property
    def files(self) -> tuple[str, ...]:
        """Parts of names in files: each projection and expert has one of these."""
        stacks = self.experts.files if self.experts else ()
        return (*(f".{p.path}." for p in self.projections), *stacks)

    @property
    def norms(self) -> tuple[str, ...]:
        """All norms of a decoder layer over the hidden width."""
        return self.attention_norms + self.mlp_norms + self.shared_norms

    def head_dim(self, config: Any) -> int:
        """Return the features of a head: as the config states, else the head's share of the width.

        Args:
            config: the config of a model of the family, stock or pruned.
        """
        names = self.config_names
        stated = names.get("head_dim", "head_dim")
        own = None if self.head_dim_from_hidden else getattr(config, stated, None)
        return int(own or getattr(config, names["hidden"]) // getattr(config, names["heads"]))

    def refusal(self, kind: str, uniform: bool = False) -> str | None:
        """Return why gates of `kind` cannot be used on this family, or None if they can.

        Args:
            kind: one of `GATE_KINDS`.
            uniform: whether the result must be a model of the stock class.
        """
        for key in (kind, f"{kind} uniform")[: 1 + uniform]:
            if key in self.refused:
                return self.refused[key]
        if kind in ("experts", "expert_neurons") and self.experts is None:
            return "the model is no mixture of experts; use --gates neurons"
        if kind == "hidden" and self.norm.startswith("layer"):
            return (
                "LayerNorm takes its mean over the whole width, so cutting the width would change "
                "the model"
            )
        if kind in ("heads", "kv_groups") and self.joint_qk_norms:
            return (
                "queries and keys are normalised over all heads together, so cutting heads would "
                "change the model"
            )
        if kind in ("heads", "kv_groups") and self.latent:
            return (
                "keys and values come from latents that heads share (multi-head latent attention), "
                "which no gate cuts"
            )
        if uniform and kind == "hidden" and self.mixer_follows_width:
            return (
                "the stock class derives the inner width of its mixers from the hidden size, so "
                "that cannot be cut alone; use --shapes free"
            )
        if uniform and kind in BLOCK_KINDS:
            return "a stock class lacks no block in any layer; use --shapes free"
        if uniform and kind in ("heads", "kv_groups") and self.head_dim_from_hidden:
            return (
                "the stock class computes head_dim from width and head count, so it cannot have "
                "fewer heads; use --shapes free"
            )
        if uniform and kind in ("heads", "kv_groups", "hidden") and self.heads_fill_width:
            return (
                "the stock class wants heads x head_dim to be the width, so neither can be cut "
                "alone; use --shapes free"
            )
        return None


def config_number(config: Any, name: str) -> float:
    """Return an attribute of a config, or of NAME.INDEX an item of a list."""
    name, _, index = name.partition(".")
    value = getattr(config, name)
    return float(value[int(index)] if index else value)

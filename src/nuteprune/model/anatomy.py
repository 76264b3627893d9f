"""Live views of a model's parts; the sole owner of module paths.

Works on a stock causal LM, on one wrapped by PEFT, and on a checkpoint that is already pruned.

Shape suffixes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from nuteprune.errors import UserError
from nuteprune.model.family import Experts, Family, Projection, config_number
from nuteprune.model.lookup import family_named
from nuteprune.model.shape import LayerShape, Shape
from nuteprune.model.weights import count


def _at(module: Any, path: str) -> Any:
    """Return what is at a dotted path, None if it is gone."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def without_lora(module: Any) -> Any:
    """Return the module inside of a LoRA wrapper, or the module itself."""
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


@dataclass(frozen=True)
class Mixture:
    """Live views of a layer's routed experts.

    Args:
        entry: their part of the family's entry.
        block: the module that routes tokens to experts and adds up their outputs.
        router: scores the experts; has a row of weights for each.
        experts: holds their stacked weights.
        per_token: how many experts a token is routed to.
    """

    entry: Experts
    block: nn.Module
    router: Any
    experts: Any
    per_token: int

    def stack(self, projection: Projection) -> nn.Parameter:
        """Return a projection's weights: (experts, rows, columns), or as the entry has them."""
        return cast(nn.Parameter, getattr(self.experts, projection.path.rpartition(".")[2]))

    def bias(self, projection: Projection) -> nn.Parameter | None:
        """Return a projection's biases (experts, rows), None if it has none."""
        return getattr(self.experts, f"{projection.path.rpartition('.')[2]}_bias", None)

    @property
    def down(self) -> Projection:
        """The projection from an expert's neurons to its output."""
        return self.entry.projections[-1]

    def plain(self, weight: Tensor) -> Tensor:
        """Return a view (rows, columns) of one expert's part of a stack."""
        return weight.T if self.entry.transposed else weight

    @property
    def sizes(self) -> tuple[int, int]:
        """The number of experts, and of neurons of each."""
        down = self.stack(self.down)
        return int(down.shape[0]), int(down.shape[1 if self.entry.transposed else 2])


class Anatomy:
    """The parts of one model, found by its family's entry.

    Args:
        model: a causal LM of a supported family, possibly wrapped by PEFT.

    Raises:
        UserError: if the model's type is not supported, or its config is a variant that the
            family's entry does not describe.
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        self.model = cast(PreTrainedModel, base)
        self.config = self.model.config
        self.family: Family = family_named(self.config.model_type, self.config.to_dict())
        for name, value in self.family.requires.items():
            if (found := getattr(self.config, name)) != value:
                said = f"{self.family.model_type} checkpoints with {name}={found}"
                raise UserError(f"{said} are not supported, only {name}={value}")
        self.layers: list[nn.Module] = list(
            cast(nn.ModuleList, self.model.get_submodule(self.family.layers))
        )
        self.embedding: Any = self.model.get_submodule(self.family.embedding)
        self.final_norm = self.model.get_submodule(self.family.final_norm)
        self.head: Any = self.model.get_output_embeddings()
        self.head_dim = self.family.head_dim(self.config)

    @property
    def tied(self) -> bool:
        """Whether the language head is the embedding matrix."""
        return self.head.weight is self.embedding.weight

    @property
    def head_path(self) -> str:
        """Where the language head is in the causal LM."""
        paths: dict[nn.Module, str] = {x: path for path, x in self.model.named_modules()}
        return paths[self.head]

    def projection(self, layer: int, projection: Projection) -> Any:
        """Return a layer's projection (the LoRA layer where PEFT wraps it), None if it is gone."""
        module = _at(self.layers[layer], projection.path)
        return module if hasattr(module, "in_features") else None

    def block(self, layer: int, projection: Projection) -> nn.Module | None:
        """Return the module that has a layer's projection as a part, None for the layer itself."""
        path = projection.path.rpartition(".")[0]
        return self.layers[layer].get_submodule(path) if path else None

    def linear(self, layer: int, projection: Projection) -> nn.Linear | None:
        """Return a layer's projection without the LoRA wrapper, None if it is gone."""
        module = self.without_lora(layer, projection.path)
        return module if hasattr(module, "in_features") else None

    def _linears(self, projection: Projection) -> list[nn.Linear]:
        """Return a projection of all layers that have it, without LoRA wrappers."""
        found = (self.linear(i, projection) for i in range(len(self.layers)))
        return [x for x in found if x is not None]

    def without_lora(self, layer: int, path: str) -> Any:
        """Return the module at a path of a layer without its LoRA wrapper, None if it is gone."""
        return without_lora(_at(self.layers[layer], path))

    def mixture(self, layer: int) -> Mixture | None:
        """Return a layer's routed experts, None if it has none."""
        experts, module = self.family.experts, self.layers[layer]
        if experts is None or (stacks := _at(module, experts.module)) is None:
            return None
        block = module.get_submodule(self.family.mlp_modules[-1])
        return Mixture(experts, block, _at(module, experts.router), stacks, self.per_token)

    def post_norm(self, layer: int, block: str) -> nn.Module | None:
        """Return the norm of a block's output (`attn_block`, `mlp_block`), None without one."""
        if self.family.post_norms is None:
            return None
        return self.layers[layer].get_submodule(self.family.post_norms[block == "mlp_block"])

    @property
    def norm_offset(self) -> float:
        """What norms add to their weights before they multiply by them."""
        return 1.0 if self.family.norm.endswith("_1p") else 0.0

    def norms(self, layer: int) -> Iterator[nn.Module]:
        """Yield a layer's norms over the hidden width that are still there."""
        for path in self.family.norms:
            module = self.layers[layer].get_submodule(path)
            if not isinstance(module, nn.Identity):
                yield module

    def writers(self, layer: int) -> Iterator[tuple[str, nn.Module]]:
        """Yield (block, module) of what a layer adds to the residual stream, before any scale.

        The module is an output or down projection; a mixer, since fused kernels may read the
        weights of its projections past their hooks; or a block of routed experts.
        """
        attention = self.projection(layer, self.family.attention[-1])
        if attention is not None:
            yield "attn_block", attention
        if self.mixes_otherwise(layer):
            yield "attn_block", self.layers[layer].get_submodule(self.family.mixer_module)
        mixture = self.mixture(layer)
        if mixture is not None:
            yield "mlp_block", mixture.block
        elif (down := self.projection(layer, self.down(layer))) is not None:
            yield "mlp_block", down

    def down(self, layer: int) -> Projection:
        """Return the projection that reads a layer's neurons, or its shared expert's."""
        shared = self.family.mlp_of(mixture=True) if self.mixture(layer) else ()
        return (shared or self.family.mlp)[-1]

    def ends(self, layer: int) -> dict[str, Projection]:
        """Return `attn_block` and `mlp_block` -> their last projection, there or gone."""
        return {"attn_block": self.family.attention[-1], "mlp_block": self.down(layer)}

    def mixes_otherwise(self, layer: int) -> bool:
        """Return whether a layer has a mixer, in place of attention or beside it."""
        last = self.family.mixer[-1:]
        return any(self.projection(layer, x) is not None for x in last)

    def pre_norm(self, layer: int, block: str) -> nn.Module | None:
        """Return the norm of a block's input (`attn_block`, `mlp_block`), None without one."""
        family = self.family
        own = family.mlp_norms if block == "mlp_block" else family.attention_norms
        paths = [x for x in own + family.shared_norms if x not in (family.post_norms or ())]
        module = self.layers[layer].get_submodule(paths[0]) if paths else nn.Identity()
        return None if isinstance(module, nn.Identity) else module

    def qk_norms(self, layer: int) -> tuple[nn.Module, ...]:
        """Return the norms of a layer's queries and keys, in this order, () without any."""
        if self.projection(layer, self.family.attention[-1]) is None:
            return ()
        found = (_at(self.layers[layer], path) for path in self.family.qk_norms)
        return tuple(norm for norm in found if norm is not None)

    def attention_scale(self, layer: int) -> float:
        """Return the factor on a layer's products of queries and keys."""
        return float(self.layers[layer].get_submodule(self.family.attention_module).scaling)  # type: ignore[arg-type]

    def lora_layers(self, layer: int) -> dict[str, LoraLayer]:
        """Return a layer's LoRA layers by path: projections in the family's order, the router."""
        modules = {path: _at(self.layers[layer], path) for path in self.family.adapted}
        return {path: m for path, m in modules.items() if isinstance(m, LoraLayer)}

    @property
    def per_token(self) -> int:
        """How many routed experts a token goes through, 0 without any."""
        experts = self.family.experts
        return int(getattr(self.config, experts.per_token)) if experts else 0

    @property
    def shape(self) -> Shape:
        """Dimensions, read from the modules themselves."""
        hidden = self.embedding.weight.shape[1]
        return Shape(hidden, tuple(self._layer_shape(i) for i in range(len(self.layers))))

    def _layer_shape(self, layer: int) -> LayerShape:
        writes = self.projection(layer, self.family.attention[-1])
        down = self.projection(layer, self.down(layer))
        heads = writes.in_features // self.head_dim if writes is not None else 0
        neurons = down.in_features if down is not None else 0
        kv_heads = heads
        for part in self.family.attention if heads else ():
            if "kv" in part.rows:
                rows = self.projection(layer, part).out_features // self.head_dim
                kv_heads = (rows - part.rows.count("q") * heads) // part.rows.count("kv")
                break
        mixture = self.mixture(layer)
        experts = mixture.sizes if mixture else (0, 0)
        return LayerShape(heads, kv_heads, neurons, *experts, mixer=self.mixes_otherwise(layer))

    @property
    def inner_sizes(self) -> dict[str, int]:
        """Projection path -> `Projection.inner_size`, in a mixer or latent attention.

        No gate cuts these.
        """
        return {
            projection.path: projection.inner_size(x.out_features, x.in_features)
            for projection in self.family.uncut
            for x in self._linears(projection)
        }

    @property
    def groups(self) -> int:
        """Into how many groups routers divide experts, 1 where they do not."""
        experts = self.family.experts
        return int(getattr(self.config, experts.groups) or 1) if experts and experts.groups else 1

    @property
    def cached_features(self) -> float:
        """Features that a cache holds of a token, for each KV head."""
        if latent := self.family.latent:
            cached = sum(int(getattr(self.config, x)) for x in latent)
            return cached / int(self.config.num_attention_heads)
        return 2 * self.head_dim

    @property
    def biases(self) -> dict[str, bool]:
        """Return for each projection path whether it has a bias."""
        found = {}
        for projection in self.family.projections:
            linears = self._linears(projection)
            found[projection.path] = any(m.bias is not None for m in linears)
        for projection in self.family.experts.projections if self.family.experts else ():
            mixtures = map(self.mixture, range(len(self.layers)))
            found[projection.path] = any(m.bias(projection) is not None for m in mixtures if m)
        return found

    def cached_tokens(self, context: int) -> tuple[int, ...]:
        """Return how many tokens of a context each layer's attention keeps keys and values of."""
        sliding = "sliding_attention"
        names = {sliding: "sliding_window", "chunked_attention": "attention_chunk_size"}
        windows = {kind: getattr(self.config, name, None) for kind, name in names.items()}
        kinds = getattr(self.config, "layer_types", None) or [sliding] * len(self.layers)
        return tuple(min(context, windows.get(kind) or context) for kind in kinds)

    def block_scale(self, block: str) -> float:
        """Return the factor between a block's last projection and the residual stream."""
        own, both = self.family.block_multipliers, self.family.multipliers
        if own:
            return self._factor(own[block == "mlp_block"])
        return self._factor(both[1] if both else None)

    def logit_scale(self) -> tuple[float, float | None]:
        """Return what happens to the head's output: (divisor, soft cap or None)."""
        family = self.family
        divisor = self._factor(family.logit_divisor) / self._factor(family.logit_multiplier)
        cap = getattr(self.config, family.logit_softcap) if family.logit_softcap else None
        return divisor, cap

    def _factor(self, name: str | None) -> float:
        return config_number(self.config, name) if name else 1.0

    def parameters(self) -> int:
        """Count all parameters of the model, tied ones once, adapters not counted."""
        own = {id(p): count(p) for n, p in self.model.named_parameters() if ".lora_" not in n}
        return sum(own.values())


def no_logits(ids_BT: Tensor) -> Tensor:
    """Return the `logits_to_keep` with which a model computes no logits.

    With a single position and gradients, torch would copy the head's whole matrix for each
    sequence.
    """
    return ids_BT.new_empty(0)


def silence_dropout(model: nn.Module) -> None:
    """Set every dropout of a model to 0, and the noise of routers.

    One backbone in two roles must be one function. Modules alone are changed, not the config,
    which goes into the pruned checkpoint as it was.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if ("dropout" in name or "jitter" in name) and isinstance(value, float):
                setattr(module, name, 0.0)

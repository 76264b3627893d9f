"""Bytes and multiply-adds of a model, which bound how much faster it can be."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from nuteprune.gates.budget import Budget
from nuteprune.model.anatomy import Anatomy

_ENDLESS = 2**62


@dataclass(frozen=True)
class Workload:
    """What is timed.

    Args:
        batch_size: sequences at a time.
        length: tokens of each prompt.
        new_tokens: tokens decoded after it.
    """

    batch_size: int
    length: int
    new_tokens: int


@dataclass(frozen=True)
class Work:
    """Sizes of a model, from which its bytes and multiply-adds follow.

    Args:
        parameters: all of them, tied ones once.
        blocks: those of the decoder layers' projections that a token goes through.
        head: those of the language head.
        moved: those that a decoded token reads: without an embedding that is only looked up, and
            without experts that it is not routed to.
        bytes_per_parameter: as the model is held in memory.
        queries: features of all layers' queries.
        cached: keys and values that all layers keep of a token.
        attention_blocks: number of attention blocks, each one round of calls.
        mlp_blocks: number of MLPs, each one round of calls.
        per_token: routed experts that a token goes through.
        stacks: (routed experts, parameters of each) of each layer with experts.
        windows: (tokens of the window, features of queries, keys and values kept of a token) of
            each layer with a sliding window.
    """

    parameters: int
    blocks: int
    head: int
    moved: int
    bytes_per_parameter: int
    queries: int
    cached: int
    attention_blocks: int
    mlp_blocks: int
    per_token: int = 0
    stacks: tuple[tuple[int, int], ...] = ()
    windows: tuple[tuple[int, int, int], ...] = ()

    @classmethod
    def of(cls, model: PreTrainedModel) -> Work:
        """Count a model."""
        anatomy = Anatomy(model)
        layers, everything = anatomy.shape.layers, anatomy.parameters()
        table = 0 if anatomy.tied else anatomy.embedding.weight.numel()
        budget = Budget.of(anatomy)
        idle = budget.idle(budget.shape)
        routed = [(layer.experts, budget.expert(layer)) for layer in layers if layer.experts]
        seen = zip(anatomy.cached_tokens(_ENDLESS), layers, strict=True)
        each_head = anatomy.head_dim, anatomy.cached_features
        return cls(
            everything,
            budget.before - idle,
            anatomy.head.weight.numel(),
            everything - table - idle,
            model.dtype.itemsize,
            anatomy.head_dim * sum(layer.heads for layer in layers),
            round(anatomy.cached_features * sum(layer.kv_heads for layer in layers)),
            sum(layer.mixes for layer in layers),
            sum(layer.mlp for layer in layers),
            budget.per_token,
            tuple((n, each[0] * budget.shape.hidden + each[1]) for n, each in routed),
            tuple(
                (tokens, each_head[0] * x.heads, round(each_head[1] * x.kv_heads))
                for tokens, x in seen
                if tokens < _ENDLESS and x.attention
            ),
        )

    def prefill(self, setting: Workload) -> int:
        """Multiply-adds in a prefill; the head serves only the last token.

        A token's queries meet the keys and the values of all tokens up to it, within a window.
        """
        met = self.queries * setting.length * (setting.length + 1)
        for window, queries, _ in self.windows:
            beyond = max(0, setting.length - window)
            met -= queries * beyond * (beyond + 1)
        return setting.batch_size * (setting.length * self.blocks + self.head + met)

    def decode(self, setting: Workload) -> float:
        """Bytes that a decoding step reads on average: weights and cache.

        Weights are read once for the whole batch, those of an expert if any token goes through it.
        """
        held = setting.length + (setting.new_tokens + 1) / 2
        beyond = sum(each * max(0.0, held - window) for window, _, each in self.windows)
        read = setting.batch_size * (held * self.cached - beyond) + self.moved
        for experts, each in self.stacks:
            met = experts_met(experts, self.per_token, setting.batch_size)
            read += (met - self.per_token) * each
        return self.bytes_per_parameter * read

    def calls(self, dense: Work) -> float:
        """Return the dense model's rounds of calls over this model's.

        The whole cannot gain more than its part that gains most.
        """
        pairs = (
            (dense.attention_blocks, self.attention_blocks),
            (dense.mlp_blocks, self.mlp_blocks),
        )
        return max(old / max(1, new) for old, new in pairs)


def experts_met(experts: int, per_token: int, tokens: int) -> float:
    """Return how many of a layer's experts some tokens go through, on average.

    E (1 - (1 - k / E)^B): for even routing and independent tokens. Routing that prefers
    some experts meets fewer.
    """
    return experts * (1 - (1 - per_token / experts) ** tokens)

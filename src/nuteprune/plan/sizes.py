"""Bytes of what a model is made of, as a run holds and reads it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from nuteprune.data.writing import fitting, most_cached
from nuteprune.gates.budget import Budget
from nuteprune.model.anatomy import Anatomy
from nuteprune.train.config import NutePruneConfig


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's parts, in the dtype of the run.

    Args:
        weights: all, tied ones once.
        projections: the decoder layers' projections.
        layer: of one decoder layer, the largest.
        outside: of what is in no layer: embedding, head, final norm.
        refitted: weights that the refit adds beside the base's, at most.
        adapters: LoRA, in fp32.
        cached: keys and values while the model writes.
        together: how many texts it writes at a time, at most.
        read: weights that a token reads, without the embedding.
    """

    weights: int
    projections: int
    layer: int
    outside: int
    refitted: int
    adapters: int
    cached: int
    together: int
    read: int

    @classmethod
    def of(
        cls, anatomy: Anatomy, args: NutePruneConfig, length: int, kinds: Collection[str]
    ) -> Sizes:
        """Read the sizes off a model, whose tensors may be without data.

        Args:
            anatomy: the model.
            args: the run's settings.
            length: tokens per block.
            kinds: of gates.
        """
        each = anatomy.model.dtype.itemsize
        layers = [sum(p.numel() for p in layer.parameters()) for layer in anatomy.layers]
        last, adapters = 0, 0
        for i in range(len(anatomy.layers)):
            ends = {projection.path for projection in anatomy.ends(i).values()}
            for path in anatomy.family.adapted:
                module = anatomy.without_lora(i, path)
                if module is not None:
                    adapters += args.lora_rank * sum(module.weight.shape)
                    last += module.weight.numel() * (path in ends)
            if "expert_neurons" in kinds and (mixture := anatomy.mixture(i)) is not None:
                last += mixture.stack(mixture.down).numel() * (not mixture.entry.weighed_first)
        total = anatomy.parameters()
        table = 0 if anatomy.tied else anatomy.embedding.weight.numel()
        return cls(
            weights=total * each,
            projections=Budget.of(anatomy).before * each,
            layer=max(layers) * each,
            outside=(total - sum(layers)) * each,
            refitted=last * each,
            adapters=adapters * 4,
            cached=most_cached(anatomy.model, length),
            together=fitting(anatomy.model, length),
            read=(total - table) * each,
        )

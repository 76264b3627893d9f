"""LoRA weights of a wrapped model: read, swapped by pointer, computed in the base's dtype.

Shape suffixes: O rows and I columns of a weight, R rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nuteprune.errors import UserError
from nuteprune.memory import mapped
from nuteprune.model.anatomy import Anatomy, without_lora
from nuteprune.model.family import Projection
from nuteprune.model.forwards import Value, replaced
from nuteprune.model.trainable import ADAPTER, Place, places_of, sides_of
from nuteprune.model.weights import Away, gathered, home_of, is_sharded, like, put_rows, weight_of
from nuteprune.processes import is_main


class Part(NamedTuple):
    """The learned part of a projection: scale x out @ in, added to its weight or to another.

    `weight_OI`, where there is one, stands in place of the base's. A stack has nothing added.
    """

    scale: float
    in_RI: Tensor | None
    out_OR: Tensor | None
    weight_OI: Tensor | None


Learned = dict[tuple[int, str], Part]
"""What a run has learned: (layer, path of a projection) -> its part."""


Weights = dict[str, Tensor]
"""What stands beside base weights or in place of them, by the names of `LoraBank.state`."""


class LoraBank:
    """The student's own weights: LoRA, and weights in place of the base's.

    Weights in place of the base's are those of a refit. Both are swapped by pointer. Where the base
    is sharded, so are they: each process holds its rows of both, and a layer's are gathered as it
    runs. There the main process alone has whole ones, in files.

    Args:
        anatomy: a model wrapped by PEFT.
        folder: where weights in place of the base's are, mapped from there, on CPUs; None: in
            memory.
    """

    def __init__(self, anatomy: Anatomy, folder: Path | None = None) -> None:
        self._anatomy, self.folder = anatomy, folder
        # Looked up once, since adapters that are taken off are found no more.
        found = [places_of(anatomy, i) for i in range(len(anatomy.layers))]
        self._layers = [list(places.values()) for places in found]
        self._places = {(i, path): x for i, by in enumerate(found) for path, x in by.items()}
        self._dense: dict[str, Tensor] = {}
        # What replaces sharded weights, whole; see `_put_away`.
        self._wholes: dict[str, Tensor] = {}

    def state(self) -> dict[str, Tensor]:
        """Return the current weights (no copies), by layer, projection and side (`A`, `B`, `W`)."""
        return self.lora() | self.weights()

    def lora(self) -> dict[str, Tensor]:
        """Return LoRA's sides, by the names of `state`."""
        return {key: x.weight for layer in self._layers for x, key in _sides(layer)}

    def weights(self) -> Weights:
        """Return the weights in place of base weights, by the names of `state`."""
        return {
            f"{place.name}.W": self._wholes.get(place.name, home_of(place.weight))
            for place in self._places.values()
            if place.name in self._dense
        }

    def learned(self) -> Learned:
        """Return the current weights (no copies) by projection."""
        state, found = self.state(), {}
        for where, (name, _, _, lora, _) in self._places.items():
            scale = 1.0 if lora is None else lora.scaling[ADAPTER]
            part = Part(scale, *(state.get(f"{name}.{x}") for x in "ABW"))
            if lora is not None or part.weight_OI is not None:
                found[where] = part
        return found

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Load weights that `state` returned, perhaps in another process.

        Raises:
            UserError: if they are not of this model and these settings.
        """
        self._check(state)
        self.clear()
        self.install(state)

    def load_lora(self, lora: Mapping[str, Tensor]) -> None:
        """Load LoRA's sides alone; errors as `load`."""
        self._check(lora)
        self.install(lora)

    def _check(self, state: Mapping[str, Tensor]) -> None:
        given = {k: v.shape for k, v in state.items() if not k.endswith(".W")}
        if {k: v.shape for k, v in self.lora().items()} != given:
            raise UserError(
                "the LoRA weights are not those of this model and its settings: use the run's own"
            )

    @torch.no_grad()
    def install(self, weights: Mapping[str, Tensor]) -> None:
        """Put weights in their places: whole ones, where LoRA adds nothing, and sides of LoRA.

        Args:
            weights: by the names of `state`, as a refit returned them.
        """
        for place in self._places.values():
            if (new_OI := weights.get(f"{place.name}.W")) is not None:
                self._replace(place, new_OI, stored=True)
                place.silence()
        lora = self.lora()
        for key, value in weights.items():
            if not key.endswith(".W"):
                lora[key].copy_(value)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Restore LoRA and the base weights at the end of the context."""
        lora = {key: value.clone() for key, value in self.lora().items()}
        try:
            yield
        finally:
            self.clear()
            self.install(lora)

    @torch.no_grad()
    def set_weight(self, layer: int, projection: Projection, weight_OI: Tensor) -> None:
        """Put a weight in place of the base's, and let LoRA add nothing to it yet.

        Args:
            layer: its layer.
            projection: the projection, perhaps the last one of routed experts.
            weight_OI: the weight, of experts their stack.
        """
        place = self._places[layer, projection.path]
        self._replace(place, weight_OI)
        place.silence()

    def release(self) -> None:
        """Free base weights that others replace; this cannot be undone."""
        self._dense.clear()
        self._wholes.clear()

    def _put_away(self, weight_OI: Tensor) -> Tensor:
        """Return a weight for later: in main memory, or mapped from a file in the folder.

        Where the model is sharded, that goes for the main process alone: in the others the weight
        that is returned has no data.
        """
        if is_sharded(self._anatomy.layers[0]) and not is_main():
            return torch.empty_like(weight_OI, device="meta")
        weight_OI = weight_OI.to("cpu")
        return weight_OI if self.folder is None else mapped({"W": weight_OI}, self.folder)["W"]

    @torch.no_grad()
    def _replace(self, place: Place, weight_OI: Tensor, stored: bool = False) -> None:
        if place.name not in self._dense:
            self._dense[place.name] = place.own()
        dense_OI = self._dense[place.name]
        if is_sharded(place.layer):
            put_rows(place.rows, weight_OI)
            away_OI = weight_OI.to(dense_OI.dtype)
            self._wholes[place.name] = away_OI if stored and is_main() else self._put_away(away_OI)
            return
        # In a folder, since the base's are mapped from their files too; what is stored is there.
        at_home = stored and isinstance(dense_OI, Away)
        value_OI = weight_OI if at_home else weight_OI.to(dense_OI)
        new_OI = like(dense_OI, value_OI, None if stored else self.folder)
        place.weight = nn.Parameter(new_OI, requires_grad=False)

    @torch.no_grad()
    def set_delta(self, layer: int, projection: Projection, out_OR: Tensor, in_RI: Tensor) -> None:
        """Overwrite a projection's LoRA weights so that they add out @ in to its weight.

        Ranks beyond those of the fit add nothing yet, and can be learned.
        """
        lora, rank = self._places[layer, projection.path].lora, len(in_RI)
        assert lora is not None
        a_RI, b_OR = sides_of(lora)
        a_RI[:rank].copy_(in_RI)
        b_OR[:, :rank].copy_(out_OR / lora.scaling[ADAPTER])
        b_OR[:, rank:].zero_()

    @torch.no_grad()
    def clear(self) -> None:
        """Go back to the base model's weights, with LoRA adding nothing, as before any step."""
        for place in self._places.values():
            place.silence()
            if place.name in self._dense:
                place.put_back(self._dense.pop(place.name))
        self._wholes.clear()

    @contextmanager
    def using(self, layer: int, lora: Mapping[str, Tensor] | None) -> Iterator[None]:
        """Run a decoder layer with other weights of `state`, or with none, for a while."""
        places, state = self._layers[layer], lora or {}
        values: list[Value]
        if lora is None:
            values = [_left_out(x.lora) for x in places if x.lora is not None]
        else:
            values = [(x._parameters, "weight", lora[key]) for x, key in _sides(places)]
        others = {
            place: state.get(f"{place.name}.W", self._dense.get(place.name))
            for place in places
            if place.name in self._dense or f"{place.name}.W" in state
        }
        with gathered(self._anatomy.layers[layer]) if others else nullcontext():
            for place, weight in others.items():
                whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
                values.append((place.holder._parameters, place.key, whole))
            with replaced(values):
                yield

    @contextmanager
    def silent_left_out(self) -> Iterator[None]:
        """Within this context, do not compute LoRA where it adds nothing at its beginning.

        Inside, `set_weight` may be called, but not `set_delta`, whose LoRA would be left out too.
        """
        silent = [x.lora for x in self._places.values() if x.lora is not None and x.is_silent]
        with replaced(map(_left_out, silent)):
            yield

    def as_dense(self, layer: int) -> AbstractContextManager[None]:
        """Run a decoder layer as it is in the base model for a while."""
        return self.using(layer, None)


def delta_of(module: LoraLayer) -> Tensor:
    """Return what LoRA adds to a weight (O, I), in LoRA's dtype.

    PEFT's own `get_delta_weight` rounds it to the weight's where it wraps a bare parameter.
    """
    in_RI, out_OR = sides_of(module)
    delta_OI: Tensor = (out_OR @ in_RI) * module.scaling[ADAPTER]
    return delta_OI


def effective_weight(module: Any) -> Tensor:
    """Return a projection's weight (O, I) in fp32, with what LoRA adds where there is some."""
    weight_OI = weight_of(without_lora(module)).float()
    return weight_OI + delta_of(module).float() if isinstance(module, LoraLayer) else weight_OI


def _left_out(lora: LoraLayer) -> Value:
    return vars(lora), "_disable_adapters", True


def _sides(places: Iterable[Place]) -> Iterator[tuple[Any, str]]:
    """Yield LoRA's linear modules, and what their weights are called in a state."""
    for place in places:
        if place.lora is not None:
            yield place.lora.lora_A[ADAPTER], f"{place.name}.A"
            yield place.lora.lora_B[ADAPTER], f"{place.name}.B"


@contextmanager
def lora_in_base_dtype(anatomy: Anatomy) -> Iterator[None]:
    """Within this context, compute LoRA, which PEFT keeps in fp32, in the base weights' dtype.

    Otherwise each projection casts its inputs to fp32 and keeps that copy for the backward pass:
    twice the memory, and products at half of the speed.
    """
    weight = anatomy.embedding.weight
    half = weight.dtype in (torch.bfloat16, torch.float16)
    autocast = torch.autocast(weight.device.type, weight.dtype if half else None, enabled=half)
    with autocast, disable_input_dtype_casting(anatomy.model, active=half):
        yield

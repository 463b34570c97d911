"""pyvene: interventions that collect, on models built once. Its clones are its own; `unit` says what it gathers by."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import pyvene
import torch
from engine import Case
from peer_edits import GREEDY
from peer_methods import DAS_LAYER, Subject, Trace
from peer_table import EVERYTHING, PATTERNS
from peer_work import Sample, Work, main, twin
from torch import Tensor, nn

PLACES = (
    "block_input",
    "block_output",
    "mlp_activation",
    "mlp_output",
    "mlp_input",
    "attention_value_output",
    "attention_output",
    "attention_input",
    "query_output",
    "key_output",
    "value_output",
)


def collector(model: nn.Module, places: Sequence[str], unit: str, units: int) -> pyvene.IntervenableModel:
    """A model that collects all units of these places in every layer."""
    collect = {"unit": unit, "max_number_of_units": units, "intervention_type": pyvene.CollectIntervention}
    wanted = [{"layer": layer, "component": place, **collect} for layer in range(model.config.n_layer) for place in places]
    return pyvene.IntervenableModel(pyvene.IntervenableConfig(representations=wanted), model=model)


def works(case: Case) -> Iterator[Work]:
    positions, heads = case.ids.shape[1], case.model.config.n_head
    values = collector(twin(case), PLACES, "pos", positions)
    patterns = collector(twin(case), ["attention_weight"], "h", heads)

    def collect(model: pyvene.IntervenableModel, units: int) -> Any:
        return model(inputs(case.ids), unit_locations={"base": list(range(units))})

    yield Work(EVERYTHING, "Collect, 11 places a layer", lambda: collect(values, positions), collected)
    yield Work(PATTERNS, "Collect attention_weight", lambda: collect(patterns, heads), patterned)


def collected(result: Any) -> Sample:
    (_, values), output = result
    return Sample(values, logits=output.logits)


def patterned(result: Any) -> Sample:
    (_, values), output = result
    return Sample(values, values, output.logits)


class Interventions:
    """Edits by interventions, each model of them built once."""

    how: Mapping[str, str] = {
        "add": "Addition",
        "put": "Vanilla, source_representations",
        "heads": "Vanilla, attention_value_output",
        "interchange": "Vanilla, sources",
        "steer": "Addition, generate",
    }

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.swapping = cache(self._swapping)
        self.adding = cache(self._adding)

    def _swapping(self, component: str, layers: tuple[int, ...]) -> pyvene.IntervenableModel:
        wanted = [{"layer": n, "component": component, "intervention_type": pyvene.VanillaIntervention} for n in layers]
        return pyvene.IntervenableModel(pyvene.IntervenableConfig(representations=wanted), model=self.model)

    def _adding(self, layer: int, vector: Tensor) -> pyvene.IntervenableModel:
        wanted = {"layer": layer, "component": "block_output", "intervention_type": pyvene.AdditionIntervention}
        config = pyvene.IntervenableConfig(representations=[{**wanted, "source_representation": vector}])
        return pyvene.IntervenableModel(config, model=self.model)

    def add(self, ids: Tensor, layer: int, vector: Tensor) -> Tensor:
        return self.adding(layer, vector)(inputs(ids))[1].logits

    def put(self, ids: Tensor, layer: int, positions: Sequence[int], values: Tensor) -> Tensor:
        model = self.swapping("block_output", (layer,))
        places = {"sources->base": (None, [[[position] for position in positions]])}
        given = dict.fromkeys(model.sorted_keys, values[:, None])
        return model(inputs(ids), unit_locations=places, source_representations=given)[1].logits

    def heads(self, ids: Tensor, values: Mapping[int, Tensor]) -> Tensor:
        model = self.swapping("attention_value_output", tuple(values))
        given = dict(zip(model.sorted_keys, values.values(), strict=True))
        return model(inputs(ids), source_representations=given)[1].logits

    def interchange(self, ids: Tensor, source: Tensor, layer: int, position: int) -> Tensor:
        model, places = self.swapping("block_output", (layer,)), [[[position]] * len(ids)]
        return model(inputs(ids), [inputs(source)], {"sources->base": (places, places)})[1].logits

    def steer(self, ids: Tensor, layer: int, vector: Tensor, steps: int) -> Tensor:
        model = self.adding(layer, vector)
        settings = {"min_new_tokens": steps, "max_new_tokens": steps, **GREEDY}
        return model.generate({"input_ids": ids}, intervene_on_prompt=True, **settings)[1]


class Studies:
    """Methods written by hand as interventions, each model of them built once; gradients at places it has none."""

    how: Mapping[str, str] = {
        "cells": "Addition and Vanilla, 30 cells, 18 times",
        "heads": "Vanilla, head_attention_value_output, 30 heads, 9 times",
        "das": "LowRankRotatedSpace",
    }

    def __init__(self, subject: Subject, model: nn.Module) -> None:
        self.subject, self.model = subject, model
        self.noising, self.swapping = cache(self._noising), cache(self._swapping)

    def _swapping(self, layer: int) -> pyvene.IntervenableModel:
        kind = {"component": "head_attention_value_output", "unit": "h.pos", "intervention_type": pyvene.VanillaIntervention}
        return pyvene.IntervenableModel(
            pyvene.IntervenableConfig(representations=[{"layer": layer, **kind}]), model=self.model
        )

    def _noising(self, layer: int) -> pyvene.IntervenableModel:
        wanted = [
            {"layer": 0, "component": "block_input", "intervention_type": pyvene.AdditionIntervention},
            {"layer": layer, "component": "block_output", "intervention_type": pyvene.VanillaIntervention},
        ]
        return pyvene.IntervenableModel(pyvene.IntervenableConfig(representations=wanted), model=self.model)

    def heads(self, heads: Sequence[int], values: Sequence[Tensor]) -> Tensor:
        return torch.cat([self.head(layer, *one) for layer, one in enumerate(zip(heads, values, strict=True))])

    def head(self, layer: int, head: int, given: Tensor) -> Tensor:
        model, ids = self.swapping(layer), self.subject.corrupted
        places = {"sources->base": (None, [[[[head]] * len(ids), [[ids.shape[1] - 1]] * len(ids)]])}
        source = dict.fromkeys(model.sorted_keys, given[:, head, None, None])
        return self.subject.metric(model(inputs(ids), unit_locations=places, source_representations=source)[1].logits)

    @cache  # noqa: B019 - a study lives as long as the process
    def rotating(self) -> pyvene.IntervenableModel:
        kind = {"intervention_type": pyvene.LowRankRotatedSpaceIntervention, "low_rank_dimension": 64}
        wanted = [{"layer": DAS_LAYER, "component": "block_output", **kind}]
        return pyvene.IntervenableModel(pyvene.IntervenableConfig(representations=wanted), model=self.model)

    def das(self, matrix: Tensor) -> Tensor:
        model, subject = self.rotating(), self.subject
        (layer,) = (one.rotate_layer for one in model.interventions.values())
        if not torch.allclose(layer.weight, matrix, atol=1e-6):
            layer.weight = matrix
        model.disable_model_gradients()
        places = [[[subject.clean.shape[1] - 1]] * len(subject.clean)]
        with torch.enable_grad():
            _, found = model(inputs(subject.corrupted), [inputs(subject.clean)], {"sources->base": (places, places)})
            loss = torch.nn.functional.cross_entropy(found.logits[:, -1], subject.right)
        loss.backward()
        return loss.detach()[None]

    def cells(self, trace: Trace) -> Tensor:
        return torch.stack([self.cell(trace, layer, state) for layer, state in enumerate(trace.states)])

    def cell(self, trace: Trace, layer: int, state: Tensor) -> Tensor:
        model = self.noising(layer)
        places = {"sources->base": ([None, None], [[list(trace.places)], [[trace.position]]])}
        source = dict(zip(model.sorted_keys, (trace.noise[None], state[None, None]), strict=True))
        logits = model(inputs(trace.ids), unit_locations=places, source_representations=source)[1].logits
        return logits[0, -1].softmax(-1)[trace.answer]


def inputs(ids: Tensor) -> dict[str, Any]:
    return {"input_ids": ids, "use_cache": False}


if __name__ == "__main__":
    main("pyvene", works, Interventions, Studies)

"""pyvene: interventions that collect, on models built once. Its clones are its own; `unit` says what it gathers by."""

from collections.abc import Iterator, Sequence
from typing import Any

import pyvene
from engine import Case
from peer_table import EVERYTHING, PATTERNS
from peer_work import Sample, Work, main, twin
from torch import nn

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
    inputs = {"input_ids": case.ids, "use_cache": False}
    positions, heads = case.ids.shape[1], case.model.config.n_head
    values = collector(twin(case), PLACES, "pos", positions)
    patterns = collector(twin(case), ["attention_weight"], "h", heads)

    def collect(model: pyvene.IntervenableModel, units: int) -> Any:
        return model(inputs, unit_locations={"base": list(range(units))})

    yield Work(EVERYTHING, "Collect, 11 places a layer", lambda: collect(values, positions), collected)
    yield Work(PATTERNS, "Collect attention_weight", lambda: collect(patterns, heads), patterned)


def collected(result: Any) -> Sample:
    (_, values), output = result
    return Sample(values, logits=output.logits)


def patterned(result: Any) -> Sample:
    (_, values), output = result
    return Sample(values, values, output.logits)


if __name__ == "__main__":
    main("pyvene", works)

"""torchlens: it wraps every function of torch at its first trace and leaves them wrapped; the plain forward pays it too."""

from collections.abc import Iterator
from typing import Any

import torchlens
from engine import Case
from peer_table import EVERYTHING, GRAPH, PATTERNS, WITH_GRAPH
from peer_work import Sample, Work, main, twin

NO_CACHE = {"use_cache": False}


def works(case: Case) -> Iterator[Work]:
    model, ids = twin(case), case.ids
    none = torchlens.options.CaptureOptions(layers_to_save="none")
    softmax = torchlens.func("softmax")

    yield Work(WITH_GRAPH, "trace", lambda: torchlens.trace(model, ids, NO_CACHE), traced)
    yield Work(
        EVERYTHING, "record(default_op=True)", lambda: torchlens.record(model, ids, NO_CACHE, default_op=True), recorded
    )
    yield Work(
        PATTERNS, "record(save=func('softmax'))", lambda: torchlens.record(model, ids, NO_CACHE, save=softmax), patterns
    )
    yield Work(GRAPH, "trace(layers_to_save='none')", lambda: torchlens.trace(model, ids, NO_CACHE, capture=none), graph)


def traced(trace: Any) -> Sample:
    """Its entries are the ops, the input and the output."""
    saved = [(op.func_name, op.out) for op in trace.layer_list if op.has_saved_activation]
    return Sample(
        [out for _, out in saved], [out for name, out in saved if name == "softmax"], trace[trace.output_layers[0]].out
    )


def recorded(recording: Any) -> Sample:
    values = [record.ram_payload for record in recording.records]
    return Sample(values, [record.ram_payload for record in recording.records if "softmax" in record.ctx.label])


def patterns(recording: Any) -> Sample:
    values = [record.ram_payload for record in recording.records]
    return Sample(values, values)


def graph(trace: Any) -> Sample:
    return Sample(ops=[op.func_name for op in trace.layer_list if not (op.is_input or op.is_output)])


if __name__ == "__main__":
    main("torchlens", works)

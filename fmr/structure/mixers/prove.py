"""What a part adds to a stream, proven to be a mixer: the first of the ways to read it that is certified, or why none is."""

from fmr.errors import StructureError
from fmr.graph.execute import draws
from fmr.graph.graph import Graph
from fmr.structure.mixers.find import Term
from fmr.structure.mixers.measure import Measure
from fmr.structure.mixers.mixer import Mixer, as_measured, certify_mixer, measured
from fmr.structure.proof.certificate import Certificate
from fmr.structure.proof.evaluate import Values

ALONE = "what it writes at one position is made of that position alone"


def proven(graph: Graph, term: Term, value: Values) -> tuple[Mixer, Certificate]:
    """What a term is, with its certificate; a `StructureError` with the reason where it is no mixer, which is empty where
    nothing looks like one. Where random numbers are drawn, the first reading is returned though it is not certified."""
    if term.stacked:
        raise StructureError("it is made of convolutions over all units without a gate, as in a stack of these")
    measure = Measure(graph, term.reads, term.write, term.axis, value)
    if not term.readings and not measure.direction(term.outputs[-1]):
        raise StructureError("")
    told = measured(graph, term.outputs, measure)
    if not term.told:
        raise StructureError(
            f"it brings together dimension {term.axis} of {term.write}, and nothing tells whether that counts positions or "
            f"examples"
        )
    failed: list[tuple[Mixer, str, Certificate | None]] = []
    for reading in term.readings:
        found, made, why = as_measured(reading, told, measure), None, ""
        try:
            made = certify_mixer(found, measure)
        except StructureError as error:
            why = str(error)
        if made is not None and made.ok:
            return found, made
        failed.append((found, why if made is None else made.why, made))
    if any(draws(node) for node in graph.between(term.reads[0], told.output)):
        for found, _, made in failed:
            if made is not None:
                return found, made
    heard = f"positions hear one another there ({told.direction}), in no way that is known"
    read = f": read as {failed[0][0].kind}, {failed[0][1]}" if failed else ""
    raise StructureError(heard + read)

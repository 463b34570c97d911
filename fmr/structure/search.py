"""One search over a graph: a step that fails costs one finding, and what cannot be proven is noted with its reason."""

from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from functools import partial
from typing import Any, TypeVar

from fmr.errors import IdError, RandomError, StructureError
from fmr.graph.execute import draws
from fmr.graph.graph import Graph
from fmr.graph.places import at_place
from fmr.ids import Site, TensorId
from fmr.nests import replaced
from fmr.structure.attention.attention import Attention
from fmr.structure.attention.halves import Half
from fmr.structure.memories.memory import Memory
from fmr.structure.memories.router import Router
from fmr.structure.mixers.mixer import Mixer
from fmr.structure.parts import Layer, Structure
from fmr.structure.proof.certificate import Certificate, Rejected
from fmr.structure.proof.evaluate import Doubles, Values, why_unproving
from fmr.structure.streams.stream import Stream

Found = TypeVar("Found")
Answer = TypeVar("Answer")
Default = TypeVar("Default")
Part = TypeVar("Part", Attention, Memory, Mixer, Router, Layer, Structure, Stream)
Proven = TypeVar("Proven", Attention, Memory, Router, Stream)

Proof = Callable[[Graph, Found, Values], Certificate]
"""Recomputes a finding from the values of a run."""

RAGGED = (
    "its rows differ in length (a nested tensor), which fmr does not take apart; torch.nested.to_padded_tensor pads them, "
    "and nn.TransformerEncoder(..., enable_nested_tensor=False) makes none"
)


class Search:
    """One search: the graph with fused ops written out, where values come from, and what was rejected so far."""

    def __init__(self, graph: Graph, value: Values | None) -> None:
        self.model, self.graph, self.value = graph.model, graph.unfused, value
        self.rejected: list[Rejected] = []

    @property
    def end(self) -> TensorId:
        """What stands for a graph as a whole: the last of its values."""
        return self.graph.nodes[-1].id

    def tried(self, name: TensorId, what: str, look: Callable[[], Answer], otherwise: Default) -> Answer | Default:
        """What a step of the search says; where it fails at a value, that is noted: one bad spot costs one finding."""
        try:
            return look()
        except IdError:
            raise
        except Exception as error:  # whatever an op that nobody foresaw does to a matcher
            said = f"{type(error).__name__}: {error}".partition("\n")[0]
            reason = RAGGED if self.is_ragged() else f"looking at it failed ({said}); please report it"
            if reason != RAGGED or all(one.reason != RAGGED for one in self.rejected):
                self.rejected.append(Rejected(name, what, reason))
            return otherwise

    def is_ragged(self, *names: TensorId) -> bool:
        """Whether rows of one of these values differ in length, or of any."""
        return any(-1 in node.shape for node in (map(self.graph.__getitem__, names) if names else self.graph.nodes))

    def every(self, what: str, look: Callable[..., Iterable[Answer]], *given: object) -> list[Answer]:
        """All that a step of the search finds; nothing where it fails."""
        return self.tried(self.end, what, lambda: list(look(*given)), [])

    def placed(self, part: Part) -> Part:
        """A part whose sites know where their values are made."""
        place = partial(at_place, self.graph)
        sites: dict[str, Any] = {one.name: replaced(getattr(part, one.name), Site, place) for one in fields(part)}
        if isinstance(part, Attention) and part.minus is not None:
            sites["minus"] = Half(*replaced(tuple(part.minus), Site, place))
        return replace(part, **sites)

    def nothing(self, name: TensorId) -> str:
        """Why a value proves nothing, whatever it is; empty where it may, and where it is not known."""
        if self.is_ragged(name):
            return RAGGED
        try:
            return why_unproving([name], self.value) if self.value is not None else ""
        except IdError:
            return ""

    def claimed(self, certify: Proof[Proven], found: Proven, what: str, start: TensorId, end: TensorId) -> Proven | None:
        """A finding with its certificate; None where that fails."""
        certificate, ok = self.certify(certify, found, what, start, end)
        return replace(self.placed(found), certified=certificate) if ok else None

    def certify(
        self, certify: Proof[Found], found: Found, what: str, start: TensorId, end: TensorId
    ) -> tuple[Certificate | None, bool]:
        """The certificate of a finding, and whether it may be claimed; otherwise the reason is noted."""
        if self.value is None:
            return None, True
        try:
            if what == "mixer" and (nothing := why_unproving([end], self.value)):
                raise StructureError(nothing)
            certificate = certify(self.graph, found, Doubles(self.value))
        except IdError as error:
            if not isinstance(error, RandomError):
                raise
            reason = f"it cannot be recomputed: {error}"
        except StructureError as error:
            reason = str(error)
        except Exception as error:  # whatever a weight's own class raises
            reason = f"it cannot be recomputed: {str(error) or type(error).__name__}".partition("\n")[0]
            reason = RAGGED if self.is_ragged(start, end) else reason
        else:
            if certificate.ok:
                return certificate, True
            random = next((node for node in self.graph.between(start, end) if draws(node)), None)
            reason = certificate.why
            if random is not None:
                active, remedy = "it draws random numbers", ""
                if "dropout" in random.op:
                    active, remedy = "dropout is active", "; run the model in eval mode"
                reason = f"{active} ({random.id}), so it cannot be recomputed{remedy}"
        self.rejected.append(Rejected(end if what in ("residual stream", "mixer") else start, what, reason))
        return None, False

"""What a value is to the matchers: the roles that it has, or how far it came and what stopped it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fmr.graph.graph import Graph
from fmr.ids import Site, TensorId
from fmr.nodes import Node
from fmr.structure.attention.attention import Attention
from fmr.structure.attention.scores import scores_go_on
from fmr.structure.layer import Layer
from fmr.structure.memories.memory import Memory
from fmr.structure.memories.router import Router
from fmr.structure.mixers.mixer import Mixer
from fmr.structure.normal.form import form_of
from fmr.structure.normal.match import depends_on
from fmr.structure.normal.value import Value
from fmr.structure.normal.vocabulary import CELLS
from fmr.structure.normal.walks import walk
from fmr.structure.proof.certificate import Rejected
from fmr.structure.streams.stream import Stream
from fmr.structure.streams.writes import why_no_write

Part = Attention | Memory | Mixer | Router | Layer | Stream

_ROLES: dict[type, dict[str, str]] = {
    Attention: {
        "q": "queries",
        "k": "keys",
        "v": "values",
        "scores": "scores",
        "softmax": "softmax",
        "pattern": "pattern",
        "z": "mixed values",
        "out": "output",
    },
    Memory: {
        "source": "input",
        "up": "first projection",
        "pre": "pre-activations",
        "post": "coefficients",
        "down": "second projection",
        "out": "output",
        "w_in": "weight of the keys",
        "w_gate": "weight of the gates",
        "w_out": "weight of the values",
    },
    Mixer: {"output": "output"},
    Router: {"logits": "scores", "weights": "weights of experts", "indices": "chosen experts", "write": "output"},
    Layer: {"resid_pre": "stream before", "resid_mid": "stream within", "resid_post": "stream after"},
}
"""The roles of the values of a part, in the order of the dataflow, each with what it is called."""

_STEPS: dict[type, tuple[str, ...]] = {
    Attention: ("q scores", "k scores", "scores softmax", "softmax pattern", "pattern z", "v z", "z out"),
    Router: ("logits weights", "weights write"),
    Memory: ("source up", "up pre", "pre post", "source post", "post down", "down out"),
}
"""Between which roles of a part values may lie."""

_KINDS = {
    "input": "comes from outside",
    "weight": "is a weight",
    "constant": "is a constant: no input flows into it",
    "move": "is {0}, laid out otherwise ({ops})",
    "join": "lays values together: {0}",
    "projection": "is a projection of {0}",
    "product": "is a product of activations: {0}",
    "softmax": "is a softmax of {0}",
    "norm": "is a norm of {0}",
    "statistic": "is told of many numbers of {0} ({ops})",
    "affine": "is {0}, scaled, shifted or masked ({ops})",
    "bend": "is a function of {0}, number by number ({ops})",
    "gate": "multiplies or divides number by number: {0}",
    "sum": "is a sum: {0}",
    "op": "is made by {op} of {0}",
}
"""What a value of the normal form is, of which values."""

_OPS = {"log_softmax": "is the logarithm of a softmax of {0}"}
"""The same of ops that are more than their kind says."""

_FEW = 3
"""How many names are told of several."""


@dataclass(frozen=True)
class Explanation:
    """What a value is to the matchers, in words; `roles` are those in findings, `rejected` says what it is not."""

    id: TensorId
    text: str = field(repr=False)
    roles: tuple[str, ...] = ()
    rejected: tuple[Rejected, ...] = ()

    def __repr__(self) -> str:
        return self.text


class Explainer:
    """The values of a graph with the parts that were found there and what was rejected."""

    def __init__(
        self,
        graph: Graph,
        parts: Mapping[str, Part],
        ends: Mapping[str, Site | None],
        rejected: Sequence[Rejected],
        proofless: str,
    ) -> None:
        self.graph, self.form, self.parts, self.proofless = graph, form_of(graph), parts, proofless
        self.roles: dict[TensorId, dict[str, list[str]]] = {}
        for name, part in parts.items():
            for one, role in _roles_of(part):
                self.roles.setdefault(one, {}).setdefault(name, []).append(role)
        for what, site in ends.items():
            if site is not None:
                self.roles.setdefault(site.id, {}).setdefault("the model", []).append(what)
        self.rejected: dict[Value, list[Rejected]] = {}
        for no in rejected:
            self.rejected.setdefault(self.form[no.id], []).append(no)

    def of(self, node: Node) -> Explanation:
        """What a value is."""
        held, refused = self.roles.get(node.id, {}), self.rejected.get(self.form[node.id], [])
        roles = tuple(f"the {_listed(words)} of {name}" for name, words in held.items())
        said = [f"is {_listed(roles)}"] if roles else []
        said += [f"is no {one.what}: {one.reason}" for one in refused]
        lies = [] if said else self._inside(node)
        said += lies
        told = " ".join(f"It {one}." if n else f"{node.id} {one}." for n, one in enumerate(said))
        proofs = " ".join(proof for name in held if (proof := self._proof(name)))
        more = "" if roles else self._made(node, bool(said))
        return Explanation(node.id, " ".join(one for one in (told, proofs, more) if one), roles, tuple(refused))

    # ---- what was found

    def _proof(self, name: str) -> str:
        """What a certificate says of a part."""
        part = self.parts.get(name)
        if part is None or isinstance(part, Layer) or (isinstance(part, Stream) and not part.writes):
            return ""
        certificate = part.certified
        if certificate is None:
            return f"{name} is not certified: {self.proofless}."
        return (
            f"{name} is certified: recomputed from its parts, it is at most {max(certificate.errors.values()):.0e} off "
            f"({certificate.tolerance:.0e} is allowed)."
        )

    def _inside(self, node: Node) -> list[str]:
        """Between which roles of a finding a value lies."""
        near = {one.id for one in (*self.graph.ancestors(node), *self.graph.descendants(node))}
        for name, part in self.parts.items():
            ids = {role: one for one, role in _roles_of(part)}
            for start, end in _steps_of(part):
                places = [self.graph.place(ids[role]) for role in (start, end) if ids.get(role) in near]
                if len(places) == 2 and places[0] < self.graph.place(node) < places[1]:
                    return [f"lies inside {name}, between its {start} and its {end}"]
        return []

    # ---- what was not

    def _made(self, node: Node, begun: bool) -> str:
        """What a value is made of, why no matcher claims it, and which findings read it."""
        value, who = self.form[node.id], "It" if begun else node.id
        if value.node is not node:
            handed = f"{who} hands on {self._named(value.id)}, by {node.op}."
            return handed if begun or value.id in self.roles else f"{handed} {self.of(value.node)!r}"
        of = _some(self._named(one.id) for one in value.inputs) or "nothing that comes in"
        ops = ", ".join(dict.fromkeys(one.op for one in value.folded or (node,)))
        said = [f"{who} {_OPS.get(value.op, _KINDS[value.kind]).format(of, op=node.op, ops=ops)}."]
        reason = "" if begun else self._why(value)
        said += [f"{reason}."] if reason else []
        return " ".join([*said, self._read(node, value)])

    def _named(self, name: TensorId) -> str:
        held = self.roles.get(name, {})
        return f"{name} ({_some(f'the {_listed(words)} of {part}' for part, words in held.items())})" if held else str(name)

    def _why(self, value: Value) -> str:
        """What keeps a value from being a part of a finding; empty where its kind is none that a matcher asks for."""
        if value.kind == "projection":
            carried = self._carried()
            way = self.form[value.operands[0]].above(lambda one: one.kind != "projection" and one.id not in carried)
            ends = _some(self._named(one.id) for one in way if one.id in carried or one.kind in ("input", "projection"))
            return f"It is no second projection of a memory: none lies between it and {ends or 'what it reads'}"
        if value.kind == "product":
            return self._why_no_scores(value)
        if value.node.op in CELLS and not any(depends_on(self.graph, one, value.id) for one in self._added()):
            return "It is no part of a mixer: what it makes is added to no residual stream"
        if value.kind in ("sum", "affine") and value.node.op == "add":
            streams = [one for one in self.parts.values() if isinstance(one, Stream)]
            return f"It is no write to a residual stream: {why_no_write(self.graph, value.node, streams)}"
        return ""

    def _added(self) -> Iterator[TensorId]:
        """What is added to streams."""
        return (write.added for one in self.parts.values() if isinstance(one, Stream) for write in one.writes)

    def _carried(self) -> frozenset[TensorId]:
        """Beyond which values no memory reaches: those of streams, and what heads mix."""
        streams = (one for one in self.parts.values() if isinstance(one, Stream) and one.writes)
        heads = (one.z.id for one in self.parts.values() if isinstance(one, Attention))
        return frozenset(self.form[name].id for name in (*heads, *(point for one in streams for point in one.points)))

    def _why_no_scores(self, value: Value) -> str:
        """Why a product is none of queries with keys."""
        for one, stop in self._down(value):
            if one.kind == "softmax":
                return f"It is no product of queries and keys: {stop.id if stop else one.id} lies between it and {one.id}"
        return "It is no product of queries and keys: no softmax is made of it before it is multiplied or projected again"

    def _down(self, value: Value) -> Iterator[tuple[Value, Value | None]]:
        """What is made of a product, each with the first value on the way through which no scores go."""

        def onward(step: tuple[Value, Value | None]) -> Iterator[tuple[Value, Value | None]]:
            for user in step[0].users:
                if user.kind not in ("product", "projection"):
                    yield user, step[1] or (None if scores_go_on(user) or user.kind == "softmax" else user)

        return walk([(value, None)], onward)

    def _read(self, node: Node, value: Value) -> str:
        """The findings that read a value, as what; else the nearest candidate that was rejected below it."""
        held, refused = self._below(node)
        if held:
            return f"It goes into {_some(f'the {_listed(words)} of {name}' for name, words in held.items())}."
        told = next((one for one in refused if self.form[one.id] is not value), None)
        return f"It goes into no finding; of what is made of it, {told!r}." if told else "It goes into no finding."

    def _below(self, node: Node) -> tuple[dict[str, list[str]], list[Rejected]]:
        """The roles that what is made of a value has, where none other lies between, and what was rejected on the way."""
        held: dict[str, list[str]] = {}
        refused: list[Rejected] = []

        def onward(name: TensorId) -> list[TensorId]:
            return [one.id for one in self.graph.readers(name)] if name == node.id or name not in self.roles else []

        for here in walk([node.id], onward):
            for name, words in self.roles.get(here, {}).items() if here != node.id else ():
                held[name] = list(dict.fromkeys((*held.get(name, ()), *words)))
            refused += self.rejected.get(self.form[here], [])
        return held, refused


def _steps_of(part: Part) -> Iterator[tuple[str, str]]:
    """Between which values of a part, as they are called, others may lie."""
    if isinstance(part, Mixer):
        yield from ((f"input {n}", "output") for n in range(len(part.inputs)))
    for step in _STEPS.get(type(part), ()):
        start, end = step.split()
        yield _ROLES[type(part)][start], _ROLES[type(part)][end]


def _roles_of(part: Part) -> Iterator[tuple[TensorId, str]]:
    """The values of a part, each with what it is called."""
    for role, word in _ROLES.get(type(part), {}).items():
        one = getattr(part, role)
        if one is not None:
            yield (one.id if isinstance(one, Site) else one), word
    if isinstance(part, Attention) and part.minus is not None:
        yield from ((one, word) for word, one in part.minus.roles.items())
    if isinstance(part, Mixer):
        yield from ((one.id, f"input {n}") for n, one in enumerate(part.inputs))
        yield from ((one.id, "gate") for one in part.gates)
        yield from ((one, f"state {n}") for n, one in enumerate(part.states))
    if isinstance(part, Stream):
        told = {write.after: f"value after write {n}" for n, write in enumerate(part.writes)}
        yield from ((write.added, f"addend of write {n}") for n, write in enumerate(part.writes))
        yield from ((one, told.get(one, f"point {n}" if part.writes else f"state {n}")) for n, one in enumerate(part.points))


def _listed(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else "".join(words)


def _some(words: Iterable[str]) -> str:
    """A few of several, and how many there are besides."""
    known = list(words)
    rest = [f"{len(known) - _FEW} more"] if len(known) > _FEW + 1 else []
    return _listed([*known[: _FEW if rest else None], *rest])

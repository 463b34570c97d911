"""Who makes what a write adds to the stream: heads, memories, or something else, and in which layer."""

from collections.abc import Callable

from analyzers.circuits.ways import sources
from fmr.graph.graph import Graph
from fmr.ids import TensorId
from fmr.structure.parts import Attention, Memory, Structure
from fmr.structure.streams.stream import Write


class Writers:
    """The attentions and memories of the last stream by the values that their writes are made of."""

    def __init__(self, structure: Structure, graph: Graph) -> None:
        self.structure, self.graph = structure, graph
        self.heads: dict[TensorId, Attention] = {block.z.id: block for block in structure.attention}
        self.memories: dict[TensorId, Memory] = {memory.post.id: memory for memory in structure.mlps}
        writes = structure.residual.writes
        self.points = {name for write in writes for name in (write.before, write.after)}
        ends = [layer.resid_post.id for layer in structure.layers if layer.resid_post.id in self.points]
        self.ends = [graph.place(name) for name in ends or [write.after for write in writes]]

    def made_of(self, write: Write) -> tuple[list[TensorId], bool]:
        """The values of heads and memories that a write is made of, in order, and whether states of the stream are, too."""
        known = self.heads.keys() | self.memories.keys()
        found = {write.added} if write.added in known else sources(self.graph, write.added, known | self.points)
        return sorted(found & known, key=self.graph.place), bool(found & self.points)

    def kind(self, write: Write) -> str:
        """Whether "attention" or "mlp", "block" for both at once, "write" for neither, wrote it."""
        own, _ = self.made_of(write)
        kinds = {"attention" if name in self.heads else "mlp" for name in own}
        return "write" if not kinds else "block" if len(kinds) > 1 else kinds.pop()

    def layer(self, write: Write) -> int:
        """The number of the layer of this stream that a write belongs to; without layers its own."""
        place = self.graph.place(write.after)
        return sum(end < place for end in self.ends)


def named(structure: Structure, graph: Graph) -> Callable[[Write], str]:
    """A name for each write of a stream, such as "mlp 3"; where a layer has several of a kind, they are numbered."""
    writers, seen, names = Writers(structure, graph), dict[str, int](), dict[TensorId, str]()
    for write in structure.residual.writes:
        name = f"{writers.kind(write)} {writers.layer(write)}"
        seen[name] = seen.get(name, 0) + 1
        names[write.after] = name if seen[name] == 1 else f"{name} ({seen[name]})"
    return lambda write: names[write.after]

"""Who wrote a logit: a direction at the end of the stream, followed back along its writes with the scales of norms held."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from analyzers.lenses.writers import Writers
from analyzers.protocol import AnalyzerError
from fmr.errors import StructureError
from fmr.ids import TensorId
from fmr.runs.run import Run
from fmr.structure.axes import ROWS
from fmr.structure.frozen import Frozen, frozen
from fmr.structure.parts import Structure
from fmr.structure.streams.stream import Write


class Part(NamedTuple):
    """What a part of the model adds to weighed logits: (draws, examples), or (draws, examples, heads or memories).

    `whole` says why it was not taken apart further.
    """

    kind: str
    layer: int
    value: Tensor
    whole: str = ""


class Backward:
    """The parts of weighed logits, from the last write of a stream to the embedding.

    >>> stream = run[structure.residual.writes[-1].after]
    >>> [part.kind for part in Backward(structure, run, 1).parts(torch.zeros(1, *stream.shape))][-2:]
    ['bias', 'embedding']
    """

    def __init__(self, structure: Structure, run: Run, examples: int) -> None:
        self.structure, self.run, self.graph = structure, run, run.graph.unfused
        self.writes, self.examples = structure.residual.writes, examples
        self.writers = Writers(structure, self.graph)

    def parts(self, directions: Tensor) -> Iterator[Part]:
        """Each part's share of directions (draws, *stream) at the end of the stream."""
        later: TensorId | None = None
        for write in reversed(self.writes):
            if later not in (None, write.after):
                directions, rest = self._between(write.after, later, directions)
                yield Part("bias", self.writers.layer(write), rest)
            yield from self._written(write, directions)
            later = write.before
        yield Part("embedding", -1, self._by_example(directions * self._value(self.writes[0].before)))

    def _value(self, name: TensorId) -> Tensor:
        return self.run[name].detach().double()

    def _by_example(self, product: Tensor) -> Tensor:
        """A product (draws, *stream) summed over all but draws and examples; a stream may hold all tokens as rows."""
        return product.reshape(len(product), self.examples, -1).sum(-1)

    def _between(self, start: TensorId, end: TensorId | None, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Directions before what happens to the stream between two writes, and what that adds."""
        assert end is not None
        try:
            way = frozen(self.graph, end, {start: self.run[start]}, self.run.__getitem__)
        except StructureError as error:
            raise AnalyzerError(
                f"{self.structure.model} changes its residual stream between two writes, {start} and {end}, so that its end "
                f"is no sum over what was written: {error}"
            ) from error
        return way.back(directions)[start], self._by_example(directions * way.rest)

    def _written(self, write: Write, directions: Tensor) -> Iterator[Part]:
        """The heads, memories and biases in what one write adds."""
        added, layer = write.times * directions, self.writers.layer(write)
        own, besides = self.writers.made_of(write)
        try:
            if not own:
                raise StructureError("it is made of no attention and no memory that fmr.locate found")
            way = frozen(self.graph, write.added, {name: self.run[name] for name in own}, self.run.__getitem__)
            found = list(self._single(way, added, layer))
        except StructureError as error:
            whole = self._by_example(added * self._value(write.added))
            yield Part(self.writers.kind(write), layer, whole, str(error))
            return
        yield from found
        yield Part("write" if besides else "bias", layer, self._by_example(added * way.rest))

    def _single(self, way: Frozen, added: Tensor, layer: int) -> Iterator[Part]:
        for name, gradient in way.back(added).items():
            product = gradient * way.given[name].detach()
            if name in self.writers.heads:
                block = self.writers.heads[name]
                kind, layout = "cross head" if block.kind == "cross" else "head", list(block.z.layout or ())
                if block.n_heads == 1 and not any("heads" in one for one in layout):  # a head that is called by itself
                    product, layout = product.unsqueeze(-1), [*layout, "heads"]
                yield Part(kind, layer, self._by_axes(product, layout, "heads", name))
            else:
                memory = self.writers.memories[name]
                layout = list(memory.post.layout or ("examples", "positions", "units")[-product.dim() + 1 :])
                if product.shape[1:-1] == added.shape[1:-1]:  # what the stream's dimensions count is known
                    layout = ["examples*positions", ""] if product.dim() == 3 else ["examples", "positions", ""]
                layout[memory.axis] = "memories"
                yield Part("mlp", layer, self._by_axes(product, layout, "memories", name))

    def _by_axes(self, product: Tensor, layout: Sequence[str], axis: str, name: str) -> Tensor:
        """A product (draws, ...) summed over all but draws, examples and one more axis."""
        names = ["draws", *layout]
        if axis == "heads" and ROWS in names and product.shape[names.index(ROWS)] == self.examples:
            names[names.index(ROWS)] = "examples"  # tokens as rows, of one position each
        for joint in [one for one in names if one in (f"examples*{axis}", "examples*positions")]:
            at = names.index(joint)
            product = product.unflatten(at, (self.examples, -1))
            names[at : at + 1] = joint.split("*")
        if self.examples == 1 and "examples" not in names:
            product, names = product[:, None], ["draws", "examples", *names[1:]]
        if len(names) != product.dim() or not {"examples", axis} <= set(names):
            told = ", ".join(layout) or "nothing known"
            raise StructureError(f"the dimensions of {name} count {told}: expected examples and {axis} among them")
        product = product.movedim((names.index("examples"), names.index(axis)), (1, 2))
        return product.flatten(3).sum(-1) if product.dim() > 3 else product


def followed(directions: Tensor, columns: Tensor, stream: Tensor) -> Tensor:
    """Directions (draws, examples, width) at a column of each example, where the stream has it; zero elsewhere."""
    draws, examples, width = directions.shape
    found = directions.new_zeros(draws, examples, stream.numel() // (examples * width), width)
    found[:, torch.arange(examples), columns] = directions
    return found.view(draws, *stream.shape)

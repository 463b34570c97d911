"""A projection laid out as matrices: which weights lead from what it reads to what it makes, and where both stand."""

from typing import NamedTuple

import numpy as np
from torch import Tensor

from fmr.graph.graph import Graph
from fmr.nodes import Node
from fmr.structure.normal.einsum import of_projection
from fmr.structure.normal.match import Projection
from fmr.structure.normal.vocabulary import CONVOLUTIONS


class Laid(NamedTuple):
    """A projection laid out: its weights (groups, made, read, numbers of a kernel), and the letters of what it reads and
    makes. `apart` where each channel is read by itself alone; `windowed` for a convolution.
    """

    matrix: Tensor
    left: str
    read_letters: str
    result: str
    made_letters: str
    made_sizes: tuple[int, ...]
    apart: bool
    windowed: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """How many groups there are, and how much each makes and reads."""
        groups, made, read, _ = self.matrix.shape
        return groups, made, read

    def weights(self, order: int) -> Tensor:
        """The sizes of the weights, (groups, made, read): their norms over kernels."""
        matrix = self.matrix.detach().double().cpu()
        return matrix.abs().sum(-1) if order == 1 else matrix.square().sum(-1).sqrt()

    def rows(self, value: Tensor) -> Tensor:
        """What is read, (positions, groups, read): all places of it below each other."""
        lead = len(self.left) - len(self.read_letters)
        turned = value.permute([self.left.index(letter) for letter in self.letters])
        slim = narrow(turned, tuple(range(lead)))
        groups, _, wide = self.shape
        return slim.reshape(-1, groups, wide)

    @property
    def letters(self) -> str:
        """The letters of what is read: positions, groups, then what is summed over."""
        return "".join(letter for letter in self.left if letter not in self.read_letters) + self.read_letters

    def results(self, value: Tensor) -> Tensor:
        """What is made, (positions, groups, made): all places of it below each other."""
        letters = "".join(letter for letter in self.result if letter not in self.made_letters) + self.made_letters
        groups, many, _ = self.shape
        return value.permute([self.result.index(letter) for letter in letters]).reshape(-1, groups, many)

    def made(self, units: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A number for each thing that is made, in the shape of the result."""
        return spread(units.reshape(self.made_sizes), self.made_letters, self.result, shape)


def laid_out(graph: Graph, node: Node, found: Projection, weight: Tensor) -> Laid | None:
    """The weights of a projection as matrices; None for a layout that is not known."""
    word = of_projection(graph, found)
    if len(word.result) != len(node.shape) or len(word.right) != weight.dim():
        return None
    right, strides = word.right, weight.stride()
    sizes = dict(zip(right, weight.shape, strict=True))
    shared = [letter for n, letter in enumerate(right) if letter in word.batch and (strides[n] == 0 or sizes[letter] == 1)]
    if shared:
        weight = weight[tuple(0 if letter in shared else slice(None) for letter in right)]
        right = "".join(letter for letter in right if letter not in shared)
    batch = "".join(letter for letter in word.batch if letter not in shared)
    summed, free = word.contracted, word.free(word.right)
    kernel = "".join(letter for letter in right if letter not in batch + summed + free)
    if not summed or not free or (kernel and node.op not in CONVOLUTIONS):
        return None
    matrix = weight.permute([right.index(letter) for letter in batch + free + summed + kernel])
    count = int(np.prod([sizes[letter] for letter in batch]))
    made = int(np.prod([sizes[letter] for letter in free]))
    groups = int(node.argument("groups", 6, 1)) if node.op in CONVOLUTIONS else 1
    read = int(np.prod([sizes[letter] for letter in summed]))
    if "transpose" in node.op:
        matrix = matrix.reshape(made, groups, read // groups, -1).transpose(0, 1)
        made_sizes: tuple[int, ...] = (groups * made,)
    else:
        matrix = matrix.reshape(count * groups, made // groups, read, -1)
        made_sizes = tuple(sizes[letter] for letter in batch + free)
    apart = groups > 1 and matrix.shape[1:3] == (1, 1)
    return Laid(matrix, word.left, batch + summed, word.result, batch + free, made_sizes, apart, node.op in CONVOLUTIONS)


def spread_rows(laid: Laid, like: Tensor, units: Tensor, node: Node) -> Tensor | None:
    """The unit of each row of what a projection over positions reads, for all that it makes of the row."""
    letters = laid.letters
    turned = like.permute([laid.left.index(letter) for letter in letters])
    lead = len(letters) - len(laid.read_letters)
    rest = tuple(1 if turned.stride()[n] == 0 else size for n, size in enumerate(turned.shape[:lead]))
    if units.shape[0] != int(np.prod(rest)) or units.shape[1] != 1:
        return None
    return spread(units.reshape(rest), letters[:lead], laid.result, node.shape)


def spread(value: Tensor, letters: str, result: str, shape: tuple[int, ...]) -> Tensor:
    """A value whose dimensions have letters, repeated to the shape of one that has more of them."""
    kept = [n for n, letter in enumerate(letters) if letter in result]
    value = value[tuple(slice(None) if n in kept else 0 for n in range(len(letters)))]
    letters = "".join(letters[n] for n in kept)
    turned = value.permute([letters.index(letter) for letter in result if letter in letters])
    return turned[tuple(slice(None) if letter in letters else None for letter in result)].expand(shape)


def narrow(value: Tensor, dims: tuple[int, ...] | None = None) -> Tensor:
    """A value without repetition: dimensions along which it is one number for all have size one."""
    one = [n for n, (size, stride) in enumerate(zip(value.shape, value.stride(), strict=True)) if size > 1 and stride == 0]
    one = [n for n in one if dims is None or n in dims]
    return value[tuple(slice(0, 1) if n in one else slice(None) for n in range(value.dim()))] if one else value

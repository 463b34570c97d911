"""An edit that is learned: no source is read, what shall stand there is a function of the value."""

import torch
from torch import Tensor, nn

from fmr.edits.values import Context, uncast
from fmr.subspaces.trained import Rotation


class LoReFT(nn.Module):
    """A learned edit within a learned subspace: what stands there is a linear function of the value (Wu et al. 2024).

    >>> steering = fmr.Intervention({structure.layers[2].resid_post.at(positions=-1): edits.LoReFT(128, 4)})
    >>> reft = edits.LoReFT(128, 4)       # texts with their answers: at the last token of each prompt, which is not at -1
    >>> steering = fmr.Intervention({structure.layers[2].resid_post.at(positions=[[4], [6]]): reft})

    width: how many numbers a vector has. size: of the subspace. v goes to v + (v W^T + b - v R) R^T, with R of shape
    (width, size) orthonormal; W begins as R and b as 0, so that at first nothing changes.
    """

    def __init__(self, width: int, size: int, seed: int = 0) -> None:
        super().__init__()
        self.rotation = Rotation(width, size, seed)
        self.width, self.size = self.rotation.width, self.rotation.size
        self.weight = nn.Parameter(self.rotation.matrix.detach().T.clone())
        self.bias = nn.Parameter(torch.zeros(self.size))

    def __repr__(self) -> str:
        return f"LoReFT({self.width}, {self.size})"

    def __call__(self, value: Tensor, context: Context) -> Tensor:
        with uncast(value):
            wanted = torch.nn.functional.linear(value.to(self.weight.dtype), self.weight, self.bias)
            return self.rotation.now().write(value, wanted)

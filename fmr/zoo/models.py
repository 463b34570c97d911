"""The zoo's own architectures: plain modules, whose attribute names are what their IDs begin with."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MLP(nn.Module):
    """Linear layers with ReLU between them.

    >>> MLP([16, 16, 16, 2])(torch.randn(5, 16)).shape
    torch.Size([5, 2])

    widths: of the input, each hidden layer, and the output (logits). An input of more dimensions is flattened. What
    hidden layer i passes on is `/relu#i`; `hidden.{i}/linear#0` is the same before the nonlinearity.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        *inner, last, classes = widths
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in zip(inner, [*inner[1:], last], strict=True))
        self.output = nn.Linear(last, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer in self.hidden:
            x = F.relu(layer(x))
        return self.output(x)  # type: ignore[no-any-return]


class CNN(nn.Module):
    """Two convolutions, each with ReLU and pooling to half the size, and a linear read-out.

    >>> CNN(channels=[1, 16, 32], size=8, classes=10)(torch.randn(5, 1, 8, 8)).shape
    torch.Size([5, 10])

    channels: of the image, the first and the second convolution. size: height and width of the image, divisible by 4.
    """

    def __init__(self, channels: Sequence[int], size: int, classes: int) -> None:
        super().__init__()
        image, first, second = channels
        self.conv1 = nn.Conv2d(image, first, 3, padding=1)
        self.conv2 = nn.Conv2d(first, second, 3, padding=1)
        self.output = nn.Linear(second * (size // 4) ** 2, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.output(x.flatten(1))  # type: ignore[no-any-return]


class GRU(nn.Module):
    """A gated recurrent network that reads symbols one by one and classifies by its last state.

    >>> GRU(symbols=8, width=32, classes=2)(torch.randint(8, (5, 10))).shape
    torch.Size([5, 2])

    symbols: how many there are. width: of their embeddings and of the state. classes: of the output (logits).
    """

    def __init__(self, symbols: int, width: int, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, width)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.output = nn.Linear(width, classes)

    def forward(self, symbols: Tensor) -> Tensor:
        states, _ = self.gru(self.embedding(symbols))
        return self.output(states[:, -1])  # type: ignore[no-any-return]


class Superposed(nn.Module):
    """Several toy models at once, each with more features than dimensions: ReLU(W W^T x + b) (Elhage et al. 2022).

    >>> Superposed(instances=10, features=5, width=2)(torch.rand(8, 10, 5)).shape
    torch.Size([8, 10, 5])

    instances: how many models. features, width: of each. `weights[i]` holds the direction of each feature of model i as a
    row, (features, width); what model i knows of its input is `weights[i].T @ x`.
    """

    def __init__(self, instances: int, features: int, width: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.empty(instances, features, width))
        self.bias = nn.Parameter(torch.zeros(instances, features))
        nn.init.xavier_normal_(self.weights)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("eif,ifw->eiw", x, self.weights)
        return F.relu(torch.einsum("eiw,ifw->eif", hidden, self.weights) + self.bias)


OWN: dict[str, type[nn.Module]] = {"MLP": MLP, "CNN": CNN, "GRU": GRU, "Superposed": Superposed}
"""The architectures by name, as cards write them."""

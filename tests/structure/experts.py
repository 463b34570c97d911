"""Feed-forward layers of which each position has some of several: in one parameter, or in a module each."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.structure.idioms import HIDDEN, WIDTH, remembers, weight
from tests.structure.memories import Squared

EXPERTS = 3


class Experts(nn.Module):
    """Every expert for every token, weighed by the router: matrices in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.up, self.down = weight(EXPERTS, WIDTH, HIDDEN), weight(EXPERTS, HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        post = remembers(torch.einsum("btm,emh->bteh", x, self.up).relu())
        out = torch.einsum("bteh,ehm->btem", post, self.down)
        return (out * self.router(x).softmax(-1).unsqueeze(-1)).sum(2)


class ExpertsEinsum(Experts):
    """The weighing is one more product."""

    def forward(self, x: Tensor) -> Tensor:
        post = remembers(torch.einsum("btm,emh->beth", x, self.up).relu())
        out = torch.einsum("beth,ehm->betm", post, self.down)
        return torch.einsum("betm,bte->btm", out, self.router(x).softmax(-1))


class ExpertsWeighedFirst(Experts):
    """The router weighs the coefficients."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("btm,emh->bteh", x, self.up).relu() * self.router(x).softmax(-1)[..., None]
        return torch.einsum("bteh,ehm->btm", remembers(hidden), self.down)


class ExpertsChosen(Experts):
    """The matrices of one expert are looked up for each position."""

    def forward(self, x: Tensor) -> Tensor:
        share, chosen = self.router(x).softmax(-1).max(-1)
        post = remembers(F.relu(torch.einsum("btm,btmh->bth", x, self.up[chosen])))
        return torch.einsum("bth,bthm->btm", post, self.down[chosen]) * share[..., None]


class ExpertsBatched(Experts):
    """All tokens repeated for each expert, and batched products."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(1, -1, WIDTH).expand(EXPERTS, -1, -1)
        out = torch.bmm(remembers(F.gelu(torch.bmm(rows, self.up))), self.down)
        share = self.router(x).softmax(-1).view(-1, EXPERTS).T.unsqueeze(-1)
        return (share * out).sum(0).view(x.shape)


class ExpertsEmptied(Experts):
    """The rows of tokens that no expert takes are set to zero before, between and after the products."""

    def forward(self, x: Tensor) -> Tensor:
        share, chosen = self.router(x).softmax(-1).max(-1)
        nobody = (chosen >= EXPERTS)[..., None]
        x = x.masked_fill(nobody, 0.0)
        hidden = torch.einsum("btm,btmh->bth", x, self.up[chosen]).masked_fill(nobody, 0.0)
        out = torch.einsum("bth,bthm->btm", remembers(F.relu(hidden)), self.down[chosen])
        return out.masked_fill(nobody, 0.0) * share[..., None]


class Modules(nn.Module):
    """Experts as modules, the best two of which see a token."""

    def __init__(self, best: int = 2) -> None:
        super().__init__()
        self.router, self.best = nn.Linear(WIDTH, EXPERTS, bias=False), best
        self.experts = nn.ModuleList(Squared() for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, WIDTH)
        share, chosen = self.router(rows).softmax(-1).topk(self.best, -1)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(chosen == number)
            if len(token):
                out.index_add_(0, token, expert(rows[token]) * share[token, place, None])
        return out.view(x.shape)


class ModulesMasked(Modules):
    """All experts run; a mask of the chosen weighs what they say."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x)
        share = scores.masked_fill(scores < scores.topk(self.best, -1).values[..., -1:], float("-inf")).softmax(-1)
        return sum(share[..., n : n + 1] * expert(x) for n, expert in enumerate(self.experts))


class ModulesWritten(Modules):
    """The best expert of a token, written into its rows."""

    def __init__(self) -> None:
        super().__init__(1)

    def forward(self, x: Tensor) -> Tensor:
        share, chosen = self.router(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            here = chosen == number
            if here.any():
                out[here] = share[here].unsqueeze(-1) * expert(x[here])
        return out


FOUND = (
    Experts,
    ExpertsEinsum,
    ExpertsWeighedFirst,
    ExpertsChosen,
    ExpertsBatched,
    ExpertsEmptied,
    Modules,
    ModulesMasked,
    ModulesWritten,
)

"""A language model without attention, in which memories are planted: what triggers each, and what each says."""

import torch
from torch import Tensor, nn

WORDS, WIDTH = 24, 32


class Planted(nn.Module):
    """Tokens as their own directions, and one layer of memories; memory i is triggered by token i and says token i + 1.

    With a gate, odd memories have negative coefficients and values that speak against that token.
    """

    def __init__(self, gated: bool = False, seed: int | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(torch.eye(WORDS, WIDTH))
        self.norm, self.out = nn.RMSNorm(WIDTH, eps=1e-5), nn.Linear(WIDTH, WORDS, bias=False)
        self.keys, self.values = nn.Linear(WIDTH, WORDS, bias=False), nn.Linear(WORDS, WIDTH, bias=False)
        self.gate = nn.Linear(WIDTH, WORDS, bias=False) if gated else None
        signs = torch.where(torch.arange(WORDS) % 2 == 1, -1.0, 1.0) if gated else torch.ones(WORDS)
        says = torch.eye(WIDTH, WORDS)
        says[:WORDS] = torch.eye(WORDS).roll(1, 0)
        if seed is not None:
            says = torch.randn(WIDTH, WORDS, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            self.out.weight.copy_(torch.eye(WORDS, WIDTH))
            self.keys.weight.copy_(torch.eye(WORDS, WIDTH) * signs[:, None])
            self.values.weight.copy_(says * signs)
            if self.gate is not None:
                self.gate.weight.copy_(torch.eye(WORDS, WIDTH))
        self.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.table(input_ids)
        up = self.keys(x)
        x = x + self.values(torch.relu(up) if self.gate is None else torch.nn.functional.silu(self.gate(x)) * up)
        return self.out(self.norm(x))


def counting_texts(n: int = 30, length: int = 6, seed: int = 0) -> Tensor:
    """Texts in which every token is followed by the next one."""
    starts = torch.randint(WORDS, (n, 1), generator=torch.Generator().manual_seed(seed))
    return (starts + torch.arange(length)) % WORDS


def random_texts(n: int = 30, length: int = 6, seed: int = 0) -> Tensor:
    return torch.randint(WORDS, (n, length), generator=torch.Generator().manual_seed(seed))

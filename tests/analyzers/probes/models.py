"""Small networks that say themselves what they know and what they use."""

import torch
from torch import Tensor, nn

WIDE = 12


class Two(nn.Module):
    """Two variables, the signs of the first two inputs, in a state of many numbers; what is read out uses one of them.

    The first two rows of `turn` are the directions in which they lie.
    """

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.turn = nn.Parameter(torch.linalg.qr(torch.randn(WIDE, WIDE, generator=draw)).Q)
        self.norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        state: Tensor = self.norm(torch.cat([x[:, :2].sign(), x[:, 2:]], 1) @ self.turn)
        return (state @ self.turn[1]).relu()


class Words(nn.Module):
    """Vectors of tokens, two layers that add to each what stood before it; padding changes nothing else."""

    def __init__(self, words: int = 20, wide: int = 8, layers: int = 2) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.vectors = nn.Embedding.from_pretrained(torch.randn(words, wide, generator=draw))
        self.layers = nn.ModuleList(nn.Identity() for _ in range(layers))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        state: Tensor = self.vectors(input_ids)
        if attention_mask is not None:
            state = torch.where(attention_mask[..., None] != 0, state, 1e3)
        for layer in self.layers:
            state = layer(state * 1.5)
        return state


def padded(rows: list[list[int]], side: str, labels: list[list[int]] | None = None) -> dict[str, Tensor]:
    """Rows of tokens as a batch that is padded on one side, with the labels of each token."""
    longest = max(map(len, rows))

    def filled(given: list[int], blank: int) -> list[int]:
        rest = [blank] * (longest - len(given))
        return rest + given if side == "left" else given + rest

    batch = {"input_ids": [filled(row, 0) for row in rows], "attention_mask": [filled([1] * len(row), 0) for row in rows]}
    if labels is not None:
        batch["labels"] = [filled(row, 1) for row in labels]  # padding has a label, and is not counted all the same
    return {name: torch.tensor(value) for name, value in batch.items()}

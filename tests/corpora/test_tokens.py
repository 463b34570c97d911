"""Whose tokens rows are of, where a model takes several kinds of tokens, or calls them otherwise."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmr
from fmr.errors import StoreError


class Halves(nn.Module):
    """An encoder and a decoder that hear nothing of each other; the decoder makes its tokens of labels where it has none."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.encoder, self.decoder = nn.Embedding(50, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Any:
        said = labels if decoder_input_ids is None else decoder_input_ids
        return self.encoder(self.words(input_ids)), self.decoder(self.words(said))


class Renamed(nn.Module):
    """A model whose arguments have names of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(50, 4), nn.Linear(4, 4)

    def forward(self, tokens: Tensor, mask: Tensor | None = None, key_padding_mask: Tensor | None = None) -> Tensor:
        found: Tensor = self.out(self.words(tokens))
        return found


HEARD, SAID = torch.arange(3, 11).view(2, 4), torch.arange(20, 28).view(2, 4)
PADDED, SHORT = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]), torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])


def rows(model: nn.Module, batch: dict[str, Tensor], site: str, to: Path, **names: str) -> list[list[int]]:
    found: list[list[int]] = fmr.collect(model.eval(), [batch], [site], to, progress=False, **names).index[:].tolist()  # type: ignore[arg-type]
    return found


def test_tokens_of_an_encoder_and_a_decoder_that_are_as_many_are_asked_for(tmp_path: Path) -> None:
    batch = {"input_ids": HEARD, "attention_mask": PADDED, "decoder_input_ids": SAID, "decoder_attention_mask": SHORT}
    with pytest.raises(
        StoreError, match=r"have 4 positions, and so may have 'decoder_input_ids' and 'input_ids': nothing tell"
    ):
        rows(Halves(), batch, "decoder", tmp_path / "refused")
    said = rows(Halves(), batch, "decoder", tmp_path / "said", tokens="decoder_input_ids")
    assert said == [[0, n, 20 + n] for n in range(4)] + [[1, n, 25 + n] for n in range(3)]
    model = Halves()
    heard = rows(model, batch, "encoder", tmp_path / "heard", tokens="input_ids")
    assert heard == [[0, n, 3 + n] for n in range(4)] + [[1, 0, 7], [1, 1, 8]]
    with pytest.raises(StoreError, match="may have 'input_ids' and 'decoder_input_ids'"):
        rows(Halves(), {"input_ids": HEARD, "attention_mask": PADDED, "labels": SAID}, "decoder", tmp_path / "labels")
    with pytest.raises(StoreError, match="collected otherwise: tokens was 'input_ids' and is None"):
        rows(model, {**batch, "decoder_input_ids": SAID[:, :3]}, "encoder", tmp_path / "heard")


def test_lengths_tell_them_apart(tmp_path: Path) -> None:
    batch = {"input_ids": HEARD, "attention_mask": PADDED, "decoder_input_ids": SAID[:, :3]}
    assert rows(Halves(), batch, "decoder", tmp_path / "a") == [[e, n, 20 + 4 * e + n] for e in range(2) for n in range(3)]
    assert len(rows(Halves(), batch, "encoder", tmp_path / "b")) == 6


def test_arguments_of_other_names_are_told(tmp_path: Path) -> None:
    batch = {"tokens": HEARD, "mask": PADDED}
    with pytest.raises(
        StoreError, match=r"Nothing tells whether 'mask' is 1 for a token or for padding. Expected mask='mask'"
    ):
        rows(Renamed(), batch, "out", tmp_path / "refused")
    assert rows(Renamed(), batch, "out", tmp_path / "v", tokens="tokens", mask="mask")[4:] == [[1, 0, 7], [1, 1, 8]]
    hidden = {"tokens": HEARD, "key_padding_mask": PADDED == 0}
    assert rows(Renamed(), hidden, "out", tmp_path / "w", tokens="tokens")[4:] == [[1, 0, 7], [1, 1, 8]]
    assert rows(Renamed(), {"tokens": HEARD}, "out", tmp_path / "x")[0] == [0, 0, -1]


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ({"tokens": "ids"}, r"tokens='ids': the batch has nothing there, and the sites have \(2, 4\)"),
        ({"tokens": "other"}, r"tokens='other': the batch has float32 of shape \(2, 4\) there"),
        ({"mask": "nothing"}, "mask='nothing': the batch has nothing there"),
        ({}, "'attention_mask' holds other numbers than 0 and 1. Expected 1 for a token"),
    ],
)
def test_names_of_something_else_are_refused(names: dict[str, str], told: str, tmp_path: Path) -> None:
    class Takes(Renamed):
        def forward(self, input_ids: Tensor, other: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(input_ids)

    batch = {"input_ids": HEARD, "other": torch.zeros(2, 4), "attention_mask": (PADDED - 1) * 1e9}
    with pytest.raises(StoreError, match=told):
        rows(Takes(), batch, "out", tmp_path / "v", **names)

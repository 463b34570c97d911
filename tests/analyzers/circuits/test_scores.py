"""Scores of edges are gradients and exact removals, as plain hooks have them."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from analyzers.circuits.board import Board
from analyzers.circuits.scores import by_gradients, by_removal
from analyzers.prompts import prompts
from fmr.sweeps import logit_diff
from tests.analyzers.circuits.byhand import ByHand, circuit, slopes
from tests.analyzers.circuits.test_board import METRIC, SHAPES, board_of, named, tokens


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("name", SHAPES)
def test_scores_are_the_differences_times_the_gradients(name: str, steps: int) -> None:
    shape = SHAPES[name]()
    board, hand = board_of(shape), ByHand(shape)
    scores = by_gradients(board, shape.model, prompts(tokens()[0], shape.model), steps)
    assert all(parameter.grad is None for parameter in shape.model.parameters())
    given = [slopes(hand, *tokens(), METRIC, 1 - step / steps) for step in range(1, steps + 1)]
    wiring = board.wiring
    for writer, reader in np.argwhere(wiring.allowed):
        edge = wiring.writers[writer], wiring.readers[reader]
        expected = sum(one[edge] for one in given) / steps / board.gap
        assert scores[writer, reader] == pytest.approx(expected, abs=1e-6, rel=1e-4)  # norms in float32
    assert not scores[~wiring.allowed].any()


class Straight(nn.Module):
    """A stream to which two memories without a nonlinearity of their own write; relu is open for all that comes in."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Embedding(32, 6), nn.Linear(6, 32, bias=False)
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)
        self.up2, self.down2 = nn.Linear(6, 12), nn.Linear(12, 6)
        for layer in (self.up, self.up2):
            nn.init.constant_(layer.bias, 50.0)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        x = x + self.down(self.up(x).relu())
        return self.out(x + self.down2(self.up2(x).relu()))


@pytest.mark.parametrize("steps", [1, 3])
def test_scores_are_exact_where_the_model_is_linear(steps: int) -> None:
    model = Straight().eval().double()
    clean, corrupted = (prompts(one, model) for one in tokens())
    board = Board(model, clean, corrupted, logit_diff(3, 7))
    scores = by_gradients(board, model, clean, steps)
    for writer, reader in np.argwhere(board.wiring.allowed):
        without = board.wiring.allowed.copy()
        without[writer, reader] = False
        assert scores[writer, reader] == pytest.approx(1 - board.share(board.test(without)), abs=1e-9)


@pytest.mark.parametrize("name", ["joint", pytest.param("grouped", marks=pytest.mark.long)])
def test_removal_is_the_greedy_search_by_hooks(name: str) -> None:
    shape, threshold = SHAPES[name](), 0.05
    board, hand = board_of(shape), ByHand(shape)
    scores, wiring = by_removal(board, threshold), board.wiring

    def off(kept: np.ndarray) -> float:
        with torch.no_grad():
            measured = METRIC(circuit(hand, *tokens(), named(board, kept)))
        return abs(1 - float((measured - board.corrupted).sum()) / board.gap)

    kept, before = wiring.allowed.copy(), 0.0
    for reader in reversed(range(len(wiring.readers))):
        for writer in reversed(np.flatnonzero(wiring.allowed[:, reader])):
            kept[writer, reader] = False
            now = off(kept)
            assert scores[writer, reader] == pytest.approx(now - before, abs=1e-8)
            if now - before < threshold:
                before = now
            else:
                kept[writer, reader] = True
    assert np.array_equal(kept, scores >= threshold)
    assert 0 < kept.sum() < wiring.allowed.sum()

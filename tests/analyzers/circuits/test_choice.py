"""Edges that carry nothing or tell nobody are no part of a circuit; a circuit has as many edges as were asked for."""

import numpy as np
import pytest

from analyzers import AnalyzerError
from analyzers.circuits.choice import connected, counted, strongest

FEEDS = np.array([[0, 1, 0], [0, 0, 1], [0, 0, 1], [0, 0, 0]], bool)
"""Writers: embedding, a, b. Readers: one of a, two of b, the logits."""
ALLOWED = np.array([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1]], bool)


def matrix(*edges: tuple[int, int]) -> np.ndarray:
    found = np.zeros((3, 4), bool)
    found[tuple(np.array(edges).T)] = True
    return found


@pytest.mark.parametrize(
    ("edges", "left"),
    [
        ([(0, 0), (1, 3)], [(0, 0), (1, 3)]),
        ([(0, 0), (0, 3)], [(0, 3)]),  # a hears and tells nobody
        ([(1, 3), (0, 3)], [(0, 3)]),  # a tells and hears nothing
        ([(0, 0), (1, 1), (2, 3)], [(0, 0), (1, 1), (2, 3)]),  # one reader is enough for b
        ([(0, 0), (1, 2), (0, 1)], []),
    ],
)
def test_edges_that_lead_nowhere_are_left_out(edges: list[tuple[int, int]], left: list[tuple[int, int]]) -> None:
    expected = matrix(*left) if left else np.zeros((3, 4), bool)
    assert np.array_equal(connected(matrix(*edges), FEEDS), expected)


def test_the_strongest_are_taken_until_there_are_as_many() -> None:
    strengths = np.zeros((3, 4))
    strengths[0, 0], strengths[1, 1], strengths[2, 3], strengths[0, 3] = 4, 3, 2, 1
    assert not strongest(strengths, ALLOWED, FEEDS, 2).any()  # the two strongest do not reach the logits
    assert np.array_equal(strongest(strengths, ALLOWED, FEEDS, 3), matrix((0, 0), (1, 1), (2, 3)))
    assert np.array_equal(strongest(strengths, ALLOWED, FEEDS, 4), matrix((0, 0), (1, 1), (2, 3), (0, 3)))
    assert np.array_equal(strongest(strengths, ALLOWED, FEEDS, 8), ALLOWED)


def test_a_number_of_edges_is_one_or_a_share() -> None:
    assert [counted(one, 479, "edges") for one in (1, 479, 0.05, 1.0, 0.0001)] == [1, 479, 24, 479, 1]
    for wrong in (0, 480, 1.5, True, "all"):
        with pytest.raises(AnalyzerError, match=rf"edges={wrong!r}: expected a number of edges from 1 to 479, or a share"):
            counted(wrong, 479, "edges")  # type: ignore[arg-type]

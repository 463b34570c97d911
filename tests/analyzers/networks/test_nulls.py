"""What the two nulls keep, and what they do not."""

from dataclasses import replace

import numpy as np
import pytest

from analyzers.networks.net import Block, Net, count_edges, pruned
from analyzers.networks.nulls import NULLS, shuffled, strengths_kept


def net(share: float, seed: int = 0, hubs: bool = False) -> Net:
    """Three groups, two layers, of which the second has two groups of channels; some of the edges."""
    random = np.random.default_rng(seed)
    sizes = [(8, 12), (5, 4), (5, 4)]
    weights = [random.exponential(size=size) * (random.random(size) < share) for size in sizes]
    if hubs:
        weights[0][0] *= 30
    ends = [
        (np.arange(12, 20), np.arange(12)),
        (np.arange(20, 25), np.arange(12, 16)),
        (np.arange(25, 30), np.arange(16, 20)),
    ]
    blocks = [Block(name, *pair, part) for name, pair, part in zip(("a", "b", "b"), ends, weights, strict=True)]
    return Net(("in", "mid", "out"), np.repeat([0, 1, 2], [12, 8, 10]), np.arange(30), tuple(blocks))


def values(one: Net, layer: str) -> np.ndarray:
    return np.sort(np.concatenate([block.weights.ravel() for block in one.blocks if block.layer == layer]))


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_a_shuffle_keeps_the_weights_of_each_layer(share: float) -> None:
    one = net(share)
    other = shuffled(one, np.random.default_rng(0))
    for layer in ("a", "b"):
        np.testing.assert_array_equal(values(one, layer), values(other, layer))
    assert not np.allclose(one.adjacency().toarray(), other.adjacency().toarray())
    assert not np.allclose(one.adjacency().sum(1), other.adjacency().sum(1), rtol=0.05)


@pytest.mark.parametrize("hubs", [False, True])
@pytest.mark.parametrize("share", [1.0, 0.6, 0.3, 0.1])
@pytest.mark.parametrize("seed", range(3))
def test_strengths_are_kept_within_a_millionth_in_each_layer(share: float, seed: int, hubs: bool) -> None:
    one = net(share, seed, hubs)
    other = strengths_kept(one, np.random.default_rng(seed))
    for old, new in zip(one.blocks, other.blocks, strict=True):
        for axis in (0, 1):
            np.testing.assert_allclose(
                new.weights.sum(axis), old.weights.sum(axis), rtol=1e-6, atol=1e-6 * old.weights.max()
            )
        assert (new.weights >= 0).all()
    before, after = (part.adjacency().sum(1) for part in (one, other))
    np.testing.assert_allclose(after, before, rtol=1e-6, atol=1e-6 * before.max())
    if share > 0.2:
        assert np.abs(one.adjacency().toarray() - other.adjacency().toarray()).max() > 0.1


def test_strengths_kept_keeps_about_as_many_edges() -> None:
    one = net(0.5, 3)
    other = strengths_kept(one, np.random.default_rng(0))
    edges = [count_edges(part.adjacency()) for part in (one, other)]
    assert abs(edges[1] - edges[0]) <= 0.1 * edges[0]


def test_within_a_group_edges_stay_between_two_units() -> None:
    random, units = np.random.default_rng(0), np.arange(9)
    places = np.triu(np.ones((9, 9), bool), 1)
    one = Net(("a",), np.zeros(9, np.int64), units, (Block("a", units, units, random.random((9, 9)) * places, places),))
    for make in (shuffled, strengths_kept):
        other = make(one, np.random.default_rng(1))
        assert (other.blocks[0].weights[~places] == 0).all()
        assert not np.allclose(other.adjacency().toarray(), one.adjacency().toarray())


def test_nulls_are_the_same_for_one_seed() -> None:
    given = net(0.5)
    for null in NULLS.values():
        known = null.given(given, given.adjacency())
        one, other = (null.draw(known, 0.5, np.random.default_rng(4)).toarray() for _ in range(2))
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_a_graph_by_pairs_of_groups_is_the_same_graph(share: float) -> None:
    given = net(1.0)
    loops = Block("c", np.arange(4), np.arange(4), np.random.default_rng(0).random((4, 4)))
    given = replace(given, blocks=(*given.blocks, loops))
    graph = pruned(given.adjacency(), share)
    by_pairs = given.with_edges(graph)
    np.testing.assert_allclose(by_pairs.adjacency().toarray(), graph.toarray())
    assert [block.layer for block in by_pairs.blocks] == ["in - in", "mid - in", "out - mid"]
    assert by_pairs.blocks[2].places.sum() == 2 * 5 * 4  # of the groups of channels
    kept = NULLS["strengths kept"].draw(by_pairs, share, np.random.default_rng(0))
    np.testing.assert_allclose(kept.sum(1), graph.sum(1), rtol=1e-6)


def test_pruning_keeps_the_strongest_edges_of_the_graph() -> None:
    graph = net(1.0).adjacency()
    few = pruned(graph, 0.25)
    assert count_edges(few) == round(0.25 * count_edges(graph))
    assert few.data.min() >= np.sort(graph.data)[-len(few.data)]
    assert pruned(graph, 1.0) is graph

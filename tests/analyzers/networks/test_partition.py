"""Q, n-cut and divisions of graphs whose answers are known."""

import networkx
import numpy as np
import pytest
from scipy.sparse import csr_array

from analyzers.networks.means import k_means
from analyzers.networks.partition import by_size, gap, louvain, n_cut, newman, spectral
from analyzers.networks.search import Search, searched

SEARCH = Search("spectral", "shi-malik", tuple(range(2, 11)), "q", 0)


def weighted(graph: "networkx.Graph[int]", weight: str | None = None) -> csr_array:
    return networkx.to_scipy_sparse_array(graph, weight=weight, dtype=float, format="csr")


def cliques(count: int, size: int = 6) -> csr_array:
    return csr_array(np.kron(np.eye(count), np.ones((size, size)) - np.eye(size)))


def test_one_community_has_no_modularity() -> None:
    assert newman(cliques(3), np.zeros(18, int)) == 0.0
    assert n_cut(cliques(3), np.zeros(18, int)) == 0.0


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_disconnected_cliques_are_found_and_worth_what_they_must_be(count: int) -> None:
    for choose in ("q", "gap"):
        found = searched(cliques(count), SEARCH._replace(choose=choose))
        assert found.division.k == count
        assert found.division.q == pytest.approx(1 - 1 / count)
        assert found.division.ncut == pytest.approx(0)
        assert (found.labels.reshape(count, 6) == np.arange(count)[:, None]).all()
    assert louvain(cliques(count)).q == pytest.approx(1 - 1 / count)


def test_more_cliques_than_are_tried_are_found_as_parts() -> None:
    found = searched(cliques(14), SEARCH)
    assert (found.division.k, found.division.q) == (14, pytest.approx(1 - 1 / 14))


def test_too_many_communities_are_worth_less() -> None:
    divisions, _ = spectral(cliques(2), range(2, 9))
    assert divisions[2].q == pytest.approx(0.5)
    assert divisions[8].q < 0.4


@pytest.mark.parametrize("seed", range(3))
def test_q_and_n_cut_are_those_of_networkx_with_loops_and_weights(seed: int) -> None:
    random = np.random.default_rng(seed)
    half = random.exponential(size=(14, 14)) * (random.random((14, 14)) < 0.5)
    graph, labels = csr_array(half + half.T), random.integers(4, size=14)
    drawn = networkx.Graph()
    for a, b in zip(*np.nonzero(np.triu(graph.toarray())), strict=True):
        drawn.add_edge(int(a), int(b), weight=half[a, a] if a == b else graph[a, b])
    parts = [set(np.flatnonzero(labels == label).tolist()) & set(drawn) for label in range(4)]
    assert newman(graph, labels) == pytest.approx(networkx.community.modularity(drawn, parts))
    dense = graph.toarray()
    cuts = [dense[labels == n][:, labels != n].sum() / dense[labels == n].sum() for n in range(4)]
    assert n_cut(graph, labels) == pytest.approx(sum(cuts))


def test_the_karate_club_falls_apart_as_it_did() -> None:
    club = networkx.karate_club_graph()
    graph = weighted(club)
    divisions, _ = spectral(graph, range(2, 8))
    officers = np.array([club.nodes[n]["club"] == "Officer" for n in club])
    agree = int((divisions[2].labels == officers).sum())
    assert max(agree, 34 - agree) >= 32
    assert spectral(graph, [4], rows="ng-jordan")[0][4].q == pytest.approx(0.4198, abs=1e-4)
    assert max(one.q for one in divisions.values()) > 0.41
    assert louvain(graph, seed=0).q > 0.41


@pytest.mark.parametrize("rows", ["shi-malik", "ng-jordan"])
@pytest.mark.parametrize("size", [40, 220])  # by all eigenvectors at once, and by a few
def test_planted_blocks_are_recovered(rows: str, size: int) -> None:
    random = np.random.default_rng(0)
    true = random.permutation(np.repeat(np.arange(4), size))
    inside = np.where(true[:, None] == true, 0.25, 0.03)
    half = np.triu(random.random(inside.shape) < inside, 1) * random.uniform(0.5, 1.5, inside.shape)
    found = searched(csr_array(half + half.T), SEARCH._replace(rows=rows)).division
    assert found.k == 4
    agree = [np.bincount(true[found.labels == label]).max() for label in range(4)]
    assert sum(agree) > 0.97 * len(true)


def test_the_order_of_units_changes_nothing() -> None:
    random = np.random.default_rng(1)
    graph, order = weighted(networkx.karate_club_graph(), "weight"), random.permutation(34)
    one, other = searched(graph, SEARCH), searched(csr_array(graph[order][:, order]), SEARCH)
    assert other.division.q == pytest.approx(one.division.q)
    assert newman(graph[order][:, order], one.division.labels[order]) == pytest.approx(one.division.q)


def test_units_that_hang_by_a_thread_do_not_use_communities_up() -> None:
    random = np.random.default_rng(0)
    true = np.repeat(np.arange(3), 30)
    half = np.triu(random.random((90, 90)) < np.where(true[:, None] == true, 0.3, 0.02), 1).astype(float)
    whole = np.zeros((110, 110))
    whole[:90, :90] = half
    pairs = np.arange(90, 110, 2)
    whole[np.arange(0, 20, 2), pairs] = 0.01  # ten pairs of units, each on a thread
    whole[pairs, pairs + 1] = 1.0
    graph = csr_array(whole + whole.T)
    plain, raised = (searched(graph, SEARCH._replace(raised=raised)).division.q for raised in (False, True))
    assert raised > 0.95 * louvain(graph).q
    assert raised > plain + 0.02


def test_the_gap_is_where_eigenvalues_fall_farthest() -> None:
    assert gap(np.array([1.0, 0.95, 0.9, 0.3, 0.2]), [1, 2, 3, 4]) == 3


def test_labels_are_by_size() -> None:
    assert by_size(np.array([7, 2, 2, 9, 9, 9])).tolist() == [2, 1, 1, 0, 0, 0]


def test_k_means_is_as_good_as_that_of_scikit_learn() -> None:
    from sklearn.cluster import KMeans

    random = np.random.default_rng(0)
    for seed in range(5):
        points = random.standard_normal((150, 3)) + 2.5 * random.integers(0, 2, (150, 3))
        labels = k_means(points, 6, seed)
        spread = sum(((points[labels == n] - points[labels == n].mean(0)) ** 2).sum() for n in range(6))
        assert spread < 1.05 * KMeans(6, n_init=10, random_state=0).fit(points).inertia_
    assert len(set(k_means(np.zeros((5, 2)), 3, 0))) == 1

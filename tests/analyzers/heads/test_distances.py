"""Other distances of heads, several models on one map, and the tree: exact values, and nothing hangs on batches."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import cophenet, fcluster
from scipy.spatial.distance import squareform
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config

import fmr
from analyzers import AnalyzerError, HeadClustering, HeadClusters
from analyzers.heads.divergence import DISTANCES, Sums
from analyzers.heads.outputs import count_outputs, from_likeness
from analyzers.heads.tree import linkage
from tests.analyzers.heads.test_clustering import Laid, padded, random_patterns

matplotlib.use("Agg")
EVERY = tuple(DISTANCES)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def gpt2(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, bos_token_id=1, eos_token_id=1)
    return AutoModelForCausalLM.from_config(config).eval()


def batches(*sizes: int, tokens: int = 7) -> list[dict[str, Tensor]]:
    drawn = torch.Generator().manual_seed(9)
    return [{"input_ids": torch.randint(2, 64, (size, tokens), generator=drawn)} for size in sizes]


def counted(model: Any, given: list[dict[str, Tensor]]) -> dict[str, np.ndarray]:
    found = HeadClustering(model, distances=EVERY).over(given)
    return {one: found.result(distance=one, permutations=0).distances for one in EVERY}


# ---- the first token left out


def test_the_first_token_is_left_out_and_the_rest_is_a_whole_again() -> None:
    """Two heads that differ only in how much rests on the first token are apart, and without it at zero."""
    rest = (3 * torch.randn(2, 1, 6, 5, dtype=torch.float64)).softmax(-1)
    one, other = (torch.cat([torch.full((2, 1, 6, 1), sink), (1 - sink) * rest], -1) for sink in (0.1, 0.9))
    found = HeadClustering(distances=("attention", "beyond first")).update_patterns([one, other])
    plain, beyond = (found.result(distance=name, permutations=0) for name in ("attention", "beyond first"))
    assert plain.distances[0, 1] > 0.3
    assert beyond.distances[0, 1] < 1e-12
    assert beyond.unit == "JS divergence in bits, first token left out"


def test_it_equals_the_plain_distance_of_patterns_without_that_key() -> None:
    patterns = random_patterns(examples=2, tokens=6)
    found = HeadClustering(distances="beyond first").update_patterns(patterns).result(permutations=0)
    total = np.zeros((6, 6))
    for e in range(2):
        for query in range(1, 6):
            rows = torch.cat(patterns, 1)[e, :, query, 1:]
            rows = rows / rows.sum(-1, keepdim=True)
            one = HeadClustering().update_patterns([rows[None, :, None].expand(1, 6, 5, 5)]).result(permutations=0)
            total += one.distances
    np.testing.assert_allclose(found.distances, total / 10, atol=1e-12)


def test_heads_that_look_at_nothing_else_are_left_out_for_that_query() -> None:
    idle = torch.zeros(1, 1, 5, 5)
    idle[..., 0] = 1
    found = HeadClustering(distances=("attention", "beyond first")).update_patterns([idle, torch.eye(5)[None, None]])
    with pytest.raises(AnalyzerError, match="No example was long enough for the distance 'beyond first'"):
        found.result(distance="beyond first")
    assert found.result(distance="attention", permutations=0).distances[0, 1] == pytest.approx(0.8)


@pytest.mark.parametrize(("left", "right"), [(0, 4), (3, 0)])
def test_padding_changes_nothing_without_the_first_real_token(left: int, right: int) -> None:
    patterns = random_patterns()
    plain = HeadClustering(distances="beyond first").update_patterns(patterns).result(permutations=0)
    wide = HeadClustering(distances="beyond first").update_patterns(*padded(patterns, left, right)).result(permutations=0)
    np.testing.assert_allclose(wide.distances, plain.distances, atol=1e-12)


# ---- what is written


def sums_of(outputs: list[Tensor], real: Tensor | None = None) -> Sums:
    sums = Sums.zeros(sum(one.shape[1] for one in outputs), EVERY)
    count_outputs(sums, outputs, torch.ones(outputs[0].shape[0], outputs[0].shape[2]).bool() if real is None else real)
    return sums


def test_cosines_are_those_of_each_token() -> None:
    outputs = torch.randn(2, 3, 5, 8)
    sums = sums_of([outputs])
    expected = 1 - torch.cosine_similarity(outputs[:, :, None], outputs[:, None], dim=-1).mean((0, 3))
    torch.testing.assert_close(sums.apart["output"] / 10, expected.double().fill_diagonal_(0), atol=1e-5, rtol=0)
    opposite = sums_of([torch.cat([outputs[:, :1], -2 * outputs[:, :1], 3 * outputs[:, :1]], 1)])
    np.testing.assert_allclose(opposite.apart["output"] / 10, [[0, 2, 0], [2, 0, 2], [0, 2, 0]], atol=1e-5)


def test_cka_is_blind_to_direction_and_size_and_nothing_else() -> None:
    y = torch.randn(3, 1, 9, 6)
    turned = 3 * y @ torch.linalg.qr(torch.randn(6, 6))[0]
    other = torch.randn(3, 1, 9, 6)
    found = from_likeness(sums_of([torch.cat([y, turned, other], 1)]).apart["cka"])
    assert float(found[0, 1]) == pytest.approx(0, abs=1e-5)
    assert float(found[0, 2]) > 0.5
    assert torch.equal(found.diagonal(), torch.zeros(3, dtype=torch.float64))


def test_cka_is_the_unbiased_estimate_written_out() -> None:
    x, y = torch.randn(2, 7, 5, dtype=torch.float64)
    found = from_likeness(sums_of([torch.stack([x, y])[None].float()]).apart["cka"])[0, 1]
    n, one = 7, torch.ones(7, dtype=torch.float64)

    def hsic(a: Tensor, b: Tensor) -> Tensor:
        k, m = (z @ z.T - torch.diag((z @ z.T).diagonal()) for z in (a, b))
        whole = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
        return ((k @ m).trace() + whole - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3))

    expected = 1 - hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt()
    assert float(found) == pytest.approx(float(expected), abs=1e-5)


def test_outputs_are_those_of_the_model() -> None:
    """Head by head: what the output moves by when the other heads are silent."""
    model, given = gpt2(), batches(1)[0]
    structure = fmr.locate(fmr.run(model, **given))
    block = structure.attention[0]
    outputs = []
    for head in range(4):
        others = {block.head(n).z: fmr.edits.Zero() for n in range(4) if n != head}
        bias = model.transformer.h[0].attn.c_proj.bias.detach()
        outputs.append(fmr.run(model, keep=[block.out], edits=others, **given)[block.out].reshape(7, 32) - bias)
    y = torch.stack(outputs)
    expected = 1 - torch.cosine_similarity(y[:, None], y[None], dim=-1).mean(-1)
    found = counted(model, [given])["output"][:4, :4]
    np.testing.assert_allclose(found, expected.fill_diagonal_(0), atol=1e-4)


@pytest.mark.parametrize("laid", ["bqhk", "hbqk", "in the batch"])
def test_how_a_model_lays_its_heads_out_changes_nothing(laid: str) -> None:
    usual, other = Laid("bhqk").eval(), Laid(laid).eval()
    other.load_state_dict(usual.state_dict())
    given = [{"x": torch.randn(examples, 6, 8)} for examples in (1, 3, 2)]
    expected, found = counted(usual, given), counted(other, given)
    for one in EVERY:
        np.testing.assert_allclose(found[one], expected[one], atol=1e-4, err_msg=one)


# ---- batches and shards


@pytest.mark.long
def test_splitting_and_order_change_nothing() -> None:
    model, (whole,) = gpt2(), batches(5)
    rows = [{"input_ids": whole["input_ids"][n : n + 1]} for n in range(5)]
    expected = counted(model, [whole])
    for given in (rows, rows[::-1], [{"input_ids": whole["input_ids"][:3]}, {"input_ids": whole["input_ids"][3:]}]):
        for one, distances in counted(model, given).items():
            np.testing.assert_allclose(distances, expected[one], atol=1e-5, err_msg=one)
    first, second = (HeadClustering(model, distances=EVERY).over(part) for part in (rows[:2], rows[2:]))
    merged = HeadClustering(distances=EVERY).merge(first).merge(second)
    for one in EVERY:
        np.testing.assert_allclose(merged.result(distance=one, permutations=0).distances, expected[one], atol=1e-5)


def test_padded_tokens_write_nothing_that_counts() -> None:
    model, (plain,) = gpt2(), batches(1)
    ids = torch.cat([torch.full((1, 3), 5), plain["input_ids"]], 1)
    mask = torch.cat([torch.zeros(1, 3), torch.ones(1, 7)], 1).long()
    wide = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    expected, found = counted(model, [plain]), counted(model, [wide])
    for one in EVERY:
        np.testing.assert_allclose(found[one], expected[one], atol=1e-4, err_msg=one)


# ---- several models


@pytest.mark.long
def test_two_copies_of_a_model_lie_on_one_another() -> None:
    both = HeadClustering({"before": gpt2(), "after": gpt2()}, distances=EVERY).over(batches(3))
    alone = HeadClustering(gpt2(), distances=EVERY).over(batches(3))
    for one in EVERY:
        found, single = (each.result(distance=one, permutations=50) for each in (both, alone))
        assert found.names[:2] + found.names[8:10] == ["before 0.0", "before 0.1", "after 0.0", "after 0.1"]
        assert max(apart for _, _, apart in found.counterparts()) < 1e-5
        np.testing.assert_allclose(found.distances[:8, :8], single.distances, atol=1e-6)
        np.testing.assert_allclose(found.distances[:8, 8:], single.distances, atol=1e-5)


def test_the_heads_that_changed_are_those_that_moved() -> None:
    """One head of the second model looks by other queries: it is farthest from where it was."""
    other = gpt2()
    other.transformer.h[1].attn.c_attn.weight.data[:, 16:24] += 2 * torch.randn(32, 8)
    both = HeadClustering({"before": gpt2(), "after": other}).over(batches(3))
    found = both.result(permutations=0)
    (one, same, apart), *rest = found.counterparts()
    assert (one, same) == ("before 1.2", "after 1.2")
    assert apart > 0.005
    assert max(far for *_, far in rest) < 1e-6
    assert "the same head of two models" in repr(found)
    assert "most before 1.2" in repr(found)
    assert list(found.table()["model"].unique()) == ["before", "after"]
    told = [text.get_text() for text in found.plot().axes[0].get_legend().get_texts()]
    assert told == ["before", "after", "the same head of two models"]


def test_patterns_of_several_models_come_by_name() -> None:
    patterns = {"a": random_patterns(), "b": random_patterns(layers=1, heads=2)}
    found = HeadClustering().update_patterns(patterns).result(permutations=0)
    assert found.names[-2:] == ["b 0.0", "b 0.1"]
    assert len(found.counterparts()) == 2
    with pytest.raises(AnalyzerError, match=r"This batch has \[3, 3\] heads by layer, earlier ones had {'a': \[3, 3\]"):
        HeadClustering().update_patterns(patterns).update_patterns(patterns["a"])


# ---- the tree, and what a user gets


def test_the_tree_joins_heads_at_their_mean_distance_and_is_cut_at_the_clusters() -> None:
    result = HeadClustering().update_patterns(random_patterns(layers=3)).result(clusters=4, permutations=0)
    joined = linkage(result.distances)
    labels = fcluster(joined, 4, "maxclust")
    same = labels[:, None] == labels[None]
    assert (same == (result.clusters[:, None] == result.clusters[None])).all()
    assert (cophenet(joined) > 0).all()
    pair = np.unravel_index(squareform(cophenet(joined)).argmax(), result.distances.shape)
    assert not same[pair]
    figure = result.plot(kind="tree")
    assert figure.axes[0].get_ylabel() == "JS divergence in bits"
    assert {text.get_text() for text in figure.axes[0].texts} == {*result.names, "4 clusters"}


def test_it_is_saved_and_read_again(tmp_path: Path) -> None:
    result = HeadClustering(gpt2(), distances="cka").over(batches(2)).result(permutations=50)
    result.save(tmp_path / "heads.safetensors")
    again = HeadClusters.load(tmp_path / "heads.safetensors")
    assert repr(again) == repr(result)
    assert "distance (1 - CKA of outputs): within a layer" in repr(result)
    assert again.by_layer.p_value == result.by_layer.p_value
    assert again.table().equals(result.table())


def test_the_distance_between_heads_that_are_named() -> None:
    result = HeadClustering().update_patterns(random_patterns()).result(permutations=0)
    assert result.between(["0.0", "1.2"]) == pytest.approx(result.distances[0, 5])
    assert result.between(["0.0"], ["0.1", "0.2"]) == pytest.approx(result.distances[0, 1:3].mean())
    with pytest.raises(AnalyzerError, match=r"\['7.7'\] are no heads here. Expected some of 0.0, 0.1"):
        result.between(["7.7"])


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(
        AnalyzerError, match="distances='far': expected some of 'attention', 'beyond first', 'output', 'cka'"
    ):
        HeadClustering(distances="far")
    with pytest.raises(AnalyzerError, match="Patterns alone do not tell what is written"):
        HeadClustering(distances="output").update_patterns(random_patterns())
    one = HeadClustering().update_patterns(random_patterns())
    with pytest.raises(AnalyzerError, match=r"distance='cka' was not counted. Expected one of 'attention'"):
        one.result(distance="cka")
    with pytest.raises(AnalyzerError, match="merge of distances="):
        one.merge(HeadClustering(distances="beyond first"))
    with pytest.raises(AnalyzerError, match="kind='bush': expected 'map' or 'tree'"):
        one.result(permutations=0).plot(kind="bush")
    with pytest.raises(AnalyzerError, match=r"Outputs of \[4, 6\] numbers have no cosine"):
        sums_of([torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 6)])

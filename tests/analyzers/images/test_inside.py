"""Objectives at attention heads and layers, also where torch takes them in one kernel: against what is computed by hand."""

import copy

import pytest
import torch
from torch import Tensor, nn

import fmr
from analyzers import AnalyzerError, FeatureVisualization, StyleTransfer, TopImages, images

GIVEN = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
WIDTH, HEADS = 12, 2


class Encoder(nn.Module):
    """Patches, and layers that torch runs in one kernel each where no gradients are wanted."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(width, HEADS, 16, batch_first=True, norm_first=True)
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(2))

    def forward(self, given: Tensor) -> Tensor:
        x = self.patches(given).flatten(2).mT
        for layer in self.layers:
            x = layer(x)
        return x


def eye(model: nn.Module) -> FeatureVisualization:
    return FeatureVisualization(model, size=16)


@torch.no_grad()
def values_of(model: Encoder, given: Tensor) -> dict[str, Tensor]:
    """The values of the second layer, without a gradient."""
    return by_hand(model, given)


def by_hand(model: Encoder, given: Tensor) -> dict[str, Tensor]:
    """The values of the second layer, from its weights."""
    x = model.layers[0](model.patches(given).flatten(2).mT)
    layer = model.layers[1]
    q, k, v = layer.self_attn.in_proj_weight.chunk(3)
    bias = layer.self_attn.in_proj_bias.chunk(3)
    parts = [
        (layer.norm1(x) @ w.T + b).unflatten(2, (HEADS, -1)).transpose(1, 2) for w, b in zip((q, k, v), bias, strict=True)
    ]
    pattern = (parts[0] @ parts[1].mT / (WIDTH / HEADS) ** 0.5).softmax(-1)
    return {"pattern": pattern, "z": pattern @ parts[2], "post": layer(x)}


@pytest.mark.parametrize("width", [WIDTH, 16])  # as many units as patches, too
def test_layers_that_torch_fuses_without_gradients_are_objectives(width: int) -> None:
    model = Encoder(width).eval()
    with torch.enable_grad():
        wanted = by_hand(model, GIVEN.clone().requires_grad_())["post"][..., 3].mean(1) if width == WIDTH else None
    for site in ("layers.1", "layers[1].resid_post"):
        made = eye(model).run(images.Channel(site, 3), steps=12, progress=False)
        assert made.score[0] > made.start[0]
        assert made.score == pytest.approx(eye(model).scores(images.Channel(site, 3), made.images), rel=1e-5)
        if wanted is not None:
            assert eye(model).scores(images.Channel(site, 3), GIVEN) == pytest.approx(wanted.tolist(), abs=1e-5)
    assert eye(model).run(images.Channel("layers.1.linear1", 1), steps=2, progress=False).score.shape == (1,)
    assert StyleTransfer(model, "layers.1", "layers.0", size=16).run(GIVEN[0], GIVEN[1], steps=8, progress=False).falls > 1
    top = TopImages(model, "layers.1", [3], k=2).update(GIVEN).result(progress=False)
    assert top.boxes[0, 0].tolist() == [0, 0, 16, 16]
    assert torch.is_grad_enabled()
    assert all(one.grad is None for one in model.parameters())


def test_what_is_read_keeps_no_history() -> None:
    model = Encoder().eval()
    view = eye(model).view
    key = view.sites(["layers.1"])["layers.1"]
    assert not view.values(view.inputs(GIVEN), [key])[key].requires_grad


@pytest.mark.parametrize("place", [(0, 2), (1, 5)])
def test_an_entry_of_a_pattern_inside_a_kernel_is_an_objective(place: tuple[int, int]) -> None:
    model = Encoder().eval()
    objective = images.Neuron("attention[1].pattern", 7, place)  # the key, and the head and the query
    wanted = values_of(model, GIVEN)["pattern"][:, place[0], place[1], 7]
    assert eye(model).scores(objective, GIVEN) == pytest.approx(wanted.tolist(), abs=1e-6)
    made = eye(model).run(objective, steps=12, transformations=(), progress=False)
    assert made.score[0] > made.start[0]
    assert made.curve[0, 0] == pytest.approx(made.start[0], rel=1e-5)
    shown = values_of(model, made.images)["pattern"][0, place[0], place[1], 7]
    assert made.score[0] == pytest.approx(shown.item(), rel=1e-4)


def test_the_gradient_inside_a_kernel_is_that_of_the_plain_form() -> None:
    model = Encoder().eval()
    task_sites = eye(model).view.sites(["attention[1].z"])
    given = GIVEN.clone().requires_grad_()
    key = task_sites["attention[1].z"]
    held = eye(model).view.values(given, [key], grad=True)[key]
    (found,) = torch.autograd.grad(held[:, 1, :, 2].sum(), given)
    (wanted,) = torch.autograd.grad(by_hand(model, given)["z"][:, 1, :, 2].sum(), given)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)


def test_the_crop_of_what_a_head_sees_inside_a_kernel() -> None:
    top = TopImages(Encoder().eval(), "attention[0].z", [1], k=1).update(GIVEN).result(progress=False)
    assert top.boxes[0, 0].tolist() == [0, 0, 16, 16]


def test_a_role_is_narrowed() -> None:
    model = Encoder().eval()
    z = values_of(model, GIVEN)["z"]
    head = eye(model).scores(fmr.Site("attention[1].z", heads=1), GIVEN)
    assert head == pytest.approx(z[:, 1].mean((1, 2)).tolist(), abs=1e-6)
    place = eye(model).scores(images.Channel(fmr.Site("attention[1].z", heads=1, positions=3), 2), GIVEN)
    assert place == pytest.approx(z[:, 1, 3, 2].tolist(), abs=1e-6)
    with pytest.raises(AnalyzerError, match=r"Encoder has no 'attention\[7\].z'. Expected an ID, the path of a module"):
        eye(model).scores(fmr.Site("attention[7].z", heads=1), GIVEN)

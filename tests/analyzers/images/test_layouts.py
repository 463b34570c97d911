"""Which dimension counts channels: as the ops tell, however a network lays its images out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fmr
from analyzers import AnalyzerError, FeatureVisualization, StyleTransfer, TopImages, images
from analyzers.images.layouts import with_layout
from tests.analyzers.images.models import Patches


class Turned(nn.Module):
    """A convolution, and what stands behind it with channels first and last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.wide = nn.Conv2d(3, 6, 3, padding=1), nn.LayerNorm(6), nn.Linear(6, 10)

    def forward(self, given: Tensor) -> Tensor:
        first = torch.relu(self.conv(given))
        last = self.norm(first.permute(0, 2, 3, 1))
        wide = torch.nn.functional.gelu(self.wide(last)) * 2
        return first + wide[..., :6].permute(0, 3, 1, 2)


MODEL, GIVEN = Turned().eval(), torch.rand(2, 3, 8, 9, generator=torch.Generator().manual_seed(0))
CHANNELS = {"/relu#0": 6, "conv": 6, "norm": 6, "wide": 10, "/gelu#0": 10, "/mul#0": 10}


@pytest.mark.parametrize("site", CHANNELS)
def test_channels_are_counted_by_the_right_dimension(site: str) -> None:
    value = fmr.run(MODEL, GIVEN)[site]
    last = value.shape[-1] == CHANNELS[site]
    wanted = value[..., 4].mean((1, 2)) if last else value[:, 4].mean((1, 2))
    eye = FeatureVisualization(MODEL, size=(8, 9))
    torch.testing.assert_close(torch.from_numpy(eye.scores(images.Channel(site, 4), GIVEN)).float(), wanted)
    assert len(eye.sheet(site, steps=1, progress=False).images) == CHANNELS[site]
    assert TopImages(MODEL, site, k=1).update(GIVEN).result().values.shape == (CHANNELS[site], 1)
    found = StyleTransfer(MODEL, site, site, size=(8, 9)).run(GIVEN[0], GIVEN[1], steps=1, progress=False)
    flat = (value if last else value.movedim(1, -1))[1].flatten(0, 1)
    ours = fmr.run(MODEL, found.image[None])[site]
    mine = (ours if last else ours.movedim(1, -1))[0].flatten(0, 1)
    grams = [one.T @ one / len(one) for one in (mine, flat)]
    loss = float((grams[0] - grams[1]).square().sum() / grams[1].square().sum())
    assert found.style_loss[0] == pytest.approx(loss, rel=1e-3)


class Made(nn.Module):
    """What a function makes of images, of their six channels after a convolution, and of layers that it may use."""

    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.line, self.one = nn.Conv2d(3, 6, 3, padding=1), nn.Conv1d(6, 5, 3), nn.Conv2d(6, 1, 1)
        self.wide, self.places, self.norm = nn.Linear(6, 10), nn.Linear(72, 72), nn.BatchNorm1d(6)
        self.mix, self.cell = nn.Conv1d(72, 72, 1), nn.GRU(6, 4, batch_first=True)
        self.attention, self.token = nn.MultiheadAttention(6, 2, batch_first=True), nn.Parameter(torch.zeros(1, 1, 6))
        self.function = function

    def forward(self, given: Tensor) -> Any:
        return self.function(self, self.conv(given))


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).mT


def last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def heads(m: Made, x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*[tokens(x).unflatten(2, (2, 3)).transpose(1, 2)] * 3)


def mixed(m: Made, x: Tensor) -> Tensor:
    return tokens(x) + m.places(tokens(x).mT).mT


def windows(x: Tensor) -> Tensor:
    parts = last(x)[:, :, :8].reshape(-1, 2, 4, 2, 4, 6).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, 6)
    return (parts * 2).reshape(-1, 2, 2, 4, 4, 6).permute(0, 1, 3, 2, 4, 5).reshape(-1, 8, 8, 6)


def written(x: Tensor) -> Tensor:
    kept = torch.zeros(x.shape[0], 8, 9, 6)
    kept[:, 1:] = last(x)[:, :-1]
    return kept


TOLD: dict[str, tuple[Callable[[Any, Tensor], Any], int]] = {
    "flat": (lambda m, x: x.flatten(2), 1),
    "flat, viewed": (lambda m, x: x.view(x.shape[0], 6, 72), 1),
    "tokens": (lambda m, x: tokens(x), 2),
    "tokens, bent": (lambda m, x: tokens(x).relu(), 2),
    "softmax over places": (lambda m, x: x.flatten(2).softmax(-1), 1),
    "softmax over tokens": (lambda m, x: tokens(x).softmax(1), 2),
    "along a line": (lambda m, x: m.line(x.mean(2)), 1),
    "along a line, flat": (lambda m, x: F.relu(m.line(x.flatten(2))), 1),
    "one channel": (lambda m, x: m.one(x), 1),
    "one channel, flat": (lambda m, x: m.one(x).flatten(2), 1),
    "one channel, last": (lambda m, x: last(m.one(x)), 3),
    "normed in a line": (lambda m, x: m.norm(x.flatten(2)), 1),
    "last and added": (lambda m, x: last(x) + 1, 3),
    "last and rolled": (lambda m, x: last(x).roll(2, 1), 3),
    "last and bent": (lambda m, x: torch.relu(last(x)), 3),
    "last, two joined": (lambda m, x: torch.cat([last(x), last(x) * 2], 3), 3),
    "last, rows joined": (lambda m, x: torch.cat([last(x), last(x)], 1), 3),
    "last and cut": (lambda m, x: last(x)[:, 1:, ::2, :4], 3),
    "last and padded": (lambda m, x: F.pad(last(x), (0, 0, 1, 1)), 3),
    "last and back": (lambda m, x: last(x).roll(1, 2).permute(0, 3, 1, 2), 1),
    "last, written": (lambda m, x: written(x), 3),
    "parts and whole": (lambda m, x: windows(x), 3),
    "columns first": (lambda m, x: x.permute(3, 2, 0, 1).permute(2, 0, 1, 3), 3),
    "pooled": (lambda m, x: F.adaptive_avg_pool2d(F.max_pool2d(x, 2), 2), 1),
    "larger": (lambda m, x: F.interpolate(x, scale_factor=2), 1),
    "summed": (lambda m, x: last(x).sum(1), 2),
    "kept": (lambda m, x: x.mean((2, 3), keepdim=True).sigmoid() * x, 1),
    "wide": (lambda m, x: m.wide(tokens(x)), 2),
    "matrix": (lambda m, x: tokens(x) @ m.wide.weight.T, 2),
    "letters": (lambda m, x: torch.einsum("nchw,dc->nhwd", x, m.wide.weight), 3),
    "with a token": (lambda m, x: torch.cat([m.token.expand(x.shape[0], -1, -1), tokens(x)], 1), 2),
    "places mixed": (mixed, 2),
    "attended": (lambda m, x: m.attention(tokens(x), tokens(x), tokens(x))[0], 2),
    "heads put together": (lambda m, x: heads(m, x).transpose(1, 2).flatten(2), 2),
    "in turn": (lambda m, x: m.cell(tokens(x))[0], 2),
    "shuffled": (lambda m, x: x.unflatten(1, (2, 3)).transpose(1, 2).flatten(1, 2), 1),
    "two images": (lambda m, x: x.repeat(1, 2, 1, 1), 1),
    "pixels of channels": (lambda m, x: F.pixel_shuffle(torch.cat([x, x], 1), 2), 1),
    "channels of pixels": (lambda m, x: F.pixel_unshuffle(x[..., :8], 2), 1),
    "channels in another order": (lambda m, x: F.channel_shuffle(x, 3), 1),
    "convolved after a shuffle": (lambda m, x: m.one(F.pixel_shuffle(torch.cat([x] * 4, 1), 2)), 1),
    "convolved after a line": (lambda m, x: m.one(m.places(x.flatten(2).flatten(1)[:, :72]).view(-1, 6, 3, 4)), 1),
    "logits": (lambda m, x: {"logits": m.wide(x.mean((2, 3))), "map": x}, 1),
    "one of a dict": (lambda m, x: {"map": tokens(x)}, 2),
}  # fmt: skip

UNTOLD: dict[str, Callable[[Any, Tensor], Any]] = {
    "windows side by side": lambda m, x: F.unfold(x, 3),
    "heads": heads,
    "places to places": lambda m, x: m.places(x.flatten(2)),
    "places to places in a line": lambda m, x: m.mix(tokens(x)),
    "no channels": lambda m, x: x.mean(1),
    "channels and places": lambda m, x: x.flatten(1).unflatten(1, (12, 36)),
    "products of places": lambda m, x: x.flatten(2).mT @ x.flatten(2),
    "waves": lambda m, x: torch.fft.rfft2(x).abs(),
    "turned by hand": lambda m, x: torch.rot90(x, 1, (1, 2)),
}


@pytest.mark.parametrize("name", TOLD)
def test_the_ops_tell_which_dimension_counts_channels(name: str) -> None:
    function, axis = TOLD[name]
    model = Made(function).eval()
    with torch.no_grad():
        value = model(GIVEN)
    value = value if isinstance(value, Tensor) else next(iter(value.values()))
    key = with_layout(fmr.run(model, GIVEN[:1]).graph, "")
    assert isinstance(key, fmr.Site)
    assert key.layout is not None
    assert [n for n, what in enumerate(key.layout) if what == "units"] == [axis]
    found = FeatureVisualization(model, size=(8, 9)).scores(images.Channel("", 0), GIVEN)
    wanted = value.movedim(axis, 1)[:, 0].flatten(1).mean(1) if value.dim() > 2 else value[:, 0]
    torch.testing.assert_close(torch.from_numpy(found).float(), wanted)


@pytest.mark.parametrize("name", UNTOLD)
def test_what_the_ops_do_not_tell_is_asked_for(name: str) -> None:
    eye = FeatureVisualization(Made(UNTOLD[name]).eval(), size=(8, 9))
    with pytest.raises(AnalyzerError, match=r"tell none that alone counts channels. Expected .* fmr.Site\('', layout="):
        eye.scores(images.Channel("", 0), GIVEN)
    eye.scores(images.Layer(""), GIVEN)


def test_both_orders_are_named_where_none_is_told_and_none_where_the_number_alone_is_wrong() -> None:
    eye = FeatureVisualization(Made(UNTOLD["waves"]).eval(), size=(8, 9))
    with pytest.raises(AnalyzerError) as told:
        eye.scores(images.Channel("", 0), GIVEN)
    assert "layout=('examples', 'units', 'rows', 'columns')) where it is the first beside the images" in str(told.value)
    assert "('examples', 'rows', 'columns', 'units') where it is the last" in str(told.value)
    with pytest.raises(AnalyzerError, match=r"Expected 0 to 5\.$"):
        eye.scores(images.Channel("conv", 6), GIVEN)


def test_a_layout_that_is_said_is_believed() -> None:
    model = Made(UNTOLD["heads"]).eval()
    site = fmr.Site("", layout=("examples", "heads", "positions", "units"))
    found = FeatureVisualization(model, size=(8, 9)).scores(images.Channel(site, 2), GIVEN)
    torch.testing.assert_close(torch.from_numpy(found).float(), model(GIVEN)[..., 2].mean((1, 2)).detach())


def test_what_is_narrowed_or_said_or_nowhere_stays_as_it_is() -> None:
    graph = fmr.run(MODEL, GIVEN).graph
    for site in ("nowhere", fmr.Site("conv", units=3), fmr.Site("wide", layout=("examples", "units", "rows", "columns"))):
        assert with_layout(graph, site) is site
    assert with_layout(graph, "wide") == fmr.Site("wide", layout=("examples", "dim1", "dim2", "units"))
    assert with_layout(graph, "input:given") == fmr.Site("input:given", layout=("examples", "units", "dim2", "dim3"))
    stream = fmr.run(Patches().eval(), torch.rand(1, 3, 16, 16)).graph
    narrowed = with_layout(stream, fmr.Site("blocks.0", positions=[1, 2]))
    assert isinstance(narrowed, fmr.Site)
    assert narrowed.layout == ("examples", "positions", "units")
    found = FeatureVisualization(Patches().eval(), size=16).scores(images.Channel(narrowed, 3), torch.rand(2, 3, 16, 16))
    assert found.shape == (2,)
    with pytest.raises(AnalyzerError, match="the ops tell none that alone counts channels"):
        FeatureVisualization(MODEL, size=(8, 9)).scores(images.Channel(fmr.Site("conv", units=[1, 3]), 0), GIVEN)

"""Which dimension counts channels: as the ops tell, however a network lays its images out."""

import pytest
import torch
from torch import Tensor, nn

import fmr
from analyzers import FeatureVisualization, StyleTransfer, TopImages, images
from analyzers.images.layouts import with_layout


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


def test_what_the_ops_do_not_tell_or_the_site_tells_stays_as_it_is() -> None:
    graph = fmr.run(MODEL, GIVEN).graph
    for site in ("/permute#0", "/add#0", "conv", "nowhere", fmr.Site("norm", units=3), "input:given"):
        assert with_layout(graph, site) is site
    named = fmr.Site("wide", layout=("examples", "units", "rows", "columns"))
    assert with_layout(graph, named) is named
    assert with_layout(graph, "wide") == fmr.Site("wide", layout=("examples", "dim1", "dim2", "units"))

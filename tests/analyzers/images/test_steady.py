"""Models that change while they are looked at: buffers that count passes, and weights that become others between batches."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from analyzers import AnalyzerError, FeatureVisualization, TopImages, images

GIVEN = torch.rand(6, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Counting(nn.Module):
    """A convolution with a buffer that each pass writes to, or that the first pass fills."""

    counter: Tensor

    def __init__(self, how: str, by: float = 1.0) -> None:
        super().__init__()
        self.conv, self.how, self.by = nn.Conv2d(3, 4, 3), how, by
        self.register_buffer("counter", torch.zeros(()))

    def forward(self, given: Tensor) -> Tensor:
        if self.how == "in place":
            self.counter += self.by
        elif self.how == "anew":
            self.counter = self.counter + self.by
        elif self.how == "once":
            self.counter.fill_(1.0)
        return self.conv(given) + self.counter


@pytest.mark.parametrize("how", ["in place", "anew"])
@pytest.mark.parametrize("by", [1.0, 1e-6])
def test_a_buffer_that_passes_change_is_refused_and_put_back(how: str, by: float) -> None:
    model = Counting(how, by).eval()
    eye = FeatureVisualization(model, size=6)
    for ask in (
        lambda: eye.scores(images.Logit(1), GIVEN),
        lambda: eye.run(images.Logit(1), steps=1, progress=False),
        lambda: TopImages(model, "").update(GIVEN),
    ):
        with pytest.raises(
            AnalyzerError, match=r"Counting.counter changes from pass to pass in eval mode too, .* is put back"
        ):
            ask()
        assert float(model.counter) == 0
        assert dict(model.named_buffers())["counter"] is model.counter


def test_a_buffer_that_the_first_pass_fills_is_taken() -> None:
    model = Counting("once").eval()
    found = FeatureVisualization(model, size=6).scores(images.Logit(1), GIVEN)
    np.testing.assert_allclose(found, model(GIVEN)[:, 1].mean((1, 2)).detach(), rtol=1e-5)
    assert float(model.counter) == 1


@pytest.mark.parametrize("what", ["weight", "statistics"])
def test_weights_that_change_between_batches_are_refused(what: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    top = TopImages(model, "1", [1], k=2).over([GIVEN[:3]], progress=False)
    changed = model[0].weight if what == "weight" else model[1].running_mean
    assert isinstance(changed, Tensor)
    before = changed.detach().clone()
    with torch.no_grad():
        changed.add_(1)
    for ask in (lambda: top.update(GIVEN[3:]), top.result):
        with pytest.raises(
            AnalyzerError, match=r"The weights of Sequential have changed since 3 images were seen. Expected"
        ):
            ask()
    other = TopImages(model, "1", [1], k=2).update(GIVEN[3:])
    with pytest.raises(AnalyzerError, match="merge of values of two models"):
        top.merge(other)
    with torch.no_grad():
        changed.copy_(before)
    assert top.update(GIVEN[3:]).result().seen == 6

"""Natural images that channels answer to most: which they are, what is seen of them, batches, shards and files."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fmr
from analyzers import AnalyzerError, TopCrops, TopImages
from analyzers.images.fields import receptive_fields
from analyzers.images.viewing import View
from fmr.zoo import tasks
from tests.analyzers.images.models import Chain
from tests.residue import model_state, random_state, torch_state

matplotlib.use("Agg")
IMAGES = torch.rand(40, 3, 24, 24, generator=torch.Generator().manual_seed(0))


def chain() -> Chain:
    model = Chain().eval()
    assert isinstance(model, Chain)
    return model


def other() -> Chain:
    model = chain()
    with torch.no_grad():
        model.stem.weight.mul_(2)
    return model


def top(**settings: Any) -> TopImages:
    return TopImages(chain(), "late/conv2d#0", **{"k": 3, **settings})


def test_they_are_those_with_the_largest_values() -> None:
    found = top().over(IMAGES.split(7), progress=False).result()
    late = fmr.run(chain(), IMAGES)["late/conv2d#0"].flatten(2)
    values, numbers = late.amax(2).T.sort(dim=1, descending=True)
    np.testing.assert_allclose(found.values, values[:, :3].numpy(), rtol=1e-5)
    assert (found.numbers == numbers[:, :3].numpy()).all()
    np.testing.assert_allclose(found.mean, late.amax(2).mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.spread, late.amax(2).std(0, correction=0), rtol=1e-4)
    shape = fmr.run(chain(), IMAGES[:1])["late/conv2d#0"].shape[2:]
    for channel, rank in itertools.product(range(5), range(3)):
        where = int(late[found.numbers[channel, rank], channel].argmax())
        assert tuple(found.places[channel, rank]) == tuple(int(n) for n in np.unravel_index(where, shape))


def test_channels_are_counted_from_the_end_too() -> None:
    found, wanted = (top(channels=asked).update(IMAGES).result(progress=False) for asked in ([-1, 0], [4, 0]))
    assert found.channels == (4, 0)
    np.testing.assert_array_equal(found.values, wanted.values)
    assert top(channels=[-1]).merge(top(channels=[-1]).update(IMAGES)).result(progress=False).channels == (4,)


def test_batches_shards_and_labels_change_nothing() -> None:
    whole = top(channels=[3, 1]).update(IMAGES).result()
    loader = DataLoader(TensorDataset(IMAGES, torch.arange(40)), batch_size=9)
    halves = [top(channels=[3, 1]).over(part.split(6), progress=False) for part in IMAGES.split(20)]
    named = top(channels=[3, 1], argument="images").update({"images": IMAGES})
    for found in (
        top(channels=[3, 1]).over(loader, progress=False).result(),
        halves[0].merge(halves[1]).result(),
        top(channels=[3, 1]).merge(top(channels=[3, 1]).update(IMAGES)).result(),
        named.result(),
    ):
        assert (found.numbers == whole.numbers).all()
        assert (found.boxes == whole.boxes).all()
        np.testing.assert_allclose(found.values, whole.values, rtol=1e-5)
        assert all(torch.equal(found.crops[name], crop) for name, crop in whole.crops.items())
    assert len(top().update(IMAGES[:2]).result().values[0]) == 2


class Layers(nn.Module):
    """Any chain of layers."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def by_hand(model: nn.Module, size: int, place: tuple[int, int]) -> tuple[int, int, int, int]:
    """The box of pixels that a place changes with, each changed by itself, by several amounts on several images."""
    touched = torch.zeros(size, size, dtype=torch.bool)
    for seed in range(3):
        image = torch.rand(1, 1, size, size, generator=torch.Generator().manual_seed(seed)).double()
        single = torch.eye(size * size).reshape(-1, 1, size, size).double()
        for step in (-9.0, 9.0):
            changed = model(image + step * single)[(slice(None), slice(None), *place)]
            differs = (changed != model(image)[(slice(None), slice(None), *place)]).any(1)
            touched |= differs.reshape(size, size)
    rows, columns = touched.any(1).nonzero().flatten(), touched.any(0).nonzero().flatten()
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


@pytest.mark.parametrize(
    "layers",
    [
        (nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, padding=1)),
        (nn.Conv2d(1, 4, 3, stride=2), nn.ReLU6(), nn.Conv2d(4, 4, 3, dilation=2)),
        (nn.Conv2d(1, 4, (5, 1)), nn.Hardswish(), nn.AvgPool2d(3), nn.Conv2d(4, 4, (1, 3), padding=(0, 1))),
        (nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.GELU(), nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 2)),
    ],
)
def test_a_receptive_field_is_what_pixels_one_by_one_tell(layers: tuple[nn.Module, ...]) -> None:
    size, model = 14, Layers(*layers).eval().double()
    shape = model(torch.zeros(1, 1, size, size).double()).shape[2:]
    places = [(0, 0), (shape[0] // 2, shape[1] // 2), (shape[0] - 1, 0)]
    view = View.of(model, size, 1, 0.0, 1.0, None, None)
    found = receptive_fields(view, "", places)
    assert found == {place: by_hand(model, size, place) for place in places}


@pytest.mark.parametrize(
    "layers",
    [
        (nn.Conv2d(1, 4, 3), nn.AdaptiveMaxPool2d((2, 1))),
        (nn.Conv2d(1, 4, 3), nn.MaxPool2d(5, 3)),
        (nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(3, 1, dilation=2), nn.Conv2d(4, 3, 3)),
        (nn.Conv2d(1, 4, 3), nn.Threshold(0.1, 0.0), nn.Hardtanh(-0.1, 0.1), nn.Conv2d(4, 3, 3)),
    ],
)
def test_a_place_sees_all_that_a_window_chooses_among(layers: tuple[nn.Module, ...]) -> None:
    torch.manual_seed(0)
    for layer in layers:
        getattr(layer, "reset_parameters", lambda: None)()
    size, model = 14, Layers(*layers).eval().double()
    view = View.of(model, size, 1, 0.0, 1.0, None, None)
    assert receptive_fields(view, "", [(0, 0), (1, 0)]) == {place: by_hand(model, size, place) for place in [(0, 0), (1, 0)]}


class Gated(nn.Module):
    """A convolution, of which a function makes something."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 2, 3), function

    def forward(self, images: Tensor) -> Tensor:
        return self.function(self.conv(images))


@pytest.mark.parametrize(
    ("function", "hidden"),
    [
        (lambda x: x * (x.roll(8, 3) > 0), "/gt#0"),
        (lambda x: torch.where(x.mean((2, 3), keepdim=True) > 0, x, 0.0), "/gt#0"),
        (lambda x: x + x.mean((2, 3), keepdim=True).round(), "/round#0"),
        (lambda x: x + x.mean((2, 3), keepdim=True).detach(), "/detach#0"),
        (lambda x: x * (x > 0), ""),
        (lambda x: torch.where(x > 0, x, x.exp() - 1), ""),
        (lambda x: x.masked_fill(x < 0, 0.0), ""),
        (lambda x: F.max_pool2d(x, 2), ""),
    ],
)
def test_what_no_gradient_tells_is_said(function: Callable[[Tensor], Tensor], hidden: str) -> None:
    found = TopImages(Gated(function).eval(), "", k=1).update(IMAGES[:3]).result()
    assert found.notes == ((f"boxes may be too small: no gradient tells what is seen through '{hidden}'",) if hidden else ())
    assert (found.notes[0] in repr(found)) if hidden else "too small" not in repr(found)


def last_of(x: Tensor) -> Tensor:
    values, places = x.max(3, keepdim=True)
    return values * x.gather(3, places)


def unpooled(x: Tensor) -> Tensor:
    values, places = F.max_pool2d(x, 2, return_indices=True)
    return F.max_unpool2d(values, places, 2)


@pytest.mark.parametrize("function", [last_of, unpooled])
def test_places_that_are_used_later_are_no_values(function: Callable[[Tensor], Tensor]) -> None:
    found = TopImages(Gated(function).eval(), "", k=1).update(IMAGES[:3]).result()
    wanted = function(Gated(function).conv(IMAGES[:3])).shape[1]
    assert found.values.shape == (wanted, 1)
    assert (found.outside <= 1e-5).all()


def test_of_a_batch_by_name_the_images_are_what_alone_can_be_them() -> None:
    whole = top().update(IMAGES).result()
    found = top().update({"labels": torch.arange(40), "scale": torch.ones(40), "image": IMAGES}).result()
    assert (found.numbers == whole.numbers).all()


def test_numbers_that_are_no_image_are_said(tmp_path: Path) -> None:
    found = top(k=2).update(IMAGES[:5]).update((IMAGES[:3] - 0.5) / 0.2).result()
    assert found.notes == (
        "of 3 images numbers lie outside 0 to 1, where crops are cut off; mean= and std= say what the model is given",
    )
    found.save(tmp_path / "found.safetensors")
    assert TopCrops.load(tmp_path / "found.safetensors").notes == found.notes
    assert all(0 <= float(one.min()) <= float(one.max()) <= 1 for one in found.crops.values())
    assert top(mean=0.5, std=0.2).update((IMAGES[:3] - 0.5) / 0.2).result().notes == ()


def test_what_lies_outside_of_a_crop_changes_nothing() -> None:
    found = top().update(IMAGES).result()
    assert (found.outside <= 1e-5).all()
    for (row, rank), value in np.ndenumerate(found.values):
        first, left, last, right = found.boxes[row, rank]
        alone = torch.rand(1, 3, 24, 24)
        alone[0, :, first:last, left:right] = found.crops[f"{row}/{rank}"]
        late = fmr.run(chain(), alone)["late/conv2d#0"]
        assert float(late[(0, row, *found.places[row, rank])]) == pytest.approx(value, rel=1e-3, abs=1e-5)
    assert found.crops["0/0"].shape[1] < 24


def test_what_reads_everything_is_shown_with_all_of_its_image() -> None:
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 3)

        def forward(self, images: Tensor) -> Tensor:
            x = self.conv(images)
            return x + x.detach().mean((2, 3), keepdim=True)  # which no gradient tells

    found = TopImages(Summed().eval(), "", k=2).update(IMAGES[:5]).result()
    assert (found.boxes == [0, 0, 24, 24]).all()
    logits = TopImages(chain(), "out", k=2).update(IMAGES[:5]).result()
    assert logits.places.shape == (4, 2, 0)
    assert (logits.boxes[..., :2] == 0).all()


def test_inputs_are_shown_as_images() -> None:
    normal = (IMAGES[:5] - 0.4) / 0.2
    found = top(mean=0.4, std=0.2).update(normal).result()
    first, left, last, right = found.boxes[0, 0]
    torch.testing.assert_close(found.crops["0/0"], IMAGES[found.numbers[0, 0], :, first:last, left:right], atol=1e-6, rtol=0)


def test_only_what_is_shown_is_held_and_as_it_was() -> None:
    made, batch = top(channels=[1], k=2), IMAGES.clone()
    for part in batch.split(10):
        made.update(part)
        part.zero_()  # as a loader that fills one buffer again
    assert len(made.images) == 2
    assert all(one.untyped_storage().nbytes() == one.nbytes for one in made.images.values())
    assert all(torch.equal(one, IMAGES[number]) for number, one in made.images.items())


def test_images_of_several_sizes_go_together() -> None:
    other = F.interpolate(IMAGES[:5], 32)
    found = top().over([IMAGES[:5], other], progress=False).result()
    assert found.seen == 10
    assert (found.outside <= 1e-5).all()


@pytest.mark.parametrize("block", [torch.no_grad, torch.inference_mode])
def test_a_block_without_gradients_changes_nothing(block: Callable[[], Any]) -> None:
    made = top()
    with block():
        inside = made.update(IMAGES + 0).result()
    assert (inside.boxes == top().update(IMAGES).result().boxes).all()


def test_nothing_is_left_behind() -> None:
    model = chain()
    before = torch_state(), model_state(model), random_state()
    TopImages(model, "late", k=2).update(IMAGES[:5]).result()
    assert before == (torch_state(), model_state(model), random_state())
    assert all(one.grad is None and one.requires_grad for one in model.parameters())


def test_a_result_is_saved_tabled_and_drawn(tmp_path: Path) -> None:
    digits = tasks.digits().test.inputs
    found = TopImages(fmr.zoo.load("digits-cnn").model, "conv2", [3, 5], k=2).over(digits.split(90), progress=False).result()
    found.save(tmp_path / "found.safetensors")
    again = TopCrops.load(tmp_path / "found.safetensors")
    assert torch.equal(again.crops["5/1"], found.crops["5/1"])
    assert repr(again) == repr(found)
    assert "channel 3: 8." in repr(found)
    table = found.table()
    assert list(table.channel) == [3, 3, 5, 5]
    assert list(table.value) == list(found.values.ravel())
    assert len(found.plot().axes) == 4
    ax = matplotlib.figure.Figure().add_subplot()
    assert found.plot(ax) is ax.figure


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: top().result(), r"No images have been seen yet. Call update\(batch\) or over\(loader\)"),
        (lambda: top(k=0), "k=0: expected a whole number from 1 on"),
        (lambda: top(channels=["a"]), r"channels=\['a'\]: expected numbers of channels"),
        (lambda: top(channels=[5]).update(IMAGES), r"'late/conv2d#0' has 5 channels, and none 5. Expected 0 to 4"),
        (
            lambda: top().update(IMAGES[0]),
            r"A batch holds shape \(3, 24, 24\) of torch.float32, expected",
        ),
        (lambda: top().update(IMAGES.byte()), "of torch.uint8, expected what the model is given"),
        (lambda: top().update(IMAGES).update(IMAGES * float("nan")), "Image 40 makes NaN at 'late/conv2d#0', which is"),
        (lambda: top(channels=[-6]).update(IMAGES), r"'late/conv2d#0' has 5 channels, and none -6. Expected 0 to 4"),
        (lambda: top(channels=[1, -4]).update(IMAGES), r"channels=\[1, 1\] names a channel twice. Expected each one once"),
        (lambda: top(channels=[1, 3, 1]), r"channels=\[1, 3, 1\] names a channel twice. Expected each one once"),
        (lambda: top().update(IMAGES[:0]), r"A batch holds no image: its shape is \(0, 3, 24, 24\). Expected one at least"),
        (
            lambda: top().update({"mask": IMAGES, "image": IMAGES, "labels": torch.arange(40)}),
            r"A batch holds 'mask', 'image', of which each may be the images. Expected .* argument='mask'\)",
        ),
        (lambda: top().update("a.png"), "A batch holds str, expected what the model is given"),
        (lambda: top().over(IMAGES), "batches is one Tensor, expected several batches"),
        (lambda: top().merge(top(k=4)), "merge got one with other settings, expected another TopImages"),
        (lambda: top().merge(3), "merge got int, expected another TopImages"),
        (lambda: [one := top().update(IMAGES), one.merge(one)], "merge got the same TopImages once more"),
        (lambda: top().merge(top(mean=0.5).update(IMAGES)), r"merge of mean and std \(\[0.0\], \[1.0\]\) with \(\[0.5\]"),
        (lambda: top().update(IMAGES).merge(TopImages(other(), "late/conv2d#0", k=3)), "merge of values of two models"),
        (lambda: top().update(IMAGES).update(IMAGES[:, :1]), "A batch holds images of 1 colour, those before had 3"),
        (lambda: TopImages(chain(), ["late"]), r"\['late'\] names no value: expected an ID"),  # type: ignore[arg-type]
        (lambda: TopImages(chain(), "l*"), r"'l\*' is a pattern, and one site is read"),
        (lambda: top(channels=[1]).merge(top(channels=[2]).update(IMAGES)), r"merge of channels \[1\] with \[2\]"),
        (lambda: TopImages(Chain(), "late").update(IMAGES), "Chain is in train mode"),
        (lambda: TopImages(chain(), "late", mean=None), "mean=None: expected a number, or one for each"),
    ],
)
def test_a_mistake_is_told_what_was_expected(mistake: Callable[[], Any], message: str) -> None:
    with pytest.raises(AnalyzerError, match=message):
        mistake()

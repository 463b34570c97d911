"""What units of a network look for, made visible: what is found, and how much of it stands when it is looked at otherwise.

    python etc/science/images.py

A filter made by hand gives back its direction. In EfficientNet-Lite0, three channels and the class "daisy" are visualised
from a spectrum under transformations, and by pixels without them: pixels reach higher scores, which fall apart when the
image is turned, shifted or scaled in ways that neither was made for; both stand beside the best of two photographs and
their crops, and beside random images of the same spectrum. Style transfer lets the Gram loss fall ten times with the content
bounded by half of what an unrelated image comes to. The pass of a step costs forward and backward up to the deepest site.
Each claim is checked; the exit status is 1 where one fails.
"""

import math
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from heads import claimed
from torch import Tensor, nn

import fmr
from analyzers import FeatureVisualization, StyleTransfer, TopImages, images
from analyzers.images.ascent import Steps, Task, adam
from analyzers.images.transformations import robust

SIZE, STEPS, ROUNDS = 176, 128, 50
ANGLES = (0.0, 30.0, 60.0, 90.0, 120.0, 150.0)
TARGETS = (
    images.Channel("_blocks.2", 3),
    images.Channel("_blocks.5", 7),
    images.Channel("_blocks.10", 20),
    images.Logit(985),
)
RANGE: dict[str, Any] = {"mean": 127 / 255, "std": 128 / 255}
"""What the classifier is given of an image from 0 to 1: it was trained on (byte - 127) / 128."""


class Filters(nn.Module):
    """A filter that answers to waves along each of some directions, and ReLU."""

    def __init__(self, side: int = 9, period: float = 4.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, len(ANGLES), side, padding=side // 2, bias=False)
        places = torch.arange(side) - side // 2
        for n, angle in enumerate(map(math.radians, ANGLES)):
            along = places[None] * math.cos(angle) + places[:, None] * math.sin(angle)
            window = torch.exp(-(places[None] ** 2 + places[:, None] ** 2) / (2 * (side / 4) ** 2))
            wave = torch.cos(2 * math.pi * along / period) * window
            self.conv.weight.data[n, 0] = (wave - wave.mean()) / wave.abs().sum()

    def forward(self, given: Tensor) -> Tensor:
        return torch.relu(self.conv(given))


def direction(image: Tensor) -> float:
    """Along which an image changes most, in degrees: the main axis of its power spectrum."""
    power = torch.fft.fft2(image - image.mean()).abs().square()
    down, across = torch.fft.fftfreq(image.shape[0])[:, None], torch.fft.fftfreq(image.shape[1])
    power = power * ((down.abs() < 0.45) & (across.abs() < 0.45))
    turn = math.atan2(2 * float((power * down * across).sum()), float((power * (across**2 - down**2)).sum()))
    return math.degrees(turn / 2) % 180


def filters() -> int:
    """Directions of filters, found again; how many claims fail."""
    model = Filters().eval()
    eye = FeatureVisualization(model, size=48, channels=1)
    found = eye.run([images.Channel("/relu#0", n) for n in range(len(ANGLES))], steps=80, progress=False)
    apart = [abs((direction(image[0]) - angle + 90) % 180 - 90) for image, angle in zip(found.images, ANGLES, strict=True)]
    noise = [abs((direction(torch.rand(48, 48)) - angle + 90) % 180 - 90) for angle in ANGLES]
    smooth = np.stack([np.convolve(one, np.ones(16) / 16, "valid") for one in found.curve.T])[:, ::8]
    print(
        f"  degrees from the filter's own: {', '.join(f'{one:.1f}' for one in apart)}; noise {np.mean(noise):.0f} on average"
    )
    return sum(
        (
            claimed(f"all six directions within 5 degrees: {max(apart):.1f}", max(apart) < 5),
            claimed("the smoothed score rises throughout", bool((np.diff(smooth, axis=1) > -1e-3).all())),
        )
    )


def crops(photo: Tensor, size: int) -> Tensor:
    """A photograph (1, 3, height, width) in parts that overlap by half, and as a whole at this size."""
    parts = photo.unfold(2, size, size // 2).unfold(3, size, size // 2).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, size, size)
    return torch.cat([parts, nn.functional.interpolate(photo, (size, size), mode="bilinear", antialias=True)])


def natural() -> Tensor:
    """The two photographs and crops of them at two scales."""
    whole = [images.photo(photo, (427, 640)) for photo in fmr.zoo.photos().values()]
    half = [nn.functional.interpolate(photo, scale_factor=0.6, mode="bilinear", antialias=True) for photo in whole]
    return torch.cat([crops(photo, SIZE) for photo in (*whole, *half)]).clamp(0, 1)


def features(model: nn.Module) -> int:
    """Channels and a class, from a spectrum under transformations and by pixels without; how many claims fail."""
    eye, photos, failed = FeatureVisualization(model, size=SIZE, **RANGE), natural(), 0
    start = time.perf_counter()
    spectrum = eye.run(TARGETS, steps=STEPS, progress=False)
    seconds = (time.perf_counter() - start) / len(TARGETS)
    pixels = eye.run(TARGETS, steps=STEPS, parameterization="pixels", transformations=(), progress=False)
    best = [float(eye.scores(target, photos).max()) for target in TARGETS]
    print(f"  {len(photos)} natural images; {STEPS} steps, {seconds:.1f} s an image")
    three = f"{'score':>7}{'unseen':>8}{'null':>7}"
    print(f"  {'target':<26}{'natural':>8}   spectrum{three}   pixels{three}")
    for n, target in enumerate(TARGETS):
        told = [f"{one.score[n]:>7.1f}{one.robust[n]:>8.1f}{one.null[n]:>7.1f}" for one in (spectrum, pixels)]
        print(f"  {target!s:<26}{best[n]:>8.2f}{'':>11}{told[0]}{'':>9}{told[1]}")
    kept = [one.robust / one.score for one in (spectrum, pixels)]
    failed += claimed("each image is answered to more than the best natural one, 2.5 times or more",
                      bool((spectrum.score > 2.5 * np.array(best)).all()))  # fmt: skip
    failed += claimed("and under unseen transformations, too", bool((spectrum.robust > np.array(best)).all()))
    failed += claimed("and more than random images of its spectrum", bool((spectrum.score > spectrum.null).all()))
    failed += claimed("pixels score higher as they are", bool((pixels.score > spectrum.score).all()))
    failed += claimed(
        f"of which unseen transformations leave {', '.join(f'{100 * one:.0f} %' for one in kept[1])}, of the spectrum's "
        f"{', '.join(f'{100 * one:.0f} %' for one in kept[0])}",
        bool((kept[0] > 0.75).all() and (kept[1] < 0.55).all()),
    )
    failed += claimed("deeper than block 2 the spectrum is ahead there", bool((spectrum.robust > pixels.robust)[1:].all()))
    answer = float(model(eye.view.inputs(spectrum.images[-1:])).softmax(-1)[0, 985].detach())
    failed += claimed(f"the made daisy is one to the model: {answer:.3f} > 0.99", answer > 0.99)
    return failed


def seen(model: nn.Module) -> int:
    """What channels see of the natural images that excite them most; how many claims fail."""
    shown, failed = natural(), 0
    top = TopImages(model, "_blocks.2", [3], k=4, **RANGE)
    found = top.over(((shown - RANGE["mean"]) / RANGE["std"]).split(16), progress=False).result()
    box = found.boxes[0, 0]
    print(f"  block 2, channel 3: {found.values[0, 0]:.1f} in {box[2] - box[0]} x {box[3] - box[1]} pixels of image "
          f"{found.numbers[0, 0]}; all images {found.mean[0]:.1f} +- {found.spread[0]:.1f}")  # fmt: skip
    failed += claimed("noise outside of the crops changes none of the values by 1e-5", bool((found.outside < 1e-5).all()))
    inner = [box for box in found.boxes[0] if box[0] > 0 and box[1] > 0 and max(box[2:]) < SIZE]
    inside = [f"{box[2] - box[0]} x {box[3] - box[1]}" for box in inner]
    failed += claimed(
        f"away from borders all crops are of one size: {', '.join(sorted(set(inside)))}", len(set(inside)) == 1
    )
    return failed


def styles(model: nn.Module) -> int:
    """The palace in the style of the flower; how many claims fail."""
    photos, failed = fmr.zoo.photos(), 0
    sites = ["_swish", *(f"_blocks.{n}" for n in (0, 2, 4, 7))]
    transfer = StyleTransfer(model, "_blocks.4", sites, size=192, **RANGE)
    for start, weight in (("content", 10.0), ("noise", 3.0)):
        found = transfer.run(photos["china"], photos["flower"], start=start, style_weight=weight, progress=False)
        bound, content = float(found.content_null.mean()), float(found.content_loss.mean())
        print(f"  from {start}: style {found.style_start.mean():.3f} -> {found.style_loss.mean():.3f} (random image of its "
              f"spectrum {found.style_null.mean():.3f}), content {content:.2f} (the flower {bound:.2f})")  # fmt: skip
        failed += claimed(f"the Gram loss falls {found.falls:.1f} times, 10 or more", found.falls >= 10)
        failed += claimed("content stays below half of what the flower comes to", content < 0.5 * bound)
        failed += claimed("style comes below a third of a random image with its spectrum",
                          float(found.style_loss.mean()) < float(found.style_null.mean()) / 3)  # fmt: skip
    return failed


def cost(model: nn.Module) -> int:
    """The pass of a step, and all of it, beside a forward that a hook cuts off at the same site and its gradient.

    It is the best of three tries, since others use the machine.
    """
    view, failed = FeatureVisualization(model, size=SIZE, **RANGE).view, 0
    inputs, grey = torch.rand(1, 3, SIZE, SIZE), torch.full((1, 3, SIZE, SIZE), 0.5).requires_grad_()
    for path in ("_blocks.2", "_blocks.10"):
        task = Task(view, (images.Channel(path, 3),), {path: path})
        steps = Steps(images.FFT((SIZE, SIZE)), robust((SIZE, SIZE)), adam, ROUNDS, True, 0)
        pair = [lambda path=path: bare(model, inputs, path), lambda task=task: task.gradient(grey, inputs)]
        whole = min((timed(pair) for _ in range(3)), key=lambda two: two[1] / two[0])
        begun = time.process_time()
        steps.run(task, False, "")
        step = (time.process_time() - begun) / ROUNDS
        told = f"bare {1e3 * whole[0]:.1f} ms, a pass {1e3 * whole[1]:.1f}, a step with its image {1e3 * step:.1f}"
        print(f"  up to {path}: {told}")
        failed += claimed(f"a pass is {whole[1] / whole[0]:.3f} of the bare one, at most 1.1", whole[1] <= 1.1 * whole[0])
    return failed


class _Reached(Exception):
    """The site was reached."""


def bare(model: nn.Module, inputs: Tensor, path: str) -> None:
    """Forward to a module, and the gradient of its channel at the input."""
    given, found = inputs.detach().requires_grad_(), []

    def stop(module: nn.Module, args: Any, out: Tensor) -> None:
        found.append(out)
        raise _Reached

    handle = model.get_submodule(path).register_forward_hook(stop)
    try:
        model((given - RANGE["mean"]) / RANGE["std"])
    except _Reached:
        torch.autograd.grad(found[0][:, 3].mean(), given)
    finally:
        handle.remove()


def timed(calls: list[Callable[[], Any]]) -> list[float]:
    """The least CPU time of each, in turns."""
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for call, times in zip(calls, taken, strict=True):
            begun = time.process_time()
            call()
            times.append(time.process_time() - begun)
    return [min(times) for times in taken]


def main() -> int:
    """Print all tables."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("filters made by hand")
    failed = filters()
    model = fmr.zoo.load("efficientnet").model
    for what, look in (("features", features), ("natural images", seen), ("style", styles), ("cost of a step", cost)):
        print(f"EfficientNet-Lite0: {what}")
        failed += look(model)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())

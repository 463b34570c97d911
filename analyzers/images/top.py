"""Natural images that channels answer to most, each cut to what the channel sees where it answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from analyzers.images.fields import Box, Place, receptive_fields, untold, with_noise_outside
from analyzers.images.given import check_site
from analyzers.images.seen import by_channel, channel_numbers
from analyzers.images.steady import weights_of
from analyzers.images.topcrops import TopCrops
from analyzers.images.viewing import Number, View, numbers, undisturbed
from analyzers.numbers.embed import Floats
from analyzers.protocol import Analyzer, AnalyzerError, check_counts, check_other
from fmr.errors import number_of
from fmr.nodes import Key, id_of

CLIPPED = 0.02
"""An image that lies outside 0 to 1 by more of that range is no image that was shown with the given mean and std."""

WRONG = 1e-3
"""A value that changes by more of it, when all outside a crop becomes noise, is shown with all of its image."""


class TopImages(Analyzer[TopCrops]):
    """Look for the images of a data set that channels answer to most, and for what they see of them.

    >>> analyzers.TopImages(reader, "conv2", channels=[3, 5], k=2).over([images[:50], images[50:100]]).result().values.shape
    (2, 2)

    model: any module that is given images, in eval mode. site: an ID, the path of a module or a role; what counts of an
    image is the largest value of a channel over its places. channels: which, None for all. k: how many images of each. mean,
    std: an image from 0 to 1 is input * std + mean. argument, others: as for `FeatureVisualization`.

    What a channel sees at a place is the box of pixels that a gradient from there arrives at. `outside` tells by how much
    the value changes when all pixels outside of it become noise; where that is more than rounding all of the image is shown.
    """

    def __init__(
        self, model: nn.Module, site: Key, channels: Sequence[int] | None = None, *, k: int = 9, mean: Number = 0.0,
        std: Number = 1.0, argument: str | None = None, others: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        check_counts(1, k=k)
        self.model, self.site, self.k = model, check_site(site), k
        self.asked = None if channels is None else channel_numbers(channels)
        self.channels: list[int] | None = None
        _check_once(self.asked)
        self.shown: dict[str, Any] = {"mean": mean, "std": std, "argument": argument, "others": others}
        View.of(model, 1, 3, mean, std, argument, others)
        self.key: Key | None = None
        self.weights = ""
        self.seen = self.clipped = 0
        self.colours: int | None = None
        self.values, self.numbers, self.places = torch.zeros(0, 0), torch.zeros(0, 0, dtype=torch.long), torch.zeros(0, 0, 0)
        self.sums, self.squares = torch.zeros(0).double(), torch.zeros(0).double()
        self.images: dict[int, Tensor] = {}

    def update(self, batch: Any) -> TopImages:
        """Look at a batch of inputs: a tensor (images, colours, height, width), or a loader's pair of these and labels.

        >>> analyzers.TopImages(reader, "conv1").update(images[:5]).counted
        '5 images'
        """
        inputs = _inputs(batch, self.shown["argument"])
        if self.colours not in (None, inputs.shape[1]):
            raise AnalyzerError(
                f"A batch holds images of {number_of(inputs.shape[1], 'colour')}, those before had {self.colours}. Expected "
                "as many in each."
            )
        self._check_weights()
        view = self._view(inputs)
        with undisturbed(self.model, 0), torch.no_grad():
            key = view.sites([self.site])[self.site] if self.key is None else self.key
            given = inputs.detach().to(view.like, copy=True)  # which the model may write to
            values = by_channel(view.values(given, [key])[key], key).cpu()
        self.key, self.colours, self.weights = key, inputs.shape[1], weights_of(self.model)
        self.channels = _channels(self.asked, key, values)
        values = values[:, self.channels]
        if bool(values.isnan().any()):
            first = self.seen + int(values.isnan().flatten(1).any(1).nonzero()[0, 0])
            raise AnalyzerError(
                f"Image {first} makes NaN at {str(id_of(key))!r}, which is neither more nor less than others. Leave it out, "
                "or run the model in float32."
            )
        largest, where = values[..., None].flatten(2).max(2)
        places = torch.stack(torch.unravel_index(where, values.shape[2:] or (1,)), -1)[..., : values.dim() - 2]
        numbers = torch.arange(self.seen, self.seen + len(inputs))[:, None].expand_as(largest)
        held = self._add(largest.T, numbers.T, places.transpose(0, 1))
        kept = [number for number in held if number >= self.seen]
        self.images |= {number: inputs[number - self.seen].detach().cpu().clone() for number in kept}
        self.sums = self._more(self.sums, largest.double().sum(0))
        self.squares = self._more(self.squares, largest.double().square().sum(0))
        self.seen += len(inputs)
        shown = view.images(inputs.detach().cpu())
        self.clipped += int((shown - shown.clamp(0, 1)).abs().flatten(1).amax(1).gt(CLIPPED).sum())
        return self

    def merge(self, other: TopImages) -> TopImages:
        """Add what another one saw of other images, and return this one; its images are numbered after these.

        >>> one, two = (analyzers.TopImages(reader, "conv1").update(part) for part in images[:20].split(10))
        >>> one.merge(two).counted
        '20 images'
        """
        check_other(self, other, weights=False)
        if (self.site, self.k) != (other.site, other.k):
            raise AnalyzerError("merge got one with other settings, expected another TopImages of the same site and k.")
        if self.shown["argument"] != other.shown["argument"] or self._range() != other._range():
            raise AnalyzerError(
                f"merge of mean and std {self._range()} with {other._range()}: expected the same mean, std and argument."
            )
        if (self.weights or weights_of(self.model)) != (other.weights or weights_of(other.model)):
            raise AnalyzerError(
                f"merge of values of two models: the weights of {type(self.model).__name__} and "
                f"{type(other.model).__name__} differ. Expected another TopImages of the same model."
            )
        if not other.seen:
            return self
        if self.asked != other.asked:
            raise AnalyzerError(f"merge of channels {self.asked} with {other.asked}: expected the same ones.")
        self.key, self.channels, self.weights = other.key, other.channels, other.weights
        held = self._add(other.values, other.numbers + self.seen, other.places)
        self.images |= {number: other.images[number - self.seen] for number in held if number >= self.seen}
        self.sums, self.squares = self._more(self.sums, other.sums), self._more(self.squares, other.squares)
        self.seen += other.seen
        self.clipped += other.clipped
        self.colours = self.colours or other.colours
        return self

    def _range(self) -> tuple[list[float], list[float]]:
        return numbers(self.shown["mean"]), numbers(self.shown["std"])

    @property
    def counted(self) -> str:
        """How many images were seen."""
        return number_of(self.seen, "image") if self.seen else ""

    def result(self, *, progress: bool | None = None) -> TopCrops:
        """The images that each channel answers to most, cut to what it sees of them.

        >>> analyzers.TopImages(reader, "conv2", [3], k=2).over([images[:50]]).result().table()[["image", "value"]]
        """
        if not self.seen or self.channels is None:
            raise AnalyzerError("No images have been seen yet. Call update(batch) or over(loader) before result().")
        self._check_weights()
        notes: list[str] = []
        boxes, outside = self._boxes(progress, notes)
        if self.clipped:
            notes.append(
                f"of {number_of(self.clipped, 'image')} numbers lie outside 0 to 1, where crops are cut off; mean= and std= "
                "say what the model is given"
            )
        crops = {
            f"{channel}/{rank}": self._shown(int(self.numbers[row, rank]), boxes[row][rank])
            for row, channel in enumerate(self.channels)
            for rank in range(self.values.shape[1])
        }
        mean = self.sums / self.seen
        spread = (self.squares / self.seen - mean.square()).clamp(min=0).sqrt()
        return TopCrops(
            model=type(self.model).__name__,
            site=str(id_of(self.site)),
            channels=tuple(self.channels),
            values=_array(self.values),
            numbers=self.numbers.numpy().copy(),
            places=self.places.long().numpy().copy(),
            boxes=np.array(boxes),
            outside=outside,
            mean=_array(mean),
            spread=_array(spread),
            seen=self.seen,
            crops=crops,
            notes=tuple(notes),
        )

    def _check_weights(self) -> None:
        if self.weights and weights_of(self.model) != self.weights:
            raise AnalyzerError(
                f"The weights of {type(self.model).__name__} have changed since {self.counted} were seen. Expected those "
                "that all images are seen with: make another TopImages."
            )

    def _view(self, inputs: Tensor) -> View:
        return View.of(self.model, (inputs.shape[2], inputs.shape[3]), inputs.shape[1], **self.shown)

    def _add(self, values: Tensor, numbers: Tensor, places: Tensor) -> set[int]:
        """Keep the largest of what is kept and what is new, of equal ones the earlier; the numbers of all that are kept.
        Other images are let go."""
        if self.values.numel():
            values, numbers = torch.cat([self.values, values], 1), torch.cat([self.numbers, numbers], 1)
            places = torch.cat([self.places, places], 1)
        order = values.sort(dim=1, descending=True, stable=True).indices[:, : self.k]
        self.values, self.numbers = values.gather(1, order), numbers.gather(1, order)
        self.places = places.gather(1, order[..., None].expand(-1, -1, places.shape[2]))
        held = set(self.numbers.flatten().tolist())
        self.images = {number: image for number, image in self.images.items() if number in held}
        return held

    @staticmethod
    def _more(known: Tensor, new: Tensor) -> Tensor:
        return known + new if known.numel() else new

    def _boxes(self, progress: bool | None, notes: list[str]) -> tuple[list[list[Box]], Floats]:
        """The box of each kept image, and by how much of it the value changes when all outside becomes noise; what
        gradients cannot tell is noted."""
        assert self.key is not None
        rows, ranks = self.values.shape
        boxes: list[list[Box]] = [[(0, 0, 0, 0)] * ranks for _ in range(rows)]
        outside: Floats = np.zeros((rows, ranks))
        by_size: dict[tuple[int, ...], list[tuple[int, int]]] = defaultdict(list)
        for row in range(rows):
            for rank in range(ranks):
                by_size[tuple(self.images[int(self.numbers[row, rank])].shape)].append((row, rank))
        with undisturbed(self.model, 0):
            for entries in by_size.values():
                view = self._view(self.images[int(self.numbers[entries[0]])][None])
                with torch.no_grad():
                    hidden = untold(view.graph(), self.key)
                places = [self._place(*entry) for entry in entries]
                found = receptive_fields(view, self.key, places, progress)
                for start in range(0, len(entries), _AT_ONCE):
                    some = entries[start : start + _AT_ONCE]
                    chosen = [found[self._place(*entry)] for entry in some]
                    for (row, rank), box, error in zip(some, chosen, self._changes(view, some, chosen), strict=True):
                        whole = (0, 0, *view.size)
                        boxes[row][rank], outside[row, rank] = (box, error) if error <= WRONG else (whole, 0.0)
        if hidden:
            notes.append(
                f"boxes may be too small: no gradient tells what is seen through {', '.join(map(repr, hidden[:3]))}"
                + f" and {len(hidden) - 3} more" * (len(hidden) > 3)
            )
        return boxes, outside

    def _place(self, row: int, rank: int) -> Place:
        return tuple(int(n) for n in self.places[row, rank])

    def _changes(self, view: View, entries: list[tuple[int, int]], boxes: list[Box]) -> list[float]:
        """By how much of themselves values change when all outside their boxes becomes noise."""
        assert self.key is not None
        assert self.channels is not None
        inputs = torch.stack([self.images[int(self.numbers[entry])] for entry in entries]).to(view.like)
        with torch.no_grad():
            pair = [
                by_channel(view.values(given, [self.key])[self.key], self.key)
                for given in (inputs, with_noise_outside(inputs, boxes))
            ]
        found = []
        for n, entry in enumerate(entries):
            before, after = (float(one[(n, self.channels[entry[0]], *self._place(*entry))]) for one in pair)
            found.append(abs(after - before) / max(abs(before), float(pair[0][n].abs().max()), 1e-12))
        return found

    def _shown(self, number: int, box: Box) -> Tensor:
        image = self.images[number][None]
        top, left, bottom, right = box
        return self._view(image).images(image)[0, :, top:bottom, left:right].clamp(0, 1)


_AT_ONCE = 16
"""How many images are run at once."""


def _inputs(batch: Any, argument: Any) -> Tensor:
    """The images of a batch."""
    found = batch
    if isinstance(batch, Mapping):
        found = batch.get(argument) if argument is not None else _image_of(batch)
    elif isinstance(batch, (tuple, list)) and batch:
        found = batch[0]
    if isinstance(found, Tensor) and not len(found[:1] if found.dim() else [0]):
        raise AnalyzerError(
            f"A batch holds no image: its shape is {tuple(found.shape)}. Expected one at least; leave it out."
        )
    if not isinstance(found, Tensor) or found.dim() != 4 or not len(found) or not found.is_floating_point():
        what = f"shape {tuple(found.shape)} of {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
        raise AnalyzerError(
            f"A batch holds {what}, expected what the model is given: a tensor (images, colours, height, width) of "
            "floating-point numbers, or a pair of it and labels."
        )
    return found


def _image_of(batch: Mapping[Any, Any]) -> object:
    """What alone can be the images of a batch by name."""
    floating = [
        name for name, one in batch.items() if isinstance(one, Tensor) and one.is_floating_point() and one.dim() == 4
    ]
    if len(floating) > 1:
        raise AnalyzerError(
            f"A batch holds {', '.join(map(repr, floating))}, of which each may be the images. Expected the name under "
            f"which the model takes them: TopImages(..., argument={floating[0]!r})."
        )
    return batch[floating[0]] if floating else next(iter(batch.values()), None)


def _channels(asked: list[int] | None, site: Key, values: Tensor) -> list[int]:
    """The channels that are looked at, counted from the first one; None asks for all."""
    many = values.shape[1]
    for one in asked or []:
        if not -many <= one < many:
            raise AnalyzerError(f"{str(id_of(site))!r} has {many} channels, and none {one}. Expected 0 to {many - 1}.")
    found = list(range(many)) if asked is None else [one % many for one in asked]
    _check_once(found)
    return found


def _check_once(channels: list[int] | None) -> None:
    if channels and len({*channels}) < len(channels):
        raise AnalyzerError(f"channels={channels!r} names a channel twice. Expected each one once.")


def _array(values: Tensor) -> Floats:
    found: Floats = values.double().numpy().copy()
    return found

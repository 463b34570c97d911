"""How a model is shown images: their size and range, what else it is given, and what is read of it."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fmr
from analyzers.images.examples import axes_of, check_layout
from analyzers.images.given import check_site
from analyzers.images.inside import held_at, placed, read_for
from analyzers.images.layouts import with_layout
from analyzers.images.parameterizations import Size, sides
from analyzers.images.seen import Seen, tensor_at
from analyzers.images.steady import steady
from analyzers.protocol import AnalyzerError, check_eval
from fmr.edits.editor import Asked
from fmr.errors import FmrError, whole_number
from fmr.graph.graph import Graph
from fmr.ids import Site
from fmr.interventions.roles import sites_by_role
from fmr.nodes import Key, id_of, is_key

Number = float | Sequence[float]


@dataclass(frozen=True, eq=False)
class View:
    """A model with what makes its input of images from 0 to 1: (image - mean) / std, in its own type and on its device."""

    model: nn.Module
    size: tuple[int, int]
    channels: int
    mean: Number
    std: Number
    argument: str | None
    others: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(
        model: nn.Module, size: Size, channels: int, mean: Number, std: Number, argument: str | None,
        others: Mapping[str, Any] | None,
    ) -> View:  # fmt: skip
        """A view with its settings checked."""
        if (count := whole_number(channels)) is None or count < 1:
            raise AnalyzerError(f"channels={channels!r}: expected how many colours an image has, as 3, or 1 for grey.")
        for name, value in (("mean", mean), ("std", std)):
            _check_colours(name, value, count)
        if others is not None and not isinstance(others, Mapping):
            raise AnalyzerError(f"others is a {type(others).__name__}, expected what else the model is given, by name.")
        _check_names(argument, others)
        return View(model, sides(size), count, mean, std, argument, dict(others or {}))

    @property
    def like(self) -> Tensor:
        """An empty tensor of the model's type and on its device."""
        found = next((one for one in self.model.parameters() if one.is_floating_point()), None)
        return torch.empty(0) if found is None else found.detach().new_empty(0)

    @property
    def precision(self) -> torch.dtype:
        """The numbers of images: those of the model, in single precision at least."""
        return torch.promote_types(self.like.dtype, torch.float32)

    def grey(self) -> Tensor:
        """What the model is given for a grey image."""
        return self.inputs(torch.full((1, self.channels, *self.size), 0.5, device=self.like.device))

    def inputs(self, images: Tensor) -> Tensor:
        """What the model is given for images."""
        mean, std = (self._colours(one, images) for one in (self.mean, self.std))
        return ((images - mean) / std).to(self.like)

    def images(self, inputs: Tensor) -> Tensor:
        """The images that make these inputs, which lie within 0 and 1 if mean and std are those of the model."""
        shown = inputs.detach().float()
        mean, std = (self._colours(one, shown) for one in (self.mean, self.std))
        return shown * std + mean

    def run(self, inputs: Tensor, keep: Sequence[Key] | str, *, grad: bool = False, edits: Asked | None = None) -> fmr.Run:
        """A pass over these inputs that ends after the deepest of what is kept, by words the whole of it.

        With `grad` or without, the model goes the same way, so that what is found in one pass is there in all.
        """
        how: dict[str, Any] = {"keep": keep if isinstance(keep, str) else list(keep), "stop": not isinstance(keep, str)}
        with nullcontext(inputs) if grad or not _goes_around(self.model) else _the_same_way(inputs) as given:
            how |= {"grad": given.requires_grad, "edits": edits, **self._beside()}
            if self.argument is not None:
                return fmr.run(self.model, **how | {self.argument: given})
            return fmr.run(self.model, given, **how)

    def values(
        self, inputs: Tensor, sites: Iterable[Key], *, grad: bool = False, edits: Asked | None = None
    ) -> dict[Key, Tensor]:
        """What sites hold in a pass over these inputs, a row for each image."""
        wanted = list(dict.fromkeys(sites))
        run = self.run(inputs, [one for key in wanted for one in read_for(key, grad)], grad=grad, edits=edits)
        found = {key: tensor_at(key, held_at(key, run, grad), len(inputs)) for key in wanted}
        return found if grad else {key: value.detach() for key, value in found.items()}

    def seen(
        self, images: Tensor, inputs: Tensor, sites: Mapping[Key, Key], *, grad: bool = False, edits: Asked | None = None
    ) -> Seen:
        """What objectives read: images, and the values of a pass over what the model was given for them."""
        held = self.values(inputs, sites.values(), grad=grad, edits=edits)
        return Seen(images, partial(_read_of, {site: held[key] for site, key in sites.items()}), sites)

    def sites(self, asked: Sequence[Key]) -> dict[Key, Key]:
        """Each site that is asked for with the one that is read: what has the role, or itself, laid out as its ops tell."""
        with steady(self.model) as settled:
            graph = self.graph()
            settled()
            return self._proven(asked, graph)

    def _proven(self, asked: Sequence[Key], graph: Graph) -> dict[Key, Key]:
        """The sites that are read, by those that are asked for, each laid out as its ops and two images tell."""
        _check_examples(graph)
        roles = [site for site in map(check_site, asked) if _is_role(site)]
        known: dict[str, Site] = {}
        if roles:
            with torch.no_grad():
                known = sites_by_role(fmr.locate(self._tried("all")))
        for role in map(id_of, roles):
            if role not in known:
                raise AnalyzerError(
                    f"{type(self.model).__name__} has no {str(role)!r}. Expected an ID, the path of a module, or one of the "
                    f"roles {', '.join(list(known)[:4]) or 'of a model with layers'}."
                )
        found = {site: _of_role(known, site) if site in roles else with_layout(graph, site) for site in asked}
        axes = axes_of(self._read, self.pair(), list(found.values()), self.like.dtype)
        laid = {site: with_layout(graph, site, axes[key]) if axes[key] else key for site, key in found.items()}
        for site, key in laid.items():
            check_layout(key, axes[found[site]])
        return {site: placed(graph, key) for site, key in laid.items()}

    def pair(self) -> Tensor:
        """What the model is given for two images of noise, a dark one and a bright one."""
        noise = torch.rand(2, self.channels, *self.size, generator=torch.Generator().manual_seed(0))
        return self.inputs((noise ** torch.tensor([2.0, 0.5])[:, None, None, None]).to(self.like.device))

    def _read(self, inputs: Tensor, keep: Sequence[Key], seed: int) -> fmr.Run:
        """A pass without gradients that draws what the seed says, over inputs that the model may write to."""
        with undisturbed(self.model, seed), torch.no_grad():
            return self.run(inputs.clone(), keep)

    def graph(self) -> Graph:
        """The graph of a pass over a grey image; a model that does not take such images is refused."""
        return self._tried("none").graph

    def _tried(self, keep: str) -> fmr.Run:
        grey = self.grey()
        try:
            return self.run(grey, keep)
        except FmrError:
            raise
        except (RuntimeError, TypeError, ValueError, AssertionError, AttributeError, IndexError) as error:
            raise AnalyzerError(
                f"{type(self.model).__name__} does not take images of shape {tuple(grey.shape)}: "
                f"{str(error).splitlines()[0] if str(error) else type(error).__name__}. Expected size=, channels= as it was "
                f"trained with, argument= for the name of the images and others= for what else it is given."
            ) from error

    def _beside(self) -> dict[str, Any]:
        """What else the model is given, of its own each time, so that a model may write to it."""
        return {name: one.clone() if isinstance(one, Tensor) else one for name, one in self.others.items()}

    @staticmethod
    def _colours(value: Number, images: Tensor) -> Tensor:
        return torch.as_tensor(value, dtype=images.dtype, device=images.device).reshape(-1, 1, 1)


def _goes_around(model: nn.Module) -> bool:
    """Whether torch may take a fused way through a model without gradients, on which there are other values."""
    return any(isinstance(one, nn.MultiheadAttention) for one in model.modules())


@contextmanager
def _the_same_way(inputs: Tensor) -> Iterator[Tensor]:
    """A block, and inputs, with which a model goes the way that it goes under gradients; nothing is kept for these."""
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_nothing, _nothing):
        yield inputs.detach().requires_grad_().clone()


def _nothing(saved: Any) -> Any:
    """In the place of what would be kept for a backward pass."""


def _read_of(values: Mapping[Key, Tensor], site: Key) -> Tensor:
    """What a site holds that an objective has named."""
    if site not in values:
        raise AnalyzerError(
            f"{str(id_of(site))!r} is read and not named: expected it among the sites of the objective, which are "
            f"{', '.join(repr(str(id_of(one))) for one in values)}."
        )
    return values[site]


def numbers(value: Any) -> list[float]:
    """A number, or several, as a list; empty for what is none."""
    try:
        return (
            []
            if isinstance(value, (str, bool))
            else torch.as_tensor(value, dtype=torch.float64, device="cpu").flatten().tolist()
        )
    except (TypeError, ValueError, RuntimeError):
        return []


def _check_colours(name: str, value: Any, channels: int) -> None:
    given = numbers(value)
    if len(given) not in (1, channels) or not all(map(math.isfinite, given)):
        raise AnalyzerError(f"{name}={value!r}: expected a number, or one for each of the {channels} colours.")
    if name == "mean" and not all(0 <= one <= 1 for one in given):
        raise AnalyzerError(
            f"mean={value!r}: expected numbers from 0 to 1, of which images are. Divide bytes by 255, std= too."
        )
    if name == "std" and min(given) <= 0:
        raise AnalyzerError(f"std={value!r}: expected numbers above 0, by which images are divided.")


def _check_names(argument: Any, others: Mapping[Any, Any] | None) -> None:
    """Raise for what no argument of a function is called."""
    wrong = [one for one in others or () if not isinstance(one, str)]
    if wrong or not isinstance(argument, (str, type(None))):
        what = f"others has the name {wrong[0]!r}" if wrong else f"argument={argument!r}"
        raise AnalyzerError(f"{what}, expected the name of an argument of the model, as 'pixel_values'.")
    if argument is not None and argument in (others or ()):
        raise AnalyzerError(f"{argument!r} is both argument= and in others=, expected the images under a name of their own.")


def _is_role(site: Key) -> bool:
    """Whether a site is spelled as a role and not as an ID or a path."""
    name = str(id_of(site))
    return "#" not in name and ("[" in name or name in ("embedding", "final_norm", "unembedding"))


def _of_role(known: Mapping[str, Site], site: Key) -> Site:
    """What has the role of a site, narrowed as the site is."""
    found = known[id_of(site)]
    return found.at(**site.selection) if isinstance(site, Site) else found


def photo(image: Any, size: Size = 224) -> Tensor:
    """A photograph as an image (1, 3, height, width) from 0 to 1: what is in its middle, resized.

    >>> analyzers.images.photo(fmr.zoo.photos()["flower"], 64).shape
    torch.Size([1, 3, 64, 64])

    image: an array of height x width x 3 with values of type uint8, or a picture of Pillow.
    """
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise AnalyzerError(
            f"A photograph was expected, not {type(image).__name__} of shape {array.shape} and type {array.dtype}. Give an "
            "array of height x width x 3 of type uint8, or a picture of Pillow in RGB."
        )
    height, width = sides(size)
    whole = torch.from_numpy(array.copy()).permute(2, 0, 1)[None].float() / 255
    factor = min(whole.shape[2] / height, whole.shape[3] / width)
    tall, wide = (max(1, int(factor * side)) for side in (height, width))
    top, left = (whole.shape[2] - tall) // 2, (whole.shape[3] - wide) // 2
    middle = whole[..., top : top + tall, left : left + wide]
    return F.interpolate(middle, (height, width), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


def as_images(given: Any, view: View, name: str = "images") -> Tensor:
    """Images as they were given, checked: (images, colours, height, width) from 0 to 1; photographs are resized."""
    if isinstance(given, (list, tuple)) and given:
        return torch.cat([as_images(one, view, name) for one in given])
    if not isinstance(given, Tensor):
        if view.channels != 3:
            raise AnalyzerError(
                f"{name} is a {type(given).__name__}, expected a tensor from 0 to 1 for a model of grey images."
            )
        given = photo(given, view.size)
    if given.is_meta or given.layout != torch.strided:
        what = "on the device meta and has no numbers" if given.is_meta else f"of layout {given.layout}"
        raise AnalyzerError(f"{name} is {what}, expected a dense tensor with numbers from 0 to 1.")
    found = given[None] if given.dim() == 3 else given
    wanted = (view.channels, *view.size)
    if found.dim() != 4 or tuple(found.shape[1:]) != wanted or not len(found):
        raise AnalyzerError(
            f"{name} has shape {tuple(given.shape)}, expected {wanted} for each image, as the model is shown them. Resize "
            "it: analyzers.images.photo(array, size), or make the method with another size=."
        )
    if not found.is_floating_point() or not bool(((found >= 0) & (found <= 1)).all()):
        ends = f"{found.min():.3g} to {found.max():.3g}" if found.numel() else "nothing"
        raise AnalyzerError(
            f"{name} holds {str(found.dtype).removeprefix('torch.')} from {ends}, expected numbers from 0 to 1. Divide "
            "bytes by 255; what was normalised for the model is brought back by * std + mean."
        )
    kept: Tensor = found.detach().to(view.like.device, view.precision)
    return kept


@contextmanager
def undisturbed(model: nn.Module, seed: int) -> Iterator[None]:
    """A block with gradients and random numbers of its own, in which a model is used as it stands."""
    check_eval(model)
    _check_weights(model)
    devices = {one.device for one in model.parameters() if one.device.type == "cuda"}
    own, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=list(devices)):
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.random.default_generator.manual_seed(seed)
            for device in devices:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            yield
    finally:
        random.setstate(own)
        np.random.set_state(numpy)


def _check_weights(model: nn.Module) -> None:
    """Raise for weights without numbers, and for those that no gradient may be taken through."""
    for name, one in (*model.named_parameters(), *model.named_buffers()):
        if one.is_meta:
            raise AnalyzerError(
                f"{type(model).__name__}.{name} is on the device meta and has no numbers. Expected a model with weights."
            )
        if one.is_inference():
            raise AnalyzerError(
                f"{type(model).__name__}.{name} was made in torch.inference_mode(), and no gradient passes it. Expected a "
                "model that is built outside of it."
            )


def _check_examples(graph: Graph) -> None:
    """Raise for a model in which what is made of an image depends on the other images of the batch."""
    for node in graph.nodes:
        if node.op == "batch_norm" and node.argument("training", 5, False) is True:
            raise AnalyzerError(
                f"{node.id} takes mean and spread over the batch in eval mode too, so that what is made of an image depends "
                "on the others. Expected running statistics: track_running_stats=True."
            )


def keys_of(given: Any) -> list[Key]:
    """Several sites, or one."""
    found = [given] if is_key(given) else list(given) if isinstance(given, (tuple, list)) else []
    if not found or not all(is_key(one) for one in found):
        raise AnalyzerError(f"{given!r} is no site. Expected an ID, the path of a module, a role, or a list of these.")
    return found

"""What every analyzer is: sums that batches add to, that merge across shards, and a frozen result made from them."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from analyzers.counts import counts_of, empty, with_counts
from fmr.corpora.ranks import share, together
from fmr.errors import FmrError, number_of, whole_number
from fmr.sweeps.bars import hidden
from fmr.weights import fingerprint

if TYPE_CHECKING:
    from typing import Self

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

Batch = Mapping[str, Any]
"""Named arguments of one forward, as a tokenizer returns them; `attention_mask` (examples, positions) is 0 on padding."""


Given = str | Sequence[str] | Tensor | Batch
"""Prompts as a user has them: a text, several, token ids (examples, positions), or named arguments of a forward."""

TEXTS = 16
"""How many texts make a batch."""


class AnalyzerError(FmrError):
    """An analyzer got what it cannot count, or was asked for a result that it cannot give."""


class Result(Protocol):
    """The numbers that an analyzer leaves: a frozen dataclass."""

    def table(self) -> DataFrame: ...

    def plot(self, ax: Axes | None = None) -> Figure: ...


R = TypeVar("R", bound=Result)


class Method:
    """What every method is: one that refuses what is no model, and that prints with the arguments it was made with.

    >>> analyzers.LogitLens(model)
    LogitLens(GPT2LMHeadModel)
    """

    _made_with: Mapping[str, Any] = {}

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        made, signature = super().__new__(cls), inspect.signature(cls.__init__)
        try:
            given = dict(list(signature.bind_partial(made, *args, **kwargs).arguments.items())[1:])
        except TypeError:  # __init__ says it in Python's own words
            return made
        defaults = {name: one.default for name, one in signature.parameters.items()}
        made._made_with = {name: value for name, value in given.items() if value is not defaults[name]}
        if "model" in given and not (given["model"] is None and defaults["model"] is None):
            model = given["model"]
            for one in model.values() if isinstance(model, Mapping) and not isinstance(model, nn.Module) else [model]:
                check_model(one, cls.__name__)
        if given.get("tokenizer") is not None and not hasattr(given["tokenizer"], "decode"):
            raise AnalyzerError(
                f"{cls.__name__} got a {type(given['tokenizer']).__name__} for its tokenizer, expected what turns text into "
                "tokens and back, or None for prompts of token ids."
            )
        return made

    def __repr__(self) -> str:
        told = [
            _short(value) if name in ("model", "tokenizer") else f"{name}={_short(value)}"
            for name, value in self._made_with.items()
            if not (name == "tokenizer" and value is None)
        ]
        return f"{type(self).__name__}({', '.join(told)})"


class Analyzer(Method, ABC, Generic[R]):
    """A measurement over a data set, of which no part need be in memory twice.

    >>> analyzer = HeadClustering(model)
    >>> analyzer.over(batches).result().plot()

    Whoever writes one keeps sums, never averages: then how the data is cut into batches and shards changes nothing.
    """

    @abstractmethod
    def update(self, batch: Batch) -> Self:
        """Count one batch and return the analyzer."""

    @abstractmethod
    def merge(self, other: Self) -> Self:
        """Add what another analyzer of the same settings counted on other data, and return this one."""

    @abstractmethod
    def result(self) -> R:
        """The numbers so far; more batches may follow."""

    @property
    def counted(self) -> str | None:
        """What was counted so far, in words; empty for nothing, None where a method does not say."""
        return None

    def __repr__(self) -> str:
        told = "nothing counted yet" if self.counted == "" else f"{self.counted} counted"
        return super().__repr__() if self.counted is None else f"{super().__repr__()}: {told}"

    def over(self, batches: Iterable[Given], *, ranks: bool = False, progress: bool | None = None) -> Self:
        """Count every batch of a loader and return the analyzer; texts are put together, 16 a batch.

        >>> heads.over(batches)

        ranks: under torchrun, each process is given all batches and counts its share of them, and each returns with what all
        have counted. progress: show a bar; None shows it on a terminal only.
        """
        if isinstance(batches, (Mapping, str, Tensor)):
            raise AnalyzerError(
                f"batches is one {type(batches).__name__}, expected several batches, as a loader gives them. Pass [batch], "
                f"or call update(batch)."
            )
        if ranks:
            return self._over_ranks(batches, progress)
        for batch in tqdm(
            self._fresh(some(gathered(batches))), desc=type(self).__name__, unit="batch", disable=hidden(progress)
        ):
            self.update(cast("Batch", batch))
        return self

    def _over_ranks(self, batches: Iterable[Given], progress: bool | None) -> Self:
        """Count what all processes of a group count, each its own share."""
        own = empty(self)
        shares = together(lambda: counts_of(own.over(share(batches, AnalyzerError), progress=progress)), AnalyzerError)
        for counts in shares:
            self.merge(with_counts(self, counts))
        return self

    def _fresh(self, batches: Iterator[Given]) -> Iterator[Given]:
        """Those of several batches that are still to be counted: all, but for a method that keeps what it has counted."""
        return batches


def gathered(batches: Iterable[Given]) -> Iterator[Given]:
    """Batches as they come, with texts put together."""
    texts: list[str] = []
    for batch in batches:
        if isinstance(batch, str):
            texts.append(batch)
        else:
            yield batch
        if len(texts) == TEXTS:
            yield texts
            texts = []
    if texts:
        yield texts


def some(batches: Iterator[Given]) -> Iterator[Given]:
    """Batches as they come, of which there must be one."""
    first = next(batches, None)
    if first is None:
        raise AnalyzerError(
            "The loader gave no batch. Expected some: a list, or a loader that is not used up, as a generator is that was "
            "gone through before."
        )
    yield first
    yield from batches


def checked(batch: Batch) -> dict[str, Any]:
    """The batch as keyword arguments; it must be a mapping that holds a tensor."""
    if not isinstance(batch, Mapping):
        raise AnalyzerError(
            f"A batch is a {type(batch).__name__}, expected a mapping of the model's arguments to tensors. "
            f"Pass what the tokenizer returns, {{'input_ids': tensor}}, or of images {{'pixel_values': tensor}}."
        )
    if not any(isinstance(value, Tensor) for value in batch.values()):
        kinds = ", ".join(f"{name}: {type(value).__name__}" for name, value in batch.items()) or "nothing"
        raise AnalyzerError(f"The batch holds no tensor ({kinds}). Call the tokenizer with return_tensors='pt'.")
    return dict(batch)


def real_tokens(mask: Any, examples: int, positions: int) -> Tensor:
    """Which tokens are not padding, (examples, positions) in booleans on the CPU; without a mask, all are."""
    if mask is None:
        return torch.ones(examples, positions, dtype=torch.bool)
    mask = torch.as_tensor(mask)
    if mask.shape != (examples, positions):
        raise AnalyzerError(
            f"The mask has shape {tuple(mask.shape)}, expected (examples, positions) = {(examples, positions)} as the "
            "tokens have. Pass one row per example, 1 for a token and 0 for padding."
        )
    real: Tensor = mask.detach().cpu() != 0
    return real


def later_tokens(real: Tensor, skip: int) -> Tensor:
    """The real tokens less so many at the start of each example, (examples, positions) both."""
    return real & (real.cumsum(1) > skip)


def asked_tokens(mask: Any, examples: int, positions: int) -> Tensor:
    """The same of prompts that something is asked of: one without a token is refused, where counts take it as nothing."""
    real = real_tokens(mask, examples, positions)
    empty = (~real.any(1)).nonzero()[:, 0].tolist()
    if empty:
        raise AnalyzerError(
            f"The mask is 0 all along example {', '.join(map(str, empty[:4]))} of {examples}: expected a token in each "
            "example. Leave empty texts out."
        )
    return real


def check_other(one: Method, other: Any, *, weights: bool = True, asked: Sequence[str] = ()) -> None:
    """Raise for what an analyzer cannot add to its counts: no other one of its kind, itself, other weights.

    weights: whether models are compared here; not by a method that knows those of its counts. asked: which part of a model
    is counted, of one that has counted nothing which would tell it; one without a model has no part of its own.
    """
    name = type(one).__name__
    if not isinstance(other, type(one)):
        raise AnalyzerError(f"merge got {type(other).__name__}, expected another {name}.")
    if one is other:
        raise AnalyzerError(f"merge got the same {name} once more. Expected what another one counted.")
    models = [each._made_with.get("model") for each in (one, other)]
    for what in asked if None not in models else ():
        if (mine := getattr(one, what)) != (others := getattr(other, what)):
            raise AnalyzerError(f"merge of {what}={mine!r} with {others!r}: expected one value.")
    ours, theirs = (dict(each) if isinstance(each, Mapping) else {"": each} for each in models)
    same = ours.keys() == theirs.keys() and all(
        ours[key] is theirs[key] or _known(ours[key]) == _known(theirs[key]) for key in ours
    )
    if weights and not same:
        told = ", ".join(type(each).__name__ for each in theirs.values())
        raise AnalyzerError(f"merge got what was counted on a {told} with other weights. Expected one model.")


def nothing_counted(skip: int = 0) -> str:
    """The message for a result of nothing."""
    more = f" The first {number_of(skip, 'token')} of each text are left out." if skip else ""
    return f"Nothing has been counted yet. Call update(batch) or over(batches) before result().{more}"


def _known(model: Any) -> str | None:
    """A model by its weights; None for none."""
    return fingerprint(model) if isinstance(model, nn.Module) else None


def check_counts(least: int, **given: Any) -> None:
    """Raise for what counts something and is no whole number, or less than so many."""
    for name, value in given.items():
        if (number := whole_number(value)) is None or number < least:
            raise AnalyzerError(f"{name}={value!r}: expected a whole number from {least} on.")


def layer_numbers(layers: Any) -> tuple[int, ...] | None:
    """Numbers of layers as they are asked for; None for all."""
    if layers is None:
        return None
    found = () if isinstance(layers, str) or not isinstance(layers, Iterable) else tuple(map(whole_number, layers))
    if not found or None in found:
        raise AnalyzerError(f"layers={layers!r}: expected numbers of layers, as layers=[3], or None for all.")
    return cast("tuple[int, ...]", found)


def check_model(model: Any, name: str) -> None:
    """Raise for what is no model: a name, a class, nothing, or something that has one."""
    if isinstance(model, nn.Module):
        return
    plain = model is None or isinstance(model, str | int | float)
    told = (
        repr(model) if plain else f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
    )
    remedy = ": an instance, not its class" if isinstance(model, type) else ""
    if isinstance(getattr(model, "model", None), nn.Module):
        remedy = f": {name}(given.model, ...)"
    raise AnalyzerError(f"{name} got {told} for its model, expected a torch.nn.Module{remedy}.")


_LONGEST = 40
"""How many characters of an argument are printed."""


def _short(value: Any) -> str:
    """An argument in a few words."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name!r}: {_short(one)}' for name, one in value.items())}}}"
    if isinstance(value, (str, int, float, type(None), list, tuple, range, PathLike)) and len(repr(value)) <= _LONGEST:
        return repr(value)
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, (list, tuple, range)) else type(value).__name__


def device_of(model: nn.Module) -> torch.device:
    """Where the first parameter of a model lies; of a model without any, the CPU."""
    return next((one.device for one in model.parameters()), torch.device("cpu"))


def check_eval(model: nn.Module) -> None:
    """Raise for a model of which a part is in train mode: dropout would differ between the runs that are compared."""
    name = next((name for name, module in model.named_modules() if module.training), None)
    if name is not None:
        part = f"{type(model).__name__}.{name}" if name else type(model).__name__
        raise AnalyzerError(
            f"{part} is in train mode, in which runs of the same inputs may differ. Expected eval mode: call model.eval()."
        )

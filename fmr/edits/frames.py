"""What the calls of a pass tell about its columns: how many there are, which hold real tokens, how many came before."""

import weakref
from collections import UserDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmr.edits import masks
from fmr.errors import EditError
from fmr.nests import leaves
from fmr.watching.own import unseen
from fmr.watching.scopes import argument_names, named_arguments


class Frame(NamedTuple):
    """What a pass tells about positions: how many came before it, and which columns hold real tokens, example by example.

    `mask` covers the columns that came before, too; it is None where nothing is padded. `past` is None where nothing tells.
    `cached`: there is a cache, whose values may have columns of their own. `unclear` says which mask does not tell, and why.
    """

    past: int | None = 0
    mask: Tensor | None = None
    cached: bool = False
    unclear: str = ""


Frames = list[tuple[int, Frame]]
"""The frames of a pass, each with how many columns it is for."""

_TOKENS = ("input_ids", "inputs_embeds")
_REAL, _HIDDEN = "attention_mask", "key_padding_mask"
_NAMES = (*_TOKENS, _REAL, _HIDDEN)


@dataclass
class Told:
    """What the arguments of a call tell by their names, each under the prefix of its name.

    columns: how many tokens there are; masks: which are real; wide: masks of queries and keys; odd: why masks do not tell;
    strange: masks of other names; others: how many columns other passes made; cache: what holds keys and values of before.
    """

    columns: dict[str, int] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    wide: dict[str, list[Tensor]] = field(default_factory=dict)
    odd: dict[str, str] = field(default_factory=dict)
    strange: dict[str, Tensor] = field(default_factory=dict)
    others: list[int] = field(default_factory=list)
    cache: Any = None

    @property
    def is_masked(self) -> bool:
        """Whether any mask was given."""
        return bool(self.masks or self.wide or self.odd)

    @property
    def decoded(self) -> str | None:
        """The prefix of the tokens that follow those in the cache: of an encoder's and a decoder's the decoder's."""
        names = [name for name in self.columns if len(self.columns) == 1 or name.endswith("decoder_")]
        return names[0] if len(names) == 1 else None


def told_by(arguments: Mapping[str, Any]) -> Told:
    """What the arguments of a call tell, by name.

    Tokens stand in `{x}input_ids` or `{x}inputs_embeds`, which are real in `{x}attention_mask`, which are not in
    `{x}key_padding_mask`, what came before in a key-value cache, what an encoder made in `encoder_...`.
    """
    given, told = {**arguments}, Told()
    for name, value in arguments.items():
        given.update((f"{name}.{key}", item) for key, item in held(value))
    for name, value in given.items():
        kind = next((kind for kind in _NAMES if name.endswith(kind)), None)
        if kind in (_REAL, _HIDDEN):
            _take_mask(told, name, name.removesuffix(kind), value, kind == _HIDDEN)
        elif kind is not None and isinstance(value, Tensor) and not value.is_meta and value.dim() > 1:
            told.columns[name.removesuffix(kind)] = value.shape[1]
        elif name.startswith("encoder_"):
            told.others += [tensor.shape[1] for _, tensor in leaves(value) if tensor.dim() == 3]
        elif told.cache is None and _is_cache(name, value):
            told.cache = value
        elif name.endswith("mask") and _is_of_columns(value, given):
            with unseen():
                told.strange[name] = value.detach().to(torch.bool, copy=True)
    return told


def _is_of_columns(value: Any, given: Mapping[str, Any]) -> bool:
    """Whether a tensor holds a number, true or not, for each column of another."""
    if not isinstance(value, Tensor) or value.is_meta or value.dim() != 2 or value.is_floating_point():
        return False
    return any(isinstance(one, Tensor) and one is not value and one.shape[:2] == value.shape for one in given.values())


def may_tell(called: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call has arguments of such names."""
    names = (*kwargs, *argument_names(called)[: len(args)]) if args else kwargs
    return any(name.endswith(_NAMES) for name in names)


def names_masks(called: Callable[..., Any]) -> bool:
    """Whether a call can be given both tokens and their mask by name."""
    names = argument_names(called)
    return all(any(name.endswith(kinds) for name in names) for kinds in (_TOKENS, (_REAL, _HIDDEN)))


def _take_mask(told: Told, name: str, prefix: str, value: Any, hides: bool) -> None:
    """A mask by its form."""
    tensors = [tensor for _, tensor in leaves(value)]
    if value is None or any(tensor.is_meta for tensor in tensors):
        return
    with unseen():
        real = masks.of_keys(value, hides) if isinstance(value, Tensor) and value.dim() == 2 else None
        if real is not None:
            told.masks[prefix] = real
        elif tensors and all(tensor.dim() in (3, 4) for tensor in tensors):
            told.wide[prefix] = [tensor.detach().clone() for tensor in tensors]
        else:
            told.odd[prefix] = _proves_nothing(name)


def _proves_nothing(name: str) -> str:
    return (
        f"{name} does not tell which these are: it is no mask of columns, nor one of queries and keys that hides padding "
        f"and what is to come alone"
    )


def _is_cache(name: str, value: Any) -> bool:
    """Whether an argument holds what came before: it tells its length, or is called so."""
    if hasattr(type(value), "get_seq_length"):
        return True
    return ("past" in name or "cache" in name) and not isinstance(value, Tensor) and any(leaves(value))


def held(value: Any) -> Iterable[tuple[Any, Any]]:
    """What a dictionary holds, as it lies there."""
    held = vars(value).get("data") if issubclass(type(value), UserDict) else value
    return dict.items(held) if issubclass(type(held), dict) else ()


# ---- from what was told to frames


def frames(told: Told, past: int | None) -> Frames:
    """The frames that one call tells: of its tokens, and of what other passes made of tokens whose mask is given alone."""
    found: Frames = []
    for name, mask in told.masks.items():
        if name not in told.columns:
            found.append((mask.shape[1], Frame(0, None if mask.all() else mask)))
    found += [(count, Frame()) for count in told.others if count not in dict(found)]
    found += [(-1, Frame(unclear=why)) for prefix, why in told.odd.items() if prefix not in told.columns]
    if not told.is_masked:
        told_apart = {name: mask for name, mask in told.strange.items() if bool(mask.any()) and not bool(mask.all())}
        found += [(mask.shape[1], Frame(unclear=_says_nothing(name))) for name, mask in told_apart.items()]
    for name, count in told.columns.items():
        found += _of_tokens(told, name, count, past if name == told.decoded else 0)
    return found


def _says_nothing(name: str) -> str:
    return f"nothing tells whether {name} is true of these or of padding"


def _of_tokens(told: Told, name: str, count: int, past: int | None) -> Frames:
    """The frames of one kind of tokens: of themselves, of these and those before them, of a buffer that is longer."""
    mask, cached, unclear = told.masks.get(name), told.cache is not None, told.odd.get(name, "")
    longest = 0 if mask is None else mask.shape[1]
    if longest > count and (told.cache is None or past is None):
        past = longest - count
    padded = mask is not None and not bool(mask.all())
    if mask is not None and padded and past and longest < past + count:
        if longest > count:
            unclear = _proves_nothing(f"{name}{_REAL}")
        else:
            past = None  # which of the columns before are real is not told
    shown = mask[:, : past + count] if mask is not None and past is not None else mask
    one = Frame(past, shown if shown is not None and not bool(shown.all()) else None, cached, unclear)
    found = [(count, one)]
    if past:
        found.append((past + count, one._replace(past=0)))
    if past is not None and longest > past + count:
        assert mask is not None
        filled = torch.arange(longest, device=mask.device) < past + count
        found.append((longest, Frame(0, mask & filled, cached, unclear)))
    return found


def is_plain(frame: Frame) -> bool:
    """Whether columns are positions."""
    return frame.past == 0 and frame.mask is None and not frame.unclear


class Columns:
    """The frames of a pass, worked out when they are first asked for; calls inside it may tell what its own did not.

    `is_open` as long as these were not heard and may tell more.
    """

    def __init__(self, pasts: "Pasts", own: Told) -> None:
        self.pasts, self.told = pasts, [(own, pasts.past_of(own))]
        self.is_open, self.is_told_within = not own.is_masked, False
        self._known: Frames | None = None

    @classmethod
    def of_file(cls, known: Frames, is_open: bool) -> "Columns":
        """The frames of a pass that was saved."""
        made = cls(Pasts(), Told())
        made._known, made.is_open = known, is_open
        return made

    def __call__(self) -> Frames:
        if self._known is None:
            self._known = self._now()
        return self._known

    def _now(self) -> Frames:
        """What is told so far."""
        return [frame for told, past in self.told for frame in frames(told, past)]

    def hear(self, called: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Take what a call inside the pass tells, if it tells more; then no call inside that one has to be asked."""
        if not may_tell(called, args, kwargs):
            return False
        heard, (told, past) = told_by(named_arguments(called, args, kwargs)), self.told[-1]
        if told.columns and not told.is_masked and heard.masks:
            told.masks.update(_by_tokens(told, past, heard.masks))
            self.pasts.remember(told, past)
        elif not self.told[0][0].columns and (heard.columns or heard.masks):
            if not heard.columns:  # what layers are given besides says little of tokens
                heard.wide.clear()
                heard.odd.clear()
            self.told.append((heard, self.pasts.past_of(heard)))
        else:
            return False
        if heard.masks:
            told.strange.clear()
        before, self._known = self._known, None
        plain = all(is_plain(frame) for _, frame in self._now())
        self.is_told_within = not plain
        if before is not None and not plain:
            raise EditError(
                "Positions of this pass were counted before a call inside it told which of them are padding or came before. "
                "Expected inputs that the model itself knows by name: input_ids=..., attention_mask=..."
            )
        return heard.is_masked


def _by_tokens(told: Told, past: int | None, heard: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks under the prefix of the tokens that are as many, with those before them."""
    found = {}
    for prefix, mask in heard.items():
        fits = [one for one, count in told.columns.items() if mask.shape[1] in (count, count + (past or 0))]
        found[fits[0] if len(fits) == 1 else f"{prefix} within"] = mask
    return found


# ---- from pass to pass


class Seen(NamedTuple):
    """A cache, how many columns went into it, and which of them are real; None where all are."""

    cache: Callable[[], Any]
    length: int
    mask: Tensor | None


class Pasts:
    """What the passes of a block tell about positions; of a cache also what went into it since it was new."""

    def __init__(self) -> None:
        self._seen: dict[int, Seen] = {}

    def frames_of(self, arguments: Mapping[str, Any]) -> Columns:
        """The frames of a pass that begins with these arguments, by name."""
        return Columns(self, told_by(arguments))

    def past_of(self, told: Told) -> int | None:
        """How many columns came before the tokens; None where nothing tells. Masks of queries and keys are read here."""
        past = 0 if told.cache is None else self._length(told.cache)
        known, decoded = self._known(told, past), told.decoded
        for prefix, several in told.wide.items():
            of_cache = prefix == decoded
            before = past if of_cache and told.cache is not None else 0 if prefix in told.columns else None
            real = masks.of_queries_and_keys(several, before, known if of_cache else None)
            if real is None:
                told.odd[prefix] = _proves_nothing(f"{prefix}{_REAL}")
            else:
                told.masks[prefix] = real
        told.wide.clear()
        if known is not None and decoded is not None and not told.is_masked and not bool(known.all()):
            told.masks[decoded] = known
        self.remember(told, past)
        return past

    def remember(self, told: Told, past: int | None) -> None:
        """Note what is in the cache of a pass after it."""
        if told.cache is None or told.decoded is None or past is None:
            return
        length, mask = past + told.columns[told.decoded], told.masks.get(told.decoded)
        with suppress(TypeError):  # of a tuple there is no weak reference
            self._seen[id(told.cache)] = Seen(weakref.ref(told.cache), length, None if mask is None else mask[:, :length])

    def _length(self, cache: Any) -> int | None:
        """How many columns a cache holds; where it cannot tell, those of the passes that it was in since it was new."""
        with suppress(ValueError, TypeError, NotImplementedError, RuntimeError, AttributeError):
            return int(cache.get_seq_length())
        if hasattr(cache, "has_previous_state") and not cache.has_previous_state():
            return 0
        seen = self._before(cache)
        return None if seen is None else seen.length

    def _before(self, cache: Any) -> Seen | None:
        seen = self._seen.get(id(cache))
        return seen if seen is not None and seen.cache() is cache else None

    def _known(self, told: Told, past: int | None) -> Tensor | None:
        """Which columns are real as far as earlier passes with the same cache tell; new ones are."""
        seen, prefix = self._before(told.cache), told.decoded
        if seen is None or prefix is None or past is None or past > seen.length:
            return None
        if seen.mask is not None and seen.mask.shape[1] < past:
            return None
        rows = next((len(one[0]) for one in told.wide.values()), 1)
        before = torch.ones(rows, past, dtype=torch.bool) if seen.mask is None else seen.mask[:, :past]
        return torch.cat([before, before.new_ones(len(before), told.columns[prefix])], 1)

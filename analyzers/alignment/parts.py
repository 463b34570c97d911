"""The subspaces of variables: one each, apart from one another, copied for each site, soft while they are trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from analyzers.alignment.interchange import Spaces
from analyzers.protocol import AnalyzerError
from fmr.subspaces import Basis, Boundless, Mask, Part, Rotation, Subspace, Units

HARDER = 0.1
"""A temperature falls to this share of where it began, and is 0 when training ends."""

SOFT = 0.75
"""For this share of its steps a rotation is trained with soft boundaries, and with hard ones for the rest."""


def spaces_of(given: Any) -> dict[str, Subspace]:
    """The subspace of each variable, checked; under the empty name where one is for whatever is interchanged."""
    spaces = dict(given) if isinstance(given, Mapping) else {"": given}
    for name, space in spaces.items():
        if not isinstance(space, Subspace):
            raise AnalyzerError(
                f"The subspace{f' of {name!r}' if name else ''} is {space!r}: expected one of fmr.subspaces, or one for "
                f"each variable: {{'x': rotation[:4], 'y': rotation[4:]}}."
            )
        if isinstance(space, Part) and space.places.dim() == 2:
            raise AnalyzerError(
                f"The subspace{f' of {name!r}' if name else ''}, {space!r}, has a row for each example. Expected one that "
                "means the same in every example."
            )
    if not spaces:
        raise AnalyzerError("subspace={}: expected a subspace for each variable, as {'x': rotation[:4], 'y': rotation[4:]}.")
    check_spaces(spaces)
    return spaces


def whole(space: Subspace) -> Subspace:
    """The subspace that a part is of."""
    return whole(space.space) if isinstance(space, Part) else space


def places(space: Part) -> Tensor:
    """Which coordinates of the whole a part is."""
    return places(space.space)[space.places] if isinstance(space.space, Part) else space.places


def named_for(spaces: Spaces, variables: Sequence[str]) -> dict[str, Subspace]:
    """The subspaces by the variables of some data."""
    if "" not in spaces:
        return dict(spaces)
    if len(variables) > 1:
        raise AnalyzerError(
            f"The data interchange {' and '.join(map(repr, variables))}, and there is one subspace. Expected one for each: "
            f"{{{variables[0]!r}: rotation[:4], {variables[1]!r}: rotation[4:]}}, or data of one variable."
        )
    return {variables[0]: spaces[""]}


def parameters(spaces: Spaces) -> dict[str, nn.Parameter]:
    """What is trained in subspaces, each once."""
    learned = (Rotation, Mask, Boundless)
    held = nn.ModuleList(one for one in dict.fromkeys(map(whole, spaces.values())) if isinstance(one, learned))
    return {name: one for name, one in held.named_parameters() if one.requires_grad}


def tempered(spaces: Spaces) -> list[Mask | Boundless]:
    """The subspaces that are soft while they are trained."""
    return [one for one in dict.fromkeys(map(whole, spaces.values())) if isinstance(one, (Mask, Boundless))]


def annealed(spaces: Spaces, starts: Sequence[float], share: float) -> None:
    """Set temperatures to what they are when a share of all steps is done; a rotation ends with hard boundaries."""
    for space, start in zip(tempered(spaces), starts, strict=True):
        soft = share / SOFT if isinstance(space, Boundless) else share
        space.temperature = start * HARDER**soft if soft < 1 else 0.0


def sizes(spaces: Spaces) -> dict[str, int]:
    """How many coordinates of each variable are written."""
    return dict(_sizes(spaces))


def _sizes(spaces: Spaces) -> Iterator[tuple[str, int]]:
    for name, space in spaces.items():
        held = whole(space)
        if isinstance(held, (Mask, Boundless)):
            inside = held.weights > 0.5
            yield name, int((inside[places(space)] if isinstance(space, Part) else inside).sum())
        elif isinstance(size := getattr(space, "size", None), int):
            yield name, size


def random_like(spaces: Spaces, seed: int) -> dict[str, Subspace] | None:
    """Subspaces of the same sizes that nothing was learned for: units for units, else directions; None for others."""
    if not all(isinstance(whole(one), (Basis, Boundless, Mask, Rotation, Units)) for one in spaces.values()):
        return None
    many = sizes(spaces)
    width, total = next(iter(spaces.values())).width, sum(many.values())  # type: ignore[attr-defined]
    made: Rotation | Units
    if all(isinstance(whole(one), (Mask, Units)) for one in spaces.values()):
        order = torch.randperm(width, generator=torch.Generator().manual_seed(seed))
        made = Units(width, order[:total].tolist())
    else:
        made = Rotation(width, min(total, width), seed + 1_000_003)
    made.to(_device(spaces)).requires_grad_(False)
    found, before = {}, 0
    for name, size in many.items():
        found[name] = made[before : before + size]
        before += size
    return dict(found)


def _device(spaces: Spaces) -> torch.device:
    """Where the numbers of subspaces are."""
    held = nn.ModuleList(one for one in map(whole, spaces.values()) if isinstance(one, nn.Module))
    return next((one.device for one in (*held.parameters(), *held.buffers())), torch.device("cpu"))


def check_spaces(spaces: Spaces) -> None:
    """Raise for variables whose subspaces share a coordinate or a direction."""
    names = list(spaces)
    for place, name in enumerate(names):
        for other in names[:place]:
            told = _overlap(spaces[other], spaces[name])
            if told:
                raise AnalyzerError(
                    f"The subspaces of {other!r} and {name!r} overlap: {told}. Expected parts that share nothing, as "
                    f"{{{other!r}: rotation[:4], {name!r}: rotation[4:8]}}."
                )


def _overlap(one: Subspace, other: Subspace) -> str:
    """What two subspaces share, in words; empty for nothing."""
    wholes = [whole(part) for part in (one, other)]
    if wholes[0] is wholes[1]:
        sets = [set(places(part).flatten().tolist()) if isinstance(part, Part) else None for part in (one, other)]
        both = [found if found is not None else set(range(wholes[0].size)) for found in sets]  # type: ignore[attr-defined]
        shared = sorted(both[0] & both[1])
        return f"coordinates {', '.join(map(str, shared[:8]))}" if shared else ""
    if any(parameters({"": part}) for part in wholes):
        return "each is trained by itself"
    moved = [_directions(part) for part in (one, other)]
    if moved[0] is None or moved[1] is None or len(moved[0]) != len(moved[1]):
        return ""
    share = float((moved[0].T @ moved[1]).abs().max()) if moved[0].numel() and moved[1].numel() else 0.0
    return f"directions of both have a cosine of {share:.2f}" if share > 1e-4 else ""


def _directions(space: Subspace) -> Tensor | None:
    """The directions in which writing moves a value, as columns of length 1; None where they cannot be told."""
    if not isinstance(whole(space), (Basis, Rotation, Units)):
        return None
    assert isinstance(space, (Part, Basis, Rotation, Units))
    zero = torch.zeros(1, space.width, device=_device({"": space}))
    moved = space.write(zero.expand(space.size, -1), space.read(zero) + torch.eye(space.size, device=zero.device))
    found: Tensor = (moved / moved.norm(dim=1, keepdim=True).clamp_min(1e-30)).T
    return found

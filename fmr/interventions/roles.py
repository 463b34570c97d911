"""The sites of an intervention in another copy of the model: by ID where the graph is the same, else by role."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from torch import Tensor

from fmr.edits.values import Edit
from fmr.errors import EditError, IdError, nearest
from fmr.ids import Site, TensorId
from fmr.structure.parts import Structure


@dataclass(frozen=True)
class Saved:
    """An intervention as it was saved: its edits, the role of each ID, and the graph that it was made for."""

    edits: dict[Site, tuple[Edit, ...]]
    roles: Mapping[str, str]
    model: str
    fingerprint: str


def sites_by_role(structure: Structure) -> dict[str, Site]:
    """Every value of a model that has a role, by the words in which `structure` gives it, as layers[3].resid_mid.

    >>> sites_by_role(structure)["attention[0].pattern"] == structure.attention[0].pattern
    True
    """
    found: dict[str, Site | None] = {name: getattr(structure, name) for name in ("embedding", "final_norm", "unembedding")}
    for role in ("resid_post", "resid_mid", "resid_pre"):
        found |= {f"layers[{n}].{role}": getattr(layer, role) for n, layer in enumerate(structure.layers)}
    for n, block in enumerate(structure.attention):
        found |= {f"attention[{n}].{role}": getattr(block, role) for role in "q k v scores pattern z out".split()}
    for n, memory in enumerate(structure.mlps):
        found |= {f"mlps[{n}].{role}": getattr(memory, role) for role in ("pre", "post", "out")}
    for n, mixer in enumerate(structure.mixers):
        found |= {f"mixers[{n}].{role}": getattr(mixer, role) for role in ("output", "state")}
        found |= {f"mixers[{n}].inputs[{k}]": site for k, site in enumerate(mixer.inputs)}
    for n, router in enumerate(structure.routers):
        found |= {f"routers[{n}].{role}": getattr(router, role) for role in ("logits", "weights")}
    for n, stream in enumerate(structure.streams):
        found |= {f"streams[{n}].points[{k}]": Site(point) for k, point in enumerate(stream.points)}
    return {role: site for role, site in found.items() if site is not None}


def roles_of(structure: Structure) -> dict[TensorId, str]:
    """The role of each ID that has one; of several the first in the order of `sites_by_role`."""
    found: dict[TensorId, str] = {}
    for role, site in sites_by_role(structure).items():
        found.setdefault(site.id, role)
    return found


def found_again(saved: Saved, structure: Structure) -> dict[Site, tuple[Edit, ...]]:
    """The edits at the sites of another model's structure."""
    known = sites_by_role(structure)
    same = structure.graph.fingerprint == saved.fingerprint

    def moved(site: Site) -> Site:
        role = saved.roles.get(site.id)
        if role is None or same:
            return _by_id(site, saved, structure)
        if role not in known:
            raise EditError(
                f"The intervention of {saved.model} acts at {role}, and {structure.model} has none: "
                f"{_has(role, structure)}. Expected a model with the same parts."
            )
        return known[role].at(**site.selection, passes=site.passes)

    found: dict[Site, tuple[Edit, ...]] = {}
    for site, several in saved.edits.items():
        now = moved(site)
        for edit in several:
            _check_width(now, edit, structure)
        found[now] = tuple(_with_sites(edit, moved) for edit in several)
    return found


def _with_sites(edit: Edit, moved: Any) -> Edit:
    """An edit whose own sites, as the one that an interchange reads in its source, are moved as well."""
    at = getattr(edit, "at", None)
    return replace(edit, at=moved(at)) if is_dataclass(edit) and isinstance(at, Site) else edit


def _by_id(site: Site, saved: Saved, structure: Structure) -> Site:
    """The site under its own ID, if the model has it."""
    if site.id.is_path and site.id in structure.graph.calls:
        return site
    try:
        structure.graph[site.id]
    except IdError:
        close = nearest(str(site.id), [str(node.id) for node in structure.graph.nodes])
        raise EditError(
            f"The intervention of {saved.model} acts at {site!r}, which {structure.model} does not have, and its role was "
            f"not saved.{close} Save it with its structure: intervention.save(folder, structure)."
        ) from None
    return site


def _has(role: str, structure: Structure) -> str:
    """How many there are of what a role names."""
    kind = role.partition("[")[0]
    parts = getattr(structure, kind, None)
    if not isinstance(parts, tuple):
        return f"its {kind} was not found"
    place = int(role.partition("[")[2].partition("]")[0])
    return f"{kind} has {len(parts)}" if place >= len(parts) else f"{kind}[{place}] has no {role.rpartition('.')[2]}"


def _width(edit: Edit) -> int | None:
    """How many numbers the vectors have that an edit is made for; None where any will do."""
    width: int | None = getattr(getattr(edit, "within", None) or edit, "width", None)
    if width is not None or not is_dataclass(edit):
        return width
    brought: list[Any] = [getattr(edit, one.name) for one in fields(edit)]
    sizes = {int(one.shape[-1]) for one in brought if isinstance(one, Tensor) and one.dim() and one.shape[-1] != 1}
    return next(iter(sizes)) if len(sizes) == 1 else None


def _check_width(site: Site, edit: Edit, structure: Structure) -> None:
    """Raise for a subspace of another width than what the site holds."""
    width = _width(edit)
    if width is None or site.units is not None:
        return
    shape = structure.graph[site.id].shape
    layout = site.layout or ()
    there = shape[layout.index("units")] if "units" in layout else shape[-1] if shape else 0
    if there != width:
        raise EditError(
            f"The edit at {site!r} is one of vectors of {width} numbers, and {structure.model} holds {there} there. "
            f"Expected a model of the same width."
        )

"""What a search and a training begin with: sites, a share held out, a folder, data that fit the network and the site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from analyzers.alignment.causal_model import CausalModel
from analyzers.alignment.counterfactuals import Counterfactuals
from analyzers.alignment.examples import Examples, check_lengths, examples_of
from analyzers.alignment.interchange import Network, Spaces
from analyzers.alignment.parts import named_for
from analyzers.protocol import AnalyzerError, check_eval
from fmr.ids import Site
from fmr.nodes import Key, id_of, is_key
from fmr.subspaces import Subspace

Sites = Key | Sequence[Key] | Mapping[Any, Key]

FEW = 2
"""How many examples are interchanged at each site before anything is trained, to see that they can be."""


def opened(
    network: Network, data: Sequence[Counterfactuals], spaces: Spaces, sites: Sequence[Site], tokenizer: Any
) -> tuple[list[Examples], dict[str, Subspace]]:
    """Each of several data as the network takes it, and the subspaces by variable; that all of it fits together is tried."""
    check_eval(network.model)
    if torch.is_inference_mode_enabled():
        raise AnalyzerError(
            "Tensors made in torch.inference_mode() take no part in gradients. Leave it; torch.no_grad() will do."
        )
    variables = data[0].variables
    names = tuple(spaces) if "" not in spaces else variables
    parts = [examples_of(one, names, network.model, tokenizer) for one in data]
    by_name = named_for(spaces, variables)
    _check_labels(network, parts)
    some = _few(parts[-1])
    for site in sites:
        for part in parts:
            check_lengths(part, site)
        with torch.no_grad():
            network.interchanged(site, by_name, parts[-1].rows(some))
    return parts, by_name


def _few(data: Examples) -> Tensor:
    """A few rows, such in which something is interchanged before others."""
    which = torch.stack(list(data.interchanged.values())).any(0)
    return which.int().argsort(descending=True, stable=True)[:FEW]


def _check_labels(network: Network, parts: Sequence[Examples]) -> None:
    """Raise for labels of which the network has no score."""
    with torch.no_grad():
        many = network.plain(parts[-1].rows(torch.arange(1)).base).shape[-1]
    both = torch.cat([one for part in parts for one in (part.labels, part.base_labels)])
    odd = int(both.max()) if int(both.max()) >= many else int(both.min())
    if not 0 <= odd < many:
        raise AnalyzerError(
            f"The data have the label {odd}, and the network scores {many} labels. Expected 0 to {many - 1}: say which they "
            "are, counterfactuals(..., label=...), or how scores are read, logits=."
        )


def check_causal(causal_model: Any) -> None:
    """Raise for what is no causal model."""
    if not isinstance(causal_model, CausalModel):
        raise AnalyzerError(f"causal_model is a {type(causal_model).__name__}, expected an analyzers.CausalModel.")


def site_of(given: Any) -> Site:
    """A site, or an ID, node or path as one; it means the same in every example."""
    if not is_key(given):
        raise AnalyzerError(f"site={given!r}: expected one site, ID or path of a module, as layer.resid_post.")
    found = given if isinstance(given, Site) else Site(id_of(given))
    rows = found.positions is not None and not isinstance(found.positions, slice) and found.places("positions").dim() == 2
    if found.examples is not None or found.passes is not None or rows:
        told = "a row of positions for each example" if rows else "examples or passes"
        raise AnalyzerError(
            f"Site({str(found.id)!r}, ...) selects {told}. Expected a site that means the same in every example."
        )
    return found


def sites_of(given: Any) -> list[tuple[str, str, Site]]:
    """Sites, each with the row and the column that it has in a map."""
    if isinstance(given, Mapping):
        found = [(*_place(name), site_of(site)) for name, site in given.items()]
    else:
        several = [given] if is_key(given) or not isinstance(given, Sequence) else list(given)
        found = [(str(site.id), _selected(site), site) for site in map(site_of, several)]
    if not found or len({repr(site) for *_, site in found}) < len(found):
        raise AnalyzerError(
            f"site={given!r}: expected a site, or several, each once, as [layer.resid_post for layer in structure.layers]."
        )
    return found


def _place(name: Any) -> tuple[str, str]:
    """The row and the column of a name."""
    pair = name if isinstance(name, tuple) else (name, "")
    if len(pair) != 2:
        raise AnalyzerError(f"The site {name!r} is named by {len(pair)}: expected one name, or a pair (row, column).")
    return str(pair[0]), str(pair[1])


def _selected(site: Site) -> str:
    """What a site selects, in words."""
    names = ("positions", "heads", "units")
    return ", ".join(f"{name} {getattr(site, name)}" for name in names if getattr(site, name) is not None)


def share_of(held_out: Any) -> float:
    """The share of the data that is held out, checked."""
    if isinstance(held_out, bool) or not isinstance(held_out, (int, float)) or not 0 < held_out < 1:
        raise AnalyzerError(
            f"held_out={held_out!r}: expected a share of the data between 0 and 1, as 0.2, or test=, examples of their own."
        )
    return float(held_out)

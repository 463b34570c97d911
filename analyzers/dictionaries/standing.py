"""Where a dictionary stands: the site that it is put at is the one that it was trained at, or it is refused."""

from __future__ import annotations

import ast
import operator
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from torch import Tensor, nn

import fmr
from analyzers.dictionaries.autoencoder import SparseAutoencoder
from analyzers.dictionaries.dictionary import Dictionary
from analyzers.protocol import AnalyzerError, check_counts, device_of
from fmr.errors import IdError
from fmr.graph.graph import Graph
from fmr.ids import Site, TensorId
from fmr.nodes import sites_by_name
from fmr.structure.normal.match import strip_views


def opened(dictionary: Any, model: nn.Module) -> tuple[SparseAutoencoder, Tensor | None]:
    """The autoencoder of a dictionary where the model is, and the mean of its values where that is known."""
    if isinstance(dictionary, Dictionary):
        return dictionary.autoencoder.to(device_of(model)), dictionary.mean
    if isinstance(dictionary, SparseAutoencoder):
        return deepcopy(dictionary).requires_grad_(False).to(device_of(model)), None
    raise AnalyzerError(
        f"The dictionary is a {type(dictionary).__name__}, expected what DictionaryTraining made, or a SparseAutoencoder."
    )


def one_site(site: Any) -> Site:
    """One site, or one clear error."""
    found = sites_by_name(site)
    if found is None or len(found) != 1:
        raise AnalyzerError(f"site={site!r}: expected one site, an ID or the path of a module, as layer.resid_post.")
    return next(iter(found.values()))


def left_out(dictionary: Any, skip: Any) -> int:
    """How many tokens at the start of each text are left out: as many as asked for, or as in the training."""
    if skip is None:
        return int(dictionary.training.get("skip", 0)) if isinstance(dictionary, Dictionary) else 0
    check_counts(0, skip=skip)
    return operator.index(skip)


class Standing:
    """The site that a dictionary is put at, and the one that it was trained at, which are compared when a model is run."""

    def __init__(self, dictionary: Any, site: Any, every: bool = False) -> None:
        """every: whether all positions are wanted."""
        self.site = one_site(site)
        if every and self.site.positions is not None:
            raise AnalyzerError(f"{self.site!r} selects positions, expected all of them; skip= leaves the first ones out.")
        self.trained = dictionary.place if isinstance(dictionary, Dictionary) else ""
        self._known = not self.trained or _selected(self.trained) == _selected(repr(self.site))

    def check(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Raise where the dictionary was trained on the values of another place; names of one place are told by a graph."""
        if self._known:
            return
        graph = fmr.run(model, keep="none", **inputs).graph
        if _place(graph, self.trained) != _place(graph, repr(self.site)):
            fmr.run(model, keep=[self.site], **inputs)  # where there is no such place, that is what is wrong
            raise AnalyzerError(
                f"The dictionary was trained at {self.trained}, and site={self.site!r} is another place. Expected the site "
                "of its training; to put it there all the same, give dictionary.autoencoder, which knows of none, and to "
                "scores the mean= of values there."
            )
        self._known = True


def _selected(told: str) -> tuple[str, tuple[str, ...]]:
    """The ID of a site as it prints, and which heads and units of it; positions and examples are rows of one place."""
    call = ast.parse(told, mode="eval").body
    assert isinstance(call, ast.Call)
    chosen = (ast.unparse(one) for one in call.keywords if one.arg in ("heads", "units"))
    return ast.literal_eval(call.args[0]), tuple(chosen)


def _place(graph: Graph, told: str) -> tuple[str, tuple[str, ...]]:
    """The same with the value that the ID goes back to in a graph; the ID itself where nothing has it."""
    name, chosen = _selected(told)
    try:
        return strip_views(graph, graph[TensorId(name)].id), chosen
    except IdError:
        return name, chosen

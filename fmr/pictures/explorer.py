"""A graph in the format of Model Explorer, a viewer that browses tens of thousands of nodes module by module."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from fmr.disk.files import printed, write_whole
from fmr.ids import relative
from fmr.nests import ids_in
from fmr.nodes import Node, Nodes, Scope
from fmr.pictures.captions import name_in, size
from fmr.pictures.draw import INK, ROLES
from fmr.pictures.endings import check_ending
from fmr.pictures.picture import homes, notes_of, roles_of

Json = dict[str, Any]


def save_explorer(graph: Nodes, path: str | os.PathLike[str], *, structure: Any = None) -> None:
    """Write the graph for Model Explorer (https://github.com/google-ai-edge/model-explorer), a viewer for large graphs.

    >>> graph.save_explorer("model.json", structure=fmr.locate(run))
    >>> # pip install ai-edge-model-explorer; model-explorer model.json

    path: a file whose name ends in .json, by which the viewer knows the format. structure: colours and names values by
    their role, as in `save_svg`. Module calls become layers that open and close, every value keeps its ID, and searching
    finds it. fmr itself needs neither the viewer nor anything else for this.
    """
    check_ending(path, "json")
    write_whole(path, json.dumps(explorer(graph, structure)).encode())


def explorer(graph: Nodes, structure: Any = None) -> Json:
    """What `save_explorer` writes, in plain types."""
    return _Export(graph, roles_of(structure), notes_of(structure)).whole()


class _Export:
    """One graph on its way to the viewer's format."""

    def __init__(self, graph: Nodes, roles: Mapping[str, str], notes: Mapping[str, str]) -> None:
        self.graph, self.roles, self.notes = graph, roles, notes
        self.styles = {role: _style(*ROLES[n % len(ROLES)]) for n, role in enumerate(dict.fromkeys(roles.values()))}
        self.scopes = {scope.path: scope for scope in graph.scopes}
        self.layers, self.homes = {"": ""}, homes(graph)

    def whole(self) -> Json:
        layers = {self.layer(scope.path): dict(self._told(scope)) for scope in self.graph.scopes}
        nodes = [self._node(node) for node in self.graph.nodes]
        shown = {"layoutConfigs": {"keepLayersWithASingleChild": True}}  # else a module call of one op would vanish
        graph = {"id": self.graph.model, "nodes": nodes, "groupNodeAttributes": layers, **shown}
        return {"label": self.graph.model, "graphs": [graph]}

    def layer(self, path: str) -> str:
        """The viewer's name of a module call: the names of the calls around it and its own, each as seen from the last."""
        if path not in self.layers:
            scope = self.scopes.get(path)
            above = path.rpartition("/")[0] if scope is None else scope.parent or ""  # a fused op is a place as well
            self.layers[path] = f"{self.layer(above)}/{_word(relative(path, above))}".lstrip("/")
        return self.layers[path]

    def _node(self, node: Node) -> Json:
        place = self.homes[node.id] or ""
        name = name_in(node, self.scopes.get(place))
        role = self.roles.get(node.id)
        style = {"style": self.styles[role]} if role else {}
        made = {"shape": size(node), "dtype": node.kind, "device": str(node.device)}
        return {
            "id": str(node.id),
            "label": f"{role}: {name}" if role else name,
            "namespace": self.layer(place),
            "attrs": _pairs({"role": role} if role else {}, self._about(node)),
            "incomingEdges": [
                {"sourceNodeId": str(parent), "sourceNodeOutputId": "0", "targetNodeInputId": str(n)}
                for n, parent in enumerate(node.parents)
            ],
            "inputsMetadata": [
                {"id": str(n), "attrs": _pairs({"__tensor_tag": parent.at})} for n, parent in enumerate(node.parents)
            ],
            "outputsMetadata": [{"id": "0", "attrs": _pairs(made)}],
            **style,
        }

    def _about(self, node: Node) -> dict[str, str]:
        kind = {"kind": node.op} if node.id.is_source else {"op": node.op}
        where = {"call site": node.where} if node.where else {}
        kind["ID"] = str(node.id)  # the viewer's search reads attributes, not IDs
        return {**kind, **{f"argument {at}": printed(value) for at, value in node.args.items()}, **where}

    def _told(self, scope: Scope) -> Iterator[tuple[str, str]]:
        """What the viewer says of a module call."""
        yield "class", scope.kind
        yield "path", scope.path or "root"
        made = list(ids_in(scope.output))
        if made:
            yield "output", ", ".join(made[:8]) + (", …" if len(made) > 8 else "")
        if scope.path in self.notes:
            yield "structure", self.notes[scope.path]


def _style(fill: str, ink: str) -> dict[str, str]:
    """The look of a role; the viewer writes in dark ink, so what needs light ink is made paler and keeps its border."""
    parts = [int(fill[n : n + 2], 16) for n in (1, 3, 5)]
    paler = "#" + "".join(f"{(part + 255) // 2:02X}" for part in parts)
    return {"backgroundColor": fill if ink == INK else paler, "borderColor": fill if ink != INK else "#6E6E6E"}


def _word(name: str) -> str:
    """A name without what separates layers in the viewer."""
    return name.replace("/", "|").replace(";", "|")


def _pairs(*told: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for each in told for key, value in each.items()]

"""Edits that change nothing, at a sample of the values of dozens of architectures: `python etc/census/edits.py [TYPE ...]`.

Each value is edited by the identity and by a copy of itself, recorded and with nothing kept; what the model returns must be
bit for bit what it returns without an edit. Everything that differs or cannot be edited is printed with its reason.
"""

import argparse
import collections
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))  # what is measured is the checkout in which this file stands
sys.path.insert(0, str(pathlib.Path(__file__).parent))
import tinymodels
import torch
from inputs import flat
from measure import QUICK, TYPES
from torch import Tensor, nn

import fmr
from fmr.watching.storage import is_equal

HIDDEN = frozenset({"alias", "opaque", "input"})
"""Nodes that no edit is meant for."""

EDITS = {"identity": lambda value, context: value, "copy": lambda value, context: value.clone()}


def measure(name: str, most: int) -> dict[str, Any]:
    """One architecture: how many edits were made and changed nothing, and what differs or is refused, by its reason."""
    began = time.perf_counter()
    model, inputs = tinymodels.build(name)
    with fmr.track(model) as run:
        plain = bits(output_of(model, inputs))
    again = bits(output_of(model, inputs))
    if not alike(plain, again):
        return {"type": name, "same": 0, "differs": [], "refused": {}, "aside": "gives another result each time"}
    ids = list(sampled(run.graph, most))
    row: dict[str, Any] = {"type": name, "ops": len(run.graph), "same": 0, "differs": [], "refused": collections.Counter()}
    for value in ids:
        for kind, edit in EDITS.items():
            for keep in ((), "all") if kind == "copy" else ((),):
                try:
                    with fmr.track(model, keep=keep, edits={value: edit}) as edited:
                        found = bits(output_of(model, inputs))
                except fmr.FmrError as error:
                    row["refused"][f"{value}: {error}"] += 1
                    continue
                fine = alike(plain, found) and edited.receipts[value].changed == 0
                row["same"] += fine
                row["differs"] += [] if fine else [f"{value} by {kind}, keep={keep!r}"]
    return row | {"seconds": round(time.perf_counter() - began, 1)}


def output_of(model: nn.Module, inputs: dict[str, Any]) -> Any:
    """What a model returns, with the random numbers of the same seed."""
    torch.manual_seed(0)
    return tinymodels.run(model, inputs)


def bits(output: Any) -> list[Tensor]:
    """The tensors of an output as they are now."""
    return [one.detach().clone() for one in flat(output) if torch.is_tensor(one)]


def alike(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether two outputs are the same bits."""
    pairs = list(zip(a, b, strict=True))
    return all(x.dtype == y.dtype and is_equal(x, y) for x, y in pairs)


def sampled(graph: fmr.Graph, most: int) -> Iterator[str]:
    """Some of the values that can be edited, evenly over the graph with its kernels opened."""
    ids = [node.id for node in graph.unfused.nodes if node.op not in HIDDEN and node.op != "result" and -1 not in node.shape]
    yield from ids[:: max(1, len(ids) // most)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help="architectures; a few dozen of every idiom where none is named")
    parser.add_argument("--all", action="store_true", help="all of types.json")
    parser.add_argument("--sample", type=int, default=24, help="how many values of each architecture are edited")
    given = parser.parse_args()
    rows = []
    for name in given.types or (TYPES if given.all else QUICK):
        try:
            rows.append(measure(name, given.sample))
        except tinymodels.CannotBuild as reason:
            rows.append({"type": name, "same": 0, "differs": [], "refused": {}, "aside": f"is not built: {reason}"})
        report(rows[-1])
    made = sum(row["same"] + len(row["differs"]) for row in rows)
    refused, differ = sum(sum(row["refused"].values()) for row in rows), sum(len(row["differs"]) for row in rows)
    print(f"{len(rows)} architectures: of {made} edits {made - differ} changed no bit, {differ} did; {refused} were refused")
    return int(differ > 0)


def report(row: dict[str, Any]) -> None:
    """What is to be said of one architecture."""
    if "aside" in row:
        print(f"  {row['type']} {row['aside']}")
    for what in row["differs"]:
        print(f"  {row['type']} differs: {what}")
    for reason, number in row["refused"].items():
        print(f"  {row['type']} refused {number} times: {reason[:220]}")


if __name__ == "__main__":
    sys.exit(main())

"""A lab as one page of HTML, with all that it shows inside: it opens without a server and without this library."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from analyzers.lab.bench import Bench
from analyzers.lab.difference import difference
from analyzers.lab.errors import LabError
from analyzers.lab.picture import Picture, png_of
from analyzers.lab.summary import brief, leaves
from analyzers.lab.version import Version
from analyzers.results import Stored
from fmr.errors import FmrError, number_of

TEMPLATE = Path(__file__).with_name("report.html")
MOST_LEAVES = 60


def page(lab: Bench) -> str:
    """The page as text."""
    try:
        from jinja2 import Environment
    except ImportError as error:
        raise LabError("A report needs jinja2, which is not installed. Get it with: pip install 'fmr[lab]'.") from error

    every = [dict(row) for row in lab.ledger.rows("SELECT * FROM attempts ORDER BY id")]
    names = list(dict.fromkeys(row["name"] for row in every))
    experiments = [_experiment(lab, name, [row for row in every if row["name"] == name]) for name in names]
    versions = sum(len(one["versions"]) for one in experiments)
    model = f" of {type(lab.model).__name__}" if lab.model is not None else ""
    counts = f"{number_of(len(names), 'experiment')}, {number_of(versions, 'version')}, {number_of(len(every), 'attempt')}"
    template = Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE.read_text())
    return template.render(title=f"Lab{model}", subtitle=f"{lab.folder}: {counts}", experiments=experiments)


def _experiment(lab: Bench, name: str, attempts: list[dict[str, Any]]) -> dict[str, Any]:
    versions = list(lab.versions(name))
    befores = [None, *versions][: len(versions)]
    return {
        "name": name,
        "anchor": f"e-{name}",
        "attempts": attempts,
        "last": attempts[-1]["began"][:16].replace("T", " "),
        "unfinished": [_unfinished(row) for row in attempts if row["status"] != "finished"],
        "versions": [_version(one, before) for one, before in zip(versions, befores, strict=True)],
    }


def _unfinished(row: dict[str, Any]) -> dict[str, Any]:
    lines = (row["error"] or "").strip().splitlines()
    return {**row, "call": brief(json.loads(row["arguments"]), 120), "last": lines[-1] if lines else ""}


def _version(version: Version, before: Version | None) -> dict[str, Any]:
    """What the page says of one version; a file that is damaged is told, and the rest is shown."""
    told: dict[str, Any] = {
        "version": version.version,
        "made": version.made[:19].replace("T", " "),
        "call": brief(version.told["arguments"], 120),
        "brief": brief(version.told["result"], 120),
        "seed": version.seed,
        "seconds": f"{version.seconds:.3g}",
        "memory": _bytes(version.memory),
        "code": version.code.text,
        "where": [*version.model.items(), *version.environment.items()],
        "arguments": leaves(version.told["arguments"])[:MOST_LEAVES],
        "leaves": leaves(version.told["result"])[:MOST_LEAVES],
    }
    try:
        shown = list(_shown(version.result, ""))
        told["leaves"] = [(place or "result", text) for kind, place, text in shown if kind == "leaf"][:MOST_LEAVES]
        for key in ("text", "note"):
            told[f"{key}s"] = [text for kind, _, text in shown if kind == key]
        told["pictures"] = [(place or "picture", text) for kind, place, text in shown if kind == "picture"]
        told["changes"] = [(_kind(line), line) for line in _changes(version, before)]
    except LabError as error:
        told["error"] = str(error)
    return told


def _changes(version: Version, before: Version | None) -> list[str]:
    return repr(difference(before, version)).splitlines()[1:] if before is not None else []


def _kind(line: str) -> str:
    mark = line.strip()[:1] if line.startswith("    ") else ""
    return {"+": "added", "-": "removed"}.get(mark, "")


def _bytes(many: float | None) -> str:
    return "" if many is None or many != many else f"{many / 1e6:.1f} MB"


def _shown(value: Any, at: str) -> Iterator[tuple[str, str, str]]:
    """What is shown of a result: leaves as words, results of analyzers as they print and draw, pictures."""
    if isinstance(value, Picture):
        yield "picture", at, base64.b64encode(value.png).decode()
    elif isinstance(value, Stored):
        yield "text", at, repr(value)
        yield from _drawn(value, at)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _shown(item, f"{at}.{key}" if at else str(key))
    elif isinstance(value, (list, tuple)) and not all(isinstance(item, (int, float, str)) for item in value):
        for n, item in enumerate(value):
            yield from _shown(item, f"{at}[{n}]")
    elif hasattr(value, "to_string"):
        yield "text", at, value.to_string(max_rows=20)
    elif isinstance(value, (Tensor, np.ndarray)):
        yield "leaf", at, _numbers(value)
    else:
        text = repr(value)
        yield "leaf", at, text if len(text) <= 400 else f"{text[:400]}..."


def _drawn(value: Stored, at: str) -> Iterator[tuple[str, str, str]]:
    plot = getattr(value, "plot", None)
    if plot is None:
        return
    from matplotlib import pyplot as plt

    try:
        figure = plot()
        png = png_of(figure)
        plt.close(figure)
    except (FmrError, ValueError, TypeError, LookupError, ImportError) as error:
        yield "note", at, f"Not drawn: {error}"
        return
    if png is not None:
        yield "picture", at or type(value).__name__, base64.b64encode(png).decode()


def _numbers(value: Any) -> str:
    kind, shape = str(value.dtype).removeprefix("torch."), list(value.shape)
    numbers = (
        value.detach().cpu().double().numpy() if isinstance(value, Tensor) and not value.is_complex() else np.asarray(value)
    )
    head = f"{type(value).__name__.lower()} {kind}{shape}"
    if numbers.size <= 8:
        return f"{head} {np.array2string(numbers, precision=4, separator=', ')}"
    if numbers.dtype.kind not in "biuf":
        return head
    return f"{head} from {np.nanmin(numbers):.4g} to {np.nanmax(numbers):.4g}, mean {np.nanmean(numbers):.4g}"

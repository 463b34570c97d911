"""How much of the structure of hundreds of architectures `fmr.locate` finds: `python etc/census/measure.py [TYPE ...]`.

The truth is what each model says of itself: the attentions and hidden states that it returns and, by hooks, the inputs
of its second feed-forward projections. A row counts the values that are located exactly, are missing, or are extra.
"""

import argparse
import json
import pathlib
import sys
import time
import traceback
from collections.abc import Iterable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import groundtruth
import tinymodels
import torch
from torch import Tensor

import fmr

TYPES: dict[str, dict[str, Any]] = json.loads((pathlib.Path(__file__).parent / "types.json").read_text())


def measure(name: str) -> dict[str, Any]:
    """One architecture: what its own truth says and what was located."""
    model, inputs = tinymodels.build(name)
    truth = groundtruth.truth(model, inputs, tensors=True)
    with fmr.track(model) as run:
        tinymodels.run(model, inputs)
    start = time.perf_counter()
    found = fmr.locate(run)
    row: dict[str, Any] = {"type": name, "ops": len(run.graph), "seconds": round(time.perf_counter() - start, 2)}
    tensors = truth["tensors"]
    maps = [t for path in truth["attentions"] for t in tensors[path] if is_map(t)] if TYPES[name]["maps"] else []
    if TYPES[name]["maps"] == TYPES[name]["attention"]:
        maps = [t for path in truth["attentions"] for t in tensors[path]]
    patterns = [run[block.pattern] for block in found.attention]
    row["attention"] = compare(maps, patterns + [part for pattern in patterns for part in slices(pattern, maps)])
    row["attention"]["extra"] = row["attention"]["extra"][: max(0, len(patterns) - row["attention"]["found"])]
    row["heads"] = heads(maps, found.attention, patterns)
    hidden = [t for path in truth["hidden_states"] for t in tensors[path]]
    points = [run[point] for stream in found.streams for point in stream.points]
    row["hidden"] = compare(hidden, points + [part for point in points for part in slices(point, hidden)])
    if TYPES[name]["mlp"]:
        posts = [t for key, inside in tensors.items() if key.startswith("mlp:") for t in inside]
        row["mlp"] = compare(posts, [run[block.post] for block in found.mlps])
    row["rejected"] = [repr(one)[:240] for one in found.rejected[:6]]
    return row


def is_map(value: Tensor) -> bool:
    return bool(torch.isfinite(value).all() and value.dim() and (value.float().sum(-1) - 1).abs().max() < 1e-3)


def compare(truth: Iterable[Tensor], found: Iterable[Tensor]) -> dict[str, Any]:
    """How many true values are among those found, how many are not, and what else was found; a true value may come twice."""
    known = list(found)
    hits: set[int] = set()
    missing = []
    for number, value in enumerate(values := list(truth)):
        hit = next((n for n, other in enumerate(known) if same(value, other)), None)
        if hit is None:
            missing.append([number, list(value.shape)])
        else:
            hits.add(hit)
    extra = [list(other.shape) for n, other in enumerate(known) if n not in hits]
    return {"true": len(values), "found": len(values) - len(missing), "missing": missing[:8], "extra": extra[:8]}


def slices(pattern: Tensor, maps: list[Tensor]) -> list[Tensor]:
    """The parts of a pattern where a model returns only some of it: two sets of keys one by one, padding cut off."""
    parts = []
    for turned in (pattern, pattern.transpose(1, 2) if pattern.dim() == 4 else pattern):
        for size in {t.shape for t in maps if t.dim() == turned.dim() and t.shape != turned.shape}:
            if all(a <= b for a, b in zip(size, turned.shape, strict=True)):
                parts.append(turned[tuple(slice(length) for length in size)])
                parts.append(turned[tuple(slice(-length, None) for length in size)])
    return parts


def heads(maps: list[Tensor], blocks: Iterable[Any], patterns: list[Tensor]) -> dict[str, Any]:
    """Whether the heads counted are those of the returned map, (examples, heads, queries, keys)."""
    wrong, total = [], 0
    for block, pattern in zip(blocks, patterns, strict=True):
        hit = next((t for t in maps if t.dim() == 4 and same(t, pattern)), None)
        if hit is not None:
            total += 1
            wrong += [] if block.n_heads in hit.shape[1:3] else [[block.n_heads, list(hit.shape)]]
    return {"true": total, "found": total - len(wrong), "missing": wrong[:8], "extra": []}


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers bit by bit, up to a view (reshaped or transposed)."""
    if a.numel() != b.numel():
        return False
    a, b = a.detach().float().reshape(-1).nan_to_num(), b.detach().float().reshape(-1).nan_to_num()
    return torch.equal(a, b) or (bool(a.sum() - b.sum() < 1) and torch.equal(a.sort().values, b.sort().values))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help="architectures; all of types.json where none is named")
    parser.add_argument("--out", type=pathlib.Path, help="write one JSON line per architecture to this file")
    given = parser.parse_args()
    rows = []
    for name in given.types or TYPES:
        try:
            rows.append(measure(name))
        except Exception as error:
            rows.append({"type": name, "error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-800:]})
        if given.out:
            with given.out.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    report(rows)
    return 0


def report(rows: list[dict[str, Any]]) -> None:
    """The table: architectures whose truth is located in full, of those that have one."""
    print(f"{len(rows)} architectures, {sum('error' in row for row in rows)} with an error")
    for kind in ("attention", "heads", "hidden", "mlp"):
        known = [row for row in rows if row.get(kind, {}).get("true")]
        whole = [row for row in known if not row[kind]["missing"]]
        values = sum(row[kind]["true"] for row in known), sum(row[kind]["found"] for row in known)
        print(f"  {kind:10s} {len(whole)} of {len(known)} architectures, {values[1]} of {values[0]} values")


if __name__ == "__main__":
    sys.exit(main())

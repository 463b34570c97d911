"""Whether recordings run again bit for bit, over hundreds of architectures: `python etc/census/verify.py [TYPE ...]`.

Of each, every op runs again on what it read (`run.verify()`); then a few values over the whole graph are edited, and the
replay of the recording must be the model's own forward under the same edit, or be refused by name.
"""

import collections
import copy
import json
import pathlib
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))  # what is measured is the checkout in which this file stands
sys.path.insert(0, str(pathlib.Path(__file__).parent))
import tinymodels
import torch
from inputs import flat
from measure import command_line

import fmr
from fmr import edits
from fmr.watching.storage import is_equal

EDITED = 6
"""How many values of each architecture are edited, evenly over its graph."""


def measure(name: str) -> dict[str, Any]:
    """One architecture: what was made again, what differs and why the rest was not; the same of replays under edits."""
    began = time.perf_counter()
    model, inputs = tinymodels.build(name)
    with fmr.track(model) as run:
        tinymodels.run(model, inputs)
    verdict = run.verify()
    row: dict[str, Any] = {"type": name, "ops": len(run.graph), "same": verdict.same, "differ": list(verdict.differ)}
    row["refused"] = collections.Counter(reason(why) for why in verdict.refused.values())
    row["replays"] = [replayed(model, inputs, run, value) for value in editable(run.graph)]
    return row | {"seconds": round(time.perf_counter() - began, 2)}


def editable(graph: fmr.Graph) -> list[fmr.TensorId]:
    """Some of the floating-point values that ops made, evenly over the graph."""
    hidden = ("alias", "opaque")
    known = [n.id for n in graph.nodes if n.dtype.is_floating_point and n.op not in hidden and not n.id.is_source]
    return known[len(known) // 20 :: max(1, len(known) // EDITED)]


def replayed(model: Any, inputs: Any, run: fmr.Run, value: fmr.TensorId) -> tuple[str, str]:
    """What came of a replay with one value edited: "same", "differs", or why there is none."""
    asked = {value: edits.Scale(0.75)}
    try:
        own = copy.deepcopy(model)  # some keep what they made, and would go on with what was edited
        with fmr.track(own, keep=(), edits=asked) as expected:
            tinymodels.run(own, inputs)
    except Exception as error:
        return "model", f"{value}: {type(error).__name__}: {error}"
    try:
        again = fmr.replay(run, asked)
    except fmr.FmrError as error:
        return "refused", reason(f"{error}")
    except Exception as error:
        return "differs", f"{value}: {type(error).__name__}: {error}"
    pairs = zip(flat(again.output), flat(expected.output), strict=True)
    alike = all(not torch.is_tensor(a) or (a.dtype == b.dtype and is_equal(a, b)) for a, b in pairs)
    return ("same", "") if alike else ("differs", f"{value}: another output")


def reason(why: str) -> str:
    """A reason without the names in it."""
    return " ".join("it" if "/" in word or "#" in word else word for word in why.partition("\n")[0].split())[:160]


def main() -> int:
    given, types = command_line(__doc__)
    rows = []
    for name in types:
        try:
            rows.append(measure(name))
        except tinymodels.CannotBuild:
            continue
        except Exception as error:
            rows.append({"type": name, "error": f"{type(error).__name__}: {error}"})
        if given.out:
            with given.out.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    report(rows)
    return int(any("error" in row or bad(row) for row in rows))


def bad(row: dict[str, Any]) -> list[str]:
    """What does not have the same bits."""
    return [*row.get("differ", ()), *(why for how, why in row.get("replays", ()) if how == "differs")]


def report(rows: list[dict[str, Any]]) -> None:
    """The table: values made again and replays; below it what differs and why the rest was refused."""
    done = [row for row in rows if "error" not in row]
    made, refused = sum(row["same"] for row in done), sum(sum(row["refused"].values()) for row in done)
    differ = sum(len(row["differ"]) for row in done)
    print(f"{len(done)} architectures: {made} values made again with the same bits, {differ} differ, {refused} refused")
    how = collections.Counter(one for row in done for one, _ in row["replays"])
    print(
        f"{sum(how.values())} replays under an edit: {how['same']} bit-equal to the model, {how['differs']} differ, "
        f"{how['refused']} refused; the model itself refuses {how['model']}"
    )
    for row in rows:
        if "error" in row:
            print(f"  error in {row['type']}: {row['error']}")
        for one in bad(row)[:6]:
            print(f"  {row['type']}: {one}")
    whys = collections.Counter(why for row in done for why in row["refused"].elements())
    whys.update(why for row in done for one, why in row["replays"] if one == "refused")
    for why, number in whys.most_common(20):
        print(f"  refused {number:5d}  {why}")


if __name__ == "__main__":
    sys.exit(main())

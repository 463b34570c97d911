"""How much of the structure of hundreds of architectures `fmr.locate` finds: `python etc/census/measure.py [TYPE ...]`.

The truth is what each model says of itself: the attentions and hidden states that it returns, the heads that its attention
modules count, by hooks what enters and leaves its feed-forward projections, and the modules that it repeats.
"""

import argparse
import collections
import copy
import json
import os
import pathlib
import re
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))  # what is measured is the checkout in which this file stands
sys.path.insert(0, str(pathlib.Path(__file__).parent))
import groundtruth
import layers
import memories
import modules
import tinymodels
import torch
from compare import Plain, in_order, match, plain
from inputs import flat
from torch import Tensor, nn

import fmr

TYPES: dict[str, dict[str, Any]] = json.loads(pathlib.Path(__file__).with_name("types.json").read_text())

QUICK = """
bart bert big_bird bloom canine clap_text_model cvt d_fine dbrx deberta-v2 deepseek_v3 falcon flaubert gemma2
gemma3n_text gpt2 gpt_neox gpt_oss granitemoehybrid inkling2_text instructblip jamba jetmoe led lilt llama llama4_text longt5
mamba mixtral modernbert moonshine moshi nystromformer olmo2 openai-gpt owlvit perceiver phi3 prophetnet qwen2_vl
qwen3_next roformer siglip t5 t5gemma2_decoder whisper xlnet
""".split()
"""Types of every idiom that are measured in seconds."""

KINDS = {
    "attention": "returned maps are located patterns, bit for bit up to a view or a slice",
    "order": "and in the order in which they are returned",
    "sdpa": "located inside the fused kernels within 1e-5 of the eager maps, in order",
    "only": "located patterns are returned, or made in a module that is called attention",
    "heads": "query heads, as the module or the map says",
    "kv heads": "key-value heads, by the widths of the projections or as the module says",
    "head dim": "units of a query head, as the module says",
    "mlp": "hooked feed-forward coefficients are located, bit for bit, in order",
    "keys": "w_in, w_gate and w_out, and by them the vectors of the first and the last memory",
    "hidden": "returned hidden states are points of the residual stream, up to a view or the order of positions",
    "writes": "attentions and memories write to the residual stream in a layer",
    "layers": "repeated modules with attentions or memories are one layer each, in order",
    "certified": "findings are recomputed from their parts within 1e-4",
    "reasons": "reasons of what is rejected are in words",
}
"""The kinds of truth and what is counted of each."""

HUGE = frozenset("videoprism inkling_vision inkling_mm_model".split())
"""Types whose smallest form takes more than 16 GB."""

RAW = r"\(\) |argument|object|dtype|size of tensor|must match|Expected"
"""What tells the words of an exception from those for a reader."""

ERRORS = ("pattern", "rows", "z", "heads", "out", "post", "keys", "writes")
"""What certificates compare."""

Parts = Iterable[tuple[str, bool]]


def measure(name: str) -> dict[str, Any]:
    """One architecture: for each kind how many truths there are, how many are located, and which are not."""
    began = time.perf_counter()
    model, inputs = tinymodels.build(name)
    truth = groundtruth.truth(model, inputs)
    with fmr.track(model) as run:
        tinymodels.run(model, inputs)
    start = time.perf_counter()
    found = fmr.locate(run)
    row: dict[str, Any] = {"type": name, "ops": len(run.graph), "locate": round(time.perf_counter() - start, 2)}
    maps = returned_maps(name, truth)
    row |= attention(model, run, found, maps)
    if maps:
        row |= fused(name, model, inputs, maps)
    if known_of(name, truth)["mlp"]:
        row |= feed_forward(model, inputs, run, found, {name: values[0] for name, values in truth.seconds.items()})
    row |= residual(name, model, inputs, run, found, truth)
    calls = [scope.path for scope in run.graph.scopes]
    row["layers"] = tally(layers.of_entries(found, layers.lists_of(model), calls))
    row |= certificates(run, found)
    return row | {"seconds": round(time.perf_counter() - began, 2)}


def known_of(name: str, truth: groundtruth.Truth) -> dict[str, Any]:
    """What is known of the truth of a type; of one that types.json does not list, what its tensors tell."""
    return TYPES.get(name) or {"maps": True, "attention": None, "mlp": truth.reliable}


def others() -> list[str]:
    """The types of the installed library that types.json does not list, as far as their smallest form fits in memory."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    tinymodels.MAX_PARAMETERS = 100e6
    return [name for name in CONFIG_MAPPING if name not in TYPES and name not in HUGE]


def returned_maps(name: str, truth: groundtruth.Truth) -> dict[str, list[Tensor]]:
    """The sequences of attention maps that a model returns, by their names in its output; none where they are no maps, or
    hold no numbers, as where a layer is masked as a whole."""
    known = known_of(name, truth)
    if not known["maps"]:
        return {}
    whole = known["maps"] == known["attention"]
    maps = {}
    for path, nest in groundtruth.named_outputs(truth.output, "attentions"):
        nested = isinstance(nest, (list, tuple)) and all(isinstance(one, (list, tuple)) for one in nest)
        inner = {f"[{n}]": one for n, one in enumerate(nest)} if nested else {"": nest}
        for key, one in inner.items():
            maps[f"{path}{key}"] = [t for t in flat(one) if (whole and not t.isnan().all()) or is_map(t)]
    return maps


def is_map(value: Tensor) -> bool:
    return bool(torch.isfinite(value).all() and value.dim() and (value.float().sum(-1) - 1).abs().max() < 1e-3)


def tally(parts: Parts) -> dict[str, Any]:
    """How many of these hold, and which do not."""
    known = list(parts)
    return {"true": len(known), "found": sum(ok for _, ok in known), "missing": [name for name, ok in known if not ok][:8]}


def attention(model: nn.Module, run: fmr.Run, found: Any, maps: dict[str, list[Tensor]]) -> dict[str, Any]:
    """Which returned maps are located, whether nothing else is, and the shape of the heads."""
    patterns = plain(run[block.pattern] for block in found.attention)
    places = {path: match(plain(values), patterns) for path, values in maps.items()}
    hits = {place: maps[path][n] for path, known in places.items() for n, place in enumerate(known) if place is not None}
    blocks = list(enumerate(found.attention))
    shapes = [(block, modules.shape_of(model, block.scope)) for _, block in blocks]
    numbers = [(block, shape.n_heads or by_map(hits.get(n))) for n, (block, shape) in enumerate(shapes)]
    return {
        "attention": tally((f"{path}[{n}]", place is not None) for path, n, place in listed(places)),
        "order": tally((f"{path}[{n}]", ok) for path, n, ok in listed({p: in_order(known) for p, known in places.items()})),
        "only": tally((block.scope, n in hits or modules.is_attention(model, block.scope)) for n, block in blocks),
        "extra": [f"{block.scope}: {block.kind}, {block.size}" for n, block in blocks if n not in hits],
        "heads": tally(says(block, "n_heads", number) for block, number in numbers if number),
        "kv heads": tally(says(block, "n_kv_heads", shape.n_kv_heads) for block, shape in shapes if shape.n_kv_heads),
        "head dim": tally(says(block, "head_dim", shape.head_dim) for block, shape in shapes if shape.head_dim),
    }


def listed(named: dict[str, Sequence[Any]]) -> Iterable[tuple[str, int, Any]]:
    return ((path, n, one) for path, known in named.items() for n, one in enumerate(known))


def by_map(value: Tensor | None) -> int | None:
    """The heads of a returned map in the usual layout, (examples, heads, queries, keys)."""
    return value.shape[1] if value is not None and value.dim() == 4 else None


def says(block: Any, what: str, truth: int) -> tuple[str, bool]:
    return f"{block.scope}: {getattr(block, what)}, truly {truth}", getattr(block, what) == truth


def fused(name: str, model: nn.Module, inputs: dict[str, Any], maps: dict[str, list[Tensor]]) -> dict[str, Any]:
    """Whether the eager maps are located inside the fused kernels that the model runs with by default.

    Where they are not, because what rounding did to the layers above is in the queries, both are run in double precision.
    """
    other = tinymodels.make_model(name, None, model.rung)
    other.load_state_dict(model.state_dict())
    with fmr.track(other) as run:
        after = tinymodels.run(other, inputs)
    if not any(node.op == "scaled_dot_product_attention" for node in run.graph.nodes):
        return {}
    result = inside(run, maps)
    if result["missing"]:
        before = tinymodels.run(model, inputs)
        if not all(alike(a, b) for a, b in zip(flat(before), flat(after), strict=True)):
            return {"another result": True}
        result = in_double(name, model, other, inputs) or result
    return {"sdpa": result}


def inside(run: fmr.Run, maps: dict[str, list[Tensor]]) -> dict[str, Any]:
    """Which maps are located in a run, in order and within 1e-5."""
    patterns = plain(run[block.pattern] for block in fmr.locate(run).attention)
    places = {path: in_order(match(plain(values), patterns, 1e-5)) for path, values in maps.items()}
    return tally((f"{path}[{n}]", ok) for path, n, ok in listed(places))


def in_double(name: str, *given: Any) -> dict[str, Any] | None:
    """The same, where the eager model and the other one compute in float64; None where one of them cannot."""
    model, other, inputs = (copy.deepcopy(one) for one in given)
    inputs = {key: item.double() if is_floating(item) else item for key, item in inputs.items()}
    try:
        maps = returned_maps(name, groundtruth.truth(model.double(), inputs))
        with fmr.track(other.double()) as run:
            tinymodels.run(other, inputs)
        return inside(run, maps)
    except (RuntimeError, TypeError, ValueError):
        return None  # what it holds besides its parameters stayed in float32


def is_floating(item: Any) -> bool:
    return torch.is_tensor(item) and item.is_floating_point()


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether two outputs are one up to rounding."""
    near = 1e-3 * max(map(abs, plain([a])[0].ends), default=0.0)
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=0.0, atol=near, equal_nan=True)


def feed_forward(
    model: nn.Module, inputs: dict[str, Any], run: fmr.Run, found: Any, posts: dict[str, Tensor]
) -> dict[str, Any]:
    """Which coefficients are located, and whether the keys and values are the parameters that make and read them."""
    posts, keys = memories.keys_of(model, inputs, posts)
    places = match(plain(posts.values()), plain(run[block.post] for block in found.mlps))
    located = {name: found.mlps[place] for name, place in zip(posts, places, strict=True) if place is not None}
    return {
        "mlp": tally(zip(posts, in_order(places), strict=True)),
        "keys": tally((name, name in located and memories.agrees(located[name], truth)) for name, truth in keys.items()),
    }


def residual(
    name: str, model: nn.Module, inputs: dict[str, Any], run: fmr.Run, found: Any, truth: groundtruth.Truth
) -> dict[str, Any]:
    """Which hidden states are points of a stream, and which attentions and memories stand in a layer.

    A state that is only computed when it is to be returned is looked for where it is.
    """
    states = among(truth.hidden, points_of(run, found))
    if not all(states.values()):
        with fmr.track(model) as asked:
            groundtruth.truth(model, inputs)
        states = among(truth.hidden, points_of(run, found) + points_of(asked, fmr.locate(asked)))
    layers = {id(part) for layer in found.layers for part in (*layer.attentions, *layer.mlps)}
    placed = [(part.scope, id(part) in layers) for part in (*found.attention, *found.mlps)]
    return {
        **apart("hidden", list(states.items()), groundtruth.NO_STATES.get(name)),
        **apart("writes", placed, groundtruth.NO_WRITES.get(name)),
    }


def apart(kind: str, parts: list[tuple[str, bool]], none: tuple[str, str] | None) -> dict[str, Any]:
    """The tally of a kind and, apart from it, what is on no stream, each with what it is."""
    if none is None:
        return {kind: tally(parts)}
    pattern, what = none
    aside = [part for part, _ in parts if re.search(pattern, part)]
    return {
        kind: tally((part, ok) for part, ok in parts if part not in aside),
        f"no {kind}": [[part, what] for part in aside],
    }


def among(hidden: dict[str, list[Tensor]], points: list[Plain]) -> dict[str, bool]:
    """For each returned state, by its name in the output, whether it is one of these values."""
    places = {path: match(plain(values), points, rearranged=True) for path, values in hidden.items()}
    return {f"{path}[{n}]": place is not None for path, n, place in listed(places)}


def points_of(run: fmr.Run, found: Any) -> list[Plain]:
    return plain(run[point] for stream in found.streams for point in stream.points)


def certificates(run: fmr.Run, found: Any) -> dict[str, Any]:
    """The largest error of each thing that is recomputed, and the reasons of what was rejected."""
    proofs = [(part.scope, part.certified) for part in (*found.attention, *found.mlps)]
    proofs += [(str(stream.points[0]), stream.check(run)) for stream in found.streams]
    worst: dict[str, float] = {}
    for _, proof in proofs:
        worst |= {what: max(error, worst.get(what, 0.0)) for what, error in proof.errors.items()}
    return {
        "certified": tally((name, proof.ok and proof.tolerance <= 1e-4) for name, proof in proofs),
        "reasons": tally((one.reason, not re.search(RAW, one.reason)) for one in found.rejected),
        "worst": worst,
        "rejected": [[one.what, one.reason, str(one.id)] for one in found.rejected],
    }


def command_line(what: str | None) -> tuple[argparse.Namespace, list[str]]:
    """The command line of a measure over architectures, and the types that it names."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("types", nargs="*", help="architectures; all of types.json where none is named")
    parser.add_argument("--quick", action="store_true", help="a few dozen types of every idiom")
    parser.add_argument("--others", action="store_true", help="the library's types that types.json does not list")
    parser.add_argument("--out", type=pathlib.Path, help="write one JSON line per architecture to this file")
    given = parser.parse_args()
    return given, list(given.types or (QUICK if given.quick else others() if given.others else TYPES))


def main() -> int:
    given, types = command_line(__doc__)
    rows = []
    for name in types:
        try:
            rows.append(measure(name))
        except tinymodels.CannotBuild as reason:
            rows.append({"type": name, "not built" if given.others else "error": f"{reason}"})
        except Exception as error:
            rows.append({"type": name, "error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-800:]})
        if given.out:
            with given.out.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    report(rows)
    return int(any("error" in row for row in rows))


def report(rows: list[dict[str, Any]]) -> None:
    """The table: architectures whose truth is located in full, of those that have one; below it the others."""
    failed, built = [row for row in rows if "error" in row], [row for row in rows if "not built" not in row]
    aside = f"; {len(rows) - len(built)} more do not build here" if len(built) < len(rows) else ""
    print(f"{len(built)} architectures, {len(failed)} with an error{aside}")
    for kind, meaning in KINDS.items():
        known = [row for row in rows if row.get(kind, {}).get("true")]
        whole = sum(not row[kind]["missing"] for row in known)
        values, true = (sum(row[kind][what] for row in known) for what in ("found", "true"))
        print(f"  {kind:10s} {whole:3d} of {len(known):3d} architectures, {values:5d} of {true:5d}   {meaning}")
    worst = {what: max(row["worst"].get(what, 0.0) for row in rows if "worst" in row) for what in ERRORS}
    print("  largest errors: " + ", ".join(f"{what} {error:.0e}" for what, error in worst.items()))
    extra = [row for row in rows if row.get("extra")]
    print(f"  not returned: {sum(len(row['extra']) for row in extra)} located attentions in {len(extra)} architectures")
    other = [row["type"] for row in rows if "another result" in row]
    for row in rows:
        for kind, word in (("hidden", "returned, but on no stream"), ("writes", "attention, but no write")):
            if row.get(f"no {kind}"):
                print(f"  {word}: {len(row[f'no {kind}'])} of {row['type']}, {row[f'no {kind}'][0][1]}")
    print(f"  the model itself computes something else under sdpa: {', '.join(other) or 'none'}")
    for kind in KINDS:
        names = [f"{row['type']} {row[kind]['found']}/{row[kind]['true']}" for row in rows if missing(row, kind)]
        if names:
            print(f"  {kind}: " + ", ".join(names))
    for row in failed:
        print(f"  error in {row['type']}: {row['error']}")
    for reason, number in collections.Counter(reasons(rows)).most_common(12):
        print(f"  rejected {number:5d}  {reason}")


def missing(row: dict[str, Any], kind: str) -> bool:
    return bool(row.get(kind, {}).get("missing"))


def reasons(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Why things were rejected, without the names in it where it is in words."""
    for row in rows:
        for what, reason, _ in row.get("rejected", ()):
            yield f"no {what}: {reason if re.search(RAW, reason) else reason.partition(':')[0]}"


if __name__ == "__main__":
    sys.exit(main())

"""The rows of the bench beside the peers, and how they print. Only the standard library: the driver has nothing else."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

EVERYTHING, WITH_GRAPH = "record everything", "record everything, with its graph"
PATTERNS, GRAPH = "the attention patterns in a later run", "the graph alone"
ONE_EDIT = "one edit: a vector added to the residual stream after a layer"
INTERCHANGE = "interchange of that stream at the last position, 8 examples, their source run included"
GENERATE = "20 new tokens, that vector added in every pass"
RESTORES = "144 restores: 12 layers x 12 positions, 12 tokens, over 144 forwards"
PATHS = "path patching of 144 heads, the heads above frozen, 12 tokens, over 144 forwards"
ATTRIBUTION = "attribution patching of all sites, 8 pairs of 14 tokens"
HEADS = "z of 270 heads patched at the last position, 8 pairs"
TRACING = "causal tracing, 30 layers x 18 tokens, the state"
DAS = "a step of DAS: 8 pairs, 64 directions of the stream after layer 18, in two forwards and a backward"
CIRCUIT = "EAP: all edges scored, a circuit of 5 % tested"
WORK = {
    WITH_GRAPH: 'fmr.run(model, ids, keep="all").graph',
    EVERYTHING: 'fmr.run(model, ids, keep="all")',
    PATTERNS: "fmr.run(model, ids, keep=[an ID a layer])",
    GRAPH: 'fmr.run(model, ids, keep="none").graph',
    ONE_EDIT: "fmr.run(model, ids, keep=(), edits={site: edits.Add(vector)})",
    INTERCHANGE: "fmr.run(model, ids, keep=(), edits={site: edits.Interchange(source_ids)})",
    GENERATE: "with fmr.track(model, keep=(), edits={site: edits.Add(vector)}): model.generate(ids)",
    RESTORES: "fmr.sweep(model, ids, sites, edits.Interchange(clean), logit_diff(3, 5))",
    PATHS: "fmr.sweep(model, ids, [(head, *heads_above), ...], swap_or_hold, logit_diff(3, 5))",
}
"""The kinds of work in the order of the table, and how fmr does each."""

METHODS = {
    ATTRIBUTION: "AttributionPatching(model, tokenizer).run(clean, corrupted, logit_diff(right, wrong))",
    HEADS: "ActivationPatching(model, tokenizer).run(clean, corrupted, logit_diff(right, wrong), sites)",
    TRACING: "CausalTracing(model, tokenizer, samples=1).run(fact, subject)",
    DAS: "AlignmentSearch(model, causal_model, site, subspaces.Rotation(576, 64)).run(counterfactuals)",
    CIRCUIT: 'CircuitSearch(model, tokenizer).run(clean, corrupted, logit_diff(right, wrong), "eap")',
}
"""The methods on a language model in the order of their table, and how fmr does each."""

SHAPES = {"tiny": "2 layers, 64 wide, 4 heads, 16 tokens", "small": "12 layers, 768 wide, 12 heads, 32 tokens"}


class Row(NamedTuple):
    """One kind of work on one model: what the peer and fmr captured, at which ratio to the plain forward."""

    peer: str
    what: str
    how: str
    shape: str
    captured: str = ""
    ratio: float = 0.0
    fmr_captured: str = ""
    fmr_ratio: float = 0.0
    those_ratio: float = 0.0
    values: str = ""
    found: str = ""
    error: str = ""


class Peer(NamedTuple):
    """What one environment measured: its versions, the noise of the plain forward, and the rows."""

    name: str
    versions: Mapping[str, str]
    again: Sequence[float]
    rows: Sequence[Row]


class Line(NamedTuple):
    """The cells of one line of the table."""

    how: str
    captured: str
    tiny: str
    small: str
    fmr_captured: str
    fmr_tiny: str
    fmr_small: str
    values: str


HEAD = Line("peer", "captures", "tiny", "small", "fmr captures", "tiny", "small", "peer's values against fmr's")


def sections(peers: Sequence[Peer]) -> Iterator[tuple[str, list[Line]]]:
    """The lines under each kind of work."""
    rows = [row for peer in peers for row in peer.rows]
    for what in WORK:
        mine = sorted((row for row in rows if row.what == what), key=lambda row: (row.peer, row.how))
        lines = [_line({row.shape: row for row in same}) for _, same in groupby(mine, key=lambda row: (row.peer, row.how))]
        if lines:
            yield what, lines


def _line(at: Mapping[str, Row]) -> Line:
    row = next(iter(at.values()))
    both = [at.get(shape) for shape in SHAPES]
    those = [f" ({one.those_ratio:.2f})" if one and one.those_ratio else "" for one in both]
    return Line(
        f"{row.peer}: {row.how}",
        _joined(one and one.captured for one in both),
        *(_ratio(one and one.ratio, one and one.error) for one in both),
        _joined(one and one.fmr_captured for one in both),
        *(_ratio(one and one.fmr_ratio) + also for one, also in zip(both, those, strict=True)),
        _verdict([one for one in both if one]),
    )


class Method(NamedTuple):
    """The cells of one line of the table of methods."""

    how: str
    model: str
    forwards: str
    fmr_forwards: str
    results: str


METHOD_HEAD = Method("peer", "model", "peer, in forwards", "fmr, in forwards", "peer's results against fmr's")


def methods(peers: Sequence[Peer]) -> Iterator[tuple[str, list[Method]]]:
    """The lines under each method."""
    rows = [row for peer in peers for row in peer.rows]
    for what in METHODS:
        mine = sorted((row for row in rows if row.what == what), key=lambda row: (row.shape, row.peer))
        lines = [
            Method(
                f"{row.peer}: {row.how}",
                row.shape,
                _ratio(row.ratio, row.error),
                _ratio(row.fmr_ratio),
                row.error or row.values,
            )
            for row in mine
        ]
        if lines:
            yield what, lines


def _verdict(rows: Sequence[Row]) -> str:
    said = dict.fromkeys(row.error or row.values for row in rows)
    found = dict.fromkeys(row.found for row in rows if row.found)
    return "; ".join([*filter(None, said), *([f"{' / '.join(found)} found"] if found else [])])


def _joined(cells: Iterator[str | None]) -> str:
    """`2 / 12 tensors` for "2 tensors" and "12 tensors"."""
    counts = [cell.split() for cell in cells if cell]
    return f"{' / '.join(count for count, _ in counts)} {counts[0][1]}" if counts else ""


def _ratio(value: float | None, error: str | None = None) -> str:
    if error:
        return "FAILS"
    return "-" if not value else f"{value:.0f}" if value >= 20 else f"{value:.1f}" if value >= 5 else f"{value:.2f}"


def as_text(peers: Sequence[Peer]) -> str:
    """The tables for a terminal."""
    tables = (HEAD, WORK, list(sections(peers))), (METHOD_HEAD, METHODS, list(methods(peers)))
    return "\n\n".join(_text(*table) for table in tables if table[2])


def _text(head: Sequence[str], own: Mapping[str, str], parts: Sequence[tuple[str, Sequence[Sequence[str]]]]) -> str:
    every = [head, *(line for _, lines in parts for line in lines)]
    widths = [max(len(line[column]) for line in every) for column in range(len(head))]
    out = [_padded(head, widths)]
    for what, lines in parts:
        out += ["", f"{what}; fmr: {own[what]}", *(_padded(line, widths) for line in lines)]
    return "\n".join(out)


def _padded(line: Sequence[str], widths: Sequence[int]) -> str:
    left = {0, 1, 4, 7}
    return "  ".join(
        cell.ljust(wide) if column in left else cell.rjust(wide)
        for column, (cell, wide) in enumerate(zip(line, widths, strict=True))
    ).rstrip()


def as_markdown(peers: Sequence[Peer]) -> str:
    """The tables for a README."""
    out = [_piped(HEAD), "|---|---|--:|--:|---|--:|--:|---|"]
    for what, lines in sections(peers):
        out += [_piped((f"**{what}**", "", "", "", f"`{WORK[what]}`", "", "", "")), *(_piped(line) for line in lines)]
    out += ["", _piped(METHOD_HEAD), "|---|---|--:|--:|---|"]
    for what, lines in methods(peers):
        out += [_piped((f"**{what}**", "", "", "", f"`{METHODS[what]}`")), *(_piped(line) for line in lines)]
    return "\n".join(out)


def _piped(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

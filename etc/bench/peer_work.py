"""The same work by fmr and by one peer, in turns in one process; each `peer_*.py` says how its peer does it."""

import copy
import gc
import json
import math
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from engine import TINY, Case, attention_ids, gpt2, token_ids
from peer_edits import Task, Ways, tasks
from peer_methods import Methods, Subject, studies, subjects
from peer_table import EVERYTHING, GRAPH, PATTERNS, WITH_GRAPH, Peer, Row
from timing import Ratio, Variant, compare, cpu_seconds
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import fmr

TOLERANCE = 1e-5
SAMPLE_SECONDS, MOST_CALLS = 0.008, 8


class Sample(NamedTuple):
    """What one run captured: its tensors, among them the patterns and the logits, or the ops of its graph."""

    tensors: Sequence[Tensor] = ()
    patterns: Sequence[Tensor] = ()
    logits: Tensor | None = None
    ops: Sequence[str] = ()


class Work(NamedTuple):
    """One way in which a peer does one kind of work, and how to read the result of its run."""

    what: str
    how: str
    run: Variant
    read: Callable[[Any], Sample]


Works = Callable[[Case], Iterable[Work]]


def case_of(shape: str) -> Case:
    """One of the two models, with seeded random weights."""
    model = gpt2(**TINY) if shape == "tiny" else gpt2()
    return Case(shape, model, token_ids(model, 16 if shape == "tiny" else 32))


def twin(case: Case | Subject) -> Any:
    """A copy of the model on the same weights, for a peer to do with as it likes: nobody touches the model itself."""
    return copy.deepcopy(case.model, {id(one): one for one in (*case.model.parameters(), *case.model.buffers())})


def words(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose words are numbers, so that nothing is downloaded."""
    spelled = {"<0>": 0} | {str(word): word for word in range(1, vocabulary)}  # a special token is found within words, too
    inner = Tokenizer(models.WordLevel(spelled, unk_token="<0>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<0>")
    return PreTrainedTokenizerFast(tokenizer_object=inner, add_bos_token=True, name_or_path="numbers", **special)


# ---- what fmr does, and whether the values are the same


class Truth:
    """What fmr captures of the model: every value, its IDs by size, the patterns and the logits."""

    def __init__(self, case: Case) -> None:
        self.run = case.run()
        self.nodes = [node for node in self.run.graph.nodes if not node.id.is_source]
        self.patterns = attention_ids(case)
        tracked: Any = self.run.passes[0].output
        plain: Any = case.forward()
        self.logits = tracked.logits
        if not torch.equal(self.logits, plain.logits):
            raise RuntimeError(
                f"The logits of {case.name} under fmr differ from the plain ones, expected the same bits. Report it."
            )
        self.sized: dict[int, list[tuple[fmr.TensorId, float, Tensor]]] = defaultdict(list)
        for node in self.run.graph.nodes:
            if not node.id.startswith(("param:", "buffer:")):
                flat = self.run[node.id].flatten()
                self.sized[flat.numel()].append((node.id, flat[0].item(), flat))

    def find(self, value: Tensor) -> fmr.TensorId | None:
        """The ID of a value of fmr that holds the same numbers in the same order, whatever its shape."""
        flat = value.flatten()
        first = flat[0].item()
        alike = (own for own in self.sized[flat.numel()] if math.isclose(own[1], first, rel_tol=1e-4, abs_tol=TOLERANCE))
        return next((name for name, _, own in alike if close(own, flat)), None)

    def compare(self, sample: Sample) -> str:
        """The patterns and the logits against those of fmr."""
        parts = []
        if sample.patterns:
            parts.append(_agree("patterns", sample.patterns, [self.run[name] for name in self.patterns]))
        if sample.logits is not None:
            parts.append(_agree("logits", [sample.logits], [self.logits]))
        return ", ".join(parts)

    def found(self, sample: Sample) -> str:
        """How many of the peer's tensors are among fmr's values; of its ops, how many have their name among fmr's ops."""
        own = Counter(node.op for node in self.nodes)
        ops = (Counter(map(plain_name, sample.ops)) & own).total()
        found = ops + sum(self.find(value) is not None for value in sample.tensors)
        total = len(sample.ops) + len(sample.tensors)
        return "all" if found == total else f"{found} of {total}"


def close(own: Tensor, other: Tensor) -> bool:
    """Equal within the tolerance, infinities included."""
    if own.dtype != other.dtype:
        return False
    if not own.is_floating_point():
        return torch.equal(own, other)
    return torch.allclose(own, other, rtol=TOLERANCE, atol=TOLERANCE)


def _agree(what: str, theirs: Sequence[Tensor], own: Sequence[Tensor]) -> str:
    if [value.shape for value in theirs] != [value.shape for value in own]:
        return f"{what} differ in number or shape"
    worst = max((one - other).abs().max().item() for one, other in zip(theirs, own, strict=True))
    return f"{what} {'equal' if worst <= TOLERANCE else f'differ by {worst:.0e}'}"


def plain_name(op: str) -> str:
    """The name that fmr gives an op: `__radd__` is add, and type a to."""
    name = op.strip("_")
    return {"radd": "add", "rmul": "mul", "type": "to"}.get(name, name)


def own_work(case: Case, what: str, truth: Truth) -> tuple[Variant, str]:
    """How fmr does this work, and what it captures."""
    everything = f"{len(truth.nodes)} tensors"
    return {
        EVERYTHING: (case.run, everything),
        WITH_GRAPH: (lambda: case.run().graph, everything),
        PATTERNS: (lambda: case.run(keep=truth.patterns), f"{len(truth.patterns)} tensors"),
        GRAPH: (lambda: case.run(keep="none").graph, f"{len(truth.nodes)} ops"),
    }[what]


# ---- the clock


ROUNDS, LEAST, FEWEST, TWICE = 21, 5, 3, 2
"""How many samples of each variant are taken, how many where the time is up before, and how many of 144 edited runs and of
methods."""


def interleave(variants: Mapping[str, Variant], seconds: float, least: int = LEAST) -> dict[str, Ratio]:
    """Time every variant in turns; the first is the base. A quick one is called several times a sample, a slow one once.

    Garbage is collected between samples, so that none pays for what another left.
    """
    names = list(variants)
    calls = {name: _calls(variants[name]) for name in names}
    samples: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.freeze()
    begun = time.perf_counter()
    for turn in range(ROUNDS):
        if turn >= least and time.perf_counter() - begun > seconds:
            break
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            gc.collect()
            if calls[name] > 1:
                variants[name]()  # what ran before has left other things in the processor's caches
            samples[name].append(cpu_seconds(variants[name], calls[name]))
    gc.unfreeze()
    return compare(samples)


def _calls(variant: Variant) -> int:
    if cpu_seconds(variant) > 100 * SAMPLE_SECONDS:
        return 1
    return max(1, min(MOST_CALLS, round(SAMPLE_SECONDS / max(cpu_seconds(variant), 1e-4))))


# ---- one model


def attempt(work: Work) -> Sample | str:
    """What the work captures, or the error that it ends with on one line."""
    try:
        return work.read(work.run())
    except Exception as error:
        return one_line(error)


def one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")


def measure(peer: str, case: Case, works: Works, seconds: float) -> tuple[list[Row], Ratio]:
    """The rows of one model."""
    truth = Truth(case)
    variants: dict[str, Variant] = {"base": case.forward, "again": case.forward}
    rows: list[Row] = []
    for work in works(case):
        variants[f"fmr {work.what}"], captured = own_work(case, work.what, truth)
        row = Row(peer, work.what, work.how, case.name, fmr_captured=captured)
        sample = attempt(work)
        if isinstance(sample, str):
            rows.append(row._replace(error=sample))
            continue
        variants[f"peer {work.how}"] = work.run
        if work.what == EVERYTHING:
            those = [name for name in dict.fromkeys(map(truth.find, sample.tensors)) if name and not name.is_source]
            variants[f"those {work.how}"] = lambda those=those: case.run(keep=those)
        mine = f"{len(sample.ops)} ops" if sample.ops else f"{len(sample.tensors)} tensors"
        rows.append(row._replace(captured=mine, values=truth.compare(sample), found=truth.found(sample)))
    at = interleave(variants, seconds)
    return [_measured(row, at) for row in rows], at["again"]


def _measured(row: Row, at: Mapping[str, Ratio]) -> Row:
    names = {"ratio": f"peer {row.how}", "fmr_ratio": f"fmr {row.what}", "those_ratio": f"those {row.how}"}
    return row._replace(**{field: at[name].median for field, name in names.items() if name in at})


# ---- the edits


def measure_edits(peer: str, case: Case, ways: Ways, seconds: float) -> Iterator[Row]:
    """The rows of one model where something is changed, each with a plain forward of its own beside it."""
    for task in tasks(case):
        variants: dict[str, Variant] = {"base": task.base, f"fmr {task.what}": task.own}
        rows, own = [], task.own()
        for how, run in task.ways(ways):
            row = Row(peer, task.what, how, case.name)
            result = attempt(Work(task.what, how, run, lambda value: value))
            if isinstance(result, str):
                rows.append(row._replace(error=result))
                continue
            variants[f"peer {how}"] = run
            rows.append(row._replace(values=_agree("results", [result], [own])))
        at = interleave(variants, seconds / 4, LEAST if task.forwards == 1 else FEWEST)
        yield from (_shared(_measured(row, at), task) for row in rows)


def _shared(row: Row, task: Task) -> Row:
    return row._replace(ratio=row.ratio / task.forwards, fmr_ratio=row.fmr_ratio / task.forwards)


# ---- the methods


def measure_methods(peer: str, subject: Subject, methods: Methods) -> Iterator[Row]:
    """The rows of methods on one model, each with a plain forward of its own beside it."""
    for study in studies(subject):
        if study.method not in methods.how:
            continue
        row, samples = Row(peer, study.what, methods.how[study.method], subject.name), defaultdict[str, list[float]](list)
        for _ in range(TWICE):
            gc.collect()
            samples["base"].append(min(cpu_seconds(study.base) for _ in range(3)))
            own, seconds = _timed(study.own)
            samples[f"fmr {row.what}"].append(seconds)
            result, seconds = _timed(
                partial(attempt, Work(row.what, row.how, partial(study.way, methods), lambda value: value))
            )
            if isinstance(result, str):
                row = row._replace(error=result)
            else:
                samples[f"peer {row.how}"].append(seconds * study.times)
                row = row._replace(values=_same(result.flatten().double(), own.double()))
        yield _measured(row, compare(samples))


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and the CPU seconds that it takes."""
    found: list[Any] = []
    seconds = cpu_seconds(lambda: found.append(call()))
    return found[0], seconds


def _same(result: Tensor, own: Tensor) -> str:
    """Whether a peer's numbers are fmr's, as a share of the largest; of those that a peer gives, where it gives fewer."""
    size = own.abs().max()
    return _agree("results", [result / size], [own[: len(result)] / size])


def tensors_in(value: object) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from tensors_in(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from tensors_in(one)


def main(
    name: str,
    works: Works = lambda case: (),
    ways: Callable[[Any], Ways] | None = None,
    methods: Callable[[Subject, Any], Methods] | None = None,
) -> None:
    """Measure all models and print the result as JSON, the last line of the output. ways, methods: of a model, if any."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 30.0
    rows, again = [], []
    with torch.no_grad():
        for shape in ("tiny", "small"):
            case, time_for = case_of(shape), seconds if shape == "small" else seconds / 2
            mine, noise = measure(name, case, works, time_for)
            rows += mine
            if ways is not None:
                rows += measure_edits(name, case, ways(twin(case)), time_for)
            again.append(noise.median)
        for subject in subjects() if methods is not None else ():
            rows += measure_methods(name, subject, methods(subject, twin(subject)))
    versions = {package: version(package) for package in (name, "torch", "transformers")}
    print(json.dumps(Peer(name, versions, again, [row._asdict() for row in rows])._asdict()))

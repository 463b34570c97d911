"""A lab: a folder in which experiments with a model are kept, by any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

from analyzers.lab.bench import Bench
from analyzers.lab.comparisons import Test
from analyzers.lab.difference import Difference, difference
from analyzers.lab.errors import LabError
from analyzers.lab.experiment import Experiment
from analyzers.lab.export import exported
from analyzers.lab.hypothesis import Hypothesis
from analyzers.lab.ledger import bury
from analyzers.lab.measure import checked_seed
from analyzers.lab.profile import Profile
from analyzers.lab.profiling import profiled
from analyzers.lab.report import page
from analyzers.lab.version import Version
from fmr.disk.files import write_whole
from fmr.errors import number_of
from fmr.pictures.endings import check_ending

if TYPE_CHECKING:
    from pandas import DataFrame

R = TypeVar("R")


class Lab(Bench):
    """Experiments with a model, kept in a folder with all that went in and came out.

    >>> lab = analyzers.Lab(model, "my lab", tokenizer)
    >>> @lab.experiment
    ... def surest(logit_lens, prompt):
    ...     return logit_lens.run(prompt)
    >>> surest("Junel Dunoth grew up in")
    >>> lab.versions("surest")
    surest ...  surest(prompt='Junel Dunoth grew up in') seed 0 -> Lens

    model: None to read a lab and no more. folder: a lab, or a new or empty one. tokenizer: for tools that take one.
    tools: by name, what makes a tool of a model (and a tokenizer); methods of analyzers are there from the begin.

    The folder holds `lab.sqlite` and, in `values/`, safetensors and PNG. One experiment runs at a time in a process, as
    random numbers are of the process: other threads wait, so that one that waits for threads with experiments of their own
    waits for ever. Any number of processes may use one lab.
    """

    @overload
    def experiment(self, function: Callable[..., R], /) -> Experiment[R]: ...
    @overload
    def experiment(
        self, /, *, name: str | None = None, seed: int | None = None
    ) -> Callable[[Callable[..., R]], Experiment[R]]: ...
    def experiment(self, function: Any = None, /, *, name: str | None = None, seed: int | None = None) -> Any:
        """Keep every call of a function: above its `def`, with or without a name and a seed of its own.

        >>> @lab.experiment(seed=3)
        ... def drawn(n):
        ...     return torch.rand(n)
        >>> drawn(2), drawn(2, seed=4)
        (tensor([...]), tensor([...]))

        seed: None for the default of the function's own `seed`, or 0.
        An error in the function is kept and raised again. A result that cannot be kept is refused; `error.result` is it.
        """
        if function is None:
            return lambda given: Experiment(self, given, name, seed)
        return Experiment(self, function, name, seed)

    def hypothesis(
        self,
        *,
        null: Callable[..., Any] | float,
        test: Test = "paired",
        alternative: str = "two-sided",
        correction: str = "holm",
        name: str | None = None,
        seed: int | None = None,
    ) -> Callable[[Callable[..., R]], Hypothesis[R]]:
        """Compare what a function returns with a null, by the same seeds or inputs; every run of both is kept.

        >>> @lab.hypothesis(null=lambda model, seed: 0.5, test="permutation", name="above")
        ... def above(model, seed):
        ...     return torch.rand(20).mean().item() + 0.2
        >>> above.over(seeds=range(8)).rejected()
        ['above']

        null: a function that is called in the same way, or a number. test: "paired" (t), "wilcoxon", "permutation" or
        "bootstrap", or a function of two samples as those of `scipy.stats` are. alternative: "two-sided", "greater" or
        "less" than the null. correction for many comparisons: "holm", "bh" (Benjamini, Hochberg), "bonferroni" or "none".
        Numbers without variance are refused.
        """
        return lambda function: Hypothesis(self, function, null, test, alternative, correction, name, seed)

    def load(self, version: str | Version) -> Any:
        """What a version's experiment returned.

        >>> lab.load(lab.versions("kept")[0])
        {'double': 14}
        """
        return self.version(version).result

    def diff(self, a: str | Version, b: str | Version) -> Difference:
        """What differs between two versions: code, arguments, seed, model, versions of libraries, results.

        >>> lab.diff(*lab.versions("kept")[:2])
        kept ... -> kept ...
          arguments x: 7 -> 8, by 1
          result double: 14 -> 16, by 2
        """
        return difference(self.version(a), self.version(b))

    def profile(self, *work: Any, seed: int = 0, **arguments: Any) -> Profile:
        """Time, memory and FLOPs of a forward of the model with these arguments, or of any function, by module and op.

        >>> lab.profile(**inputs)
        Profile: ... ms, 10,3... FLOPs, ... bytes at the peak
          by module, each by itself: ...
          by op, each by itself: ...

        work: positional arguments of the model; or a function, followed by its own. It is called twice, both times from this
        seed: first to count FLOPs, then under torch's profiler. After each forward of a module its buffers, as running
        statistics, are what they were before; what else a function changes stays.
        """
        function, args = (work[0], work[1:]) if work and callable(work[0]) else (self.model, work)
        if function is None:
            raise LabError("The lab has no model to profile. Make it with one, or give a function: lab.profile(function).")
        if function is self.model and not args and not arguments:
            raise LabError("lab.profile got no arguments for the model. Expected those of a forward: lab.profile(**inputs).")
        given = [*args, *arguments.values()]
        if function is self.model and all(one is None or isinstance(one, (int, float)) for one in given):
            raise LabError(f"lab.profile got {given[0]!r}, expected a function, or the tensors of a forward of the model.")
        return profiled(self.model, lambda: function(*args, **arguments), checked_seed(seed), function)

    def attempts(self, name: str | None = None) -> DataFrame:
        """Every execution, with its status: finished, failed with its error, running, or died with its process.

        >>> lab.attempts("kept")[["status", "version"]]
        """
        import pandas as pd

        bury(self.ledger)
        columns = ["id", "name", "began", "status", "seed", "seconds", "memory", "version", "error", "place"]
        rows = self.ledger.rows(f"SELECT {', '.join(columns)} FROM attempts WHERE ?1 IS NULL OR name=?1 ORDER BY id", name)
        return pd.DataFrame([tuple(row) for row in rows], columns=columns)

    def report(self, path: str | PathLike[str]) -> Path:
        """Write the lab as one page of HTML that opens without a server, and return its path.

        >>> lab.report("lab.html")
        """
        check_ending(path, "html")
        bury(self.ledger)
        write_whole(path, page(self).encode())
        return Path(path)

    def export(self, to: str, project: str, versions: Iterable[str | Version] | None = None) -> int:
        """Send versions to MLflow or Weights & Biases, each as a run with its arguments, numbers and files; how many.

        >>> lab.export("mlflow", "facts")  # doctest: +SKIP
        12

        to: "mlflow" or "wandb", whose client must be installed and logged in. project: the experiment of MLflow, or the
        project. versions: None for all. Each call makes new runs; they carry the hash of the version.
        """
        chosen = self.versions() if versions is None else [self.version(one) for one in versions]
        return exported(chosen, to, project)

    def __repr__(self) -> str:
        rows = self.ledger.rows("SELECT count(DISTINCT name), count(*) FROM versions")[0]
        states = self.ledger.rows("SELECT status, count(*) FROM attempts GROUP BY status ORDER BY status")
        kept = f"{number_of(rows[0], 'experiment')} in {number_of(rows[1], 'version')}"
        of = f" of {type(self.model).__name__}" if self.model is not None else ""
        return f"Lab{of} in {fspath(self.folder)}: {kept}; attempts: {', '.join(f'{n} {s}' for s, n in states) or 'none'}"

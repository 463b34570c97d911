"""The notebooks run from top to bottom in a fresh kernel, and are committed with clean outputs."""

import re
import shutil
from collections.abc import Iterator
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from nbformat import NotebookNode

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))
LARGEST = 1_500_000  # bytes
LOCAL = re.compile(r"/home/|/root/|/Users/|/tmp/|/work/|/opt/|site-packages|[A-Z]:\\\\")

QUICK = ("03",)
"""What runs in seconds; `make test-all` runs every one."""

DRAW = {"01_track_and_look.ipynb", "05_a_circuit.ipynb"}
"""What draws with Graphviz's program."""


def tools() -> ModuleType:
    """`etc/notebooks.py`, which is a script and in no package."""
    spec = spec_from_file_location("notebooks_tool", ROOT / "etc" / "notebooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def committed(name: str) -> NotebookNode:
    return nbformat.read(ROOT / "notebooks" / name, as_version=4)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(notebook: NotebookNode) -> Iterator[str]:
    """All that the outputs say in words, pictures included where they are text."""
    for cell in code_cells(notebook):
        for output in cell.outputs:
            yield output.get("text", "")
            yield from (str(said) for kind, said in output.get("data", {}).items() if kind != "image/png")


def complaints(notebook: NotebookNode) -> list[str]:
    """Errors, and whatever went to stderr: a warning in a notebook is one that its readers would see."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    errors = [f"{output.ename}: {output.evalue}" for output in outputs if output.output_type == "error"]
    return errors + [output.text for output in outputs if output.get("name") == "stderr"]


def test_there_are_notebooks_and_the_index_names_each() -> None:
    index = (ROOT / "notebooks" / "README.md").read_text()
    assert NOTEBOOKS
    assert [name for name in NOTEBOOKS if name not in index] == []


@pytest.mark.filterwarnings("default")  # what the kernel's client warns about is not ours
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name.startswith(QUICK) else pytest.mark.long) for name in NOTEBOOKS]
)
def test_it_runs_in_a_fresh_kernel_without_a_complaint(name: str) -> None:
    if name in DRAW and shutil.which("dot") is None:
        pytest.skip("Graphviz's program 'dot' is not on the PATH")
    fresh = tools().execute(ROOT / "notebooks" / name)
    assert complaints(fresh) == []
    kinds = [[sorted(output.get("data", ())) for output in cell.outputs] for cell in code_cells(fresh)]
    saved = [[sorted(output.get("data", ())) for output in cell.outputs] for cell in code_cells(committed(name))]
    assert kinds == saved, "a cell now shows other kinds of output than are committed; run `make notebooks`"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_is_committed_with_its_outputs_in_order(name: str) -> None:
    notebook = committed(name)
    assert complaints(notebook) == []
    assert any(cell.outputs for cell in code_cells(notebook))
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    assert any(
        output.get("data", {}).keys() & {"image/png", "image/jpeg"}
        for cell in code_cells(notebook)
        for output in cell.outputs
    )


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_is_small_and_names_no_place_on_a_machine(name: str) -> None:
    assert (ROOT / "notebooks" / name).stat().st_size < LARGEST
    assert [match.group() for text in texts(committed(name)) for match in LOCAL.finditer(text)] == []


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_holds_nothing_that_changes_from_run_to_run(name: str) -> None:
    notebook = committed(name)
    assert notebook.metadata.keys() == {"kernelspec"}
    assert [cell.id for cell in notebook.cells] == [f"cell-{number}" for number in range(len(notebook.cells))]
    assert [cell.metadata for cell in notebook.cells if cell.metadata] == []

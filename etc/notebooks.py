"""Execute the notebooks: in fresh kernels, and in place with what they print and draw.

    python etc/notebooks.py [notebooks/01_track_and_look.ipynb ...]

What changes from run to run (times, process numbers, the kernel's name) is left out, so that a diff shows what matters.
"""

import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parents[1] / "notebooks"
SECONDS = 300

ENVIRONMENT = {
    "IPYKERNEL_CELL_NAME": "cell.py",  # what graphs name as the call site of an op in a cell
    "OMP_NUM_THREADS": "1",  # so that the last bits of sums are the same on any number of cores
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm's, where there are no widgets
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
}


def paths() -> list[Path]:
    """The notebooks, in the order of their numbers."""
    return sorted(FOLDER.glob("*.ipynb"))


def execute(path: Path) -> NotebookNode:
    """A notebook with the outputs of a fresh kernel; an error in a cell is a `CellExecutionError`."""
    notebook = nbformat.read(path, as_version=4)
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    try:
        NotebookClient(
            notebook,
            timeout=SECONDS,
            kernel_name="python3",
            coalesce_streams=True,
            resources={"metadata": {"path": str(path.parent)}},  # where a notebook server starts it, beside its files
            extra_arguments=["--log-level=ERROR"],
        ).execute()
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    return tidy(notebook)


def tidy(notebook: NotebookNode) -> NotebookNode:
    """Without what another kernel on another day would write differently."""
    notebook.metadata = NotebookNode(kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"})
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", NotebookNode()
        for output in cell.get("outputs", ()):
            if "metadata" in output:
                output.metadata = NotebookNode()
    return notebook


def main() -> None:
    """Execute the notebooks that were named, or all of them, and save each in place."""
    for path in [Path(name) for name in sys.argv[1:]] or paths():
        start = time.perf_counter()
        notebook = execute(path)
        nbformat.write(notebook, path)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()

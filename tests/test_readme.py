"""The snippets of the README run one after the other, as a newcomer types them."""

import re
import shutil
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz's program 'dot' is not on the PATH")
def test_the_snippets_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snippets = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    assert len(snippets) > 5
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    names: dict[str, Any] = {}
    for snippet in snippets:
        exec(snippet, names)
        plt.close("all")
    assert names["structure"].layers
    assert {"graph.svg", "attention.svg", "graph.json", "run.fmr"} <= {path.name for path in tmp_path.iterdir()}

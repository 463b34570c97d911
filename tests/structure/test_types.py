"""What a type checker knows of a structure: a user's mistake is found before anything runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

RIGHT = """
import fmr
from torch import Tensor, nn

def heads(model: nn.Module, x: Tensor) -> list[Tensor]:
    run = fmr.run(model, x)
    structure = fmr.locate(run)
    block, memory = structure.attention[0], structure.mlps[0]
    names: list[str] = [block.q.id, memory.post.id, memory.w_in, *structure.residual.points]
    scale: float = block.head_dim**-0.5 / block.n_heads
    key, value = memory.memory(7)
    proven = block.certified is not None and block.check(run).ok
    outputs = [run[site] for site in (block.out, structure.layers[0].resid_mid) if site is not None]
    return [run[block.head(5).pattern], block.maps(run) * scale, key, value, *outputs][len(names) if proven else 0 :]
"""
WRONG = {
    "block.q.nonsense + 1": '"Site" has no attribute "nonsense"',
    "block.n_heads.id": '"int" has no attribute "id"',
    "run[block.out.id]": 'Item "None" of "Site',
    "memory.pre.nonsense": '"Site" has no attribute "nonsense"',
    "memory.w_gate.scope": 'Item "None" of "TensorId',
    "block.maps(run).nonsense": '"Tensor" has no attribute "nonsense"',
    "structure.residual.points[0].nonsense": '"TensorId" has no attribute "nonsense"',
    "reveal_type(block.pattern)": 'Revealed type is "fmr.ids.Site"',
    "reveal_type(block.kind)": 'Revealed type is "str"',
    "reveal_type(structure.layers[0].mlp)": "fmr.structure.memories.memory.Memory",
}


ROOT = Path(__file__).parents[2]


def checked(folder: Path, text: str) -> str:
    """What `mypy --strict` says of a program of a user."""
    file = folder / "program.py"
    file.write_text(text)
    options = [
        "--strict",
        "--no-error-summary",
        "--cache-dir",
        str(ROOT / ".pytest_cache" / "mypy"),
        "--config-file",
        os.devnull,
        str(file),
    ]
    options += ["--follow-imports", "silent", "--ignore-missing-imports"]
    path = {**os.environ, "MYPYPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-m", "mypy", *options], capture_output=True, text=True, env=path).stdout


@pytest.mark.long
def test_right_use_is_right_and_wrong_use_is_an_error_of_the_type_checker(tmp_path: Path) -> None:
    """The wrong lines go wrong where they stand, in one run of the checker."""
    lines = RIGHT.splitlines()
    body = lines.index("    key, value = memory.memory(7)")
    program = [*lines[:body], *(f"    {line}" for line in WRONG), *lines[body:]]
    told = checked(tmp_path, "\n".join(program))
    by_line = {int(line.split(":")[1]): line for line in told.splitlines()}
    assert sorted(by_line) == list(range(body + 1, body + 1 + len(WRONG))), told
    for number, words in enumerate(WRONG.values(), body + 1):
        assert words in by_line[number], told

"""The measure of `make census` on a few dozen architectures: what it counts today stays found."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

KINDS = ("attention", "sdpa", "heads", "kv heads", "head dim", "mlp", "keys", "hidden", "writes", "layers", "certified")
"""The truths that most of these types have."""


NARROWER = [("head dim", "lilt")]
"""A second attention is narrower than the first, and its module names the size of that alone."""


def test_what_architectures_say_of_themselves_is_found(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, "etc/census/measure.py", "--quick", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert list(missed(rows)) == NARROWER, done.stdout
    for kind in KINDS:
        assert sum(bool(row.get(kind, {}).get("true")) for row in rows) > 20, kind


def missed(rows: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    for row in rows:
        for kind, count in row.items():
            if isinstance(count, dict) and count.get("missing"):
                yield kind, row["type"]

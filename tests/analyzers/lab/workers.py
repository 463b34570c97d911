"""What processes of a test do in a lab. Run as a script, it makes one for each line that it reads: work, folder, number."""

import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import analyzers
import analyzers.lab.ledger as ledger
from analyzers.lab.errors import LabError
from tests.analyzers.lab.conftest import network


def write(lab: analyzers.Lab, number: int) -> None:
    """25 versions of its own, and five that others make, too."""

    @lab.experiment
    def step(model: nn.Module, worker: int, n: int) -> dict[str, Any]:
        return {"sum": model(torch.full((1, 4), float(n))).sum().item(), "t": torch.arange(n)}

    @lab.experiment
    def same(n: int) -> Tensor:
        return torch.arange(n + 1)

    for n in range(25):
        step(number, n)
        same(n % 5)


def sleep(lab: analyzers.Lab, number: int) -> None:
    """Three that finish, and one that does not."""

    @lab.experiment
    def step(n: int) -> Tensor:
        if n == 3:
            print("asleep", os.getpid(), flush=True)
            time.sleep(100)
        return torch.arange(n)

    for n in range(5):
        step(n)


def write_slowly(lab: analyzers.Lab, number: int) -> None:
    """One that is kept, and one that is long at writing its files."""
    whole = ledger.write_whole

    def slow(path: Any, data: bytes) -> None:
        whole(path, data)
        print("wrote", os.getpid(), flush=True)
        time.sleep(100)

    @lab.experiment
    def step(n: int) -> Tensor:
        return torch.arange(n)

    step(1)
    ledger.write_whole = slow
    step(2)


def fill(lab: analyzers.Lab, number: int) -> None:
    """A result that is larger than any file may be, between two that fit."""

    @lab.experiment
    def step(n: int) -> Tensor:
        return torch.zeros(n)

    step(10)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    try:
        step(1 << 20)
    except LabError as error:
        print(error, flush=True)
        print(len(error.result), flush=True)
    step(20)


def child(work: str, folder: str, number: int) -> None:
    """Do it and end, without the end of the process that this one was made of."""
    code = 1
    try:
        globals()[work](analyzers.Lab(network(), Path(folder)), number)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def main() -> None:
    """Read lines until there are no more."""
    torch.set_num_threads(1)
    print("ready", flush=True)
    pids = []
    for line in sys.stdin:
        work, folder, number = line.split()
        if work == "wait":
            _, status = os.waitpid(pids.pop(0), 0)
            print("ended", os.WTERMSIG(status) or os.WEXITSTATUS(status), flush=True)
        elif (pid := os.fork()) == 0:
            child(work, folder, int(number))
        else:
            pids.append(pid)


if __name__ == "__main__":
    main()

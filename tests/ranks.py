"""Work in several processes of one group, as torchrun starts them."""

import os
import subprocess
import sys
from pathlib import Path

HEAD = '''
import os
import sys
import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group: else its functions keep the group as a default, and its threads go on
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, folder = dist.get_rank(), sys.argv[1]


def say(*parts):
    """A line in one piece, which no other process writes into."""
    os.write(1, (" ".join(map(str, parts)) + "\\n").encode())


'''

TAIL = """
if dist.is_initialized():
    dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # a sharded model keeps its group, whose threads may abort a process that Python takes down
"""


def torchrun(script: str, folder: Path, processes: int = 2, fails: bool = False) -> str:
    """Run a script in so many processes; what they print."""
    path = folder / "script.py"
    path.write_text(HEAD + script + TAIL)
    root = str(Path(__file__).parents[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    env = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "TORCHELASTIC_ERROR_FILE": str(folder / "error.json")}
    done = subprocess.run([*command, str(path), str(folder)], capture_output=True, text=True, timeout=300, env=env)
    assert (done.returncode != 0) == fails, done.stderr[-4000:]
    return done.stdout + (done.stderr if fails else "")

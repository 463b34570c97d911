"""What the training scripts of the zoo share: seeds, the optimiser's loop, and writing a model with its card."""

import argparse
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

DATA = Path(__file__).parents[2] / "fmr" / "zoo" / "data"


@dataclass
class Task:
    """What a card says about a model, beyond what can be read off the model itself."""

    name: str
    knows: str
    script: str
    seed: int
    steps: int
    metrics: dict[str, float]
    world: str | None = None


def arguments(doc: str | None, name: str, steps: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DATA / name, help="the folder to write (default: the zoo's own)")
    parser.add_argument("--steps", type=int, default=steps, help=f"how long to train (default: {steps} steps)")
    return parser.parse_args()


def seeded(seed: int) -> None:
    """One thread and one seed: the same weights each time, on the same machine and torch."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)


def optimised(
    model: nn.Module, loss: Callable[[float], Tensor], *, steps: int, rate: float, decay: float = 0.0,
    look: Callable[[], dict[str, float]] | None = None, every: int = 0,
) -> None:  # fmt: skip
    """Minimise `loss(done)`, where done goes from 0 to 1, with AdamW, a short warm-up and a cosine to zero."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay, betas=(0.9, 0.98))
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.05, div_factor=20)
    model.train()
    with tqdm(total=steps, unit="step", mininterval=1) as bar:
        for step in range(steps):
            optimiser.zero_grad()
            value = loss(step / steps)
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            cycle.step()
            bar.update()
            bar.set_postfix(loss=f"{value.item():.4f}", refresh=False)
            if look and every and (step + 1) % every == 0:
                bar.write(f"{step + 1}: " + shown(model, look))
    model.eval()


def shown(model: nn.Module, look: Callable[[], dict[str, float]]) -> str:
    model.eval()
    text = ", ".join(f"{name} {value:.4f}" for name, value in look().items())
    model.train()
    return text


def _portable(path: Path) -> None:
    """Name the tokenizer's class as every release of transformers calls it."""
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")


def write(out: Path, model: nn.Module, tokenizer: Any, task: Task, config: dict[str, Any] | None = None) -> None:
    """Write the folder that `fmr.zoo.load` reads: weights (tied ones once), configuration, tokenizer, card."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().contiguous() for name, value in model.named_parameters()}
    weights |= {name: value for name, value in model.named_buffers() if name in model.state_dict()}
    data = save(weights, metadata={"format": "pt"})
    (out / "model.safetensors").write_bytes(data)
    if config is None:
        model.config.architectures = [type(model).__name__]  # type: ignore[union-attr]
        model.config.save_pretrained(out)  # type: ignore[union-attr, operator]
    else:
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
        _portable(out / "tokenizer_config.json")
    card = {
        **{name: value for name, value in asdict(task).items() if value is not None},
        "architecture": type(model).__name__,
        "parameters": sum(value.numel() for value in model.parameters()),
        "torch": torch.__version__,
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    tqdm.write(f"{out}: {len(data) / 1e6:.2f} MB, {task.metrics}")

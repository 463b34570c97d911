"""Effects as heat maps: layers up, positions with their tokens or heads across, 0 in white."""

import re
from typing import TYPE_CHECKING, cast

import numpy as np

from analyzers.protocol import AnalyzerError
from fmr.errors import number_of
from fmr.pictures.changes import numbered
from fmr.pictures.heatmap import readable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from analyzers.causal.effects import Effects

COLOURS = "RdBu_r"
"""White where nothing happens, red and blue for the two directions, which no kind of colour vision confuses."""

TITLES = {
    "resid_pre": "stream before the layer",
    "attention": "attention output",
    "mixer": "mixer output",
    "mlp": "memory output",
    "layer": "output of the layer",
    "z": "z of single heads",
    "sites": "sites",
}


def draw(result: "Effects", ax: "Axes | None", kind: str | None) -> "Figure":
    """The maps of a result, side by side."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    maps = result.maps
    if kind is not None and kind not in maps:
        raise AnalyzerError(f"kind={kind!r} was not patched. Expected one of {', '.join(maps)}.")
    chosen = [kind] if kind is not None else list(maps)[: 1 if ax is not None else None]
    if ax is not None:
        axes = [ax]
    else:
        tall = max(maps[one].shape[0] for one in chosen)
        widths = [max(maps[one].shape[1], 16 if one == "sites" else 6) for one in chosen]
        size = (min(0.9 * len(chosen) + 0.26 * sum(widths) + 1.2, 24.0), 1.6 + 0.17 * max(tall, 8))
        figure, made = plt.subplots(1, len(chosen), figsize=size, squeeze=False, width_ratios=widths, layout="constrained")
        axes = list(made[0])
        figure.suptitle(f"{result.method}, {number_of(len(result.base), 'pair')}", fontsize=10)
    limit = float(np.nanmax([np.nanmax(np.abs(maps[one])) for one in chosen])) or 1.0
    for one, here in zip(chosen, axes, strict=True):
        image = here.imshow(maps[one], cmap=COLOURS, vmin=-limit, vmax=limit, origin="lower", aspect="auto")
        here.set_title(TITLES.get(one, one), fontsize=9)
        here.set_ylabel("layer" if here is axes[0] and one != "sites" else "")
        here.set_xlabel("head" if one == "z" else "")
        here.yaxis.set_major_locator(MaxNLocator(integer=True))
        if one == "sites":
            _name_chosen(here, result)
        _label_positions(here, result.labels, maps[one].shape[1], one)
    bar = axes[-1].figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02)
    bar.set_label("share of the answer that goes over", fontsize=8)
    return cast("Figure", axes[0].figure)


def _name_chosen(ax: "Axes", result: "Effects") -> None:
    """Say what the rows and the columns of a map of sites are that a user chose."""
    named = [site for site, kind in zip(result.sites, result.kinds, strict=True) if kind == "sites"]
    known = numbered([re.sub(r"^Site\('(.*?)'.*", r"\1", site) for site in named])
    if known is None or set(known[0]) != set(result.layers[[kind == "sites" for kind in result.kinds]].tolist()):
        ax.set_xlabel("site, in the order given")
        ax.set_yticks([])
        return
    heads = all("heads=" in site for site in named) and len({re.sub(r".*heads=", "", site) for site in named}) > 1
    ax.set_title(f"rows: * of {known[1]}", fontsize=8)
    ax.set_xlabel("head" if heads else "position")


def _label_positions(ax: "Axes", labels: tuple[str, ...], columns: int, kind: str) -> None:
    from matplotlib.ticker import MaxNLocator

    if kind in ("z", "sites") or len(labels) != columns:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        return
    ax.set_xticks(range(columns), [readable(label) for label in labels], rotation=60, ha="right", fontsize=7)

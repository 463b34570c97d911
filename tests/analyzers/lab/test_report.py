"""The page of a lab: whole in one file, true to what is kept, and drawn by a browser without a server or a network."""

import base64
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from torch import nn

import analyzers
from fmr.errors import FmrError
from tests.analyzers.lab.conftest import network

matplotlib.use("Agg")

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Tags(HTMLParser):
    """Which tags are open, what pages refer to, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.pictures: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        given = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        assert tag not in ("script", "link", "iframe"), tag
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given["href"]] if "href" in given else []
        self.pictures += [given["src"]] if "src" in given else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def filled(folder: Path) -> analyzers.Lab:
    lab = analyzers.Lab(network(), folder)

    @lab.experiment
    def norms(model: nn.Module, n: int, scale: float = 1.0) -> dict[str, Any]:
        if n > 5:
            raise ValueError(f"n is {n} & <too> large")
        figure, ax = plt.subplots(figsize=(3, 2), facecolor="#00ff00")
        ax.set_axis_off()
        return {"loss": 0.12345 * n, "t": torch.arange(20.0) * scale, "figure": figure, "<b>": "<script>alert(1)</script>"}

    @lab.hypothesis(null=0, test="permutation")
    def gap(seed: int) -> dict[str, float]:
        return {"first": torch.randn(1).item(), "second": torch.randn(1).item() + 2}

    norms(1)
    norms(2, scale=3.0)
    with pytest.raises(ValueError, match="large"):
        norms(6)
    gap.over(seeds=range(8), progress=False)
    return lab


def test_the_page_holds_everything_and_refers_to_nothing_outside(tmp_path: Path) -> None:
    lab = filled(tmp_path / "lab")
    path = lab.report(tmp_path / "lab.html")
    tags = Tags()
    tags.feed(path.read_text())
    assert tags.open == []
    assert len(set(tags.ids)) == len(tags.ids)
    assert all(link.startswith("#") and link[1:] in tags.ids for link in tags.links)
    assert len(tags.links) > 10
    assert all(picture.startswith("data:image/png;base64,") for picture in tags.pictures)
    kept = {base64.b64decode(picture.partition(",")[2]) for picture in tags.pictures}
    assert lab.versions("norms")[0].result["figure"].png in kept
    text = re.sub(r"\s+", " ", " ".join(tags.text))
    assert "Lab of Sequential" in text
    assert "3 experiments, 11 versions, 12 attempts" in text
    assert "0.12345" in text
    assert "<script>alert(1)</script>" in text, "it is shown, not run"
    assert "ValueError: n is 6 & <too> large" in text
    assert "result loss: 0.12345 -> 0.2469, by 0.1235" in text
    assert "Outcome of gap beside 0: permutation, two-sided, 8 pairs, corrected by holm for 2" in text
    assert "def norms(model: nn.Module, n: int, scale: float = 1.0)" in text
    assert "tensor float32[20] from 0 to 57, mean 28.5" in text
    assert all(version.version in text for version in lab.versions())


def test_an_empty_lab_and_a_damaged_file_have_a_page_too(tmp_path: Path) -> None:
    lab = analyzers.Lab(network(), tmp_path / "lab")
    assert "No experiment has been run yet" in lab.report(tmp_path / "empty.html").read_text()

    @lab.experiment
    def f(n: int) -> Any:
        return torch.arange(n)

    @lab.experiment
    def never() -> None:
        raise ValueError("nothing to show")

    with pytest.raises(ValueError, match="nothing"):
        never()
    f(1)
    damaged = f.record(2)
    (damaged.folder / "result.safetensors").write_bytes(b"")
    text = analyzers.Lab(None, lab.folder).report(tmp_path / "lab.html").read_text()
    assert "result.safetensors is damaged: its checksum is not that of f" in text
    assert "tensor int64[1]" in text
    assert "ValueError: nothing to show" in text


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH, which draws the page")
def test_a_browser_draws_it_from_the_file_alone(tmp_path: Path) -> None:
    page = filled(tmp_path / "lab").report(tmp_path / "lab.html")
    shot = tmp_path / "page.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1200,2400"]
    browser = [str(CHROMIUM), *options, f"--user-data-dir={tmp_path / 'profile'}"]
    subprocess.run([*browser, f"--screenshot={shot}", page.as_uri()], check=True, timeout=120, capture_output=True)
    pixels = plt.imread(shot)[..., :3]
    assert pixels.shape == (2400, 1200, 3)
    green = (np.abs(pixels - [0, 1, 0]) < 0.05).all(-1)
    assert green.sum() > 10_000, "the figure of the last version, which is open, is seen"
    assert ((pixels.max(-1) < 0.3).sum(1) > 0).sum() > 200, "and rows of text"


def test_a_report_is_html_and_no_other_kind_of_file(lab: analyzers.Lab, tmp_path: Path) -> None:
    with pytest.raises(FmrError, match=r"lab.pdf' ends in '.pdf', but HTML is written: expected '.*lab.html'"):
        lab.report(tmp_path / "lab.pdf")
    assert not (tmp_path / "lab.pdf").exists()

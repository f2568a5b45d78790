"""Pages of dependency graphs in a real browser: how large, how soon drawn; and the screenshots of docs/.

    python benchmarks/view_pages.py

Needs chromium and chromedriver (Debian: chromium, chromium-driver) on the path, and selenium.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from latency import header
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import graphprune as gp
from graphprune.runtimes import Runtime

RESULTS = Path(__file__).parent / "results" / "view_pages.md"
DOCS = Path(__file__).resolve().parents[1] / "docs"
TRIES = 5
MODELS = ("resnet50", "mobilenet_v2", "bert", "llama", "lstm_net")


class Deep(nn.Module):
    """Two thousand operators in sixty blocks."""

    def __init__(self) -> None:
        super().__init__()
        blocks = (nn.Sequential(*(nn.Linear(8, 8) for _ in range(10))) for _ in range(60))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[batch, 8]` to the same shape."""
        for block in self.blocks:
            x = x + block(x).relu().sigmoid()
        return x


def browser(width: int = 1300, height: int = 850) -> Any:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for word in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--window-size={width},{height}",
    ):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    return webdriver.Chrome(options=options, service=service)


def drawn(driver: Any, path: Path) -> float:
    """Open a page; return the seconds until it was drawn."""
    driver.get(path.as_uri())
    while not driver.execute_script("return document.documentElement.dataset.ready"):
        time.sleep(0.01)
    took = "const t = performance.timing; return t.domContentLoadedEventEnd - t.navigationStart"
    return float(driver.execute_script(took)) / 1e3


def graphs() -> dict[str, Callable[[], gp.DependencyGraph]]:
    from tests.models import ALL

    def of(name: str) -> gp.DependencyGraph:
        example = ALL[name](small=False)
        return gp.analyze(example.model, example.inputs)

    found: dict[str, Callable[[], gp.DependencyGraph]] = {
        name: lambda name=name: of(name)  # type: ignore[misc]
        for name in MODELS
    }
    return found | {"two thousand operators": lambda: gp.analyze(Deep(), torch.zeros(2, 8))}


def screenshots(driver: Any, folder: Path) -> None:
    """Write what README and docs show: ResNet-50 at half its channels, a report, both shades."""
    from tests.models import ALL

    DOCS.mkdir(exist_ok=True)
    example = ALL["resnet50"](small=False)
    result = gp.slimmed(example.model, 0.5, example.inputs)
    result.graph.save(
        folder / "graph.html", title="ResNet-50", scores=result.scores, plan=result.plan
    )
    for shade, size in (("light", (1300, 850)), ("dark", (800, 1100))):
        driver.set_window_size(*size)
        driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": "prefers-color-scheme", "value": shade}]},
        )
        drawn(driver, folder / "graph.html")
        query = driver.find_element("css selector", "#query")
        query.send_keys("layer3.1.conv2.weight\n")
        driver.find_element("css selector", "#panel .chip").click()
        driver.save_screenshot(str(DOCS / f"graph_{shade}.png"))


def main() -> None:
    lines = [
        *header("Pages of dependency graphs", [Runtime()]),
        "Chromium, headless, one page after the other: seconds until drawn, the median and the longest of "
        f"{TRIES}; seconds to open all modules.",
        "",
        "| model | nodes | page, MB | drawn, s | longest, s | all opened, s | complaints |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    with tempfile.TemporaryDirectory() as name, browser() as driver:
        folder = Path(name)
        for model, graph_of in graphs().items():
            graph = graph_of()
            path = folder / "page.html"
            graph.save(path, title=model)
            times = [drawn(driver, path) for _ in range(TRIES)]
            start = time.perf_counter()
            driver.find_element("css selector", "#unfold").click()
            opened = time.perf_counter() - start
            complaints = len(driver.get_log("browser"))
            lines.append(
                f"| {model} | {len(graph.to_networkx()):,} | {path.stat().st_size / 1e6:.2f} | "
                f"{np.median(times):.2f} | {max(times):.2f} | {opened:.2f} | {complaints} |"
            )
            print(lines[-1], flush=True)
        screenshots(driver, folder)
    RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

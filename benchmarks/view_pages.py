"""Pages of dependency graphs in a real browser: how large, how soon drawn; and the screenshots of docs/.

    python benchmarks/view_pages.py

Needs chromium and chromedriver (Debian: chromium, chromium-driver) on the path, and selenium.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from latency import header

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import graphprune as gp
from graphprune.onnx_export.providers import Runtime
from tests import browsers
from tests.models import ALL

RESULTS = Path(__file__).parent / "results" / "view_pages.md"
DOCS = Path(__file__).resolve().parents[1] / "docs"
TRIES = 5
MODELS = ("resnet50", "mobilenet_v2", "bert", "llama", "lstm_net")


def graphs() -> dict[str, Callable[[], gp.DependencyGraph]]:
    def of(name: str) -> gp.DependencyGraph:
        example = ALL[name](small=False)
        return gp.analyze(example.model, example.inputs)

    found: dict[str, Callable[[], gp.DependencyGraph]] = {
        name: lambda name=name: of(name)  # type: ignore[misc]
        for name in MODELS
    }
    return found | {
        "two thousand operators": lambda: gp.analyze(browsers.Deep(), torch.zeros(2, 8))
    }


def screenshots(driver: Any, folder: Path) -> None:
    """Write what the README shows: ResNet-50 at half its channels, light and wide, dark and narrow."""
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
        browsers.drawn(driver, folder / "graph.html")
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
    with tempfile.TemporaryDirectory() as name, browsers.start() as driver:
        folder = Path(name)
        for model, graph_of in graphs().items():
            graph = graph_of()
            path = folder / "page.html"
            graph.save(path, title=model)
            times = [browsers.drawn(driver, path) for _ in range(TRIES)]
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

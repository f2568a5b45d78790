"""A real browser without a window, for pages, and a model whose page is large."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from torch import Tensor, nn

BROWSER, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
MISSING = "no chromium and chromedriver here (Debian: chromium, chromium-driver)"


def start(width: int = 1300, height: int = 850) -> Any:
    """Return a driver of selenium."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    size = f"--window-size={width},{height}"
    for word in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        size,
    ):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(
        options=options, service=webdriver.ChromeService(executable_path=DRIVER)
    )


def wait(driver: Any) -> None:
    """Wait until the page is drawn."""
    begun = time.perf_counter()
    while not driver.execute_script("return document.documentElement.dataset.ready"):
        assert time.perf_counter() - begun < 20


def drawn(driver: Any, page: Path) -> float:
    """Open a page of a graph; return the seconds until it was drawn."""
    driver.get(page.as_uri())
    wait(driver)
    took = "const t = performance.timing; return t.domContentLoadedEventEnd - t.navigationStart"
    return float(driver.execute_script(took)) / 1e3


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

"""Every example in the documentation runs: in the pages, in the README and in docstrings."""

from __future__ import annotations

import copy
import doctest
import importlib
import pkgutil
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser
from torch import nn

import graphprune as gp

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
MODULES = [
    module.name
    for module in pkgutil.walk_packages(gp.__path__, "graphprune.")
    if ">>> " in Path(importlib.import_module(module.name).__file__ or "").read_text()
]


def small_network() -> nn.Sequential:
    """Return a network whose modules are called as those of a ResNet, which the pages cut."""
    widths = {"conv1": (3, 16), "layer1": (16, 16), "layer2": (16, 32), "layer4": (32, 32)}
    network = nn.Sequential()
    for name, (inputs, outputs) in widths.items():
        layer = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
        network.add_module(
            name,
            layer if name == "conv1" else nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU()),
        )
    network.add_module("pool", nn.AdaptiveAvgPool2d(1))
    network.add_module("flatten", nn.Flatten())
    network.add_module("fc", nn.Linear(32, 10))
    return network.eval()


def names() -> dict[str, Any]:
    """Return what the pages say that their examples have."""
    torch.manual_seed(0)
    model = small_network()
    images = torch.randn(2, 3, 32, 32)
    batches = [torch.randn(8, 3, 32, 32) for _ in range(2)]
    return {
        "F": F,
        "batches": batches,
        "copy": copy,
        "dataclass": dataclass,
        "gp": gp,
        "images": images,
        "labelled": [(batch, torch.randint(10, (8,))) for batch in batches],
        "model": model,
        "recurrent": nn.LSTM(64, 64, batch_first=True).eval(),
        "sequences": torch.randn(1, 5, 64),
        "torch": torch,
        "train": lambda model: None,
    }


@pytest.mark.filterwarnings("ignore::graphprune.GraphPruneWarning")
@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_examples_of_a_page_run(page: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    parsers = [PythonCodeBlockParser()]
    document = Sybil(parsers).parse(ROOT / page)
    document.namespace.update(names())
    for example in document.examples():
        example.evaluate()


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_a_docstring_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted
    assert not result.failed


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *PAGES])
def test_links_of_a_page_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / target).exists(), target


def test_the_readme_is_a_door_not_a_house() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 6_000

"""The dependency graph as people look at it: data, pictures, and a page driven in a real browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import networkx as nx
import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.demo.data import load_trained_network
from graphprune.inspection import build_document
from graphprune.inspection.dependency_graph import DependencyGraph
from graphprune.inspection.drawing import build_module_graph
from tests import browsers
from tests.models import ALL

EVIL = "<script>window['broken']=1<"


def graph_of(name: str) -> DependencyGraph:
    example = ALL[name](small=True)
    return gp.analyze(example.model, example.inputs)


@pytest.fixture(scope="module")
def resnet() -> DependencyGraph:
    return gp.analyze(load_trained_network(), torch.zeros(2, 1, 28, 28))


class Evil(nn.Module):
    """A module whose name is a piece of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module(EVIL, nn.Linear(4, 6))
        self.last = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        first: nn.Module = getattr(self, EVIL)
        return self.last(first(x).relu())


# ------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("name", ["resnet50", "bert", "llama", "lstm_net"])
def test_files_hold_the_graph_that_networkx_is_given(name: str, tmp_path: Path) -> None:
    graph = graph_of(name)
    wanted = graph.to_networkx()
    graph.save(tmp_path / "graph.json")
    graph.save(tmp_path / "graph.graphml")
    found = json.loads((tmp_path / "graph.json").read_text())
    assert found["schema"] == "graphprune/graph/1"
    assert nx.utils.graphs_equal(wanted, nx.node_link_graph(found, edges="edges"))
    read = nx.read_graphml(tmp_path / "graph.graphml", force_multigraph=True, edge_key_type=int)
    assert dict(read.nodes(data=True)) == dict(wanted.nodes(data=True))
    edges = (sorted(each.edges(keys=True, data=True), key=str) for each in (read, wanted))
    assert next(edges) == next(edges)


def total(sizes: list[Any], kept: dict[str, int], whole: dict[str, int]) -> int:
    """The product of sizes, as the document describes them."""

    def of(size: Any) -> int:
        if isinstance(size, int):
            return size
        if isinstance(size, str):
            return kept.get(size, whole[size])
        ((how, parts),) = size.items()
        values = [of(part) for part in parts]
        return sum(values) if how == "plus" else int(torch.tensor(values).prod())

    found = 1
    for size in sizes:
        found *= of(size)
    return found


@pytest.mark.filterwarnings("ignore:the config of the slim")
@pytest.mark.parametrize("name", ["resnet50", "bert", "llama", "lstm_net"])
def test_the_document_counts_as_the_library_does(name: str) -> None:
    example = ALL[name](small=True)
    found = build_document(gp.analyze(example.model, example.inputs))
    result = gp.slimmed(example.model, 0.4, example.inputs)
    whole = {group["name"]: group["size"] for group in found["groups"]}
    cut = {name: len(kept) for name, kept in result.plan.keep.items()}
    for kept, model in (({}, example.model), (cut, result.model)):
        tensors = (tensor for tensor in found["tensors"] if tensor["trainable"])
        parameters = sum(total(tensor["dims"], kept, whole) for tensor in tensors)
        assert parameters == gp.count_parameters(model)
        products = (product for products in found["macs"].values() for product in products)
        macs = sum(total(product, kept, whole) for product in products)
        assert macs == gp.count_macs(model, example.inputs)
    for group in found["groups"]:
        if group["name"] in cut:
            assert cut[group["name"]] in group["options"]


def test_what_is_fixed_says_why_and_scores_and_plans_go_along(resnet: DependencyGraph) -> None:
    group = resnet.groups[0]
    plan = gp.Plan({group.name: [0, 2]}, {group.name: group.size})
    found = build_document(resnet, "net", {group.name: torch.arange(group.size).numpy()}, plan)
    assert found["title"] == "net"
    assert found["groups"][0]["kept"] == [0, 2]
    assert found["groups"][0]["scores"] == list(range(group.size))
    assert "kept" not in found["groups"][1]
    last = next(tensor for tensor in found["tensors"] if tensor["name"] == "classifier.weight")
    assert "a dimension of the model's output" in last["fixed"]["0"]
    assert json.loads(json.dumps(found)) == found


def test_what_is_written_in_place_flows_on() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 2))
    graph = gp.analyze(model, torch.zeros(2, 4)).to_networkx()
    (relu,) = (node for node, data in graph.nodes(data=True) if "relu" in data["label"])
    assert list(graph.successors(relu))
    assert nx.is_directed_acyclic_graph(graph)


# --------------------------------------------------------------------------------------- pictures


def test_pictures_show_modules_and_groups(resnet: DependencyGraph, tmp_path: Path) -> None:
    resnet.save(tmp_path / "net.svg", title="a small $ResNet$")
    resnet.save(tmp_path / "net.png")
    assert (tmp_path / "net.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "net.svg").read_text()
    assert "<svg" in text
    drawn = build_module_graph(resnet)
    assert 5 < len(drawn) <= 60
    assert {data["label"] for _, data in drawn.nodes(data=True)} >= {"stem", "classifier"}
    shown = {name for _, data in drawn.nodes(data=True) for name in data["groups"]}
    assert shown == {group.name for group in resnet.groups}


def test_modules_are_opened_while_they_fit(resnet: DependencyGraph) -> None:
    few, more, all_of_them = (build_module_graph(resnet, most) for most in (1, 15, 1000))
    assert len(few) == len(more) < len(all_of_them)
    assert "module stage2" in more
    assert "module stage2.conv1" in all_of_them
    assert nx.is_directed_acyclic_graph(all_of_them)


# ------------------------------------------------------------------------------------- the report


def test_a_report_says_what_was_asked_done_and_seen(tmp_path: Path) -> None:
    model, x = load_trained_network(), torch.zeros(2, 1, 28, 28)
    result = gp.slimmed(model, 0.5, x)
    result.report(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "ratio=0.5" in unescape(text)
    assert "with the removed channels silenced" in text
    for each in (model, result.model):
        assert f"<td>{gp.count_parameters(each):,}</td>" in text
        assert f"<td>{gp.count_macs(each, x):,}</td>" in text
    for group in result.graph.groups:
        assert group.name in text
    assert "[64, 32, 3, 3] to [32, 16, 3, 3]" in text
    assert "Measured" not in text
    with pytest.raises(gp.InvalidRequestError, match=r"must end in \.html"):
        result.report(tmp_path / "report.pdf")


def test_a_report_holds_a_comparison(browser: Any, tmp_path: Path) -> None:
    model, x = load_trained_network(), torch.zeros(2, 1, 28, 28)
    result = gp.slimmed(model, 0.5, x)
    comparison = gp.compare(model, result.model, x, seconds=0.05)
    result.report(tmp_path / "report.html", title=EVIL, comparison=comparison)
    assert EVIL not in (tmp_path / "report.html").read_text()
    browser.get((tmp_path / "report.html").as_uri())
    assert "Where the time goes" in browser.find_element("css selector", "body").text
    browser.switch_to.frame(shown(browser, "iframe")[0])
    browsers.wait(browser)
    labels = {box.get_attribute("aria-label"): box for box in shown(browser, ".box.module")}
    module = next(box for label, box in labels.items() if label.startswith("stage2,"))
    browser.execute_script("arguments[0].dispatchEvent(new MouseEvent('click'))", module)
    assert "measured" in shown(browser, "#panel")[0].text
    browser.switch_to.default_content()
    assert complaints(browser) == []


# -------------------------------------------------------------------------------------- the page


def test_the_page_needs_nothing_else_and_is_small(resnet: DependencyGraph, tmp_path: Path) -> None:
    resnet.save(tmp_path / "net.html")
    text = (tmp_path / "net.html").read_text()
    assert len(text) < 5e6
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", text)
    assert "Copyright" in text  # dagre's licence goes along


def test_names_are_escaped(tmp_path: Path) -> None:
    graph = gp.analyze(Evil(), torch.zeros(2, 4))
    graph.save(tmp_path / "evil.html", title=EVIL)
    text = (tmp_path / "evil.html").read_text()
    assert EVIL not in text
    assert text.count("<script") == 3
    frame = graph._repr_html_()
    assert frame.startswith("<iframe srcdoc=")
    assert frame.count("<") == 2


class Tags(HTMLParser):
    """Collects the elements of a page, and the texts of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = (tag, attrs) == ("script", [])
        self.scripts += [""] * self.inside

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.scripts[-1] += data


HOSTILE = [
    EVIL, "\"><img src=x onerror=alert(1)>", "</script><script>alert(1)</script>", "a\0b", "a\rb", "\udc80",
    "{{7*7}}", "]]>", "</iframe>", "javascript:alert(1)", "\u2028", "&lt;b&gt;",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_are_text_and_only_known_scripts_may_run(name: str, tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module(name, nn.Linear(4, 6))
    model.add_module("last", nn.Linear(6, 2))
    result = gp.slimmed(model, 0.5, torch.zeros(2, 4))
    for file in ("graph.html", "graph.svg", "graph.graphml", "graph.json"):
        result.graph.save(tmp_path / file, title=name)
    result.report(tmp_path / "report.html", title=name)
    page = Tags((tmp_path / "graph.html").read_text("utf-8"))
    report = Tags((tmp_path / "report.html").read_text("utf-8"))
    (frame,) = (attributes for tag, attributes in report.tags if tag == "iframe")
    assert frame["sandbox"] == "allow-scripts"
    assert Tags(frame["srcdoc"] or "").scripts == page.scripts
    for found in (page, report):
        assert not {tag for tag, _ in found.tags} & {"img", "object", "embed", "base", "form"}
        assert not [a for _, attributes in found.tags for a in attributes if a.startswith("on")]
        (policy,) = (a["content"] for _, a in found.tags if "http-equiv" in a)
        digests = (hashlib.sha256(script.encode()).digest() for script in page.scripts)
        allowed = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
        assert f"default-src 'none'; script-src {allowed};" in (policy or "")
    assert ElementTree.parse(tmp_path / "graph.svg")
    assert nx.read_graphml(tmp_path / "graph.graphml", force_multigraph=True).nodes
    assert json.loads((tmp_path / "graph.json").read_text())["title"] == name


def test_pages_with_hostile_names_become_ready(browser: Any, tmp_path: Path) -> None:
    model = nn.Sequential()
    for name in HOSTILE:
        model.add_module(name, nn.Linear(6, 6))
    model.add_module("last", nn.Linear(6, 2))
    result = gp.slimmed(model, 0.5, torch.zeros(2, 6))
    opened(browser, result.graph, tmp_path, title="".join(HOSTILE))
    assert browser.execute_script("return window.broken") is None
    assert len(shown(browser, "#panel .chip")) == len(result.graph.groups)
    assert complaints(browser) == []


def test_a_file_of_another_kind_is_refused(resnet: DependencyGraph, tmp_path: Path) -> None:
    with pytest.raises(gp.InvalidRequestError, match=r"must end in \.html, \.json, \.graphml"):
        resnet.save(tmp_path / "net.docx")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not (browsers.BROWSER and browsers.DRIVER):
        pytest.skip(browsers.MISSING)
    with browsers.start() as driver:
        yield driver


def opened(browser: Any, graph: DependencyGraph, folder: Path, **options: Any) -> float:
    """Open the page of a graph; return the seconds until it was drawn."""
    graph.save(folder / "page.html", **options)
    return browsers.drawn(browser, folder / "page.html")


def shown(browser: Any, css: str) -> list[Any]:
    found: list[Any] = browser.find_elements("css selector", css)
    return found


def boxes(browser: Any) -> int:
    return len(shown(browser, ".box"))


def complaints(browser: Any) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser")]


@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2", "bert", "llama", "lstm_net"])
def test_pages_open_without_complaint(browser: Any, name: str, tmp_path: Path) -> None:
    graph = graph_of(name)
    assert opened(browser, graph, tmp_path) < 10  # how fast is for the benchmarks
    before = boxes(browser)
    assert 2 <= before <= 80
    shown(browser, "#unfold")[0].click()
    all_of_them = boxes(browser)
    assert all_of_them >= before
    shown(browser, "#fold")[0].click()
    assert 2 <= boxes(browser) < all_of_them
    assert len(shown(browser, "#panel .chip")) == len(graph.groups)
    assert complaints(browser) == []


def test_searching_choosing_folding_and_sliding(
    browser: Any, resnet: DependencyGraph, tmp_path: Path
) -> None:
    from selenium.webdriver.common.keys import Keys

    opened(browser, resnet, tmp_path)
    shown(browser, "#fold")[0].click()
    browser.find_element("css selector", "body").send_keys("/")
    query = browser.switch_to.active_element
    assert query.get_attribute("id") == "query"
    query.send_keys("stage2.shortcut")
    assert shown(browser, "#found button")
    query.clear()
    name = next(g.name for g in resnet.groups).rpartition(":")[0]
    query.send_keys(name, Keys.ENTER)
    panel = shown(browser, "#panel")[0]
    assert name in panel.text
    (chosen,) = shown(browser, ".box.chosen")
    assert "convolution" in chosen.text

    shown(browser, "#panel .chip")[0].click()
    assert f"{resnet.groups[0].size} channels, exact" in panel.text
    for member in resnet.groups[0].members:
        assert member.parameter in panel.text
    assert shown(browser, ".box.marked")

    totals = shown(browser, "#totals")[0].text
    assert "→" not in totals
    slide = "const r = document.getElementById('ratio'); r.value = 50; r.dispatchEvent(new Event('input'))"
    browser.execute_script(slide)
    slim = gp.slim(load_trained_network(), 0.5, torch.zeros(2, 1, 28, 28))
    parameters = f"{gp.count_parameters(slim) / 1e3:.3g} k parameters"
    assert parameters in shown(browser, "#totals")[0].text
    assert complaints(browser) == []


def test_the_keyboard_is_enough(browser: Any, resnet: DependencyGraph, tmp_path: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    opened(browser, resnet, tmp_path)
    shown(browser, "#fold")[0].click()
    module = next(
        box for box in shown(browser, ".box.module") if box.get_attribute("aria-expanded")
    )
    before = boxes(browser)
    browser.execute_script("arguments[0].focus()", module)
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert boxes(browser) > before
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    assert shown(browser, ".box.chosen")
    browser.switch_to.active_element.send_keys(Keys.ARROW_LEFT)
    assert boxes(browser) == before
    world = shown(browser, "#world")[0]
    placed = world.get_attribute("transform")
    browser.execute_script("document.getElementById('stage').focus()")
    browser.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    assert world.get_attribute("transform") != placed


def test_a_plan_shows_what_is_kept_and_what_goes(
    browser: Any, resnet: DependencyGraph, tmp_path: Path
) -> None:
    result = gp.slimmed(load_trained_network(), 0.5, torch.zeros(2, 1, 28, 28))
    opened(browser, resnet, tmp_path, plan=result.plan, scores=result.scores)
    assert f"{gp.count_parameters(result.model) / 1e3:.3g} k" in shown(browser, "#totals")[0].text
    shown(browser, "#panel .chip")[0].click()
    group = resnet.groups[0]
    kept = len(result.plan.keep[group.name])
    assert len(shown(browser, ".strip .kept")) == kept
    assert len(shown(browser, ".strip .gone")) == group.size - kept
    assert shown(browser, ".bars rect")
    shown(browser, "#planned")[0].click()
    assert "→" not in shown(browser, "#totals")[0].text
    assert complaints(browser) == []


def test_evil_names_do_nothing(browser: Any, tmp_path: Path) -> None:
    opened(browser, gp.analyze(Evil(), torch.zeros(2, 4)), tmp_path, title=EVIL)
    assert browser.execute_script("return window.broken") is None
    assert browser.find_element("css selector", "h1").text == EVIL
    assert any(EVIL[:20] in box.text for box in shown(browser, ".box"))


def test_two_thousand_operators_stay_usable(browser: Any, tmp_path: Path) -> None:
    graph = gp.analyze(browsers.Deep(), torch.zeros(2, 8))
    assert len(graph.to_networkx()) >= 1_900
    opened(browser, graph, tmp_path)
    assert boxes(browser) < 300
    shown(browser, "#unfold")[0].click()
    assert boxes(browser) > 700
    assert complaints(browser) == []

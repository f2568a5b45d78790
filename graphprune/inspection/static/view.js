"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const PALETTE = ["#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7"];
const LIGHT_INK = new Set(["#0072b2", "#d55e00", "#009e73"]);
const FIRST_BOXES = 60;
const CHARACTER = 6.6, LINE = 15, PAD = 10, DOT = 8, DOTS = 6, LETTERS = 34;

const byId = id => document.getElementById(id);
const groups = new Map(data.groups.map((group, number) => [group.name, { ...group, number }]));
const tensors = new Map(data.tensors.map(tensor => [tensor.name, tensor]));

// ------------------------------------------------------------------------------- what it costs

function sizeOf(size, kept) {
  if (typeof size === "number") return size;
  if (typeof size === "string") return kept.get(size) ?? groups.get(size).size;
  const parts = (size.times ?? size.plus).map(part => sizeOf(part, kept));
  return size.times ? parts.reduce((a, b) => a * b, 1) : parts.reduce((a, b) => a + b, 0);
}
const product = (sizes, kept) => sizes.reduce((total, size) => total * sizeOf(size, kept), 1);

const isPlanned = data.groups.some(group => group.kept);
function keptNow() {
  const kept = new Map();
  if (byId("planned")?.checked) {
    for (const group of groups.values()) if (group.kept) kept.set(group.name, group.kept.length);
    return kept;
  }
  const ratio = byId("ratio").value / 100;
  for (const group of groups.values()) {
    if (group.inner || !group.exact || group.size < 2) continue;
    const wanted = group.size * (1 - ratio);
    kept.set(group.name, group.options.reduce((best, option) =>
      Math.abs(option - wanted) <= Math.abs(best - wanted) ? option : best));
  }
  return kept;
}

function costOf(leaves, owned, kept) {
  let macs = 0, parameters = 0;
  for (const leaf of leaves) for (const sizes of data.macs[leaf.id] ?? []) macs += product(sizes, kept);
  for (const name of owned) if (tensors.get(name).trainable) parameters += product(tensors.get(name).dims, kept);
  return { macs, parameters };
}

function short(number) {
  for (const [unit, name] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]])
    if (number >= unit) return `${(number / unit).toPrecision(3)} ${name}`;
  return String(number);
}
const change = (before, after) => before === after ? short(before) : `${short(before)} → ${short(after)}`;

// ------------------------------------------------------------------------- modules and operators

const root = { id: "", label: "", children: [], parent: null, open: true, kind: "module" };
const leaves = new Map(), modules = [], calls = new Map();
let stack = [root];  // the calls of modules that the last operator is inside of

// each call of a module is a box of its own, so that nothing flows upwards
function callOf(path) {
  const names = path ? path.split(".") : [];
  let at = 0;
  while (at < names.length && stack[at + 1]?.name === names[at]) at++;
  stack.length = at + 1;
  for (; at < names.length; at++) {
    const parent = stack[at], name = names[at], whole = names.slice(0, at + 1).join(".");
    const number = (calls.get(whole) ?? 0) + 1;
    calls.set(whole, number);
    const again = number > 1 ? ` (${number})` : "";
    const made = { id: `module ${whole}${again}`, path: whole + again, name, label: name + again, children: [],
      parent, open: false, kind: "module" };
    parent.children.push(made);
    modules.push(made);
    stack.push(made);
  }
  return stack.at(-1);
}
const listed = text => text ? text.split(", ") : [];

const connected = new Set(data.edges.flatMap(edge => [edge.source, edge.target]));
for (const node of data.nodes) {
  if (["parameter", "buffer", "constant"].includes(node.kind) || !connected.has(node.id)) continue;
  const parent = node.kind === "operator" ? callOf(node.module) : root;
  const leaf = { ...node, label: node.label.replace(/^aten\./, ""), children: [], parent, reads: [] };
  parent.children.push(leaf);
  leaves.set(node.id, leaf);
}
const flows = [];
for (const edge of data.edges) {
  const target = leaves.get(edge.target), source = leaves.get(edge.source);
  if (!target) continue;
  if (source) flows.push({ source, target, layout: edge.layout, groups: listed(edge.groups) });
  else if (tensors.has(edge.source)) target.reads.push(edge.source);
}

function finish(box) {
  box.leaves = box.kind === "module" ? [] : [box];
  box.reads = new Set(box.reads ?? []);
  box.marks = new Set(listed(box.groups));
  for (const child of box.children) {
    finish(child);
    box.leaves.push(...child.leaves);
    for (const name of child.reads) box.reads.add(name);
    for (const name of child.marks) box.marks.add(name);
  }
  for (const name of box.reads) for (const dim of tensors.get(name).dims) noteGroups(dim, box.marks);
}
function noteGroups(size, into) {
  if (typeof size === "string") into.add(size);
  else if (typeof size === "object") for (const part of size.times ?? size.plus) noteGroups(part, into);
}
// many operators of a module's own, one after the other, are a box that opens
const LONG_RUN = 5;
function fold(box) {
  const runs = [];
  for (const child of box.children) {
    fold(child);
    if (child.kind === "operator" && runs.at(-1)?.[0].kind === "operator") runs.at(-1).push(child);
    else runs.push([child]);
  }
  if (runs.length < 2) return;
  box.children = runs.flatMap(run => run.length < LONG_RUN ? run : [together(box, run)]);
}
function together(parent, run) {
  const label = `${run.length} operators`;
  const made = { id: `from ${run[0].id}`, path: label, label, children: run, parent, open: false, kind: "module" };
  for (const child of run) child.parent = made;
  return made;
}
fold(root);

// a module of one child is that child, under both names
const standsFor = new Map();
function merge(box) {
  box.children = box.children.map(child => {
    while (child.kind === "module" && child.children.length === 1) {
      const only = child.children[0];
      only.label = `${child.label}${only.kind === "module" ? "." : " · "}${only.label}`;
      only.parent = box;
      standsFor.set(child, only);
      child = only;
    }
    return child;
  });
  box.children.forEach(merge);
}
merge(root);
finish(root);

const pathTo = box => box.parent ? [...pathTo(box.parent), box] : [box];
for (const flow of flows) {
  const one = pathTo(flow.source), other = pathTo(flow.target);
  let at = 0;
  while (one[at + 1] && one[at + 1] === other[at + 1]) at++;
  if (!one[at + 1] || !other[at + 1]) continue;
  const inside = (one[at].flows ??= new Map()), key = `${one[at + 1].id}\n${other[at + 1].id}`;
  if (!inside.has(key)) inside.set(key, { source: one[at + 1], target: other[at + 1], flows: [] });
  inside.get(key).flows.push(flow);
}

function openFirst() {
  const queue = [root];
  let count = root.children.length;
  for (let box; (box = queue.shift());) {
    for (const child of box.children) {
      if (child.kind !== "module" || !child.marks.size || count + child.children.length > FIRST_BOXES) continue;
      child.open = true;
      count += child.children.length;
      queue.push(child);
    }
  }
}
openFirst();

// --------------------------------------------------------------------------------------- layout

const clipped = text => text.length > LETTERS ? `${text.slice(0, LETTERS - 1)}…` : text;

function place(box, kept) {
  const cost = costOf(box.leaves, box.reads, kept), before = costOf(box.leaves, box.reads, new Map());
  box.lines = [clipped(box.label)];
  if (before.parameters) box.lines.push(`${change(before.parameters, cost.parameters)} parameters`);
  if (before.macs) box.lines.push(`${change(before.macs, cost.macs)} MACs`);
  box.dots = [...box.marks].slice(0, DOTS);
  const title = Math.max(...box.lines.map((line, at) => line.length * CHARACTER * (at ? 0.85 : 1)));
  const dots = (box.dots.length + (box.marks.size > DOTS ? 1 : 0)) * (2 * DOT + 4);
  box.width = Math.max(title, dots, 60) + 2 * PAD;
  box.head = box.lines.length * LINE + (box.dots.length ? 2 * DOT + 4 : 0) + PAD;
  box.height = box.head + PAD / 2;
  if (!box.open) return;
  const graph = new dagre.graphlib.Graph().setGraph({ ranksep: 32, nodesep: 18, marginx: PAD, marginy: PAD });
  for (const child of box.children) {
    place(child, kept);
    graph.setNode(child.id, { width: child.width, height: child.height });
  }
  for (const flow of box.flows?.values() ?? []) graph.setEdge(flow.source.id, flow.target.id, {});
  dagre.layout(graph);
  const { width, height } = graph.graph();
  const left = Math.max(0, (box.width - width) / 2), top = box === root ? 0 : box.head;
  for (const child of box.children) {
    const at = graph.node(child.id);
    child.x = left + at.x - child.width / 2;
    child.y = top + at.y - child.height / 2;
  }
  for (const flow of box.flows?.values() ?? [])
    flow.points = graph.edge(flow.source.id, flow.target.id).points.map(p => [left + p.x, top + p.y]);
  box.width = Math.max(box.width, width);
  box.height = top + height;
}

// --------------------------------------------------------------------------------------- drawing

function make(kind, attributes = {}, parent = null, text = null) {
  const element = document.createElementNS(SVG, kind);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== null) element.textContent = text;
  parent?.append(element);
  return element;
}
let chosen = null, marked = null;
const drawn = new Map();

function draw(box, parent) {
  for (const flow of box.flows?.values() ?? []) {
    const path = flow.points.map(([x, y], at) => `${at ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
    const name = `from ${flow.source.label} to ${flow.target.label}`;
    const wide = make("path", { class: "wide", d: path, tabindex: 0, role: "button", "aria-label": name }, parent);
    make("path", { class: "edge", d: path, "marker-end": "url(#tip)" }, parent);
    onPress(wide, () => showFlow(flow));
  }
  for (const child of box.children) {
    const kinds = `box ${child.kind} ${child.open ? "open" : ""}`;
    const group = make("g", { class: kinds, transform: `translate(${child.x.toFixed(1)} ${child.y.toFixed(1)})`,
      tabindex: 0, role: "button", "aria-label": child.lines.join(", ") }, parent);
    if (child.kind === "module") group.setAttribute("aria-expanded", child.open);
    drawn.set(child, group);
    make("rect", { width: child.width, height: child.height }, group);
    const sign = child.kind === "module" ? (child.open ? "▾ " : "▸ ") : "";
    child.lines.forEach((line, at) => make("text", { x: PAD, y: LINE * (at + 1),
      ...(at ? { class: "faint" } : {}) }, group, at ? line : sign + line));
    const y = child.lines.length * LINE + DOT + 6;
    child.dots.forEach((name, at) => {
      const dot = make("g", { class: "dot" }, group), x = PAD + DOT + at * (2 * DOT + 4);
      make("circle", { cx: x, cy: y, r: DOT, fill: colour(name) }, dot);
      make("text", { x, y: y + 3, style: `fill: ${ink(name)}` }, dot, groups.get(name).number);
      make("title", {}, dot, name);
    });
    if (child.marks.size > DOTS)
      make("text", { class: "faint", x: PAD + DOTS * (2 * DOT + 4), y: y + 3 }, group, `+${child.marks.size - DOTS}`);
    onPress(group, () => choose(child));
    group.addEventListener("dblclick", event => { event.stopPropagation(); toggle(child); });
    group.addEventListener("keydown", event => {
      if (event.target !== group || !["o", "ArrowRight", "ArrowLeft"].includes(event.key)) return;
      if (event.key === "o" || (event.key === "ArrowRight") !== child.open) toggle(child);
      event.stopPropagation();
    });
    if (child.open) draw(child, group);
  }
}
const colour = name => PALETTE[groups.get(name).number % PALETTE.length];
const ink = name => LIGHT_INK.has(colour(name)) ? "#fff" : "#000";

function onPress(element, action) {
  element.addEventListener("click", event => { event.stopPropagation(); if (!dragged) action(); });
  element.addEventListener("keydown", event => {
    if (event.target !== element || (event.key !== "Enter" && event.key !== " ")) return;
    event.preventDefault();
    event.stopPropagation();
    action();
  });
}

function render() {
  const kept = keptNow();
  place(root, kept);
  drawn.clear();
  byId("world").replaceChildren();
  draw(root, byId("world"));
  highlight();
  const before = costOf(root.leaves, tensors.keys(), new Map()), after = costOf(root.leaves, tensors.keys(), kept);
  byId("asked").textContent = byId("planned")?.checked ? "" : `${byId("ratio").value} %`;
  byId("totals").textContent =
    `${change(before.parameters, after.parameters)} parameters, ${change(before.macs, after.macs)} MACs`;
}
function highlight() {
  for (const [box, element] of drawn) {
    element.classList.toggle("chosen", box === chosen);
    element.classList.toggle("marked", marked !== null && box.marks.has(marked));
  }
  for (const chip of document.querySelectorAll(".chip"))
    chip.setAttribute("aria-pressed", chip.dataset.group === marked);
}
function toggle(box) {
  if (box.kind !== "module") return;
  box.open = !box.open;
  render();
  drawn.get(box).focus();
}
function reveal(box) {
  for (const above of pathTo(box).slice(1, -1)) above.open = true;
  render();
  centre(box);
  choose(box);
}

// --------------------------------------------------------------------------------------- the panel

function html(kind, attributes = {}, ...content) {
  const element = document.createElement(kind);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...content);
  return element;
}
const overview = [...byId("panel").children];
function show(...content) {
  const back = html("button", { type: "button" }, "all groups");
  back.addEventListener("click", () => { chosen = marked = null; byId("panel").replaceChildren(...overview); highlight(); });
  byId("panel").replaceChildren(back, ...content.filter(Boolean));
  highlight();
}
function chip(name) {
  const style = `background: ${colour(name)}; color: ${ink(name)}`;
  const made = html("button", { type: "button", class: "chip", "data-group": name, style, title: name },
    String(groups.get(name).number));
  made.addEventListener("click", () => showGroup(name));
  return made;
}
const section = (title, ...content) => [html("h3", {}, title), ...content];
const list = lines => html("ul", {}, ...lines.map(line => html("li", {}, ...[line].flat())));

function secondsOf(box) {
  const itsOwn = box.module !== box.parent?.path;  // an operator that stands for its module
  const path = box.kind === "module" ? box.path : itsOwn ? box.module : "";
  const found = path ? Object.entries(data.seconds).filter(([name]) => name === path || name.startsWith(`${path}.`)) : [];
  return found.length ? found.reduce((total, [, pair]) => [total[0] + pair[0], total[1] + pair[1]], [0, 0]) : null;
}
function costTable(before, after, seconds = null) {
  const row = (name, one, other) => html("tr", {}, html("th", {}, name), html("td", { class: "number" }, short(one)),
    html("td", { class: "number" }, short(other)), html("td", { class: "number" }, one ? `${(100 * other / one).toFixed(0)} %` : ""));
  const time = seconds && html("tr", {}, html("th", {}, "measured"), ...seconds.map(each =>
    html("td", { class: "number" }, `${(1e3 * each).toPrecision(3)} ms`)), html("td", { class: "number" }, `${(100 * seconds[1] / seconds[0]).toFixed(0)} %`));
  return html("table", {}, row("parameters", before.parameters, after.parameters), row("MACs", before.macs, after.macs), ...(time ? [time] : []));
}

function choose(box) {
  chosen = box;
  const kept = keptNow();
  const toOpen = html("button", { type: "button" }, box.open ? "close" : "open");
  toOpen.addEventListener("click", () => { toggle(box); choose(box); });
  const names = [...box.reads];
  show(
    html("h2", {}, box.kind === "module" ? box.path : box.label),
    box.kind === "module" && toOpen,
    box.module && html("p", { class: "faint" }, `in ${box.module}`),
    box.source && html("p", { class: "faint" }, box.source),
    box.layout && html("p", {}, "gives ", html("code", {}, `[${box.layout}]`)),
    costTable(costOf(box.leaves, box.reads, new Map()), costOf(box.leaves, box.reads, kept), secondsOf(box)),
    ...section("groups", box.marks.size ? html("p", {}, ...[...box.marks].flatMap(name => [chip(name), " "])) : "none"),
    ...(names.length ? section("tensors", ...names.slice(0, 200).map(tensorLines)) : []),
  );
}
function tensorLines(name) {
  const tensor = tensors.get(name);
  const dims = tensor.layout.map((words, dim) =>
    [html("code", {}, words), tensor.fixed[dim] ? html("span", { class: "faint" }, ` fixed: ${tensor.fixed[dim]}`) : ""]);
  return html("div", {}, html("strong", {}, name), list(dims));
}
function showFlow(flow) {
  chosen = null;
  show(html("h2", {}, `${flow.source.label} → ${flow.target.label}`), list(flow.flows.slice(0, 200).map(each =>
    [`${each.source.label} → ${each.target.label} `, html("code", {}, `[${each.layout}]`), " ", ...each.groups.map(chip)])));
}
function showGroup(name) {
  marked = name;
  chosen = null;
  const group = groups.get(name), none = new Map(), less = new Map([[name, group.size - 1]]);
  const whole = costOf(root.leaves, tensors.keys(), none), without = costOf(root.leaves, tensors.keys(), less);
  const kind = [group.exact ? "exact" : "renormalised", ...(group.inner ? ["inner to larger units"] : [])].join(", ");
  show(
    html("h2", {}, chip(name), ` ${name}`),
    html("p", {}, `${group.size} channels, ${kind}; one holds ${short(whole.parameters - without.parameters)} `
      + `parameters and ${short(whole.macs - without.macs)} MACs`),
    ...(group.kept ? section(`kept: ${group.kept.length} of ${group.size}`, strip(group)) : []),
    ...(group.renormalised.length ? section("statistics along it", list(group.renormalised)) : []),
    ...(group.scores ? section("importance", histogram(group.scores)) : []),
    ...section("goes through", list(group.members.map(member =>
      [member.parameter, html("span", { class: "faint" }, ` dimension ${member.dim} `), html("code", {}, member.layout)]))),
  );
}
function strip(group) {
  const kept = new Set(group.kept), across = 32, rows = Math.ceil(group.size / across);
  const box = make("svg", { viewBox: `0 0 ${across * 8} ${rows * 8}`, width: "100%", class: "strip", role: "img",
    "aria-label": `${kept.size} channels kept, ${group.size - kept.size} removed` });
  for (let at = 0; at < group.size; at++) {
    const x = at % across * 8, y = Math.floor(at / across) * 8, stays = kept.has(at);
    const cell = make("rect", { x: x + 1, y: y + 1, width: 6, height: 6, class: stays ? "kept" : "gone" }, box);
    make("title", {}, cell, `channel ${at}: ${stays ? "kept" : "removed"}`);
    if (!stays) make("path", { d: `M${x + 2} ${y + 2}l4 4m0-4l-4 4`, class: "cross" }, box);
  }
  return box;
}
function histogram(scores) {
  const low = Math.min(...scores), high = Math.max(...scores), bins = Array(24).fill(0);
  for (const score of scores) bins[Math.min(23, Math.floor(24 * (score - low) / (high - low || 1)))]++;
  const most = Math.max(...bins), box = make("svg", { viewBox: "0 0 240 70", width: "100%", class: "bars", role: "img",
    "aria-label": `importance from ${low.toPrecision(3)} to ${high.toPrecision(3)}` });
  bins.forEach((count, at) => make("rect", { x: at * 10, width: 9, height: 50 * count / most, y: 52 - 50 * count / most }, box));
  make("text", { class: "faint", x: 0, y: 66 }, box, low.toPrecision(3));
  make("text", { class: "faint", x: 240, y: 66, "text-anchor": "end" }, box, high.toPrecision(3));
  return box;
}

// ---------------------------------------------------------------------------------- moving about

const stage = byId("stage"), world = byId("world");
const view = { x: 0, y: 0, scale: 1 };
let dragged = false;
const move = () => world.setAttribute("transform", `translate(${view.x} ${view.y}) scale(${view.scale})`);
function scaleBy(factor, x = stage.clientWidth / 2, y = stage.clientHeight / 2) {
  const scale = Math.min(4, Math.max(0.02, view.scale * factor));
  view.x = x - (x - view.x) * scale / view.scale;
  view.y = y - (y - view.y) * scale / view.scale;
  view.scale = scale;
  move();
}
function fit() {
  view.scale = Math.min(1.2, stage.clientWidth / (root.width || 1), stage.clientHeight / (root.height || 1));
  if (root.height * 0.45 > stage.clientHeight) view.scale = Math.max(view.scale, Math.min(1, stage.clientWidth / root.width, 0.8));
  view.x = Math.max(0, (stage.clientWidth - root.width * view.scale) / 2);
  view.y = 0;
  move();
}
function centre(box) {
  let x = box.width / 2, y = box.height / 2;
  for (const each of pathTo(box).slice(1)) { x += each.x; y += each.y; }
  view.scale = Math.max(view.scale, 0.7);
  view.x = stage.clientWidth / 2 - x * view.scale;
  view.y = stage.clientHeight / 2 - y * view.scale;
  move();
}
stage.addEventListener("wheel", event => {
  event.preventDefault();
  scaleBy(Math.exp(-event.deltaY / 400), event.offsetX, event.offsetY);
}, { passive: false });
stage.addEventListener("pointerdown", event => {
  const start = { x: event.clientX - view.x, y: event.clientY - view.y }, from = [event.clientX, event.clientY];
  dragged = false;
  const go = now => {
    dragged ||= Math.hypot(now.clientX - from[0], now.clientY - from[1]) > 4;
    if (!dragged) return;
    view.x = now.clientX - start.x;
    view.y = now.clientY - start.y;
    move();
  };
  const stop = () => { window.removeEventListener("pointermove", go); };
  window.addEventListener("pointermove", go);
  window.addEventListener("pointerup", stop, { once: true });
});
const KEYS = { ArrowUp: [0, 60], ArrowDown: [0, -60], ArrowLeft: [60, 0], ArrowRight: [-60, 0] };
document.addEventListener("keydown", event => {
  if (event.target instanceof HTMLInputElement) {
    if (event.key === "Escape") { byId("query").value = ""; find(); stage.focus(); }
    return;
  }
  if (event.key === "/") { event.preventDefault(); byId("query").focus(); }
  else if (event.key === "+") scaleBy(1.25);
  else if (event.key === "-") scaleBy(0.8);
  else if (event.key === "0") fit();
  else if (KEYS[event.key] && stage.contains(event.target)) {
    view.x += KEYS[event.key][0];
    view.y += KEYS[event.key][1];
    move();
    event.preventDefault();
  }
});

// --------------------------------------------------------------------------------------- finding

const shown = box => standsFor.has(box) ? shown(standsFor.get(box)) : box;
const readers = new Map();
for (const leaf of leaves.values()) for (const name of leaf.reads) if (!readers.has(name)) readers.set(name, leaf);
const places = [
  ...[...readers].map(([name, leaf]) => [name, () => reveal(leaf)]),
  ...modules.map(box => [box.path, () => reveal(shown(box))]),
  ...[...groups.keys()].map(name => [`group ${groups.get(name).number}: ${name}`, () => showGroup(name)]),
];
function find() {
  const words = byId("query").value.toLowerCase().trim();
  const matches = words ? places.filter(([name]) => name.toLowerCase().includes(words)) : [];
  matches.sort((one, other) => one[0].length - other[0].length);
  byId("found").replaceChildren(...matches.slice(0, 15).map(([name, go]) => {
    const button = html("button", { type: "button" }, name);
    button.addEventListener("click", () => { byId("found").replaceChildren(); go(); });
    return html("li", {}, button);
  }));
}
byId("query").addEventListener("input", find);
byId("query").addEventListener("keydown", event => {
  if (event.key === "Enter") byId("found").querySelector("button")?.click();
  if (event.key === "ArrowDown") byId("found").querySelector("button")?.focus();
});
byId("ratio").addEventListener("input", () => {
  if (isPlanned) byId("planned").checked = false;
  render();
  if (chosen) choose(chosen);
});
byId("planned")?.addEventListener("input", () => { render(); if (chosen) choose(chosen); });
byId("closer").addEventListener("click", () => scaleBy(1.25));
byId("farther").addEventListener("click", () => scaleBy(0.8));
byId("fit").addEventListener("click", fit);
function setAll(box, open) {
  for (const child of box.children) { if (child.kind === "module") child.open = open; setAll(child, open); }
}
byId("fold").addEventListener("click", () => { setAll(root, false); render(); fit(); });
byId("unfold").addEventListener("click", () => { setAll(root, true); render(); fit(); });
for (const button of document.querySelectorAll(".chip")) {
  const name = button.dataset.group;
  button.style.background = colour(name);
  button.style.color = ink(name);
  button.addEventListener("click", () => showGroup(name));
}
render();
fit();
document.documentElement.dataset.ready = "true";
})();

"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const CHUNK = 100; // lines of the cell table that are made at a time

const element = (tag, attributes = {}, ...children) => {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
};

// --- static tables: a click on a heading sorts ---------------------------------------------------

const valueOf = (text) => {
  const number = parseFloat(text.replace(/[−]/g, "-"));
  return Number.isNaN(number) ? text.trim().toLowerCase() : number;
};

const compare = (a, b) => {
  if (typeof a === "number" && typeof b === "number") return a - b;
  if (typeof a === "number") return -1;
  if (typeof b === "number") return 1;
  return a < b ? -1 : a > b ? 1 : 0;
};

const direction = (heading) => (heading.getAttribute("aria-sort") === "descending" ? "ascending" : heading.getAttribute("aria-sort") === "ascending" ? "descending" : heading.classList.contains("number") ? "descending" : "ascending");

const mark = (heading, sort) => {
  for (const other of heading.parentElement.children) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", sort);
};

const clickable = (node, act) => {
  node.tabIndex = 0;
  node.addEventListener("click", act);
  node.addEventListener("keydown", (event) => { if (event.key === "Enter") act(event); });
};

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((heading, column) => clickable(heading, () => {
    const sort = direction(heading);
    mark(heading, sort);
    const sign = sort === "ascending" ? 1 : -1;
    const rows = [...table.tBodies[0].rows].map((row) => [valueOf(row.cells[column].textContent), row]);
    rows.sort((a, b) => sign * compare(a[0], b[0]));
    table.tBodies[0].append(...rows.map((pair) => pair[1]));
  }));
}

// --- the cell table: from data, a chunk at a time ------------------------------------------------

const fixed = (digits) => (value) => (value === null || value === undefined ? "-" : value.toFixed(digits));
const seconds = (value) => (value >= 10 ? value.toFixed(0) : value.toPrecision(2));
const digits = (value) => (value === undefined ? "-" : value >= 100 ? value.toFixed(0) : value.toPrecision(3));
const some = (key) => data.cells.some((cell) => key in cell);
const SECONDS = { GPU: "GPU-seconds", CPU: "CPU-seconds", wall: "wall seconds" };
const COLUMNS = [
  { key: "method", head: "method" },
  { key: "bits", head: "bits", choice: true },
  ...(some("top1") || !some("agreement") ? [{ key: "top1", head: "top-1", show: fixed(2) }, { key: "drop", head: "drop", show: fixed(2) }, { key: "best", head: "best on test", show: fixed(2) }] : []),
  ...(some("agreement") ? [{ key: "agreement", head: "agreement", show: fixed(2) }, { key: "kl", head: "KL", show: (value, cell) => cell.kl_text ?? "-" }] : []),
  { key: "seed", head: "seed", show: String },
  { key: "teacher", head: "teacher", choice: true },
  { key: "evaluation", head: "test set", choice: true },
  { key: "protocol", head: "protocol", choice: true },
  { key: "precision", head: "precision", choice: true },
  { key: "seconds", head: "seconds", show: (value, cell) => `${seconds(value)} ${cell.clock}` },
  ...["mb", "gbops"].filter(some).map((key) => ({ key, head: { mb: "MB", gbops: "GBOPs" }[key], show: digits })),
  { key: "id", head: "cell" },
];
const scroller = document.getElementById("scroller");
const body = document.querySelector("#cell-table tbody");
const search = document.getElementById("search");
const chosen = {};
let shown = data.cells.slice();
let made = 0;
let order = null;

for (const cell of data.cells) cell.words = COLUMNS.map((c) => cell[c.key]).join(" ").toLowerCase();

const more = () => {
  const rows = shown.slice(made, made + CHUNK).map((cell) => {
    const row = element("tr", { "data-id": cell.id });
    for (const column of COLUMNS) {
      const text = column.show ? column.show(cell[column.key], cell) : cell[column.key];
      row.append(element("td", column.show ? { class: "number" } : {}, text));
    }
    clickable(row, () => { location.hash = `cell=${cell.id}`; });
    return row;
  });
  body.append(...rows);
  made += rows.length;
};

const refresh = () => {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const wanted = Object.entries(chosen).filter(([, value]) => value !== "");
  shown = data.cells.filter((cell) => words.every((word) => cell.words.includes(word)) && wanted.every(([key, value]) => cell[key] === value));
  if (order) {
    const sign = order.sort === "ascending" ? 1 : -1;
    shown.sort((a, b) => sign * compare(a[order.key], b[order.key]));
  }
  body.replaceChildren();
  made = 0;
  more();
  scroller.scrollTop = 0;
  document.getElementById("count").textContent = `${shown.length} of ${data.cells.length} cells`;
};

for (const column of COLUMNS) {
  const heading = element("th", column.show ? { class: "number", scope: "col" } : { scope: "col" }, column.head);
  clickable(heading, () => {
    const sort = direction(heading);
    mark(heading, sort);
    order = { key: column.key, sort };
    refresh();
  });
  document.querySelector("#cell-table thead tr").append(heading);
  const values = column.choice ? [...new Set(data.cells.map((cell) => cell[column.key]))].sort() : [];
  if (values.length > 1) {
    const select = element("select", { "aria-label": column.head, "data-key": column.key }, element("option", { value: "" }, `every ${column.head}`));
    for (const value of values) select.append(element("option", { value }, value));
    select.addEventListener("change", () => { chosen[column.key] = select.value; refresh(); });
    document.getElementById("choices").append(select);
  }
}
search.addEventListener("input", refresh);
scroller.addEventListener("scroll", () => {
  if (made < shown.length && scroller.scrollTop + scroller.clientHeight > scroller.scrollHeight - 400) more();
});
refresh();

// --- the panel of one cell -----------------------------------------------------------------------

const SVG = "http://www.w3.org/2000/svg";
const drawn = (tag, attributes, text) => {
  const node = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
};

const chart = (title, xs, ys) => {
  const points = xs.map((x, i) => [x, ys[i]]).filter((p) => typeof p[1] === "number" && p[0] !== null);
  if (points.length < 2) return null;
  const [W, H, L, R, T, B] = [420, 220, 52, 12, 26, 34];
  const [x0, x1] = [points[0][0], points[points.length - 1][0]];
  let [y0, y1] = [Math.min(...points.map((p) => p[1])), Math.max(...points.map((p) => p[1]))];
  if (y0 === y1) { y0 -= 1; y1 += 1; }
  const x = (v) => L + ((v - x0) / (x1 - x0 || 1)) * (W - L - R);
  const y = (v) => H - B - ((v - y0) / (y1 - y0)) * (H - T - B);
  const svg = drawn("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": title });
  const text = (words, at, anchor = "middle") => svg.append(drawn("text", { ...at, "text-anchor": anchor, "font-size": 11, fill: "#5b6570" }, words));
  svg.append(drawn("text", { x: L, y: 15, "font-size": 12, fill: "#1b1f24" }, title));
  for (let i = 0; i <= 4; i += 1) {
    const value = y0 + ((y1 - y0) * i) / 4;
    svg.append(drawn("line", { x1: L, x2: W - R, y1: y(value), y2: y(value), stroke: "#e4e4e4" }));
    text(Math.abs(y1 - y0) < 0.05 ? value.toPrecision(3) : value.toFixed(y1 - y0 < 5 ? 2 : 1), { x: L - 6, y: y(value) + 4 }, "end");
  }
  text(String(x0), { x: x(x0), y: H - 16 });
  text(String(x1), { x: x(x1), y: H - 16 });
  text("epoch", { x: (L + W - R) / 2, y: H - 4 });
  svg.append(drawn("polyline", { points: points.map((p) => `${x(p[0]).toFixed(1)},${y(p[1]).toFixed(1)}`).join(" "), fill: "none", stroke: "#0072b2", "stroke-width": 1.6 }));
  const last = points[points.length - 1];
  svg.append(drawn("circle", { cx: x(last[0]), cy: y(last[1]), r: 3, fill: "#0072b2" }));
  return svg;
};

const pairs = (object) => {
  const table = element("table", { class: "pairs" });
  for (const [key, value] of Object.entries(object)) table.append(element("tr", {}, element("td", {}, key), element("td", {}, typeof value === "object" && value !== null ? JSON.stringify(value) : String(value))));
  return table;
};

const panel = document.getElementById("panel");
const open = (cell) => {
  const facts = element("div", { class: "facts" });
  const fact = (value, name) => facts.append(element("div", {}, element("b", {}, value), element("span", {}, name)));
  if ("agreement" in cell) {
    fact(`${cell.agreement.toFixed(2)} %`, cell.agreement_text);
    fact(`${cell.kl_text} nats`, `KL divergence from the teacher; ${cell.plain_text}`);
  } else {
    fact(`${cell.top1.toFixed(2)} %`, `top-1, epoch ${cell.last_epoch} (last)`);
    fact(`${cell.best.toFixed(2)} %`, `best on test, epoch ${cell.best_epoch}`);
    fact(cell.drop.toFixed(2), `points below the teacher's ${cell.teacher_top1.toFixed(2)} %`);
  }
  fact(seconds(cell.seconds), `${SECONDS[cell.clock]}: ${seconds(cell.own)} own, ${seconds(cell.shared)} shared`);
  for (const [value, name] of cell.facts ?? []) fact(value, name);
  const recipe = data.shared[cell.recipe].replaceAll("{id}", cell.id).replaceAll("{bits}", cell.bits).replaceAll("{seed}", cell.seed);
  const content = [element("h3", {}, `${cell.method} ${cell.bits}, seed ${cell.seed}`), element("p", {}, `${cell.teacher} ${cell.on}, protocol ${cell.protocol}, ${cell.precision}, cell ${cell.id}`), facts];
  const charts = [["top-1 (%)", "top1"], ["agreement (%)", "agreement"], ["training loss", "loss"]].map(([title, key]) => chart(title, cell.curve.epoch ?? [], cell.curve[key] ?? [])).filter(Boolean);
  if (charts.length) content.push(element("div", { class: "charts" }, ...charts));
  content.push(element("h3", {}, "Reproduce"), element("pre", {}, recipe));
  content.push(element("h3", {}, "Settings"), pairs(data.shared[cell.config]));
  content.push(element("h3", {}, "Measured on"), pairs(data.shared[cell.provenance]));
  if (cell.replicates.length) content.push(element("h3", {}, "The same cell, measured elsewhere"), pairs(Object.fromEntries(cell.replicates)));
  if (cell.images !== null) content.push(element("h3", {}, "Synthetic images"), element("img", { class: "sheet", src: data.images[cell.images], alt: "a grid of synthetic images" }));
  if (cell.log) content.push(element("h3", {}, "Log, its end"), element("pre", {}, cell.log));
  document.getElementById("panel-body").replaceChildren(...content);
  if (!panel.open) panel.showModal();
  panel.scrollTop = 0;
};

const byId = new Map(data.cells.map((cell) => [cell.id, cell]));
const follow = () => {
  const found = location.hash.match(/^#cell=([0-9a-f]+)$/);
  if (found && byId.has(found[1])) open(byId.get(found[1]));
  else if (panel.open) panel.close();
};
panel.addEventListener("close", () => { if (location.hash.startsWith("#cell=")) history.replaceState(null, "", location.pathname + location.search); });
panel.addEventListener("click", (event) => { if (event.target === panel) panel.close(); });
document.getElementById("close").addEventListener("click", () => panel.close());
window.addEventListener("hashchange", follow);
follow();

for (const image of document.querySelectorAll("img[data-image]")) image.src = data.images[Number(image.dataset.image)];

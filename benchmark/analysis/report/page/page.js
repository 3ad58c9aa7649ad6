"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const CHUNK = 100; // lines of the cell table that are made at a time

const element = (tag, attributes = {}, ...children) => {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
};

const clickable = (node, act) => {
  node.tabIndex = 0;
  node.addEventListener("click", act);
  node.addEventListener("keydown", (event) => { if (event.key === "Enter") act(event); });
};

// a narrow column breaks names between settings rather than inside words
const breakable = (name) => name.split(/(?<=[_=(,])(?=\S)/).flatMap((part, i) => (i ? [element("wbr"), part] : [part]));

const wordsOf = (input) => input.value.toLowerCase().split(/\s+/).filter(Boolean);

// --- sorting: by a click on a heading; what has no value comes last, in either direction ---------

const order = (pairs, descending) => pairs.sort(([a], [b]) => {
  if (a === null || b === null) return (a === null) - (b === null);
  return (descending ? -1 : 1) * (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true }));
});

// to the other direction, first to the one that a reader wants: greatest numbers, first letters
const turn = (heading) => {
  const before = heading.getAttribute("aria-sort");
  const next = before === "descending" ? "ascending" : before === "ascending" || heading.classList.contains("number") ? "descending" : "ascending";
  for (const other of heading.parentElement.children) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", next);
  return next === "descending";
};

const valueOf = (cell, isNumber) => {
  if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
  if (!isNumber) return cell.textContent.trim();
  const number = parseFloat(cell.textContent.replace(/−/g, "-"));
  return Number.isNaN(number) ? null : number;
};

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((heading, column) => clickable(heading, () => {
    const isNumber = heading.classList.contains("number");
    const pairs = [...table.tBodies[0].rows].map((row) => [valueOf(row.cells[column], isNumber), row]);
    table.tBodies[0].append(...order(pairs, turn(heading)).map((pair) => pair[1]));
  }));
}

// --- the tables of results: which rows and columns are shown -------------------------------------

const tables = [...document.querySelectorAll("table.key")];
if (tables.length) {
  const rows = tables.flatMap((table) => [...table.tBodies[0].rows]);
  const [filter, group, count] = ["row-filter", "row-group", "row-count"].map((id) => document.getElementById(id));
  const show = () => {
    const words = wordsOf(filter);
    let shown = 0;
    for (const row of rows) {
      const said = `${row.textContent} ${row.dataset.group ?? ""}`.toLowerCase();
      row.hidden = !words.every((word) => said.includes(word)) || (group.value !== "" && row.dataset.group !== group.value);
      shown += !row.hidden;
    }
    for (const table of tables) { // blocks without such rows go, of the others the rows can be seen
      const block = table.closest(".block");
      block.hidden = [...table.tBodies[0].rows].every((row) => row.hidden);
      if (shown < rows.length) block.querySelector("details").open = true;
    }
    count.textContent = shown === rows.length ? `${rows.length} rows` : `${shown} of ${rows.length} rows`;
  };
  const groups = [...new Set(rows.map((row) => row.dataset.group).filter(Boolean))].sort();
  group.append(...groups.map((name) => element("option", { value: name }, name)));
  group.hidden = groups.length === 0;
  filter.addEventListener("input", show);
  group.addEventListener("change", show);
  const kinds = [...new Set(tables.flatMap((table) => [...table.tHead.rows[0].cells].map((heading) => heading.dataset.kind)).filter(Boolean))];
  for (const kind of kinds) {
    const box = element("input", { type: "checkbox", "data-kind": kind });
    box.checked = !tables.some((table) => table.querySelector(`th[data-kind="${kind}"][data-off]`));
    const choose = () => {
      for (const table of tables) {
        [...table.tHead.rows[0].cells].forEach((heading, column) => {
          if (heading.dataset.kind === kind) for (const row of table.rows) row.cells[column].hidden = !box.checked;
        });
      }
    };
    box.addEventListener("change", choose);
    if (!box.checked) choose();
    document.getElementById("row-columns").append(element("label", {}, box, ` ${kind}`));
  }
  document.getElementById("rows").hidden = false;
  show();
}

// --- the table of cells: from data, a chunk at a time --------------------------------------------

const fixed = (digits) => (value) => (value === null || value === undefined ? "-" : value.toFixed(digits));
const seconds = (value) => (value >= 10 ? value.toFixed(0) : value.toPrecision(2));
const digits = (value) => (value === undefined ? "-" : value >= 100 ? value.toFixed(0) : value.toPrecision(3));
const some = (key) => data.cells.some((cell) => key in cell);
const SECONDS = { GPU: "GPU-seconds", CPU: "CPU-seconds", wall: "wall seconds" };
const measured = (value, cell) => (cell.status ?? fixed(2)(value));
const scoreNames = () => [...new Set(data.cells.filter((cell) => "top1" in cell).map((cell) => cell.metric ?? "top-1"))].join(" or ") || "top-1";
const COLUMNS = [
  { key: "method", head: "method" },
  { key: "bits", head: "bits", choice: true },
  ...(some("top1") || !some("agreement") ? [{ key: "top1", head: scoreNames(), show: measured }, { key: "drop", head: "drop", show: fixed(2) }, { key: "best", head: "best on test", show: fixed(2) }] : []),
  ...(some("agreement") ? [{ key: "agreement", head: "agreement", show: fixed(2) }, { key: "kl", head: "KL", show: (value, cell) => cell.kl_text ?? "-" }] : []),
  { key: "seed", head: "seed", show: String },
  { key: "teacher", head: "teacher", choice: true },
  { key: "evaluation", head: "test set", choice: true },
  { key: "protocol", head: "protocol", choice: true },
  { key: "precision", head: "precision", choice: true },
  { key: "seconds", head: "seconds", show: (value, cell) => (value === undefined ? "-" : `${seconds(value)} ${cell.clock}`) },
  ...["mb", "gbops"].filter(some).map((key) => ({ key, head: { mb: "MB", gbops: "GBOPs" }[key], show: digits })),
  { key: "id", head: "cell" },
];
const scroller = document.getElementById("scroller");
const body = document.querySelector("#cell-table tbody");
const search = document.getElementById("search");
const ofRow = document.getElementById("of-row");
const chosen = {};
let shown = data.cells;
let made = 0;
let sorting = null;
let wantedRow = null; // [block, row, bits or undefined] of a table above

for (const cell of data.cells) cell.words = [...COLUMNS.map((c) => cell[c.key]), cell.status].join(" ").toLowerCase();

const more = () => {
  const rows = shown.slice(made, made + CHUNK).map((cell) => {
    const row = element("tr", { "data-id": cell.id });
    for (const column of COLUMNS) {
      const text = column.show ? column.show(cell[column.key], cell) : cell[column.key];
      row.append(column.key === "method" ? element("th", { scope: "row" }, element("span", { class: "name" }, ...breakable(text))) : element("td", column.show ? { class: "number" } : {}, text));
    }
    clickable(row, () => { location.hash = `cell=${cell.id}`; });
    return row;
  });
  body.append(...rows);
  made += rows.length;
};

const inRow = (cell) => !wantedRow || (cell.row && cell.row[0] === wantedRow[0] && cell.row[1] === wantedRow[1] && (!wantedRow[2] || cell.bits === wantedRow[2]));

const refresh = () => {
  const words = wordsOf(search);
  const wanted = Object.entries(chosen).filter(([, value]) => value !== "");
  shown = data.cells.filter((cell) => inRow(cell) && words.every((word) => cell.words.includes(word)) && wanted.every(([key, value]) => cell[key] === value));
  if (sorting) shown = order(shown.map((cell) => [cell[sorting.key] ?? null, cell]), sorting.descending).map((pair) => pair[1]);
  body.replaceChildren();
  made = 0;
  more();
  scroller.scrollTop = 0;
  document.getElementById("count").textContent = `${shown.length} of ${data.cells.length} cells`;
  ofRow.hidden = wantedRow === null;
  if (wantedRow) ofRow.textContent = `only ${shown.length ? shown[0].method : "this row"} ${wantedRow[2] ?? ""} ×`;
};

for (const column of COLUMNS) {
  const heading = element("th", column.show ? { class: "number", scope: "col" } : { scope: "col" }, column.head);
  clickable(heading, () => {
    sorting = { key: column.key, descending: turn(heading) };
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
ofRow.addEventListener("click", () => { history.replaceState(null, "", location.pathname + location.search); wantedRow = null; refresh(); });
scroller.addEventListener("scroll", () => {
  if (made < shown.length && scroller.scrollTop + scroller.clientHeight > scroller.scrollHeight - 400) more();
});
refresh();

// --- the panel of one cell -----------------------------------------------------------------------

const drawn = (tag, attributes, text) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
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
  const text = (words, at, anchor = "middle") => svg.append(drawn("text", { ...at, "text-anchor": anchor }, words));
  svg.append(drawn("text", { x: L, y: 15, class: "title" }, title));
  for (let i = 0; i <= 4; i += 1) {
    const value = y0 + ((y1 - y0) * i) / 4;
    svg.append(drawn("line", { x1: L, x2: W - R, y1: y(value), y2: y(value) }));
    text(Math.abs(y1 - y0) < 0.05 ? value.toPrecision(3) : value.toFixed(y1 - y0 < 5 ? 2 : 1), { x: L - 6, y: y(value) + 4 }, "end");
  }
  text(String(x0), { x: x(x0), y: H - 16 });
  text(String(x1), { x: x(x1), y: H - 16 });
  text("epoch", { x: (L + W - R) / 2, y: H - 4 });
  svg.append(drawn("polyline", { points: points.map((p) => `${x(p[0]).toFixed(1)},${y(p[1]).toFixed(1)}`).join(" ") }));
  for (const p of points) {
    const dot = drawn("circle", { cx: x(p[0]), cy: y(p[1]), r: p === points[points.length - 1] ? 3.5 : 2 });
    dot.append(drawn("title", {}, `epoch ${p[0]}: ${p[1]}`));
    svg.append(dot);
  }
  return svg;
};

const pairs = (object) => {
  const table = element("table", { class: "pairs" });
  for (const [key, value] of Object.entries(object)) table.append(element("tr", {}, element("th", { scope: "row" }, key), element("td", {}, typeof value === "object" && value !== null ? JSON.stringify(value) : String(value))));
  return table;
};

const bytes = (count) => (count >= 1e6 ? `${(count / 1e6).toPrecision(3)} MB` : count >= 1e3 ? `${(count / 1e3).toPrecision(3)} kB` : `${count} bytes`);

const filesOf = (cell) => {
  const list = element("ul", { class: "files" });
  for (const [name, size] of data.shared[cell.files]) {
    const path = `runs/${cell.id}/${name}`;
    list.append(element("li", {}, data.root === null ? element("code", {}, path) : element("a", { href: `${data.root}/${path}` }, path), ` ${bytes(size)}`));
  }
  return list;
};

const factsOf = (cell) => {
  const facts = element("div", { class: "facts" });
  const fact = (value, name) => facts.append(element("div", {}, element("b", {}, value), element("span", {}, name)));
  if (cell.status) {
    fact(cell.status, cell.said);
    return facts;
  }
  if ("agreement" in cell) {
    fact(`${cell.agreement.toFixed(2)} %`, cell.agreement_text);
    fact(`${cell.kl_text} nats`, `KL divergence from the teacher; ${cell.plain_text}`);
  } else {
    fact(`${cell.top1.toFixed(2)} %`, `${cell.metric ?? "top-1"}, epoch ${cell.last_epoch} (last)`);
    fact(`${cell.best.toFixed(2)} %`, `best on test, epoch ${cell.best_epoch}`);
    fact(cell.drop.toFixed(2), `points below the teacher's ${cell.teacher_top1.toFixed(2)} %`);
  }
  fact(seconds(cell.seconds), `${SECONDS[cell.clock]}: ${seconds(cell.own)} own, ${seconds(cell.shared)} shared`);
  for (const [value, name] of [...(cell.beside ?? []), ...(cell.facts ?? [])]) fact(value, name);
  for (const text of cell.warnings ?? []) fact("!", text);
  return facts;
};

const panel = document.getElementById("panel");
const open = (cell) => {
  const content = [element("h3", {}, `${cell.method} ${cell.bits}, seed ${cell.seed}`), element("p", {}, `${cell.teacher} ${cell.on}, protocol ${cell.protocol}, ${cell.precision}, cell ${cell.id}`), factsOf(cell)];
  const curve = cell.curve ?? {};
  const charts = [["top-1 (%)", "top1"], ["mIoU (%)", "miou"], ["AP (%)", "ap"], ["agreement (%)", "agreement"], ["training loss", "loss"]].map(([title, key]) => chart(title, curve.epoch ?? [], curve[key] ?? [])).filter(Boolean);
  if (charts.length) content.push(element("div", { class: "charts" }, ...charts));
  if (cell.images?.length) content.push(element("h3", {}, "Synthetic images"), ...cell.images.map((number) => element("img", { class: "sheet", src: data.images[number], alt: "a sheet of synthetic images" })));
  if (data.shared[cell.files].length) content.push(element("h3", {}, "Files"), filesOf(cell));
  if (!cell.status) {
    const recipe = data.shared[cell.recipe].replaceAll("{id}", cell.id).replaceAll("{bits}", cell.bits).replaceAll("{seed}", cell.seed);
    content.push(element("h3", {}, "Reproduce"), element("pre", {}, recipe));
  }
  content.push(element("h3", {}, "Settings"), pairs(data.shared[cell.config]));
  if (!cell.status) content.push(element("h3", {}, "Measured on"), pairs(data.shared[cell.provenance]));
  if (cell.replicates?.length) content.push(element("h3", {}, "The same cell, measured elsewhere"), pairs(Object.fromEntries(cell.replicates)));
  if (cell.log) content.push(element("h3", {}, "Log, its end"), element("pre", {}, cell.log));
  document.getElementById("panel-body").replaceChildren(...content);
  if (!panel.open) panel.showModal();
  panel.scrollTop = 0;
};

// --- addresses: #cell=ID opens a cell, #row=BLOCK.ROW or #row=BLOCK.ROW.BITS shows the cells of a row ------------------------

const byId = new Map(data.cells.map((cell) => [cell.id, cell]));
const follow = () => {
  const cell = location.hash.match(/^#cell=([0-9a-f]+)$/);
  const row = location.hash.match(/^#row=(\d+)\.(\d+)(?:\.([\w.]+))?$/);
  if (row) {
    wantedRow = [Number(row[1]), Number(row[2]), row[3]];
    refresh();
    document.getElementById("cells").scrollIntoView();
  }
  const only = row && shown.length === 1 ? shown[0] : null;
  if (only || (cell && byId.has(cell[1]))) open(only ?? byId.get(cell[1]));
  else if (panel.open) panel.close();
};
panel.addEventListener("close", () => { if (location.hash.startsWith("#cell=")) history.replaceState(null, "", location.pathname + location.search); });
panel.addEventListener("click", (event) => { if (event.target === panel) panel.close(); });
document.getElementById("close").addEventListener("click", () => panel.close());
window.addEventListener("hashchange", follow);
follow();

for (const image of document.querySelectorAll("img[data-image]")) image.src = data.images[Number(image.dataset.image)];

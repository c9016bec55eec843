"use strict";
// Draws the report from the numbers in the page. Text is only ever set as text, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const tip = node("div", { class: "tip", hidden: "" });
document.body.append(tip);
const VIRIDIS = ["#440154", "#414487", "#2a788e", "#22a884", "#7ad151", "#fde725"];
const CIVIDIS = ["#00224e", "#35456c", "#666970", "#948e77", "#c8b866", "#fee838"];

function node(tag, attributes = {}, ...children) {
  const drawn = ["svg", "g", "path", "line", "rect", "circle", "text"].includes(tag);
  const made = drawn ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function short(value) {
  if (value === null) return "—";
  const size = Math.abs(value);
  return size !== 0 && (size >= 1e5 || size < 1e-3) ? value.toExponential(2) : String(+value.toPrecision(4));
}

function show(event, text) {
  tip.hidden = false;
  tip.textContent = text;
  const left = Math.min(event.clientX + 16, innerWidth - tip.offsetWidth - 8);
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${Math.max(4, Math.min(event.clientY + 16, innerHeight - tip.offsetHeight - 8))}px`;
}

const hide = () => { tip.hidden = true; };

function ticks(low, high, wanted = 6) {
  const raw = (high - low) / wanted || 1;
  const unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((k) => k * unit).find((k) => k >= raw) || raw;
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k += 1) found.push(+(k * step).toPrecision(12));
  return found;
}

// Axes with their grid; returns the drawing and the two scales.
function axes(holder, x, y, size = {}) {
  const { width = 620, height = 300, left = 56, bottom = 44, top = 10, right = 12 } = size;
  const drawing = node("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  const spanX = x.high - x.low || 1, spanY = y.high - y.low || 1;
  const atX = (value) => left + ((value - x.low) / spanX) * (width - left - right);
  const atY = (value) => height - bottom - ((value - y.low) / spanY) * (height - bottom - top);
  for (const k of y.ticks || ticks(y.low, y.high)) {
    drawing.append(node("line", { x1: left, x2: width - right, y1: atY(k), y2: atY(k), stroke: "#e4e4e4" }));
    drawing.append(node("text", { x: left - 8, y: atY(k) + 4, "text-anchor": "end" }, short(k)));
  }
  for (const k of x.ticks || ticks(x.low, x.high)) {
    drawing.append(node("line", { x1: atX(k), x2: atX(k), y1: height - bottom, y2: height - bottom + 4, stroke: "#999" }));
    drawing.append(node("text", { x: atX(k), y: height - bottom + 18, "text-anchor": "middle" }, short(k)));
  }
  drawing.append(node("text", { x: (left + width) / 2, y: height - 6, "text-anchor": "middle" }, x.label));
  const turned = { transform: `translate(13 ${(height - bottom + top) / 2}) rotate(-90)`, "text-anchor": "middle" };
  drawing.append(node("text", turned, y.label));
  holder.replaceChildren(drawing);
  return { drawing, atX, atY, width, height };
}

function bounds(values, floor) {
  const real = values.filter((value) => value !== null);
  if (!real.length) return { low: 0, high: 1 };
  const low = Math.min(...real), high = Math.max(...real), pad = (high - low) * 0.05 || 0.05;
  return { low: floor !== undefined && low >= floor ? Math.max(floor, low - pad) : low - pad, high: high + pad };
}

function path(points) {
  return points.map(([x, y], k) => `${k ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
}

// One line per arm with a band; series: [{arm, start, mean, low, high}].
function lines(holder, series, arms, look) {
  const first = Math.min(1, ...series.map((one) => one.start));
  const last = Math.max(first + 1, ...series.map((one) => one.start + one.mean.length - 1));
  const y = { ...bounds(series.flatMap((one) => [...one.low, ...one.high]), look.floor), label: look.label };
  const whole = ticks(first, last, 12).filter(Number.isInteger);
  const { drawing, atX, atY, width, height } = axes(holder, { low: first, high: last, ticks: whole, label: "experiences trained" }, y, { width: 1120, height: 380 });
  for (const one of series) {
    const place = (values) => values.map((value, k) => [atX(one.start + k), atY(value)]);
    const band = [...place(one.high), ...place(one.low).reverse()];
    const { colour, dash } = arms[one.arm];
    if (one.runs > 1) drawing.append(node("path", { d: `${path(band)}Z`, fill: colour, opacity: Math.min(0.13, 1.2 / series.length) }));
    drawing.append(node("path", { d: path(place(one.mean)), fill: "none", stroke: colour, "stroke-width": 2, "stroke-dasharray": dash, class: "curve" }));
    if (one.mean.length === 1) drawing.append(node("circle", { cx: atX(one.start), cy: atY(one.mean[0]), r: 4, fill: colour, class: "curve" }));
  }
  const guide = node("line", { y1: 10, y2: height - 44, stroke: "#999", "stroke-dasharray": "3 3", visibility: "hidden" });
  drawing.append(guide);
  drawing.addEventListener("pointerleave", () => { hide(); guide.setAttribute("visibility", "hidden"); });
  drawing.addEventListener("pointermove", (event) => {
    const box = drawing.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * width;
    const share = (at - atX(first)) / (atX(last) - atX(first));
    const i = Math.max(first, Math.min(last, Math.round(first + share * (last - first))));
    guide.setAttribute("x1", atX(i)); guide.setAttribute("x2", atX(i)); guide.setAttribute("visibility", "visible");
    const here = series.filter((one) => i >= one.start && i < one.start + one.mean.length);
    const value = (one) => one.mean[i - one.start];
    here.sort((a, b) => (look.lower ? 1 : -1) * (value(a) - value(b)));
    const rows = here.slice(0, 20).map((one) => `${value(one).toFixed(3)}  ${arms[one.arm].name}`);
    if (here.length > 20) rows.push(`… ${here.length - 20} more`);
    show(event, [`after ${i}`, ...rows].join("\n"));
  });
}

function shade(colours, share) {
  const at = Math.max(0, Math.min(1, share)) * (colours.length - 1), k = Math.min(Math.floor(at), colours.length - 2);
  const part = (colour, c) => parseInt(colour.slice(1 + 2 * c, 3 + 2 * c), 16);
  return `rgb(${[0, 1, 2].map((c) => Math.round(part(colours[k], c) + (at - k) * (part(colours[k + 1], c) - part(colours[k], c)))).join(",")})`;
}

// A heat map with its values in the hover; rows of null are empty.
function heat(holder, rows, { columns, names, low, high, colours, unit, down, across }) {
  const side = rows.length > 24 ? 8 : 20, left = 76, top = 8, wide = Math.max(14, Math.min(70, 540 / columns.length));
  const width = left + wide * columns.length + 90, height = top + side * rows.length + 46;
  const drawing = node("svg", { viewBox: `0 0 ${Math.max(width, 520)} ${height}`, role: "img" });
  const draw = (x, y, w, h, share) => node("rect", { x, y, width: w, height: h, fill: shade(colours, share) });
  rows.forEach((row, i) => row.forEach((value, j) => {
    if (value === null) return;
    const cell = draw(left + j * wide, top + i * side, wide - 0.5, side - 0.5, (value - low) / (high - low || 1));
    cell.setAttribute("class", "cell");
    cell.addEventListener("pointermove", (event) => show(event, `${names[i]}\n${columns[j]}\n${short(value)} ${unit}`));
    cell.addEventListener("pointerleave", hide);
    drawing.append(cell);
  }));
  const every = Math.ceil(rows.length / 12), stride = Math.ceil(columns.length / Math.max(1, Math.floor((wide * columns.length) / 34)));
  rows.forEach((_, i) => { if (i % every === 0) drawing.append(node("text", { x: left - 6, y: top + (i + 0.5) * side + 4, "text-anchor": "end" }, String(down + i))); });
  columns.forEach((_, j) => { if (j % stride === 0) drawing.append(node("text", { x: left + (j + 0.5) * wide, y: top + rows.length * side + 16, "text-anchor": "middle" }, String(j + 1))); });
  drawing.append(node("text", { x: left, y: height - 8 }, across));
  const bar = left + wide * columns.length + 14, tall = Math.max(60, side * rows.length);
  for (let k = 0; k < 20; k += 1) drawing.append(draw(bar, top + (k * tall) / 20, 12, tall / 20 + 0.5, 1 - (k + 0.5) / 20));
  drawing.append(node("text", { x: bar + 16, y: top + 11 }, short(high)), node("text", { x: bar + 16, y: top + tall }, short(low)));
  drawing.setAttribute("viewBox", `0 0 ${Math.max(width, 520)} ${Math.max(height, top + tall + 46)}`);
  holder.replaceChildren(drawing);
}

function scatter(holder, stream, visible) {
  const arms = stream.pareto.arms.map((points, arm) => ({ arm, points })).filter(({ arm, points }) => visible(arm) && points.length);
  const all = arms.flatMap((one) => one.points);
  const x = { ...bounds(all.map((p) => p[0])), label: stream.pareto.label }, y = { ...bounds(all.map((p) => p[1])), label: "forgetting (lower is better)" };
  const { drawing, atX, atY } = axes(holder, x, y);
  for (const { arm, points } of arms) {
    const mean = [0, 1].map((c) => points.reduce((sum, p) => sum + p[c], 0) / points.length);
    const { colour, name } = stream.arms[arm];
    const dot = (p, r, opacity, what) => {
      const made = node("circle", { cx: atX(p[0]), cy: atY(p[1]), r, fill: colour, opacity, stroke: "white", class: "dot" });
      made.addEventListener("pointermove", (event) => show(event, `${name} (${what})\nlearning ${short(p[0])}\nforgetting ${short(p[1])}`));
      made.addEventListener("pointerleave", hide);
      return made;
    };
    drawing.append(...points.map((p) => dot(p, 3.5, 0.5, "one run")), dot(mean, 7, 1, `mean of ${points.length}`));
  }
}

function bars(holder, stream, visible) {
  const arms = stream.parts.map((both, arm) => ({ arm, both })).filter(({ arm, both }) => both && visible(arm));
  const span = bounds([0, ...arms.flatMap(({ both }) => [...both, both[0] + both[1]])]);
  const size = { height: 60 + 34 * Math.max(1, arms.length), left: 190 };
  const { drawing, atX } = axes(holder, { ...span, label: "forgetting" }, { low: 0, high: 1, ticks: [], label: "" }, size);
  arms.forEach(({ arm, both }, place) => {
    const y = 14 + 34 * place, name = stream.arms[arm].name;
    drawing.append(node("text", { x: 182, y: y + 15, "text-anchor": "end" }, name.length > 26 ? `${name.slice(0, 25)}…` : name));
    both.forEach((value, part) => {
      const bar = node("rect", { x: Math.min(atX(0), atX(value)), width: Math.abs(atX(value) - atX(0)), y: y + 11 * part, height: 10, fill: ["#0072b2", "#d55e00"][part], class: "bar" });
      bar.addEventListener("pointermove", (event) => show(event, `${name}\n${["weights", "routing and new classes"][part]}: ${short(value)}`));
      bar.addEventListener("pointerleave", hide);
      drawing.append(bar);
    });
  });
}

function choose(select, labels, chosen) {
  select.replaceChildren(...labels.map((label, k) => node("option", { value: k }, label)));
  select.addEventListener("change", () => chosen(+select.value));
  if (labels.length) chosen(0);
}

function sortable(table) {
  table.querySelectorAll("th").forEach((cell, column) => cell.querySelector("button").addEventListener("click", () => {
    const down = cell.getAttribute("aria-sort") === "ascending";
    table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
    cell.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...table.tBodies[0].rows], value = (row) => row.cells[column].dataset.v;
    rows.sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === ""); // what is undefined stands last
      const order = column === 0 ? x.localeCompare(y) : x - y;
      return down ? -order : order;
    });
    table.tBodies[0].append(...rows);
  }));
}

function section(root, stream) {
  const hidden = new Set(), find = (name) => root.querySelector(`.${name}`), visible = (arm) => !hidden.has(arm);
  const chips = stream.arms.map((arm, k) => {
    const sample = node("svg", { width: 26, height: 8 }, node("path", { d: "M0 4H26", stroke: arm.colour, "stroke-width": 3, "stroke-dasharray": arm.dash }));
    const chip = node("button", { type: "button", "aria-pressed": "true", title: "click: show or hide; double click: this one alone" }, sample, arm.name);
    chip.addEventListener("click", () => { if (!hidden.delete(k)) hidden.add(k); redraw(); });
    chip.addEventListener("dblclick", () => { stream.arms.forEach((_, j) => hidden.add(j)); hidden.delete(k); redraw(); });
    return chip;
  });
  find("chips").append(...chips);
  find("filter").addEventListener("input", (event) => {
    const words = event.target.value.toLowerCase().split(/\s+/);
    stream.arms.forEach((arm, k) => (words.every((word) => arm.name.toLowerCase().includes(word)) ? hidden.delete(k) : hidden.add(k)));
    redraw();
  });
  let panel = 0;
  function redraw() {
    chips.forEach((chip, k) => chip.setAttribute("aria-pressed", String(visible(k))));
    find("rows").querySelectorAll("tbody tr").forEach((row) => { row.hidden = hidden.has(+row.dataset.arm); });
    if (stream.curves) lines(find("curves"), stream.curves.panels[panel].series.filter((one) => visible(one.arm)), stream.arms, stream.curves);
    if (stream.pareto) scatter(find("pareto"), stream, visible);
    if (stream.parts) bars(find("parts"), stream, visible);
  }
  if (stream.curves) choose(find("panels"), stream.curves.panels.map((one) => one.name), (k) => { panel = k; redraw(); });
  if (stream.matrices) choose(find("matrix-arms"), stream.matrices.map((one) => stream.arms[one.arm].name), (k) => {
    const names = stream.matrices[k].rows.map((_, i) => `after ${i}`);
    heat(find("matrix"), stream.matrices[k].rows, { ...stream.scale, names, columns: stream.curves.experiences, colours: stream.curves.lower ? [...VIRIDIS].reverse() : VIRIDIS, unit: "", down: 0, across: "scored on experience; rows: experiences trained" });
  });
  if (stream.loads) choose(find("load-arms"), stream.loads.map((one) => one.name), (k) => {
    const one = stream.loads[k];
    heat(find("loads"), one.rows, { names: one.experts, columns: one.experiences, low: 0, high: Math.max(2, ...one.rows.flat()), colours: CIVIDIS, unit: "times an even share", down: one.first, across: one.across });
  });
  sortable(find("rows"));
  redraw();
}

document.querySelectorAll("section").forEach((root, k) => section(root, data.streams[k]));
document.body.dataset.ready = "true";

// A chart of the report, drawn here. In: a panel of pages/charts/panels.py as data; out: a figure that follows it.

import { across, bandOf, between, isCrossed, logTicks, nearest, pathOf, rangeOf, scale, ticks } from "/static/runs/axes.js";
import { count, formatted, whole } from "/static/runs/format.js";
import { element } from "/static/runs/stream.js";

const NS = "http://www.w3.org/2000/svg";
const LEFT = 46;
const RIGHT = 10;
const BOTTOM = 26;
const HEIGHTS = { wide: 330, half: 210 };
const NARROW = 520; // pixels, below which few ticks have room
const MARKER = 16; // pixels: markers that are closer are beads on a string, so there are none
const LETTER = 6.2; // pixels
const LINE = 17; // pixels, of the readout

/** All charts of a page show the same place from left to right. */
export class Cursor {
  constructor() {
    this.at = null;
    this.from = null; // the chart that reads its values
    this.charts = [];
  }

  move(at, from = null) {
    this.at = at;
    this.from = from;
    for (const chart of this.charts) chart.point(from === null || from === chart);
  }
}

export class Chart {
  constructor(name, cursor) {
    this.name = name;
    this.wide = name === "loss";
    this.cursor = cursor;
    cursor.charts.push(this);
    this.panel = null;
    this.series = [];
    this.figure = element("figure", this.wide ? "wide" : "half");
    this.figure.dataset.panel = name;
    this.title = element("figcaption");
    this.legend = element("div", "legend");
    this.spoken = element("output", "unseen");
    this.note = element("p", "remark");
    this.drawing = svg("svg", { role: "img", tabindex: "0", class: "chart" });
    this.figure.append(this.title, this.legend, this.drawing, this.spoken, this.note);
    this.drawing.addEventListener("pointermove", (event) => this.cursor.move(this.valueAt(event), this));
    this.drawing.addEventListener("pointerleave", () => this.cursor.move(null));
    this.drawing.addEventListener("keydown", (event) => this.onKey(event));
    this.drawing.addEventListener("blur", () => this.cursor.move(null));
    this.observer = new ResizeObserver(() => this.draw());
    this.observer.observe(this.figure);
  }

  remove() {
    this.observer.disconnect();
    this.figure.remove();
    this.cursor.charts = this.cursor.charts.filter((chart) => chart !== this);
  }

  /** Draw this content; `view` has the unit from left to right, the last place, and what steps are in tokens. */
  update(panel, series, view) {
    Object.assign(this, { panel, series, view });
    this.title.textContent = panel.title;
    this.note.textContent = panel.note;
    this.note.hidden = !this.note.textContent;
    this.drawing.setAttribute("aria-label", `${panel.description} Arrow keys read values.`);
    this.draw();
  }

  draw() {
    const width = Math.round(this.figure.clientWidth);
    if (!this.panel || width < 50) return;
    const height = this.wide ? (width < NARROW ? 290 : HEIGHTS.wide) : HEIGHTS.half;
    const { panel, view } = this;
    const top = view.tokens && view.unit === "steps" ? 26 : 10;
    const last = Math.max(1, view.last) * 1.01;
    const y_range = rangeOf(panel, this.series, last);
    this.x = scale([0, last], [LEFT, width - RIGHT]);
    this.y = scale(y_range, [height - BOTTOM, top], panel.log);
    this.box = { width, height, top, last };
    this.drawing.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const clip = `clip-${this.name}`;
    const plot = svg("g", { "clip-path": `url(#${clip})` });
    this.pointer = svg("g", { class: "pointer" });
    this.drawing.replaceChildren(
      svg("clipPath", { id: clip }, [svg("rect", { x: LEFT - 4, y: top - 4, width: width - LEFT - RIGHT + 8, height: height - BOTTOM - top + 5 })]),
      this.grid(y_range),
      plot,
      this.ruleNames(),
      this.pointer,
    );
    for (const one of this.series) plot.append(...this.curve(one));
    this.showLegend();
    this.point(this.cursor.from === this);
  }

  grid(y_range) {
    const { panel, view, box } = this;
    const group = svg("g", {});
    const right = box.width - RIGHT;
    const rows = panel.log ? logTicks(...y_range) : ticks(...y_range, this.wide ? 6 : 5);
    for (const value of rows) {
      const y = this.y(value);
      group.append(line(LEFT, y, right, y, "grid", 0.8), label(LEFT - 6, y + 4, formatted(panel.format, value), "end"));
    }
    const floor = box.height - BOTTOM;
    group.append(line(LEFT, floor, right, floor, "grid", 0.8));
    const columns = ticks(0, box.last, box.width < NARROW ? 4 : 8, true);
    columns.forEach((value, place) => {
      const x = this.x(value);
      group.append(label(x, floor + 17, across(value, place, view.unit), "middle", box));
      if (view.tokens && view.unit === "steps" && value > 0) {
        const tokens = between(value, view.tokens.steps, view.tokens.tokens);
        if (tokens !== null) group.append(label(x, 12, count(tokens) + (place === 1 ? " tokens" : ""), "middle", box));
      }
    });
    for (const step of view.resumes) {
      const x = this.x(step);
      group.append(line(x, box.top, x, floor, "faint", 0.8, "1 2"));
    }
    for (const rule of panel.rules) {
      const y = this.y(rule.value);
      if (y < box.top - 2 || y > floor) continue;
      group.append(line(LEFT, y, right, y, "faint", 1, "4 3"));
    }
    return group;
  }

  /** The names of published levels, above their lines at the left, or at the right if a curve is in the way. */
  ruleNames() {
    const { panel, box } = this;
    const group = svg("g", {});
    for (const rule of panel.rules) {
      const y = this.y(rule.value);
      if (y < box.top - 2 || y > box.height - BOTTOM) continue;
      const text = `${rule.label.slice(0, 40)} ${formatted(panel.format, rule.value)}`;
      const [left, right, width] = [LEFT + 2, box.width - RIGHT - 2, LETTER * text.length];
      const crossed = (from, to) => this.series.some((one) => (one.ghost || one.look.alpha === 1) && isCrossed(one, this.x, this.y, [from, to, y - LINE, y]));
      const on_right = rule.on_right || (crossed(left, left + width) && !crossed(right - width, right));
      const named = label(on_right ? right : left, y - 4, text, on_right ? "end" : "start");
      set(named, { class: "on-paper" });
      group.append(named);
    }
    return group;
  }

  curve(one) {
    const { look } = one;
    const made = [];
    const color = `var(--${look.ink})`;
    if (one.spread) made.push(svg("path", { d: bandOf(one, this.x, this.y), fill: color, "fill-opacity": 0.16 }));
    const path = svg("path", { d: pathOf(one, this.x, this.y), fill: "none", stroke: color, "stroke-width": look.width, "stroke-opacity": look.alpha });
    if (look.dash.length) path.setAttribute("stroke-dasharray", look.dash.map((part) => part * look.width).join(" "));
    path.dataset.label = one.label;
    made.push(path);
    const dots = this.marked(one).map((at) => svg("circle", { cx: this.x(one.x[at]).toFixed(1), cy: this.y(one.y[at]).toFixed(1), r: 2.3, fill: color }));
    return [...made, ...dots];
  }

  /** The points that have a marker: all if there is room for them, or none. */
  marked(one) {
    const known = one.x.map((_, at) => at).filter((at) => one.x[at] !== null && one.y[at] !== null);
    const room = (this.box.width - LEFT - RIGHT) / MARKER;
    return known.length === 1 || (one.look.marker && known.length <= room) ? known : [];
  }

  showLegend() {
    const named = this.series.filter((one) => one.label && one.y.some((y) => y !== null));
    const shown = this.wide && named.length > 1 ? named : []; // its colors are those of all charts
    this.legend.hidden = !shown.length;
    this.legend.replaceChildren(...shown.map((one) => this.legendItem(one)));
  }

  legendItem(one) {
    const item = element("span", "item");
    const sign = svg("svg", { class: "sign", viewBox: "0 0 22 8", "aria-hidden": "true" });
    const stroke = { stroke: `var(--${one.look.ink})`, "stroke-width": Math.max(1.2, one.look.width), "stroke-opacity": one.look.alpha };
    sign.append(svg("line", { x1: 0, y1: 4, x2: 22, y2: 4, ...stroke }));
    if (this.marked(one).length) sign.append(svg("circle", { cx: 11, cy: 4, r: 2.3, fill: `var(--${one.look.ink})` }));
    const text = this.box.width < NARROW ? one.label : one.about || one.label;
    item.append(sign, element("span", "", text));
    return item;
  }

  valueAt(event) {
    const bounds = this.drawing.getBoundingClientRect();
    const px = ((event.clientX - bounds.left) / bounds.width) * this.box.width;
    const share = (px - LEFT) / (this.box.width - LEFT - RIGHT);
    return Math.max(0, Math.min(1, share)) * this.box.last;
  }

  onKey(event) {
    const path = this.readable().reduce((most, one) => (one.ghost || (most && most.x.length >= one.x.length) ? most : one), null);
    if (event.key === "Escape") return this.cursor.move(null);
    if (!path || event.altKey || event.ctrlKey || event.metaKey) return null;
    const known = path.x.map((_, at) => at).filter((at) => path.y[at] !== null && path.x[at] <= this.box.last);
    const now = this.cursor.at === null ? known.length : known.indexOf(nearest(path, this.cursor.at));
    const by = event.shiftKey ? 10 : 1;
    const places = { ArrowLeft: now - by, ArrowRight: now + by, Home: 0, End: known.length - 1 };
    if (!(event.key in places) || !known.length) return null;
    event.preventDefault();
    const place = Math.max(0, Math.min(known.length - 1, places[event.key]));
    this.cursor.move(path.x[known[place]], this);
    this.spoken.textContent = this.reading().flat().join(", ");
    return null;
  }

  readable() {
    return this.series.filter((one) => one.label && one.y.some((y) => y !== null));
  }

  /** The lines of the readout: where, then the value of each named curve. */
  reading() {
    const { cursor, panel, view } = this;
    const steps = view.unit === "steps";
    const tokens = steps && view.tokens ? between(cursor.at, view.tokens.steps, view.tokens.tokens) : null;
    const where = steps ? `step ${whole(cursor.at)}${tokens ? ` · ${count(tokens)} tokens` : ""}` : `${count(cursor.at)} tokens`;
    const finer = { ...panel.format, digits: panel.format.digits + (panel.format.kind === "count" ? 0 : 1) };
    const rows = [];
    for (const one of this.readable()) {
      const at = nearest(one, cursor.at);
      if (one.x[at] - cursor.at > 0.1 * this.box.last || cursor.at - one.x[at] > 0.1 * this.box.last) continue;
      const away = Math.abs(one.x[at] - cursor.at) > 0.004 * this.box.last;
      const place = away ? ` at ${steps ? whole(one.x[at]) : count(one.x[at])}` : "";
      rows.push({ one, at, text: `${one.label.slice(0, 40)} ${formatted(finer, one.y[at])}${place}` });
    }
    const shown = [where, ...rows.map((row) => row.text)];
    shown.rows = rows;
    return shown;
  }

  /** Draw the crosshair; `full`: with its readout. */
  point(full) {
    const { cursor, box } = this;
    if (!this.pointer) return;
    this.pointer.replaceChildren();
    if (cursor.at === null || cursor.at > box.last) return;
    const x = this.x(cursor.at);
    this.pointer.append(line(x, box.top, x, box.height - BOTTOM, "faint", 1));
    const texts = this.reading();
    for (const { one, at } of texts.rows) {
      const y = this.y(one.y[at]);
      if (y < box.top - 4 || y > box.height - BOTTOM + 1) continue;
      this.pointer.append(svg("circle", { cx: this.x(one.x[at]), cy: y, r: 3.2, fill: `var(--${one.look.ink})`, stroke: "var(--paper)", "stroke-width": 1.2 }));
    }
    if (full) this.readout(texts, x);
  }

  readout(texts, x) {
    const group = svg("g", { class: "readout" });
    const frame = svg("rect", { rx: 4, fill: "var(--paper)", stroke: "var(--rule)" });
    group.append(frame);
    texts.forEach((text, place) => {
      const row = place ? texts.rows[place - 1] : null;
      if (row) group.append(svg("circle", { cx: 13, cy: 12 + LINE * place, r: 3.4, fill: `var(--${row.one.look.ink})` }));
      const shown = label(row ? 22 : 9, 16 + LINE * place, text, "start");
      shown.setAttribute("fill", place ? "var(--text)" : "var(--faint)");
      group.append(shown);
    });
    this.pointer.append(group);
    const width = group.getBBox().width + 18;
    const height = LINE * texts.length + 8;
    set(frame, { width, height });
    const right = x + 10 + width < this.box.width;
    const left = Math.max(0, right ? x + 10 : x - 10 - width);
    group.setAttribute("transform", `translate(${left.toFixed(1)} ${this.box.top})`);
  }
}

function svg(tag, attributes, children = []) {
  const made = document.createElementNS(NS, tag);
  set(made, attributes);
  made.append(...children);
  return made;
}

function set(made, attributes) {
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
}

function line(x1, y1, x2, y2, ink, width, dash = "") {
  const made = svg("line", { x1: x1.toFixed(1), y1: y1.toFixed(1), x2: x2.toFixed(1), y2: y2.toFixed(1), stroke: `var(--${ink})`, "stroke-width": width });
  if (dash) made.setAttribute("stroke-dasharray", dash);
  return made;
}

/** A text; within `box` it is not cut at the right edge. */
function label(x, y, text, anchor, box = null) {
  const half = 3.1 * text.length;
  const cut = box && x + half > box.width;
  const made = svg("text", { x: (cut ? box.width : x).toFixed(1), y: y.toFixed(1), "text-anchor": cut ? "end" : anchor, fill: "var(--faint)", "font-size": 12 });
  made.textContent = text;
  return made;
}

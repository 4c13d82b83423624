// What every head looks at from one token. In: a model and a text that ends with it; out: a panel.

import { attentionOf } from "./generation.js";
import { asLabel, bar, element, inPlace, percent } from "./visible.js";
import { drawMap, drawStrip, rootsOf, rowsOf, scale } from "./weights.js";

const N_TOP = 6; // tokens that are listed
const MOST_MAP_PX = 460;
const STRIP_HEIGHT = 16;
const MOST_TALL = 6; // layers for which there is room for taller strips

export class Attention {
  /** `on`: closed(), needsKey(message, signal). */
  constructor(root, on) {
    this.root = root;
    this.on = on;
    this.control = null;
    this.found = null;
    this.head = null; // [layer, head], kept from token to token
    const dark = matchMedia("(prefers-color-scheme: dark)");
    dark.addEventListener("change", () => this.found && this.#draw());
    root.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      event.stopPropagation();
      this.close();
    });
  }

  get isOpen() {
    return !this.root.hidden;
  }

  close() {
    this.control?.abort();
    this.root.hidden = true;
    this.found = null;
    this.on.closed();
  }

  /** Ask and show. `text` ends with the token that looks. */
  async open(model, text, label) {
    this.control?.abort();
    const control = (this.control = new AbortController());
    this.model = model;
    this.body = { model: model.id, text };
    this.title = `Attention from “${asLabel(label)}”`;
    this.root.hidden = false;
    if (!this.found) this.#frame([element("p", "faint", "Looking …")]);
    await this.#try(control, async () => {
      const found = await this.#ask({}, control);
      this.found = found;
      this.rows = rowsOf(found);
      const [layer, head] = this.head ?? [];
      if (!(layer < found.layers && head < found.heads)) this.head = this.#mostFocused();
      this.#draw();
      await this.#loadMap(control);
    });
  }

  async choose(layer, head) {
    this.head = [layer, head];
    this.#draw();
    this.control?.abort();
    const control = (this.control = new AbortController());
    await this.#try(control, () => this.#loadMap(control));
  }

  async #try(control, work) {
    try {
      await work();
    } catch (error) {
      if (error.name === "AbortError" || control.signal.aborted) return;
      this.found = null;
      this.#frame([element("p", "notice", error.message, { role: "alert" })]);
    }
  }

  #ask(more, control) {
    const say = (message) => this.#frame([element("p", "notice calm", message)]);
    return attentionOf({ ...this.body, ...more }, { signal: control.signal, say, needsKey: this.on.needsKey });
  }

  async #loadMap(control) {
    const found = await this.#ask({ head: this.head }, control);
    if (!control.signal.aborted) this.#drawMap(rootsOf(found));
  }

  /** The head with the largest weight on one token that is neither the first nor the one that looks. */
  #mostFocused() {
    let best = [0, 0];
    let most = -1;
    this.rows.forEach((heads, layer) =>
      heads.forEach((row, head) => {
        const largest = Math.max(0, ...row.subarray(1, -1));
        if (largest > most) [best, most] = [[layer, head], largest];
      }),
    );
    return best;
  }

  #frame(content) {
    const head = element("div", "attention-head");
    const close = element("button", "plain", "Close", { type: "button" });
    close.addEventListener("click", () => this.close());
    head.append(element("h2", "", this.title ?? "Attention"), element("span", "faint", this.model?.id ?? ""), close);
    this.root.replaceChildren(head, ...content);
  }

  #draw() {
    const hadFocus = this.root.querySelector(".heads")?.contains(document.activeElement);
    const color = scale();
    const { skipped, tokens } = this.found;
    const which = skipped ? `the last ${tokens.length} of ${(tokens.length + skipped).toLocaleString()} tokens` : "";
    const words = `Each strip is a head: from the first token at the left${which ? ` of ${which}` : ""} to this one.`;
    const left = element("div", "heads-side");
    left.append(element("p", "faint", words), this.#grid(color), this.#habits());
    const [layer, head] = this.head;
    const right = element("div", "head-side");
    this.map = element("canvas", "map", "", { role: "img", "aria-label": `Map of layer ${layer}, head ${head}` });
    this.readout = element("p", "faint readout", "Rows are tokens, columns what they look at.");
    right.append(element("h3", "", `Layer ${layer}, head ${head}`), this.#top(), this.#shadedText(color));
    right.append(this.map, this.readout);
    const both = element("div", "attention-body");
    both.append(left, right);
    this.#frame([both]);
    if (hadFocus) this.root.querySelector(".heads [tabindex='0']").focus();
  }

  /** A button for each head, layers downward. */
  #grid(color) {
    const grid = element("div", "heads", "", { role: "group", "aria-label": "Heads: arrow keys move, Enter chooses" });
    grid.style.setProperty("--heads", this.found.heads);
    grid.classList.toggle("few", this.found.layers <= MOST_TALL);
    this.rows.forEach((heads, layer) => {
      grid.append(element("span", "layer-name", String(layer), { "aria-hidden": "true" }));
      heads.forEach((row, head) => grid.append(this.#cell(row, layer, head, color)));
    });
    grid.addEventListener("keydown", (event) => this.#move(event, grid));
    return grid;
  }

  #cell(row, layer, head, color) {
    const chosen = layer === this.head[0] && head === this.head[1];
    const top = row.indexOf(Math.max(...row));
    const label = `Layer ${layer}, head ${head}: ${percent(row[top])} on ${asLabel(this.found.tokens[top])}`;
    const options = { type: "button", "aria-label": label, title: label, "aria-pressed": String(chosen) };
    const cell = element("button", "head-cell", "", { ...options, tabindex: chosen ? "0" : "-1" });
    const canvas = element("canvas", "", "", { width: String(Math.min(row.length, 96)), height: String(STRIP_HEIGHT) });
    drawStrip(canvas, row, color);
    cell.append(canvas);
    cell.addEventListener("click", () => this.choose(layer, head));
    return cell;
  }

  #move(event, grid) {
    const cells = [...grid.querySelectorAll(".head-cell")];
    const at = cells.indexOf(event.target);
    const by = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: this.found.heads, ArrowUp: -this.found.heads }[event.key];
    if (at < 0 || by === undefined) return;
    cells[at + by]?.focus();
    event.preventDefault();
  }

  #habits() {
    const list = element("ul", "habits");
    list.append(element("li", "faint", "The head that looks most at"));
    for (const habit of this.found.habits) {
      const row = element("li");
      const where = element("button", "plain", `layer ${habit.layer}, head ${habit.head}`, { type: "button" });
      where.addEventListener("click", () => this.choose(habit.layer, habit.head));
      row.append(`${habit.what}: `, where, ` ${percent(habit.share)}`);
      row.title = `Over all tokens so far. A head that looks evenly at all earlier tokens: ${percent(habit.even)}`;
      list.append(row);
    }
    return list;
  }

  /** The tokens with the largest weights of the chosen head. */
  #top() {
    const row = this.rows[this.head[0]][this.head[1]];
    const order = [...row.keys()].sort((a, b) => row[b] - row[a]).slice(0, N_TOP);
    const list = element("ol", "looked-at");
    for (const at of order) {
      const back = row.length - 1 - at;
      const where = back === 0 ? "itself" : back === 1 ? "just before" : `${back} before`;
      const item = element("li", "", "", { "data-at": String(at), "data-weight": row[at].toFixed(5) });
      item.append(element("span", "token-name", asLabel(this.found.tokens[at])));
      item.append(bar(row[at]), element("span", "p", percent(row[at])), element("span", "faint", where));
      list.append(item);
    }
    return list;
  }

  /** The text, each token in the color of its weight. */
  #shadedText(color) {
    const row = this.rows[this.head[0]][this.head[1]];
    const text = element("p", "shaded", "", { "aria-label": "The text, shaded by this head's weights" });
    this.found.tokens.forEach((token, at) => {
      const span = element("span", at === row.length - 1 ? "looks" : "", inPlace(token), { title: percent(row[at]) });
      const [r, g, b] = color(Math.sqrt(row[at]));
      span.style.setProperty("background-color", `rgb(${r} ${g} ${b})`);
      if (0.299 * r + 0.587 * g + 0.114 * b < 128) span.classList.add("on-dark");
      else span.classList.add("on-light");
      text.append(span);
    });
    return text;
  }

  #drawMap(roots) {
    const tokens = this.found.tokens;
    const roomPx = Math.min(MOST_MAP_PX, this.map.parentElement.clientWidth);
    const { edge, cell } = drawMap(this.map, roots, tokens, scale(), roomPx);
    this.map.addEventListener("pointermove", (event) => {
      const [column, row] = [event.offsetX, event.offsetY].map((at) => Math.floor((at - edge) / cell));
      if (row < 0 || column < 0 || row >= tokens.length || column > row) return;
      const p = percent(roots[row * tokens.length + column] ** 2);
      this.readout.textContent = `${asLabel(tokens[row])} looks at ${asLabel(tokens[column])}: ${p}`;
    });
  }
}

// The page to write with: what each button and key does. The parts are in the modules that it imports.

import { ask, hasKey, keepKey } from "./api.js";
import { Alternatives } from "./alternatives.js";
import { Attention } from "./attention.js";
import { Editor, Plain } from "./editor.js";
import { Pane } from "./pane.js";
import { textOf } from "./pieces.js";
import { asCurl, asSample, keepValue, keptValue, N_ALTERNATIVES, newSeed, Settings } from "./settings.js";
import { BOUNDS } from "./sheet.js";
import { Talk } from "./talk.js";
import { element, percent } from "./visible.js";

const MOST_NEW = 128; // suggested, or half of the context
const MOST_TEXT_KEPT = 200_000; // characters of a text that outlives a reload
const DRAFT = "regpt2 draft";

const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
const byId = (id) => document.getElementById(id);
const isMac = /Mac|iPhone|iPad/.test(navigator.platform);

class Page {
  constructor() {
    this.models = [];
    this.last = null; // what the first model was asked for, and the text that became of it
    this.settings = new Settings(byId("settings-form"));
    this.initial = new Map([...byId("settings-form").elements].map((field) => [field.name, field.defaultValue]));
    const on = this.#reactions();
    this.first = new Pane(byId("first"), on, (sheet) => new Editor(byId("text"), sheet));
    this.second = new Pane(byId("second"), on, (sheet) => new Plain(sheet));
    this.talk = new Talk(this);
    this.attention = new Attention(byId("attention"), {
      closed: () => this.#back(),
      needsKey: (message, signal) => this.needKey(message, signal),
    });
    this.alternatives = new Alternatives(byId("alternatives"), {
      choose: (text, logprob) => this.#whatIf(text, logprob),
      back: () => this.#backToToken(),
    });
    this.marked = null; // the sheet with the token whose attention is shown
    this.looked = null; // {pane, sheet, index}: the token whose alternatives are shown
    this.#wire();
    this.#drawLegend();
  }

  get panes() {
    return this.second.root.hidden ? [this.first] : [this.first, this.second];
  }

  get isWriting() {
    return this.panes.some((pane) => pane.isWriting);
  }

  get isTalk() {
    return this.talk.isOn;
  }

  say(message) {
    byId("said").textContent = message;
  }

  // ---- models and key

  async load() {
    let models;
    try {
      ({ data: models } = await this.#askForModels());
    } catch (error) {
      this.first.say(`${error.message} Reload the page to try again.`);
      return;
    }
    this.models = models;
    for (const [id, none] of [["model", null], ["other", "none"]]) {
      const select = byId(id);
      const options = models.map((model) => new Option(model.id, model.id));
      select.replaceChildren(...(none ? [new Option(none, "")] : []), ...options);
      const kept = keptValue(id);
      if (models.some((model) => model.id === kept)) select.value = kept;
    }
    byId("other").parentElement.hidden = models.length < 2;
    this.pickModels();
    this.settings.suggest("max_tokens", Math.min(MOST_NEW, Math.floor(this.first.model.context_length / 2) || MOST_NEW));
    this.changed();
  }

  async #askForModels() {
    for (;;) {
      try {
        return await ask("/v1/models");
      } catch (error) {
        if (error.status !== 401) throw error;
        await this.needKey(error.message);
      }
    }
  }

  pickModels() {
    const named = (id) => this.models.find((model) => model.id === byId(id).value) ?? null;
    this.first.model = named("model") ?? this.models[0];
    this.second.model = named("other");
    this.second.root.hidden = this.second.model === null;
    document.body.classList.toggle("two", !this.second.root.hidden);
    for (const pane of this.panes) {
      const about = element("span", "faint", aboutModel(pane.model));
      pane.root.querySelector(".pane-name").replaceChildren(pane.model.id, " ", about);
    }
    byId("about").textContent = this.second.model ? "" : aboutModel(this.first.model);
    this.talk.offer(this.panes.every((pane) => pane.model.chat));
  }

  /** Ask for the key; resolves when there is one. */
  needKey(message, signal = null) {
    const form = byId("key-form");
    byId("key-why").textContent = message;
    form.hidden = false;
    byId("key").focus();
    return new Promise((resolve, reject) => {
      form.onsubmit = (event) => {
        event.preventDefault();
        keepKey(byId("key").value);
        byId("key").value = "";
        form.hidden = true;
        resolve();
      };
      signal?.addEventListener("abort", () => {
        form.hidden = true;
        reject(signal.reason);
      });
    });
  }

  // ---- writing

  /** After the text of the editor; the model beside gets the same text. */
  async write(seed = this.settings.seed || newSeed()) {
    if (this.models.length === 0) return this.load();
    if (this.isTalk) return this.talk.send(seed);
    this.first.paper.keep("model");
    if (this.panes.includes(this.second)) this.second.paper.set(this.first.paper.pieces, "model");
    return this.run(this.panes, seed);
  }

  async run(panes, seed, wasChanged = false) {
    this.alternatives.hide();
    this.say("Writing.");
    const fields = this.settings.fields(seed);
    const options = { logprobs: N_ALTERNATIVES, wasChanged };
    const runs = await Promise.all(panes.map((pane) => pane.write(fields, options)));
    if (panes[0] === this.first) this.last = { body: runs[0].body, text: this.first.paper.text };
    this.wrote(runs);
    this.changed();
  }

  wrote(runs) {
    const n = runs.reduce((sum, run) => sum + run.n, 0);
    this.say(`Wrote ${n} tokens.`);
  }

  stop() {
    for (const pane of this.panes) pane.stop();
  }

  async again() {
    this.undo();
    await this.write(newSeed());
  }

  undo() {
    if (this.isTalk) this.talk.takeBack();
    else if (this.first.paper.takeBack() && !this.second.root.hidden) this.second.paper.takeBack();
    this.changed();
  }

  #whatIf(text, logprob) {
    const { pane, sheet, index } = this.looked;
    this.alternatives.hide();
    if (pane.isWriting || sheet !== pane.sheet) return;
    const piece = pane.paper.pieces[index];
    const mark = { logprob, top: piece.mark.top, first: text, n: 1, swapped: true };
    pane.paper.set([...pane.paper.pieces.slice(0, index), { text, mark }], "model");
    pane.sheet.focusToken(index);
    this.alternatives.hide();
    void this.run([pane], this.settings.seed || newSeed(), true);
  }

  // ---- looking at tokens

  #reactions() {
    return {
      look: (pane, sheet, index, how) => this.#look(pane, sheet, index, how),
      leave: () => this.alternatives.leave(),
      enter: (pane, sheet, index) => this.#attend(pane, sheet, index),
      down: () => this.alternatives.enter(),
      out: (pane) => {
        this.alternatives.hide();
        if (this.isWriting) this.stop();
        if (pane === this.first && !this.isTalk) byId("text").focus();
        else byId("write").focus();
      },
      changed: () => this.changed(),
      needsKey: (message, signal) => this.needKey(message, signal),
      seed: (seed) => {
        byId("seed").value = seed;
        this.settings.keep();
        this.changed();
      },
    };
  }

  #look(pane, sheet, index, how) {
    if (how === "hover" && this.alternatives.pinned) return;
    this.looked = { pane, sheet, index };
    const whatIf = sheet === pane.sheet && !pane.isWriting;
    const options = { pinned: how !== "hover", whatIf };
    if (!(how === "click" && this.isWriting)) this.alternatives.show(sheet.elementOf(index), sheet.pieces[index], options);
    if (how === "click" && byId("on-click").checked && !pane.isWriting) this.#attend(pane, sheet, index);
  }

  #attend(pane, sheet, index) {
    this.marked?.mark(null);
    this.marked = sheet;
    sheet.mark(index);
    this.looked = { pane, sheet, index };
    const text = textOf(sheet.pieces.slice(0, index + 1));
    void this.attention.open({ model: pane.model.id, text, ...sheet.before }, sheet.pieces[index].text);
  }

  #backToToken() {
    if (this.looked) this.looked.sheet.focusToken(this.looked.index);
  }

  /** The attention panel was closed. */
  #back() {
    this.marked?.mark(null);
    if (this.looked && document.activeElement === document.body) this.#backToToken();
  }

  // ---- the rest of the page

  changed() {
    const isWriting = this.isWriting;
    byId("text").readOnly = isWriting;
    byId("write").disabled = isWriting;
    byId("stop").disabled = !isWriting;
    const canUndo = !isWriting && (this.isTalk ? this.talk.canTakeBack : this.first.paper.canTakeBack);
    byId("again").disabled = byId("undo").disabled = !canUndo;
    byId("take-over").hidden = isWriting || this.second.paper.pieces.length === 0 || this.isTalk;
    if (!isWriting) this.#keepDraft();
    this.#drawCommands();
  }

  #keepDraft() {
    const text = this.first.paper.text;
    try {
      if (text.length <= MOST_TEXT_KEPT) sessionStorage.setItem(DRAFT, text);
    } catch {
      // forbidden or full: a reload loses the text
    }
  }

  /** What made the text that is here, so that it can be made again; of another text, what Write would ask for. */
  #drawCommands() {
    if (!byId("commands").open || !this.first.model) return;
    const fields = this.settings.fields(this.settings.seed || (this.last?.body.seed ?? 42));
    const model = this.first.model.id;
    if (this.isTalk) {
      const body = { model, messages: this.talk.messages, ...fields };
      byId("curl").textContent = asCurl("/v1/chat/completions", body, hasKey());
      byId("sample").textContent = `regpt2 chat ${model}`;
      return;
    }
    const text = this.first.paper.text;
    const isMade = this.last?.text === text && this.last.body.model === model;
    const { logprobs: _, ...body } = isMade ? this.last.body : { model, prompt: text, ...fields };
    byId("curl").textContent = asCurl("/v1/completions", body, hasKey());
    byId("sample").textContent = asSample(body);
    byId("commands-of").textContent = isMade ? "They write this text again." : "They do what Write would do.";
  }

  #drawLegend() {
    const bounds = [1, ...BOUNDS];
    const steps = bounds.map((bound, step) => {
      const low = bounds[step + 1] ?? 0;
      return element("i", `step s${step}`, "", { title: `${percent(low)} to ${percent(bound)}` });
    });
    const click = element("input", "", "", { type: "checkbox", id: "on-click" });
    click.checked = keptValue("on_click") !== "no";
    click.addEventListener("change", () => keepValue("on_click", click.checked ? "yes" : "no"));
    const label = element("label", "switch");
    label.append(click, " attention on click");
    const scale = element("span", "steps", "", { role: "img", "aria-label": "from likely, no shade, to unlikely, dark" });
    scale.append("likely ", ...steps, " unlikely");
    byId("legend").append(label, scale);
  }

  #wire() {
    const clicks = {
      write: () => this.write(),
      stop: () => this.stop(),
      again: () => this.again(),
      undo: () => this.undo(),
      reset: () => this.#reset(),
      "take-over": () => this.first.paper.set(this.second.paper.pieces, "typing"),
      "as-text": () => this.talk.switchTo(false),
      "as-talk": () => this.talk.switchTo(true),
    };
    for (const [id, act] of Object.entries(clicks)) byId(id).addEventListener("click", act);
    for (const id of ["model", "other"]) {
      byId(id).addEventListener("change", () => {
        keepValue(id, byId(id).value);
        this.pickModels();
        this.changed();
      });
    }
    byId("text").addEventListener("changed", () => this.#edited());
    byId("settings-form").addEventListener("input", () => this.#drawCommands());
    byId("commands").addEventListener("toggle", () => this.#drawCommands());
    for (const button of document.querySelectorAll("[data-copy]")) {
      button.addEventListener("click", () => this.#copy(button));
    }
    document.addEventListener("keydown", (event) => this.#key(event));
    document.addEventListener("pointerdown", (event) => {
      if (!event.target.closest?.(".alternatives, .token, .editor")) this.alternatives.hide();
    });
    document.querySelector(".keys").textContent = isMac ? "⌘ ⏎" : "Ctrl ⏎";
    if (matchMedia("(max-width: 60rem)").matches) byId("settings").open = false;
    this.#readDraft();
  }

  #readDraft() {
    try {
      const text = sessionStorage.getItem(DRAFT);
      if (text) this.first.paper.set([{ text, mark: null }]);
    } catch {
      // as above
    }
  }

  #edited() {
    this.alternatives.hide();
    this.changed();
  }

  #reset() {
    for (const field of byId("settings-form").elements) {
      if (field.name) field.value = this.initial.get(field.name) ?? "";
    }
    if (this.first.model) {
      this.settings.suggest("max_tokens", Math.min(MOST_NEW, Math.floor(this.first.model.context_length / 2) || MOST_NEW));
    }
    this.settings.keep();
    this.changed();
  }

  async #copy(button) {
    const text = byId(button.dataset.copy).textContent;
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(byId(button.dataset.copy));
      button.textContent = "Selected: copy it with the keyboard";
    }
    setTimeout(() => (button.textContent = "Copy"), 2000);
  }

  #key(event) {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      if (!this.isWriting) void this.write();
    } else if (event.key === "Escape") {
      if (this.isWriting) this.stop();
      else this.alternatives.hide();
    }
  }
}

/** Its size and its context, as far as the server tells them. */
function aboutModel({ parameters, context_length: context }) {
  const known = [];
  if (parameters) known.push(`${compact.format(parameters).replace("K", "k")} parameters`);
  if (context) known.push(`${context.toLocaleString()} tokens of context`);
  return known.join(", ");
}

const page = new Page();
await page.load();
byId("text").focus({ preventScroll: true });
document.documentElement.dataset.ready = "yes"; // for tests

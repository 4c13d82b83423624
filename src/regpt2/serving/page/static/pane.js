// A model and the text that it writes. In: the elements of a pane; out: a text that grows, and what happened to it.

import { Assembler } from "./pieces.js";
import { generated } from "./generation.js";
import { Sheet } from "./sheet.js";
import { element } from "./visible.js";

const ROOM_PX = 96; // between the last line and the lower edge of the window: the buttons are there

export class Pane {
  /** `on`: look(pane, index, how), leave(), enter(pane, index), down(), out(pane), changed(), needsKey(), seed(seed). */
  constructor(root, on, makePaper) {
    this.root = root;
    this.on = on;
    this.model = null;
    this.control = null; // aborts what is being written
    this.facts = root.querySelector(".facts");
    this.note = root.querySelector(".notice");
    this.sheet = this.sheetIn(root.querySelector(".sheet"));
    this.paper = makePaper(this.sheet);
  }

  sheetIn(box) {
    const sheet = new Sheet(box, {
      look: (index, how) => this.on.look(this, sheet, index, how),
      leave: () => this.on.leave(),
      enter: (index) => this.on.enter(this, sheet, index),
      down: () => this.on.down(),
      out: () => this.on.out(this),
    });
    return sheet;
  }

  get isWriting() {
    return this.control !== null;
  }

  stop() {
    this.control?.abort(new DOMException("stopped", "AbortError"));
  }

  say(message, { calm = false } = {}) {
    this.note.hidden = message === "";
    this.note.classList.toggle("calm", calm);
    this.note.textContent = message;
  }

  /** Write after the text; if nothing comes, there is nothing to undo, unless the text `wasChanged` before. */
  async write(fields, { logprobs, wasChanged }) {
    const body = { model: this.model.id, prompt: this.paper.text, ...fields, logprobs };
    const run = await this.take(body, (pieces) => this.paper.append(pieces));
    if (run.n === 0 && !wasChanged) this.paper.drop();
    return run;
  }

  /** What the server writes for this body, handed to `add` in pieces. The text stays, whatever ends it. */
  async take(body, add) {
    this.stop();
    const control = new AbortController();
    this.control = control;
    this.say("");
    this.facts.replaceChildren();
    const run = { n: 0, startedAt: performance.now(), seed: body.seed, body, read: "", reason: null };
    const drawing = new Drawing(add, this.sheet.layer);
    const ways = {
      signal: control.signal,
      context: this.model.context_length,
      say: (message) => this.say(message, { calm: true }),
      cut: (prompt) => {
        run.body = { ...body, prompt };
        run.read = `read the last ${prompt.length.toLocaleString()} of ${body.prompt.length.toLocaleString()} characters`;
      },
      needsKey: (message, signal) => this.on.needsKey(message, signal),
    };
    this.on.changed();
    try {
      const assembler = new Assembler();
      for await (const [text, tokens, reason] of generated(body, ways)) {
        run.n += tokens.length;
        run.reason = reason ?? run.reason;
        drawing.add(assembler.take(text, tokens));
        this.#tell(run);
      }
    } catch (error) {
      if (error.name !== "AbortError") this.say(error.message);
      else if (this.note.classList.contains("calm")) this.say("");
      run.reason = error.name === "AbortError" ? "stopped" : "broken";
    } finally {
      drawing.end();
      if (this.control === control) this.control = null;
      this.#tell(run, { isDone: true });
      this.on.changed();
    }
    return run;
  }

  #tell(run, { isDone = false } = {}) {
    if (run.n === 0) return;
    const seconds = (performance.now() - run.startedAt) / 1000;
    const parts = [`${run.n.toLocaleString()} token${run.n === 1 ? "" : "s"}`];
    if (seconds > 0) parts.push(`${Math.round(run.n / seconds).toLocaleString()} tokens/s`);
    const why = { stop: "the text is complete", stopped: "stopped", broken: "cut off" }[run.reason];
    if (isDone && why) parts.push(why);
    if (run.read) parts.push(run.read);
    const seed = element("button", "plain seed", `seed ${run.seed}`, { type: "button" });
    seed.title = "Keep this seed: the same text again";
    seed.addEventListener("click", () => this.on.seed(run.seed));
    this.facts.replaceChildren(element("span", "", parts.join(" · ")), " · ", seed);
  }
}

/** Adds pieces once a frame, and keeps the end in view for those who have it in view. */
class Drawing {
  #new = [];
  #frame = 0;

  constructor(add, layer) {
    this.put = add;
    this.layer = layer;
  }

  add(pieces) {
    this.#new.push(...pieces);
    if (document.hidden) this.#draw();
    else this.#frame ||= requestAnimationFrame(() => this.#draw());
  }

  end() {
    this.#draw();
  }

  #draw() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    if (this.#new.length === 0) return;
    const before = this.#below();
    this.put(this.#new.splice(0));
    const now = this.#below();
    if (before <= ROOM_PX && now > 0) window.scrollBy(0, now);
  }

  /** How far the end of the text is below the part of the window that shows it. */
  #below() {
    const last = this.layer.isConnected ? this.layer.lastChild : null;
    return last ? last.getBoundingClientRect().bottom - (window.innerHeight - ROOM_PX) : 0;
  }
}

// A text that a person and a model write together. In: typing, tokens; out: pieces, each step of which can be undone.
// The text area takes the keys; its letters are transparent. The sheet below it draws them, and must wrap alike.

import { afterEdit, shownOf, textOf } from "./pieces.js";

const MOST_STEPS = 200; // kept for undo
const PAUSE_MS = 1000; // typing after a pause is a step of its own

export class Editor {
  constructor(area, sheet) {
    this.area = area;
    this.sheet = sheet;
    this.pieces = [];
    this.steps = []; // {pieces, caret, by}: what was before each step; by: "typing", "model"
    this.undone = [];
    this.typedAt = 0;
    area.addEventListener("input", () => this.#typed());
    area.addEventListener("beforeinput", (event) => {
      if (event.inputType === "historyUndo" || event.inputType === "historyRedo") {
        event.preventDefault(); // the browser does not know what the model wrote
        if (event.inputType === "historyUndo") this.undo();
        else this.redo();
      }
    });
    area.addEventListener("keydown", (event) => this.#key(event));
  }

  get text() {
    return textOf(this.pieces);
  }

  /** Replace all; `by` null: this is no step of its own. */
  set(pieces, by = null, caret = null) {
    if (by) this.keep(by);
    this.pieces = pieces;
    this.#draw(caret ?? this.area.value.length);
    if (caret === null) this.area.setSelectionRange(this.area.value.length, this.area.value.length);
  }

  append(pieces) {
    this.pieces = [...this.pieces, ...pieces];
    this.#draw();
  }

  /** What is now can be come back to. */
  keep(by) {
    this.steps.push({ pieces: this.pieces, caret: this.area.selectionEnd, by });
    if (this.steps.length > MOST_STEPS) this.steps.shift();
    this.undone = [];
    this.typedAt = 0;
  }

  undo() {
    this.#move(this.steps, this.undone);
  }

  redo() {
    this.#move(this.undone, this.steps);
  }

  /** Is there something of the model's to take back? */
  get canTakeBack() {
    return this.steps.some((step) => step.by === "model");
  }

  /** Back to before the last time that the model wrote; true if it did. */
  takeBack() {
    if (!this.canTakeBack) return false;
    while (this.steps.at(-1).by !== "model") this.undo();
    this.undo();
    return true;
  }

  #move(from, to) {
    const step = from.pop();
    if (!step || this.area.readOnly) {
      if (step) from.push(step);
      return;
    }
    to.push({ pieces: this.pieces, caret: this.area.selectionEnd, by: step.by });
    this.pieces = step.pieces;
    this.typedAt = 0;
    this.#draw(step.caret);
    this.area.dispatchEvent(new Event("changed"));
  }

  #typed() {
    const now = performance.now();
    if (now - this.typedAt > PAUSE_MS) this.keep("typing");
    this.typedAt = now;
    this.pieces = afterEdit(this.pieces, this.area.value);
    this.sheet.show(this.pieces);
    this.area.dispatchEvent(new Event("changed"));
  }

  #draw(caret = null) {
    this.sheet.show(this.pieces);
    const shown = shownOf(this.pieces);
    if (this.area.value !== shown) this.area.value = shown;
    if (caret !== null) this.area.setSelectionRange(caret, caret);
  }

  #key(event) {
    if (!(event.ctrlKey || event.metaKey) || event.altKey) return;
    const key = event.key.toLowerCase();
    if (key === "z" && !event.shiftKey) this.undo();
    else if (key === "y" || (key === "z" && event.shiftKey)) this.redo();
    else return;
    event.preventDefault();
  }
}

/** The same for a text that only the model writes. */
export class Plain {
  constructor(sheet) {
    this.sheet = sheet;
    this.pieces = [];
    this.steps = [];
  }

  get text() {
    return textOf(this.pieces);
  }

  set(pieces, by = null) {
    if (by) this.keep(by);
    this.pieces = pieces;
    this.sheet.show(pieces);
  }

  append(pieces) {
    this.set([...this.pieces, ...pieces]);
  }

  keep() {
    this.steps.push(this.pieces);
  }

  takeBack() {
    if (this.steps.length > 0) this.set(this.steps.pop());
  }
}

// A text with the probability of each token as shade. In: pieces (pieces.js); out: elements, and what is done to them.

import { STALE } from "./pieces.js";
import { asLabel, element, inPlace, percent } from "./visible.js";

// Steps of shade: a token less likely than the first bound has shade 1, and so on. Equal steps of surprise, roughly.
export const BOUNDS = [0.8, 0.5, 0.25, 0.1, 0.03, 0.01, 0.001];

export function shadeOf(logprob) {
  const p = Math.exp(logprob);
  return BOUNDS.filter((bound) => p < bound).length;
}

export class Sheet {
  /** `on`: look(index, how) when a token gets attention; leave(); enter(index); down(index); out() from the keyboard. */
  constructor(box, on) {
    this.box = box; // takes the pointer
    this.layer = box.querySelector(".layer"); // has the tokens
    this.on = on;
    this.pieces = [];
    this.before = {}; // fields of a request for attention: what came before the text
    this.focused = null; // the token that Tab reaches
    this.layer.addEventListener("keydown", (event) => this.#key(event));
    this.layer.addEventListener("focusin", (event) => this.#focus(event.target));
    box.addEventListener("pointermove", (event) => {
      if (event.pointerType === "mouse" && event.buttons === 0) this.#hover(event);
    });
    box.addEventListener("pointerleave", () => this.on.leave());
    box.addEventListener("click", (event) => {
      const index = this.at(event.clientX, event.clientY);
      if (index !== null && !this.#isSelecting()) this.on.look(index, "click");
    });
  }

  /** Show these pieces. Elements of those that are the same stay. */
  show(pieces) {
    let same = 0;
    while (same < pieces.length && pieces[same] === this.pieces[same]) same++;
    while (this.layer.childNodes.length > same) this.layer.lastChild.remove();
    for (const piece of pieces.slice(same)) this.layer.append(this.#drawn(piece));
    this.pieces = pieces;
    if (!this.focused?.isConnected) this.#reach(this.tokens().at(-1) ?? null);
  }

  /** The elements of all tokens that have a probability, in order. */
  tokens() {
    return [...this.layer.querySelectorAll(".token")];
  }

  elementOf(index) {
    return this.layer.childNodes[index] ?? null;
  }

  focusToken(index) {
    const token = this.elementOf(index);
    if (token) this.#reach(token);
    token?.focus({ preventScroll: true });
  }

  /** The index of the token at this place of the window, or null. */
  at(x, y) {
    const found = document.elementsFromPoint(x, y).find((one) => one.classList.contains("token"));
    return found && this.layer.contains(found) ? this.indexOf(found) : null;
  }

  indexOf(token) {
    return [...this.layer.childNodes].indexOf(token);
  }

  mark(index) {
    this.layer.querySelector(".chosen")?.classList.remove("chosen");
    if (index !== null) this.elementOf(index)?.classList.add("chosen");
  }

  /** A text was marked with the pointer: that is no click on its last token. */
  #isSelecting() {
    const area = this.box.querySelector("textarea");
    return area ? area.selectionStart !== area.selectionEnd : !getSelection().isCollapsed;
  }

  #drawn(piece) {
    const { mark } = piece;
    const isRead = this.box.querySelector("textarea") !== null; // a screen reader has it from there
    const plain = isRead ? { "aria-hidden": "true" } : {};
    if (mark === null) return element("span", "mine", inPlace(piece.text), plain);
    if (mark === STALE) return element("span", "stale", inPlace(piece.text), plain);
    const kind = `token s${shadeOf(mark.logprob)}${mark.swapped ? " swapped" : ""}${/[\r\n]/.test(piece.text) ? " ends-line" : ""}`;
    return element("span", kind, inPlace(piece.text), { tabindex: "-1", role: "button" });
  }

  #reach(token) {
    this.focused?.setAttribute("tabindex", "-1");
    token?.setAttribute("tabindex", "0");
    this.focused = token;
  }

  #hover(event) {
    const index = this.at(event.clientX, event.clientY);
    if (index === null) this.on.leave();
    else this.on.look(index, "hover");
  }

  #focus(token) {
    if (!token.classList.contains("token")) return;
    this.#reach(token);
    const index = this.indexOf(token);
    token.setAttribute("aria-label", describe(this.pieces[index]));
    this.on.look(index, "focus");
  }

  #key(event) {
    const tokens = this.tokens();
    const at = tokens.indexOf(event.target);
    if (at < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tokens.length - 1 }[event.key];
    if (to !== undefined) tokens[Math.min(Math.max(to, 0), tokens.length - 1)].focus();
    else if (event.key === "Enter" || event.key === " ") this.on.enter(this.indexOf(event.target));
    else if (event.key === "ArrowDown") this.on.down(this.indexOf(event.target));
    else if (event.key === "Escape") this.on.out();
    else return;
    event.preventDefault();
    event.stopPropagation();
  }
}

/** A token in words, for a screen reader. */
function describe(piece) {
  const { mark, text } = piece;
  const rank = mark.top.findIndex(([other]) => other === mark.first);
  const place = rank < 0 ? "not among the likeliest" : rank === 0 ? "the likeliest" : `number ${rank + 1}`;
  return `${asLabel(text)}, ${percent(Math.exp(mark.logprob))}, ${place}. Down for others, Enter for attention.`;
}

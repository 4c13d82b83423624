// What a token might have been. In: a piece and its element; out: a small list beside it, and the choice made there.

import { asLabel, bar, element, percent } from "./visible.js";

const HIDE_MS = 250; // time to move the pointer from a token into the list

export class Alternatives {
  /** `box`: the list's element; `on`: choose(text), back(). */
  constructor(box, on) {
    this.box = box;
    this.on = on;
    this.anchor = null;
    this.timer = 0;
    box.addEventListener("pointerenter", () => clearTimeout(this.timer));
    box.addEventListener("pointerleave", () => this.leave());
    box.addEventListener("keydown", (event) => this.#key(event));
    window.addEventListener("resize", () => this.hide());
  }

  get shown() {
    return !this.box.hidden;
  }

  /** Beside `anchor`, what `piece` might have been; `pinned`: until something else is looked at. */
  show(anchor, piece, { pinned = false, whatIf = true } = {}) {
    clearTimeout(this.timer);
    this.pinned = pinned;
    if (this.anchor === anchor && this.shown) return;
    this.anchor = anchor;
    this.box.replaceChildren(...this.#content(piece, whatIf));
    this.box.hidden = false;
    this.#place();
  }

  /** Soon, unless the pointer comes back. */
  leave() {
    clearTimeout(this.timer);
    if (!this.pinned) this.timer = setTimeout(() => this.hide(), HIDE_MS);
  }

  hide() {
    clearTimeout(this.timer);
    this.box.hidden = true;
    this.anchor = null;
    this.pinned = false;
  }

  /** Move the keyboard into the list. */
  enter() {
    this.box.querySelector("button:not(:disabled)")?.focus();
  }

  #content(piece, whatIf) {
    const { mark } = piece;
    const list = element("ol");
    for (const [text, logprob] of mark.top) list.append(this.#row(text, Math.exp(logprob), text === mark.first, whatIf));
    const hints = [];
    if (mark.n > 1) hints.push(`The first of the ${mark.n} tokens of “${asLabel(piece.text)}”.`);
    if (whatIf) hints.push("Choose one to write on from there.");
    return hints.length ? [list, element("p", "faint", hints.join(" "))] : [list];
  }

  #row(text, p, isDrawn, whatIf) {
    const row = element("li");
    const name = nameOf(text);
    const button = element("button", isDrawn ? "drawn" : "", "", { type: "button" });
    button.append(element("span", "name", name), bar(p), element("span", "p", percent(p)));
    button.disabled = !whatIf || isDrawn || name !== asLabel(text);
    button.addEventListener("click", () => this.on.choose(text, Math.log(p)));
    row.append(button);
    return row;
  }

  #place() {
    const place = this.anchor.getClientRects()[0];
    const { offsetWidth: width, offsetHeight: height } = this.box;
    const left = Math.max(8, Math.min(place.left - 12, document.documentElement.clientWidth - width - 8));
    const below = place.bottom + 6;
    const top = below + height > window.innerHeight - 8 && place.top - height - 6 > 8 ? place.top - height - 6 : below;
    this.box.style.setProperty("left", `${left + window.scrollX}px`);
    this.box.style.setProperty("top", `${top + window.scrollY}px`);
  }

  #key(event) {
    const buttons = [...this.box.querySelectorAll("button:not(:disabled)")];
    const at = buttons.indexOf(document.activeElement);
    if (event.key === "ArrowDown" && at >= 0) buttons[Math.min(at + 1, buttons.length - 1)].focus();
    else if (event.key === "ArrowUp" && at > 0) buttons[at - 1].focus();
    else if (["ArrowUp", "ArrowLeft", "Escape"].includes(event.key)) this.on.back();
    else return;
    event.preventDefault();
    event.stopPropagation();
  }
}

/** A part of a character and an id without text cannot be put into a text. */
function nameOf(text) {
  if (text.startsWith("bytes:\\x")) return text.slice(6);
  if (text.startsWith("token_id:")) return "end of text";
  return asLabel(text);
}

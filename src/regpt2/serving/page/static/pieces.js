// A text and where each part of it is from. In: edits, tokens; out: a new list of pieces.
// A piece is {text, mark}. mark null: the user wrote it. Else the model did, and mark is {logprob, top, n},
// top being [text, logprob] of the likeliest tokens there, or STALE once a change before it made that untrue.

import { inPlace } from "./visible.js";

export const STALE = Object.freeze({ stale: true });

export function textOf(pieces) {
  return pieces.map((piece) => piece.text).join("");
}

/** The text as the editor shows it, as long as the text itself. */
export function shownOf(pieces) {
  return inPlace(textOf(pieces));
}

/** The pieces after the text from start to end was replaced. */
export function replaced(pieces, start, end, inserted) {
  const before = [];
  const after = [];
  let at = 0;
  let left = "";
  let right = "";
  for (const piece of pieces) {
    const stop = at + piece.text.length;
    if (stop <= start) before.push(piece);
    else if (at >= end) after.push(piece.mark ? { text: piece.text, mark: STALE } : piece);
    else {
      left += piece.text.slice(0, Math.max(0, start - at));
      right += piece.text.slice(Math.max(0, end - at));
    }
    at = stop;
  }
  return joined([...before, { text: left + inserted + right, mark: null }, ...after]);
}

/** What became of the pieces when the editor shows `shown`: one stretch differs. */
export function afterEdit(pieces, shown) {
  const old = shownOf(pieces);
  const most = Math.min(old.length, shown.length);
  let same = 0;
  while (same < most && old[same] === shown[same]) same++;
  let tail = 0;
  while (tail < most - same && old[old.length - 1 - tail] === shown[shown.length - 1 - tail]) tail++;
  return replaced(pieces, same, old.length - tail, shown.slice(same, shown.length - tail));
}

/** Neighbors of one kind become one, empty ones none. */
function joined(pieces) {
  const kept = [];
  for (const piece of pieces) {
    const last = kept.at(-1);
    if (!piece.text) continue;
    if (last && last.mark === piece.mark && (!piece.mark || piece.mark === STALE)) {
      kept[kept.length - 1] = { text: last.text + piece.text, mark: piece.mark };
    } else kept.push(piece);
  }
  return kept;
}

/** Makes pieces of a stream. A token within a character has no text yet: it waits for the next. */
export class Assembler {
  #waiting = [];

  /** Take the text of an event and its tokens [{text, logprob, top}]; return the pieces that are now complete. */
  take(text, tokens) {
    this.#waiting.push(...tokens);
    if (!text) return [];
    const waiting = this.#waiting;
    this.#waiting = [];
    if (waiting.length === 0) return [{ text, mark: STALE }];
    if (waiting.map((token) => token.text).join("") === text) {
      return waiting.filter((token) => token.text).map((token) => piece(token.text, [token]));
    }
    return [piece(text, waiting)];
  }
}

function piece(text, tokens) {
  const logprob = tokens.reduce((sum, token) => sum + token.logprob, 0);
  return { text, mark: { logprob, top: tokens[0].top, first: tokens[0].text, n: tokens.length } };
}

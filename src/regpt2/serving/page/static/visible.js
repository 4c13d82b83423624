// Text of a model or a file, made harmless to read. In: any text; out: the same with nothing that acts unseen.

// Those that reorder a line: embeddings, overrides, isolates.
const REORDERS = /[\u202a-\u202e\u2066-\u2069]/;
const HIDDEN = /[\u0000-\u001f\u007f-\u009f\u00ad\u200b-\u200f\u2028\u2029\u202a-\u202e\u2060-\u2069\ufeff]/g;
const OBEYED = /[\u0000-\u0008\u000b-\u001f\u007f\u202a-\u202e\u2066-\u2069]/g;

/** As long as the text, unit by unit: control characters become their pictures, reordering ones a sign. */
export function inPlace(text) {
  return text.replace(OBEYED, (one) => {
    if (REORDERS.test(one)) return "\u2426";
    return one === "\u007f" ? "\u2421" : String.fromCharCode(0x2400 + one.charCodeAt(0));
  });
}

/** A token by itself, on one line: spaces and line ends visible, all else that is hidden as an escape. */
export function asLabel(text) {
  const named = text.replaceAll(" ", "\u2423").replaceAll("\n", "\u21b5").replaceAll("\t", "\u21e5");
  return named.replace(HIDDEN, (one) => `\\u${one.charCodeAt(0).toString(16).padStart(4, "0")}`);
}

/** A probability as people read it. */
export function percent(p) {
  if (p >= 0.9995) return "100%";
  if (p >= 0.1) return `${(100 * p).toFixed(0)}%`;
  if (p >= 0.001) return `${(100 * p).toFixed(1)}%`;
  return p >= 0.0001 ? `${(100 * p).toFixed(2)}%` : "<0.01%";
}

/** An element with a class, a text and attributes. Text is only ever set as text. */
export function element(tag, kind = "", text = "", attributes = {}) {
  const made = document.createElement(tag);
  if (kind) made.className = kind;
  if (text) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

/** A bar as long as a probability. The number stands beside it, so it says nothing to a screen reader. */
export function bar(p) {
  const made = element("span", "bar", "", { "aria-hidden": "true" });
  const filled = element("i");
  filled.style.setProperty("width", `${100 * p}%`);
  made.append(filled);
  return made;
}

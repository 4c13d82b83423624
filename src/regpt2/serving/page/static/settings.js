// How to write. In: the form; out: the fields of a request, kept in localStorage, and the same as commands.

const KEPT = "regpt2 settings";
const NUMBERS = ["max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"];
const DEFAULTS = { top_k: "0", top_p: "1", min_p: "0", repetition_penalty: "1" }; // sent only if others
export const N_ALTERNATIVES = 10;

export class Settings {
  constructor(form) {
    this.form = form;
    const kept = read();
    for (const field of form.elements) {
      if (field.name && typeof kept[field.name] === "string") field.value = kept[field.name];
    }
    form.addEventListener("input", () => this.keep());
    form.addEventListener("submit", (event) => event.preventDefault());
  }

  keep() {
    try {
      const values = [...this.form.elements].filter((field) => field.name).map((field) => [field.name, field.value]);
      localStorage.setItem(KEPT, JSON.stringify({ ...read(), ...Object.fromEntries(values) }));
    } catch {
      // storage is full or forbidden: the settings last as long as the page
    }
  }

  /** A first value for a field that nobody has set. */
  suggest(name, value) {
    const field = this.form.elements[name];
    if (field.value === "") field.value = String(value);
  }

  value(name) {
    return this.form.elements[name].value;
  }

  get seed() {
    return this.value("seed").trim();
  }

  /** Text that ends the answer: one a line, \n and \t as in code. */
  get stop() {
    const lines = this.value("stop").split("\n").filter((line) => line !== "");
    return lines.map((line) => line.replace(/\\([nt\\])/g, (_, one) => ({ n: "\n", t: "\t", "\\": "\\" })[one]));
  }

  /** Fields of a request; what is no number is sent as it is, so that the server says what is wrong. */
  fields(seed) {
    const fields = {};
    for (const name of NUMBERS) {
      const text = this.value(name).trim();
      if (text !== "" && text !== DEFAULTS[name]) fields[name] = asNumber(text);
    }
    if (this.stop.length > 0) fields.stop = this.stop;
    return { ...fields, seed: asNumber(String(seed)) };
  }
}

function asNumber(text) {
  const number = Number(text);
  return Number.isFinite(number) ? number : text;
}

function read() {
  try {
    return JSON.parse(localStorage.getItem(KEPT)) ?? {};
  } catch {
    return {};
  }
}

/** Kept beside the settings: which models, which switches. */
export function keptValue(name) {
  return read()[name];
}

export function keepValue(name, value) {
  try {
    localStorage.setItem(KEPT, JSON.stringify({ ...read(), [name]: value }));
  } catch {
    // as above
  }
}

export function newSeed() {
  return crypto.getRandomValues(new Uint32Array(1))[0] >>> 1; // 31 bits
}

/** The same request as a command. */
export function asCurl(path, body, hasKey) {
  const key = hasKey ? ` \\\n  -H "Authorization: Bearer $REGPT2_API_KEY"` : "";
  const data = quoted(JSON.stringify(body));
  return `curl ${location.origin}${path} \\\n  -H 'Content-Type: application/json'${key} \\\n  -d ${data}`;
}

/** And without a server: the model's path is the user's to fill in, an answer never names it. */
export function asSample({ model, prompt, max_tokens: most, stop = [], ...others }) {
  const options = most === undefined ? [] : [`--max-new-tokens ${most}`];
  for (const [name, value] of Object.entries({ top_k: 0, ...others })) {
    options.push(`--${name.replaceAll("_", "-")} ${value}`);
  }
  for (const text of stop) options.push(`--stop ${quoted(text)}`);
  const place = /^[\w.-]+$/.test(model) ? `runs/${model}` : model;
  const first = prompt.startsWith("-") ? `-- ${quoted(prompt)}` : "";
  const lines = [`regpt2 sample ${quotedIfNeeded(place)}${first ? "" : ` ${quoted(prompt)}`}`, ...options];
  return [...lines, ...(first ? [first] : [])].join(" \\\n  ");
}

function quoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

function quotedIfNeeded(text) {
  return /^[\w./:-]+$/.test(text) ? text : quoted(text);
}

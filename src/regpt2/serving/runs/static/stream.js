// Server-sent events, with the API key if there is one. In: an address; out: calls for each event and each change of state.
// EventSource could send no key. A hidden tab is not served: browsers open few connections to one server.

const KEY = "regpt2 key"; // in sessionStorage: gone with the tab; the page to write with uses it too
const FIRST_WAIT_MS = 1000;
const LONGEST_WAIT_MS = 15000;
const SILENT_MS = 40000; // the server sends something every 15 s

export function headers() {
  const key = sessionStorage.getItem(KEY);
  return key ? { authorization: `Bearer ${key}` } : {};
}

export function hasKey() {
  return Boolean(sessionStorage.getItem(KEY));
}

/**
 * Follow an address for as long as the page is open.
 *
 * onEvent(kind, data) for each event; onState("on" | "off" | "key" | "gone", text) as the connection changes.
 */
export function follow(address, onEvent, onState) {
  let waitMs = FIRST_WAIT_MS;
  let timer = null;
  let control = null;

  async function connect() {
    clearTimeout(timer);
    const mine = (control = new AbortController());
    let why = "The server does not answer.";
    try {
      const response = await fetch(address, { headers: headers(), signal: mine.signal, cache: "no-store" });
      if (response.status === 401) return onState("key", "");
      if (response.status === 404) return onState("gone", "");
      if (response.ok) {
        waitMs = FIRST_WAIT_MS;
        onState("on", "");
        await read(response.body, mine, onEvent);
        why = "The server closed the connection.";
      } else {
        why = await messageOf(response);
      }
    } catch (error) {
      if (error.name !== "AbortError" && error.name !== "TypeError" && error.name !== "NetworkError") console.warn(error);
    }
    if (mine !== control || document.hidden) return null;
    onState("off", `${why} This page shows what was there; it tries again.`);
    timer = setTimeout(connect, waitMs);
    waitMs = Math.min(LONGEST_WAIT_MS, 2 * waitMs);
    return null;
  }

  function stop() {
    clearTimeout(timer);
    const old = control;
    control = null;
    old?.abort();
  }

  function again() {
    stop();
    waitMs = FIRST_WAIT_MS;
    connect();
  }

  document.addEventListener("visibilitychange", () => (document.hidden ? stop() : again()));
  addEventListener("online", again);
  connect();
  return again;
}

/** Read events until the stream ends; one that is silent for long is given up. */
async function read(body, control, onEvent) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let silence = null;
  for (;;) {
    clearTimeout(silence);
    silence = setTimeout(() => control.abort(), SILENT_MS);
    const { value, done } = await reader.read();
    if (done) break;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const event = Object.fromEntries(block.split("\n").map((line) => [line.split(":", 1)[0], line.slice(line.indexOf(":") + 1).trim()]));
      if (event.event) onEvent(event.event, JSON.parse(event.data));
    }
  }
  clearTimeout(silence);
}

/** Read events of an address until onEvent says that they are enough. */
export async function readOnce(address, onEvent) {
  const control = new AbortController();
  try {
    const response = await fetch(address, { headers: headers(), signal: control.signal, cache: "no-store" });
    if (!response.ok) return;
    let enough = false;
    await read(response.body, control, (kind, data) => {
      enough = onEvent(kind, data) || enough;
      if (enough) queueMicrotask(() => control.abort());
    });
  } catch {
    // aborted, or offline
  }
}

async function messageOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered with status ${response.status}.`;
  }
}

/** Show the connection's state in the elements that every page of runs has. */
export function showState(state, text, again) {
  const form = document.getElementById("key-form");
  const offline = document.getElementById("offline");
  offline.hidden = state !== "off" && state !== "gone";
  offline.textContent = state === "gone" ? "There is no such run." : text;
  form.hidden = state !== "key";
  document.body.classList.toggle("offline", state === "off");
  if (state !== "key") return;
  form.onsubmit = (event) => {
    event.preventDefault();
    sessionStorage.setItem(KEY, form.elements.key.value.trim());
    again();
  };
  form.elements.key.focus();
}

/** An element with a class and a text. Text is only ever set as text. */
export function element(tag, kind = "", text = "") {
  const made = document.createElement(tag);
  if (kind) made.className = kind;
  if (text !== "") made.textContent = text;
  return made;
}

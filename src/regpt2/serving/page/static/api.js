// The server, by OpenAI's API. In: a body; out: what the server answers, piece by piece, or an ApiError.

const KEY = "regpt2 key"; // in sessionStorage: gone with the tab

export class ApiError extends Error {
  constructor(message, status, retryAfterS) {
    super(message);
    this.status = status; // 0: no answer at all
    this.retryAfterS = retryAfterS;
  }
}

export function keepKey(key) {
  sessionStorage.setItem(KEY, key);
}

export function hasKey() {
  return Boolean(sessionStorage.getItem(KEY));
}

/** The answer as JSON. */
export async function ask(path, body = null, signal = null) {
  const response = await request(path, body, signal);
  return response.json();
}

/** Each event of a streamed answer, as an object. Ends only after the server's [DONE]. */
export async function* stream(path, body, signal) {
  const response = await request(path, { ...body, stream: true }, signal);
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new ApiError(event.error.message, 0);
    yield event;
  }
  throw new ApiError("The server closed the connection before the text was complete.", 0);
}

async function request(path, body, signal) {
  const key = sessionStorage.getItem(KEY);
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  const options = { headers, signal, cache: "no-store" };
  if (body) {
    headers["content-type"] = "application/json";
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. Is it still running?", 0);
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  let message = `The server answered with status ${response.status}.`;
  try {
    message = (await response.json()).error.message || message;
  } catch {
    // not OpenAI's form: a proxy, perhaps
  }
  const seconds = Number.parseFloat(response.headers.get("retry-after"));
  return new ApiError(message, response.status, Number.isFinite(seconds) ? seconds : null);
}

/** The data of each server-sent event. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) yield line.slice(5).trim();
      }
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    throw new ApiError("The connection to the server broke before the text was complete.", 0);
  } finally {
    reader.cancel().catch(() => {});
  }
}

// One answer of the server, whatever comes between. In: a request; out: its tokens, or an error that ends it.

import { ApiError, ask, stream } from "./api.js";

const MOST_TRIES = 30; // at a server that is busy
const MOST_CUTS = 6;
const CHARACTERS_PER_TOKEN = 8; // hardly any text has more: a longer prompt need not be sent to be refused
const LEAST_WAIT_S = 0.5;

/**
 * Yields [text, tokens, finish_reason] for each event of /v1/completions or, with messages, /v1/chat/completions.
 * Tokens are {text, logprob, top}. A server that is busy is asked again; `say` gets what happens meanwhile.
 * A prompt longer than the model's context is cut at its beginning: `cut` gets what is left of it.
 */
export async function* generated(body, { signal, context, say, cut, needsKey }) {
  const path = body.messages ? "/v1/chat/completions" : "/v1/completions";
  let asked = shortened(body, context, (context ?? Infinity) * CHARACTERS_PER_TOKEN);
  for (let busy = 0, cuts = 0; ; ) {
    try {
      for await (const event of stream(path, asked, signal)) {
        say("");
        if (asked.prompt !== body.prompt) cut(asked.prompt);
        for (const choice of event.choices) yield read(choice);
      }
      return;
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      if (error.status === 401) {
        await needsKey(error.message, signal);
      } else if (error.status === 429 && ++busy < MOST_TRIES) {
        await waitFor(error, say, signal);
      } else if (error.status === 400 && ++cuts < MOST_CUTS && (asked = lessOf(asked, context, error.message))) {
        continue;
      } else throw error;
    }
  }
}

/** What every head looks at, with the same patience. */
export async function attentionOf(body, { signal, say, needsKey }) {
  for (let busy = 0; ; ) {
    try {
      return await ask("/attention", body, signal);
    } catch (error) {
      if (error.status === 401) await needsKey(error.message, signal);
      else if (error.status === 429 && ++busy < MOST_TRIES) await waitFor(error, say, signal);
      else throw error;
    }
  }
}

async function waitFor(error, say, signal) {
  const waitS = Math.max(error.retryAfterS ?? 1, LEAST_WAIT_S);
  say(`${error.message} Waiting ${waitS} s, then asking again; Esc gives up.`);
  await new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, 1000 * waitS);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
}

function shortened(body, context, most) {
  if (body.messages || !context || body.prompt.length <= most) return body;
  return { ...body, prompt: lastPart(body.prompt, most) };
}

/** The end of the prompt that should fit, by the count of tokens in the server's message; null if none would. */
function lessOf(body, context, message) {
  const counted = /\(([\d,]+) in your prompt; ([\d,]+) for/.exec(message);
  if (!counted || body.messages || !context) return null;
  const [n_prompt, n_new] = counted.slice(1).map((digits) => Number(digits.replaceAll(",", "")));
  const room = context - n_new;
  if (room < 1) return null;
  const most = Math.min(Math.floor((body.prompt.length * room) / n_prompt), body.prompt.length - 1);
  return most < 1 ? null : { ...body, prompt: lastPart(body.prompt, most) };
}

/** Never half of a surrogate pair. */
function lastPart(text, most) {
  const part = text.slice(-most);
  return /^[\udc00-\udfff]/.test(part) ? part.slice(1) : part;
}

function read(choice) {
  const { logprobs, delta } = choice;
  if (delta) {
    const content = logprobs?.content ?? [];
    return [delta.content ?? "", content.map(ofChat), choice.finish_reason];
  }
  const tokens = (logprobs?.tokens ?? []).map((text, index) => {
    const top = sorted(Object.entries(logprobs.top_logprobs[index] ?? {}));
    return { text, logprob: logprobs.token_logprobs[index], top };
  });
  return [choice.text, tokens, choice.finish_reason];
}

function ofChat(one) {
  const top = one.top_logprobs.map((other) => [other.token, other.logprob]);
  if (!top.some(([text]) => text === one.token)) top.push([one.token, one.logprob]);
  return { text: one.token, logprob: one.logprob, top: sorted(top) };
}

function sorted(top) {
  return top.sort((a, b) => b[1] - a[1]);
}

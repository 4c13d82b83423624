// A conversation with a chat model, or with two side by side. In: messages; out: answers that grow.

import { N_ALTERNATIVES } from "./settings.js";
import { textOf } from "./pieces.js";
import { element, inPlace } from "./visible.js";

const byId = (id) => document.getElementById(id);

export class Talk {
  constructor(page) {
    this.page = page;
    this.isOn = false;
    this.histories = new Map(); // pane -> [{role, content}]
    this.lasts = []; // {content, panes}: what was said to whom, for Undo and Again
    byId("message").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      if (!this.page.isWriting) void this.page.write();
    });
  }

  get canTakeBack() {
    return this.lasts.length > 0;
  }

  /** The messages so far of the first model, with the one that is being typed. */
  get messages() {
    const typed = byId("message").value;
    return [...this.#history(this.page.first), ...(typed ? [{ role: "user", content: typed }] : [])];
  }

  offer(isPossible) {
    document.querySelector(".modes").hidden = !isPossible;
    if (!isPossible && this.isOn) this.switchTo(false);
  }

  switchTo(isOn) {
    this.isOn = isOn;
    byId("as-text").setAttribute("aria-pressed", String(!isOn));
    byId("as-talk").setAttribute("aria-pressed", String(isOn));
    for (const pane of [this.page.first, this.page.second]) {
      pane.root.querySelector(".sheet").hidden = isOn;
      pane.root.querySelector(".talk").hidden = !isOn;
    }
    document.querySelector(".composer").hidden = !isOn;
    this.page.alternatives.hide();
    this.page.changed();
    byId(isOn ? "message" : "text").focus();
  }

  async send(seed) {
    const content = byId("message").value;
    if (content.trim() === "") return;
    byId("message").value = "";
    const panes = this.page.panes;
    this.lasts.push({ content, panes });
    const fields = this.page.settings.fields(seed);
    this.page.say("Writing.");
    const runs = await Promise.all(panes.map((pane) => this.#answer(pane, content, fields)));
    if (runs.every((run) => run.n === 0)) this.takeBack(); // nobody answered: the message can be sent anew
    this.page.wrote(runs);
    this.page.changed();
    byId("message").focus();
  }

  /** Take the last message and its answers back; the message can be sent anew. */
  takeBack() {
    const last = this.lasts.pop();
    if (last === undefined) return;
    for (const pane of last.panes) {
      this.#history(pane).splice(-2);
      const talk = pane.root.querySelector(".talk");
      talk.lastChild.remove();
      talk.lastChild.remove();
    }
    byId("message").value = last.content;
  }

  #history(pane) {
    if (!this.histories.has(pane)) this.histories.set(pane, []);
    return this.histories.get(pane);
  }

  async #answer(pane, content, fields) {
    const history = this.#history(pane);
    history.push({ role: "user", content });
    const talk = pane.root.querySelector(".talk");
    talk.append(element("li", "user", inPlace(content)));
    const answer = element("li", "assistant");
    const box = element("div", "sheet");
    box.append(element("div", "layer", "", { role: "group", "aria-label": "Tokens of the answer" }));
    answer.append(box);
    talk.append(answer);
    const sheet = pane.sheetIn(box);
    const body = { model: pane.model.id, messages: [...history], ...fields, logprobs: true, top_logprobs: N_ALTERNATIVES };
    sheet.before = { messages: body.messages, max_tokens: body.max_tokens }; // what the answer follows, for attention
    const run = await pane.take(body, (pieces) => sheet.show([...sheet.pieces, ...pieces]));
    history.push({ role: "assistant", content: textOf(sheet.pieces) });
    return run;
  }
}

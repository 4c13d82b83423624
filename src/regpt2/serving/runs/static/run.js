// One run, live. In: events of /runs/NAME/events; out: its page. Other runs are drawn behind it, faintly.

import { Chart, Cursor } from "/static/runs/chart.js";
import { between } from "/static/runs/axes.js";
import { count, duration, fixed, general, whole } from "/static/runs/format.js";
import { inPlace } from "/static/visible.js";
import { element, follow, hasKey, headers, readOnce, showState } from "/static/runs/stream.js";

const GHOST_INKS = ["run3", "run4", "run5", "run6", "run7", "run8"];
const BY_DEFAULT = 2;
const MOST_CHOICES = 40;
const GHOST_EVERY_MS = 10000;
const FEWEST_POINTS = 10; // of a validation curve: a straight line between two says nothing

const here = location.pathname.replace(/\/$/, "");
const name = here.split("/").slice(2).map(decodeURIComponent).join("/");
const at = (id) => document.getElementById(id);

const cursor = new Cursor();
const charts = new Map(); // panel name -> Chart
const panels = new Map(); // panel name -> data
const ghosts = new Map(); // run name -> { ink, data }
let others = []; // rows of the list
let axis = null;
let facts = null;
let status = null;
let full_length = false;
let chosen_by_hand = false;

at("name").textContent = inPlace(name);

const handlers = {
  status: showStatus,
  facts(data) {
    facts = data;
    if (status) showStatus(status);
    offer();
  },
  panel: (data) => panels.set(data.name, data),
  axis: (data) => (axis = data),
  texts: showTexts,
};

let due = false;
function onEvent(kind, data) {
  handlers[kind]?.(data);
  at("shown").hidden = false;
  at("run").setAttribute("aria-busy", "false");
  if (due || (kind !== "panel" && kind !== "axis")) return;
  due = true;
  requestAnimationFrame(() => {
    due = false;
    drawCharts();
  });
}

function showStatus(data) {
  status = data;
  const ended = data.reason.replace(new RegExp(`^${data.state} ?`), "");
  const state = at("state");
  state.replaceChildren(element("span", `state ${data.state}`, data.state), ended && ` ${ended}`);
  document.title = `${titleOf(data)}${inPlace(name)} · regpt2`;
  const steps = data.max_steps ? `${whole(data.step)} of ${whole(data.max_steps)} steps` : `${whole(data.step)} steps`;
  const parts = [
    data.recipe !== name ? data.recipe : "",
    steps,
    data.tokens ? `${count(data.tokens)} tokens` : "",
    facts?.n_params ? `${count(facts.n_params)} parameters` : "",
    facts?.dataset,
    facts?.device,
  ];
  at("summary").textContent = data.state === "waiting" ? "Waiting for the first event of its record." : parts.filter(Boolean).join(" · ");
  at("progress").value = data.share ?? 0;
  at("progress").className = data.state;
  at("left").textContent = leftOf(data);
  showResults(data);
  showVerdict(data);
  at("damaged").hidden = !data.n_damaged;
  at("damaged").textContent = `${data.n_damaged} damaged ${data.n_damaged === 1 ? "line" : "lines"} of the record are left out.`;
  const report = at("report");
  report.href = `${here}/report`;
  report.hidden = hasKey() || !data.step;
}

function titleOf(data) {
  if (data.state === "running" && data.share !== null) return `${Math.floor(100 * data.share)} % `;
  return data.state === "failed" || data.state === "killed" ? `${data.state}: ` : "";
}

function leftOf(data) {
  const share = data.share === null ? "" : `${Math.floor(100 * data.share)} %`;
  if (data.state === "running" && data.left_s !== null) return `${share} · ${duration(data.left_s)} left`;
  return data.elapsed_s === null ? share : `${share} · ${duration(data.elapsed_s)}`;
}

function showResults(data) {
  const best = data.best_loss === null || data.best_loss >= data.val_loss ? "" : `best ${fixed(data.best_loss, 4)} at step ${whole(data.best_step)}`;
  const perplexity = data.val_loss === null ? "" : `perplexity ${count(Math.exp(data.val_loss))}`;
  const cells = [
    ["Training loss", fixed(data.loss, 3), "nats", "newest updates"],
    ["Validation loss", fixed(data.val_loss, 4), "nats", best || perplexity],
    ["Tokens/s", count(data.tokens_per_s ?? NaN), "", shareOf(data) || "newest updates"],
    ["Learning rate", data.lr === null ? "–" : data.lr.toExponential(1).replace("e-0", "e-").replace(".0e", "e"), "", data.grad_norm === null ? "" : `gradient norm ${fixed(data.grad_norm, 2)}`],
    data.state === "running"
      ? ["Time left", duration(data.left_s ?? NaN), "", data.elapsed_s === null ? "" : `after ${duration(data.elapsed_s)}`]
      : ["Time", duration(data.elapsed_s ?? NaN), "", ""],
  ];
  const list = at("results");
  while (list.children.length < cells.length) {
    const cell = element("div");
    const value = element("dd");
    value.append(element("span", "value"), " ", element("span", "unit"), element("div", "remark"));
    cell.append(element("dt"), value);
    list.append(cell);
  }
  cells.forEach(([title, value, unit, remark], place) => {
    const cell = list.children[place];
    const texts = { dt: title, ".value": value, ".unit": value === "–" ? "" : unit, ".remark": remark };
    for (const [selector, text] of Object.entries(texts)) {
      const found = cell.querySelector(selector);
      if (found.textContent !== text) found.textContent = text;
    }
  });
}

/** How much of what the device can do was used. */
function shareOf(data) {
  if (data.mfu === null) return "";
  const share = data.mfu < 0.1 ? general(100 * data.mfu, 2) : fixed(100 * data.mfu, 0);
  return `${share} % of ${data.peak_is_timed ? "its matmul rate" : "the peak (MFU)"}`;
}

function showVerdict(data) {
  const verdict = at("verdict");
  verdict.hidden = !data.verdict;
  verdict.replaceChildren(element("strong", "", data.verdict), data.verdict_text);
  const checks = at("checks");
  checks.hidden = !data.checks.length;
  checks.replaceChildren(...data.checks.map((check) => element("li", "", check)));
}

function showTexts(data) {
  at("samples-section").hidden = !data.samples.length;
  const made = data.samples.map(sampleOf);
  const older = made.splice(2);
  if (older.length) {
    const folded = element("details");
    folded.open = at("samples").querySelector("details")?.open ?? false;
    folded.append(element("summary", "", `${older.length} earlier ${older.length === 1 ? "sample" : "samples"}`), ...older);
    made.push(folded);
  }
  if (data.samples.length < data.n_samples) made.push(element("p", "faint", `${data.samples.length} of ${data.n_samples} samples; the others are in the record.`));
  at("samples").replaceChildren(...made);
  at("notes-section").hidden = !data.notes.length;
  at("notes").replaceChildren(...data.notes.map((note) => {
    const item = element("li");
    item.append(element("span", "faint", `Step ${whole(note.step)} `), note.text);
    return item;
  }));
}

function sampleOf(sample) {
  const figure = element("figure", "sample");
  const tokens = sample.tokens === null ? "" : ` · ${count(sample.tokens)} tokens`;
  figure.append(element("figcaption", "", `Step ${whole(sample.step)}${tokens}`));
  for (const text of sample.texts) {
    const shown = element("pre");
    shown.append(element("b", "", sample.prompt), text);
    figure.append(shown);
  }
  return figure;
}

/** All charts: the run's own curves, and behind them those of the chosen others. */
function drawCharts() {
  if (!axis || !facts) return;
  const alike = [...ghosts.values()].every(({ row }) => row.batch_tokens === facts.batch_tokens);
  const unit = alike ? "steps" : "tokens";
  const drawn = [...ghosts].filter(([, ghost]) => ghost.data);
  const lasts = full_length ? drawn.map(([, ghost]) => placesOf([ghost.last], unit, ghost.data.tokens)[0]) : [];
  const own = panels.get(axis.panels[0]);
  const last = own ? placesOf([own.last], unit, axis.tokens)[0] : 1;
  const view = {
    unit,
    last: Math.max(last, ...lasts),
    tokens: facts.batch_tokens && unit === "steps" ? axis.tokens : null,
    resumes: own ? placesOf(own.resumes, unit, axis.tokens) : [],
  };
  for (const panel of axis.panels.map((one) => panels.get(one)).filter(Boolean)) {
    const behind = drawn.flatMap(([run, ghost]) => ghostSeries(run, ghost, panel, unit));
    const mine = panel.traces.map((trace) => ({ ...trace, x: placesOf(trace.x, unit, axis.tokens), ghost: false }));
    chartOf(panel.name).update(panel, [...behind, ...mine], view);
  }
  for (const [shown, chart] of charts) {
    if (axis.panels.includes(shown)) continue;
    chart.remove();
    charts.delete(shown);
    panels.delete(shown);
  }
  const remarks = [
    axis.panels.length ? "" : "No step is recorded yet.",
    view.resumes.length ? "A dotted line marks where the run was resumed." : "",
    unit === "tokens" ? "The batches differ, so the curves are drawn over tokens." : "",
  ];
  at("remark").textContent = remarks.filter(Boolean).join(" ");
}

function chartOf(panel) {
  if (!charts.has(panel)) {
    const chart = new Chart(panel, cursor);
    charts.set(panel, chart);
    const order = axis.panels;
    const next = order.slice(order.indexOf(panel) + 1).map((one) => charts.get(one)).find(Boolean);
    at("curves").insertBefore(chart.figure, next ? next.figure : null);
  }
  return charts.get(panel);
}

/** A curve of another run, faint, below its own name: the validation loss if it has points enough for one, else the training loss. */
function ghostSeries(run, ghost, panel, unit) {
  const same = ghost.data.panels.find((one) => one.name === panel.name);
  const named = (same?.traces ?? []).filter((trace) => trace.look.alpha === 1 && trace.label && !trace.about && trace.y.some((y) => y !== null));
  const validation = named.find((one) => one.label === "validation" && one.y.filter((y) => y !== null).length >= FEWEST_POINTS);
  const trace = validation ?? named[0];
  if (!trace) return [];
  const look = { ink: ghost.ink, width: 1.3, alpha: 0.7, dash: [], marker: false };
  return [{ label: inPlace(run), x: placesOf(trace.x, unit, ghost.data.tokens), y: trace.y, spread: null, about: "", look, ghost: true }];
}

/** Steps as they are, or as tokens. */
function placesOf(steps, unit, tokens) {
  return unit === "steps" ? steps : steps.map((step) => (step === null ? null : between(step, tokens.steps, tokens.tokens)));
}

/** The runs to choose from: those on the same data first, the most alike in size and the newest before others. */
function offer() {
  if (!facts || !others.length) return;
  const apart = (a, b) => Math.abs(Math.log((a || 1) / (b || 1)));
  const distance = (row) => apart(row.n_params, facts.n_params) + 0.1 * apart(row.total_tokens, status?.total_tokens);
  const same = (row) => Boolean(row.data) && row.data === facts.data;
  others.sort((a, b) => same(b) - same(a) || distance(a) - distance(b) || b.changed_at - a.changed_at);
  if (!chosen_by_hand && !ghosts.size) for (const row of others.filter(same).slice(0, BY_DEFAULT)) choose(row, true);
  const boxes = others.slice(0, MOST_CHOICES).map((row) => {
    const label = element("label", "choice");
    const box = element("input");
    box.type = "checkbox";
    box.checked = ghosts.has(row.name);
    box.onchange = () => {
      chosen_by_hand = true;
      if (box.checked && ghosts.size >= GHOST_INKS.length) box.checked = false;
      choose(row, box.checked);
      label.className = `choice ${ghosts.get(row.name)?.ink ?? ""}`;
    };
    label.className = `choice ${ghosts.get(row.name)?.ink ?? ""}`;
    const result = row.best_loss === null ? row.state : fixed(row.best_loss, 3);
    label.append(box, element("span", "who", inPlace(row.name)), element("span", "faint", same(row) ? result : `${result}, other data`));
    return label;
  });
  const label = element("label", "choice whole");
  const box = element("input");
  box.type = "checkbox";
  box.checked = full_length;
  box.onchange = () => {
    full_length = box.checked;
    drawCharts();
  };
  label.append(box, element("span", "", "to their full length"));
  at("choices").replaceChildren(...boxes, label);
  at("others").hidden = !others.length;
}

function choose(row, wanted) {
  if (!wanted) ghosts.delete(row.name);
  else if (!ghosts.has(row.name) && ghosts.size < GHOST_INKS.length) {
    const used = new Set([...ghosts.values()].map((ghost) => ghost.ink));
    const ghost = { ink: GHOST_INKS.find((ink) => !used.has(ink)), row, data: null, last: 0 };
    ghosts.set(row.name, ghost);
    load(row.name, ghost);
  }
  drawCharts();
}

async function load(run, ghost) {
  const address = `/runs/${run.split("/").map(encodeURIComponent).join("/")}/panels`;
  try {
    const response = await fetch(address, { headers: headers(), cache: "no-store" });
    if (!response.ok) return;
    ghost.data = await response.json();
    ghost.last = ghost.data.panels[0]?.last ?? 0;
    drawCharts();
  } catch {
    // offline: the run's own stream shows it, and tries again
  }
}

setInterval(() => {
  if (document.hidden) return;
  for (const [run, ghost] of ghosts) if (ghost.row.state === "running" || !ghost.data) load(run, ghost);
}, GHOST_EVERY_MS);

async function findOthers() {
  const found = new Map();
  let n_runs = Infinity;
  await readOnce("/runs-events", (kind, data) => {
    if (kind === "run") found.set(data.name, data);
    if (kind === "list") n_runs = data.n_runs;
    return found.size >= n_runs;
  });
  found.delete(name);
  others = [...found.values()];
  offer();
}

let begun = false;
const again = follow(`${here}/events`, onEvent, (state, text) => {
  showState(state, text, () => again());
  if (state !== "on" || begun) return;
  begun = true;
  findOthers();
});

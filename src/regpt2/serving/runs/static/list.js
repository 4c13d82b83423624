// The list of runs. In: events of /runs-events; out: a table that follows them.
import { count, duration, fixed, whole } from "/static/runs/format.js";
import { inPlace } from "/static/visible.js";
import { element, follow, showState } from "/static/runs/stream.js";

const NS = "http://www.w3.org/2000/svg";
const SPARK = { width: 120, height: 28 };

const rows = new Map(); // name -> { data, row }
const body = document.getElementById("rows");
let counts = { n_runs: 0, n_read: 0 };

function onEvent(kind, data) {
  if (kind === "run") put(data);
  if (kind === "names") for (const name of [...rows.keys()].filter((one) => !data.includes(one))) drop(name);
  if (kind === "list") counts = data;
  requestAnimationFrame(arrange);
}

function put(data) {
  const known = rows.get(data.name);
  const row = known ? known.row : element("tr");
  rows.set(data.name, { data, row });
  fill(row, data);
}

function drop(name) {
  rows.get(name)?.row.remove();
  rows.delete(name);
}

/** Running ones first, then those that changed last. */
function arrange() {
  const rank = ({ data }) => (data.state === "running" ? 0 : 1);
  const sorted = [...rows.values()].sort((a, b) => rank(a) - rank(b) || b.data.changed_at - a.data.changed_at || (a.data.name < b.data.name ? -1 : 1));
  sorted.forEach(({ row }, place) => {
    if (body.children[place] !== row) body.insertBefore(row, body.children[place] ?? null);
  });
  const { n_runs, n_read } = counts;
  const running = sorted.filter(({ data }) => data.state === "running").length;
  const still = n_read < n_runs ? ` · ${n_runs - n_read} still to be read` : "";
  const none = "No run yet. regpt2 train demo begins one, and it appears here.";
  document.getElementById("summary").textContent = n_runs ? `${n_runs} ${n_runs === 1 ? "run" : "runs"} · ${running} running${still}` : none;
  document.getElementById("table").hidden = !sorted.length;
  document.getElementById("runs").setAttribute("aria-busy", String(n_read < n_runs));
}

function fill(row, data) {
  const focused = row.contains(document.activeElement);
  const name = element("th");
  name.scope = "row";
  const link = element("a", "run-name");
  const parts = data.name.split("/");
  link.href = `/runs/${parts.map(encodeURIComponent).join("/")}`;
  link.append(element("span", "faint", inPlace(parts.slice(0, -1).map((part) => `${part}/`).join(""))), inPlace(parts.at(-1)));
  name.append(link, element("div", "remark", [data.recipe !== data.name ? data.recipe : "", data.dataset].filter(Boolean).join(" · ")));

  const state = element("td", "state-cell");
  state.append(element("span", `state ${data.state}`, data.state), progress(data));
  const spark = element("td", "wide");
  spark.append(sparkline(data));
  row.replaceChildren(
    name,
    state,
    spark,
    cell("Loss", fixed(data.loss, 3)),
    cell("Best", fixed(data.best_loss, 4)),
    cell("Tokens/s", count(data.tokens_per_s ?? NaN)),
    cell("Left", data.state === "running" ? duration(data.left_s ?? NaN) : "–"),
    verdict(data),
  );
  if (focused) link.focus();
}

function cell(name, text) {
  const made = element("td", "number", text);
  made.dataset.name = name;
  return made;
}

function verdict(data) {
  const made = element("td", "verdict-cell", data.verdict || "–");
  made.dataset.name = "Verdict";
  made.classList.toggle("bad", data.verdict === "Above" || data.checks.length > 0);
  made.classList.toggle("none", !data.verdict);
  return made;
}

function progress(data) {
  const made = element("div", "remark step");
  const steps = data.max_steps ? `${whole(data.step)} of ${whole(data.max_steps)}` : whole(data.step);
  if (data.state === "running" && data.share !== null) {
    const bar = document.createElement("progress");
    bar.max = 1;
    bar.value = data.share;
    bar.setAttribute("aria-label", "done");
    made.append(bar);
  }
  made.append(element("span", "", steps));
  return made;
}

/** The validation losses as a small line, from the top of its box to the bottom. */
function sparkline(data) {
  const drawing = document.createElementNS(NS, "svg");
  drawing.setAttribute("viewBox", `0 0 ${SPARK.width} ${SPARK.height}`);
  drawing.setAttribute("class", "spark");
  drawing.setAttribute("aria-hidden", "true");
  const known = data.validations.map((loss, place) => [place, loss]).filter(([, loss]) => loss !== null);
  if (known.length < 2) return drawing;
  const losses = known.map(([, loss]) => loss);
  const low = Math.min(...losses);
  const high = [...losses].sort((a, b) => b - a)[Math.floor(losses.length / 8)]; // the first fall enters from above
  const x = (place) => 2 + ((SPARK.width - 6) * place) / (data.validations.length - 1);
  const y = (loss) => 3 + (SPARK.height - 6) * (high > low ? Math.max(-0.2, (high - loss) / (high - low)) : 0.5);
  const line = document.createElementNS(NS, "polyline");
  line.setAttribute("points", known.map(([place, loss]) => `${x(place).toFixed(1)},${y(loss).toFixed(1)}`).join(" "));
  line.setAttribute("fill", "none");
  line.setAttribute("stroke", "var(--val)");
  line.setAttribute("stroke-width", "1.5");
  const dot = document.createElementNS(NS, "circle");
  const [place, loss] = known.at(-1);
  dot.setAttribute("cx", x(place).toFixed(1));
  dot.setAttribute("cy", y(loss).toFixed(1));
  dot.setAttribute("r", "2.2");
  dot.setAttribute("fill", "var(--val)");
  drawing.append(line, dot);
  return drawing;
}

const again = follow("/runs-events", onEvent, (state, text) => {
  showState(state, text, () => again());
});

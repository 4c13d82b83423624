// Scales, ticks and curves of a chart. In: numbers; out: places in pixels, ticks, paths.

import { count, whole } from "/static/runs/format.js";

/** Ticks at round places, at most `most` intervals between low and high. */
export function ticks(low, high, most, integer = false) {
  if (!(high > low)) return [low];
  const size = 10 ** Math.floor(Math.log10((high - low) / most));
  for (const factor of [1, 2, 2.5, 5, 10, 20, 25, 50, 100]) {
    const step = factor * size;
    if ((integer && !Number.isInteger(step)) || (high - low) / step > most) continue;
    const found = [];
    for (let n = Math.ceil(low / step - 1e-9); n * step <= high + 1e-9 * step; n++) found.push(Number((n * step).toPrecision(12)));
    return found;
  }
  return [low, high];
}

/** Ticks of a logarithmic scale: powers of ten, with 2 and 5 between them where there are few. */
export function logTicks(low, high) {
  const found = [];
  for (const factors of [[1], [1, 2, 5]]) {
    found.length = 0;
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
      for (const factor of factors) {
        const value = Number((factor * 10 ** power).toPrecision(3));
        if (value >= low && value <= high) found.push(value);
      }
    }
    if (found.length > 2) break;
  }
  return found;
}

/** The range of a chart upwards: the report's limits, and room for the curves of other runs. */
export function rangeOf(panel, series, last) {
  const values = series.flatMap((one) => one.y.filter((y, at) => y !== null && one.x[at] <= last && (!panel.log || y > 0)));
  if (!values.length) return [0, 1];
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) {
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  if (panel.log) return [low / 1.3, high * 1.3];
  if (panel.from_zero) return [0, (1.11 * high) || 1];
  if (!panel.limits) {
    const margin = 0.05 * (high - low) || 0.05 * Math.abs(high) || 1;
    return [low - margin, high + margin];
  }
  const others = series.filter((one) => one.ghost).flatMap((one) => lateValues(one, last));
  return [Math.min(panel.limits[0], ...others), Math.max(panel.limits[1], ...others)];
}

/** The values of a curve in the second half of the chart: its first fall enters from above. */
function lateValues(one, last) {
  return one.y.filter((y, at) => y !== null && one.x[at] > last / 2 && one.x[at] <= last);
}

/** A function from a value to its place between two pixels. */
export function scale([low, high], [from, to], log = false) {
  const at = log ? Math.log : (value) => value;
  const [first, span] = [at(low), at(high) - at(low) || 1];
  return (value) => from + ((at(value) - first) / span) * (to - from);
}

/** The path of a curve, with gaps where there is no value. */
export function pathOf(one, x, y) {
  let path = "";
  let pen = false;
  for (let at = 0; at < one.x.length; at++) {
    const [px, py] = [one.x[at], one.y[at]].map((value, axis) => (value === null ? NaN : axis ? y(value) : x(value)));
    const drawn = Number.isFinite(px) && Number.isFinite(py);
    if (drawn) path += `${pen ? "L" : "M"}${px.toFixed(1)} ${Math.max(-1e4, Math.min(1e4, py)).toFixed(1)}`;
    pen = drawn;
  }
  return path;
}

/** The band on both sides of a curve. */
export function bandOf(one, x, y) {
  const known = one.x.map((_, at) => at).filter((at) => one.y[at] !== null && one.spread[at] !== null);
  const edge = (sign) => known.map((at) => `${x(one.x[at]).toFixed(1)} ${y(one.y[at] + sign * one.spread[at]).toFixed(1)}`);
  return known.length > 1 ? `M${[...edge(1), ...edge(-1).reverse()].join("L")}Z` : "";
}

/** Does a curve go through a box, given as its left, right, upper and lower edge in pixels? */
export function isCrossed(one, x, y, [left, right, top, bottom]) {
  let before = null;
  for (let at = 0; at < one.x.length; at++) {
    if (one.x[at] === null || one.y[at] === null) continue;
    const point = [x(one.x[at]), y(one.y[at])];
    const [[x0, y0], [x1, y1]] = [before ?? point, point];
    const [from, to] = [Math.max(left, x0), Math.min(right, x1)];
    const ends = [from, to].map((px) => y0 + (y1 - y0) * ((px - x0) / (x1 - x0 || 1)));
    if (from <= to && Math.max(...ends) > top && Math.min(...ends) < bottom) return true;
    before = point;
  }
  return false;
}

/** A value between known points, as numpy.interp. */
export function between(at, xs, ys) {
  if (!xs.length) return null;
  if (at <= xs[0]) return ys[0];
  for (let place = 1; place < xs.length; place++) {
    if (at <= xs[place]) {
      const share = (at - xs[place - 1]) / (xs[place] - xs[place - 1] || 1);
      return ys[place - 1] + share * (ys[place] - ys[place - 1]);
    }
  }
  return ys.at(-1);
}

/** The label of a tick from left to right; the first after 0 has the unit. */
export function across(x, place, unit) {
  const shown = unit === "steps" && x < 1e6 ? whole(x) : count(x);
  const named = shown === "1" ? unit.replace(/s$/, "") : unit;
  return place === 1 ? `${shown} ${named}` : shown;
}

/** The point with a value that is nearest from left to right, or null. */
export function nearest(one, at) {
  let best = null;
  for (let place = 0; place < one.x.length; place++) {
    if (one.y[place] === null || one.x[place] === null) continue;
    if (best === null || Math.abs(one.x[place] - at) < Math.abs(one.x[best] - at)) best = place;
  }
  return best;
}

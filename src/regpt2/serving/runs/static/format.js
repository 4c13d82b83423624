// Numbers as the report writes them. In: a number, or null for none; out: text.

const DASH = "–";

/** Python's `format(value, ".<digits>g")`. */
export function general(value, digits) {
  if (value === 0) return "0";
  const exponent = Number(value.toExponential(digits - 1).split("e")[1]);
  if (exponent < -4 || exponent >= digits) {
    const [head, power] = value.toExponential(digits - 1).split("e");
    const size = Math.abs(Number(power)).toString().padStart(2, "0");
    return `${trimmed(head)}e${power.startsWith("-") ? "-" : "+"}${size}`;
  }
  return trimmed(value.toFixed(Math.max(0, digits - 1 - exponent)));
}

function trimmed(text) {
  return text.includes(".") ? text.replace(/\.?0+$/, "") : text;
}

/** 950, 12.3k, 4.56M, 10B. */
export function count(value) {
  if (!Number.isFinite(value)) return DASH;
  const rounded = Number(value.toPrecision(3));
  for (const [size, unit] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
    if (Math.abs(rounded) >= size) return `${general(rounded / size, 3)}${unit}`;
  }
  return general(rounded, 3);
}

/** 1,234 */
export function whole(value) {
  return Number.isFinite(value) ? Math.round(value).toLocaleString("en-US") : DASH;
}

/** A fixed number of digits, or a dash. */
export function fixed(value, digits) {
  return Number.isFinite(value) ? value.toFixed(digits) : DASH;
}

/** 42s, 3m10s, 5h02m, 2d04h. */
export function duration(seconds) {
  if (!Number.isFinite(seconds)) return DASH;
  const all = Math.trunc(Math.max(0, seconds));
  for (const [size, unit, smaller, rest] of [[86400, "d", 3600, "h"], [3600, "h", 60, "m"], [60, "m", 1, "s"]]) {
    if (all >= size) {
      const left = Math.floor((all % size) / smaller);
      return `${Math.floor(all / size)}${unit}${String(left).padStart(2, "0")}${rest}`;
    }
  }
  return `${all}s`;
}

/** A value of a chart, by the chart's own format: see pages/charts/formats.py. */
export function formatted(format, value) {
  if (!Number.isFinite(value)) return DASH;
  switch (format.kind) {
    case "digits":
      return Math.abs(value) < 1e6 ? trimmed(value.toFixed(format.digits)) : count(value);
    case "percent":
      return `${general(100 * value, format.digits)} %`;
    case "short":
      return short(value);
    case "count":
      return count(value);
    default:
      return general(value, format.digits);
  }
}

/** 6e-4 rather than 0.0006. */
function short(value) {
  if (!value) return "0";
  const [digits, exponent] = value.toExponential(1).split("e");
  return `${digits.replace(/\.0$/, "")}e${Number(exponent)}`;
}

// Attention weights in color, as `regpt2 explore` draws them. In: an answer of /attention; out: numbers, canvases.

import { asLabel } from "./visible.js";

const LEAST_CELL_PX = 11; // from here on labels beside the rows of a map are readable
const MOST_LABEL = 12;

/** The weights of each head: rows[layer][head][token], from 0 to 1. */
export function rowsOf(found) {
  const bytes = bytesOf(found.weights);
  const view = new DataView(bytes.buffer);
  const T = found.tokens.length;
  return Array.from({ length: found.layers }, (_, layer) =>
    Array.from({ length: found.heads }, (_, head) =>
      Float32Array.from({ length: T }, (_, at) => view.getUint16(2 * ((layer * found.heads + head) * T + at), true) / 65535),
    ),
  );
}

/** The square roots of a head's whole map, T * T of them from 0 to 1. */
export function rootsOf(found) {
  return Float32Array.from(bytesOf(found.map), (byte) => byte / 255);
}

function bytesOf(base64) {
  return Uint8Array.from(atob(base64), (one) => one.charCodeAt(0));
}

/** From nothing to all, in the colors of the theme: root 0..1 -> [r, g, b]. The root, so that 1% can be seen. */
export function scale() {
  const style = getComputedStyle(document.documentElement);
  const stops = [0, 1, 2, 3].map((n) => rgb(style.getPropertyValue(`--weight${n}`)));
  return (root) => {
    const at = Math.min(Math.max(root, 0), 1) * (stops.length - 1);
    const n = Math.min(Math.floor(at), stops.length - 2);
    return stops[n].map((value, channel) => Math.round(value + (at - n) * (stops[n + 1][channel] - value)));
  };
}

function rgb(hex) {
  const digits = hex.trim().slice(1);
  return [0, 2, 4].map((at) => Number.parseInt(digits.slice(at, at + 2), 16));
}

/** One row of weights as a strip: the token at the left is the first. Of tokens that share a pixel the largest. */
export function drawStrip(canvas, row, color) {
  const { width, height } = canvas;
  const image = new ImageData(width, height);
  for (let x = 0; x < width; x++) {
    const from = Math.floor((x * row.length) / width);
    const to = Math.max(from + 1, Math.floor(((x + 1) * row.length) / width));
    const [r, g, b] = color(Math.sqrt(Math.max(...row.subarray(from, to))));
    for (let y = 0; y < height; y++) image.data.set([r, g, b, 255], 4 * (y * width + x));
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

/** A whole map with the tokens along two sides, if they are few enough to read. Returns where its cells are. */
export function drawMap(canvas, roots, tokens, color, roomPx) {
  const T = tokens.length;
  const ratio = window.devicePixelRatio || 1;
  const style = getComputedStyle(document.documentElement);
  const labels = tokens.map((token) => shortened(asLabel(token)));
  const context = canvas.getContext("2d");
  const font = `10px ${style.getPropertyValue("--mono")}`;
  context.font = font;
  const widest = Math.ceil(Math.max(...labels.map((label) => context.measureText(label).width))) + 6;
  const isLabeled = (roomPx - widest) / T >= LEAST_CELL_PX;
  const edge = isLabeled ? widest : 0;
  const cell = Math.min((roomPx - edge) / T, 22);
  const size = edge + cell * T;
  canvas.width = canvas.height = Math.round(size * ratio);
  canvas.style.setProperty("width", `${size}px`);
  context.scale(ratio, ratio);
  const at = Array.from({ length: T + 1 }, (_, n) => Math.round((edge + n * cell) * ratio) / ratio); // whole pixels
  context.fillStyle = style.getPropertyValue("--future");
  context.fillRect(at[0], at[0], at[T] - at[0], at[T] - at[0]);
  for (let row = 0; row < T; row++) {
    for (let column = 0; column <= row; column++) {
      context.fillStyle = `rgb(${color(roots[row * T + column])})`;
      context.fillRect(at[column], at[row], at[column + 1] - at[column], at[row + 1] - at[row]);
    }
  }
  if (isLabeled) drawLabels(context, labels, { font, edge, cell, ink: style.getPropertyValue("--text") });
  return { edge, cell };
}

function drawLabels(context, labels, { font, edge, cell, ink }) {
  context.font = font;
  context.fillStyle = ink;
  context.textBaseline = "middle";
  labels.forEach((label, n) => {
    context.textAlign = "right";
    context.fillText(label, edge - 4, edge + (n + 0.5) * cell);
    context.save();
    context.translate(edge + (n + 0.5) * cell, edge - 4);
    context.rotate(-Math.PI / 2);
    context.textAlign = "left";
    context.fillText(label, 0, 0);
    context.restore();
  });
}

function shortened(label) {
  return label.length <= MOST_LABEL ? label : `${label.slice(0, MOST_LABEL - 1)}…`;
}

// The plot of accuracy against bytes: an SVG as wide as its place, with a line for each way to quantize.

import { element, inBytes } from "./words.js";

const SVG = "http://www.w3.org/2000/svg";
const MARKS = ["M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0", "M-4-4h8v8h-8z", "M0-5.5L5.5 4.5h-11z", "M0-6L6 0L0 6L-6 0z",
  "M0 5.5L5.5-4.5h-11z", "M-5-2h3v-3h4v3h3v4h-3v3h-4v-3h-3z"];
const COLORS = 6;

function draw(tag, attributes, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

/** Round values between two limits, about `count` of them. */
function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + 1e-9; value += step) found.push(value);
  return found;
}

function byteTicks(low, high, narrow) {
  const found = [];
  for (let power = 10 ** Math.floor(Math.log10(low)); power <= high; power *= 10) {
    for (const factor of narrow && high / low > 5 ? [1, 2, 5] : [1, 1.5, 2, 3, 5, 7]) {
      if (power * factor >= low && power * factor <= high) found.push(power * factor);
    }
  }
  return found;
}

/** Points by line, in the order of bytes; the most accurate line first. */
function linesOf(points) {
  const lines = new Map();
  for (const point of points.filter(({ label }) => label !== "float")) {
    lines.set(point.label, [...(lines.get(point.label) ?? []), point]);
  }
  for (const line of lines.values()) line.sort((a, b) => a.bytes - b.bytes);
  const best = (line) => Math.max(...line.map(({ top1 }) => top1));
  return [...lines].sort(([, a], [, b]) => best(b) - best(a));
}

/**
 * Draw into `place`; `here` is the name of the model that the slider is at, or null.
 * @param {{points: {model: string, label: string, bytes: number, top1: number}[]}} accuracy
 */
export function drawPlot(place, accuracy, here) {
  const width = Math.max(280, place.clientWidth);
  const height = Math.min(380, Math.max(260, width * 0.45));
  const [left, right, top, bottom] = [46, 14, 14, 44];
  const points = accuracy.points;
  const float = points.find(({ label }) => label === "float");
  const drawn = points.filter((point) => point !== float);
  const sizes = drawn.map(({ bytes }) => bytes);
  const [least, most] = [Math.min(...sizes) / 1.12, Math.max(...sizes) * 1.12];
  const tops = points.map(({ top1 }) => top1);
  const room = Math.max(1, (Math.max(...tops) - Math.min(...tops)) * 0.08);
  const [low, high] = [Math.max(0, Math.min(...tops) - room), Math.min(100, Math.max(...tops) + room)];
  const x = (bytes) => left + ((width - left - right) * Math.log(bytes / least)) / Math.log(most / least);
  const y = (top1) => height - bottom - ((height - top - bottom) * (top1 - low)) / (high - low);

  const lines = linesOf(points);
  const picture = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": inWords(accuracy, lines) });
  for (const value of ticks(low, high, height / 55)) {
    picture.append(draw("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }));
    picture.append(draw("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, +value.toFixed(2)));
  }
  for (const value of byteTicks(least, most, width < 500)) {
    picture.append(draw("line", { class: "axis", x1: x(value), x2: x(value), y1: height - bottom, y2: height - bottom + 5 }));
    picture.append(draw("text", { x: x(value), y: height - bottom + 19, "text-anchor": "middle" }, tickText(value)));
  }
  picture.append(draw("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }));
  picture.append(draw("text", { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, "bytes of the weights’ file"));
  picture.append(draw("text", { x: left - 40, y: 10 }, "%"));
  if (float) {
    picture.append(draw("line", { class: "float", x1: left, x2: width - right, y1: y(float.top1), y2: y(float.top1) }));
    const text = `float, ${float.top1.toFixed(1)} % at ${inBytes(float.bytes)}`;
    picture.append(draw("text", { x: left + 6, y: y(float.top1) - 6 }, text));
  }
  lines.forEach(([label, line], index) => {
    const group = draw("g", { class: `series-${index % COLORS}` });
    group.append(draw("polyline", { class: "line", points: line.map((p) => `${x(p.bytes)},${y(p.top1)}`).join(" ") }));
    for (const point of line) {
      const mark = draw("path", { class: "point", d: MARKS[index % MARKS.length] });
      mark.setAttribute("transform", `translate(${x(point.bytes)} ${y(point.top1)})`);
      mark.append(draw("title", {}, `${label}: ${point.top1.toFixed(2)} % at ${inBytes(point.bytes)}`));
      group.append(mark);
    }
    picture.append(group);
  });
  const now = drawn.find(({ model }) => model === here);
  if (now) {
    const side = x(now.bytes) > width / 2 ? "end" : "start";
    const shift = side === "end" ? -14 : 14;
    picture.append(draw("circle", { class: "ring", cx: x(now.bytes), cy: y(now.top1), r: 10 }));
    const text = `${now.top1.toFixed(1)} %, ${inBytes(now.bytes)}`;
    picture.append(draw("text", { class: "here", x: x(now.bytes) + shift, y: y(now.top1) + 30, "text-anchor": side }, text));
  }
  place.replaceChildren(picture);
}

function tickText(bytes) {
  return bytes >= 1e6 ? `${+(bytes / 1e6).toPrecision(3)} MB` : `${+(bytes / 1e3).toPrecision(3)} kB`;
}

function inWords(accuracy, lines) {
  const ends = lines.map(([label, line]) => {
    const [first, last] = [line[0], line[line.length - 1]];
    return `${label}: ${first.top1.toFixed(1)} % at ${inBytes(first.bytes)} to ${last.top1.toFixed(1)} % at ${inBytes(last.bytes)}`;
  });
  return `Top-1 accuracy on ${accuracy.dataset} against bytes. ${ends.join("; ")}.`;
}

/** The names of the lines with their marks, in the order of the plot. */
export function drawLegend(place, accuracy) {
  const entries = linesOf(accuracy.points).map(([label], index) => {
    const entry = element("li", `series-${index % COLORS}`);
    const mark = draw("svg", { viewBox: "-8 -8 16 16", "aria-hidden": "true" });
    mark.append(draw("path", { d: MARKS[index % MARKS.length] }));
    entry.append(mark, label);
    return entry;
  });
  place.replaceChildren(...entries);
}

/** The plot's figures as a table. */
export function drawTable(table, accuracy) {
  const head = element("tr");
  for (const title of ["Weights", "Bytes", "Top-1"]) {
    const cell = element("th", "", title);
    cell.scope = "col";
    head.append(cell);
  }
  const rows = [...accuracy.points].sort((a, b) => b.bytes - a.bytes).map((point) => {
    const name = element("td", "", point.label);
    if (point.model !== point.label) name.append(element("small", "", point.model));
    const figures = [point.bytes.toLocaleString("en"), `${point.top1.toFixed(2)} %`];
    return element("tr", "", name, ...figures.map((text) => element("td", "", text)));
  });
  table.replaceChildren(element("thead", "", head), element("tbody", "", ...rows));
}

// Figures and names as people read them, and elements made in one line.

/** `<tag class=...>` with text or children. */
export function element(tag, className = "", ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

export function inBytes(bytes) {
  const [size, unit] = bytes >= 1e5 ? [bytes / 1e6, "MB"] : [bytes / 1e3, "kB"];
  return `${size >= 100 ? Math.round(size) : size.toPrecision(size >= 1 ? 3 : 2)} ${unit}`;
}

export function inMilliseconds(ms) {
  return `${ms >= 10 ? Math.round(ms) : ms.toFixed(1)} ms`;
}

export function inPercent(share) {
  return `${(100 * share).toFixed(1)} %`;
}

/** "4 bits", "1 bit", or "float" for weights that are not quantized. */
export function inBits(bits) {
  return bits === 32 ? "float" : `${bits} ${bits === 1 ? "bit" : "bits"}`;
}

/** "at 4 bits", "as float". */
export function atBits(bits) {
  return bits === 32 ? "as float" : `at ${inBits(bits)}`;
}

/** The first of a class's names: "tench" of "tench, Tinca tinca". */
export function shortName(label) {
  return label.split(",")[0];
}

/** Indices of the `count` largest values, the largest first. */
export function largest(values, count) {
  return [...values.keys()].sort((a, b) => values[b] - values[a]).slice(0, count);
}

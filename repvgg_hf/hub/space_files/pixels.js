// What the image processor does before the network: resize, crop, normalize, to the same gray levels.

const FILTERS = {
  bilinear: { reach: 1, weight: (x) => Math.max(0, 1 - Math.abs(x)) },
  bicubic: { reach: 2, weight: cubic },
};

function cubic(x) {
  const a = -0.5; // Pillow's and torchvision's coefficient
  x = Math.abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

/** For each output pixel in [from, to): the first input pixel that it sees, and the weights of all that it sees. */
function makeTaps(input, output, from, to, resample) {
  const scale = input / output;
  const taps = [];
  for (let i = from; i < to; i++) {
    if (resample === "nearest") {
      taps.push({ first: Math.floor((i + 0.5) * scale), weights: Float64Array.of(1) });
      continue;
    }
    const { reach, weight } = FILTERS[resample];
    const stretch = Math.max(scale, 1); // a filter as wide as the pixels that become one: antialiasing
    const center = (i + 0.5) * scale;
    const first = Math.max(0, Math.floor(center - reach * stretch + 0.5));
    const end = Math.min(input, Math.floor(center + reach * stretch + 0.5));
    const weights = [];
    for (let j = first; j < end; j++) weights.push(weight((j - center + 0.5) / stretch));
    const sum = weights.reduce((a, b) => a + b, 0);
    taps.push({ first, weights: Float64Array.from(weights, (w) => w / sum) });
  }
  return taps;
}

/** The part of a resized picture that the crop keeps: rows first, then columns, rounded to gray levels in between. */
function resizePart(planes, width, height, size, part, resample) {
  const across = makeTaps(width, size.width, part.left, part.right, resample);
  const down = makeTaps(height, size.height, part.top, part.bottom, resample);
  if (!across.length || !down.length) return planes.map(() => new Uint8ClampedArray(0));
  const firstRow = down[0].first;
  const rows = down[down.length - 1].first + down[down.length - 1].weights.length - firstRow;
  return planes.map((plane) => {
    const narrow = new Uint8ClampedArray(rows * across.length); // a clamped array rounds
    for (let y = 0; y < rows; y++) {
      const row = (firstRow + y) * width;
      for (let x = 0; x < across.length; x++) {
        const { first, weights } = across[x];
        let sum = 0;
        for (let k = 0; k < weights.length; k++) sum += weights[k] * plane[row + first + k];
        narrow[y * across.length + x] = sum;
      }
    }
    const done = new Uint8ClampedArray(down.length * across.length);
    for (let y = 0; y < down.length; y++) {
      const { first, weights } = down[y];
      const row = (first - firstRow) * across.length;
      for (let x = 0; x < across.length; x++) {
        let sum = 0;
        for (let k = 0; k < weights.length; k++) sum += weights[k] * narrow[row + k * across.length + x];
        done[y * across.length + x] = sum;
      }
    }
    return done;
  });
}

/** Planes of one color each from RGBA bytes; one plane of gray, weighted as ITU-R 601 does, for `channels` 1. */
function toPlanes(rgba, count, channels) {
  const planes = Array.from({ length: channels }, () => new Uint8ClampedArray(count));
  if (channels === 1) {
    const weights = [19595, 38470, 7471]; // Pillow's, of 65536
    for (let i = 0, at = 0; i < count; i++, at += 4) {
      planes[0][i] = (rgba[at] * weights[0] + rgba[at + 1] * weights[1] + rgba[at + 2] * weights[2] + 0x8000) >> 16;
    }
    return planes;
  }
  planes.forEach((plane, c) => {
    for (let i = 0, at = c; i < count; i++, at += 4) plane[i] = rgba[at];
  });
  return planes;
}

/** Height and width after resizing: of `{shortest_edge}` the long side is rounded down, as Transformers does. */
function resizedSize(width, height, resize) {
  if (resize === null) return { width, height };
  if (resize.height) return resize;
  const edge = resize.shortest_edge;
  return width <= height
    ? { width: edge, height: Math.floor((edge * height) / width) }
    : { width: Math.floor((edge * width) / height), height: edge };
}

/** Where a centered crop of `want` pixels begins in `have`: {from, to} inside, and the `pad` of zeros before. */
function cropRange(have, want) {
  if (want > have) return { from: 0, to: have, pad: Math.floor((want - have) / 2) };
  const from = Math.floor((have - want) / 2);
  return { from, to: from + want, pad: 0 };
}

/**
 * The gray levels that the network sees.
 * @param {{data: Uint8ClampedArray, width: number, height: number}} picture as RGBA
 * @param {object} settings `pixels` of space.json
 * @returns {{planes: Uint8ClampedArray[], width: number, height: number}}
 */
export function toGrayLevels(picture, settings) {
  const { width, height } = picture;
  const planes = toPlanes(picture.data, width * height, settings.mean.length);
  const size = resizedSize(width, height, settings.resize);
  const crop = settings.crop ?? size;
  const [x, y] = [cropRange(size.width, crop.width), cropRange(size.height, crop.height)];
  const part = { left: x.from, right: x.to, top: y.from, bottom: y.to };
  const parts = resizePart(planes, width, height, size, part, settings.resample);
  const wide = x.to - x.from;
  const padded = parts.map((plane) => {
    const full = new Uint8ClampedArray(crop.width * crop.height);
    for (let row = 0; row < y.to - y.from; row++) {
      full.set(plane.subarray(row * wide, (row + 1) * wide), (row + y.pad) * crop.width + x.pad);
    }
    return full;
  });
  return { planes: padded, width: crop.width, height: crop.height };
}

/** The network's input, float32 [1, channels, height, width], from gray levels. */
export function normalize({ planes, width, height }, { scale, mean, std }) {
  const values = new Float32Array(planes.length * width * height);
  planes.forEach((plane, c) => {
    const offset = c * width * height;
    for (let i = 0; i < plane.length; i++) values[offset + i] = (plane[i] * scale - mean[c]) / std[c];
  });
  return { values, shape: [1, planes.length, height, width] };
}

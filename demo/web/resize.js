// Resizing of 8-bit pictures, number by number as the two libraries do that mmcv resizes with. A
// canvas resizes in ways of its own, which differ between browsers.
//
// A picture is {data, width, height}: data is a Uint8Array of red, green and blue, row by row.

import { PageError } from "./errors.js";

const CHANNELS = 3;

/**
 * Resizes a picture as mmcv's `imresize` does.
 *
 * @param {{data: Uint8Array, width: number, height: number}} picture
 * @param {number} width In pixels.
 * @param {number} height In pixels.
 * @param {string} backend "cv2" or "pillow".
 * @param {string} interpolation "bilinear", or "bicubic" of Pillow.
 */
export function resize(picture, width, height, backend = "cv2", interpolation = "bilinear") {
  if (backend === "cv2" && interpolation === "bilinear") {
    return resizeLinear(picture, width, height);
  }
  if (backend === "pillow" && interpolation in FILTERS) {
    return resizeFiltered(picture, width, height, FILTERS[interpolation]);
  }
  throw new PageError(
    `This page cannot resize with ${backend}, ${interpolation}: it knows cv2 with bilinear, ` +
      `and pillow with ${Object.keys(FILTERS).join(" or ")}.`,
  );
}

// OpenCV, INTER_LINEAR: weights of 11 bits, and products that are cut before they are added.
const LINEAR_BITS = 11;

function resizeLinear({ data, width: fromWidth, height: fromHeight }, width, height) {
  const columns = linearWeights(fromWidth, width, true);
  const rows = linearWeights(fromHeight, height, false);
  const across = new Int32Array(fromHeight * width * CHANNELS);
  for (let y = 0, at = 0; y < fromHeight; y++) {
    const row = y * fromWidth * CHANNELS;
    for (let x = 0; x < width; x++) {
      const left = row + columns.first[x] * CHANNELS;
      const right = row + columns.second[x] * CHANNELS;
      for (let c = 0; c < CHANNELS; c++, at++) {
        const sum = data[left + c] * columns.near[x] + data[right + c] * columns.far[x];
        across[at] = sum >> 4;
      }
    }
  }
  const stride = width * CHANNELS;
  const result = new Uint8Array(height * stride);
  for (let y = 0, at = 0; y < height; y++) {
    const top = rows.first[y] * stride;
    const bottom = rows.second[y] * stride;
    for (let x = 0; x < stride; x++, at++) {
      const upper = (rows.near[y] * across[top + x]) >> 16;
      const lower = (rows.far[y] * across[bottom + x]) >> 16;
      result[at] = (upper + lower + 2) >> 2;
    }
  }
  return { data: result, width, height };
}

/** For each position of a result, two positions of the source and their weights. */
function linearWeights(from, to, clamps) {
  const [first, second, near, far] = [0, 1, 2, 3].map(() => new Int32Array(to));
  const scale = 1 / (to / from);
  const unit = 1 << LINEAR_BITS;
  for (let i = 0; i < to; i++) {
    const place = Math.fround((i + 0.5) * scale - 0.5);
    let begin = Math.floor(place);
    let part = Math.fround(place - begin);
    // Rows outside are those of the border, with weights as they are; columns get new weights.
    if (clamps && begin < 0) [begin, part] = [0, 0];
    if (clamps && begin >= from - 1) [begin, part] = [from - 1, 0];
    first[i] = Math.min(Math.max(begin, 0), from - 1);
    second[i] = Math.min(Math.max(begin + 1, 0), from - 1);
    near[i] = roundHalfEven(Math.fround(Math.fround(1 - part) * unit));
    far[i] = roundHalfEven(Math.fround(part * unit));
  }
  return { first, second, near, far };
}

/** Rounds as Python's `round` does. */
export function roundHalfEven(x) {
  const below = Math.floor(x);
  const rest = x - below;
  if (rest !== 0.5) return Math.round(x);
  return below % 2 === 0 ? below : below + 1;
}

// Pillow: a filter as wide as a pixel of the result, weights of 22 bits, along rows and then along
// columns, with 8 bits in between.
const FILTER_BITS = 22;
const FILTERS = {
  bilinear: { support: 1, weight: (x) => Math.max(0, 1 - Math.abs(x)) },
  bicubic: { support: 2, weight: cubic },
};

/** Keys' cubic with a = -0.5. */
function cubic(x) {
  const a = -0.5;
  const at = Math.abs(x);
  if (at < 1) return ((a + 2) * at - (a + 3)) * at * at + 1;
  if (at < 2) return (((at - 5) * at + 8) * at - 4) * a;
  return 0;
}

function resizeFiltered({ data, width: fromWidth, height: fromHeight }, width, height, filter) {
  const columns = filterWeights(fromWidth, width, filter);
  const across = new Uint8Array(fromHeight * width * CHANNELS);
  for (let y = 0, at = 0; y < fromHeight; y++) {
    for (let x = 0; x < width; x++) {
      const begin = (y * fromWidth + columns[x].begin) * CHANNELS;
      for (let c = 0; c < CHANNELS; c++, at++) {
        across[at] = weighted(data, begin + c, CHANNELS, columns[x].weights);
      }
    }
  }
  const rows = filterWeights(fromHeight, height, filter);
  const stride = width * CHANNELS;
  const result = new Uint8Array(height * stride);
  for (let y = 0, at = 0; y < height; y++) {
    const begin = rows[y].begin * stride;
    for (let x = 0; x < stride; x++, at++) {
      result[at] = weighted(across, begin + x, stride, rows[y].weights);
    }
  }
  return { data: result, width, height };
}

function weighted(data, begin, step, weights) {
  let sum = 1 << (FILTER_BITS - 1);
  for (let i = 0, at = begin; i < weights.length; i++, at += step) sum += data[at] * weights[i];
  return Math.min(Math.max(sum >> FILTER_BITS, 0), 255);
}

/** For each position of a result, where its weights begin in the source, and the weights. */
function filterWeights(from, to, filter) {
  const scale = from / to;
  const widened = Math.max(scale, 1);
  const support = filter.support * widened;
  return Array.from({ length: to }, (_, i) => {
    const centre = (i + 0.5) * scale;
    const begin = Math.max(Math.trunc(centre - support + 0.5), 0);
    const end = Math.min(Math.trunc(centre + support + 0.5), from);
    const exact = [];
    for (let x = begin; x < end; x++) {
      exact.push(filter.weight((x - centre + 0.5) * (1 / widened)));
    }
    const total = exact.reduce((sum, weight) => sum + weight, 0);
    const weights = exact.map((weight) => {
      const part = (weight / total) * (1 << FILTER_BITS);
      return Math.trunc(part < 0 ? part - 0.5 : part + 0.5);
    });
    return { begin, weights };
  });
}

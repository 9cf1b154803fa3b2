// What is drawn over a picture.

import { pasteMask } from "./model.js";

// matplotlib's viridis, at equal steps.
const VIRIDIS = [
  [68, 1, 84],
  [71, 44, 122],
  [59, 81, 139],
  [44, 113, 142],
  [33, 144, 141],
  [39, 173, 129],
  [92, 200, 99],
  [170, 220, 50],
  [253, 231, 37],
];

/** Red, green and blue of a class, each apart from the next. */
export function colourOf(label) {
  const hue = (label * 137.508) % 360;
  const [saturation, lightness] = [0.85, 0.55 - 0.12 * (Math.floor(label / 12) % 2)];
  // From hue, saturation and lightness, as CSS defines it.
  const reach = saturation * Math.min(lightness, 1 - lightness);
  return [0, 8, 4].map((n) => {
    const k = (n + hue / 30) % 12;
    return Math.round(255 * (lightness - reach * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
  });
}

export function css(colour) {
  return `rgb(${colour.join(" ")})`;
}

/** Draws a picture, (width, height) of the canvas then being those of the picture. */
export function drawPicture(canvas, { data, width, height }) {
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = data[3 * i + c];
    image.data[4 * i + 3] = 255;
  }
  context.putImageData(image, 0, 0);
}

/** Mixes a colour for each pixel into a canvas: `pick(i)` gives [red, green, blue] or nothing. */
function tint(canvas, pick, strength) {
  const context = canvas.getContext("2d");
  const image = context.getImageData(0, 0, canvas.width, canvas.height);
  for (let i = 0; i < canvas.width * canvas.height; i++) {
    const colour = pick(i);
    if (!colour) continue;
    for (let c = 0; c < 3; c++) {
      const at = 4 * i + c;
      image.data[at] = image.data[at] * (1 - strength) + colour[c] * strength;
    }
  }
  context.putImageData(image, 0, 0);
}

/** Colours a picture by the label of each pixel. */
export function drawLabels(canvas, { data }) {
  tint(canvas, (i) => colourOf(data[i]), 0.55);
}

/** Draws masks, boxes and names; the best ones last, so that they lie above. */
export function drawInstances(canvas, found) {
  const context = canvas.getContext("2d");
  for (const { label, mask, box } of [...found].reverse()) {
    if (!mask) continue;
    const inside = pasteMask(mask, box, canvas.width, canvas.height);
    tint(canvas, (i) => (inside[i] >= 0.5 ? colourOf(label) : null), 0.5);
  }
  const unit = Math.max(canvas.width, canvas.height) / 400;
  context.font = `${11 * unit}px sans-serif`;
  context.textBaseline = "top";
  for (const { label, name, score, box } of [...found].reverse()) {
    const [x1, y1, x2, y2] = box;
    context.strokeStyle = context.fillStyle = css(colourOf(label));
    context.lineWidth = 1.5 * unit;
    context.strokeRect(x1, y1, x2 - x1, y2 - y1);
    const text = `${name} ${score.toFixed(2)}`;
    const high = 13 * unit;
    const top = Math.max(y1 - high, 0);
    context.fillRect(x1, top, context.measureText(text).width + 4 * unit, high);
    context.fillStyle = "white";
    context.fillText(text, x1 + 2 * unit, top + unit);
  }
}

/**
 * Draws a map: magnitudes over the largest one, and a frame round a cell.
 *
 * @returns {number} The largest magnitude.
 */
export function drawMap(canvas, { data, width, height }, [row, column]) {
  const image = new ImageData(width, height);
  const most = data.reduce((largest, value) => Math.max(largest, Math.abs(value)), 0);
  data.forEach((value, i) => {
    const at = most > 0 ? Math.abs(value) / most : 0;
    viridis(at).forEach((part, c) => (image.data[4 * i + c] = part));
    image.data[4 * i + 3] = 255;
  });
  const small = new OffscreenCanvas(width, height);
  small.getContext("2d").putImageData(image, 0, 0);
  // Pixels of a cell, so that its frame is a line.
  const unit = Math.max(1, Math.ceil(400 / Math.max(width, height)));
  canvas.width = width * unit;
  canvas.height = height * unit;
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(small, 0, 0, canvas.width, canvas.height);
  context.strokeStyle = "red";
  context.lineWidth = Math.max(unit / 8, 3);
  context.strokeRect(column * unit, row * unit, unit, unit);
  return most;
}

function viridis(at) {
  const place = at * (VIRIDIS.length - 1);
  const begin = Math.min(Math.floor(place), VIRIDIS.length - 2);
  return VIRIDIS[begin].map((low, c) => low + (VIRIDIS[begin + 1][c] - low) * (place - begin));
}

/** Marks a position, in pixels of the canvas. */
export function drawCross(canvas, x, y) {
  const context = canvas.getContext("2d");
  const arm = Math.max(canvas.width, canvas.height) / 40;
  for (const [colour, width] of [
    ["black", arm / 2],
    ["white", arm / 4],
  ]) {
    context.strokeStyle = colour;
    context.lineWidth = width;
    context.beginPath();
    context.moveTo(x - arm, y);
    context.lineTo(x + arm, y);
    context.moveTo(x, y - arm);
    context.lineTo(x, y + arm);
    context.stroke();
  }
}

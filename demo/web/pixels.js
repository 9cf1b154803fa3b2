// From a picture's file to what a model takes, as the model's JSON says.

import { PageError } from "./errors.js";
import { resize, roundHalfEven } from "./resize.js";

/** Decodes a picture's file: {data, width, height}, red, green and blue. */
export async function decode(blob) {
  // As OpenCV reads files: turned as they say, in the colours that they store.
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none" });
  } catch {
    throw new PageError(`${blob.name ?? "This file"} is no picture that this browser can read.`);
  }
  const { width, height } = bitmap;
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { alpha: false, willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  const { data } = context.getImageData(0, 0, width, height);
  const colours = new Uint8Array(width * height * 3);
  for (let i = 0, at = 0; at < colours.length; i += 4) {
    for (let c = 0; c < 3; c++, at++) colours[at] = data[i + c];
  }
  return { data: colours, width, height };
}

// The steps of a test pipeline, by name; with the settings that each of them has here.
const STEPS = {
  LoadImageFromFile: {
    settings: ["backend_args", "imdecode_backend", "color_type"],
    apply(picture, { color_type: kind = "color" }) {
      if (kind !== "color") refuse("LoadImageFromFile", `color_type="${kind}"`);
      return picture;
    },
  },
  Resize: {
    settings: ["scale", "keep_ratio", "backend", "interpolation"],
    apply(picture, { scale, keep_ratio: keeps = false, backend, interpolation }) {
      const sides = typeof scale === "number" ? [scale, scale] : scale;
      const [width, height] = keeps ? fitted(picture, sides) : sides;
      return resize(picture, width, height, backend, interpolation);
    },
  },
  ResizeEdge: {
    settings: ["scale", "edge", "backend", "interpolation"],
    apply(picture, { scale, edge = "short", backend, interpolation }) {
      const { width, height } = picture;
      const byWidth =
        (edge === "short" && width < height) || (edge === "long" && width > height) || edge === "width";
      const [wide, high] = byWidth
        ? [scale, Math.trunc((scale * height) / width)]
        : [Math.trunc((scale * width) / height), scale];
      return resize(picture, wide, high, backend, interpolation);
    },
  },
  CenterCrop: {
    settings: ["crop_size"],
    apply(picture, { crop_size: size }) {
      const [width, height] = typeof size === "number" ? [size, size] : size;
      return crop(picture, Math.min(width, picture.width), Math.min(height, picture.height));
    },
  },
};

/** Changes a picture as the steps of a test pipeline do. */
export function transform(picture, steps) {
  for (const { type, ...settings } of steps) {
    const name = type.split(".").pop();
    const step = STEPS[name];
    if (!step) refuse(`the step ${name}`);
    const unknown = Object.keys(settings).find((key) => !step.settings.includes(key));
    if (unknown) refuse(name, `${unknown}=${JSON.stringify(settings[unknown])}`);
    picture = step.apply(picture, settings);
  }
  return picture;
}

function refuse(...what) {
  throw new PageError(
    `This page cannot do ${what.join(" with ")} of the model's test pipeline: it knows ` +
      `${Object.keys(STEPS).join(", ")}. Export the model with another test pipeline.`,
  );
}

/** Width and height within a scale, of a picture's ratio. */
function fitted({ width, height }, scale) {
  const factor = Math.min(
    Math.max(...scale) / Math.max(width, height),
    Math.min(...scale) / Math.min(width, height),
  );
  return [width, height].map((side) => Math.trunc(side * factor + 0.5));
}

function crop(picture, width, height) {
  const top = roundHalfEven((picture.height - height) / 2);
  const left = roundHalfEven((picture.width - width) / 2);
  const data = new Uint8Array(width * height * 3);
  for (let y = 0; y < height; y++) {
    const begin = ((top + y) * picture.width + left) * 3;
    data.set(picture.data.subarray(begin, begin + width * 3), y * width * 3);
  }
  return { data, width, height };
}

/** A picture as a model takes it: (3, height, width), one channel after the other. */
export function planes({ data, width, height }, channels) {
  const size = width * height;
  const result = new Float32Array(3 * size);
  for (let c = 0; c < 3; c++) {
    // What OpenMMLab loads has blue first.
    const from = channels === "RGB" ? c : 2 - c;
    for (let i = 0; i < size; i++) result[c * size + i] = data[3 * i + from];
  }
  return result;
}

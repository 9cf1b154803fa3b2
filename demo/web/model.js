// An exported model: its JSON, its graph, and the graph of what drives its scans.

import { PageError } from "./errors.js";
import { planes, transform } from "./pixels.js";

/** Version of the JSON's format, as mmvmamba/deployment/record.py has it. */
export const FORMAT = 2;

/** By task, what this page calls its models, and the result by which it knows them. */
const TASKS = {
  mmpretrain: ["classifier", "probabilities"],
  mmseg: ["segmentor", "labels"],
  mmdet: ["detector", "boxes"],
};

let runtime;

/** ONNX Runtime, which lies beside this page. */
async function loadRuntime() {
  if (typeof WebAssembly !== "object") {
    throw new PageError("This browser has no WebAssembly, in which models run: use a newer one.");
  }
  try {
    runtime ??= await import("./ort/ort.wasm.bundle.min.mjs");
  } catch {
    throw new PageError(
      "onnxruntime-web is not beside this page: `python -m mmvmamba.demo` brings it.",
    );
  }
  runtime.env.logLevel = "error";
  return runtime;
}

/** Reads the JSON beside an exported model. */
export function readRecord(text, name) {
  let record;
  try {
    record = JSON.parse(text);
  } catch {
    throw new PageError(`${name} is no JSON: export the model anew.`);
  }
  if (!Number.isInteger(record?.format) || !Array.isArray(record.transforms)) {
    throw new PageError(`${name} is no record of an export: export the model anew.`);
  }
  if (record.format > FORMAT) {
    throw new PageError(
      `${name} has format ${record.format}, this page reads up to ${FORMAT}: update mmvmamba.`,
    );
  }
  const [kind, result] = TASKS[record.task] ?? [];
  if (!kind || !record.outputs.includes(result)) {
    const known = Object.values(TASKS).map(([one]) => `${one}s`);
    throw new PageError(
      `This page shows ${known.join(", ")}; ${name} is of a model of ${record.task} that gives ` +
        `${record.outputs.join(", ")}.`,
    );
  }
  if (record.custom_op) {
    throw new PageError(
      `${name} is of a model that needs a library of its own, which no browser has: export it ` +
        "without --custom-op.",
    );
  }
  return { ...record, kind };
}

export class Model {
  /**
   * @param {object} record As `readRecord` gives it.
   * @param {object} sessions Of ONNX Runtime: `model`, and `scans` where there is one.
   */
  constructor(record, sessions) {
    this.record = record;
    this.sessions = sessions;
  }

  /** Opens files, by what they are: {record: [name, text], model: bytes, scans: bytes or none}. */
  static async open(files) {
    const record = readRecord(files.record[1], files.record[0]);
    const ort = await loadRuntime();
    const sessions = {};
    for (const name of ["model", "scans"]) {
      if (!files[name] || (name === "scans" && !record.scans)) continue;
      try {
        sessions[name] = await ort.InferenceSession.create(files[name]);
      } catch (error) {
        throw new PageError(
          `onnxruntime-web ${ort.env.versions.web} cannot open the model: ${firstLine(error)}`,
        );
      }
    }
    const channels = sessions.model.inputMetadata[0].shape[1];
    if (channels !== 3) {
      throw new PageError(`The model takes images of ${channels} channels; a picture here has 3.`);
    }
    return new Model(record, sessions);
  }

  /** What the model is given of a picture; see pixels.js. */
  prepare(picture) {
    const image = transform(picture, this.record.transforms);
    const { width, height } = image;
    const { size, least } = this.record;
    if (size && (size[0] !== height || size[1] !== width)) {
      throw new PageError(
        `The model was made for images of ${size.join("x")} pixels, the picture has ` +
          `${height}x${width} after its steps: export the model for any size, with --dynamic.`,
      );
    }
    if (Math.min(width, height) < least) {
      throw new PageError(
        `The model takes images from ${least} pixels, the picture has ${height}x${width}.`,
      );
    }
    return image;
  }

  /** Runs the model on what `prepare` gave: {results, milliseconds}. */
  async run(image) {
    const begin = performance.now();
    const found = await this.#call(this.sessions.model, image);
    const milliseconds = performance.now() - begin;
    return { results: named(this.record.outputs, found), milliseconds };
  }

  /** What drives the scans for an image: for each stage of the record {Q, K, dt, A}. */
  async scans(image) {
    const found = await this.#call(this.sessions.scans, image);
    const parts = ["Q", "K", "dt", "A"];
    return this.record.scans.stages.map((_, i) =>
      named(parts, found.slice(parts.length * i, parts.length * (i + 1))),
    );
  }

  /** The cell of a map (height, width) of a position, [row, column] in pixels of an image. */
  cellOf(query, image, size) {
    const { divisor } = this.record.scans;
    // Maps cover the padded image.
    return [image.height, image.width].map((side, i) => {
      const padded = Math.ceil(side / divisor) * divisor;
      return Math.floor((query[i] * size[i]) / padded);
    });
  }

  /** The results for an image, in the order of the graph's outputs. */
  async #call(session, image) {
    const pixels = planes(image, this.record.channels);
    const images = new runtime.Tensor("float32", pixels, [1, 3, image.height, image.width]);
    try {
      const found = await session.run({ [session.inputNames[0]]: images });
      return session.outputNames.map((name) => plain(found[name]));
    } catch (error) {
      throw new PageError(`onnxruntime-web cannot run the model: ${firstLine(error)}`);
    }
  }
}

/** A tensor as {data, shape}, whose numbers are numbers. */
function plain({ data, dims }) {
  const numbers = data instanceof BigInt64Array ? Int32Array.from(data, Number) : data;
  return { data: numbers, shape: [...dims] };
}

function named(names, values) {
  return Object.fromEntries(names.map((name, i) => [name, values[i]]));
}

/** The classes, the most probable first: [{name, probability}]. */
export function ranked({ data }, classes) {
  const found = Array.from(data, (probability, i) => ({ name: nameOf(classes, i), probability }));
  return found.sort((a, b) => b.probability - a.probability);
}

/** The classes of a label map, the largest first: [{label, name, share}]. */
export function shares({ data }, classes) {
  const counts = new Map();
  for (const label of data) counts.set(label, (counts.get(label) ?? 0) + 1);
  return Array.from(counts, ([label, count]) => ({
    label,
    name: nameOf(classes, label),
    share: count / data.length,
  })).sort((a, b) => b.share - a.share);
}

/** What was detected with at least a score: [{label, name, score, box, mask}]. */
export function instances({ boxes, scores, labels, masks }, classes, threshold) {
  const found = [];
  scores.data.forEach((score, i) => {
    if (score < threshold) return;
    const area = masks && masks.shape[1] * masks.shape[2];
    found.push({
      label: labels.data[i],
      name: nameOf(classes, labels.data[i]),
      score,
      box: boxes.data.subarray(4 * i, 4 * i + 4),
      mask: masks && {
        data: masks.data.subarray(area * i, area * (i + 1)),
        height: masks.shape[1],
        width: masks.shape[2],
      },
    });
  });
  return found;
}

/**
 * Lays a mask over an image, as `mmvmamba.deployment.check.paste_mask` does.
 *
 * @returns {Float32Array} Probabilities of the image's pixels, zero outside of the box.
 */
export function pasteMask(mask, [x1, y1, x2, y2], width, height) {
  const columns = places(x1, x2, width, mask.width);
  const rows = places(y1, y2, height, mask.height);
  const at = (y, x) =>
    y < 0 || x < 0 || y >= mask.height || x >= mask.width ? 0 : mask.data[y * mask.width + x];
  const result = new Float32Array(width * height);
  rows.forEach((y, i) => {
    if (y <= -1 || y >= mask.height) return;
    const [top, low] = [Math.floor(y), y - Math.floor(y)];
    columns.forEach((x, j) => {
      if (x <= -1 || x >= mask.width) return;
      const [left, right] = [Math.floor(x), x - Math.floor(x)];
      const upper = at(top, left) * (1 - right) + at(top, left + 1) * right;
      const lower = at(top + 1, left) * (1 - right) + at(top + 1, left + 1) * right;
      result[i * width + j] = upper * (1 - low) + lower * low;
    });
  });
  return result;
}

/** Where the centres of pixels lie in a mask between two borders of a box. */
function places(begin, end, pixels, cells) {
  const extent = Math.max(end - begin, 2 ** -23);
  return Float64Array.from({ length: pixels }, (_, i) => ((i + 0.5 - begin) / extent) * cells - 0.5);
}

function nameOf(classes, label) {
  return classes[label] ?? `class ${label}`;
}

function firstLine(error) {
  return String(error?.message ?? error).split("\n")[0];
}

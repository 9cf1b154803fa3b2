// The page: what its controls do, and what it shows.

import * as draw from "./draw.js";
import { PageError } from "./errors.js";
import { KINDS, mapsOf, nameOf } from "./maps.js";
import { instances, Model, ranked, shares } from "./model.js";
import { decode } from "./pixels.js";

// What is shown at most, and from which score on.
const MOST = 5;
const THRESHOLD = 0.3;
const SERVED = "model/model.onnx";
const SAMPLE = "picture.jpg";

/** What is open and what was computed; null for what is not there yet. */
export const state = {
  model: null,
  picture: null,
  image: null,
  results: null,
  scans: null,
  query: null,
  maps: null,
};

const at = (id) => document.getElementById(id);

// One thing after the other: the runtime takes one call at a time.
let tasks = Promise.resolve();

function queue(what, task) {
  tasks = tasks.then(async () => {
    at("error").hidden = true;
    at("status").textContent = `${what} …`;
    // The browser shows it before the runtime takes the thread.
    await new Promise((resolve) => setTimeout(resolve, 20));
    try {
      at("status").textContent = (await task()) ?? "";
    } catch (error) {
      at("status").textContent = "";
      at("error").hidden = false;
      at("error").textContent = error.message;
      if (!(error instanceof PageError)) console.error(error);
    }
    document.body.dataset.done = Number(document.body.dataset.done ?? 0) + 1;
  });
  return tasks;
}

async function openModel(files) {
  state.model = null;
  forget();
  at("maps").hidden = true;
  state.model = await Model.open(files);
  const { record, sessions } = state.model;
  at("maps").hidden = !sessions.scans;
  if (sessions.scans) {
    const stages = record.scans.stages.map(
      ({ stage, block }, i) => new Option(`${stage}, block ${block}`, i),
    );
    at("stage").replaceChildren(...stages);
  }
  return (await predict()) ?? `A ${record.kind}, ${record.config}. Open a picture.`;
}

/** Of a picture that is no longer shown. */
function forget() {
  state.results = state.scans = state.query = state.maps = null;
  at("hint").hidden = false;
  at("maps-shown").hidden = true;
  at("results").replaceChildren();
}

/** Sorts files by what they are: a picture, or the parts of a model. */
async function openFiles(files) {
  const graphs = files.filter((file) => file.name.endsWith(".onnx"));
  const record = files.find((file) => file.name.endsWith(".json"));
  if (!graphs.length && !record) return openPicture(files[0]);
  const scans = graphs.find((file) => file.name.endsWith(".scans.onnx"));
  const model = graphs.find((file) => file !== scans);
  if (!model) throw new PageError(`Open the model's .onnx file together with ${files[0].name}.`);
  if (!record) {
    throw new PageError(
      `${model.name}.json is missing: open it together with ${model.name}, or export anew.`,
    );
  }
  const bytes = async (file) => file && new Uint8Array(await file.arrayBuffer());
  return openModel({
    record: [record.name, await record.text()],
    model: await bytes(model),
    scans: await bytes(scans),
  });
}

/** The model that lies beside this page, if there is one. */
async function openServed() {
  const record = await fetch(`${SERVED}.json`);
  if (!record.ok) return "Open a model.";
  const bytes = async (path) => {
    const found = await fetch(path);
    return found.ok ? new Uint8Array(await found.arrayBuffer()) : undefined;
  };
  const text = await record.text();
  const model = await bytes(SERVED);
  if (!model) throw new PageError(`${SERVED} is not beside this page, its JSON is.`);
  const scans = await bytes(SERVED.replace(".onnx", ".scans.onnx"));
  return openModel({ record: [`${SERVED}.json`, text], model, scans });
}

async function openPicture(blob) {
  state.picture = await decode(blob);
  return (await predict()) ?? "Open a model.";
}

/** Runs the model on the picture; says how long it took, or nothing if one of them is missing. */
async function predict() {
  const { model, picture } = state;
  forget();
  if (picture) draw.drawPicture(at("picture"), picture);
  at("caption").textContent = "";
  if (!model || !picture) return undefined;
  state.image = model.prepare(picture);
  const { width, height } = state.image;
  const { results, milliseconds } = await model.run(state.image);
  state.results = results;
  at("caption").textContent = `As the model sees it: ${width} × ${height} pixels.`;
  at("picture").classList.toggle("clickable", "scans" in model.sessions);
  show();
  return `A ${model.record.kind}, ${model.record.config}: ${Math.round(milliseconds)} ms.`;
}

/** Shows picture and results, and the position that was clicked on. */
function show() {
  const { model, image, results, query } = state;
  const { classes } = model.record;
  const canvas = at("picture");
  draw.drawPicture(canvas, image);
  let rows = [];
  if (results.probabilities) {
    rows = ranked(results.probabilities, classes)
      .slice(0, MOST)
      .map(({ name, probability }) => row(name, probability, bar(probability)));
  } else if (results.boxes) {
    const found = instances(results, classes, THRESHOLD);
    draw.drawInstances(canvas, found);
    rows = found.map(({ label, name, score }) => row(name, score, swatch(label)));
    if (!rows.length) rows = [row(`nothing with a score from ${THRESHOLD}`)];
  } else {
    draw.drawLabels(canvas, results.labels);
    rows = shares(results.labels, classes).map(({ label, name, share }) =>
      row(name, share, swatch(label)),
    );
  }
  const table = document.createElement("table");
  table.append(...rows);
  at("results").replaceChildren(table);
  if (query) draw.drawCross(canvas, query[1] + 0.5, query[0] + 0.5);
}

/** A row of the table; an element with a colour stands before the name, a bar behind the number. */
function row(name, number, mark) {
  const found = document.createElement("tr");
  const cells = [document.createElement("td"), document.createElement("td")];
  cells[0].textContent = name;
  cells[1].className = "number";
  cells[1].textContent = number === undefined ? "" : `${(100 * number).toFixed(1)} %`;
  if (mark?.className === "swatch") cells[0].prepend(mark);
  else if (mark) cells.push(Object.assign(document.createElement("td"), { width: "40%" }));
  if (cells[2]) cells[2].append(mark);
  found.append(...cells);
  return found;
}

function bar(value) {
  return Object.assign(document.createElement("meter"), { value });
}

function swatch(label) {
  const found = Object.assign(document.createElement("span"), { className: "swatch" });
  found.style.background = draw.css(draw.colourOf(label));
  return found;
}

/** Asks what a position, [row, column] in pixels of the image, takes from the others. */
async function ask(query) {
  const { model, image } = state;
  const begin = performance.now();
  state.scans ??= await model.scans(image);
  state.query = query;
  at("hint").hidden = true;
  at("maps-shown").hidden = false;
  show();
  showMaps();
  return `Row ${query[0]}, column ${query[1]}: ${Math.round(performance.now() - begin)} ms.`;
}

function showMaps() {
  const { model, image, scans, query } = state;
  const { paths } = model.record.scans.stages[at("stage").value];
  const given = scans[at("stage").value];
  const cell = model.cellOf(query, image, given.dt.shape.slice(1, 3));
  state.maps = mapsOf(given, paths, cell);
  const { each, sum } = state.maps[at("kind").value];
  const largest = draw.drawMap(at("sum"), sum, cell);
  at("sum-caption").textContent =
    `All paths, ${sum.height} × ${sum.width} positions. The brightest is ${largest.toPrecision(3)}.`;
  const figures = each.map((map, k) => {
    const figure = document.createElement("figure");
    const canvas = Object.assign(document.createElement("canvas"), { className: "map" });
    draw.drawMap(canvas, map, cell);
    const caption = document.createElement("figcaption");
    caption.textContent = nameOf(paths[k]);
    figure.append(canvas, caption);
    return figure;
  });
  at("paths").replaceChildren(...figures);
}

function start() {
  at("kind").replaceChildren(...Object.entries(KINDS).map(([kind, text]) => new Option(text, kind)));
  at("kind").value = "contribution";
  for (const id of ["model-files", "picture-file"]) {
    at(id).addEventListener("change", ({ target }) => {
      const files = [...target.files];
      // The same file can be opened again, after it has changed.
      target.value = "";
      if (files.length) queue("Opening", () => openFiles(files));
    });
  }
  at("sample").addEventListener("click", () =>
    queue("Computing", async () => openPicture(await (await fetch(SAMPLE)).blob())),
  );
  at("picture").addEventListener("click", (event) => {
    if (!state.model?.sessions.scans || !state.results) return;
    const { width, height } = at("picture").getBoundingClientRect();
    const place = [
      [event.offsetY, height, state.image.height],
      [event.offsetX, width, state.image.width],
    ].map(([where, shown, side]) =>
      Math.min(Math.max(Math.floor((where / shown) * side), 0), side - 1),
    );
    // Another picture may have been opened before this one's turn.
    const { image } = state;
    queue("Computing", () => (state.image === image ? ask(place) : undefined));
  });
  for (const id of ["stage", "kind"]) at(id).addEventListener("change", showMaps);
  for (const type of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(type, (event) => {
      event.preventDefault();
      document.documentElement.classList.toggle("dropping", type === "dragover");
      const files = [...(event.dataTransfer?.files ?? [])];
      if (type === "drop" && files.length) queue("Opening", () => openFiles(files));
    });
  }
  queue("Opening", openServed);
}

start();

// The page: which picture and which bit-width are chosen, and what has been found out about them.

import { Camera, decode, findPicture } from "./pictures.js";
import { drawLegend, drawPlot, drawTable } from "./plot.js";
import * as view from "./view.js";
import { inBits, inBytes, inMilliseconds, inPercent, largest } from "./words.js";

const $ = (id) => document.getElementById(id);
const LIVE = "camera";

const worker = new Worker(new URL("./engine.js", import.meta.url), { type: "module" });
const waiting = new Map();
let calls = 0;

/** Ask the worker for an action of engine.js; `transfer` are buffers that it gets without a copy. */
function ask(action, values, transfer = []) {
  const id = ++calls;
  worker.postMessage({ id, action, ...values }, transfer);
  return new Promise((resolve, reject) => waiting.set(id, { resolve, reject }));
}

worker.onmessage = ({ data: { id, result, error, progress } }) => {
  if (progress) return showDownload(progress);
  const { resolve, reject } = waiting.get(id);
  waiting.delete(id);
  if (error === undefined) resolve(result);
  else reject(new Error(error));
};
worker.onerror = (event) => view.showNotice(`The page's script engine.js failed: ${event.message ?? "it can't be had"}.`);

let family = null;
let engine = null; // what starting it returned
let index = 0; // of the model that the slider is at
let key = null; // of the picture that is shown
let latest = 0; // of the updates: an older one that ends later shows nothing
let comparing = false;
let own = null; // the visitor's picture
let owns = 0; // how many there have been
const pictures = new Map(); // key -> {key, caption, url, blob(), pixels}; pixels may be missing
const prepared = new Map(); // key -> promise of {ms}
const loading = new Map(); // model's name -> promise of {bytes, ms}
const loaded = new Map(); // model's name -> {bytes, ms}
const results = new Map(); // key and model's name -> {probabilities, logits, ms}
const camera = new Camera($("video"));

const find = (picture, model) => results.get(`${picture} ${model.name}`);

function load(model) {
  if (!loading.has(model.name)) {
    const promise = ask("load", { model });
    loading.set(model.name, promise);
    promise.then((done) => (loaded.set(model.name, done), showEngine()), () => loading.delete(model.name));
  }
  return loading.get(model.name);
}

async function sendPicture(picture) {
  const pixels = picture.pixels ?? (await decode(await picture.blob(), picture.caption));
  delete picture.pixels; // its buffer goes to the worker
  return ask("prepare", { key: picture.key, picture: pixels }, [pixels.data.buffer]);
}

function prepare(picture) {
  if (!prepared.has(picture.key)) {
    const promise = sendPicture(picture);
    prepared.set(picture.key, promise);
    promise.catch(() => prepared.delete(picture.key));
  }
  return prepared.get(picture.key);
}

/** The result of a picture and a model, found now if it was not known. */
async function classify(picture, model, once = false) {
  const [{ ms }] = await Promise.all([prepare(picture), load(model)]);
  const known = find(picture.key, model);
  if (known && (once || !known.once)) return known;
  const result = { ...(await ask("run", { key: picture.key, model, once })), prepared: ms, once };
  results.set(`${picture.key} ${model.name}`, result);
  return result;
}

/** The result at the most bits that are known for a picture, other than those shown. */
function resultBefore({ key: of }, model) {
  const other = family.models.find((entry) => entry.bits > model.bits && find(of, entry));
  return other ? { model: other, result: find(of, other) } : null;
}

function showResult(model, result, picture) {
  view.showFigures(family, model, loaded.get(model.name), result, picture);
  if (result) view.showAnswers(family.labels, result, resultBefore(picture, model));
}

function showTable() {
  const rows = [...pictures.values()].filter((picture) => picture.key !== LIVE);
  view.showChanges(family, index, rows, find);
  const left = family.models.filter(({ name }) => !loaded.has(name)).reduce((sum, { bytes }) => sum + bytes, 0);
  const done = rows.every((picture) => family.models.every((model) => find(picture.key, model)));
  if (comparing) return;
  $("compare").disabled = done || !rows.length;
  $("compare").textContent = done && rows.length ? "All compared" : left ? `Compare all, ${inBytes(left)} more` : "Compare all";
}

/** Show the chosen bit-width on the chosen picture: at once if it is known, and as soon as it is there. */
async function update() {
  const ticket = ++latest;
  const [model, picture] = [family.models[index], pictures.get(key)];
  view.showBits(family.models, index);
  drawAccuracy();
  showTable();
  history.replaceState(null, "", `#${model.name}`);
  if (camera.on) return; // it shows what it sees itself
  if (!picture) return view.showFigures(family, model, loaded.get(model.name), undefined, null);
  const known = find(key, model);
  showResult(model, known, picture);
  if (!known) view.fadeAnswers();
  try {
    const result = await classify(picture, model);
    if (ticket !== latest || camera.on) return;
    view.showNotice(null);
    showResult(model, result, picture);
    speak(model, result);
    for (const other of family.models.filter(({ name }) => loaded.has(name))) await classify(picture, other, true);
    if (ticket !== latest || camera.on) return;
    showResult(model, result, picture);
    showTable();
  } catch (error) {
    if (ticket === latest) view.showNotice(error.message);
  } finally {
    if (ticket === latest) document.body.dataset.done = `${key} ${model.name}`;
  }
}

function speak(model, { probabilities, ms }) {
  const [label] = largest(probabilities, 1);
  const answer = `${family.labels[label]}, ${inPercent(probabilities[label])}`;
  $("spoken").textContent = `${inBits(model.bits)}: ${answer}; ${inBytes(model.bytes)}, ${inMilliseconds(ms)}.`;
}

function choose(position) {
  index = position;
  update();
}

/** Show a picture, and which of the samples it is, if it is one. */
function show(picture) {
  stopCamera();
  key = picture.key;
  $("picture").src = picture.url;
  $("picture").alt = picture.caption;
  $("picture").onload = ({ target }) => target.classList.toggle("small", target.naturalWidth < 200);
  $("picture").hidden = false;
  $("drop").classList.add("full");
  for (const button of $("samples").children) button.setAttribute("aria-pressed", button.dataset.key === key);
  update();
}

/** A picture that the visitor gave takes the place of the one before. */
async function showOwn(blob, caption) {
  let pixels;
  try {
    pixels = await decode(blob, caption);
  } catch (error) {
    return view.showNotice(error.message);
  }
  view.showNotice(null);
  const samples = [...pictures].filter(([name]) => name !== own?.key);
  if (own) forget(own);
  own = { key: `own-${++owns}`, caption, url: URL.createObjectURL(blob), blob: async () => blob, pixels };
  pictures.clear();
  for (const [name, picture] of [[own.key, own], ...samples]) pictures.set(name, picture);
  show(own);
}

function forget(picture) {
  URL.revokeObjectURL(picture.url);
  prepared.delete(picture.key);
  for (const model of family.models) results.delete(`${picture.key} ${model.name}`);
  ask("forget", { key: picture.key });
}

async function startCamera() {
  $("camera").disabled = true; // until the visitor has allowed it
  try {
    await camera.start();
  } catch (error) {
    return view.showNotice(error.message);
  } finally {
    $("camera").disabled = false;
  }
  view.showNotice(null);
  $("video").hidden = false;
  $("picture").hidden = true;
  $("drop").classList.add("full");
  $("camera").textContent = "Take the picture";
  $("camera").setAttribute("aria-pressed", "true");
  let count = 0;
  try {
    while (camera.on) {
      const [model, picture] = [family.models[index], camera.frame()];
      await load(model);
      const { ms } = await ask("prepare", { key: LIVE, picture }, [picture.data.buffer]);
      const result = { ...(await ask("run", { key: LIVE, model, once: true })), prepared: ms };
      if (camera.on && model === family.models[index]) showResult(model, result, { key: LIVE });
      document.body.dataset.frames = ++count;
      await new Promise(requestAnimationFrame);
    }
  } catch (error) {
    stopCamera();
    view.showNotice(error.message);
  }
}

function stopCamera() {
  camera.stop();
  $("video").hidden = true;
  $("camera").textContent = "Use the camera";
  $("camera").setAttribute("aria-pressed", "false");
}

/** Every picture through every network. */
async function compareAll() {
  comparing = true;
  $("compare").disabled = true;
  const all = [...pictures.values()].flatMap((picture) => family.models.map((model) => [picture, model]));
  try {
    for (const [count, [picture, model]] of all.entries()) {
      $("compare").textContent = `${count + 1} of ${all.length}`;
      await classify(picture, model, true);
      showTable();
    }
    view.showNotice(null);
  } catch (error) {
    view.showNotice(error.message);
  }
  comparing = false;
  update();
  document.body.dataset.compared = "yes";
}

function showDownload({ what, received, total }) {
  const model = family.models.find(({ name }) => name === what);
  const expected = total ?? (model ?? family.engine).bytes;
  const words = model ? `Downloading the network of ${inBits(model.bits)}` : "Downloading ONNX Runtime, once";
  view.showProgress(received < expected ? { received, total: expected } : null, words);
}

function showEngine() {
  const networks = [...loaded.values()].reduce((sum, { bytes }) => sum + bytes, 0);
  const threads = `${engine.threads} ${engine.threads === 1 ? "thread" : "threads"}`;
  const together = loaded.size ? `, ${inBytes(networks)} together` : "";
  $("engine").textContent = `ONNX Runtime Web ${family.engine.version} as WebAssembly (${inBytes(engine.bytes)}), ${threads}; `
    + `${loaded.size} of ${family.models.length} networks downloaded${together}.`;
}

function drawAccuracy() {
  if (family.accuracy) drawPlot($("plot"), family.accuracy, family.models[index].measured);
}

function showAccuracy() {
  if (!family.accuracy) return;
  $("accuracy").hidden = false;
  $("accuracy-words").textContent = `Top-1 accuracy on ${family.accuracy.dataset}. The ring is where the slider is.`;
  drawLegend($("plot-legend"), family.accuracy);
  drawTable($("plot-table"), family.accuracy);
  new ResizeObserver(drawAccuracy).observe($("plot"));
}

function showSamples() {
  family.images.forEach(({ file, caption }, at) => {
    const blob = async () => {
      const answer = await fetch(file);
      if (!answer.ok) throw new Error(`${file} can't be had (${answer.status}): the Space's files are not complete.`);
      return answer.blob();
    };
    const picture = { key: `sample-${at}`, caption, url: file, blob };
    pictures.set(picture.key, picture);
    const [button, image] = [document.createElement("button"), document.createElement("img")];
    [button.type, button.title, button.dataset.key] = ["button", caption, picture.key];
    [image.src, image.alt] = [file, caption];
    button.append(image);
    button.onclick = () => show(picture);
    $("samples").append(button);
  });
}

function listen() {
  let pause;
  $("slider").oninput = ({ target }) => {
    index = Number(target.value);
    view.showBits(family.models, index);
    clearTimeout(pause); // what is only passed over is not downloaded
    pause = setTimeout(update, loaded.has(family.models[index].name) ? 0 : 250);
  };
  $("choose").onclick = () => $("file").click();
  $("file").onchange = ({ target }) => {
    if (target.files[0]) showOwn(target.files[0], target.files[0].name);
    target.value = "";
  };
  $("camera").onclick = async () => (camera.on ? showOwn(await camera.take(), "From the camera") : startCamera());
  $("compare").onclick = compareAll;
  document.addEventListener("paste", ({ clipboardData }) => {
    const found = findPicture(clipboardData);
    if (found) showOwn(found, found.name || "Pasted picture");
  });
  const drop = $("drop");
  for (const [name, over] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
    document.addEventListener(name, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", over);
      const found = name === "drop" ? findPicture(event.dataTransfer) : null;
      if (found) showOwn(found, found.name);
    });
  }
}

/** The bit-width that the address names; else 4 bits, which are few bytes and lose little; else the most. */
function firstIndex(models) {
  const named = models.findIndex(({ name }) => name === decodeURIComponent(location.hash.slice(1)));
  return Math.max(0, named >= 0 ? named : models.findIndex(({ bits }) => bits === 4));
}

async function begin() {
  const answer = await fetch("space.json");
  if (!answer.ok) throw new Error(`space.json can't be had (${answer.status}): the Space's files are not complete.`);
  family = await answer.json();
  document.title = family.title;
  $("title").textContent = family.title.replaceAll("-", "\u2011"); // which does not break a line
  index = firstIndex(family.models);
  view.showStops(family.models, choose);
  view.showBits(family.models, index);
  showSamples();
  showAccuracy();
  listen();
  const starting = ask("start", { engine: family.engine, settings: family.pixels });
  starting.then((done) => (engine = done, showEngine()), (error) => view.showNotice(`ONNX Runtime can't start: ${error.message}`));
  const [first] = pictures.values();
  if (first) show(first);
  else update();
}

begin().catch((error) => view.showNotice(error.message));

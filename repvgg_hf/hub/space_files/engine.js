// ONNX Runtime in a worker of its own, so that the page never waits: it loads models, prepares pictures, runs networks.

import { normalize, toGrayLevels } from "./pixels.js";

const REPEATS = 5; // of a run, for the time
const PATIENCE = 250; // milliseconds after which a run is not repeated

let ort = null;
let pixels = null;
const sessions = new Map();
const inputs = new Map();

/** The bytes at an address, told piece by piece while they arrive. */
async function download(address, what) {
  const answer = await fetch(address);
  if (!answer.ok) throw new Error(`${address} can't be had (${answer.status}): the Space's files are not complete.`);
  const total = Number(answer.headers.get("content-length")) || null;
  const pieces = [];
  let received = 0;
  for (const reader = answer.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    pieces.push(value);
    received += value.length;
    postMessage({ progress: { what, received, total } });
  }
  const bytes = new Uint8Array(received);
  let at = 0;
  for (const piece of pieces) {
    bytes.set(piece, at);
    at += piece.length;
  }
  return bytes;
}

async function start({ engine, settings }) {
  pixels = settings;
  ort = await import(new URL(engine.module, import.meta.url).href);
  const wasm = await download(engine.wasm, "engine");
  ort.env.wasm.wasmBinary = wasm.buffer;
  ort.env.logLevel = "error";
  // more than one only where the server sends the headers that shared memory needs
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, Math.ceil(navigator.hardwareConcurrency / 2)) : 1;
  return { bytes: wasm.length, threads: ort.env.wasm.numThreads };
}

async function load({ model }) {
  const bytes = await download(model.file, model.name);
  const started = performance.now();
  const session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
  sessions.set(model.name, session);
  return { bytes: bytes.length, ms: performance.now() - started };
}

/** Prepare a picture and keep what the network sees of it under `key`. */
function prepare({ key, picture }) {
  const started = performance.now();
  const { values, shape } = normalize(toGrayLevels(picture, pixels), pixels);
  inputs.set(key, new ort.Tensor("float32", values, shape));
  return { ms: performance.now() - started };
}

/** Forget a picture. */
function forget({ key }) {
  inputs.delete(key);
}

function softmax(logits) {
  const highest = Math.max(...logits);
  const powers = Array.from(logits, (value) => Math.exp(value - highest));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((value) => value / sum);
}

/** Run a network on a prepared picture; the time is the median of a few runs, of which the first does not count. */
async function run({ key, model, once }) {
  const session = sessions.get(model.name);
  const feeds = { [session.inputNames[0]]: inputs.get(key) };
  const times = [];
  let output;
  const began = performance.now();
  do {
    const started = performance.now();
    output = (await session.run(feeds))[session.outputNames[0]];
    times.push(performance.now() - started);
  } while (!once && times.length <= REPEATS && performance.now() - began < PATIENCE);
  const counted = (times.length > 1 ? times.slice(1) : times).sort((a, b) => a - b);
  const logits = Array.from(output.data);
  return { logits, probabilities: softmax(logits), ms: counted[Math.floor(counted.length / 2)] };
}

const ACTIONS = { start, load, prepare, run, forget };
let queue = Promise.resolve(); // one thing at a time, in the order asked

self.onmessage = ({ data: { id, action, ...values } }) => {
  queue = queue.then(async () => {
    try {
      postMessage({ id, result: await ACTIONS[action](values) });
    } catch (error) {
      postMessage({ id, error: error?.message ?? String(error) });
    }
  });
};

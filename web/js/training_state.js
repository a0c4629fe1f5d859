// What trains, as the server says: read when a node of this kind reports progress and when the page opens. Others listen.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { nodesById } from "./graph_nodes.js";
import { trains } from "./training_nodes.js";

const PAUSE = 1500; // milliseconds between two readings of a training that goes on

export const training = new Map(); // node id, as the server has it -> the server's entry: {step, steps, paused, stopping, curve, ...}

export const trainers = () => nodesById().filter(([, node]) => trains(node));

const listeners = [];

export function whenTrainingChanges(listener) {
  listeners.push(listener);
}

function tell() {
  for (const listener of listeners) listener();
}

export function changed(id, entry) {
  if (entry) training.set(id, entry);
  else training.delete(id);
  tell();
}

let asking = false;
let asked = 0;

async function readTraining() {
  if (asking) return;
  asking = true;
  asked = Date.now();
  try {
    const response = await api.fetchApi("/dmm/training");
    const entries = (await response.json()).training;
    training.clear();
    for (const entry of entries) training.set(entry.node_id, entry);
  } catch (error) {
    console.warn("DMM: cannot read what is training", error);
  } finally {
    asking = false;
  }
  tell();
}

function progressed({ detail: { node } }) {
  const known = training.has(String(node));
  if (known ? Date.now() - asked > PAUSE : trainers().some(([id]) => id === String(node))) readTraining();
}

// The host works on one node at a time: when it turns to another, or to none, the training is over.
function turnedTo({ detail: node }) {
  if (training.size && !training.has(String(node))) ended();
}

function ended() {
  training.clear();
  tell();
}

app.registerExtension({
  name: "comfyui-dmm.TrainingState",

  setup() {
    api.addEventListener("progress", progressed);
    api.addEventListener("executing", turnedTo);
    for (const kind of ["execution_success", "execution_error", "execution_interrupted"]) api.addEventListener(kind, ended);
    api.addEventListener("reconnected", readTraining);
  },

  afterConfigureGraph: readTraining, // a page that is opened while its graph trains
});

// Buttons on a node that trains, while it does: sample now, save now, pause, stop and save.
//
// The server's list of what trains is the truth: it is read when a node of this kind reports progress and when the page opens.
// The buttons are no part of the workflow: neither queued nor saved with it.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { nodesById } from "./graph_nodes.js";
import { trains } from "./training_nodes.js";

const CONTROLS = "dmm_controls";
const HEIGHT = 24;
const BUTTONS = {
  sample: ["Sample now", "Paint the student beside its teachers when the step in hand is done"],
  save: ["Save now", "Write the model and the state of the run, and go on"],
  pause: ["Pause", "Wait after the step in hand; memory stays taken"],
  stop: ["Stop and save", "End after the step in hand and go on with the graph"],
};

const training = new Map(); // node id, as the server has it -> the server's entry: {step, steps, paused, stopping, ...}

const allTrainers = () => nodesById().filter(([, node]) => trains(node));

let asking = false;

async function readTraining() {
  if (asking) return;
  asking = true;
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
  showAll();
}

async function ask(id, action) {
  const response = await api.fetchApi(`/dmm/training/${encodeURIComponent(id)}/${action}`, { method: "POST" });
  const body = await response.json();
  if (response.ok) training.set(id, body);
  else {
    console.warn(`DMM: ${body.error}`);
    training.delete(id); // it ended in this moment
  }
  showAll();
}

// --- the buttons ------------------------------------------------------------------------------------------------------

function showAll() {
  for (const [id, node] of allTrainers()) show(id, node);
}

function show(id, node) {
  const entry = training.get(id);
  let widget = node.widgets?.find((other) => other.name === CONTROLS);
  if (!widget && !entry) return; // only a node that has trained has buttons
  widget ??= addButtons(node);
  for (const button of widget.element.children) {
    const { action } = button.dataset;
    button.disabled = !entry || entry.stopping;
    button.style.opacity = button.disabled ? 0.4 : 1;
    if (action === "pause") button.textContent = entry?.paused ? "Resume" : BUTTONS.pause[0];
    button.onclick = () => ask(id, action === "pause" && entry?.paused ? "resume" : action);
  }
  node.setDirtyCanvas(true);
}

function addButtons(node) {
  const row = document.createElement("div");
  Object.assign(row.style, { display: "flex", gap: "4px", width: "100%" });
  for (const [action, [label, explanation]] of Object.entries(BUTTONS)) {
    const button = document.createElement("button");
    button.type = "button";
    button.dataset.action = action;
    button.textContent = label;
    button.title = explanation;
    Object.assign(button.style, {
      flex: "1 1 auto",
      height: `${HEIGHT - 2}px`,
      padding: "0 4px",
      font: "11px sans-serif",
      whiteSpace: "nowrap",
      color: "var(--input-text)",
      background: "var(--comfy-input-bg)",
      border: "1px solid var(--border-color)",
      borderRadius: "4px",
      cursor: "pointer",
    });
    row.append(button);
  }
  const widget = node.addDOMWidget(CONTROLS, "dmm_controls", row, {
    serialize: false, // not sent to the server ...
    getMinHeight: () => HEIGHT,
    getMaxHeight: () => HEIGHT,
  });
  widget.serialize = false; // ... and not saved
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
  return widget;
}

// --- when -------------------------------------------------------------------------------------------------------------

function progressed({ detail: { node } }) {
  if (!training.has(String(node)) && allTrainers().some(([id]) => id === String(node))) readTraining();
}

// The host works on one node at a time: when it turns to another, or to none, the training is over.
function turnedTo({ detail: node }) {
  if (training.size && !training.has(String(node))) ended();
}

function ended() {
  training.clear();
  showAll();
}

app.registerExtension({
  name: "comfyui-dmm.DistillControls",

  setup() {
    api.addEventListener("progress", progressed);
    api.addEventListener("executing", turnedTo);
    for (const kind of ["execution_success", "execution_error", "execution_interrupted"]) api.addEventListener(kind, ended);
    api.addEventListener("reconnected", readTraining);
  },

  afterConfigureGraph: readTraining, // a page that is opened while its graph trains
});

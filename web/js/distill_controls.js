// Buttons on a node that trains, while it does: sample now, save now, pause, stop and save.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { addUnsaved, makeRoom, smallButton } from "./node_widgets.js";
import { changed, trainers, training, whenTrainingChanges } from "./training_state.js";
import { say } from "./words.js";

const CONTROLS = "dmm_controls";
const HEIGHT = 24;
const buttons = () => ({
  sample: [say("Sample now"), say("Paint the student beside its teachers when the step in hand is done")],
  save: [say("Save now"), say("Write the model and the state of the run, and go on")],
  pause: [say("Pause"), say("Wait after the step in hand; memory stays taken")],
  stop: [say("Stop and save"), say("End after the step in hand and go on with the graph")],
});

async function ask(id, action) {
  const response = await api.fetchApi(`/dmm/training/${encodeURIComponent(id)}/${action}`, { method: "POST" });
  const body = await response.json();
  if (!response.ok) console.warn(`DMM: ${body.error}`);
  changed(id, response.ok ? body : undefined); // without an entry, it ended in this moment
}

// --- the buttons ------------------------------------------------------------------------------------------------------

function showAll() {
  for (const [id, node] of trainers()) show(id, node);
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
    if (action === "pause") button.textContent = entry?.paused ? say("Resume") : say("Pause");
    button.onclick = () => ask(id, action === "pause" && entry?.paused ? "resume" : action);
  }
  node.setDirtyCanvas(true);
}

function addButtons(node) {
  const row = document.createElement("div");
  Object.assign(row.style, { display: "flex", gap: "4px", width: "100%" });
  for (const [action, [label, explanation]] of Object.entries(buttons())) {
    const button = smallButton(label, { flex: "1 1 auto", height: `${HEIGHT - 2}px`, padding: "0 4px", whiteSpace: "nowrap" });
    button.dataset.action = action;
    button.title = explanation;
    row.append(button);
  }
  const widget = addUnsaved(node, CONTROLS, "dmm_controls", row, { height: () => HEIGHT });
  makeRoom(node);
  return widget;
}

app.registerExtension({
  name: "comfyui-dmm.DistillControls",

  setup: () => whenTrainingChanges(showAll),
});

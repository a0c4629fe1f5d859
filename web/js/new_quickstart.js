// After a node has saved a model: a button that opens the quickstart with this file, in a tab of its own. The graph is the shipped
// template; names of files and styles go into it as values of its inputs.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { addUnsaved, makeRoom, smallButton } from "./node_widgets.js";
import { say } from "./words.js";

const TEMPLATE = "DMM 01 - Quickstart, one model many styles";
const BUTTON = "dmm_quickstart";
const HEIGHT = 24;
const USUAL_CFG = 7; // of full-size models; the template's is the demo's

const PACK = new URL(import.meta.url).pathname.match(/\/extensions\/([^/]+)\//)?.[1]; // as the host calls this folder

async function template() {
  const response = await api.fetchApi(`/workflow_templates/${PACK}/${encodeURIComponent(TEMPLATE)}.json`);
  if (!response.ok) throw new Error(`${response.status} ${response.statusText}`);
  return response.json();
}

// The template with a model's file, its style, its size, and the guidance of full-size models, or how a few-step model paints. saved: as
// nodes/preview.py says it.
function filled(graph, { file, style, side, few_steps: few }) {
  const node = (type) => graph.nodes.find((other) => other.type === type).widgets_values;
  const small = node("EmptyLatentImage")[0];
  node("DMMLoadModel")[0] = file;
  node("DMMStyleSelector")[0] = style;
  node("EmptyLatentImage").splice(0, 2, side, side);
  if (few) node("KSampler").splice(2, 4, few.steps, few.cfg, few.sampler, few.scheduler);
  else if (side !== small) node("KSampler")[3] = USUAL_CFG;
  graph.nodes = graph.nodes.filter((other) => !other.type.includes("Note")); // what it says is of the demo model
  return graph;
}

// A name for the tab that no workflow of the user has: the host would show theirs under this graph.
function freeName(file) {
  const stem = file.split(/[\\/]/).at(-1).replace(/\.safetensors$/, "").replace(/[<>:"|?*\u0000-\u001f]/g, "_");
  const taken = (name) => app.extensionManager.workflow?.getWorkflowByPath?.(`workflows/${name}.json`);
  const names = [`Quickstart ${stem}`];
  while (taken(names.at(-1))) names.push(`Quickstart ${stem} (${names.length + 1})`);
  return names.at(-1);
}

async function open(saved) {
  const graph = filled(await template(), saved);
  await app.refreshComboInNodes(); // the file is new: lists of files that were made before lack it
  await app.loadGraphData(graph, true, true, freeName(saved.file)); // with a name, and no workflow of it, it gets a tab
}

function show(node, saved) {
  let widget = node.widgets.find((other) => other.name === BUTTON);
  if (!widget) {
    const button = smallButton(say("Open in a new quickstart"), { width: "100%", height: `${HEIGHT - 2}px` });
    widget = addUnsaved(node, BUTTON, "dmm_quickstart", button, { height: () => HEIGHT + 8, margin: 4, hideOnZoom: false });
    makeRoom(node);
  }
  const button = widget.element;
  button.title = say("A new tab with Load DMM Model and Style Selector, set to {file}", { file: saved.file });
  button.onclick = async () => {
    button.disabled = true;
    try {
      await open(saved);
    } catch (error) {
      app.extensionManager.toast.add({ severity: "error", summary: say("The quickstart cannot be opened"), detail: String(error.message) });
    } finally {
      button.disabled = false;
    }
  };
}

app.registerExtension({
  name: "comfyui-dmm.NewQuickstart",

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith("DMM")) return;
    const executed = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      executed?.call(this, output);
      const saved = output?.saved?.[0];
      if (saved) show(this, saved);
    };
  },
});

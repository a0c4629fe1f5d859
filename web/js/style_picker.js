// The style input of Style Selector as a list of the styles that the connected model has.
//
// The nodes stay plain: the input is a STRING for the server, in saved workflows and for links, and a text field without this
// file. Style names come from strangers' model files. They are given to the host as menu entries, which it shows as text, and
// never become markup here.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

const WIDGET = "DMM_STYLE_NAME"; // not the type of the wires, or their sockets would become lists
const NO_STYLE = "none";
const TYPE_A_NAME = "type a name \u2026";

// The host's numbers: ids of the two borders of a subgraph, and the mode of a bypassed node.
const SUBGRAPH_INPUT = -10;
const BYPASSED = 4;

// --- styles of a file ------------------------------------------------------------------------------------------------

const filesStyles = new Map(); // ckpt_name -> array of names; null while unknown

async function readStyles(file) {
  if (!filesStyles.has(file)) filesStyles.set(file, null);
  try {
    const response = await api.fetchApi(`/dmm/styles?ckpt_name=${encodeURIComponent(file)}`);
    const body = await response.json();
    filesStyles.set(file, response.ok ? body.styles.map((style) => style.name) : null);
  } catch (error) {
    console.warn(`DMM: no style list for ${file}`, error);
  }
  app.graph?.setDirtyCanvas(true);
}

function stylesOfFile(file) {
  if (!filesStyles.has(file)) readStyles(file);
  return filesStyles.get(file);
}

function readAgain() {
  for (const file of filesStyles.keys()) readStyles(file);
}

// --- from a Style Selector up to where its model comes from -----------------------------------------------------------

// The value of a node's widget, or undefined when a link decides it.
function setting(node, name) {
  const linked = node.inputs?.find((input) => input.widget?.name === name)?.link != null;
  return linked ? undefined : node.widgets?.find((widget) => widget.name === name)?.value;
}

// The node output behind an input, as {node, slot}, through the borders of subgraphs; undefined without a link.
function origin(node, input) {
  const link = input?.link == null ? null : node.graph.getLink(input.link);
  if (!link) return undefined;
  if (Number(link.origin_id) !== SUBGRAPH_INPUT) return { node: node.graph.getNodeById(link.origin_id), slot: link.origin_slot };
  const holder = everyNode(app.rootGraph ?? app.graph).find((other) => other.subgraph === node.graph);
  const name = node.graph.inputs[link.origin_slot]?.name;
  return holder && origin(holder, holder.inputs.find((other) => other.name === name));
}

function everyNode(graph) {
  return graph.nodes.flatMap((node) => (node.subgraph ? [node, ...everyNode(node.subgraph)] : [node]));
}

// The output inside a subgraph that one of its node's outputs stands for.
function inside({ node, slot }) {
  const link = node.subgraph.getLink(node.subgraph.outputs[slot]?.linkIds[0]);
  return link && { node: node.subgraph.getNodeById(link.origin_id), slot: link.origin_slot };
}

// The names of the styles in the model that reaches a Style Selector, or null when that cannot be told.
function stylesFor(selector) {
  let at = origin(selector, selector.inputs?.find((input) => input.name === "model"));
  for (let hops = 0; at?.node && hops < 1000; hops++) {
    const { node, slot } = at;
    if (node.subgraph) {
      at = inside(at);
      continue;
    }
    if (node.mode !== BYPASSED) {
      if (node.comfyClass === "DMMLoadModel") {
        const file = setting(node, "ckpt_name");
        return file ? stylesOfFile(file) : null;
      }
      if (node.comfyClass === "DMMDistillTeachers") return teacherNames(node);
    }
    // Any other node changes a model and passes its styles on: LoRAs, patches, reroutes, another Style Selector.
    const inputs = node.inputs ?? [];
    const type = node.outputs?.[slot]?.type;
    at = origin(node, inputs.find((i) => i.type === type && i.link != null) ?? inputs.find((i) => i.link != null));
  }
  return null;
}

function teacherNames(node) {
  const teachers = node.inputs.filter((i) => i.type === "DMM_TEACHER" && i.link != null).map((i) => origin(node, i)?.node);
  const names = teachers.map((teacher) => teacher && setting(teacher, "name")?.trim());
  return names.length && names.every(Boolean) ? names : null;
}

// --- the widget -------------------------------------------------------------------------------------------------------

function stylePicker(node, inputName, [, spec]) {
  let before = spec.default;

  async function picked(value) {
    if (value !== TYPE_A_NAME) return;
    widget.value = before;
    const answer = await app.extensionManager.dialog.prompt({
      title: "Style",
      message: "Name of a style in the model",
      defaultValue: before,
    });
    if (answer?.trim()) widget.value = answer.trim();
    node.setDirtyCanvas(true);
  }

  const widget = node.addWidget("combo", inputName, spec.default, picked, { values: [NO_STYLE] });

  function choices() {
    if (widget.value !== TYPE_A_NAME) before = widget.value;
    const names = stylesFor(node);
    return [...new Set(names ? [...names, NO_STYLE] : [widget.value, NO_STYLE, TYPE_A_NAME])];
  }

  // Evaluated whenever the list is drawn or opened, so it follows every change of file and of connections. The canvas reads
  // the property each time and wants an array; "Nodes 2.0" copies it once and calls a function each time.
  Object.defineProperty(widget.options, "values", {
    enumerable: true,
    get: () => (window.LiteGraph?.vueNodesMode ? choices : choices()),
  });
  return { widget };
}

app.registerExtension({
  name: "comfyui-dmm.StylePicker",

  getCustomWidgets: () => ({ [WIDGET]: stylePicker }),

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name === "DMMStyleSelector") nodeData.input.required.style[1].widgetType = WIDGET;
  },

  // Ask for a file's styles as soon as it is chosen, not when the list is opened.
  nodeCreated(node) {
    const file = node.comfyClass === "DMMLoadModel" && node.widgets?.find((widget) => widget.name === "ckpt_name");
    if (!file) return;
    const chosen = file.callback;
    file.callback = function (value, ...rest) {
      readStyles(value);
      return chosen?.call(this, value, ...rest);
    };
  },

  // A run may have written the file, and R (refresh) is how users tell the host that files have changed.
  setup: () => api.addEventListener("execution_success", readAgain),
  refreshComboInNodes: readAgain,
});

// Folds the advanced inputs of this pack's nodes where the canvas draws them. "Nodes 2.0" folds them by itself, with a button of its own;
// the flag that says whether they are open, node.showAdvanced, is the host's and is saved with the graph.
//
// A folded input keeps its value and is queued as ever. One that a link decides stays visible.

import { app } from "../../../scripts/app.js";
import { say } from "./words.js";

const TOGGLE = "dmm_advanced";
const FIRST = "preset"; // stands above the other inputs of a node that has one, whose order in saved graphs stays as it is

const onCanvas = () => !window.LiteGraph?.vueNodesMode;
let measuring = false; // a node's size is that of what is seen, whoever draws it
const advanced = (node) => node.widgets.filter((widget) => widget.options?.advanced);
const linked = (node, widget) => node.inputs?.some((input) => input.widget?.name === widget.name && input.link != null);

function foldable(node, widget) {
  if (widget.visibility?.surfaces) return; // a newer page: fold()
  let hidden = widget.hidden ?? false;
  Object.defineProperty(widget, "hidden", {
    configurable: true,
    enumerable: true,
    get: () => hidden || ((measuring || onCanvas()) && !node.showAdvanced && !linked(node, widget)),
    set: (value) => (hidden = value),
  });
}

// Newer pages keep for each renderer what it shows; of what they fold themselves ("advanced") they keep the room on the canvas.
function fold(node) {
  for (const widget of advanced(node)) {
    const surfaces = widget.visibility?.surfaces;
    const canvas = node.showAdvanced || linked(node, widget) ? "shown" : "never";
    if (surfaces && surfaces.canvas !== canvas) surfaces.canvas = canvas;
  }
}

function addToggle(node) {
  const widget = node.addWidget("button", TOGGLE, null, () => {
    node.showAdvanced = !node.showAdvanced;
    fit(node);
  });
  widget.serialize = false;
  Object.assign(widget.options, { serialize: false, canvasOnly: true });
  const count = advanced(node).length;
  Object.defineProperty(widget, "label", {
    configurable: true,
    get: () => `${node.showAdvanced ? say("hide advanced inputs") : say("{count} advanced inputs", { count })} ${node.showAdvanced ? "\u25b4" : "\u25be"}`,
    set: () => {},
  });
  Object.defineProperty(widget, "hidden", { configurable: true, get: () => !onCanvas(), set: () => {} });
}

function measureWhatIsSeen(node) {
  const compute = node.computeSize;
  node.computeSize = function (...out) {
    measuring = true;
    fold(node);
    try {
      return compute.apply(this, out);
    } finally {
      measuring = false;
    }
  };
}

function fit(node) {
  const [, height] = node.computeSize();
  node.setSize([node.size[0], height]);
  node.setDirtyCanvas(true, true);
}

// Nodes that were saved when nothing was folded are as high as all their inputs.
function shrink(node) {
  if (node.showAdvanced) return;
  const [, folded] = node.computeSize();
  const rows = advanced(node).filter((widget) => !linked(node, widget)).length;
  // By counting: a newer page lays a node out anew as soon as it is opened.
  if (node.size[1] >= folded + rows * LiteGraph.NODE_WIDGET_HEIGHT) node.setSize([node.size[0], folded]);
}

// Asked for whenever the node is laid out.
function presetFirst(node) {
  const layout = node.getLayoutWidgets;
  if (!layout) return;
  node.getLayoutWidgets = function () {
    fold(node);
    const widgets = layout.call(this);
    return [...widgets.filter((widget) => widget.name === FIRST), ...widgets.filter((widget) => widget.name !== FIRST)];
  };
}

app.registerExtension({
  name: "comfyui-dmm.AdvancedInputs",

  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("DMM") || !node.widgets?.length || !advanced(node).length) return;
    for (const widget of advanced(node)) foldable(node, widget);
    presetFirst(node);
    addToggle(node);
    measureWhatIsSeen(node);
    fit(node);
    const configured = node.onConfigure;
    node.onConfigure = function (...saved) {
      const result = configured?.apply(this, saved);
      shrink(node);
      return result;
    };
  },
});

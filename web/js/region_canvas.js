// The canvas of Style Mix, a list of regions, and of Style Region, its one box (region_editor.js), on their nodes.
//
// The list is the text of the node's input region_list and nothing else: it is queued and saved as text, and stays a text field
// without this file. Style Region's box is its numbers x, y, width and height.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { after } from "./canvas_size.js";
import { element } from "./dom.js";
import { canvases, MARGIN, RegionCanvas, SHOWN } from "./region_editor.js";
import { boxSource, listSource } from "./region_sources.js";

const LIST = "DMM_REGION_LIST"; // the type of Style Mix's input
const BOX = "dmm_canvas"; // the widget of Style Region, and the server's report
const SHEET = new URL("./region_canvas.css", import.meta.url).href;

const viewOf = ({ filename, subfolder, type }) =>
  api.apiURL(`/view?${new URLSearchParams({ filename, subfolder: subfolder ?? "", type: type ?? "output" })}`);

// The last picture that the graph paints with these regions lies under them.
function painted({ detail: { node: id, output } }) {
  const picture = output?.images?.at(-1);
  if (!picture?.filename || !/\.(png|jpe?g|webp)$/i.test(picture.filename)) return;
  const last = String(id).split(":").at(-1);
  for (const canvas of canvases) {
    if (!canvas.node.graph || !after(canvas.node).some((node) => String(node.id) === last)) continue;
    canvas.picture.graph = viewOf(picture);
    canvas.render();
  }
}

// --- the two nodes ----------------------------------------------------------------------------------------------------

function addCanvas(node, name, source, options) {
  node.properties ??= {};
  const canvas = new RegionCanvas(node, source);
  const widget = node.addDOMWidget(name, BOX, canvas.root, {
    hideOnZoom: false,
    margin: MARGIN,
    getMinHeight: () => canvas.height(),
    ...options(canvas),
  });
  const removed = widget.onRemove;
  widget.onRemove = function () {
    canvas.remove();
    removed?.call(this);
  };
  node.dmmCanvas = canvas;
  return widget;
}

function regionList(node, inputName) {
  const source = listSource(node, inputName);
  const widget = addCanvas(node, inputName, source, (canvas) => ({
    getValue: () => source.read(),
    setValue(text) {
      source.set(typeof text === "string" ? text : "");
      canvas.load(source.read());
    },
  }));
  return { widget };
}

function addBox(node) {
  const widget = addCanvas(node, BOX, boxSource(node), () => ({ serialize: false, getValue: () => "", setValue() {} }));
  widget.serialize = false; // neither queued nor saved: the numbers are
}

// A node that the user adds has its canvas open. Graphs from before the canvas were laid out without it: there it is closed, unless
// the list has regions.
function added(node) {
  node.properties[SHOWN] = false;
  setTimeout(() => {
    if (!node.dmmCanvas.configured) node.dmmCanvas.setOpen(true);
  });
}

function opened(node, saved) {
  const canvas = node.dmmCanvas;
  canvas.configured = true;
  node.properties[SHOWN] = saved.properties?.[SHOWN] ?? (!canvas.single && Boolean(canvas.regions.length || canvas.error));
  canvas.renderSoon();
}

app.registerExtension({
  name: "comfyui-dmm.RegionCanvas",

  getCustomWidgets: () => ({ [LIST]: regionList }),

  setup() {
    document.head.append(element("link", { rel: "stylesheet", href: SHEET }));
    api.addEventListener("executed", painted);
  },

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name === "DMMStyleMix") nodeData.input.optional.region_list[1].widgetType = LIST;
    if (nodeData.name !== "DMMStyleMix" && nodeData.name !== "DMMRegion") return;
    const { onExecuted, onConfigure } = nodeType.prototype;
    nodeType.prototype.onExecuted = function (output) {
      onExecuted?.call(this, output);
      const [report] = output?.[BOX] ?? [];
      if (report) this.dmmCanvas?.executed({ ...report, picture: report.picture && viewOf(report.picture) });
    };
    nodeType.prototype.onConfigure = function (saved) {
      onConfigure?.call(this, saved);
      if (this.dmmCanvas) opened(this, saved);
    };
  },

  nodeCreated(node) {
    if (node.comfyClass === "DMMRegion") addBox(node);
    if (node.dmmCanvas) added(node);
  },
});

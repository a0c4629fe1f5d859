// The style input of Style Selector and Edit Style as a list of the styles that the connected model has.
//
// The nodes stay plain: the input is a STRING for the server, in saved workflows and for links, and a text field without this
// file. Style names come from strangers' model files. They are given to the host as menu entries, which it shows as text, and
// never become markup here.

import { app } from "../../../scripts/app.js";
import { NO_STYLE, stylesFor } from "./model_styles.js";
import { say } from "./words.js";

const WIDGET = "DMM_STYLE_NAME"; // not the type of the wires, or their sockets would become lists
const NODES = ["DMMStyleSelector", "DMMEditStyle"];
const typeAName = () => `${say("type a name")} \u2026`;

function stylePicker(node, inputName, [, spec]) {
  let before = spec.default;

  async function picked(value) {
    if (value !== typeAName()) return;
    widget.value = before;
    const answer = await app.extensionManager.dialog.prompt({
      title: say("Style"),
      message: say("Name of a style in the model"),
      defaultValue: before,
    });
    if (answer?.trim()) widget.value = answer.trim();
    node.setDirtyCanvas(true);
  }

  const none = spec.default === NO_STYLE ? [NO_STYLE] : []; // nothing to edit about it
  const widget = node.addWidget("combo", inputName, spec.default, picked, { values: [spec.default] });

  function choices() {
    if (widget.value !== typeAName()) before = widget.value;
    const names = stylesFor(node);
    return [...new Set(names ? [...names, ...none] : [widget.value, ...none, typeAName()])];
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
    if (NODES.includes(nodeData.name)) nodeData.input.required.style[1].widgetType = WIDGET;
  },
});

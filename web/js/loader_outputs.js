// An output of Load DMM Model that the file has nothing for says so, before the node that wants it turns red.

import { app } from "../../../scripts/app.js";
import { say } from "./words.js";

const LOADER = "DMMLoadModel";

function label(node, lacks) {
  for (const output of node.outputs) output.label = lacks.includes(output.name) ? say("not in this file: {name}", { name: output.name }) : undefined;
  node.setDirtyCanvas(true, true);
}

app.registerExtension({
  name: "comfyui-dmm.LoaderOutputs",

  nodeCreated(node) {
    if (node.comfyClass !== LOADER) return;
    const executed = node.onExecuted;
    node.onExecuted = function (output) {
      executed?.call(this, output);
      label(this, output?.lacks ?? []);
    };
    const file = node.widgets.find((widget) => widget.name === "ckpt_name");
    const before = file.callback;
    file.callback = function (...rest) {
      label(node, []); // another file: not known until it is read
      return before?.apply(this, rest);
    };
  },
});

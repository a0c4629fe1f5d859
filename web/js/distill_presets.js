// The preset of a node that trains fills in its settings; changing one of them by hand makes it "custom".

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { trains } from "./training_nodes.js";

const CUSTOM = "custom";

let presets = {}; // preset -> {name of an input: its value}

const widget = (node, name) => node.widgets?.find((other) => other.name === name);

// Runs ``then`` with the new value after whatever else the widget does when a user changes it.
function whenChanged(target, then) {
  const before = target.callback;
  target.callback = function (value, ...rest) {
    const result = before?.call(this, value, ...rest);
    then(value);
    return result;
  };
}

function fill(node, name) {
  for (const [input, value] of Object.entries(presets[name] ?? {})) {
    const target = widget(node, input);
    if (target) target.value = value;
  }
  node.setDirtyCanvas?.(true, true);
}

app.registerExtension({
  name: "comfyui-dmm.DistillPresets",

  async setup() {
    try {
      presets = await (await api.fetchApi("/dmm/presets")).json();
    } catch (error) {
      console.warn("DMM: cannot read the presets", error);
    }
  },

  nodeCreated(node) {
    if (!trains(node)) return;
    const preset = widget(node, "preset");
    if (!preset) return;
    whenChanged(preset, (name) => fill(node, name));
    for (const other of node.widgets) {
      if (other === preset) continue;
      whenChanged(other, (value) => {
        const wanted = presets[preset.value]?.[other.name];
        if (wanted !== undefined && wanted !== value) preset.value = CUSTOM;
      });
    }
  },
});

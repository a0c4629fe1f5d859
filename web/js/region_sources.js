// Where a canvas of regions reads and writes: the text of Style Mix's list, or the numbers of Style Region's box, and the graph around them.

import * as boxes from "./region_boxes.js";
import { NO_STYLE, origin, setting } from "./model_styles.js";
import { say } from "./words.js";

const linked = (node, name) => node.inputs?.find((input) => input.name === name)?.link != null;
// The input of a Style Region that decides its place instead of its box, if there is one.
const decides = (node) => ["mask", "bboxes"].find((name) => linked(node, name));
const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name);

// The box of a Style Region in the graph, or null where a link or a mask decides.
function boxOf(node) {
  if (decides(node)) return null;
  const [x, y, w, h] = ["x", "y", "width", "height"].map((name) => setting(node, name));
  return [x, y, w, h].every(Number.isFinite) ? { x, y, w, h, style: setting(node, "style") ?? "", node } : null;
}

function promptOf(node) {
  const input = node.inputs?.find((other) => other.name === "positive");
  const text = input?.link == null ? "" : setting(origin(node, input)?.node ?? {}, "text");
  return typeof text === "string" ? text : "";
}

// Of the list in the widget ``name``.
export function listSource(node, name) {
  let text = "";
  const ghosts = () => {
    const inputs = (node.graph && node.inputs?.filter((input) => input.name.startsWith("regions.") && input.link != null)) || [];
    const nodes = inputs.map((input) => origin(node, input)?.node).filter((other) => other?.comfyClass === "DMMRegion");
    return nodes.map(boxOf).filter(Boolean).map(({ node: other, ...box }) => ({ ...box, prompt: promptOf(other) }));
  };
  return {
    single: false,
    read: () => text,
    write(changed) {
      text = changed;
      widgetOf(node, name)?.callback?.(text);
    },
    set: (changed) => (text = changed),
    name: (region) => [region.style ?? NO_STYLE, region.prompt ?? ""],
    locked: () => (linked(node, name) ? say("The list comes from a link") : linked(node, "bboxes") ? say("bboxes decide where these regions are") : ""),
    advice: (regions) =>
      regions.some((region) => region.prompt || region.negative) && !linked(node, "clip") ? say("Connect clip: regions have prompts of their own") : "",
    ghosts,
    sees: () => linked(node, "clip"),
  };
}

// Of the box in the numbers x, y, width and height.
export function boxSource(node) {
  const names = { x: "x", y: "y", w: "width", h: "height" };
  return {
    single: true,
    read() {
      const share = (name) => Math.round(widgetOf(node, name)?.value * 1e4) / 1e4; // the host's own rounding leaves 0.5700000000000001
      const sides = Object.fromEntries(Object.entries(names).map(([side, name]) => [side, share(name)]));
      return boxes.writeRegions([sides]);
    },
    write(text) {
      const [box] = JSON.parse(text);
      for (const [side, name] of Object.entries(names)) {
        const widget = widgetOf(node, name);
        widget.value = box[side];
        widget.callback?.(box[side]);
      }
    },
    name: () => [setting(node, "style") ?? "", promptOf(node)],
    locked() {
      if (boxOf(node)) return "";
      const input = decides(node);
      return input ? say("The place comes from {input}", { input }) : say("The place comes from a link");
    },
    ghosts: () => [],
    sees: () => [setting(node, "style"), promptOf(node)],
  };
}

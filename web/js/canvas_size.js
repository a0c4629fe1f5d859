// The canvas that a node's prompts are painted on, read from the graph: the width and height of the latent at the sampler behind it.

import { BYPASSED, origin, setting, takers } from "./model_styles.js";

const HOPS = 50;

// {width, height} in pixels, or null when it cannot be told.
export function canvasSize(node) {
  for (const taker of after(node)) {
    const input = taker.inputs?.find((other) => other.type === "LATENT" && other.link != null);
    const size = input && sizeOfLatent(origin(taker, input));
    if (size) return size;
  }
  return null;
}

// The nodes that a node leads to, the nearest first, each once.
export function after(node) {
  const found = [];
  const seen = new Set([node]);
  for (let next = [node]; next.length && found.length < 500; ) {
    next = next.flatMap(takers).filter((other) => other && !seen.has(other) && seen.add(other));
    found.push(...next);
  }
  return found;
}

// From a latent backwards to a node that says its size: Empty Latent Image, Upscale Latent, ...
function sizeOfLatent(at) {
  for (let hops = 0; at?.node && hops < HOPS; hops++) {
    const { node } = at;
    const [width, height] = ["width", "height"].map((name) => setting(node, name));
    if (node.mode !== BYPASSED && width > 0 && height > 0) return { width, height };
    const input = node.inputs?.find((other) => other.type === "LATENT" && other.link != null);
    at = input && origin(node, input);
  }
  return null;
}

// The loss of each teacher over the steps, as a small chart on a node that trains. It stays when the training is over.
//
// Names of styles are the user's or a file's: text, never markup.

import { app } from "../../../scripts/app.js";
import { addUnsaved, makeRoom } from "./node_widgets.js";
import { trainers, training, whenTrainingChanges } from "./training_state.js";
import { say } from "./words.js";

const CHART = "dmm_losses";
const WIDTH = 240;
const HEIGHT = 64;
const LEGEND = 16;
const SVG = "http://www.w3.org/2000/svg";
const COLOURS = ["#4e9ad1", "#e0803a", "#5fb36a", "#cf5f7f", "#9b7fd4", "#c9b13c", "#57b5b0", "#a5795d"];

const colour = (index) => COLOURS[index % COLOURS.length];

function element(kind, attributes) {
  const made = document.createElementNS(SVG, kind);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function addChart(node) {
  const box = document.createElement("div");
  Object.assign(box.style, { width: "100%", overflow: "hidden", background: "var(--comfy-input-bg)", borderRadius: "4px" });
  const height = () => HEIGHT + LEGEND + 24; // the host's margins
  const widget = addUnsaved(node, CHART, "dmm_losses", box, { height });
  makeRoom(node);
  return widget;
}

// Steps to the right, the logarithm of the loss upwards: losses fall by powers.
function draw(box, { steps, losses }, all) {
  const values = Object.values(losses).flat().filter((value) => value > 0);
  if (steps.length < 2 || !values.length) return;
  const [low, high] = [Math.log(Math.min(...values)), Math.log(Math.max(...values))];
  const x = (step) => (WIDTH * step) / Math.max(all, steps.at(-1));
  const y = (loss) => HEIGHT - 3 - ((HEIGHT - 6) * (Math.log(loss) - low)) / (high - low || 1);
  const svg = element("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", width: "100%", height: HEIGHT, role: "img" });
  const legend = document.createElement("div");
  Object.assign(legend.style, { height: `${LEGEND}px`, font: "10px sans-serif", whiteSpace: "nowrap", overflow: "hidden", padding: "0 4px" });
  const said = [];
  Object.entries(losses).forEach(([name, row], index) => {
    const points = row.flatMap((loss, i) => (loss > 0 ? [`${x(steps[i]).toFixed(1)},${y(loss).toFixed(1)}`] : []));
    svg.append(element("polyline", {
      points: points.join(" "), fill: "none", stroke: colour(index), "stroke-width": 1.5, "vector-effect": "non-scaling-stroke",
    }));
    const entry = document.createElement("span");
    entry.textContent = `\u25a0 ${name}  `;
    entry.style.color = colour(index);
    legend.append(entry);
    said.push(`${name} ${row.findLast((loss) => loss > 0)?.toPrecision(3)}`);
  });
  svg.setAttribute("aria-label", say("Loss after {step} of {steps} steps: {losses}", { step: steps.at(-1), steps: all, losses: said.join(", ") }));
  box.replaceChildren(svg, legend);
  box.title = said.join("\n");
}

function showAll() {
  for (const [id, node] of trainers()) {
    const entry = training.get(id);
    if (!(entry?.curve?.steps.length > 1)) continue;
    const widget = node.widgets.find((other) => other.name === CHART) ?? addChart(node);
    draw(widget.element, entry.curve, entry.steps);
    node.setDirtyCanvas(true);
  }
}

app.registerExtension({
  name: "comfyui-dmm.LossChart",
  setup: () => whenTrainingChanges(showAll),
});

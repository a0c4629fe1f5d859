// The names of the styles that the model at a node has: read from its file, and followed along the links.
//
// Names come from strangers' files: they are text, never markup.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

export const NO_STYLE = "none";

// The host's numbers: ids of the two borders of a subgraph, and the mode of a bypassed node.
const SUBGRAPH_INPUT = -10;
const SUBGRAPH_OUTPUT = -20;
export const BYPASSED = 4;

// --- styles of a file ------------------------------------------------------------------------------------------------

// The input of a loading node that names its file; the server's query calls it the same.
const FILE_INPUTS = { DMMLoadModel: "ckpt_name", DMMAddStyles: "styles" };

const filesStyles = new Map(); // query -> array of names; null while unknown

const queryOf = (node, file) => `${FILE_INPUTS[node.comfyClass]}=${encodeURIComponent(file)}`;

async function readStyles(file) {
  if (!filesStyles.has(file)) filesStyles.set(file, null);
  try {
    const response = await api.fetchApi(`/dmm/styles?${file}`);
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

// --- from a node to where its model comes from ------------------------------------------------------------------------

// The value of a node's widget, or undefined when a link decides it.
export function setting(node, name) {
  const linked = node.inputs?.find((input) => input.widget?.name === name)?.link != null;
  return linked ? undefined : node.widgets?.find((widget) => widget.name === name)?.value;
}

function everyNode(graph = app.rootGraph ?? app.graph) {
  return graph.nodes.flatMap((node) => (node.subgraph ? [node, ...everyNode(node.subgraph)] : [node]));
}

// The node that a subgraph is, in the graph around it.
const holderOf = (graph) => everyNode().find((node) => node.subgraph === graph);

// The node output behind an input, as {node, slot}, through the borders of subgraphs; undefined without a link.
export function origin(node, input) {
  const link = input?.link == null ? null : node.graph.getLink(input.link);
  if (!link) return undefined;
  if (Number(link.origin_id) !== SUBGRAPH_INPUT) return { node: node.graph.getNodeById(link.origin_id), slot: link.origin_slot };
  const holder = holderOf(node.graph);
  const name = node.graph.inputs[link.origin_slot]?.name;
  return holder && origin(holder, holder.inputs.find((other) => other.name === name));
}

// The output inside a subgraph that one of its node's outputs stands for.
function inside({ node, slot }) {
  const link = node.subgraph.getLink(node.subgraph.outputs[slot]?.linkIds[0]);
  return link && { node: node.subgraph.getNodeById(link.origin_id), slot: link.origin_slot };
}

// The nodes that take a node's outputs, through the borders of subgraphs.
export function takers(node) {
  return (node.outputs ?? []).flatMap((output) => linkedTo(node.graph, output.links));
}

function linkedTo(graph, links) {
  return [...(links ?? [])].flatMap((id) => {
    const link = graph.getLink(id);
    if (!link) return []; // a graph that is being opened
    const { target_id, target_slot } = link;
    if (Number(target_id) === SUBGRAPH_OUTPUT) {
      const holder = holderOf(graph);
      if (!holder) return []; // a subgraph that is being made
      return linkedTo(holder.graph, holder.outputs[target_slot].links);
    }
    const target = graph.getNodeById(target_id);
    if (!target) return [];
    if (!target.subgraph) return [target];
    const name = target.inputs[target_slot].name;
    return linkedTo(target.subgraph, target.subgraph.inputs.find((input) => input.name === name)?.linkIds);
  });
}

// The names of the styles in the model that reaches a node, or null when that cannot be told. A node without a model, such as
// Style or Style Region, has that of the node it leads to.
export function stylesFor(node) {
  const input = node.inputs?.find((other) => other.name === "model");
  if (input) return stylesFrom(origin(node, input));
  for (const taker of takers(node)) {
    const names = stylesFor(taker);
    if (names) return names;
  }
  return null;
}

// The styles in the graph's only model with styles, for a node that is not connected yet; null with none or several.
export function onlyStyles() {
  const loaders = everyNode().filter((node) => node.comfyClass in FILE_INPUTS);
  const lists = loaders.map(stylesOfLoader).filter((names) => names?.length);
  return lists.length === 1 ? lists[0] : null;
}

// A list of names after a node that changes it. Edit Style finds the style as the server does: case and outer spaces aside.
function withBlend(node, names) {
  const name = setting(node, "name")?.trim();
  return name ? [...names, name] : names;
}

function withEdit(node, names) {
  const [style, name] = ["style", "name"].map((field) => setting(node, field)?.trim());
  if (!style || !name) return names;
  const folded = (text) => text.trim().toLowerCase();
  const old = names.includes(style) ? style : names.find((other) => folded(other) === folded(style));
  return names.map((other) => (other === old ? name : other));
}

function withTeachers(node, names) {
  const own = teacherNames(node);
  return own && [...names, ...own];
}

// Names with commas between them, as Forget Style takes them; names that need quotes stay in the list.
function withoutForgotten(node, names) {
  const gone = (setting(node, "styles") ?? "").split(",").map((name) => name.trim());
  return names.filter((name) => !gone.includes(name));
}

const CHANGES = {
  DMMNameBlend: withBlend,
  DMMEditStyle: withEdit,
  DMMAddTeacher: withTeachers,
  DMMForgetStyle: withoutForgotten,
};

function stylesFrom(at) {
  const changes = []; // of the list, from the model's file on
  for (let hops = 0; at?.node && hops < 1000; hops++) {
    const { node, slot } = at;
    if (node.subgraph) {
      at = inside(at);
      continue;
    }
    if (node.mode !== BYPASSED) {
      const names = node.comfyClass in FILE_INPUTS ? stylesOfLoader : OF_TEACHERS[node.comfyClass];
      if (names) return changes.reduce((list, change) => list && change(list), names(node));
      const change = CHANGES[node.comfyClass];
      if (change) changes.unshift((list) => change(node, list));
    }
    // Any other node changes a model and passes its styles on: LoRAs, patches, reroutes, another Style Selector.
    const inputs = node.inputs ?? [];
    const type = node.outputs?.[slot]?.type;
    at = origin(node, inputs.find((i) => i.type === type && i.link != null) ?? inputs.find((i) => i.link != null));
  }
  return null;
}

function stylesOfLoader(node) {
  const file = setting(node, FILE_INPUTS[node.comfyClass]);
  return file ? stylesOfFile(queryOf(node, file)) : null;
}

const OF_TEACHERS = { DMMDistillTeachers: teacherNames, DMMMerge: teacherNames };

function teacherNames(node) {
  const teachers = node.inputs.filter((i) => i.type === "DMM_TEACHER" && i.link != null).map((i) => origin(node, i)?.node);
  const names = teachers.map((teacher) => teacher && setting(teacher, "name")?.trim());
  return names.length && names.every(Boolean) ? names : null;
}

app.registerExtension({
  name: "comfyui-dmm.ModelStyles",

  // Ask for a file's styles as soon as it is known, not when a list is opened.
  nodeCreated(node) {
    const input = FILE_INPUTS[node.comfyClass];
    const file = input && node.widgets?.find((widget) => widget.name === input);
    if (!file) return;
    queueMicrotask(() => stylesOfLoader(node)); // a graph that is being opened sets the value after this
    const chosen = file.callback;
    file.callback = function (value, ...rest) {
      readStyles(queryOf(node, value));
      return chosen?.call(this, value, ...rest);
    };
  },

  // A run may have written the file, and R (refresh) is how users tell the host that files have changed.
  setup: () => api.addEventListener("execution_success", readAgain),
  refreshComboInNodes: readAgain,
});

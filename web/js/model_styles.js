// The styles that the model at a node has: read from its file, and followed along the links. A style is {name, description,
// thumbnail}; only the name is always there.
//
// All of them come from strangers' files: they are text, never markup, and a thumbnail is a picture or nothing.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { nodesById } from "./graph_nodes.js";
import { findStyle, namesIn } from "./style_text.js";

export { NO_STYLE } from "./style_text.js";

// The host's numbers: ids of the two borders of a subgraph, and the mode of a bypassed node.
const SUBGRAPH_INPUT = -10;
const SUBGRAPH_OUTPUT = -20;
export const BYPASSED = 4;

// --- styles of a file ------------------------------------------------------------------------------------------------

// The input of a loading node that names its file; the server's query calls it the same.
const FILE_INPUTS = { DMMLoadModel: "ckpt_name", DMMAddStyles: "styles" };

const files = new Map(); // query -> {styles} or {error: what the server says}; null until it has answered

const queryOf = (node, file) => `${FILE_INPUTS[node.comfyClass]}=${encodeURIComponent(file)}`;

// As dmm_core/metadata.py allows them.
const PICTURE = /^data:image\/(jpeg|webp);base64,[A-Za-z0-9+/]+={0,2}$/;
const LONGEST_PICTURE = 200_000;

const isPicture = (text) => typeof text === "string" && text.length <= LONGEST_PICTURE && PICTURE.test(text);

const asStyle = ({ name, description, thumbnail }) => ({
  name: String(name),
  description: String(description ?? ""),
  thumbnail: isPicture(thumbnail) ? thumbnail : "",
});

async function readStyles(file) {
  if (!files.has(file)) files.set(file, null);
  try {
    const response = await api.fetchApi(`/dmm/styles?${file}`);
    const body = await response.json();
    const now = response.ok ? { styles: body.styles.map(asStyle) } : { error: String(body.error) };
    if (JSON.stringify(now) === JSON.stringify(files.get(file))) return; // what shows it need not be made anew
    files.set(file, now);
  } catch (error) {
    console.warn(`DMM: no style list for ${file}`, error);
  }
  app.graph?.setDirtyCanvas(true);
}

// What is known of the file that a loading node names: {styles} or {error}; null while nothing is.
export function fileOf(node) {
  const file = setting(node, FILE_INPUTS[node.comfyClass]);
  if (!file) return null;
  const query = queryOf(node, file);
  if (!files.has(query)) readStyles(query);
  return files.get(query);
}

export const isLoader = (node) => node.comfyClass in FILE_INPUTS;

function readAgain() {
  for (const file of files.keys()) readStyles(file);
}

// --- from a node to where its model comes from ------------------------------------------------------------------------

// The value of a node's widget, or undefined when a link decides it.
export function setting(node, name) {
  const linked = node.inputs?.find((input) => input.widget?.name === name)?.link != null;
  return linked ? undefined : node.widgets?.find((widget) => widget.name === name)?.value;
}

const everyNode = () => nodesById().map(([, node]) => node);

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

// The names of the styles in the model that reaches a node, or null when that cannot be told.
export const stylesFor = (node) => namesOf(modelStyles(node));

const namesOf = (styles) => styles && styles.map((style) => style.name);

// The styles in the model that reaches a node, or null when that cannot be told. A node without a model, such as Style or Style
// Region, has that of the node it leads to.
export function modelStyles(node) {
  const input = node.inputs?.find((other) => other.name === "model");
  if (input) return stylesFrom(origin(node, input));
  for (const taker of takers(node)) {
    const styles = modelStyles(taker);
    if (styles) return styles;
  }
  return null;
}

// The names in the graph's only model with styles, for a node that is not connected yet; null with none or several.
export const onlyStyles = () => namesOf(onlyModelStyles());

export function onlyModelStyles() {
  const loaders = everyNode().filter(isLoader);
  const lists = loaders.map(stylesOfLoader).filter((styles) => styles?.length);
  return lists.length === 1 ? lists[0] : null;
}

// A list of styles after a node that changes it.
const withNamedIn = (field) => (node, styles) => {
  const name = setting(node, field)?.trim();
  return name ? [...styles, { name }] : styles;
};

// Edit Style finds the style as the server does.
function withEdit(node, styles) {
  const style = setting(node, "style");
  if (!style?.trim()) return styles;
  const edited = findStyle(namesOf(styles), style);
  const changes = ["name", "description"].map((field) => [field, setting(node, field)?.trim()]).filter(([, text]) => text);
  return styles.map((other) => (other.name === edited ? { ...other, ...Object.fromEntries(changes) } : other));
}

function withTeachers(node, styles) {
  const own = teacherStyles(node);
  return own && [...styles, ...own];
}

function withoutForgotten(node, styles) {
  let gone = [];
  try {
    gone = namesIn(setting(node, "styles") ?? "").map((name) => findStyle(namesOf(styles), name));
  } catch {
    // Nothing is forgotten yet: what is written there is no list of names.
  }
  return styles.filter((style) => !gone.includes(style.name));
}

const CHANGES = {
  DMMNameBlend: withNamedIn("name"),
  DMMEditStyle: withEdit,
  DMMAddTeacher: withTeachers,
  DMMForgetStyle: withoutForgotten,
  DMMLearnStyle: withNamedIn("style"),
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
      const source = isLoader(node) ? stylesOfLoader : OF_TEACHERS[node.comfyClass];
      if (source) return changes.reduce((list, change) => list && change(list), source(node));
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

const stylesOfLoader = (node) => fileOf(node)?.styles ?? null;

const OF_TEACHERS = { DMMDistillTeachers: teacherStyles, DMMMerge: teacherStyles };

function teacherStyles(node) {
  const teachers = node.inputs.filter((i) => i.type === "DMM_TEACHER" && i.link != null).map((i) => origin(node, i)?.node);
  const names = teachers.map((teacher) => teacher && setting(teacher, "name")?.trim());
  return names.length && names.every(Boolean) ? names.map((name, i) => ({ name, description: setting(teachers[i], "description") })) : null;
}

app.registerExtension({
  name: "comfyui-dmm.ModelStyles",

  // Ask for a file's styles as soon as it is known, not when a list is opened.
  nodeCreated(node) {
    const input = FILE_INPUTS[node.comfyClass];
    const file = input && node.widgets?.find((widget) => widget.name === input);
    if (!file) return;
    queueMicrotask(() => fileOf(node)); // a graph that is being opened sets the value after this
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

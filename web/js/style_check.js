// Whether a model can paint what stands in a style field, told before a run. No page and no host is needed here.

import { findStyle, namesIn, NO_STYLE, parseStyle, strip } from "./style_text.js";
import { say } from "./words.js";

// The kinds of fields, and the names in them. Each throws an Error for what cannot be read.
const NAMES = {
  name: (text) => [text], // one name, as it is
  style: namesIn, // the text form: a name, shares or a schedule
  lines: (text) => linesOf(text).flatMap(namesIn), // a style per line
  names: (text) => (strip(text) ? onlyNames(text) : []), // names with commas between
};

const linesOf = (text) => text.split(/\r\n|[\n-\r\x1c-\x1e\x85\u2028\u2029]/).filter(strip); // as Python's splitlines

function onlyNames(text) {
  const { first, then } = parseStyle(text);
  if (then.length || first.has(NO_STYLE)) throw new Error("name one style, or several with commas between them");
  return [...first.keys()];
}

// The names that a field holds; [] where it cannot be read.
export function namesOfField(kind, text) {
  try {
    return NAMES[kind](text);
  } catch {
    return [];
  }
}

// What is wrong with a field's text for a model with the styles `known`: {what, why}, short and long; null if nothing is.
export function problem(kind, text, known) {
  let names;
  try {
    names = NAMES[kind](text);
  } catch (error) {
    return { what: say("cannot be read"), why: error.message };
  }
  const unknown = names.filter((name) => strip(name) !== NO_STYLE && findStyle(known, name) === undefined);
  if (!unknown.length) return null;
  if (!known.length) {
    return { what: say("this model has no styles"), why: say("A plain checkpoint: only '{none}' works with it.", { none: NO_STYLE }) };
  }
  return { what: say("not in this model: {names}", { names: unknown.join(", ") }), why: say("The styles of this model: {names}", { names: known.join(", ") }) };
}

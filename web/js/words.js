// The words of this folder's files in the language that the user has set. English stands in the code; words.json, made by
// "python -m comfyui_dmm.tests.locales" from locales/words.yaml, has the others. No page and no host is needed here.

const ENGLISH = "en";
const TABLE = new URL("./words.json", import.meta.url);

let table = {}; // language -> English -> translation
try {
  table = await (await fetch(TABLE)).json();
} catch {
  // Without the file, or outside of a page, English it is.
}

// Asked anew each time: the settings are not there yet when this file is read.
const language = () => globalThis.app?.extensionManager?.setting?.get?.("Comfy.Locale") ?? ENGLISH;

// A text with its places, such as {name}, filled by `values`. english: a literal, so that a test can find it. Values are put in as they are.
export function say(english, values = {}) {
  const text = table[language()]?.[english] ?? english;
  return text.replace(/\{(\w+)\}/g, (place, name) => (name in values ? String(values[name]) : place));
}

// Help for the text fields that take styles: "Choose style" and "Add style" in the menu that a right click on a node opens.
//
// The fields stay what they are; the menu only writes into them. Names come from strangers' model files: they go to the host's
// menu as plain strings, which it shows as text (it would read an entry's "content" as HTML).

import { app } from "../../../scripts/app.js";
import { NO_STYLE, onlyStyles, setting, stylesFor } from "./model_styles.js";
import { FIELDS, write } from "./style_fields.js";
import { isEmpty, quoteName, withLine, withStyle } from "./style_text.js";
import { say } from "./words.js";

export { quoteName, withStyle };

// --- the menu ---------------------------------------------------------------------------------------------------------

function menuItems(node) {
  const kinds = FIELDS[node.comfyClass] ?? {};
  const fields = Object.keys(kinds).filter((field) => ["style", "lines"].includes(kinds[field])); // the others have lists
  const names = (stylesFor(node) ?? onlyStyles())?.filter((name) => quoteName(name));
  const items = fields.flatMap((field) => {
    const text = setting(node, field);
    if (text === undefined) return []; // a link decides
    const end = fields.length > 1 ? `: ${field}` : "";
    if (kinds[field] === "lines") return [entry(node, field, say("Add style"), names, withLine)];
    const choose = entry(node, field, say("Choose style") + end, names && [...names, NO_STYLE], (_, style) => style);
    return isEmpty(text) ? [choose] : [choose, entry(node, field, say("Add style") + end, names, withStyle)];
  });
  return items.length ? [null, ...items] : [];
}

function entry(node, field, content, names, change) {
  if (!names?.length) return { content: say("{action} (no model with styles is connected)", { action: content }), disabled: true };
  const callback = (name) => write(node, field, (text) => change(text, quoteName(name)));
  return {
    content,
    has_submenu: true,
    callback: (_value, _options, event, parentMenu) => void new LiteGraph.ContextMenu(names, { event, parentMenu, callback }),
  };
}

app.registerExtension({ name: "comfyui-dmm.StyleMenu", getNodeMenuItems: menuItems });

// Nodes of the whole graph with the ids that the server knows them by: "12", or "3:12" inside of a subgraph.

import { app } from "../../../scripts/app.js";

export function nodesById(graph = app.rootGraph ?? app.graph, prefix = "") {
  return graph.nodes.flatMap((node) => {
    const id = `${prefix}${node.id}`;
    return node.subgraph ? nodesById(node.subgraph, `${id}:`) : [[id, node]];
  });
}

export const nodeOf = (id) => nodesById().find(([other]) => other === String(id))?.[1];

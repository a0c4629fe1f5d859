// Nodes of the whole graph, subgraphs among them, with the ids that the server knows them by: "12", or "3:12" inside of a subgraph.

import { app } from "../../../scripts/app.js";

export function nodesById(graph = app.rootGraph ?? app.graph, prefix = "") {
  return graph.nodes.flatMap((node) => {
    const id = `${prefix}${node.id}`;
    return [[id, node], ...(node.subgraph ? nodesById(node.subgraph, `${id}:`) : [])];
  });
}

export const nodeOf = (id) => nodesById().find(([other]) => other === String(id))?.[1];

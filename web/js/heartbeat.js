// Work that is repeated while the page is open. What our nodes show depends on files, links, texts and bypassed nodes anywhere in
// the graph, and the host tells of few of these changes: so they are looked at a few times a second, and only drawn when different.

const EVERY = 250; // milliseconds
const tasks = new Set();

// Call `task` at every beat until the function that this returns is called.
export function onBeat(task) {
  tasks.add(task);
  return () => tasks.delete(task);
}

// The same for as long as a node is there, while it is in a graph.
export function onBeatOf(node, task) {
  const stop = onBeat(() => node.graph && task());
  const removed = node.onRemoved;
  node.onRemoved = function (...rest) {
    stop();
    return removed?.apply(this, rest);
  };
}

function beat() {
  if (document.hidden) return;
  for (const task of [...tasks]) {
    try {
      task();
    } catch (error) {
      tasks.delete(task); // or it would fill the console
      console.error("DMM:", error);
    }
  }
}

setInterval(beat, EVERY);

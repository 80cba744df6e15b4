// A conversation as a tree. Each message hangs on the one before it; at each fork one way is
// chosen, and the chosen ways together are the path that is shown and sent.

export const ROOT = "root";

export function newConversation(settings) {
  return {
    id: crypto.randomUUID(),
    created: Date.now(),
    updated: Date.now(),
    settings: { ...settings },
    nodes: [],
    chosen: {}, // by the parent: the child that is shown, or null where the path ends
  };
}

// A further message after `parent` (null: the first one), which the path now goes through.
export function add(conversation, parent, role, text) {
  const node = { id: crypto.randomUUID(), parent: parent?.id ?? null, role, text };
  conversation.nodes.push(node);
  conversation.updated = Date.now();
  conversation.chosen[node.parent ?? ROOT] = node.id;
  return node;
}

// Take away a message on which nothing hangs; the path goes through what was there before it.
export function removeLeaf(conversation, node) {
  conversation.nodes = conversation.nodes.filter((other) => other !== node);
  delete conversation.chosen[node.parent ?? ROOT];
}

// Whatever hangs on the same message, the oldest first: the versions of a message.
export function versions(conversation, node) {
  return conversation.nodes.filter((other) => other.parent === node.parent);
}

export function parentOf(conversation, node) {
  return conversation.nodes.find((other) => other.id === node.parent) ?? null;
}

// Let the path go through this message, from the first one on.
export function choose(conversation, node) {
  for (let at = node; at; at = parentOf(conversation, at)) {
    conversation.chosen[at.parent ?? ROOT] = at.id;
  }
}

// Let the path end at this message: what is said next starts a branch.
export function endAt(conversation, node) {
  choose(conversation, node);
  conversation.chosen[node.id] = null;
}

// The messages that are shown, the first one first.
export function path(conversation) {
  return follow(children(conversation), conversation.chosen, ROOT);
}

// The messages up to one, and with it.
export function pathTo(conversation, node) {
  const found = [];
  for (let at = node; at; at = parentOf(conversation, at)) found.unshift(at);
  return found;
}

// The last messages of all branches, the oldest first.
export function leaves(conversation) {
  const parents = new Set(conversation.nodes.map((node) => node.parent));
  return conversation.nodes.filter((node) => !parents.has(node.id));
}

// What a conversation is called: how it begins.
export function titleOf(conversation) {
  const [first] = path(conversation);
  const words = (first ?? conversation.nodes[0])?.text.trim().replace(/\s+/g, " ") ?? "";
  return words.length > 60 ? `${words.slice(0, 57)}…` : words || "New conversation";
}

function children(conversation) {
  const found = new Map();
  for (const node of conversation.nodes) {
    const key = node.parent ?? ROOT;
    found.set(key, [...(found.get(key) ?? []), node]);
  }
  return found;
}

function follow(byParent, chosen, start) {
  const found = [];
  for (let key = start; byParent.has(key); key = found.at(-1).id) {
    if (chosen[key] === null) break;
    const ways = byParent.get(key);
    found.push(ways.find((node) => node.id === chosen[key]) ?? ways.at(-1));
  }
  return found;
}

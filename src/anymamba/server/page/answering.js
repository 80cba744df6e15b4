// One answer while it is written: what it says, and how fast it comes.

import { answer, requestFor } from "./api.js";

// Writes into `node` until the answer ends, `stop` is called or something fails.
export class Answering {
  #controller = new AbortController();
  #first = 0;
  #last = 0;

  constructor(conversation, node, model, messages) {
    this.conversation = conversation;
    this.node = node;
    this.#request = requestFor(model, conversation.settings, messages);
    node.facts = { model: model.id, tokens: 0, rate: 0, wait: 0, cached: 0, end: "" };
  }

  #request;

  stop() {
    this.#controller.abort();
  }

  // Calls `told` whenever something has come. Throws what the server refuses.
  async run(told) {
    const { facts } = this.node;
    const begun = performance.now();
    try {
      for await (const part of answer(this.#request, this.#controller.signal)) {
        if (part.text !== undefined) this.#write(part.text, begun);
        if (part.finish) facts.end = part.finish === "length" ? "length" : "";
        if (part.usage) this.#count(part.usage);
        if (part.cached !== undefined) Object.assign(facts, part);
        told();
      }
    } catch (error) {
      facts.end = this.#controller.signal.aborted ? "stopped" : "failed";
      if (facts.end === "failed") throw error;
    }
  }

  #write(text, begun) {
    const { facts } = this.node;
    this.#last = performance.now();
    if (!facts.tokens) {
      this.#first = this.#last;
      facts.wait = (this.#first - begun) / 1000;
    }
    facts.tokens += 1;
    this.node.text += text;
    const seconds = (this.#last - this.#first) / 1000;
    facts.rate = seconds > 0 ? (facts.tokens - 1) / seconds : 0;
  }

  #count(usage) {
    const { facts } = this.node;
    if (facts.tokens > 1) facts.rate *= (usage.completion_tokens - 1) / (facts.tokens - 1);
    facts.tokens = usage.completion_tokens;
    facts.prompt = usage.prompt_tokens;
    facts.cached = usage.prompt_tokens_details.cached_tokens;
  }
}

const MISSES = {
  evicted: "the rest had to make room",
  "other model": "the rest was read by another model",
  "other adapter": "the rest was read by another adapter",
};

// What is told of an answer below it.
export function factsInWords(facts) {
  const { tokens = 0, rate = 0, wait = 0, prompt = 0, cached = 0, miss, end } = facts ?? {};
  const words = [];
  if (tokens) words.push(`${count(tokens)} ${tokens === 1 ? "token" : "tokens"}`);
  if (rate) words.push(`${rate < 10 ? rate.toFixed(1) : Math.round(rate)} per second`);
  if (tokens) words.push(`first after ${duration(wait)}`);
  const parts = [cached && `${count(cached)} from the cache`, prompt && `${count(prompt - cached)} read`];
  if (cached || prompt) words.push(parts.filter(Boolean).join(", "));
  if (end === "edited") words.push("written by you");
  if (MISSES[miss]) words.push(MISSES[miss]);
  if (end === "length") words.push("cut at max tokens");
  if (end === "stopped") words.push("stopped");
  if (end === "failed") words.push("not finished");
  return words;
}

const duration = (seconds) =>
  seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(1)} s`;
const count = (number) => number.toLocaleString("en");

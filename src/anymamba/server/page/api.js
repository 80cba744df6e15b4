// What the server is asked, and what went wrong, in words.

import { events } from "./events.js";
import { apiKey } from "./storage.js";

const BASE = new URL("../v1/", import.meta.url);

export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export async function models() {
  const response = await send("models");
  return (await response.json()).data;
}

// An answer as it is written: first what the server found in its cache, then `{text}`, `{finish}`
// and at the end `{usage}`. `signal` ends it.
export async function* answer(request, signal) {
  const { path, body } = request;
  const asked = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await send(path, { method: "POST", body: JSON.stringify(asked), signal });
  yield {
    cached: Number(response.headers.get("x-anymamba-cached-tokens") ?? 0),
    miss: response.headers.get("x-anymamba-cache-miss"),
  };
  let isWhole = false;
  for await (const data of events(response.body)) {
    isWhole = data === "[DONE]";
    if (isWhole) continue;
    const found = JSON.parse(data);
    if (found.error) throw new ServerError(found.error.message);
    const [choice] = found.choices;
    if (choice) yield { text: choice.delta?.content ?? choice.text ?? "" };
    if (choice?.finish_reason) yield { finish: choice.finish_reason };
    if (found.usage) yield { usage: found.usage };
  }
  if (!isWhole) throw new ServerError("The connection was lost before the answer was finished.");
}

// The request that continues a path of messages. A model without a chat template gets the texts
// as they stand, one behind the other.
export function requestFor(model, settings, messages) {
  const { temperature, top_p, max_tokens, seed } = settings;
  const common = { model: model.id, temperature, top_p, ...(seed === null ? {} : { seed }) };
  if (!model.has_chat_template) {
    const prompt = messages.map((message) => message.text).join("");
    return { path: "completions", body: { ...common, prompt, max_tokens } };
  }
  const said = messages.map(({ role, text }) => ({ role, content: text }));
  if (settings.system.trim()) said.unshift({ role: "system", content: settings.system });
  const body = { ...common, messages: said, max_completion_tokens: max_tokens };
  return { path: "chat/completions", body };
}

async function send(path, options = {}) {
  const key = apiKey();
  const headers = { "content-type": "application/json" };
  if (key) headers.authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(new URL(path, BASE), { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer. Is it still running?");
  }
  if (response.ok) return response;
  throw new ServerError(await reason(response), response.status);
}

async function reason(response) {
  if (response.status === 401) return "The server needs its API key: enter it in the settings.";
  const body = await response.json().catch(() => null);
  const message = body?.error?.message ?? `The server answered with status ${response.status}.`;
  const isBusy = response.status === 503 || response.status === 429;
  return isBusy ? `${message} Try again in a moment.` : message;
}

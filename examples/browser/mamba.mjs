// A Mamba in WebAssembly, in a browser or in Node.js: reads a model's files and continues texts.

const TYPES = { F32: 0, BF16: 1, F16: 2 };

const GLOBAL_TENSORS = ["backbone.embeddings.weight", "lm_head.weight", "backbone.norm_f.weight"];

// In the order of interface.cpp's add_layer.
const LAYER_TENSORS = [
  "norm.weight", "mixer.in_proj.weight", "mixer.conv1d.weight", "mixer.conv1d.bias", "mixer.x_proj.weight",
  "mixer.dt_proj.weight", "mixer.dt_proj.bias", "mixer.A_log", "mixer.D", "mixer.out_proj.weight",
];

/**
 * Loads a model.
 *
 * `open(name)` gives a file of the model as a promise of an ArrayBuffer: mamba.wasm, config.json,
 * tokenizer.json and model.safetensors.
 */
export async function load(open) {
  const [module, config, tokenizer, weights] = await Promise.all(
    ["mamba.wasm", "config.json", "tokenizer.json", "model.safetensors"].map(open));
  const core = await instantiate(module);
  return new Mamba(core, fromJson(config), new ByteTokenizer(fromJson(tokenizer)), new Safetensors(weights));
}

class Mamba {
  constructor(core, config, tokenizer, weights) {
    check(config.model_type === "mamba", `this page runs models of type "mamba", not "${config.model_type}"`);
    check(config.hidden_act === "silu" && !config.use_bias, "this page runs models with silu and without biases");
    this.core = core;
    this.tokenizer = tokenizer;
    const d = config.hidden_size, e = config.intermediate_size ?? config.expand * d;
    this.vocabulary = config.vocab_size;
    const sizes = [config.vocab_size, d, e, config.state_size, config.time_step_rank, config.conv_kernel];
    const [embeddings, head, norm] = GLOBAL_TENSORS.map((name) => this.#place(weights, name));
    const type = weights.type();
    this.engine = core.create(this.#integers(sizes), config.layer_norm_epsilon, type, embeddings, head || embeddings, norm);
    for (let layer = 0; layer < config.num_hidden_layers; ++layer) {
      const tensors = LAYER_TENSORS.map((name) => this.#place(weights, `backbone.layers.${layer}.${name}`));
      core.add_layer(this.engine, this.#integers(tensors), type);
    }
  }

  /** Continues a text. Yields pieces of text as they come; temperature 0 takes the likeliest token. */
  *generate(prompt, { length = 200, temperature = 0.8, random = Math.random } = {}) {
    this.core.forget(this.engine);
    const decoder = new TextDecoder();
    let tokens = this.tokenizer.encode(prompt);
    check(tokens.length > 0, "write a prompt first");
    for (let written = 0; written < length; ++written) {
      const token = choose(this.#read(tokens), temperature, random);
      yield decoder.decode(this.tokenizer.bytes([token]), { stream: true });
      tokens = [token];
    }
  }

  /** The logits of the token after these, which go on from all that was read before. */
  #read(tokens) {
    const given = this.#integers(tokens);
    const logits = this.core.read(this.engine, given, tokens.length);
    this.core.release(given);
    // Not kept: the module's memory may grow and move.
    return new Float32Array(this.core.memory.buffer, logits, this.vocabulary).slice();
  }

  /** A tensor's place in the module's memory, aligned as its vectors want it; 0 where there is none. */
  #place(weights, name) {
    const bytes = weights.bytes(name);
    if (bytes === null) return 0;
    const place = Math.ceil(this.core.allocate(bytes.length + 64) / 64) * 64;
    new Uint8Array(this.core.memory.buffer).set(bytes, place);
    return place;
  }

  #integers(numbers) {
    const place = this.core.allocate(4 * numbers.length);
    new Int32Array(this.core.memory.buffer, place, numbers.length).set(numbers);
    return place;
  }
}

/** The tensors of a file; all have one type. */
class Safetensors {
  constructor(buffer) {
    const length = Number(new DataView(buffer).getBigUint64(0, true));
    this.header = fromJson(buffer.slice(8, 8 + length));
    this.data = new Uint8Array(buffer, 8 + length);
  }

  type() {
    const found = new Set(Object.entries(this.header).filter(([name]) => name !== "__metadata__").map(([, t]) => t.dtype));
    const [name] = found;
    check(found.size === 1 && name in TYPES, `tensors are of ${[...found]}, expected one of ${Object.keys(TYPES)}`);
    return TYPES[name];
  }

  bytes(name) {
    const tensor = this.header[name];
    return tensor === undefined ? null : this.data.subarray(...tensor.data_offsets);
  }
}

/** One token for each byte, as the bundled model has it: a BPE without merges. */
class ByteTokenizer {
  constructor({ model }) {
    check(model.type === "BPE" && model.merges.length === 0, "this page reads tokenizers of bytes only");
    this.ofByte = byteCharacters().map((character) => model.vocab[character]);
    this.toByte = new Map(this.ofByte.map((token, byte) => [token, byte]));
  }

  encode(text) {
    return Array.from(new TextEncoder().encode(text), (byte) => this.ofByte[byte]);
  }

  bytes(tokens) {
    return Uint8Array.from(tokens, (token) => this.toByte.get(token));
  }
}

/** The character that a byte-level tokenizer writes for each byte: those that cannot be seen come after 255. */
function byteCharacters() {
  const visible = (byte) => (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
  let next = 256;
  return Array.from({ length: 256 }, (_, byte) => String.fromCodePoint(visible(byte) ? byte : next++));
}

function choose(logits, temperature, random) {
  const largest = logits.reduce((a, b) => Math.max(a, b));
  if (temperature === 0) return logits.indexOf(largest);
  const weights = logits.map((logit) => Math.exp((logit - largest) / temperature));
  let left = random() * weights.reduce((a, b) => a + b);
  return Math.max(0, weights.findIndex((weight) => (left -= weight) < 0));
}

async function instantiate(bytes) {
  let memory = null;
  const system = {
    clock_time_get(clock, precision, place) {
      new DataView(memory.buffer).setBigUint64(place, BigInt(Math.round(performance.now() * 1e6)), true);
      return 0;
    },
    environ_sizes_get(count, size) {
      new DataView(memory.buffer).setUint32(count, 0, true);
      new DataView(memory.buffer).setUint32(size, 0, true);
      return 0;
    },
    environ_get: () => 0,
    proc_exit(status) { throw new Error(`the core stopped with status ${status}`); },
  };
  const env = { emscripten_notify_memory_growth() {} };
  const { instance } = await WebAssembly.instantiate(bytes, { env, wasi_snapshot_preview1: system });
  memory = instance.exports.memory;
  instance.exports._initialize();
  return instance.exports;
}

function fromJson(buffer) {
  return JSON.parse(new TextDecoder().decode(buffer));
}

function check(holds, message) {
  if (!holds) throw new Error(message);
}

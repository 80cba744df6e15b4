// Server-sent events: the data of each, as it comes.

export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let left = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (left + value).split("\n");
      left = lines.pop(); // not whole yet
      for (const line of lines) {
        if (line.startsWith("data: ")) yield line.slice("data: ".length); // others are signs of life
      }
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}

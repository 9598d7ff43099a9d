// The server's API. URLs are relative to the page, so that it works behind any prefix.

export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export const toUrl = (path) => new URL(path, document.baseURI).href;

/** The models that are served, as /v1/models describes them. */
export async function models(key) {
  const response = await request("v1/models", { headers: headers(key) });
  return (await response.json()).data;
}

/** The chunks of a streamed reply. Throws a ServerError, or what `signal` aborts with. */
export async function* chat(body, key, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { ...headers(key), "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  let done = false;
  for await (const data of events(response.body)) {
    done ||= data === "[DONE]";
    if (done) continue; // read to the end, or the server counts a cancellation
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(chunk.error.message, 200);
    yield chunk;
  }
  if (!done) throw new ServerError("", 0); // the stream broke off
}

async function request(path, options) {
  let response;
  try {
    response = await fetch(toUrl(path), options);
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ServerError("", 0);
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  const message = body?.error?.message ?? `${response.status} ${response.statusText}`;
  throw new ServerError(message, response.status);
}

const headers = (key) => (key ? { Authorization: `Bearer ${key}` } : {});

/** The data of each server-sent event; comments, which only keep the connection alive, are skipped. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (text + value).split("\n\n");
      text = blocks.pop();
      for (const block of blocks) {
        const lines = block.split("\n").filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// Conversations as data: turns, the request that they make, and what each chunk of the reply adds.
//
// A user's turn has `parts`; where it is `alone`, earlier turns are left out of the prompt. A model's
// turn has `replies`; the conversation continues with the `chosen` one.

export function newConversation() {
  return { id: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`, title: "", updated: Date.now(), turns: [] };
}

/** The JSON schema of the settings: null where there is none, undefined for anything but an object. */
export function parseSchema({ json_schema: text = "" }) {
  if (!text.trim()) return null;
  try {
    const schema = JSON.parse(text);
    return schema?.constructor === Object ? schema : undefined;
  } catch {
    return undefined;
  }
}

/** A request's fields from the settings, without empty ones. `existing` is the number of replies so far. */
export function requestFields(settings, output, existing) {
  const fields = {};
  if (output === "image" || output === "text") fields.modalities = [output];
  if (output === "interleaved") fields.modalities = ["text", "image"];
  for (const [name, value] of Object.entries(settings)) {
    if (!["replies", "negative_prompt", "json_schema"].includes(name) && value !== "") fields[name] = Number(value);
  }
  if (output === "text") delete fields.max_images;
  // Settings for images are left out of requests for text, and the schema out of requests for images.
  if (settings.negative_prompt && output !== "text") fields.negative_prompt = settings.negative_prompt;
  const schema = parseSchema(settings);
  if (schema && output !== "image") fields.response_format = { type: "json_schema", json_schema: { schema } };
  const random = crypto.getRandomValues(new Uint32Array(1))[0];
  // Further replies get the next seeds, as the choices of one request do.
  fields.seed = fields.seed === undefined ? random : fields.seed + existing;
  return fields;
}

/** The body of a request for a reply to the first `end` turns. */
export function requestBody(turns, end, model, fields) {
  return { model, messages: messagesOf(turns.slice(0, end)), ...fields };
}

export const streamingBody = (body) => ({
  ...body,
  stream: true,
  stream_options: { include_usage: true },
  ...(body.modalities?.includes("image") === false ? {} : { partial_images: 3 }),
});

function messagesOf(turns) {
  const messages = [];
  for (const turn of turns.slice(Math.max(turns.findLastIndex((turn) => turn.alone), 0))) {
    const parts = finished(turn.role === "user" ? turn.parts : turn.replies[turn.chosen].parts);
    const last = messages.at(-1);
    if (!parts.length) continue;
    // After a failed reply there are two user turns in a row.
    if (last?.role === turn.role) last.parts.push(...parts);
    else messages.push({ role: turn.role, parts });
  }
  return messages.map(({ role, parts }) => (role === "user" ? userMessage(parts) : assistantMessage(parts)));
}

const finished = (parts) => parts.filter((part) => (part.type === "text" ? part.text : part.url));

function userMessage(parts) {
  const content = parts.map((part) =>
    part.type === "text" ? { type: "text", text: part.text } : imageUrl(part),
  );
  const plain = parts.length === 1 && parts[0].type === "text";
  return { role: "user", content: plain ? parts[0].text : content };
}

/** Images are sent back unchanged: the server recognises its own by their bytes, and reuses their codes. */
function assistantMessage(parts) {
  const images = parts.filter((part) => part.type === "image");
  const content = parts.map((part) => part.text ?? "").join("");
  if (!images.length) return { role: "assistant", content };
  const order = parts.map((part) =>
    part.type === "text"
      ? { type: "text", text: part.text }
      : { type: "image_ref", index: images.indexOf(part) },
  );
  return { role: "assistant", content, images: images.map(imageUrl), parts: order };
}

const imageUrl = ({ url }) => ({ type: "image_url", image_url: { url } });

/** Add a chunk of the stream to a reply. Returns whether it had anything to show. */
export function applyChunk(reply, chunk) {
  if (chunk.usage) reply.usage = chunk.usage;
  const [choice] = chunk.choices;
  if (!choice) return false;
  const { content, image_progress: progress, images = [] } = choice.delta;
  if (content) addText(reply.parts, content);
  if (progress) addProgress(imageAt(reply.parts, progress.index), progress);
  for (const { index, image_url: { url } } of images) {
    const part = imageAt(reply.parts, index);
    Object.assign(part, { url, done: 1 });
    delete part.partial;
  }
  if (choice.finish_reason) reply.reason = choice.finish_reason;
  return Boolean(content || progress || images.length);
}

function addText(parts, content) {
  if (parts.at(-1)?.type === "text") parts.at(-1).text += content;
  // The server adds a line break between an image and the text after it.
  else parts.push({ type: "text", text: parts.length ? content.replace(/^\n/, "") : content });
}

function addProgress(part, { codes_done: done, codes_total: total, b64_json: data }) {
  part.done = done / total;
  if (data) Object.assign(part, { partial: `data:image/png;base64,${data}`, shown: done / total });
}

function imageAt(parts, index) {
  const images = parts.filter((part) => part.type === "image");
  if (images[index]) return images[index];
  parts.push({ type: "image", done: 0 });
  return parts.at(-1);
}

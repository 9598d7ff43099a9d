// Conversations as data: what was said, what the server is asked, and what its chunks add.
//
// A user's turn has `parts`; with `alone` the prompt begins there. A model's turn has `replies`, of
// which the `chosen` one is what the conversation goes on with.

export function newConversation() {
  return { id: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`, title: "", updated: Date.now(), turns: [] };
}

/** The fields of a request that the settings stand for; empty ones are the model's defaults. */
export function fieldsOf(settings, output, drawn) {
  const fields = {};
  if (output === "image" || output === "text") fields.modalities = [output];
  if (output === "interleaved") fields.modalities = ["text", "image"];
  for (const [name, value] of Object.entries(settings)) {
    if (name !== "replies" && value !== "") fields[name] = Number(value);
  }
  if (output === "text") delete fields.max_images;
  const random = crypto.getRandomValues(new Uint32Array(1))[0];
  // Another reply to the same words has the next seed, as choices of one request have.
  fields.seed = fields.seed === undefined ? random : fields.seed + drawn;
  return fields;
}

/** The body that asks for a reply to the turns before number `end`. */
export function bodyOf(turns, end, model, fields) {
  return { model, messages: messagesOf(turns.slice(0, end)), ...fields };
}

export const streamed = (body) => ({
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
    // A reply that failed leaves two turns of the user's side by side.
    if (last?.role === turn.role) last.parts.push(...parts);
    else messages.push({ role: turn.role, parts });
  }
  return messages.map(({ role, parts }) => (role === "user" ? asked(parts) : answered(parts)));
}

const finished = (parts) => parts.filter((part) => (part.type === "text" ? part.text : part.url));

function asked(parts) {
  const content = parts.map((part) =>
    part.type === "text" ? { type: "text", text: part.text } : picture(part),
  );
  const plain = parts.length === 1 && parts[0].type === "text";
  return { role: "user", content: plain ? parts[0].text : content };
}

/** Pictures go back as they came: the server knows those that it drew by their bytes. */
function answered(parts) {
  const images = parts.filter((part) => part.type === "image");
  const content = parts.map((part) => part.text ?? "").join("");
  if (!images.length) return { role: "assistant", content };
  const order = parts.map((part) =>
    part.type === "text"
      ? { type: "text", text: part.text }
      : { type: "image_ref", index: images.indexOf(part) },
  );
  return { role: "assistant", content, images: images.map(picture), parts: order };
}

const picture = ({ url }) => ({ type: "image_url", image_url: { url } });

/** Add a chunk of the stream to a reply; whether there was anything to see in it. */
export function apply(reply, chunk) {
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
  // The line break that parts it from the picture before it is the server's, not the model's.
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

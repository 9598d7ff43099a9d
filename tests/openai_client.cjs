"use strict";
// OpenAI's npm package against the server at argv[2]; argv[3] is a PNG. Prints what it saw as JSON.

const fs = require("node:fs");
const OpenAI = require("openai");

const [, , url, imagePath] = process.argv;
const imageBytes = fs.readFileSync(imagePath);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "secret-key", maxRetries: 0 });
const fruits = [{ role: "user", content: "Show me two different fruits." }];

async function imageInput() {
  const url = `data:image/png;base64,${imageBytes.toString("base64")}`;
  const content = [
    { type: "image_url", image_url: { url } },
    { type: "text", text: "What is this?" },
  ];
  const messages = [{ role: "user", content }];
  const reply = await client.chat.completions.create({ model: "mini", messages, seed: 0 });
  return { text: reply.choices[0].message.content, usage: reply.usage.prompt_tokens_details };
}

async function imageOutput() {
  const messages = [{ role: "user", content: "Draw a cat." }];
  const reply = await client.chat.completions.create({
    model: "mini",
    messages,
    seed: 1,
    modalities: ["image"],
  });
  return reply.choices[0].message.images[0].image_url.url;
}

async function interleaved() {
  const stream = await client.chat.completions.create({
    model: "mini",
    messages: fruits,
    seed: 0,
    stream: true,
    stream_options: { include_usage: true },
  });
  const parts = [];
  let reason = null;
  let usage = null;
  for await (const chunk of stream) {
    usage = chunk.usage ?? usage;
    const choice = chunk.choices[0];
    if (!choice) continue;
    reason = choice.finish_reason ?? reason;
    if (choice.delta.content) {
      if (typeof parts.at(-1)?.text === "string") parts.at(-1).text += choice.delta.content;
      else parts.push({ text: choice.delta.content });
    }
    for (const image of choice.delta.images ?? []) parts.push({ image: image.image_url.url });
  }
  return { parts, reason, usage };
}

async function responses() {
  const body = {
    model: "mini",
    input: "Show me two different fruits.",
    tools: [{ type: "image_generation", partial_images: 2 }],
    seed: 0,
  };
  const events = [];
  for await (const event of await client.responses.create({ ...body, stream: true })) {
    events.push([event.sequence_number, event.type]);
  }
  const helper = client.responses.stream(body);
  const last = await helper.finalResponse();
  const output = last.output.map((item) => [item.type, item.result ?? item.content[0].text]);
  return { events, output, text: last.output_text };
}

async function generations() {
  const stream = await client.images.generate({
    prompt: "Draw a cat.",
    seed: 1,
    stream: true,
    partial_images: 2,
  });
  const events = [];
  for await (const event of stream) events.push([event.type, event.b64_json]);
  return events;
}

async function edits() {
  const image = await OpenAI.toFile(imageBytes, "image.png", { type: "image/png" });
  const prompt = "Redraw this in another style.";
  const reply = await client.images.edit({ image, prompt, seed: 2 });
  return reply.data[0].b64_json;
}

async function parsed() {
  const schema = { type: "object", properties: { name: { enum: ["apple", "pear"] } } };
  const strict = { required: ["name"], additionalProperties: false };
  const json_schema = { name: "fruit", schema: { ...schema, ...strict } };
  const reply = await client.chat.completions.parse({
    model: "mini",
    messages: [{ role: "user", content: "Name a fruit." }],
    response_format: { type: "json_schema", json_schema },
    max_tokens: 40,
  });
  return reply.choices[0].message.parsed;
}

async function failure(ask) {
  try {
    await ask();
  } catch (error) {
    return [error.constructor.name, error.status, error.param ?? null, error.message];
  }
  return null;
}

function failures() {
  const stranger = new OpenAI({ baseURL: `${url}/v1`, apiKey: "wrong", maxRetries: 0 });
  const chat = (more) => client.chat.completions.create({ model: "mini", messages: fruits, ...more });
  return Promise.all([
    failure(() => chat({ temperature: -1 })),
    failure(() => chat({ temprature: 1 })),
    failure(() => chat({ model: "other" })),
    failure(() => client.responses.retrieve("resp_none")),
    failure(() => stranger.models.list()),
  ]);
}

async function main() {
  const models = [];
  for await (const model of client.models.list()) models.push(model.id);
  const seen = { models, failures: await failures() };
  const steps = { imageInput, imageOutput, interleaved, responses, generations, edits, parsed };
  for (const [name, step] of Object.entries(steps)) seen[name] = await step();
  console.log(JSON.stringify(seen));
}

main();

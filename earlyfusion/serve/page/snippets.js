// A request as code that runs as it is: a curl command, or Python with the openai package.

import { toUrl } from "./api.js";

const OPENAI_FIELDS = ["model", "messages", "temperature", "max_tokens", "seed"];

export function asCurl(body, hasKey) {
  const lines = [`curl ${toUrl("v1/chat/completions")}`, '-H "Content-Type: application/json"'];
  if (hasKey) lines.push('-H "Authorization: Bearer $OPENAI_API_KEY"');
  // From standard input, since an image exceeds the length of a command line.
  lines.push("-d @- <<'JSON'");
  return `${lines.join(" \\\n  ")}\n${JSON.stringify(body, null, 2)}\nJSON\n`;
}

export function asPython(body, hasKey) {
  const withImages = body.modalities?.includes("image") !== false;
  const additions = Object.entries(body).filter(([name]) => !OPENAI_FIELDS.includes(name));
  const standard = Object.entries(body).filter(([name]) => OPENAI_FIELDS.includes(name));
  const key = hasKey ? 'os.environ["OPENAI_API_KEY"]' : '"none"';
  return [
    ...(withImages ? ["import base64"] : []),
    ...(hasKey ? ["import os"] : []),
    ...(withImages || hasKey ? [""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${JSON.stringify(toUrl("v1"))}, api_key=${key})`,
    "reply = client.chat.completions.create(",
    ...standard.map(([name, value]) => `    ${name}=${literal(value, "    ")},`),
    ...(additions.length ? [`    extra_body=${literal(Object.fromEntries(additions), "    ")},`] : []),
    ")",
    "message = reply.choices[0].message",
    "print(message.content)",
    ...(withImages ? SAVE_IMAGES : []),
    "",
  ].join("\n");
}

const SAVE_IMAGES = [
  'for number, image in enumerate(getattr(message, "images", None) or []):',
  '    data = image["image_url"]["url"].partition(",")[2]',
  '    with open(f"image-{number}.png", "wb") as file:',
  "        file.write(base64.b64decode(data))",
];

/** A Python literal. JSON's strings and numbers are valid Python. */
function literal(value, indent) {
  const deeper = `${indent}    `;
  if (Array.isArray(value) && value.every((item) => typeof item !== "object")) {
    return `[${value.map((item) => literal(item, deeper)).join(", ")}]`;
  }
  if (Array.isArray(value)) {
    return `[\n${value.map((item) => `${deeper}${literal(item, deeper)},\n`).join("")}${indent}]`;
  }
  if (value !== null && typeof value === "object") {
    const entries = Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${literal(item, indent)}`);
    return `{${entries.join(", ")}}`;
  }
  return typeof value === "string" ? JSON.stringify(value) : (CONSTANTS[value] ?? String(value));
}

const CONSTANTS = { true: "True", false: "False", null: "None" };

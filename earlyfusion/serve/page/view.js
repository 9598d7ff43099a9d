// The elements of a conversation. Text is inserted as text only, never as HTML.

import { styles, t } from "./words.js";

/** An element with attributes, listeners (`onclick`) and children. */
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

export const button = (name, onclick, attributes = {}) =>
  el("button", { type: "button", class: "quiet", onclick, ...attributes }, t(name));

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

// The elements of replies, and the strips of thumbnails by turn, to update them while replies stream.
const replyViews = new WeakMap();
const stripOf = new WeakMap();

/** The elements of all turns; `act` holds the actions of their buttons. */
export function turnViews(conversation, act) {
  return conversation.turns.map((turn, position) =>
    turn.role === "user" ? userView(turn, position, act) : modelView(turn, position, conversation, act),
  );
}

function userView(turn, position, act) {
  if (act.editing === turn) return editView(turn, position, act);
  const view = el("li", { class: "turn user" }, el("h2", { class: "hidden" }, t("you")));
  const bubble = el("div", { class: "bubble" });
  for (const part of turn.parts) {
    if (part.type === "text") bubble.append(el("p", { class: "text" }, part.text));
    else view.append(imageView(part, t("sentImage"), null, act));
  }
  const edit = el("div", { class: "actions" }, button("edit", () => act.edit(turn)));
  view.append(el("div", { class: "said" }, edit, ...(bubble.children.length ? [bubble] : [])));
  return view;
}

function editView(turn, position, act) {
  const text = turn.parts.find((part) => part.type === "text")?.text ?? "";
  const field = el("textarea", { rows: 3, "aria-label": t("editMessage") });
  field.value = text;
  const images = turn.parts.filter((part) => part.type === "image");
  const thumbnails = el("ul", { class: "attached" });
  for (const part of images) thumbnails.append(attachedView(part, () => images.splice(images.indexOf(part), 1)));
  const done = (event) => {
    event.preventDefault();
    act.saveEdit(turn, position, [...images, ...(field.value.trim() ? [{ type: "text", text: field.value.trim() }] : [])]);
  };
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") act.edit(null, turn);
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) done(event);
  });
  return el("li", { class: "turn user editing" },
    el("form", { onsubmit: done }, thumbnails, field, el("p", { class: "note" }, t("editNote")),
      el("div", { class: "row" }, el("button", { class: "solid" }, t("saveEdit")),
        button("cancel", () => act.edit(null, turn)))));
}

/** An image to be sent, with a button that removes it. */
export function attachedView(part, onRemove) {
  const name = part.name ?? t("image");
  const view = el("li", {}, image(part.url, t("attachedImage", { name })));
  const remove = () => (view.remove(), onRemove());
  view.append(el("button", { type: "button", class: "icon small", "aria-label": t("detach", { name }), onclick: remove }, icon("close")));
  return view;
}

function modelView(turn, position, conversation, act) {
  const reply = turn.replies[turn.chosen];
  const view = el("li", { class: "turn model" }, el("h2", { class: "hidden" }, t("reply")));
  const content = el("div", { class: "content" });
  const meta = el("p", { class: "meta" });
  const actions = el("div", { class: "actions" });
  view.append(content, ...(turn.replies.length > 1 ? [stripView(turn, act)] : []), meta, actions);
  const last = position === conversation.turns.length - 1;
  const parts = { turn, content, meta, actions, act, position, last, nodes: [] };
  replyViews.set(reply, parts);
  updateReply(reply);
  return view;
}

function stripView(turn, act) {
  const strip = el("div", { class: "strip", role: "group", "aria-label": t("variants") });
  for (const number of turn.replies.keys()) {
    const thumbnail = el("button", {
      type: "button", class: "quiet", "aria-pressed": String(number === turn.chosen),
      "aria-label": t("variant", { number: number + 1 }), onclick: () => act.choose(turn, number),
    });
    strip.append(thumbnail);
  }
  stripOf.set(turn, strip);
  updateStrip(turn);
  return strip;
}

/** Update the thumbnails of a turn's replies. */
export function updateStrip(turn) {
  for (const [number, thumbnail] of [...(stripOf.get(turn)?.children ?? [])].entries()) {
    const shownImage = turn.replies[number].parts.find((part) => part.url ?? part.partial);
    thumbnail.replaceChildren(shownImage ? image(shownImage.url ?? shownImage.partial, "") : String(number + 1));
  }
}

/** Update the elements of a reply, if it is on the page. */
export function updateReply(reply) {
  const view = replyViews.get(reply);
  if (!view) return;
  const busy = reply.state === "running";
  view.content.setAttribute("aria-busy", String(busy));
  view.content.querySelector(".waiting")?.remove();
  for (const [index, part] of reply.parts.entries()) updatePart(view, reply, index, part);
  if (busy && !reply.parts.length) {
    view.content.append(el("p", { class: "waiting" }, el("span", { class: "hidden" }, t("waiting"))));
  }
  if (busy) return;
  view.meta.textContent = summary(reply);
  view.content.querySelector(".error")?.remove();
  if (reply.state === "error") view.content.append(el("p", { class: "error" }, reply.error || t("notReached")));
  view.actions.replaceChildren(...replyActions(view, reply));
}

function updatePart(view, reply, index, part) {
  const node = view.nodes[index];
  if (part.type === "text") {
    view.nodes[index] ??= view.content.appendChild(el("p", { class: "text" }));
    if (view.nodes[index].textContent !== part.text) view.nodes[index].textContent = part.text;
  } else if (node && !part.url) {
    showProgress(node.firstChild, part, reply.state === "running");
  } else if (!node?.finished) {
    const number = reply.parts.slice(0, index + 1).filter((other) => other.type === "image").length;
    const next = part.url
      ? imageView(part, t("replyImage", { number }), `image-${reply.fields.seed}-${number}`, view.act)
      : unfinishedView(part, view.act, reply.state === "running");
    next.finished = Boolean(part.url);
    if (node) node.replaceWith(next);
    else view.content.append(next);
    view.nodes[index] = next;
  }
}

/** An image that is being generated: its finished rows and a progress bar. */
function unfinishedView(part, act, busy) {
  const frame = el("div", { class: "frame" }, image("", ""), el("progress", { max: 1, "aria-label": t("generating") }));
  const [width, height] = act.size();
  frame.style.aspectRatio = `${width} / ${height}`;
  frame.classList.toggle("small", width <= 128);
  showProgress(frame, part, busy);
  return el("figure", { class: "generating" }, frame);
}

function showProgress(frame, part, busy) {
  const [preview, progress] = frame.children;
  progress.value = part.done;
  progress.hidden = !busy;
  preview.hidden = !part.partial;
  if (!part.partial) return;
  if (preview.src !== part.partial) preview.src = part.partial;
  // The rows below are not generated yet; the file shows them grey, the page hides them.
  preview.style.clipPath = `inset(0 0 ${100 * (1 - part.shown)}% 0)`;
}

/** A finished image and its buttons. The user's images have no `name` and no download. */
function imageView(part, alt, name, act) {
  const extension = /^data:image\/(\w+)/.exec(part.url)?.[1] ?? "png";
  const bar = el("div", { class: "bar" });
  if (act.generatesImages()) bar.append(button("vary", () => act.vary(part)), restyleView(part, act));
  bar.append(button("reuse", () => act.reuse(part)));
  if (name) bar.append(el("a", { class: "quiet", href: part.url, download: `${name}.${extension}` }, t("download")));
  return el("figure", {}, el("div", { class: "frame" }, image(part.url, alt)), bar);
}

function restyleView(part, act) {
  const menu = el("details", { class: "menu" }, el("summary", { class: "quiet" }, t("restyle")));
  const list = el("div", { class: "choices", role: "group", "aria-label": t("restyleHow") });
  for (const style of styles(act.model())) {
    list.append(el("button", { type: "button", class: "quiet", onclick: () => act.restyle(part, style) }, style));
  }
  const close = (event) => {
    if (event.type === "keydown" && event.key !== "Escape") return;
    if (event.type === "focusout" && menu.contains(event.relatedTarget)) return;
    if (event.type === "keydown") menu.firstChild.focus();
    menu.open = false;
  };
  menu.addEventListener("keydown", close);
  menu.addEventListener("focusout", close);
  menu.append(list);
  return menu;
}

function image(url, alt) {
  const element = el("img", { alt });
  // Small images are enlarged without smoothing.
  element.addEventListener("load", () => element.classList.toggle("pixels", element.naturalWidth <= 128));
  if (url) element.src = url;
  return element;
}

function replyActions({ turn, position, act, last }, reply) {
  const text = reply.parts.some((part) => part.text);
  return [
    ...(last ? [button("regenerate", () => act.regenerate(turn))] : []),
    ...(text ? [button("copyText", () => act.copyText(reply))] : []),
    button("copyCurl", () => act.copyCurl(reply, position)),
    button("copyPython", () => act.copyPython(reply, position)),
  ];
}

function summary(reply) {
  const { usage, seconds, first } = reply;
  const imageTokens = usage?.completion_tokens_details?.image_tokens ?? 0;
  const textTokens = (usage?.completion_tokens ?? 0) - imageTokens;
  const ended = reply.reason === "length" ? "length" : "stop";
  const short = (number) => number.toFixed(number < 10 ? 2 : 1);
  return [
    t(`reason_${reply.state === "done" ? ended : reply.state}`),
    textTokens ? t("textTokens", { n: textTokens }) : "",
    imageTokens ? t("imageTokens", { n: imageTokens }) : "",
    first ? t("firstAfter", { s: short(first) }) : "",
    seconds ? t("inAll", { s: short(seconds) }) : "",
    usage && seconds ? t("perSecond", { n: Math.round(usage.completion_tokens / seconds) }) : "",
    t("seedWas", { seed: reply.fields.seed }),
  ].filter(Boolean).join(" · ");
}

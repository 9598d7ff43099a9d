// The page: its state, its event listeners, and the actions that they start.

import { ServerError, chat, models } from "./api.js";
import { applyChunk, newConversation, parseSchema, requestBody, requestFields, streamingBody } from "./conversation.js";
import { imagesIn, readImage } from "./images.js";
import { asCurl, asPython } from "./snippets.js";
import * as store from "./store.js";
import { attachedView, button, el, icon, turnViews, updateReply, updateStrip } from "./view.js";
import { applyLanguage, currentLanguage, t } from "./words.js";

const $ = (id) => document.getElementById(id);
const running = new Map(); // of replies that are being generated: reply -> {conversation, controller}
const loaded = new Map(); // id -> conversation
const isTouchScreen = matchMedia("(pointer: coarse)");
const inputs = [...document.querySelectorAll("#settings :is(input, textarea)")];
let conversation = newConversation();
let attached = [];
let servedModels = []; // of /v1/models
let key = store.getValue("key") ?? store.getValue("key", sessionStorage) ?? "";
let keyRequest = null; // a promise while the dialog for the API key is open

// --- requests ---

const model = () => servedModels.find(({ id }) => id === $("model").value) ?? servedModels[0];
const output = () => document.querySelector("[name=output]:checked").value;
const settings = () => Object.fromEntries(inputs.map(({ name, value }) => [name, value]));

/** Whether the JSON schema in the settings can be sent, where the reply may have text; shows a message if not. */
function checkSchema(wanted = output()) {
  if (wanted === "image" || parseSchema(settings()) !== undefined) return true;
  showToast(t("badSchema"));
  return false;
}

async function sendTurn(parts, { alone = false, wanted = output() } = {}) {
  if (!checkSchema(wanted)) return;
  conversation.turns.push({ role: "user", parts, alone });
  conversation.title ||= parts.find((part) => part.text)?.text.slice(0, 80) ?? "";
  await generateReplies(wanted);
}

/** Ask for replies to the last user turn. */
async function generateReplies(wanted, count = Math.min(Math.max(Number(settings().replies) || 1, 1), 4)) {
  const { turns } = conversation;
  if (turns.at(-1).role === "user") turns.push({ role: "assistant", replies: [], chosen: 0 });
  const turn = Object.assign(turns.at(-1), { wanted, switchedTo: output() });
  turn.chosen = turn.replies.length;
  const newReplies = [];
  for (let number = 0; number < count; number += 1) {
    const fields = requestFields(settings(), wanted, turn.replies.length);
    newReplies.push({ parts: [], fields, state: "running" });
    turn.replies.push(newReplies.at(-1));
  }
  render();
  focusPrompt();
  scrollDown();
  announce(t("replyBegins"));
  saveConversation(conversation);
  store.setValue("open", conversation.id);
  await Promise.all(newReplies.map((reply) => streamReply(conversation, turns.length - 1, reply)));
}

async function streamReply(target, position, reply) {
  const controller = new AbortController();
  running.set(reply, { conversation: target, controller });
  showRunning();
  const began = performance.now();
  const since = () => (performance.now() - began) / 1000;
  const body = streamingBody(requestBody(target.turns, position, model()?.id, reply.fields));
  try {
    for await (const chunk of withKey(() => chat(body, key, controller.signal))) {
      if (applyChunk(reply, chunk)) reply.first ??= since();
      scheduleUpdate(reply);
    }
    reply.state = "done";
  } catch (error) {
    reply.state = controller.signal.aborted ? "stopped" : "error";
    if (reply.state === "error") reply.error = error.message;
    if (!(error instanceof ServerError || controller.signal.aborted)) console.error(error);
  }
  reply.seconds = since();
  running.delete(reply);
  finish(target, position, reply);
}

/** The output that a turn asked for, or the one that the user has chosen since. */
const outputOf = (turn) => (turn && turn.switchedTo === output() ? turn.wanted : output());

/** The chunks of a stream; if the server requires an API key, asks for it and tries again. */
async function* withKey(stream) {
  try {
    yield* stream();
  } catch (error) {
    if (error.status !== 401 || !(await askKey())) throw error;
    yield* stream();
  }
}

function finish(target, position, reply) {
  keepScroll(() => (updateReply(reply), updateStrip(target.turns[position])));
  showRunning();
  announce(reply.state === "error" ? reply.error || t("notReached") : t("replyDone", { text: replySummary(reply) }));
  saveConversation(target);
}

function replySummary(reply) {
  const images = reply.parts.filter((part) => part.url).length;
  const text = reply.parts.map((part) => part.text ?? "").join(" ").trim();
  return [text, images ? t("imageCount", { n: images }) : ""].filter(Boolean).join(", ");
}

function stop(target = conversation) {
  for (const entry of running.values()) if (entry.conversation === target) entry.controller.abort();
}

// --- actions of the buttons in a conversation ---

const act = {
  editing: null,
  model: () => model()?.id,
  generatesImages: () => model()?.output_modalities.includes("image") ?? true,
  size: () => (model()?.image_size ?? "512x512").split("x").map(Number),
  edit(turn, from = null) {
    act.editing = turn;
    render();
    const views = [...$("turns").children];
    if (turn) views.find((view) => view.matches(".editing")).querySelector("textarea").focus();
    else views[conversation.turns.indexOf(from)].querySelector(".actions button").focus();
  },
  saveEdit(turn, position, parts) {
    const wanted = outputOf(conversation.turns[position + 1]);
    if (!parts.length || !checkSchema(wanted)) return;
    stop();
    act.editing = null;
    conversation.turns.length = position;
    if (!position) conversation.title = "";
    sendTurn(parts, { alone: turn.alone, wanted });
  },
  choose(turn, number) {
    turn.chosen = number;
    render();
    saveConversation(conversation);
    const strip = $("turns").children[conversation.turns.indexOf(turn)].querySelector(".strip");
    strip.children[number].focus();
  },
  regenerate(turn) {
    if (checkSchema(outputOf(turn))) generateReplies(outputOf(turn), 1);
  },
  vary: (part) => sendTurn([imagePart(part), { type: "text", text: t("varyPrompt") }], { alone: true, wanted: "image" }),
  restyle(part, style) {
    sendTurn([imagePart(part), { type: "text", text: t("restylePrompt", { style }) }], { alone: true, wanted: "image" });
  },
  reuse(part) {
    attached.push(imagePart(part));
    renderAttached();
    focusPrompt();
  },
  copyText: (reply) => copy(reply.parts.map((part) => part.text ?? "").filter(Boolean).join("\n")),
  copyCurl: (reply, position) => copy(asCurl(requestBody(conversation.turns, position, model()?.id, reply.fields), key)),
  copyPython: (reply, position) => copy(asPython(requestBody(conversation.turns, position, model()?.id, reply.fields), key)),
};

const imagePart = ({ url, name }) => ({ type: "image", url, name });

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Browsers offer the clipboard only over https and on localhost.
    const area = document.body.appendChild(el("textarea", { class: "hidden" }));
    area.value = text;
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    if (!copied) return showToast(t("notCopied"));
  }
  return showToast(t("copied"));
}

// --- rendering ---

function render() {
  $("empty").hidden = conversation.turns.length > 0;
  $("turns").replaceChildren(...turnViews(conversation, act));
  document.title = conversation.title ? `${conversation.title} · earlyfusion` : "earlyfusion";
  showRunning();
}

function showRunning() {
  const busy = [...running.values()].some((entry) => entry.conversation === conversation);
  const focused = document.activeElement === (busy ? $("send") : $("stop"));
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  if (focused) focusPrompt();
}

const pendingUpdates = new Set();

/** Render a reply in the next frame. */
function scheduleUpdate(reply) {
  if (!pendingUpdates.size) {
    requestAnimationFrame(() => {
      keepScroll(() => pendingUpdates.forEach(updateReply));
      pendingUpdates.clear();
    });
  }
  pendingUpdates.add(reply);
}

// The thread stays at its end while it grows, until somebody scrolls up.
const scrolled = { follows: true, top: 0 };

function followReplies() {
  const thread = $("thread");
  thread.addEventListener("scroll", () => {
    const near = thread.scrollHeight - thread.scrollTop - thread.clientHeight < 80;
    // Content that grows below the view is no reason to stop following: only scrolling up is.
    if (near || thread.scrollTop < scrolled.top) scrolled.follows = near;
    scrolled.top = thread.scrollTop;
  });
  // An image has its height only when it is decoded.
  const grown = new ResizeObserver(() => scrolled.follows && !act.editing && scrollDown());
  grown.observe($("turns"));
}

/** Change the thread. If it was scrolled to the end it stays at the end, else where it was. */
function keepScroll(change) {
  const { scrollTop } = $("thread");
  change();
  $("thread").scrollTop = scrolled.follows ? $("thread").scrollHeight : scrollTop;
}

function scrollDown() {
  scrolled.follows = true;
  $("thread").scrollTop = $("thread").scrollHeight;
}

/** Focus the message field; not on touch screens, where the keyboard would cover the reply. */
function focusPrompt() {
  $(isTouchScreen.matches ? "thread" : "prompt").focus({ preventScroll: true });
}

function announce(text) {
  $("live").textContent = text;
}

let toastTimer;

function showToast(text) {
  announce(text);
  $("toast").textContent = text;
  $("toast").hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => ($("toast").hidden = true), 4000);
}

function renderAttached() {
  const views = attached.map((part) => attachedView(part, () => (attached = attached.filter((other) => other !== part))));
  $("attached").replaceChildren(...views);
}

function renderExamples() {
  const ask = button("exampleAskLabel", () => (($("prompt").value = t("exampleAsk")), $("pick").click()));
  const examples = [["exampleDraw", "image"], ["exampleBoth", "interleaved"]].map(([name, wanted]) =>
    button(name, () => sendTurn([{ type: "text", text: t(name) }], { wanted })),
  );
  const offered = act.generatesImages() ? [...examples, ask] : [ask];
  $("examples").replaceChildren(...offered.map((example) => el("li", {}, example)));
}

// --- the list of conversations ---

async function saveConversation(target) {
  if (target.gone) return;
  target.updated = Date.now();
  loaded.set(target.id, target);
  try {
    await store.save(target);
  } catch {
    showToast(t("notStored"));
  }
  await renderList();
}

async function renderList() {
  const heads = await store.list();
  $("list").replaceChildren(...heads.map((head) => {
    const title = head.title || t("untitled");
    const current = head.id === conversation.id;
    return el("li", {},
      el("button", { type: "button", class: "wide", "aria-current": current ? "true" : undefined, onclick: () => openConversation(head.id) }, title),
      el("button", { type: "button", class: "icon small", "aria-label": t("remove", { title }), onclick: () => deleteConversation(head) }, icon("close")));
  }));
}

async function openConversation(id) {
  const found = loaded.get(id) ?? (await store.load(id));
  if (!found || found.gone) return;
  loaded.set(id, found);
  for (const reply of found.turns.flatMap((turn) => turn.replies ?? [])) {
    if (reply.state === "running" && !running.has(reply)) reply.state = "stopped"; // the page was closed
  }
  switchTo(found);
}

function switchTo(other) {
  conversation = other;
  act.editing = null;
  store.setValue("open", other.turns.length ? other.id : null);
  render();
  scrollDown();
  renderList();
  showSidebar(false);
  focusPrompt();
}

async function deleteConversation(head) {
  if (!confirm(t("confirmRemove"))) return;
  const found = loaded.get(head.id);
  if (found) (stop(found), (found.gone = true));
  await store.remove(head.id);
  if (head.id === conversation.id) switchTo(newConversation());
  else await renderList();
  if (!isTouchScreen.matches) $("new").focus();
}

/** On narrow screens the list of conversations overlays the page. */
function showSidebar(open) {
  if (document.body.classList.contains("side-open") === open) return;
  document.body.classList.toggle("side-open", open);
  document.querySelector("main").inert = open;
  $("shade").hidden = !open;
  $("menu").setAttribute("aria-expanded", String(open));
  (open ? $("new") : $("menu")).focus();
}

// --- key, model, language, theme ---

function askKey() {
  keyRequest ??= new Promise((resolve) => {
    const dialog = $("key");
    const closed = () => {
      keyRequest = null;
      const given = dialog.returnValue === "ok" && $("key-input").value.trim();
      if (given) {
        key = given;
        store.setValue("key", key, sessionStorage);
        store.setValue("key", $("key-keep").checked ? key : null);
        if (!servedModels.length) readModels();
      }
      $("key-button").hidden = !key;
      resolve(Boolean(given));
    };
    dialog.returnValue = "";
    $("key-input").value = "";
    dialog.addEventListener("close", closed, { once: true });
    dialog.showModal();
  });
  return keyRequest;
}

async function readModels() {
  try {
    servedModels = await models(key);
  } catch (error) {
    if (error.status === 401) return void askKey();
    return showToast(error.message || t("notReached"));
  }
  $("model").replaceChildren(...servedModels.map(({ id }) => el("option", {}, id)));
  const last = store.getValue("model");
  if (servedModels.some(({ id }) => id === last)) $("model").value = last;
  showModel();
  return undefined;
}

function showModel() {
  $("model").disabled = servedModels.length < 2;
  for (const radio of document.querySelectorAll("[name=output]")) {
    radio.disabled = !act.generatesImages() && radio.value !== "auto" && radio.value !== "text";
  }
  if (document.querySelector("[name=output]:checked").disabled) {
    document.querySelector("[name=output][value=auto]").checked = true;
  }
  renderExamples();
  render();
}

function setLanguage(language) {
  applyLanguage(language);
  for (const input of inputs.filter(({ type }) => type === "number")) input.placeholder = input.name === "replies" ? "1" : t(input.name === "seed" ? "random" : "default");
  const other = currentLanguage() === "en" ? ["한국어", "ko"] : ["English", "en"];
  $("language").textContent = other[0];
  $("language").lang = other[1];
  showTheme();
  renderExamples();
  renderAttached();
  render();
  renderList();
}

/** Mark the field of the JSON schema if it holds no JSON object. */
function showSchema() {
  document.querySelector("[name=json_schema]").setAttribute("aria-invalid", String(parseSchema(settings()) === undefined));
}

const THEMES = { auto: "system", light: "light", dark: "dark" };

function showTheme() {
  const theme = t(THEMES[document.documentElement.dataset.theme] ?? "system");
  $("theme").title = t("theme", { theme });
  $("theme").setAttribute("aria-label", $("theme").title);
}

function nextTheme() {
  const names = Object.keys(THEMES);
  const next = names[(names.indexOf(document.documentElement.dataset.theme) + 1) % names.length];
  document.documentElement.dataset.theme = next;
  store.setValue("theme", next);
  showTheme();
  announce($("theme").title);
}

// --- input ---

async function attach(files) {
  for (const file of files) {
    try {
      attached.push(await readImage(file));
    } catch {
      showToast(t("unreadable", { name: file.name }));
    }
  }
  renderAttached();
  focusPrompt();
}

function send(event) {
  event?.preventDefault();
  const text = $("prompt").value.trim();
  const busy = [...running.values()].some((entry) => entry.conversation === conversation);
  if (busy || !(text || attached.length) || !checkSchema()) return;
  const parts = [...attached, ...(text ? [{ type: "text", text }] : [])];
  attached = [];
  $("prompt").value = "";
  renderAttached();
  resizePrompt();
  sendTurn(parts);
}

function resizePrompt() {
  $("prompt").style.height = "auto";
  $("prompt").style.height = `${$("prompt").scrollHeight}px`;
}

function addListeners() {
  $("composer").addEventListener("submit", send);
  $("stop").addEventListener("click", () => stop());
  $("prompt").addEventListener("input", resizePrompt);
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Escape") stop();
    // While a Korean syllable is being composed, Enter is for the input method.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    if (!isTouchScreen.matches) send(event);
  });
  for (const id of ["pick", "camera"]) {
    $(id).addEventListener("change", () => {
      attach([...$(id).files]);
      $(id).value = "";
    });
  }
  document.addEventListener("paste", (event) => {
    const files = imagesIn(event.clipboardData);
    if (files.length) (event.preventDefault(), attach(files));
  });
  addDropListeners();
  $("new").addEventListener("click", () => switchTo(newConversation()));
  $("menu").addEventListener("click", () => showSidebar(true));
  $("shade").addEventListener("click", () => showSidebar(false));
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") showSidebar(false);
  });
  $("language").addEventListener("click", () => {
    setLanguage(currentLanguage() === "en" ? "ko" : "en");
    store.setValue("language", currentLanguage());
  });
  $("theme").addEventListener("click", nextTheme);
  $("model").addEventListener("change", () => {
    store.setValue("model", $("model").value);
    showModel();
  });
  $("key-button").addEventListener("click", askKey);
  $("settings").addEventListener("input", () => {
    store.setValue("settings", JSON.stringify(settings()));
    showSchema();
  });
  $("reset").addEventListener("click", () => {
    for (const input of inputs) input.value = "";
    store.setValue("settings", null);
    showSchema();
  });
}

function addDropListeners() {
  const hasFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  document.addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    $("drop").hidden = false;
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) $("drop").hidden = true;
  });
  document.addEventListener("drop", (event) => {
    $("drop").hidden = true;
    if (!hasFiles(event)) return;
    event.preventDefault();
    attach(imagesIn(event.dataTransfer));
  });
}

async function start() {
  const known = JSON.parse(store.getValue("settings") ?? "{}");
  for (const input of inputs) input.value = known[input.name] ?? "";
  showSchema();
  followReplies();
  $("key-button").hidden = !key;
  addListeners();
  setLanguage(store.getValue("language") ?? navigator.language);
  await openConversation(store.getValue("open") ?? "");
  await readModels();
}

start();

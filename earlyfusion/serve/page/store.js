// Conversations in IndexedDB: the store "heads" has their titles and sizes, "bodies" their turns with
// the images. Beyond MAX_CONVERSATIONS or MAX_BYTES in all, the oldest are deleted.

const MAX_CONVERSATIONS = 100;
const MAX_BYTES = 200_000_000;
let database; // a promise of the database, or of null if the browser allows no storage

/** Titles, newest first. */
export async function list() {
  const found = (await inTransaction("readonly", (heads) => heads.getAll())) ?? [];
  return found.sort((a, b) => b.updated - a.updated);
}

export async function load(id) {
  return inTransaction("readonly", (_, bodies) => bodies.get(id));
}

export async function save(conversation) {
  const bytes = JSON.stringify(conversation.turns).length;
  const { id, title, updated, turns } = conversation;
  await inTransaction("readwrite", (heads, bodies) => {
    heads.put({ id, title, updated, bytes });
    return bodies.put({ id, title, updated, turns });
  });
  let room = MAX_BYTES;
  for (const [position, head] of (await list()).entries()) {
    room -= head.bytes;
    if (position && (room < 0 || position >= MAX_CONVERSATIONS)) await remove(head.id);
  }
}

export async function remove(id) {
  await inTransaction("readwrite", (heads, bodies) => {
    heads.delete(id);
    return bodies.delete(id);
  });
}

async function inTransaction(mode, act) {
  database ??= open();
  const base = await database;
  if (!base) return undefined;
  return new Promise((resolve, reject) => {
    const transaction = base.transaction(["heads", "bodies"], mode);
    const request = act(transaction.objectStore("heads"), transaction.objectStore("bodies"));
    transaction.oncomplete = () => resolve(request.result);
    transaction.onabort = transaction.onerror = () => reject(transaction.error);
  });
}

function open() {
  return new Promise((resolve) => {
    let request;
    try {
      request = indexedDB.open("earlyfusion", 1);
    } catch {
      resolve(null);
      return;
    }
    request.onupgradeneeded = () => {
      request.result.createObjectStore("heads", { keyPath: "id" });
      request.result.createObjectStore("bodies", { keyPath: "id" });
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => resolve(null);
  });
}

/** Small values: the language, the theme, the settings. Null where the browser allows no storage. */
export function getValue(name, store = localStorage) {
  try {
    return store.getItem(`earlyfusion.${name}`);
  } catch {
    return null;
  }
}

export function setValue(name, value, store = localStorage) {
  try {
    if (value === null) store.removeItem(`earlyfusion.${name}`);
    else store.setItem(`earlyfusion.${name}`, value);
  } catch {
    // No storage: the value is lost when the page is closed.
  }
}

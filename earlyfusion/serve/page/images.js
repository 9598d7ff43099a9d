// The user's images: files to data URLs; photographs are scaled down before they are sent.

const MAX_SIDE = 1024; // models read 512 or less
const MAX_UNCHANGED_BYTES = 1_000_000; // of a file that is sent as it is
const SERVER_TYPES = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp"];

/** The image of a file as {type, url, name}. Throws where the browser cannot read it. */
export async function readImage(file) {
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
  const asIs = scale === 1 && file.size <= MAX_UNCHANGED_BYTES && SERVER_TYPES.includes(file.type);
  const url = asIs ? await dataUrl(file) : scaledDown(bitmap, scale);
  bitmap.close();
  return { type: "image", url, name: file.name };
}

function scaledDown(bitmap, scale) {
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff"; // JPEG has no transparency; the server puts images on white, too
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", 0.92);
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

export const imagesIn = (transfer) =>
  [...(transfer?.files ?? [])].filter((file) => file.type.startsWith("image/"));

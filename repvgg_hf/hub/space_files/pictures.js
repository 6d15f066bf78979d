// Pictures from files, the clipboard and the camera, as RGBA bytes.

const MOST_PIXELS = 16e6; // what a canvas holds on every phone

/** The pixels of anything that a canvas can draw. */
export function readPixels(source, width, height) {
  const shrink = Math.min(1, Math.sqrt(MOST_PIXELS / (width * height)));
  const canvas = document.createElement("canvas");
  canvas.width = Math.round(width * shrink);
  canvas.height = Math.round(height * shrink);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.drawImage(source, 0, 0, canvas.width, canvas.height);
  const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
  return { data, width: canvas.width, height: canvas.height };
}

/** The pixels of a picture's file, turned as its camera was held, and with its colors as they are stored. */
export async function decode(blob, name) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  } catch {
    const kind = blob.type ? `it is ${blob.type}` : "its kind is unknown";
    throw new Error(`${name} is no picture that this browser can read (${kind}): choose a JPEG, PNG or WebP file.`);
  }
  const pixels = readPixels(bitmap, bitmap.width, bitmap.height);
  bitmap.close();
  return pixels;
}

/** The first picture among what was dropped or pasted, or null. */
export function findPicture(transfer) {
  return [...(transfer?.files ?? [])][0] ?? null;
}

/** The camera, shown in a video element; `start` asks for permission. */
export class Camera {
  constructor(video) {
    this.video = video;
    this.stream = null;
  }

  get on() {
    return this.stream !== null;
  }

  async start() {
    if (!navigator.mediaDevices) throw new Error("This browser gives pages no camera: open the page by https.");
    try {
      this.stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    } catch (error) {
      const denied = error.name === "NotAllowedError";
      throw new Error(denied ? "The camera is not allowed: allow it for this page in the browser’s settings."
        : `The camera can't be used (${error.message}): close other programs that use it, or choose a picture.`);
    }
    this.video.srcObject = this.stream;
    await this.video.play();
  }

  /** The pixels of the present frame. */
  frame() {
    return readPixels(this.video, this.video.videoWidth, this.video.videoHeight);
  }

  /** The present frame as a file. */
  take() {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [this.video.videoWidth, this.video.videoHeight];
    canvas.getContext("2d").drawImage(this.video, 0, 0);
    return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  }

  stop() {
    this.stream?.getTracks().forEach((track) => track.stop());
    this.stream = null;
    this.video.srcObject = null;
  }
}

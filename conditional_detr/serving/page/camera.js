// The camera: its stream in a video element, and single frames of it as JPEG files.

const REASONS = {
  NotAllowedError: "The browser does not allow this page to use the camera.",
  NotFoundError: "No camera was found.",
  NotReadableError: "The camera is in use by another program.",
};

/** Show the camera in a video element; the error's message is meant for the user. */
export async function openCamera(video) {
  if (!navigator.mediaDevices) throw new Error("Browsers give the camera only to pages over https or on localhost.");
  try {
    const wanted = { facingMode: "environment", width: { ideal: 1280 } };
    video.srcObject = await navigator.mediaDevices.getUserMedia({ video: wanted, audio: false });
    await video.play();
  } catch (error) {
    closeCamera(video);
    throw new Error(REASONS[error.name] ?? `The camera does not start: ${error.message}`);
  }
}

export function closeCamera(video) {
  video.srcObject?.getTracks().forEach((track) => track.stop());
  video.srcObject = null;
}

/** Answer frames one at a time until the signal; `show` gets each frame, its answer and the frames per second. */
export async function answerFrames(video, signal, { answer, show, fail }) {
  let rate = 0;
  while (!signal.aborted) {
    const started = performance.now();
    try {
      const frame = await takePhoto(video);
      const detections = await answer(frame);
      if (signal.aborted) return;
      const now = 1000 / (performance.now() - started);
      rate = rate ? 0.8 * rate + 0.2 * now : now;
      show(frame, detections, rate);
    } catch (error) {
      if (signal.aborted) return;
      fail(error);
      if (!error.retryAfter) return;
      await new Promise((resolve) => setTimeout(resolve, 1000 * error.retryAfter));
    }
  }
}

/** Return the present frame as a JPEG file. */
export async function takePhoto(video) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
  canvas.getContext("2d").drawImage(video, 0, 0);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.9));
  return new File([blob], "photo.jpg", { type: "image/jpeg" });
}

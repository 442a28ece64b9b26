// A VideoMamba classifier in the browser: frames of a file or the camera to labels, with ONNX Runtime's WebAssembly.
// Frames are sampled, resized and normalised as VideoMambaVideoProcessor does it.
import { framesToPixelValues, sampleIndices, sampleTimes, toScores } from "./preprocessing.js";
import { Stream, canStream } from "./stream.js";

const CAMERA_STEPS = 4; // that a streaming model classifies together: more are surer, fewer follow a change sooner

const element = (id) => document.getElementById(id);
const [fileInput, cameraButton, video] = ["file", "camera", "video"].map(element);
const canvas = document.createElement("canvas");
let classifier, cameraStream = null, turn = 0;

function say(text, isError = false) {
  element("status").textContent = text;
  element("status").className = isError ? "error" : "";
}

async function load() {
  const [config, settings] = await Promise.all(
    ["config.json", "video_preprocessor_config.json"].map(async (name) => (await fetch(name)).json()));
  ort.env.wasm.wasmPaths = new URL("ort/", location.href).href;
  ort.env.wasm.numThreads = 1; // the loop over tokens is serial: more threads make it slower
  const session = await ort.InferenceSession.create("model.onnx");
  if (canStream(session) && config.pooling_window !== 1) throw new Error("export it with --browser.");
  const several = config.problem_type === "multi_label_classification"; // each label has a score of its own
  classifier = { labels: config.id2label, several, settings, session };
  const names = Object.values(config.id2label);
  element("knows").textContent =
    `This model knows ${names.length} labels and ${several ? "scores each for itself" : "answers with one of them, whatever a clip shows"}: ` +
    names.slice(0, 12).join(", ") + (names.length > 12 ? " and so on." : ".");
  fileInput.disabled = cameraButton.disabled = false;
  say("Ready.");
}

// Width and height of a picture as it is stored. Where a file says that its pixels are not square, the browser stretches
// the picture, and the processor does not.
function storedSize(picture) {
  const { videoWidth: width, videoHeight: height } = video;
  if (picture === video) return [width, height];
  const sides = [picture.visibleRect.width, picture.visibleRect.height];
  return sides[0] > sides[1] === width > height ? sides : sides.reverse(); // a phone's film is stored on its side
}

function grab() {
  // Without WebCodecs (old browsers) the picture is as stretched as it is shown.
  const picture = "VideoFrame" in window ? new VideoFrame(video) : video;
  [canvas.width, canvas.height] = storedSize(picture);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(video, 0, 0, canvas.width, canvas.height);
  picture.close?.();
  return context.getImageData(0, 0, canvas.width, canvas.height);
}

// Of a clip; or after these next frames of a stream.
async function logitsOf({ data, shape }, stream) {
  const { session } = classifier;
  if (canStream(session)) return (stream ?? new Stream(session)).take({ data, shape });
  const { logits } = await session.run({ pixel_values: new ort.Tensor("float32", data, shape) });
  return logits.data;
}

async function classify(frames, stream) {
  const { labels, several, settings } = classifier;
  const pixelValues = framesToPixelValues(frames, settings);
  const start = performance.now();
  const scores = toScores(await logitsOf(pixelValues, stream), several);
  const ranked = [...scores.keys()].sort((a, b) => scores[b] - scores[a]).slice(0, 5);
  element("labels").replaceChildren(...ranked.map((i) => {
    const row = document.createElement("tr");
    for (const text of [labels[i], `${(100 * scores[i]).toFixed(1)} %`, ""]) row.insertCell().textContent = text;
    const bar = document.createElement("div");
    bar.className = "bar";
    bar.style.width = `${100 * scores[i]}%`;
    row.cells[2].append(bar);
    return row;
  }));
  return performance.now() - start;
}

const event = (name) => new Promise((resolve, reject) => {
  const heard = new AbortController();
  const listen = (name, answer) => video.addEventListener(name, () => {
    heard.abort();
    answer();
  }, { signal: heard.signal });
  listen(name, resolve);
  listen("error", () => reject(new Error(
    "This browser cannot play the file. Convert it to H.264 in MP4 or VP9 in WebM.")));
});

// The browser does not tell the frame rate: play the beginning, slowly so that no frame is skipped, and look at when
// its frames are shown.
async function frameInterval() {
  const times = [];
  const seen = new Promise((resolve) => {
    const look = (_, { mediaTime }) => {
      times.push(mediaTime);
      times.length < 12 ? video.requestVideoFrameCallback(look) : resolve();
    };
    video.requestVideoFrameCallback(look);
  });
  const ended = event("ended");
  video.playbackRate = 0.25;
  await video.play();
  await Promise.race([seen, ended]);
  video.pause();
  const steps = times.slice(1).map((time, i) => time - times[i]).filter((step) => step > 1e-4).sort((a, b) => a - b);
  if (!steps.length) return 1 / 25;
  const span = times.at(-1) - times[0];
  return span / Math.round(span / steps[0]); // longer steps than the shortest skipped frames; times may be rounded
}

// Shows the picture of a time. "seeked" may come before the picture does.
async function seek(time) {
  const shown = new Promise((resolve) => video.requestVideoFrameCallback(resolve));
  const arrived = event("seeked");
  video.currentTime = time;
  await arrived;
  await Promise.race([shown, new Promise((resolve) => setTimeout(resolve, 500))]); // none comes for the same picture
}

async function timesToSample(settings) {
  if (settings.sampling_fps) return sampleTimes(video.duration, settings);
  const interval = await frameInterval();
  const indices = sampleIndices(Math.max(1, Math.round(video.duration / interval)), settings);
  return indices.map((index) => (index + 0.5) * interval);
}

async function classifyFile(file) {
  const mine = ++turn;
  stopCamera();
  video.hidden = false;
  element("labels").replaceChildren();
  say("Reading …");
  const url = URL.createObjectURL(file);
  try {
    video.srcObject = null;
    video.src = url;
    await event("loadeddata");
    const frames = [];
    for (const wanted of await timesToSample(classifier.settings)) {
      const time = Math.min(wanted, video.duration);
      if (video.currentTime !== time) await seek(time);
      if (mine !== turn) return;
      frames.push(grab());
    }
    const took = await classify(frames);
    say(`${frames.length} frames, ${Math.round(took)} ms`);
  } catch (error) {
    video.hidden = true; // rather than an empty player
    say(error.message, true);
  } finally {
    URL.revokeObjectURL(url);
  }
}

function stopCamera() {
  cameraStream?.getTracks().forEach((track) => track.stop());
  cameraStream = null;
  cameraButton.textContent = "Use the camera";
}

async function toggleCamera() {
  const mine = ++turn;
  if (cameraStream) return stopCamera();
  try {
    cameraStream = await navigator.mediaDevices.getUserMedia({ video: { width: 320 }, audio: false });
  } catch (error) {
    return say(`No camera: ${error.message}`, true);
  }
  video.hidden = false;
  cameraButton.textContent = "Stop";
  video.srcObject = cameraStream;
  await video.play();
  const { num_frames, frame_stride: stride, sampling_fps: fps } = classifier.settings;
  const stream = canStream(classifier.session) ? new Stream(classifier.session, CAMERA_STEPS) : null;
  const count = stream?.tubelet ?? num_frames, kept = stream ? 0 : count / 2;
  const frames = [], interval = 1000 * (fps ? 1 / fps : (stride ?? 1) / 30); // a stride as in a file of 30 a second
  let next = 0;
  while (cameraStream && mine === turn) {
    await new Promise((resolve) => video.requestVideoFrameCallback(resolve));
    const now = performance.now();
    if (now < next - 5) continue;
    next = Math.max(next, now - interval) + interval;
    frames.push(grab());
    if (frames.length < count) continue;
    const took = await classify(frames, stream);
    say(stream ? `${Math.round(took)} ms a step` : `${(1000 / took).toFixed(1)} clips a second`);
    frames.splice(0, count - kept);
  }
}

fileInput.addEventListener("change", () => {
  const [file] = fileInput.files;
  fileInput.value = ""; // so that the same file can be opened again
  if (file) classifyFile(file);
});
cameraButton.addEventListener("click", toggleCamera);
load().catch((error) => say(`The model could not be loaded: ${error.message}`, true));

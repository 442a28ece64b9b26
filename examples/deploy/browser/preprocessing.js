// From frames to `pixel_values`, as VideoMambaVideoProcessor does it on a CPU.

// To the nearest whole number, halves to even, as Python and PyTorch round.
const roundHalfToEven = (x) => (x % 1 === 0.5 ? 2 * Math.round(x / 2) : Math.round(x));

// The times, in seconds, at which frames are taken from a clip of so many seconds: `sampling_fps` a second around the
// middle, or in the middles of equal parts of a clip that is too short. Containers round times to a thousandth.
export function sampleTimes(duration, { num_frames: count, sampling_fps: fps }) {
  const distance = Math.min(1 / fps, duration / count);
  return [...Array(count).keys()].map((i) => duration / 2 + distance * (i - (count - 1) / 2) + 0.001);
}

// Indices of the frames to take: `num_frames` at a distance of `frame_stride` from the middle, or spread over the clip.
export function sampleIndices(total, { num_frames: count, frame_stride: stride, spread_in_segments: segments }) {
  const span = (count - 1) * (stride ?? 0) + 1;
  const steps = [...Array(count).keys()];
  if (stride && span <= total) return steps.map((i) => Math.floor((total - span) / 2) + stride * i);
  const segment = (total - 1) / count;
  if (segments) return steps.map((i) => roundHalfToEven(i * segment) + Math.trunc(segment / 2));
  return steps.map((i) => roundHalfToEven(count > 1 ? (i * (total - 1)) / (count - 1) : 0));
}

// For each output pixel of a bilinear resize: where its inputs begin, and their weights.
export function filterTaps(inputSize, outputSize, antialias = true) {
  const scale = inputSize / outputSize, reach = antialias ? Math.max(scale, 1) : 1;
  return Array.from({ length: outputSize }, (_, i) => {
    const center = (i + 0.5) * scale;
    const first = Math.max(0, Math.floor(center - reach + 0.5));
    const last = Math.min(inputSize, Math.floor(center + reach + 0.5));
    const weights = [];
    for (let x = first; x < last; x++) weights.push(Math.max(0, 1 - Math.abs((x - center + 0.5) / reach)));
    const sum = weights.reduce((a, b) => a + b, 0);
    return { first, weights: weights.map((w) => w / sum) };
  });
}

// One frame (ImageData) to uint8 RGB of `height` × `width`: the shorter edge resized, the centre cropped.
export function resizeAndCrop({ data, width, height }, { size, crop_size: crop, antialias }) {
  const edge = size.shortest_edge, short = Math.min(width, height);
  const newWidth = width === short ? edge : Math.trunc((edge * width) / short);
  const newHeight = height === short ? edge : Math.trunc((edge * height) / short);
  const left = roundHalfToEven((newWidth - crop.width) / 2), top = roundHalfToEven((newHeight - crop.height) / 2);
  const columns = filterTaps(width, newWidth, antialias).slice(left, left + crop.width);
  const rows = filterTaps(height, newHeight, antialias).slice(top, top + crop.height);
  const firstRow = rows[0].first, lastRow = rows.at(-1).first + rows.at(-1).weights.length;
  const across = new Uint8ClampedArray((lastRow - firstRow) * crop.width * 3);
  for (let y = firstRow, out = 0; y < lastRow; y++) {
    for (const { first, weights } of columns) {
      for (let channel = 0; channel < 3; channel++) {
        let sum = 0;
        for (let k = 0, at = (y * width + first) * 4 + channel; k < weights.length; k++, at += 4) sum += weights[k] * data[at];
        across[out++] = sum; // rounds and clamps
      }
    }
  }
  const pixels = new Uint8ClampedArray(crop.height * crop.width * 3);
  const stride = crop.width * 3;
  rows.forEach(({ first, weights }, y) => {
    for (let x = 0; x < stride; x++) {
      let sum = 0;
      for (let k = 0, at = (first - firstRow) * stride + x; k < weights.length; k++, at += stride) sum += weights[k] * across[at];
      pixels[y * stride + x] = sum;
    }
  });
  return pixels;
}

// Frames (ImageData) to { data: Float32Array, shape: [1, T, 3, H, W] }, normalised.
export function framesToPixelValues(frames, settings) {
  const { height, width } = settings.crop_size, area = height * width;
  const data = new Float32Array(frames.length * 3 * area);
  frames.forEach((frame, t) => {
    const pixels = resizeAndCrop(frame, settings);
    for (let channel = 0; channel < 3; channel++) {
      const mean = settings.image_mean[channel], deviation = settings.image_std[channel];
      for (let i = 0; i < area; i++) {
        data[(3 * t + channel) * area + i] = (pixels[3 * i + channel] * settings.rescale_factor - mean) / deviation;
      }
    }
  });
  return { data, shape: [1, frames.length, 3, height, width] };
}

export function toScores(logits, several) {
  if (several) return Array.from(logits, (logit) => 1 / (1 + Math.exp(-logit)));
  const largest = Math.max(...logits), powers = Array.from(logits, (logit) => Math.exp(logit - largest));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((power) => power / sum);
}

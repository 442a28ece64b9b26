"""A classifier over the frames of a shot: windows that slide over them, or the steps of a model that can stream."""

import collections
import itertools
import math
import time

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForVideoClassification, AutoVideoProcessor

from modeling_videomamba import VideoMambaConfig, VideoMambaForVideoFrameClassification
from modeling_videomamba.configuration_videomamba import unstreamable_reason
from modeling_videomamba.video_decoding import DecodedVideoMetadata
from tool_models import THRESHOLD, gives_several, to_scores


CHUNK = 8  # frames that are resized together
TOP_K = 5


class Shot:
    """Slides the window over the frames of one shot, of which it holds one window, resized."""

    def __init__(self, tagger, number):
        self.tagger, self.number = tagger, number
        self.count, self.waiting, self.frames = 0, [], collections.deque(maxlen=tagger.length)

    def add(self, frame):
        self.waiting.append(frame)
        if len(self.waiting) == CHUNK:
            yield from self.resize()

    def resize(self):
        same_size = itertools.groupby(self.waiting, key=lambda frame: frame.picture.shape)
        for _, group in same_size:
            group = list(group)
            pixels = self.tagger.prepare(np.stack([frame.picture for frame in group]))
            for frame, picture in zip(group, pixels, strict=True):
                self.frames.append((frame.time, picture))
                self.count += 1
                if self.count >= self.tagger.length and (self.count - self.tagger.length) % self.tagger.step == 0:
                    yield self.window()
        self.waiting = []

    def end(self):
        """What no window has reached yet: the last frames, or all of a shot that is shorter than a window."""
        yield from self.resize()
        if self.count and (self.count < self.tagger.length or (self.count - self.tagger.length) % self.tagger.step):
            yield self.window()

    def window(self):
        times, pictures = zip(*self.frames, strict=True)
        chosen = torch.stack([pictures[i] for i in self.tagger.sample(len(pictures), times)])
        return (self.number, times[0], times[-1] + 1 / self.tagger.rate), chosen


class Sampler:
    """Chooses, of frames that come in at `rate` a second, `fps` a second: those on screen in the middles of parts."""

    def __init__(self, rate, fps):
        self.rate, self.fps = rate, fps
        self.count, self.start, self.until, self.last = 0, None, None, None

    def add(self, seconds, frame):
        """The frames that are chosen now that one comes in that is shown from `seconds` on."""
        if self.start is None:
            self.start, self.last = seconds, frame
        chosen, self.until = [], seconds + 1 / self.rate
        while (wanted := self.start + (self.count + 0.5) / self.fps) < self.until - 1e-6:
            chosen.append((wanted, frame if wanted >= seconds else self.last))
            self.count += 1
        self.last = frame
        return chosen


class StreamShot:
    """The steps in time of one shot: of each, the sampled frames."""

    def __init__(self, tagger, number):
        self.tagger, self.number = tagger, number
        self.sampler, self.waiting, self.steps = Sampler(tagger.rate, tagger.fps), [], 0
        tagger.begin()

    def add(self, frame):
        for _, chosen in self.sampler.add(frame.time, frame):
            yield from self.take(chosen)

    def take(self, frame, until=math.inf):
        """The next sampled frame: yields where the steps that are classified together begin and end, and the last."""
        self.waiting.append(self.tagger.prepare(frame.picture[None])[0])
        if len(self.waiting) < self.tagger.tubelet:
            return
        tubelet, self.waiting, self.steps = torch.stack(self.waiting), [], self.steps + 1
        seconds, first = self.tagger.tubelet / self.tagger.fps, self.sampler.start
        start = first + max(0, self.steps - self.tagger.pooled) * seconds
        yield (self.number, start, min(first + self.steps * seconds, until)), tubelet

    def end(self):
        """Of what is less than a step the last frame is repeated, so that a short shot has a label too."""
        while self.sampler.last is not None and (self.waiting or not self.steps):
            yield from self.take(self.sampler.last, self.sampler.until)


class Tagger:
    """A classifier, its processor, and the window that slides: `length` and `step` in frames."""

    shot, streams = Shot, False

    def __init__(self, model, device, rate, window=None, step=1.0):
        self.model = self.load(model).to(device).eval()
        self.processor = AutoVideoProcessor.from_pretrained(model)
        self.device, self.several = device, gives_several(self.model.config)
        self.set_window(rate, window, step)

    def load(self, model):
        return AutoModelForVideoClassification.from_pretrained(model)

    def set_window(self, rate, window=None, step=1.0):
        """From frames a second, and window and step in seconds."""
        self.rate = float(rate)
        frames, stride = self.processor.num_frames, self.processor.frame_stride
        # A model that samples from whole clips has no length of its own: the clips of Kinetics have ten seconds.
        own = 10 if stride is None else ((frames - 1) * stride + 1) / self.rate
        if self.processor.sampling_fps:
            own = frames / self.processor.sampling_fps
        window = window or own
        self.length, self.step = max(1, round(window * self.rate)), max(1, round(step * self.rate))

    def settings(self):
        """What the results depend on."""
        return [self.length, self.step, self.sample(self.length)]

    def prepare(self, pictures):
        """(T, H, W, 3) uint8 to (T, C, height, width), normalised, on the model's device."""
        return self.processor(pictures, do_sample_frames=False, device=self.device, return_tensors="pt")[
            "pixel_values"
        ][0]

    def sample(self, count, times=None):
        """The frames of a window that the model sees, by the processor's rule; `times`: when they are shown."""
        window = DecodedVideoMetadata(total_num_frames=count, fps=self.rate)
        if times is not None:
            window.frame_times = np.array([*times, times[-1] + 1 / self.rate]) - times[0]
        return self.processor.sample_frames(window).tolist()

    @torch.inference_mode()
    def classify(self, clips):
        """Scores of the best labels for each clip, a list of (T, C, height, width)."""
        return self.best(self.model(torch.stack(clips)).logits)

    def best(self, logits):
        """The TOP_K labels with their scores, of logits (B, num_labels); of several a clip, also more that hold."""
        names, found = self.model.config.id2label, []
        for row in to_scores(logits, self.model.config):
            count = max(TOP_K, self.several * int((row >= THRESHOLD).sum()))
            best = zip(*(part.tolist() for part in row.topk(min(count, len(row)))), strict=True)
            found.append({names[label]: round(score, 4) for score, label in best})
        return found


class StreamTagger(Tagger):
    """
    A classifier that can stream, and its cache: each frame is computed once. A label is of the last `pooled` steps of
    `tubelet` frames, `fps` of which are sampled in a second; by default of as many as a clip in training has.
    """

    shot, streams = StreamShot, True

    def load(self, model):
        return VideoMambaForVideoFrameClassification.from_pretrained(model)

    def set_window(self, rate, window=None, step=1.0):
        super().set_window(rate, window, step)
        config, processor = self.model.config, self.processor
        self.tubelet = config.tubelet_size
        self.fps = processor.sampling_fps or self.rate / (processor.frame_stride or self.length / processor.num_frames)
        self.pooled = config.pooling_window or config.grid_size[0]
        if window is not None:
            self.pooled = max(1, round(window * self.fps / self.tubelet))
        config.pooling_window = self.pooled
        self.begin()

    def settings(self):
        return [self.tubelet, self.fps, self.pooled]

    def begin(self):
        """Lets a new stream begin."""
        self.cache = None

    @torch.inference_mode()
    def choose_threads(self):
        """
        On a CPU, one thread for single steps, unless several are much faster: they wait for one another many times in
        a step, and on a busy machine that takes longer than the step.
        """
        size, seconds = self.processor.crop_size, {}
        step = torch.zeros(1, self.tubelet, self.model.config.num_channels, size["height"], size["width"])
        for threads in (torch.get_num_threads(), 1):
            torch.set_num_threads(threads)
            times = []
            for _ in range(4):
                started = time.perf_counter()
                self.model(step, interpolate_pos_encoding=True, use_cache=True)
                times.append(time.perf_counter() - started)
            seconds[threads] = min(times)
        threads = max(seconds)
        torch.set_num_threads(threads if 1.5 * seconds[threads] < seconds[1] else 1)

    @torch.inference_mode()
    def classify(self, clips):
        """Scores of the best labels after each of these next steps, a list of (tubelet, C, height, width)."""
        output = self.model(torch.cat(clips)[None], cache=self.cache, use_cache=True)
        self.cache = output.cache
        return self.best(output.logits[0])


def make_tagger(model, *arguments, windows=False):
    """A `StreamTagger` for a model that can stream, a `Tagger` for any other, or if `windows` are asked for."""
    config = AutoConfig.from_pretrained(model)
    streams = not windows and isinstance(config, VideoMambaConfig) and unstreamable_reason(config) is None
    return (StreamTagger if streams else Tagger)(model, *arguments)

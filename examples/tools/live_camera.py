"""Labels a live source, as it comes: a line on the screen after each step."""

import collections
import sys
import threading
import time
from types import SimpleNamespace

import av
import numpy as np

from film_frames import frame_rate, upright
from segments import name_all
from taggers import StreamShot, make_tagger


LIVE_BUFFER = 2  # seconds of frames that wait for a streaming model, before the oldest are dropped


class Live:
    """Reads a live source in a thread of its own and keeps its last frames. What was not wanted in time is dropped."""

    BEHIND = 0.5  # seconds that decoding may lag behind the source before it skips to the next key frame

    def __init__(self, source):
        self.container = av.open(*camera(source)) if source.isdigit() else av.open(source, timeout=10)
        self.stream = self.container.streams.video[0]
        self.rate = float(frame_rate(self.stream))
        self.lock, self.received, self.lag, self.ended, self.error = threading.Lock(), 0, 0.0, False, None

    def start(self, length):
        """Begins to read, and keeps the last `length` frames."""
        self.frames = collections.deque(maxlen=length)
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        before = offset = None
        try:
            for frame in self.container.decode(self.stream):
                now, came = time.monotonic(), 1
                if frame.time is not None:
                    # The clock against the source's time stamps: what it is at best is no lag. A lag that stays while
                    # only key frames are decoded is the source's own, which stood still for a while: it is forgiven.
                    delay = now - frame.time
                    if before is not None:
                        forgiven = 0.5 * (now - before[0]) if self.lag > self.BEHIND else 0
                        offset = min(delay, offset + forgiven)
                        came = max(1, round((frame.time - before[1]) * self.rate))
                    else:
                        offset = delay
                    before, self.lag = (now, frame.time), delay - offset
                is_late = self.lag > self.BEHIND
                self.stream.codec_context.skip_frame = "NONKEY" if is_late else "DEFAULT"
                with self.lock:
                    if is_late:
                        self.frames.clear()
                    self.received += came
                    self.frames.append((now, frame))
        except av.FFmpegError as error:
            self.error = error
        self.ended = True


def camera(number):
    if sys.platform == "darwin":
        return number, "r", "avfoundation"
    if sys.platform == "win32":
        return f"video={number}", "r", "dshow"
    return f"/dev/video{number}", "r", "v4l2"


def slide_live(live, tagger, step):
    """Yields, every `step` seconds, the scores of the last window, when its last frame came, and frames dropped."""
    live.start(tagger.length)
    taken, next_time = 0, time.monotonic()
    while not live.ended:
        next_time = max(next_time + step, time.monotonic())
        time.sleep(max(0, next_time - time.monotonic()))
        with live.lock:
            frames, received = list(live.frames), live.received
        if len(frames) < tagger.length or received == taken:
            continue
        missed = max(0, received - taken - tagger.length) if taken else 0
        taken = received
        chosen = np.stack([upright(frames[i][1]) for i in tagger.sample(len(frames))])
        yield tagger.classify([tagger.prepare(chosen)])[0], frames[-1][0], missed


def stream_live(live, tagger, _):
    """The same as soon as the frames of a step are there. After a gap in the source a stream begins anew."""
    live.start(int(LIVE_BUFFER * live.rate))
    shot, taken, missed, before = None, 0, 0, None
    while not live.ended or live.frames:
        with live.lock:
            frames, received = list(live.frames), live.received
            live.frames.clear()
        missed += max(0, received - taken - len(frames))
        taken = received
        steps, came = [], None
        for arrived, frame in frames:
            seconds = arrived if frame.time is None else frame.time
            if before is None or not 0 <= seconds - before <= live.BEHIND:
                shot, steps = StreamShot(tagger, 0), []
            before = seconds
            for _, chosen in shot.sampler.add(seconds, frame):
                made = list(shot.take(SimpleNamespace(picture=upright(chosen))))
                steps, came = steps + made, arrived if made else came
        if steps:
            yield tagger.classify([tubelet for _, tubelet in steps])[-1], came, missed
            missed = 0
        elif not frames:
            time.sleep(0.005)


def tag_live(args, device):
    """Prints a line every `--step` seconds or after each step: time of day, label, score, latency, frames dropped."""
    # First: a camera does not wait; and its kernels are compiled now.
    tagger = make_tagger(args.model, device, 25, windows=args.windows)
    some = np.zeros((tagger.processor.num_frames, 64, 64, 3), np.uint8)
    tagger.classify([tagger.prepare(some)])
    if tagger.streams and device == "cpu":
        tagger.choose_threads()
    try:
        live = Live(args.live)
    except (OSError, IndexError) as error:
        sys.exit(f"{args.live} cannot be opened as a live source: {error}. Give the number of a camera or an address.")
    tagger.set_window(live.rate, args.window, args.step)
    labels_of = stream_live if tagger.streams else slide_live
    latencies, dropped = [], 0
    try:
        for scores, came, missed in labels_of(live, tagger, args.step):
            dropped += missed
            label, score = name_all(scores) if tagger.several else next(iter(scores.items()))
            latencies.append(time.monotonic() - came + live.lag)
            now = time.strftime("%H:%M:%S")
            print(f"{now}  {label:24} {score:6.1%}  latency {latencies[-1] * 1000:4.0f} ms  {missed} frames dropped")
            sys.stdout.flush()
    except KeyboardInterrupt:
        pass
    if live.error is not None and not isinstance(live.error, av.EOFError):
        print(f"The source ended: {live.error}")
    if latencies:
        print(f"{len(latencies)} lines, median latency {np.median(latencies) * 1000:.0f} ms, {dropped} frames dropped")

#!/usr/bin/env python
"""A page to try VideoMamba: a clip in; labels, the frames that were looked at and two maps of the model out. Or live.

    python examples/tools/space/app.py                                    # the camera-motion tagger of this repository
    python examples/tools/space/app.py you/videomamba-k400 my-classifier    # other checkpoints: repositories, folders

On a Hub Space without arguments the checkpoints are those that its variable CHECKPOINTS names, with commas between,
or the folder `checkpoint` beside this file. Visitors choose among these and name nothing themselves. They cannot name
a file of the server or an address either: clips are uploaded or recorded. Clips and results are deleted after five
minutes.
"""

import argparse
import base64
import contextlib
import html
import io
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", metavar="checkpoint", help="Hub repositories or folders")
    return parser.parse_args()


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    parse_arguments()  # before the imports below, which take seconds

# No word to anyone about visitors; and of the frames, no more at once than two visitors may have on a small machine.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("VIDEO_MAX_FRAME_PIXELS", str(4096 * 2304))
os.environ.setdefault("VIDEO_MAX_CLIP_BYTES", str(2**29))

import av
import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from transformers import AutoModelForVideoClassification, AutoVideoProcessor


try:
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.responses import JSONResponse
except ModuleNotFoundError:
    sys.exit("The page needs Gradio: pip install 'gradio>=6,<7'")
try:
    import modeling_videomamba  # noqa: F401  registers VideoMamba in transformers' Auto classes
    from modeling_videomamba.loading_videomamba import unloadable_reason

    OWN_CODE = False
except ImportError:
    OWN_CODE = True  # the checkpoints bring the code, as Hub repositories do

HERE = Path(__file__).resolve().parent
MAX_MEGABYTES = 50
MAX_SECONDS = 60
VISITORS = 2  # clips that are read at once; others wait in line
WAITING = 20
# Clips and results older than the first are deleted every time the second passes.
KEPT_SECONDS, SWEEP_SECONDS = 300, 30
PLAYED = {".mp4", ".webm", ".mov", ".m4v", ".ogv"}  # by browsers, as far as their codecs are known to them
THRESHOLD = 0.5  # the least score of a label that holds, where several may
PANE = 224  # pixels of each picture in the overlay
LIVE_SECONDS = 60  # a camera is looked at for so long, then again if asked
LIVE_FPS = 8  # frames a second of a camera, if the checkpoint does not say
LIVE_STEPS = 4  # steps that a model that streams classifies together

logger = logging.getLogger(__name__)


class Checkpoint:
    """A classifier and its processor."""

    def __init__(self, name):
        options = {"trust_remote_code": True} if OWN_CODE else {}
        self.model = AutoModelForVideoClassification.from_pretrained(name, **options).eval()
        self.processor = AutoVideoProcessor.from_pretrained(name, **options)
        self.gives_several = self.model.config.problem_type == "multi_label_classification"
        self.lock = threading.Lock()
        # A model that streams computes each frame of a camera once.
        reason = getattr(sys.modules[type(self.model.config).__module__], "unstreamable_reason", lambda _: "unknown")
        self.streams = reason(self.model.config) is None
        self.live = self.model
        if self.streams:
            options["pooling_window"] = self.model.config.pooling_window or LIVE_STEPS
            self.live = AutoModelForVideoClassification.from_pretrained(name, **options).eval()
        # Once before the first visitor: the scan's kernels are compiled at their first call.
        size = self.processor.crop_size
        self.run(torch.zeros(1, self.model.config.num_frames, 3, size["height"], size["width"]))

    def read(self, path):
        """A file to `pixel_values` (1, T, C, H, W) and the metadata of the clip."""

        def sample(metadata):
            if metadata.fps and metadata.total_num_frames > MAX_SECONDS * metadata.fps:
                seconds = metadata.total_num_frames / metadata.fps
                raise ValueError(f"The clip has {seconds:.0f} s, but this page takes at most {MAX_SECONDS} s. Cut it.")
            return self.processor.sample_frames(metadata)

        frames, metadata = self.processor.fetch_videos(path, sample)
        inputs = self.processor(frames.numpy(), do_sample_frames=False, return_tensors="pt")
        return inputs["pixel_values"], metadata

    def run(self, pixel_values):
        """Scores (labels,), the last layer's step sizes and the reading map, both (n_t, n_h, n_w)."""
        with self.lock, torch.no_grad():
            scores = self.to_scores(self.model(pixel_values).logits)[0]
            delta = self.model.delta_maps(pixel_values, layers=[-1]).maps[0].mean(1)[0]
            reading = self.model.reading_maps(pixel_values)[0]
        return scores, delta.numpy(), reading.numpy()

    def to_scores(self, logits):
        """(..., labels): of one label among all, or of each for itself."""
        return logits.sigmoid() if self.gives_several else logits.softmax(-1)

    def pictures(self, pixel_values):
        """What the model saw: (T, H, W, 3) uint8, from normalised `pixel_values` (1, T, C, H, W)."""
        mean = torch.tensor(self.processor.image_mean)[:, None, None]
        std = torch.tensor(self.processor.image_std)[:, None, None]
        pictures = (pixel_values[0] * std + mean).clamp(0, 1) * 255
        return pictures.round().byte().permute(0, 2, 3, 1).numpy()


class Camera:
    """What a visitor's camera has shown to a checkpoint: frames that wait, and a stream's cache."""

    def __init__(self, checkpoint):
        self.checkpoint, self.frames, self.cache = checkpoint, [], None

    def look(self, picture):
        """Scores (labels,) after this next picture (H, W, 3), or None while it is too early for new ones."""
        model, processor = self.checkpoint.live, self.checkpoint.processor
        pixels = processor(picture[None], do_sample_frames=False, return_tensors="pt")["pixel_values"]
        self.frames.append(pixels)
        if len(self.frames) < (model.config.tubelet_size if self.checkpoint.streams else model.config.num_frames):
            return None
        clip, options = torch.cat(self.frames, dim=1), {}
        if self.checkpoint.streams:
            options = {"cache": self.cache, "use_cache": True}
        with self.checkpoint.lock, torch.no_grad():
            output = model(clip, **options)
        self.cache = output.cache if self.checkpoint.streams else None
        self.frames = [] if self.checkpoint.streams else self.frames[len(self.frames) // 2 :]
        return self.checkpoint.to_scores(output.logits)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def enlarge(picture):
    return np.asarray(Image.fromarray(picture).resize((PANE, PANE), Image.Resampling.BICUBIC))


def lay_over(picture, values, colours):
    """A map (n_h, n_w) of values from 0 to 1 in colour over a grey picture (PANE, PANE, 3)."""
    values = Image.fromarray(np.float32(values)).resize((PANE, PANE), Image.Resampling.BILINEAR)
    colour = colormaps[colours](np.asarray(values))[..., :3] * 255
    grey = picture.mean(-1, keepdims=True)
    return np.uint8(0.45 * grey + 0.55 * colour)


def write_overlay(path, pictures, delta, reading, rate):
    """A video: the frames, the same under the Delta map, and under the reading map."""
    # Delta maps from their 2nd to their 98th percentile, reading maps with zero in the middle of the colours.
    low, high = np.percentile(delta, [2, 98])
    delta = np.clip((delta - low) / max(high - low, 1e-9), 0, 1)
    reading = np.clip(0.5 + 0.5 * reading / max(np.percentile(np.abs(reading), 99), 1e-9), 0, 1)
    tubelet = len(pictures) // len(delta)
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "20", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = 3 * PANE, PANE, "yuv420p"
        for time_step, picture in enumerate(map(enlarge, pictures)):
            step = min(time_step // tubelet, len(delta) - 1)
            panes = [picture, lay_over(picture, delta[step], "inferno"), lay_over(picture, reading[step], "coolwarm")]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.concatenate(panes, 1), format="rgb24")))
        container.mux(stream.encode())


def draw_frames(pictures, indices):
    """All frames the model looked at, in rows of eight, with their numbers: HTML that needs no file."""
    cells = []
    for picture, index in zip(pictures, indices, strict=True):
        data = io.BytesIO()
        Image.fromarray(picture).resize((112, 112)).save(data, "JPEG", quality=85)
        source = base64.b64encode(data.getvalue()).decode()
        image = f'<img src="data:image/jpeg;base64,{source}" alt="">'
        cells.append(f"<figure>{image}<figcaption>{index}</figcaption></figure>")
    return f'<p>The frames it looked at, by number:</p><div class="frames">{"".join(cells)}</div>'


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------


def knowledge(checkpoint):
    """What a checkpoint can answer, in a sentence."""
    names = list(checkpoint.model.config.id2label.values())
    shown = ", ".join(names[:12]) + (" and so on" if len(names) > 12 else "")
    if checkpoint.gives_several:
        return f"It knows {len(names)} labels, of which any number may hold, each with a score of its own: *{shown}*."
    return f"It knows {len(names)} labels, and answers with one of them whatever the clip shows: *{shown}*."


def message(text):
    return gr.update(value=f'<div class="message">{html.escape(text)}</div>', visible=True)


def classify(path, checkpoint, folder):
    """The outputs of the page for an uploaded file: message, scores, summary, frames, overlay."""
    if path is None:
        return gr.update(visible=False), None, "", "", None
    if checkpoint is None:
        return message("There is no such checkpoint. Choose one of the list."), None, "", "", None
    try:
        start = time.perf_counter()
        pixel_values, metadata = checkpoint.read(path)
        read = time.perf_counter()
        scores, delta, reading = checkpoint.run(pixel_values)
        done = time.perf_counter()
        labels = checkpoint.model.config.id2label
        pictures = checkpoint.pictures(pixel_values)
        overlay = Path(tempfile.mkdtemp(dir=folder)) / "overlay.mp4"
        indices = metadata.frames_indices
        stride = max(1, round(float(np.diff(indices).mean()))) if len(indices) > 1 else 1
        write_overlay(overlay, pictures, delta, reading, min(12, max(2, round((metadata.fps or 24) / stride))))
    except (OSError, ValueError) as error:
        # The library names the file; what it is called on the server is nobody's business.
        return message(str(error).replace(str(path), Path(path).name)), None, "", "", None
    except Exception:
        logger.exception("a clip could not be classified")
        return message("This clip cannot be classified; the server's log says why."), None, "", "", None
    read_frames = f"{len(set(indices.tolist()))} of {metadata.total_num_frames} frames"
    summary = (
        f"**{done - start:.2f} s**: {read - start:.2f} s to read {read_frames}, {done - read:.2f} s for scores and "
        f"maps. For *{labels[int(scores.argmax())]}*:"
    )
    if checkpoint.gives_several:
        holding = [labels[i] for i in scores.argsort(descending=True).tolist() if scores[i] >= THRESHOLD]
        summary = f"From {THRESHOLD:.0%} on: **{', '.join(holding) or 'no label'}**.\n\n{summary}"
    if Path(path).suffix.lower() not in PLAYED:
        summary = (
            f"Browsers do not play {Path(path).suffix} files: the player stays empty, the scores hold.\n\n{summary}"
        )
    confidences = {labels[i]: float(score) for i, score in enumerate(scores)}
    return gr.update(visible=False), confidences, summary, draw_frames(pictures, indices), overlay


def watch(picture, camera, checkpoint):
    """The scores after the next picture of a camera, and the `Camera` that has seen it."""
    if picture is None or checkpoint is None:
        return gr.skip(), None
    if camera is None or camera.checkpoint is not checkpoint:
        camera = Camera(checkpoint)
    scores = camera.look(picture)
    if scores is None:
        return gr.skip(), camera
    labels = checkpoint.model.config.id2label
    return {labels[i]: float(score) for i, score in enumerate(scores)}, camera


class NoAddresses:
    """Refuses requests that name an address as a file: Gradio would download it."""

    LIMIT = 2**20  # bytes of a request that uploads nothing

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        is_upload = scope["type"] != "http" or scope["path"].rstrip("/").endswith("/gradio_api/upload")
        if is_upload or scope["method"] not in ("POST", "PUT"):
            await self.app(scope, receive, send)
            return
        body, more = b"", True
        while more and len(body) <= self.LIMIT:
            event = await receive()
            body, more = body + event.get("body", b""), event.get("more_body", False)
        content = None
        with contextlib.suppress(ValueError):
            content = json.loads(body)
        if len(body) > self.LIMIT or names_address(content):
            refusal = JSONResponse({"detail": "Upload a file: this page opens no addresses."}, status_code=400)
            await refusal(scope, receive, send)
            return
        pending = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay():
            return pending.pop() if pending else await receive()

        await self.app(scope, replay, send)


def names_address(content) -> bool:
    """Whether some `path` in parsed JSON is an address."""
    if isinstance(content, dict):
        path = content.get("path")
        return (isinstance(path, str) and "://" in path) or any(names_address(value) for value in content.values())
    return isinstance(content, list) and any(names_address(value) for value in content)


def remove_empty_folders(folder):
    """Gradio deletes old files but leaves their folders."""
    while True:
        time.sleep(SWEEP_SECONDS)
        for path in Path(folder).glob("*"):
            with contextlib.suppress(OSError):  # in use: not empty
                if time.time() - path.stat().st_mtime > SWEEP_SECONDS:
                    path.rmdir()


CSS = """
.frames {display: grid; grid-template-columns: repeat(auto-fill, minmax(56px, 1fr)); gap: 4px}
.frames figure {margin: 0} .frames img {width: 100%} .frames figcaption {font-size: 11px; text-align: center}
@media (max-width: 640px) {#clip {height: 220px !important} #introduction h1 {margin: 0}}
.message {padding: 12px; border-left: 4px solid #dc2626; background: #fef2f2; color: #7f1d1d; overflow-wrap: anywhere}
"""

# Where the page is one column, as on a phone, the answer is brought into view.
SHOW_SCORES = """() => {
    const scores = document.querySelector("#scores");
    if (innerWidth < 640 && scores) scores.scrollIntoView({block: "center", behavior: "smooth"});
}"""

INTRODUCTION = f"""
# VideoMamba
Drop a clip, record one, or take an example: the model says what happens in it. At most {MAX_SECONDS} s and
{MAX_MEGABYTES} MB; deleted after {KEPT_SECONDS // 60} minutes.
"""

MAPS = """
Left, what the model saw. Middle, the **Delta map** of the last layer: where it is bright, the model took up what it
saw there. Right, the **reading map**: red spoke for the label, blue against it.
"""


def build_live(checkpoints):
    """The page's part for a camera: labels while it runs, after every step of a model that streams."""
    with gr.Row():
        # As the camera sees it: a mirror would swap left and right.
        options = gr.WebcamOptions(mirror=False)
        camera = gr.Image(
            label="Camera", sources=["webcam"], streaming=True, webcam_options=options, height=400, elem_id="live"
        )
        with gr.Column():
            choice = gr.Dropdown(list(checkpoints), value=next(iter(checkpoints)), label="Checkpoint")
            scores = gr.Label(label="Scores", num_top_classes=5, elem_id="live-scores")
    seen = gr.State()
    first = next(iter(checkpoints.values()))
    camera.stream(
        lambda picture, seen, name: watch(picture, seen, checkpoints.get(name)),
        [camera, seen, choice],
        [scores, seen],
        stream_every=1 / (getattr(first, "processor", None) and first.processor.sampling_fps or LIVE_FPS),
        time_limit=LIVE_SECONDS,
        concurrency_limit=VISITORS,
        show_progress="hidden",
        api_visibility="private",
    )


def build_page(checkpoints):
    """The page, a `gr.Blocks`, for a dictionary of `Checkpoint`s by name."""
    with gr.Blocks(title="VideoMamba", delete_cache=(SWEEP_SECONDS, KEPT_SECONDS)) as page:
        gr.Markdown(INTRODUCTION, elem_id="introduction")
        with gr.Tab("Clip"):
            build_clip(checkpoints)
        with gr.Tab("Live"):
            build_live(checkpoints)
    return page.queue(max_size=WAITING)


def build_clip(checkpoints):
    """The page's part for a file."""
    with gr.Row():
        with gr.Column():
            # Without the microphone. Gradio would then take the sound out of every clip with the program ffmpeg,
            # which PyAV does not need: the event below hands over files as they came.
            sources = ["upload", "webcam"]
            clip = gr.Video(label="Clip", sources=sources, include_audio=False, height=400, elem_id="clip")
            several = len(checkpoints) > 1
            first = next(iter(checkpoints))
            choice = gr.Dropdown(list(checkpoints), value=first, label="Checkpoint", visible=several)
            known = gr.Markdown(knowledge(checkpoints[first]), elem_id="known")
            examples = sorted(str(path) for path in (HERE / "examples").glob("*.mp4"))
            if examples:
                gr.Examples([[path] for path in examples], clip, cache_examples=False, label="Examples")
        with gr.Column():
            problem = gr.HTML(elem_id="problem", visible=False)
            scores = gr.Label(label="Scores", num_top_classes=5, elem_id="scores")
            summary = gr.Markdown(elem_id="summary")
            overlay = gr.Video(label="Maps", interactive=False, loop=True, autoplay=True, elem_id="overlay")
            gr.Markdown(MAPS)
            frames = gr.HTML(elem_id="frames")

    def answer(file, name):
        return classify(file and file["path"], checkpoints.get(name), overlay.GRADIO_CACHE)

    choice.change(lambda name: knowledge(checkpoints[name]), choice, known, api_visibility="private")
    answered = gr.on(
        [clip.change, choice.change],
        answer,
        [clip, choice],
        [problem, scores, summary, frames, overlay],
        preprocess=False,
        concurrency_limit=VISITORS,
        trigger_mode="always_last",
        api_visibility="private",
    )
    answered.then(None, js=SHOW_SCORES)


def launch(checkpoints, **options):
    """Serves the page; returns what `gr.Blocks.launch` does. Uploads go to a folder that is removed at the end."""
    page = build_page(checkpoints)
    cache = Path(page.GRADIO_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    threading.Thread(target=remove_empty_folders, args=[cache], daemon=True).start()
    return page.launch(
        max_file_size=f"{MAX_MEGABYTES}mb",
        show_error=False,
        ssr_mode=False,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        css=CSS,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        app_kwargs={"middleware": [Middleware(NoAddresses)]},
        **options,
    )


def main():
    listed = os.environ.get("CHECKPOINTS", "").split(",")
    named = parse_arguments().checkpoints or [name.strip() for name in listed if name.strip()]
    if not named:
        folders = [HERE / "checkpoint", HERE.parents[2] / "model_cards" / "videomamba-tiny-camera-motion"]
        named = [str(folder) for folder in folders if folder.is_dir()][:1]
    if not named:
        sys.exit("Name a checkpoint: a Hub repository or a folder.")
    for reason in filter(None, [] if OWN_CODE else map(unloadable_reason, named)):
        sys.exit(reason)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # as Ctrl-C does: the folder below is removed
    with tempfile.TemporaryDirectory(prefix="videomamba-page-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        launch({Path(name).name: Checkpoint(name) for name in named})


if __name__ == "__main__":
    main()

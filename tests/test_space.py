"""examples/tools/space: the page in a real browser, what visitors may name, what stays on disk."""

import importlib.util
import json
import shutil
import socket
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from browser import open_browser, wait_for
from make_camera_motion_clips import write_demo_clip
from modeling_videomamba import VideoMambaForVideoFrameClassification, VideoMambaVideoProcessor
from modeling_videomamba.video_decoding import decode_video
from video_files import STORED, STORED_SAMPLES, read_numbers, write_video


pytest.importorskip("gradio", reason="needs Gradio: pip install gradio")
httpx = pytest.importorskip("httpx", reason="Gradio brings httpx")
SPACE = Path(__file__).resolve().parent.parent / "examples" / "tools" / "space"
CAMERA_MOTION = SPACE.parents[2] / "model_cards" / "videomamba-tiny-camera-motion"
CAMERA_STREAM = CAMERA_MOTION.with_name("videomamba-tiny-camera-stream")
EXAMPLE = SPACE / "examples" / "zoom-out.mp4"


@pytest.fixture(scope="module")
def app():
    spec = importlib.util.spec_from_file_location("space_app", SPACE / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def uploads(tmp_path_factory):
    return tmp_path_factory.mktemp("uploads")


@pytest.fixture(scope="module")
def url(app, uploads):
    """The page with the shipped checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(uploads))
        checkpoints = {"camera motion": app.Checkpoint(str(CAMERA_MOTION))}
        server, address, _ = app.launch(checkpoints, prevent_thread_lock=True, quiet=True, server_port=free_port())
        yield address
        server.get_blocks().close()


@pytest.fixture(scope="module")
def browser():
    with open_browser() as page:
        yield page


def find(browser, selector):
    return browser.find_elements("css selector", selector)


def text(browser, selector):
    return " ".join(element.text for element in find(browser, selector))


def upload(browser, url, path):
    """Opens the page anew, uploads a file and waits for the answer or for a message."""
    browser.get(url)
    wait_for(lambda: find(browser, "#clip input[type=file]"))[0].send_keys(str(path))
    wait_for(lambda: "scores and maps" in text(browser, "#summary") or find(browser, "#problem .message"))


def test_the_page_sees_one_clip_stored_in_many_ways_the_same(app, stored):
    checkpoint = app.Checkpoint(str(CAMERA_MOTION))
    checkpoint.processor = VideoMambaVideoProcessor(
        num_frames=8, sampling_fps=5, size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}
    )
    for name in STORED:
        pixel_values, _ = checkpoint.read(str(stored / name))
        assert read_numbers(checkpoint.pictures(pixel_values)) == STORED_SAMPLES


def test_upload_and_phone(browser, url, tmp_path, app):
    upload(browser, url, EXAMPLE)
    assert "zoom out" in text(browser, "#scores")
    assert "16 of 48 frames" in text(browser, "#summary")
    assert not find(browser, "#problem .message")
    assert "9 labels" in text(browser, "#known") and "roll counter-clockwise" in text(browser, "#known")
    assert [figure.text for figure in find(browser, "#frames figcaption")] == [str(i) for i in range(1, 48, 3)]
    # The video plays in the page, and holds the frames, the Delta map and the reading map side by side.
    video = wait_for(lambda: find(browser, "#overlay video"))[0]
    wait_for(lambda: browser.execute_script("return arguments[0].readyState >= 2", video))
    assert browser.execute_script("return [arguments[0].videoWidth, arguments[0].videoHeight]", video) == [672, 224]
    (tmp_path / "overlay.mp4").write_bytes(httpx.get(video.get_attribute("src")).content)
    overlay, _ = decode_video(str(tmp_path / "overlay.mp4"))
    assert overlay.shape == (16, 224, 672, 3)
    seen, _ = decode_video(str(EXAMPLE), lambda metadata: np.arange(1, 48, 3))
    seen = seen[:, :, 40:280]  # the middle square, of which the model gets 112 x 112 pixels
    shown = overlay[:, :, :224]
    for got, expected in zip(shown, seen, strict=True):
        expected = app.Image.fromarray(expected).resize((224, 224))
        assert np.abs(got.astype(float) - np.asarray(expected)).mean() < 12

    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True},
    )
    try:
        width = "return [document.scrollingElement.scrollWidth, document.querySelector('#scores').offsetWidth]"
        wait_for(lambda: browser.execute_script(width)[1] < 390)
        assert browser.execute_script(width)[0] <= 390
        upload(browser, url, write_video(tmp_path / "clip.avi", 40, codec="mpeg4"))
        assert "do not play .avi files" in text(browser, "#summary")
        in_view = """const {top, bottom} = document.querySelector('#scores').getBoundingClientRect();
            return top >= 0 && bottom <= innerHeight"""
        wait_for(lambda: browser.execute_script(in_view))
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_model_of_several_labels_shows_all_that_hold(app, tmp_path):
    """The shipped one, as if it had been trained so: scores of a sigmoid, on both tabs."""
    folder = shutil.copytree(CAMERA_MOTION, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"problem_type": "multi_label_classification"}
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = app.Checkpoint(str(folder))
    clip = str(EXAMPLE.with_name("pan-right.mp4"))
    with torch.no_grad():
        logits = checkpoint.model(checkpoint.read(clip)[0]).logits[0]
    scores = dict(zip(checkpoint.model.config.id2label.values(), logits.sigmoid().tolist(), strict=True))
    holding = [label for label in sorted(scores, key=scores.get, reverse=True) if scores[label] >= 0.5]
    _, confidences, summary, *_ = app.classify(clip, checkpoint, tmp_path)
    assert confidences == pytest.approx(scores, abs=1e-4) and len(holding) > 1
    assert summary.startswith(f"From 50% on: **{', '.join(holding)}**")
    assert "any number may hold" in app.knowledge(checkpoint)
    camera = app.Camera(checkpoint)
    answers = [camera.look(picture) for picture in np.zeros((16, 60, 80, 3), np.uint8)]
    assert float(answers[-1].sum()) != pytest.approx(1, abs=1e-2)


def test_a_bad_upload_gets_the_librarys_message(browser, url, tmp_path):
    (tmp_path / "notes.mp4").write_text("these are notes, not a film, and there are quite a few of them")
    upload(browser, url, tmp_path / "notes.mp4")
    problem = text(browser, "#problem")
    assert "notes.mp4 cannot be read as a video" in problem and "begins with the text" in problem
    assert "Traceback" not in browser.page_source and "/" not in problem.replace("./", "")


@pytest.mark.slow
def test_webcam(browser, url):
    browser.get(url)
    wait_for(lambda: find(browser, "#clip [aria-label='Capture from camera']"))[0].click()

    def press(name):
        buttons = wait_for(lambda: [b for b in find(browser, "#clip button") if name in b.text])
        buttons[0].click()

    press("Access Webcam")
    wait_for(lambda: browser.execute_script("return document.querySelector('#clip video')?.currentTime > 0.5"))
    press("Record")
    time.sleep(3)
    press("Stop")
    wait_for(lambda: "scores and maps" in text(browser, "#summary"))


@pytest.fixture(scope="module")
def streaming(app):
    return app.Checkpoint(str(CAMERA_STREAM))


def test_a_camera_is_looked_at_step_by_step(app, streaming):
    """Labels after every second frame, those of the last four steps; and of windows, where the model cannot stream."""
    pictures = np.random.default_rng(0).integers(0, 256, (12, 60, 80, 3), dtype=np.uint8)
    camera, found = None, []
    for picture in pictures:
        scores, camera = app.watch(picture, camera, streaming)
        found.append(scores if "__type__" not in scores else None)
    assert [index for index, scores in enumerate(found) if scores] == [1, 3, 5, 7, 9, 11]
    pixels = streaming.processor(list(pictures), do_sample_frames=False, return_tensors="pt")["pixel_values"]
    model = VideoMambaForVideoFrameClassification.from_pretrained(CAMERA_STREAM, pooling_window=4)
    with torch.no_grad():
        expected = model(pixels, interpolate_pos_encoding=True).logits[0].softmax(-1)
    for step, scores in enumerate(found[1::2]):
        assert list(scores.values()) == pytest.approx(expected[step].tolist(), abs=1e-4)

    windows = app.Checkpoint(str(CAMERA_MOTION))
    answers, camera = [], None
    for picture in np.repeat(pictures, 2, axis=0):
        scores, camera = app.watch(picture, camera, windows)
        answers.append("__type__" not in scores)
    assert [index for index, answered in enumerate(answers) if answered] == [15, 23]


@pytest.mark.slow
def test_live(app, streaming, tmp_path, monkeypatch):
    """Chromium's camera turns to the right."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    clip, camera = tmp_path / "pan-right.mp4", tmp_path / "camera.mjpeg"
    write_demo_clip(str(clip), motion="pan right")
    write_video(camera, list(decode_video(str(clip))[0]), codec="mjpeg", pix_fmt="yuvj420p", rate=24)
    server, address, _ = app.launch(
        {"stream": streaming}, prevent_thread_lock=True, quiet=True, server_port=free_port()
    )
    try:
        with open_browser(camera=camera) as browser:

            def press(name):
                wait_for(lambda: [b for b in find(browser, "button") if name in b.text and b.is_displayed()])[
                    0
                ].click()

            browser.get(address)
            press("Live")
            press("Access Webcam")
            press("Record")
            wait_for(lambda: text(browser, "#live-scores").split("\n")[1:2] == ["pan right"], 30)
    finally:
        server.get_blocks().close()


# ---------------------------------------------------------------------------------------------------------------------
# Without a browser: what the server takes
# ---------------------------------------------------------------------------------------------------------------------


def send(url, path):
    """Uploads as the page does; returns the answer of the server."""
    with open(path, "rb") as file:
        return httpx.post(f"{url}gradio_api/upload", files={"files": (Path(path).name, file)}, timeout=60)


def ask(url, path):
    """Sends what a visitor's browser sends; returns the outputs of the page, or the refusal."""
    session = uuid.uuid4().hex
    functions = httpx.get(f"{url}config").json()["dependencies"]
    index = next(function["id"] for function in functions if function["api_name"] == "answer")
    file = {"path": path, "meta": {"_type": "gradio.FileData"}, "url": f"{url}gradio_api/file={path}"}
    body = {"data": [file, "camera motion"], "fn_index": index, "session_hash": session}
    joined = httpx.post(f"{url}gradio_api/queue/join", json=body)
    if joined.status_code != 200:
        return joined.json()
    with httpx.stream("GET", f"{url}gradio_api/queue/data?session_hash={session}", timeout=60) as events:
        for line in events.iter_lines():
            event = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
            if event.get("msg") == "process_completed":
                return event["output"]


def message(output):
    return output["data"][0].get("value", "")


def test_two_visitors_at_once(url):
    path = send(url, EXAMPLE).json()[0]
    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(lambda _: ask(url, path), range(2)))
    for output in outputs:
        assert output["data"][1]["label"] == "zoom out"


@pytest.mark.parametrize("path", ["/etc/passwd", "../../../../etc/passwd", str(SPACE / "app.py"), str(EXAMPLE)])
def test_no_visitor_names_a_file_of_the_server(url, path):
    assert "data" not in ask(url, path)
    assert httpx.get(f"{url}gradio_api/file={path}").status_code in (403, 404)


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:{}/clip.mp4", "HTTPS://example.org/clip.mp4", "file:///etc/passwd"]
)
def test_no_visitor_names_an_address(url, address):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(0.5)
        assert "opens no addresses" in ask(url, address.format(listener.getsockname()[1]))["detail"]
        with pytest.raises(TimeoutError):
            listener.accept()
    nested = {"data": [[{"value": {"path": "http://example.org/"}}]]}
    for place in ("queue/join", "run/answer", "call/answer", "api/answer"):
        assert httpx.post(f"{url}gradio_api/{place}", json=nested).status_code == 400


def test_length_size_and_pixels_are_limited(url, tmp_path, monkeypatch, app):
    still = np.zeros((64, 64, 3), np.uint8)
    long = send(url, write_video(tmp_path / "long.mp4", [still] * 130, rate=2)).json()[0]
    assert "The clip has 65 s, but this page takes at most 60 s. Cut it." in message(ask(url, long))
    (tmp_path / "large.mp4").write_bytes(bytes(51 * 2**20))
    assert send(url, tmp_path / "large.mp4").status_code == 413
    huge = app.NoAddresses.LIMIT * " "
    assert httpx.post(f"{url}gradio_api/queue/join", content=huge + "{}").status_code == 400


def test_what_cannot_be_foreseen_is_no_stack_trace(url, app, monkeypatch, caplog):
    monkeypatch.setattr(app, "write_overlay", lambda *arguments: 1 / 0)
    output = ask(url, send(url, EXAMPLE).json()[0])
    assert "the server&#x27;s log says why" in message(output) and "Error" not in json.dumps(output)
    assert "ZeroDivisionError" in caplog.text


def test_uploads_are_deleted(app, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr(app, "KEPT_SECONDS", 1)
    monkeypatch.setattr(app, "SWEEP_SECONDS", 1)
    monkeypatch.setattr(app, "HERE", tmp_path)  # no examples, which stay

    class Checkpoint:
        model = SimpleNamespace(config=SimpleNamespace(id2label={0: "nothing"}))

        def read(self, path):
            raise ValueError("this one reads nothing")

    checkpoints = {"camera motion": Checkpoint()}
    server, address, _ = app.launch(checkpoints, prevent_thread_lock=True, quiet=True, server_port=free_port())
    try:
        assert Path(send(address, EXAMPLE).json()[0]).exists()
        assert "this one reads nothing" in message(ask(address, send(address, EXAMPLE).json()[0]))
        wait_for(lambda: not list(tmp_path.iterdir()), 30)
    finally:
        server.get_blocks().close()


def test_without_the_package_the_checkpoint_brings_its_code(monkeypatch):
    monkeypatch.setitem(sys.modules, "modeling_videomamba", None)
    spec = importlib.util.spec_from_file_location("space_app_alone", SPACE / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.OWN_CODE

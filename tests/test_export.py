"""Exported models against the model itself: the backend of plain operators, ONNX, the scripts and the browser page."""

import json
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.torch_version import TorchVersion
from transformers import AutoVideoProcessor, pipeline

from browser import open_browser, wait_for
from make_camera_motion_clips import write_demo_clip
from modeling_videomamba import (
    VideoMambaConfig,
    VideoMambaForVideoClassification,
    VideoMambaForVideoFrameClassification,
    VideoMambaVideoProcessor,
    use_scan_backend,
)
from modeling_videomamba.selective_scan import bidirectional_selective_scan
from modeling_videomamba.selective_scan_export import softplus
from modeling_videomamba.selective_scan_reference import bidirectional_selective_scan_reference
from modeling_videomamba.tokens_videomamba import backward_order
from modeling_videomamba.video_decoding import decode_video
from video_files import STORED, STORED_SAMPLES, read_numbers, stored_picture, write_video


REPOSITORY = Path(__file__).resolve().parent.parent
EXAMPLES = REPOSITORY / "examples" / "deploy"
CAMERA_MOTION = REPOSITORY / "model_cards" / "videomamba-tiny-camera-motion"
CAMERA_STREAM = REPOSITORY / "model_cards" / "videomamba-tiny-camera-stream"

needs_pytorch_2_11 = pytest.mark.skipif(
    torch.__version__ < (2, 11),
    reason="torch.export and torch.onnx of PyTorch 2.7 and 2.9 fail on the loop over tokens",
)


def small_model(**options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "num_frames": 4, "image_size": 32}
    config = VideoMambaConfig(**{**sizes, "num_labels": 5, **options})
    model = VideoMambaForVideoClassification(config).eval()
    for name, parameter in model.named_parameters():
        if "position_embeddings" in name or "classifier" in name:
            nn.init.normal_(parameter, std=0.5)  # so that every position and label shows in the logits
    return model


def save_small_checkpoint(folder):
    model = small_model()
    model.config.id2label = dict(enumerate(["run", "jump", "fall", "sit", "wave"]))
    processor = VideoMambaVideoProcessor(
        num_frames=4, frame_stride=3, size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}
    )
    for part in (model, processor):
        part.save_pretrained(folder)


@pytest.mark.parametrize("reversed_tokens", [False, True])
def test_backend_matches_the_float64_reference(reversed_tokens):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 11, 12), (2, 6, 4), (2, 6), (2, 2 + 10, 6), (2, 6, 2), (2, 6), (2, 6, 5), (2, 6)]
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    order = None
    if reversed_tokens:
        model = small_model(backward_scan="temporal", class_token_position="middle")
        order = backward_order(model.config, model.config.grid_size)
        inputs[0] = torch.randn(2, len(order.visits), 12, generator=generator)
    expected = bidirectional_selective_scan_reference(*inputs, order=order, dtype=torch.float64)
    found = bidirectional_selective_scan(*inputs, order=order, backend="export")
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-4)


def test_softplus_keeps_small_steps_and_does_not_overflow():
    x = torch.cat([torch.linspace(-80, 120, 200001), torch.tensor([0.0, -1e-6, -1e4, 1e4])])
    np.testing.assert_allclose(softplus(x), np.logaddexp(0, x.double().numpy()), rtol=1e-6)


@needs_pytorch_2_11
def test_torch_export_holds_no_custom_operator(tmp_path):
    model, clips = small_model(), torch.randn(2, 4, 3, 32, 32)
    exported = torch.export.export(model, (clips,), dynamic_shapes=[{0: torch.export.Dim("batch")}])
    targets = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert "scan" in targets and not [target for target in targets if target.startswith("videomamba")]
    torch.export.save(exported, tmp_path / "model.pt2")
    clips, loaded = torch.randn(3, 4, 3, 32, 32), torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(loaded(clips).logits, model(clips).logits, atol=1e-5, rtol=1e-4)


@needs_pytorch_2_11
@pytest.mark.parametrize(
    ("any_length", "options"),
    [
        pytest.param(False, {"class_token_position": "none"}, marks=pytest.mark.slow),
        (True, {"backward_scan": "temporal", "class_token_position": "middle", "num_hidden_layers": 1}),
        pytest.param(True, {"class_token_position": "middle", "merge_layers": [1]}, marks=pytest.mark.slow),
    ],
)
def test_onnx_file_gives_the_logits_of_the_model(tmp_path, any_length, options):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs ONNX Runtime")
    pytest.importorskip("onnxscript", reason="needs onnxscript, which torch.onnx exports with")
    from export_onnx import export_onnx

    model = small_model(**options)
    path = tmp_path / "model.onnx"
    export_onnx(model, path, any_length)
    session = onnxruntime.InferenceSession(path)
    for batch, frames in ((1, 4), (3, 4), (2, 8)) if any_length else ((1, 4), (3, 4)):
        clips = torch.randn(batch, frames, 3, 32, 32)
        (logits,) = session.run(["logits"], {"pixel_values": clips.numpy()})
        with torch.no_grad():
            expected = model(clips, interpolate_pos_encoding=any_length).logits
        assert expected.std() > 0.1  # else a constant would do
        np.testing.assert_allclose(logits, expected.numpy(), atol=1e-4)


STREAMS = {"backward_scan": "spatial", "class_token_position": "none", "position_embedding_type": "spatial"}


@needs_pytorch_2_11
@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 2])
def test_steps_in_onnx_are_those_of_the_model(tmp_path, window):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs ONNX Runtime")
    pytest.importorskip("onnxscript", reason="needs onnxscript, which torch.onnx exports with")
    from export_onnx import export_step, run_stream

    model = small_model(pooling_window=window, **STREAMS)
    export_step(model, tmp_path / "step.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "step.onnx")
    for batch, steps in ((1, 1), (3, 5)):
        clips = torch.randn(batch, 2 * steps, 3, 32, 32)
        with torch.no_grad():
            expected = model(clips, interpolate_pos_encoding=True).logits
        np.testing.assert_allclose(run_stream(session, clips.numpy(), 2), expected.numpy(), atol=1e-4)


@needs_pytorch_2_11
@pytest.mark.slow
def test_exporter_of_transformers(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs ONNX Runtime")
    exporters = pytest.importorskip("transformers.exporters.exporter_onnx", reason="needs transformers' exporters")
    model, clips = small_model(), torch.randn(2, 4, 3, 32, 32)
    with torch.no_grad():  # with gradients, torch.onnx (2.14) fails at a loop over an axis of any size
        exported = exporters.OnnxExporter().export(
            model,
            {"pixel_values": clips},
            config=exporters.OnnxConfig(dynamic_shapes={"pixel_values": {0: torch.export.Dim.AUTO}}),
        )
    exported.save_pretrained(tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    clips = torch.randn(3, 4, 3, 32, 32)
    found = session.run(None, {"pixel_values": clips.numpy()})[0]
    np.testing.assert_allclose(found, model(clips).logits.detach().numpy(), atol=1e-4)


@needs_pytorch_2_11
@pytest.mark.parametrize(
    "options",
    [{}, {"backward_scan": "temporal", "class_token_position": "middle", "position_embedding_type": "spatial"}],
)
def test_no_exported_tensor_has_more_than_six_axes(options):
    """XNNPACK refuses to load a program with more, and TensorFlow Lite takes no more either."""
    exported = torch.export.export(small_model(**options), (torch.randn(2, 4, 3, 32, 32),)).run_decompositions()
    values = [
        (module, node, node.meta["val"])
        for module in (exported.graph_module, *exported.graph_module.children())
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
        if "val" in node.meta
    ]
    assert sum(module is not exported.graph_module for module, *_ in values) > 5  # the loop's body is among them
    assert not [(node, value.shape) for _, node, value in values if isinstance(value, torch.Tensor) and value.ndim > 6]


@needs_pytorch_2_11
@pytest.mark.slow
def test_executorch_loads_the_file_and_gives_the_logits_of_the_model(tmp_path):
    runtime = pytest.importorskip("executorch.runtime", reason="needs the extra `runtimes`")
    exporters = pytest.importorskip(
        "transformers.exporters.exporter_executorch", reason="needs transformers' exporters"
    )
    model, clips = small_model(), torch.randn(2, 4, 3, 32, 32)
    with torch.no_grad():
        exported = exporters.ExecutorchExporter().export(
            model, {"pixel_values": clips}, config=exporters.ExecutorchConfig()
        )
    exported.save_pretrained(tmp_path)
    method = runtime.Runtime.get().load_program(tmp_path / "model.pte").load_method("forward")
    for clips in torch.randn(2, 2, 4, 3, 32, 32):
        (logits,) = method.execute([clips])
        torch.testing.assert_close(logits, model(clips).logits, atol=1e-5, rtol=1e-4)


@needs_pytorch_2_11
@pytest.mark.slow
def test_openvino_reads_the_file_and_gives_the_logits_of_the_model(tmp_path):
    openvino = pytest.importorskip("openvino", reason="needs the extra `runtimes`")
    pytest.importorskip("onnxscript", reason="needs onnxscript, which torch.onnx exports with")
    from export_onnx import export_onnx

    model = small_model()
    export_onnx(model, tmp_path / "model.onnx")
    compiled = openvino.Core().compile_model(tmp_path / "model.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for batch in (1, 3):
        clips = torch.randn(batch, 4, 3, 32, 32)
        found = compiled({"pixel_values": clips.numpy()})[0]
        np.testing.assert_allclose(found, model(clips).logits.detach().numpy(), atol=1e-4)


def test_forced_backend_is_kept_while_exporting():
    model, clips = small_model(), torch.randn(2, 4, 3, 32, 32)
    with use_scan_backend("torch"):
        exported = torch.export.export(model, (clips,))
    assert any("videomamba.selective_scan" in str(node.target) for node in exported.graph.nodes)


@needs_pytorch_2_11
def test_script_without_pytorch_prints_what_the_pipeline_says(python, tmp_path):
    pytest.importorskip("onnxruntime", reason="needs ONNX Runtime")
    pytest.importorskip("onnxscript", reason="needs onnxscript, which torch.onnx exports with")
    save_small_checkpoint(tmp_path / "checkpoint")
    clip, exported = tmp_path / "pan-right.mp4", tmp_path / "onnx"
    write_demo_clip(str(clip), motion="pan right")
    python.run([EXAMPLES / "export_onnx.py", tmp_path / "checkpoint", exported])
    # No code, which nothing here runs.
    files = ["config.json", "model.onnx", "video_preprocessor_config.json"]
    assert sorted(path.name for path in exported.iterdir()) == files
    without_torch = (
        "import runpy, sys\n"
        "sys.modules['torch'] = sys.modules['transformers'] = None\n"
        f"sys.argv = ['classify_onnx.py', {str(exported)!r}, {str(clip)!r}]\n"
        f"runpy.run_path({str(EXAMPLES / 'classify_onnx.py')!r}, run_name='__main__')"
    )
    run = subprocess.run([sys.executable, "-c", without_torch], check=True, capture_output=True, text=True)
    expected = pipeline("video-classification", model=str(tmp_path / "checkpoint"))(str(clip), top_k=3)
    lines = [line.strip().split("%  ") for line in run.stdout.splitlines()]
    assert [label for _, label in lines] == [answer["label"] for answer in expected]
    for (score, _), answer in zip(lines, expected, strict=True):
        assert float(score) / 100 == pytest.approx(answer["score"], abs=0.01)  # Pillow resizes, not torchvision

    config = json.loads((exported / "config.json").read_text())  # of a model that gives a clip several labels
    (exported / "config.json").write_text(json.dumps(config | {"problem_type": "multi_label_classification"}))
    run = subprocess.run([sys.executable, "-c", without_torch], check=True, capture_output=True, text=True)
    classify = pipeline("video-classification", model=str(tmp_path / "checkpoint"))
    expected = [answer["score"] for answer in classify(str(clip), top_k=3, function_to_apply="sigmoid")]
    found = [float(line.split("%")[0]) / 100 for line in run.stdout.splitlines()]
    assert found == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(
    "options",
    [
        {"frame_stride": 3},
        {"frame_stride": None},
        {"frame_stride": None, "spread_in_segments": True},
        {"sampling_fps": 5},
        {"sampling_fps": 1},
        {"antialias": False},
        {"resample": 3},
        {"crop_size": {"height": 32, "width": 32 + 5}, "crop_rounds_down": True},
    ],
)
def test_script_without_pytorch_reads_the_frames_of_the_processor(tmp_path, options):
    pytest.importorskip("onnxruntime", reason="needs ONNX Runtime")
    from classify_onnx import read_clip

    clip = str(tmp_path / "pan-right.mp4")
    write_demo_clip(clip, motion="pan right")
    processor = VideoMambaVideoProcessor(
        **{"num_frames": 4, "size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, **options}
    )
    processor.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "video_preprocessor_config.json").read_text())
    expected = processor(clip, return_tensors="np")["pixel_values"]
    found = read_clip(clip, settings)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 2.01 / 255 / min(processor.image_std)  # two levels
    assert 0.02 < np.abs(found[:, 1:] - expected[:, :-1]).mean()


@pytest.mark.parametrize("name", STORED)
def test_script_without_pytorch_reads_one_clip_stored_in_many_ways(stored, tmp_path, name):
    pytest.importorskip("onnxruntime", reason="needs ONNX Runtime")
    from classify_onnx import read_clip

    processor = VideoMambaVideoProcessor(
        num_frames=8, sampling_fps=5, size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}
    )
    processor.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "video_preprocessor_config.json").read_text())
    found = read_clip(str(stored / name), settings)
    expected = processor(stored / name, return_tensors="np")["pixel_values"]
    assert np.abs(found - expected).max() < 1.01 / 255 / min(processor.image_std)
    pixels = 255 * (found[0].transpose(0, 2, 3, 1) * processor.image_std + processor.image_mean)
    assert read_numbers(pixels) == STORED_SAMPLES


def test_browser_preprocessing_is_that_of_the_processor(tmp_path):
    if shutil.which("node") is None:
        pytest.skip("needs Node.js")
    frames = np.random.default_rng(0).integers(0, 256, (2, 90, 161, 3), dtype=np.uint8)
    processor = AutoVideoProcessor.from_pretrained(CAMERA_MOTION)
    expected = processor(list(frames), return_tensors="np")["pixel_values"]
    frames.tofile(tmp_path / "frames")
    module = (EXAMPLES / "browser" / "preprocessing.js").as_uri()
    settings = json.loads((CAMERA_MOTION / "video_preprocessor_config.json").read_text())
    script = f"""
        import {{ readFileSync, writeFileSync }} from "node:fs";
        import {{ framesToPixelValues, sampleIndices, sampleTimes }} from "{module}";
        const bytes = readFileSync("frames"), [height, width] = [90, 161], settings = {json.dumps(settings)};
        const frames = [0, 1].map((t) => {{
            const data = new Uint8Array(height * width * 4).fill(255);
            for (let i = 0; i < height * width; i++)
                for (let c = 0; c < 3; c++) data[4 * i + c] = bytes[(t * height * width + i) * 3 + c];
            return {{ data, width, height }};
        }});
        writeFileSync("values", Buffer.from(framesToPixelValues(frames, settings).data.buffer));
        const inSegments = {{ num_frames: 8, frame_stride: null, spread_in_segments: true }};
        console.log(JSON.stringify([
            [120, 32, 31, 7, 1].map((total) => sampleIndices(total, settings)),
            sampleIndices(280, inSegments),
            sampleTimes(3, {{ num_frames: 4, sampling_fps: 2 }}),
            sampleTimes(1, {{ num_frames: 4, sampling_fps: 2 }}),
        ]));
    """
    (tmp_path / "run.mjs").write_text(script)
    run = subprocess.run(["node", "run.mjs"], cwd=tmp_path, check=True, capture_output=True, text=True)
    found = np.fromfile(tmp_path / "values", dtype=np.float32).reshape(np.shape(expected))
    one_step = 1 / 255 / min(processor.image_std)
    assert np.abs(found - expected).max() <= 1.01 * one_step
    # One value in twenty may be rounded the other way; torchvision 0.22 rounds one in five otherwise.
    assert (
        np.abs(found - expected).mean()
        <= (0.2 if TorchVersion(torchvision.__version__) < (0, 24) else 0.05) * one_step
    )
    by_stride, in_segments, *times = json.loads(run.stdout)
    for total, indices in zip((120, 32, 31, 7, 1), by_stride, strict=True):
        metadata = type("Metadata", (), {"total_num_frames": total, "fps": 25})
        assert indices == processor.sample_frames(metadata, frame_stride=2).tolist()
    assert in_segments == [17, 52, 87, 122, 157, 191, 226, 261]
    assert times[0] == pytest.approx([0.751, 1.251, 1.751, 2.251])
    assert times[1] == pytest.approx([0.126, 0.376, 0.626, 0.876])


# Makes the page keep the frames that it reads.
KEEP_FRAMES = """
const getImageData = CanvasRenderingContext2D.prototype.getImageData;
CanvasRenderingContext2D.prototype.getImageData = function (...args) {
    const image = getImageData.apply(this, args);
    window.seen.push({ width: image.width, height: image.height, data: [...image.data] });
    return image;
};
"""


@pytest.fixture
def page(python, tmp_path, request):
    """Address and checkpoint of the browser page, served from this machine: with a small model, or the one named."""
    pytest.importorskip("onnxscript", reason="needs onnxscript, which torch.onnx exports with")
    if shutil.which("npm") is None:
        pytest.skip("needs npm, which fetches ONNX Runtime's files for the browser")
    checkpoint, folder = getattr(request, "param", tmp_path / "checkpoint"), tmp_path / "page"
    if not hasattr(request, "param"):
        save_small_checkpoint(checkpoint)
    python.run([EXAMPLES / "browser" / "build.py", checkpoint, folder])
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/index.html", checkpoint
    server.shutdown()


@pytest.mark.slow
def test_browser_page_says_what_the_pipeline_says(page, tmp_path):
    address, checkpoint = page
    clip, broken = tmp_path / "pan-right.mp4", tmp_path / "broken.mp4"
    write_demo_clip(str(clip), motion="pan right")
    broken.write_bytes(b"no video")
    with open_browser(width=390, height=844) as browser:  # a phone

        def wait_for_status(condition):
            def status():
                text = browser.find_element("id", "status").text
                return text if condition(text) else None

            return wait_for(status)

        browser.get(address)
        wait_for_status("Ready.".__eq__)
        browser.find_element("id", "file").send_keys(str(clip))
        assert wait_for_status(lambda text: text.endswith(" ms")).startswith("4 frames")
        rows = [row.text.split(" ") for row in browser.find_elements("css selector", "#labels tr")]
        expected = pipeline("video-classification", model=str(checkpoint))(str(clip), top_k=5)
        assert [row[0] for row in rows] == [answer["label"] for answer in expected]
        for row, answer in zip(rows, expected, strict=True):
            assert float(row[1]) / 100 == pytest.approx(answer["score"], abs=0.02)  # colours converted by Chromium
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")

        browser.find_element("id", "file").send_keys(str(broken))
        assert "cannot play the file" in wait_for_status(lambda text: text not in ("", "Reading …"))
        assert browser.find_elements("css selector", "#labels tr") == []

        browser.find_element("id", "camera").click()  # Chromium's own test picture
        wait_for_status(lambda text: text.endswith("clips a second"))


@pytest.mark.slow
def test_browser_page_sees_one_clip_stored_in_many_ways_the_same(page, stored):
    """All but AVI and MPEG-TS, which Chromium does not open."""
    address, checkpoint = page
    settings = checkpoint.with_name("page") / "video_preprocessor_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"sampling_fps": 5}))
    found = {}
    with open_browser() as browser:
        status = partial(browser.find_element, "id", "status")
        browser.get(address)
        wait_for(lambda: status().text == "Ready.")
        browser.execute_script(KEEP_FRAMES)
        for name in STORED:
            browser.execute_script("window.seen = []; arguments[0].textContent = ''", status())
            browser.find_element("id", "file").send_keys(str(stored / name))
            wait_for(lambda: status().text not in ("", "Reading …"))
            found[name] = [
                np.reshape(frame["data"], (frame["height"], frame["width"], 4))[:, :, :3]
                for frame in browser.execute_script("return window.seen")
            ]
            assert ("cannot play" in status().text) == (found[name] == [])
    assert [name for name, frames in found.items() if not frames] == ["30.avi", "30.ts"]
    for frames in filter(None, found.values()):
        assert read_numbers([frame[:, 16:80] for frame in frames]) == STORED_SAMPLES[2:6]
        for frame, number in zip(frames, STORED_SAMPLES[2:6], strict=True):
            assert np.abs(frame - stored_picture(number).astype(int)).mean() < 12


# Keeps what goes into the model and what comes out, in the order of the steps.
RECORDER = """
    const prototype = ort.InferenceSession.prototype ?? Object.getPrototypeOf(arguments[0]);
    const run = prototype.run;
    window.steps = [];
    prototype.run = async function (feeds, ...rest) {
        const outputs = await run.call(this, feeds, ...rest);
        window.steps.push([Array.from(feeds.pixel_values.data), Array.from(outputs.logits.data)]);
        return outputs;
    };
"""


@needs_pytorch_2_11
@pytest.mark.slow
@pytest.mark.parametrize("page", [CAMERA_STREAM], indirect=True)
def test_browser_page_streams_the_camera(page, tmp_path):
    """The shipped checkpoint that streams: a file, step by step, and a camera that turns to the right."""
    address, checkpoint = page
    clip, camera = tmp_path / "pan-right.mp4", tmp_path / "camera.mjpeg"
    write_demo_clip(str(clip), motion="pan right")
    write_video(camera, list(decode_video(str(clip))[0]), codec="mjpeg", pix_fmt="yuvj420p", rate=24)
    model = VideoMambaForVideoFrameClassification.from_pretrained(checkpoint, pooling_window=4).eval()
    with open_browser(camera=camera) as browser:
        browser.get(address)
        wait_for(lambda: browser.find_element("id", "status").text == "Ready.")
        browser.find_element("id", "file").send_keys(str(clip))
        status = wait_for(lambda: (text := browser.find_element("id", "status").text).endswith(" ms") and text)
        assert status.startswith("16 frames")
        rows = [row.text.rsplit(" ", 2) for row in browser.find_elements("css selector", "#labels tr")]
        (best,) = pipeline("video-classification", model=str(checkpoint))(str(clip), top_k=1)
        assert rows[0][0] == best["label"] == "pan right"
        assert float(rows[0][1]) / 100 == pytest.approx(best["score"], abs=0.03)

        browser.execute_script(RECORDER)
        browser.find_element("id", "camera").click()
        wait_for(lambda: browser.execute_script("return window.steps.length") >= 12)
        browser.find_element("id", "camera").click()
        pixels, logits = zip(*browser.execute_script("return window.steps.slice(0, 12)"), strict=True)
        label = browser.find_element("css selector", "#labels td").text
    pixels = torch.tensor(pixels).view(1, -1, 3, 112, 112)
    with torch.no_grad():
        expected = model(pixels, interpolate_pos_encoding=True).logits[0]
    assert label == "pan right" and expected.argmax(-1).tolist()[4:] == 8 * [model.config.label2id[label]]
    window = torch.tensor(logits).unfold(0, 4, 1).mean(-1)
    torch.testing.assert_close(window, expected[3:], atol=1e-3, rtol=1e-3)

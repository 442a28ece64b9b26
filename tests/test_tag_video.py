"""examples/tools/tag_video.py: what the windows see, cuts, going on after a kill, what is written, a live source."""

import collections
import csv
import functools
import http.server
import json
import threading
import time
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForVideoClassification, AutoVideoProcessor

from browser import open_browser, wait_for
from make_camera_motion_clips import draw_scenery
from modeling_videomamba import (
    VideoMambaConfig,
    VideoMambaForVideoClassification,
    VideoMambaForVideoFrameClassification,
    VideoMambaVideoProcessor,
)
from modeling_videomamba.video_decoding import decode_video
from video_files import numbered_frame, read_number, write_video


pytest.importorskip("scenedetect", reason="needs PySceneDetect: pip install scenedetect")
import film_frames  # noqa: E402
import live_camera  # noqa: E402
import tag_video  # noqa: E402
from film_frames import Frame, Point, read_frames  # noqa: E402
from segments import Segment, Window, boundary_errors, to_segments  # noqa: E402
from tag_outputs import write_tables  # noqa: E402
from tag_video import Journal  # noqa: E402
from taggers import Sampler, Shot, StreamTagger, Tagger, make_tagger  # noqa: E402
from tool_models import CAMERA_MOTION  # noqa: E402


class NumberTagger:
    """Stands in for the classifier: a prepared frame is the number drawn in it, a score the numbers of a window."""

    length, step, rate = 7, 4, 25.0

    def prepare(self, pictures):
        return torch.tensor([read_number(picture) for picture in pictures])

    def sample(self, count, times=None):
        return range(0, count, 2)

    def classify(self, clips):
        return [{" ".join(map(str, clip.tolist())): 1.0} for clip in clips]


def as_frames(pictures, first=0):
    return [Frame(i, i, i / 25, picture, None) for i, picture in enumerate(pictures, first)]


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (3, [[0, 2]]),
        (7, [[0, 2, 4, 6]]),
        (13, [[0, 2, 4, 6], [4, 6, 8, 10], [6, 8, 10, 12]]),
        (15, [[0, 2, 4, 6], [4, 6, 8, 10], [8, 10, 12, 14]]),
    ],
)
def test_windows_reach_every_frame_of_a_shot(count, expected):
    shot = Shot(NumberTagger(), 5)
    made = [made for frame in as_frames(map(numbered_frame, range(count))) for made in shot.add(frame)]
    made += list(shot.end())
    assert [clip.tolist() for _, clip in made] == expected
    assert made[0][0][:2] == (5, 0.0)
    assert made[-1][0][2] == pytest.approx(count / 25)


def shots_film(path, lengths, height=96, width=128, rate=25, **options):
    """A film in which each shot slowly crosses a picture of its own; cuts stand after each of `lengths` frames."""
    frames = []
    for number, length in enumerate(lengths):
        picture = draw_scenery(np.random.default_rng(number), 256, 144)[0].permute(1, 2, 0).numpy()
        frames += [picture[20 : 20 + height, i // 2 : i // 2 + width] for i in range(length)]
    return write_video(path, frames, rate=rate, **options)


def cuts_of(frames):
    return [(frame.index, is_cut, new_part) for frame, is_cut, new_part in film_frames.find_cuts(frames, 25)]


def test_cuts_are_found_and_a_later_part_finds_the_same(tmp_path, monkeypatch):
    film = shots_film(tmp_path / "film.mp4", [40, 30, 50, 35])
    frames = list(read_frames(film, Point()))
    assert [index for index, is_cut, _ in cuts_of(frames) if is_cut] == [40, 70, 120]
    assert [frame.index for frame in frames] == list(range(155))

    monkeypatch.setattr(film_frames, "PART", 2.0)
    whole = cuts_of(frames)
    assert [index for index, _, new_part in whole if new_part] == [70, 120]
    assert cuts_of(frames[70:])[1:] == whole[71:]


def test_a_film_of_one_shot_has_no_cuts(tmp_path, monkeypatch):
    monkeypatch.setattr(film_frames, "LONGEST_PART", 1.0)
    frames = read_frames(shots_film(tmp_path / "film.mp4", [40, 20]), Point())
    found = list(film_frames.find_cuts(frames, 25, film_frames.NoCuts))
    assert [frame.index for frame, _, _ in found] == list(range(60))
    assert [frame.index for frame, is_cut, new_part in found if is_cut or new_part] == [25, 50]


def test_errors_of_boundaries():
    rows = ((0, 2, "a"), (2, 3, "a"), (3, 5, "b"), (5, 8, "a"), (8, 9, "c"))
    parts = ((0, 3.5, "a"), (3.5, 4, "b"), (4, 4.25, "a"), (4.25, 5.5, "b"), (5.5, 9, "a"))
    truth, found = ([Segment(*row) for row in each] for each in (rows, parts))
    assert boundary_errors(truth, found) == [0.5, 0.5, float("inf")]


def test_a_part_without_a_cut_ends_too(tmp_path, monkeypatch):
    monkeypatch.setattr(film_frames, "LONGEST_PART", 1.0)
    film = shots_film(tmp_path / "film.mp4", [60])
    marks = cuts_of(read_frames(film, Point()))
    assert [index for index, is_cut, new_part in marks if new_part] == [25, 50]
    assert not any(is_cut for _, is_cut, _ in marks)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("film.mp4", {}),
        ("film.mkv", {}),
        ("film.ts", {}),
        ("film.avi", {"codec": "mpeg4", "b_frames": 0}),
        ("vfr.mp4", {"pts": [40 * i + 13 * (i % 3) for i in range(60)]}),
    ],
)
def test_reading_goes_on_at_the_same_frame(tmp_path, name, options):
    film = write_video(tmp_path / name, 60, **options)
    whole = list(read_frames(film, Point()))
    assert [read_number(frame.picture) for frame in whole] == list(range(60))
    for start in (1, 25, 59):
        point = Point(start, whole[start].pts, whole[start].time, whole[0].pts, 0)
        rest = list(read_frames(film, point))
        assert [read_number(frame.picture) for frame in rest] == list(range(start, 60))
        assert [frame[:3] for frame in rest] == [frame[:3] for frame in whole[start:]]


def test_a_film_on_its_side_is_turned(tmp_path):
    film = write_video(tmp_path / "side.mp4", 5, rotation=90)
    expected, _ = decode_video(film)
    frames = list(read_frames(film, Point()))
    assert frames[0].picture.shape == (96, 64, 3)
    np.testing.assert_array_equal([frame.picture for frame in frames], expected)


def tag_all(film, tagger, journal, parts=None):
    """Tags a film as the command does, or only some parts of it. Returns the windows in the journal."""
    for count, (windows, point) in enumerate(tag_video.tag_parts(film, tagger, journal.point, 3, lambda _: None), 1):
        journal.add(windows, point)
        if count == parts:
            break
    return journal.windows


def test_going_on_gives_the_same_result_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(film_frames, "PART", 1.5)
    monkeypatch.setattr(film_frames, "LONGEST_PART", 3.0)
    film = shots_film(tmp_path / "film.mp4", [45, 100, 20, 45])
    tagger = Tagger(str(CAMERA_MOTION), "cpu", 25, step=1.0)
    whole = Journal(tmp_path / "whole.jsonl", {})
    expected = tag_all(film, tagger, whole)
    assert whole.finished and len((tmp_path / "whole.jsonl").read_text().splitlines()) == 5  # settings and four parts

    path = tmp_path / "torn.jsonl"
    for parts in (1, 2):
        tag_all(film, tagger, Journal(path, {}), parts)
        with open(path, "a") as file:
            file.write('{"windows": [[0, 0.0')  # a kill in the middle of a line
    journal = Journal(path, {})
    assert journal.point.index > 45
    assert tag_all(film, tagger, journal) == expected
    assert Journal(path, {}).windows == expected
    assert Journal(path, {"another": "film"}).windows == []


def test_scores_are_those_of_the_frames_by_themselves(tmp_path):
    film = shots_film(tmp_path / "film.mp4", [80, 20])
    windows = tag_all(film, Tagger(str(CAMERA_MOTION), "cpu", 25, step=0.4), Journal(tmp_path / "j", {}))
    # 16 frames at 6 a second take 2.67 seconds, which are 67 frames of 25 a second.
    assert [(w.shot, w.start, round(w.end, 3)) for w in windows] == [
        (0, 0.0, 2.68), (0, 0.4, 3.08), (0, 0.52, 3.2), (1, 3.2, 4.0)
    ]  # fmt: skip
    model = AutoModelForVideoClassification.from_pretrained(str(CAMERA_MOTION))
    processor = AutoVideoProcessor.from_pretrained(str(CAMERA_MOTION))
    frames, _ = decode_video(film)
    for window, clip in zip(windows, [frames[0:67], frames[10:77], frames[13:80], frames[80:100]], strict=True):
        middle, distance = len(clip) / 2, min(25 / 6, len(clip) / 16)  # in frames
        shown = clip[[int(middle + distance * (i - 7.5) + 0.01) for i in range(16)]]
        with torch.no_grad():
            scores = model(**processor(list(shown), return_tensors="pt")).logits.softmax(-1)[0]
        for label, score in window.scores.items():
            assert score == pytest.approx(scores[model.config.label2id[label]].item(), abs=1e-3)


@pytest.fixture(scope="module")
def streaming(tmp_path_factory):
    """A checkpoint that can stream: random weights, eight frames a second, clips of eight frames, steps of two."""
    torch.manual_seed(0)
    config = VideoMambaConfig(
        hidden_size=32, num_hidden_layers=2, num_frames=8, image_size=32, num_labels=4, backward_scan="spatial",
        class_token_position="none", position_embedding_type="spatial",
    )  # fmt: skip
    model = VideoMambaForVideoClassification(config)
    torch.nn.init.normal_(model.classifier.weight, std=0.5)
    folder = tmp_path_factory.mktemp("streaming")
    model.save_pretrained(folder)
    VideoMambaVideoProcessor(
        num_frames=8, sampling_fps=8, size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("times", "rate", "fps", "expected"),
    [
        ([i / 25 for i in range(13)], 25, 8, [1, 4, 7, 10]),
        ([i / 4 for i in range(3)], 4, 8, [0, 0, 1, 1, 2, 2]),  # fewer frames than are sampled
        ([0.0, 0.04, 0.5, 0.54], 25, 8, [1, 1, 1, 1, 3]),  # the second frame stays on screen
        ([9.0, 9.1, 9.2], 10, 10, [0, 1, 2]),
    ],
)
def test_frames_are_sampled_as_they_come(times, rate, fps, expected):
    sampler = Sampler(rate, fps)
    assert [frame for index, time in enumerate(times) for _, frame in sampler.add(time, index)] == expected


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_film_is_tagged_by_a_stream_in_one_pass(streaming, tmp_path, batch_size):
    """Each step's scores are those of the shot's last four steps, its frames chosen by hand; no frame twice."""
    film = shots_film(tmp_path / "film.mp4", [75, 22])
    tagger = make_tagger(streaming, "cpu", 25)
    assert tagger.streams and not make_tagger(str(CAMERA_MOTION), "cpu", 25).streams
    assert not make_tagger(streaming, "cpu", 25, windows=True).streams
    seen, forward = [], tagger.model.forward
    tagger.model.forward = lambda pixels, **kwargs: seen.append(pixels.shape[1]) or forward(pixels, **kwargs)
    parts = tag_video.tag_parts(film, tagger, Point(), batch_size, lambda _: None)
    windows = [window for found, _ in parts for window in found]
    shots = [0] * 12 + [1] * 4
    assert [window.shot for window in windows] == shots and sum(seen) == 2 * len(shots)
    ends = [0.25 * step for step in range(1, 16)] + [3.88]  # the last frame takes the place of one that would follow
    starts = [max(0, end - 1) for end in ends[:12]] + [3.0] * 4
    assert [window.end for window in windows] == pytest.approx(ends)
    assert [window.start for window in windows] == pytest.approx(starts)

    model = VideoMambaForVideoFrameClassification.from_pretrained(streaming, pooling_window=4)
    processor, found = AutoVideoProcessor.from_pretrained(streaming), iter(windows)
    frames, _ = decode_video(film)
    for first, count, steps in ((0, 75, 12), (75, 22, 4)):
        chosen = [min(int((index + 0.5) / 8 * 25), count - 1) + first for index in range(2 * steps)]
        pixels = processor(list(frames[chosen]), do_sample_frames=False, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            expected = model(pixels, interpolate_pos_encoding=True).logits[0].softmax(-1)
        for scores in expected:
            for label, score in next(found).scores.items():
                assert score == pytest.approx(scores[model.config.label2id[label]].item(), abs=1e-4)


def test_a_film_shorter_than_a_step_has_a_label(streaming, tmp_path):
    film = shots_film(tmp_path / "film.mp4", [2])
    ((windows, _),) = tag_video.tag_parts(film, make_tagger(streaming, "cpu", 25), Point(), 8, lambda _: None)
    assert [(window.start, window.end) for window in windows] == [(0, pytest.approx(0.08))]


def test_a_stream_goes_on_to_the_bit(streaming, tmp_path, monkeypatch):
    monkeypatch.setattr(film_frames, "PART", 1.5)
    monkeypatch.setattr(film_frames, "LONGEST_PART", 3.0)
    film = shots_film(tmp_path / "film.mp4", [45, 100, 20, 45])
    tagger = make_tagger(streaming, "cpu", 25)
    expected = tag_all(film, tagger, Journal(tmp_path / "whole.jsonl", {}))
    for parts in (1, 2, None):
        found = tag_all(film, make_tagger(streaming, "cpu", 25), Journal(tmp_path / "torn.jsonl", {}), parts)
    assert found == expected


def test_a_window_of_sampled_seconds_is_as_long_as_the_model_was_trained_for(streaming):
    assert Tagger(streaming, "cpu", 25).length == 25


WINDOWS = [
    Window(0, 0.0, 2.0, {"a": 0.5, "b": 0.1}),
    Window(0, 1.0, 3.0, {"a": 0.7}),
    Window(0, 2.0, 4.0, {"b & <c>": 0.9}),
    Window(1, 4.0, 5.0, {"b & <c>": 0.8}),
    Window(1, 4.5, 3725.5, {"b & <c>": 0.6}),
]
SEGMENTS = [
    Segment(0.0, 2.5, "a", 0.6, 0),
    Segment(2.5, 4.0, "b & <c>", 0.9, 0),
    Segment(4.0, 3725.5, "b & <c>", 0.7, 1),
]


def test_segments_and_tables(tmp_path):
    segments = to_segments(WINDOWS)
    assert segments == SEGMENTS
    write_tables(tmp_path, "film.mp4", "model", segments, WINDOWS)
    with open(tmp_path / "tags.csv", newline="") as file:
        assert list(csv.DictReader(file))[1] == {
            "start": "2.500", "end": "4.000", "shot": "0", "label": "b & <c>", "score": "0.9000"
        }  # fmt: skip
    content = json.loads((tmp_path / "tags.json").read_text())
    assert content["windows"][0] == {"shot": 0, "start": 0.0, "end": 2.0, "scores": {"a": 0.5, "b": 0.1}}
    assert (tmp_path / "chapters.vtt").read_text() == (
        "WEBVTT\n\n1\n00:00:00.000 --> 00:00:02.500\na\n\n"
        "2\n00:00:02.500 --> 00:00:04.000\nb &amp; &lt;c&gt;\n\n3\n00:00:04.000 --> 01:02:05.500\nb &amp; &lt;c&gt;\n"
    )


def test_a_player_shows_the_chapters(tmp_path):
    """Chromium, as the player, reads the chapters of a film on a page."""
    write_tables(tmp_path, "film.mp4", "model", SEGMENTS, WINDOWS)
    write_video(tmp_path / "film.mp4", 10)
    (tmp_path / "index.html").write_text(
        '<video src="film.mp4"><track default kind="chapters" src="chapters.vtt"></video>'
    )
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    handler.log_message = lambda *arguments: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with open_browser() as browser:
        browser.get(f"http://127.0.0.1:{server.server_port}/")
        browser.execute_script("document.querySelector('video').textTracks[0].mode = 'hidden'")
        cues = "return [...document.querySelector('video').textTracks[0].cues ?? []].map(c => [c.startTime, c.text])"
        found = wait_for(lambda: browser.execute_script(cues))
        shown = "return document.querySelector('video').textTracks[0].cues[1].getCueAsHTML().textContent"
        assert browser.execute_script(shown) == "b & <c>"
    server.shutdown()
    assert [start for start, _ in found] == [0, 2.5, 4]


def test_command_overlay_and_timeline(tmp_path, monkeypatch, capsys):
    film = shots_film(tmp_path / "film.mp4", [30, 40], width=127, audio=True, pix_fmt="yuv444p")
    (tmp_path / "truth.csv").write_text("start,end,label\n0,1.2,no such\n1.2,2.8,no such\n")
    out = tmp_path / "out"
    command = ["tag_video.py", film, "--output", str(out), "--overlay", "--truth", str(tmp_path / "truth.csv")]
    monkeypatch.setattr("sys.argv", command)
    tag_video.main()
    printed = capsys.readouterr().out
    assert "times as fast as it plays" in printed
    assert (
        "0.0% of 2 seconds have the right label. 1 of 1 cuts were found at the right frame. False cuts: 0" in printed
    )
    assert "F1@10/25/50 0.000/0.000/0.000, edit 0.000, mAP 0.000" in printed
    (task,) = json.loads((out / "label_studio.json").read_text())
    regions = [region["value"]["ranges"][0] for region in task["predictions"][0]["result"]]
    assert task["data"]["video"] == film and (regions[0]["start"], regions[-1]["end"]) == (1, 70)
    assert all(after["start"] == before["end"] + 1 for before, after in zip(regions, regions[1:], strict=False))
    assert Image.open(out / "timeline.png").width > 600
    overlay, metadata = decode_video(str(out / "overlay.mp4"))
    assert overlay.shape == (70, 96, 126, 3) and metadata.fps == 25
    original, _ = decode_video(film)
    difference = np.abs(overlay.astype(int) - original[:, :, :126]).mean((0, 3))
    assert difference[:60].mean() < 6 < difference[75:, 6:60].mean()  # only the corner changed
    with av.open(str(out / "overlay.mp4")) as container:
        assert [stream.codec_context.name for stream in container.streams] == ["aac", "h264"]

    tag_video.main()  # all is done: nothing is tagged again
    assert "as fast as" not in capsys.readouterr().out


def test_ctrl_c_keeps_what_is_done(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(film_frames, "PART", 1.0)
    film = shots_film(tmp_path / "film.mp4", [30, 40])
    add, added = Journal.add, []

    def interrupted(self, windows, point):
        if added:
            raise KeyboardInterrupt
        added.append(windows)
        add(self, windows, point)

    monkeypatch.setattr(Journal, "add", interrupted)
    monkeypatch.setattr("sys.argv", ["tag_video.py", film, "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="130"):
        tag_video.main()
    assert "up to 00:00:01.200. Run the command again to go on" in capsys.readouterr().out
    assert len((tmp_path / "out" / "tags.csv").read_text().splitlines()) == 2
    monkeypatch.setattr(Journal, "add", add)
    tag_video.main()
    assert "Resuming at 00:00:01.200" in capsys.readouterr().out


def test_what_is_no_film_gets_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "text.mp4").write_text("not a film")
    for name, message in (("text.mp4", "cannot be read as a video"), ("none.mp4", "There is no file")):
        monkeypatch.setattr("sys.argv", ["tag_video.py", str(tmp_path / name), "--output", str(tmp_path / "out")])
        with pytest.raises(SystemExit, match=message):
            tag_video.main()


@pytest.mark.parametrize("streams", [False, True])
def test_live_source(streams, streaming, tmp_path, monkeypatch, capsys, request):
    """A camera that sends until it is asked to stop: after the first call, which warms up, and some lines."""
    request.addfinalizer(functools.partial(torch.set_num_threads, torch.get_num_threads()))
    film = shots_film(tmp_path / "film.ts", [400], gop=25, b_frames=0)
    kind, calls = (StreamTagger, 9) if streams else (Tagger, 3)
    data, classified, classify = open(film, "rb").read(), [], kind.classify

    class Camera(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            for i in range(320):  # sixteen seconds of film in sixteen seconds
                if len(classified) < calls:
                    self.wfile.write(data[len(data) * i // 320 : len(data) * (i + 1) // 320])
                    time.sleep(0.05)

        def log_message(self, *args):
            pass

    monkeypatch.setattr(kind, "classify", lambda self, clips: classified.append(clips) or classify(self, clips))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Camera)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/"
    command = ["tag_video.py", "--live", address, "--step", "0.5", *(["--model", streaming] if streams else [])]
    monkeypatch.setattr("sys.argv", command)
    tag_video.main()
    server.shutdown()
    *lines, summary = capsys.readouterr().out.splitlines()
    lines = [line for line in lines if "latency" in line and line.endswith(" frames dropped")]
    assert len(lines) == len(classified) - 1 >= 1
    assert summary.startswith(f"{len(lines)} lines, median latency")
    assert classified[1][0].shape == ((2, 3, 32, 32) if streams else (16, 3, 112, 112))
    # Frames are dropped if the machine is busy: how many, no test can say.
    assert all(line.split()[-3].isdigit() for line in lines)


def test_live_skips_while_it_is_late_and_forgives_a_pause(monkeypatch):
    """A camera with 25 frames a second. Decoding takes too long for a while; later the camera stands still for 3 s."""
    clock, skips = [0.0], []
    monkeypatch.setattr(live_camera.time, "monotonic", lambda: clock[0])
    live = live_camera.Live.__new__(live_camera.Live)
    live.rate, live.received, live.lag, live.ended = 25.0, 0, 0.0, False
    live.stream = SimpleNamespace(codec_context=SimpleNamespace(skip_frame="DEFAULT"))
    live.lock, live.frames = threading.Lock(), collections.deque(maxlen=31)

    def camera(_):
        shown = 0.0
        for number in range(700):
            skipping = live.stream.codec_context.skip_frame == "NONKEY"
            shown += 1.0 if skipping else 0.04  # a key frame a second
            pause = 3.0 if shown > 40 else 0.0
            cost = 0.1 if 200 <= number < 240 else 0.01  # seconds to decode a frame
            clock[0] = max(clock[0] + cost, shown + pause)
            yield SimpleNamespace(time=shown)
            skips.append(live.stream.codec_context.skip_frame == "NONKEY")

    live.container = SimpleNamespace(decode=camera)
    live.read()
    late = [number for number, skipped in enumerate(skips) if skipped]
    assert 205 < late[0] < 215 and skips[late[0] + 2] is False  # caught up with the next key frame or two
    assert live.received > 700 and not any(skips[-60:])  # the pause was forgiven
    assert len(live.frames) == 31 and live.lag < 0.5

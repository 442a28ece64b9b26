"""What `tag_video.py` writes: tables, chapters, a file for Label Studio, the timeline and the film with its labels."""

import collections
import csv
import io
import json
import os
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from film_frames import frame_rate, upright
from modeling_videomamba.video_decoding import decoded_frames, open_pyav, read_packets


COLUMNS = ["start", "end", "shot", "label", "score"]  # of a segment


def write(path, text):
    temporary = path.with_suffix(path.suffix + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def clock(seconds):
    """Hours, minutes, seconds and thousandths, as in WebVTT."""
    thousandths = round(seconds * 1000)
    hours, minutes = thousandths // 3600000, thousandths // 60000 % 60
    return f"{hours:02}:{minutes:02}:{thousandths // 1000 % 60:02}.{thousandths % 1000:03}"


def counted(number, noun):
    return f"{number} {noun}{'s' * (number != 1)}"


def write_tables(folder, film, model, segments, windows, moments=None):
    """tags.csv, tags.json and chapters.vtt, which is of the moments if the segments overlap."""
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(COLUMNS)
    rows.writerows([f"{s.start:.3f}", f"{s.end:.3f}", s.shot, s.label, f"{s.score:.4f}"] for s in segments)
    write(folder / "tags.csv", table.getvalue())

    content = {
        "film": str(film),
        "model": str(model),
        "segments": [{name: getattr(segment, name) for name in COLUMNS} for segment in segments],
        "windows": [window._asdict() for window in windows],
    }
    write(folder / "tags.json", json.dumps(content, indent=1) + "\n")

    cues = []
    for number, s in enumerate([s for s in moments or segments if s.label], 1):
        name = " ".join(s.label.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        cues.append(f"{number}\n{clock(s.start)} --> {clock(s.end)}\n{name}\n")
    write(folder / "chapters.vtt", "WEBVTT\n\n" + "\n".join(cues))


def label_studio_task(film, model, segments, rate):
    """
    A task with the segments as predictions, as Label Studio imports it for `<Video name="video" value="$video"/>` and
    `<TimelineLabels name="label" toName="video">`.

    Args:
        film (`str`), model (`str`): the video's address, and who made the predictions.
        segments (sequence of `Segment`).
        rate (`float`): frames a second, by which Label Studio counts, from 1.

    Returns:
        `dict`, an entry of the list that a file for import holds.
    """
    result = []
    for number, segment in enumerate(segments, 1):
        first = round(segment.start * rate) + 1
        frames = {"start": first, "end": max(first, round(segment.end * rate))}
        region = {"id": f"segment-{number}", "from_name": "label", "to_name": "video", "type": "timelinelabels"}
        region["value"] = {"ranges": [frames], "timelinelabels": [segment.label]}
        result.append({**region, "score": round(segment.score, 4)})
    mean = sum(segment.score for segment in segments) / len(segments) if segments else 0.0
    return {
        "data": {"video": str(film)},
        "predictions": [{"model_version": str(model), "score": round(mean, 4), "result": result}],
    }


def draw_timeline(path, film, segments, moments):
    """A row for each label, the ten that last longest; above them the cuts and pictures from the film."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        from matplotlib.ticker import MaxNLocator
    except ModuleNotFoundError:
        print(f"{path.name} needs matplotlib: pip install matplotlib")
        return
    seconds = collections.Counter()
    for s in segments:
        seconds[s.label] += s.end - s.start
    labels = sorted(label for label, _ in seconds.most_common(10))
    end, height = moments[-1].end, 0.32 * max(1, len(labels))
    figure, (strip, axes) = plt.subplots(
        2, 1, figsize=(12, 1.6 + height), height_ratios=[1.1, height], layout="constrained"
    )
    count = 12
    for i in range(count):
        picture = picture_at(film, (i + 0.5) * end / count)
        if picture is not None:
            strip.imshow(picture, extent=(i, i + 0.97, 0, 0.97 * picture.shape[0] / picture.shape[1]), aspect="equal")
    strip.set(xlim=(0, count), ylim=(0, 0.75))
    strip.axis("off")
    for row, label in enumerate(labels):
        own = [s for s in segments if s.label == label]
        color = plt.get_cmap("tab10")(row % 10)
        colors = [(*color[:3], 0.3 + 0.7 * s.score) for s in own]
        axes.broken_barh([(s.start, s.end - s.start) for s in own], (row - 0.4, 0.8), facecolors=colors)
    cuts = [s.start for s, before in zip(moments[1:], moments, strict=False) if s.shot != before.shot]
    if len(cuts) <= 300:
        axes.vlines(cuts, -0.5, len(labels) - 0.5, color="black", linewidth=0.4, alpha=0.5)
    axes.set(xlim=(0, end), ylim=(max(1, len(labels)) - 0.5, -0.5), yticks=range(len(labels)), yticklabels=labels)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, steps=[1, 3, 6, 10]))
    axes.xaxis.set_major_formatter(lambda value, _: clock(value)[:8].removeprefix("00:"))
    axes.set_title(f"{Path(film).name}: {counted(len(cuts) + 1, 'shot')}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    temporary = path.with_suffix(".part")
    figure.savefig(temporary, dpi=100, format="png")
    plt.close(figure)
    os.replace(temporary, path)


def picture_at(film, seconds):
    """One small frame near a time, or None where a film cannot be searched."""
    try:
        with open_pyav(str(film), str(film)) as (container, stream):
            container.seek(int(seconds / stream.time_base) + (stream.start_time or 0), stream=stream)
            frame = next(decoded_frames(container, stream), None)
    except av.FFmpegError:
        return None
    if frame is None:
        return None
    picture = Image.fromarray(upright(frame))
    picture.thumbnail((160, 120))
    return np.asarray(picture)


def write_overlay(path, film, moments):
    """Copies the film with the label of each moment in its lower left corner; sound comes along."""
    with open_pyav(str(film), str(film)) as (container, stream):
        first = next(decoded_frames(container, stream))
        height, width = burn(upright(first), "").shape[:2]
    temporary = path.with_suffix(".part")
    try:
        with (
            open_pyav(str(film), str(film)) as (source, stream),
            av.open(str(temporary), "w", format="mp4") as target,
            tqdm(total=round(moments[-1].end), unit=" s of film", desc=path.name) as bar,
        ):
            sound = next((s for s in source.streams.audio if s.codec_context.name in ("aac", "mp3", "ac3")), None)
            sound_copy = target.add_stream_from_template(sound) if sound else None
            video = target.add_stream("libx264", rate=frame_rate(stream), options={"crf": "20", "preset": "veryfast"})
            video.height, video.width, video.pix_fmt = height, width, "yuv420p"
            if first.pts is not None:
                video.codec_context.time_base = first.time_base
            count, current = 0, 0
            for packet in read_packets(source, *filter(None, (stream, sound))):
                if packet.stream is sound:
                    if packet.dts is not None:
                        packet.stream = sound_copy
                        target.mux(packet)
                    continue
                try:
                    frames = packet.decode()
                except av.FFmpegError:
                    continue
                for frame in frames:
                    timed = frame.pts is not None and first.pts is not None
                    seconds = (frame.pts - first.pts) * frame.time_base if timed else count / frame_rate(stream)
                    while current + 1 < len(moments) and seconds >= moments[current].end:
                        current += 1
                    label, score = moments[current].label, moments[current].score
                    picture = burn(upright(frame), f"{label}  {score:.0%}" if label else "")
                    burned = av.VideoFrame.from_ndarray(picture, format="rgb24")
                    if timed:
                        burned.pts, burned.time_base = frame.pts, frame.time_base
                    target.mux(video.encode(burned))
                    count += 1
                    bar.update(int(seconds) - bar.n)
            target.mux(video.encode())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def burn(picture, text):
    """Writes text into (H, W, 3); the sides become even, as H.264 needs them."""
    height, width = (side // 2 * 2 for side in picture.shape[:2])
    image = Image.fromarray(picture[:height, :width])
    if not text:
        return np.asarray(image)
    draw = ImageDraw.Draw(image)
    size = max(12, height // 18)
    font = ImageFont.load_default(size)
    left, top = size // 2, height - 2 * size
    box = draw.textbbox((left, top), text, font=font)
    draw.rectangle((box[0] - 4, box[1] - 4, box[2] + 4, box[3] + 4), fill=(0, 0, 0))
    draw.text((left, top), text, font=font, fill=(255, 255, 255))
    return np.asarray(image)

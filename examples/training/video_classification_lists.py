"""Clips as the authors of a data set list them: Kinetics, Something-Something V2, HMDB51, Charades and others."""

import csv
import glob
import json
import os
import re
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, List, Video


# What a clip that is listed without its suffix may be; pictures and notes beside it are none.
VIDEO_SUFFIXES = {".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv"}
VIDEO_SUFFIXES |= {".ts", ".vob", ".webm", ".wmv"}


def read_list(source, video_root, split, hmdb51_split, failures, label_list=None, list_columns=None):
    """
    The clips of a list. `source` is one of

    - Kinetics: a CSV file with `label`, `youtube_id`, `time_start` and `time_end`, of clips
      `<youtube_id>_<time_start>_<time_end>.<suffix>`, times in seconds with six digits;
    - Something-Something V2: a JSON list of `{"id": ..., "template": ...}`, of clips `<id>.<suffix>`; the label is the
      template without its brackets;
    - COIN: its JSON file, of clips `<id>.<suffix>`; testing is for validation;
    - OpenGVLab's lists of Breakfast, COIN and LVU: lines `<path>,<number>` or `<path> <number>` without a header. If
      there are more columns, `list_columns` says what they are: "path,label,seconds". The number becomes its name in
      `label_list`, a file with a name a line, or stays a number;
    - HMDB51: a folder of files `<label>_test_split<n>.txt` with lines `<clip> <0, 1 or 2>`: 1 is for training, 2 for
      testing;
    - any other CSV file with `video` (a path) and `label`.

    Of these, a clip has several labels, or none:

    - Charades: its CSV file with `id` and `actions` ("c092 11.90 21.20;c147 0.00 12.60"), of clips `<id>.<suffix>`.
      The times are not used. With `label_list`, Charades' own file of classes, labels get its names;
    - any other CSV file with `video` and `labels`, between semicolons; or between commas, if no clip has a semicolon;
    - lines without a header, if `list_columns` ends with labels: "path,labels" for `<path> 3,17` or `<path> 3 17`.

    Clips are looked for anywhere below `video_root`; a path may also be absolute. One that is not there counts as one
    that cannot be read.

    Returns:
        `datasets.Dataset` with the columns `video` (a path, not decoded) and `label` (a `ClassLabel`, or lists of
        them).

    Raises:
        ValueError: for a list that cannot be read, naming the file and the line; or if a clip that is listed without
            its folder or suffix could be one of two files.
    """
    if video_root is None or not os.path.isdir(video_root):
        raise ValueError(f"Lists need --video_root, the folder that holds their clips, but it is {video_root!r}.")
    if os.path.isdir(source):
        entries = _hmdb51_entries(source, hmdb51_split, split)
        expected = f"files <label>_test_split{hmdb51_split}.txt"
    elif source.endswith(".json"):
        entries = _json_entries(source, split)
        expected = "a list of objects with 'id' and 'template', or COIN's 'database'"
    else:
        entries = _table_entries(source, label_list, list_columns)
        expected = "columns label, youtube_id, time_start, time_end, or video, label, or video, labels, or id, actions"
        expected += ", or lines `path,number`"
    if not entries:
        raise ValueError(f"{source} lists no {split} clips: {expected} were expected.")
    files, labels = _find_files(entries, source, video_root, failures)
    columns = {"video": [{"path": file, "bytes": None} for file in files], "label": labels}
    several = isinstance(entries[0][1], list)
    kind = ClassLabel(names=sorted({name for own in labels for name in own} if several else set(labels)))
    return Dataset.from_dict(columns, Features(video=Video(decode=False), label=List(kind) if several else kind))


def _read_text(path):
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # without the byte-order mark that spreadsheets write
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}). Save it in this encoding.") from error


def _hmdb51_entries(source, number, split):
    entries, wanted = [], {"train": "1", "validation": "2"}[split]
    for path in sorted(glob.glob(f"{glob.escape(source)}/*_test_split{number}.txt")):
        label = os.path.basename(path).removesuffix(f"_test_split{number}.txt")
        for line in filter(str.strip, _read_text(path).splitlines()):
            name, *use = line.rsplit(maxsplit=1)
            if use not in (["0"], ["1"], ["2"]):
                raise ValueError(f"{path} has the line {line!r}, but lines `<clip> <0, 1 or 2>` were expected.")
            entries += [(Path(name).stem, label)] if use == [wanted] else []
    return entries


def _json_entries(source, split):
    try:
        rows = json.loads(_read_text(source))
    except json.JSONDecodeError as error:
        raise ValueError(f"{source} is no JSON ({error}).") from error
    try:
        if isinstance(rows, dict) and isinstance(rows.get("database"), dict):
            subset = {"train": "training", "validation": "testing"}[split]
            return [(name, row["class"]) for name, row in rows["database"].items() if row["subset"] == subset]
        return [(str(row["id"]), re.sub(r"[\[\]]", "", row["template"])) for row in rows if "template" in row]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{source} has an entry that is another than expected ({error!r}).") from error


def _table_entries(source, label_list, list_columns):
    text = _read_text(source)
    rows = list(csv.DictReader(text.splitlines()))
    if rows and {"label", "youtube_id", "time_start", "time_end"} <= set(rows[0]):
        columns = ["label", "youtube_id", "time_start", "time_end"]
    elif rows and {"video", "label"} <= set(rows[0]):
        columns = ["video", "label"]
    elif rows and {"video", "labels"} <= set(rows[0]):
        return _labels_entries(source, rows)
    elif rows and {"id", "actions"} <= set(rows[0]):
        return _charades_entries(source, rows, label_list)
    else:
        return _numbered_entries(source, text, label_list, list_columns)
    entries = []
    for number, row in enumerate(rows, 1):
        if empty := [column for column in columns if not row[column]]:
            raise ValueError(f"{source} says nothing of {', '.join(empty)} in row {number} after the header.")
        name = row.get("video")
        if name is None:
            start, end = int(float(row["time_start"])), int(float(row["time_end"]))
            name = f"{row['youtube_id']}_{start:06d}_{end:06d}"
        entries.append((name, row["label"]))
    return entries


def _labels_entries(source, rows):
    mark = ";" if any(";" in (row["labels"] or "") for row in rows) else ","
    entries = []
    for number, row in enumerate(rows, 1):
        if not row["video"]:
            raise ValueError(f"{source} says nothing of video in row {number} after the header.")
        names = [name.strip() for name in (row["labels"] or "").split(mark)]
        entries.append((row["video"], list(dict.fromkeys(filter(None, names)))))
    return entries


def _charades_entries(source, rows, label_list):
    entries = []
    for number, row in enumerate(rows, 1):
        actions = list(filter(None, (row["actions"] or "").split(";")))
        if not row["id"] or not all(re.fullmatch(r"\s*c\d{3} [\d.]+ [\d.]+\s*", action) for action in actions):
            raise ValueError(
                f"{source} has {row['actions']!r} in row {number} after the header, but an id and actions as "
                "'c092 11.90 21.20;c147 0.00 12.60' were expected."
            )
        entries.append((row["id"], sorted({int(action.split()[0][1:]) for action in actions})))
    names = _names(source, entries, label_list, "c{:03d}")
    names = [re.sub(r"^c\d{3} ", "", name) for name in names]
    return [(name, [names[label] for label in labels]) for name, labels in entries]


def _names(source, entries, label_list, pattern=None):
    """The names of the labels that `entries` number, by number: those of `label_list`, or numbers as text."""
    most = max((label for _, labels in entries for label in labels), default=-1)
    if label_list is None:
        pattern = pattern or f"{{:0{len(str(most))}d}}"  # in the order of the numbers
        return [pattern.format(number) for number in range(most + 1)]
    names = [name.strip() for name in _read_text(label_list).rstrip().split("\n")]
    if most >= len(names):
        raise ValueError(f"{label_list} names {len(names)} labels, but {source} has a label {most}.")
    return names


def _numbered_entries(source, text, label_list, list_columns):
    """(path, label) of lines without a header, whose columns stand between commas or blanks; paths may hold blanks."""
    columns = (list_columns or "path,label").replace(" ", "").split(",")
    several = columns[-1] == "labels"
    if columns[0] != "path" or columns.count("label") + several != 1:
        raise ValueError(
            f"--list_columns must begin with path and hold label once, or end with labels, but is {list_columns!r}."
        )
    entries = []
    for line in filter(str.strip, text.splitlines()):
        if several:
            entries.append(_path_and_numbers(source, line.strip(), columns))
            continue
        if "," in line:
            cells = [cell.strip() for cell in next(csv.reader([line]))]
        else:
            cells = line.rsplit(maxsplit=len(columns) - 1)
            if list_columns is None and re.search(r"\s[\d.]+$", cells[0]):
                cells = line.rsplit(maxsplit=2)  # of two numbers, either may be the label
        if list_columns is None and len(cells) > 2:
            raise ValueError(
                f"{source} has {len(cells)} columns in the line {line.strip()!r}. Say with --list_columns what they "
                "are: 'path,label,seconds' or 'path,frames,label', for example; or 'path,labels', if clips have "
                "several labels."
            )
        label = cells[columns.index("label")] if len(cells) == len(columns) else ""
        if not label.isdecimal():
            raise ValueError(
                f"{source} has the line {line.strip()!r}, but {','.join(columns)} was expected, the label "
                "as a number. (A table with names needs a header: video,label.)"
            )
        entries.append((cells[0].strip(), [int(label)]))
    names = _names(source, entries, label_list)
    named = [(name, [names[label] for label in labels]) for name, labels in entries]
    return named if several else [(name, labels[0]) for name, labels in named]


def _path_and_numbers(source, line, columns):
    """The path and the labels of a line that ends with any number of labels, after the other columns' numbers."""
    path, numbers = re.fullmatch(r"(.+?)((?:[\s,]+\d+(?:\.\d+)?)*)", line).groups()
    numbers = re.split(r"[\s,]+", numbers)[1:]
    labels = numbers[len(columns) - 2 :]
    too_few = len(numbers) < len(columns) - 2 or (not numbers and Path(path).suffix.lower() not in VIDEO_SUFFIXES)
    if too_few or not all(map(str.isdecimal, labels)):
        raise ValueError(
            f"{source} has the line {line!r}, but {','.join(columns)} was expected, the labels as numbers between "
            "blanks or commas. (A table with names needs a header: video,labels.)"
        )
    return path, sorted(set(map(int, labels)))


def _find_files(entries, source, video_root, failures):
    """The files of the entries, and their labels."""
    paths, stems = {}, {}
    for folder, _, files in os.walk(video_root):
        for file in files:
            path = os.path.join(folder, file)
            paths[os.path.relpath(path, video_root)] = path
            if Path(file).suffix.lower() in VIDEO_SUFFIXES:
                stems.setdefault(Path(file).stem, []).append(path)
    found, labels = [], []
    for name, label in entries:
        same = stems.get(name, [])
        file = paths.get(os.path.normpath(name), same[0] if same else None)
        if os.path.isabs(name) and os.path.isfile(name):
            file = name
        if file is None:
            label = ", ".join(label) if isinstance(label, list) else label
            failures.record(f"{name} ({label})", f"it is listed in {source}, but not below {video_root}.")
            continue
        if file in same and len(same) > 1:
            raise ValueError(
                f"{source} lists {name}, which may be {same[0]} or {same[1]}. Remove one of them, or list its path."
            )
        found.append(file)
        labels.append(label)
    return found, labels

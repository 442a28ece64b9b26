#!/usr/bin/env python
"""Names what happens in videos, with the scores of a VideoMamba classifier.

    python examples/tools/classify_video.py clip.mp4 https://example.org/other.mp4 --model you/videomamba-k400
    python examples/tools/classify_video.py clips/*.mp4 --format csv > scores.csv

Without a video, the script takes a short clip in which the camera pans right. Without `--model`, it uses this
repository's checkpoint for camera motion. Of a model that gives a clip several labels, each score is a label's own;
all from 50 % on are printed, and `--top_k` at least. A video that cannot be read is named, the others are done all the
same, and the exit status is 1.
"""

import argparse
import csv
import gc
import json
import os
import sys
import time
from pathlib import Path

from tool_models import THRESHOLD, add_model, gives_several


EXAMPLE = Path(__file__).resolve().parent / "space" / "examples" / "pan-right.mp4"


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="*", metavar="video", help="files or URLs")
    add_model(parser)
    parser.add_argument("--top_k", type=int, default=3, help="labels to print for each video (default: %(default)s)")
    help_of_format = "text, one JSON object a line, or CSV with a row a label (default: %(default)s)"
    parser.add_argument("--format", choices=["text", "json", "csv"], default="text", help=help_of_format)
    args = parser.parse_args()
    if not args.videos and not EXAMPLE.is_file():
        parser.error("name a video: the installed package has none")
    return args


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    parse_arguments()  # before the imports below, which take seconds

# Half a million objects come with the imports, and stay. Looking for garbage among them would take a second on the way
# in, and another at the end, so they are set aside.
gc.disable()
try:
    from transformers import pipeline

    import modeling_videomamba  # noqa: F401  registers VideoMamba in transformers' Auto classes
    from modeling_videomamba.loading_videomamba import unloadable_reason
finally:
    gc.freeze()
    gc.enable()


def choose(answers, top_k, several):
    """The best `top_k`; of several labels a clip, all that reach the threshold, if these are more."""
    return answers[: max(top_k, several * sum(answer["score"] >= THRESHOLD for answer in answers))]


def write_text(video, answers, seconds):
    print(f"{os.path.basename(video)} ({seconds:.2f} s)")
    for answer in answers:
        print(f"  {answer['score']:6.1%}  {answer['label']}")


def write_json(video, answers, seconds):
    print(json.dumps({"video": video, "scores": answers}, ensure_ascii=False))


def write_csv(video, answers, seconds):
    csv.writer(sys.stdout).writerows([video, answer["label"], answer["score"]] for answer in answers)


def main():
    args = parse_arguments()
    if reason := unloadable_reason(args.model):
        sys.exit(reason)
    classifier = pipeline("video-classification", model=args.model)
    several = gives_several(classifier.model.config)
    # Said, because pipelines before transformers 5.23 took a softmax of such models, too.
    options = {"top_k": classifier.model.config.num_labels} | ({"function_to_apply": "sigmoid"} if several else {})
    write = {"text": write_text, "json": write_json, "csv": write_csv}[args.format]
    if args.format == "csv":
        csv.writer(sys.stdout).writerow(["video", "label", "score"])
    failed = False
    for video in map(os.path.expanduser, args.videos or [str(EXAMPLE)]):
        start = time.perf_counter()
        try:
            if os.path.isdir(video):
                raise ValueError(f"{video} is a folder: classify_clips.py (videomamba-classify-clips) takes folders.")
            answers = choose(classifier(video, **options), args.top_k, several)
            write(video, answers, time.perf_counter() - start)
        except (OSError, ValueError) as error:
            print(error, file=sys.stderr)
            failed = True
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()

"""
The published files of OpenGVLab's VideoMamba and of Vision Mamba: what each is, and a complete repository of it.

    videomamba-convert published --list
    videomamba-convert published --checkpoint OpenGVLab/VideoMamba:videomamba_s16_k400_f16_res224.pth \\
        --output videomamba-small-k400-f16 --push-to-hub you/videomamba-k400
"""

import argparse
import difflib
import re
import sys
from dataclasses import dataclass

from .command_lines import published_parser


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    published_parser().parse_args()  # before the imports below, which take seconds

from huggingface_hub import EvalResult, ModelCard

from . import convert_opengvlab_to_videomamba, convert_vim_to_videomamba
from .checkpoints import CheckpointError, run


OPENGVLAB = "https://github.com/OpenGVLab/VideoMamba/blob/f3427e42cb8453a523aec3a6f86d57b5bc1de5c3/videomamba"
ZOOS = {
    "OpenGVLab, images": f"{OPENGVLAB}/image_sm/MODEL_ZOO.md",
    "OpenGVLab, videos": f"{OPENGVLAB}/video_sm/MODEL_ZOO.md",
    "Vim": "https://github.com/hustvl/Vim/blob/dd0358ad1e42701f22afbefa0717cc8825cf9f45/README.md",
}

# Files and the top-1 accuracy their authors report, read on 2026-11-26. Two rows of OpenGVLab's video table (masked
# pre-training at 16 frames: K400 83.4 %, SSV2 71.0 %) link to the files of the rows without it, and are left out.
ACCURACIES = {
    "videomamba_{}_res{}.pth": """
        t16_in1k 224 76.9 | t16_in1k 224to448 79.3 | t16_in1k 224to448to576 79.6 | s16_in1k 224 81.2
        s16_in1k 224to448 83.2 | s16_in1k 224to448to576 83.5 | m16_in1k 224 82.8 | m16_in1k 224to448 83.8
        m16_in1k 224to448to576 84.0 | b16_in1k 224 82.7
        t16_k400_f8 224 76.9 | t16_k400_f16 224 78.1 | t16_k400_f32 224 78.8 | t16_k400_f64 224 79.6
        t16_k400_f64 224to384 80.3 | s16_k400_f8 224 79.3 | s16_k400_f16 224 80.8 | s16_k400_f32 224 81.5
        s16_k400_f64 224 81.8 | s16_k400_f64 224to384 82.7 | m16_k400_f8 224 80.6 | m16_k400_f16 224 81.9
        m16_k400_f32 224 82.4 | m16_k400_f64 224 82.8 | m16_k400_f64 224to384 83.3 | m16_k400_mask_ft_f8 224 82.0
        m16_k400_mask_ft_f32 224 83.9 | m16_k400_mask_ft_f64 224 84.3 | m16_k400_mask_ft_f64 224to384 85.0
        t16_ssv2_f8 224 65.1 | t16_ssv2_f16 224 66.0 | t16_ssv2_f16 224to288 66.2 | s16_ssv2_f8 224 66.6
        s16_ssv2_f16 224 67.7 | s16_ssv2_f16 224to288 68.1 | m16_ssv2_f8 224 67.3 | m16_ssv2_f16 224 68.3
        m16_ssv2_f16 224to288 68.4 | m16_ssv2_mask_ft_f8 224 70.2 | m16_ssv2_mask_ft_f16 224to288 71.4
        t16_breakfast_f32 224 94.3 | t16_breakfast_f64 224 94.3 | s16_breakfast_f32 224 95.3
        s16_breakfast_f64 224 97.4 | m16_breakfast_f32 224 94.8 | m16_breakfast_f64 224 95.8
        m16_breakfast_mask_ft_f32 224 97.9 | m16_breakfast_mask_ft_f64 224 96.9
        t16_coin_f32 224 86.2 | t16_coin_f64 224 87.0 | s16_coin_f32 224 88.4 | s16_coin_f64 224 88.7
        m16_coin_f32 224 88.3 | m16_coin_f64 224 89.5 | m16_coin_mask_ft_f32 224 89.6 | m16_coin_mask_ft_f64 224 90.4
        m16_k400_mask_pt_f8 224 - | m16_ssv2_mask_pt_f8 224 -""",
    "vim_{}_midclstok_{}.pth": "t 76p1acc 76.1 | s 80p5acc 80.5 | b 81p9acc 81.9",
}
SIZES = {"t": ("tiny", 192), "s": ("small", 384), "m": ("middle", 576), "b": ("base", 768)}
# Name, labels, views (spatial crops × temporal clips), and the name of the labels where torchvision holds them.
DATASETS = {
    "in1k": ("ImageNet-1K", 1000, (1, 1), "imagenet-1k"),
    "k400": ("Kinetics-400", 400, (3, 4), "kinetics-400"),
    "ssv2": ("Something-Something V2", 174, (3, 4), None),
    "breakfast": ("Breakfast", 10, (3, 4), None),
    "coin": ("COIN", 180, (3, 10), None),
}


@dataclass(frozen=True)
class Published:
    """One published file; `accuracy` in percent is None for a backbone of masked pre-training."""

    file: str
    size: str
    hidden_size: int
    dataset: str
    num_frames: int
    image_size: int
    accuracy: float | None

    @property
    def is_vim(self):
        return self.file.startswith("vim_")

    @property
    def source(self):
        """`repo_id:filename` on the Hub."""
        size = self.size if self.is_vim else ""
        return f"hustvl/Vim-{size}-midclstok:{self.file}" if self.is_vim else f"OpenGVLab/VideoMamba:{self.file}"

    @property
    def zoo(self):
        return "Vim" if self.is_vim else "OpenGVLab, images" if self.dataset == "in1k" else "OpenGVLab, videos"

    @property
    def url(self):
        """Where its authors report its accuracy."""
        return ZOOS[self.zoo]

    @property
    def name(self):
        """What its repository may be called."""
        family = "vim" if self.is_vim else "videomamba"
        masked = re.search(r"_mask_(ft|pt)", self.file)
        parts = [family, self.size, self.dataset, masked and ("mask" if masked[1] == "ft" else "mask-pretrained")]
        parts += [f"f{self.num_frames}" if self.num_frames > 1 else None]
        return "-".join(filter(None, [*parts, str(self.image_size) if self.image_size != 224 else None]))

    @property
    def protocol(self):
        crops, clips = DATASETS[self.dataset][2]
        if self.num_frames == 1:
            return "centre crop, 7/8 of the shorter edge"
        return f"{self.num_frames} frames × {crops} crops × {clips} clips"


def _read_table():
    for pattern, rows in ACCURACIES.items():
        for row in re.split(r"\s*[|\n]\s*", rows.strip()):
            what, how, accuracy = row.split()
            size, hidden_size = SIZES[what[0]]
            dataset = re.search("|".join(DATASETS), what)
            frames = re.search(r"_f(\d+)", what)
            yield Published(
                pattern.format(what, how),
                size,
                hidden_size,
                dataset[0] if dataset else "in1k",
                int(frames[1]) if frames else 1,
                224 if "acc" in how else int(how.split("to")[-1]),
                None if accuracy == "-" else float(accuracy),
            )


PUBLISHED = {row.file: row for row in _read_table()}


def markdown_table():
    """All files as a table for a page."""
    columns = (
        "file",
        "repository",
        "labels",
        "frames, pixels",
        "authors' top-1 (views)",
        "`videomamba-convert published`",
    )
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for row in PUBLISHED.values():
        name, labels, _, known = DATASETS[row.dataset]
        what = "none: a backbone" if row.accuracy is None else f"{labels}, {name}"
        accuracy = "" if row.accuracy is None else f"[{row.accuracy} %][{row.zoo}] ({row.protocol})"
        named = "" if known or row.accuracy is None else " --labels FILE"
        command = f"`--checkpoint {row.source}{named} --output {row.name}`"
        cells = (f"`{row.file}`", f"`you/{row.name}`", what, f"{row.num_frames}, {row.image_size}", accuracy, command)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"[{zoo}]: {url}" for zoo, url in ZOOS.items())])


def with_published_accuracy(card, row):
    """The card with the authors' figure, in words and as a `model-index`, marked as theirs."""
    if row.accuracy is None:
        return card
    name, _, (crops, clips), _ = DATASETS[row.dataset]
    task = "image-classification" if row.num_frames == 1 else "video-classification"
    text = f"Its authors report {row.accuracy} % top-1 on {name} ({row.protocol}) in [their table]({row.url}). "
    text += "That is their figure; nobody has measured these converted weights."
    if row.num_frames > 1:
        text += (
            "\n\n```bash\npython examples/training/evaluate_video_classification.py --model_name_or_path "
            f"{row.name} \\\n    --validation_list annotations.csv --video_root videos \\\n"
            f"    --num_crops {crops} --num_clips {clips} --output_dir results  # measures it\n```"
        )
    measured = "Nobody has measured the accuracy of these converted weights."
    if measured not in card:
        raise RuntimeError("The model card has lost the sentence that the authors' figure replaces.")
    card = ModelCard(card.replace(measured, text))
    card.data.model_name = row.name
    card.data.eval_results = [
        EvalResult(
            task_type=task,
            dataset_type=name.lower().replace(" ", "-"),
            dataset_name=name,
            metric_type="accuracy",
            metric_value=row.accuracy,
            metric_name=f"top-1 accuracy, the authors' own figure ({row.protocol})",
            verified=False,
            source_name="Reported by the authors",
            source_url=row.url,
        )
    ]
    return str(card)


def convert(options):
    """From the command line's options to what `run` writes."""
    file = re.split(r"[:/\\]", options.checkpoint)[-1]
    if file not in PUBLISHED:
        near = difflib.get_close_matches(file, PUBLISHED, 3)
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        raise CheckpointError(
            f"{file} is none of the published files that `--list` shows.{hint} A file is known by its name: if it was "
            "renamed, rename it back; if it is another, `videomamba-convert opengvlab` or `vim` converts it."
        )
    row = PUBLISHED[file]
    name, num_labels, _, known = DATASETS[row.dataset]
    if not (known or options.labels or row.accuracy is None):
        raise CheckpointError(
            f"{file} has {num_labels} labels of {name}, whose names it does not hold. Name the file of the data set "
            "that lists them in index order with --labels (a line each, or .json)."
        )
    defaults = {"num_frames": None}
    if row.is_vim:
        defaults = {"num_frames": 1, "keep_head": True, "num_labels": None, "position_init": "expand"}
        defaults |= {"tubelet_size": None, "image_size": None, "class_token_position": None}
    family = convert_vim_to_videomamba if row.is_vim else convert_opengvlab_to_videomamba
    remap, model, sampling, card = family.convert(argparse.Namespace(**{**vars(options), **defaults}))

    config, wanted = model.config, {name: getattr(row, name) for name in ("hidden_size", "num_frames", "image_size")}
    if row.accuracy is not None:
        wanted["num_labels"] = num_labels
    found = {name: getattr(config, name) for name in wanted}
    if found != wanted:
        different = ", ".join(
            f"{name} {found[name]} (not {wanted[name]})" for name in wanted if found[name] != wanted[name]
        )
        raise CheckpointError(
            f"{options.checkpoint} is not what its name says: it has {different}. Download it again."
        )
    return remap, model, sampling, with_published_accuracy(card, row)


def main(argv=None):
    run(published_parser(), convert, argv)


if __name__ == "__main__":
    main()

"""Tables and figure 1 of the VideoMamba paper, for study.py: what each row changes, and the paper's figures."""

from typing import NamedTuple


class Row(NamedTuple):
    """One line of a table: its names, the flags it changes, what it starts from, and the paper's figures."""

    names: tuple
    flags: dict = {}
    paper: tuple = ()
    start: str | None = "expand"  # the image checkpoint inflated in this way, "video", or None: from scratch
    evaluate: dict = {}  # flags of evaluate_video_classification.py, where the row is about evaluation alone


class Table(NamedTuple):
    """What a table compares. `paper` names the columns of its figures; each row has one for each."""

    title: str
    names: tuple
    paper: tuple
    rows: tuple
    needs: tuple = ()  # options without which there is nothing to compare
    counts: bool = False  # with columns of GMACs


def scan(name):
    return {"config_overrides": f"backward_scan={name},class_token_position=none"}


def frames(number):
    return {"num_frames": str(number)}


PLAIN = {"rand_augment": "0", "label_smoothing_factor": "0.0"}
RAND_AUGMENT = {"rand_augment": "2", "rand_augment_magnitude": "9", "label_smoothing_factor": "0.0"}
SMOOTHED = RAND_AUGMENT | {"label_smoothing_factor": "0.1"}
TWO_SETS = ("SSV2", "HMDB51")

# The rows stand in the order of the paper, whose tables grow from the worst to the best.
TABLES = {
    "table1": Table(
        "Table 1: frames in another order at evaluation",
        ("Reordering strategy",),
        ("HMDB51",),
        (
            Row(("interleaved",), paper=(51.3,), evaluate={"frame_order": "interleaved"}),
            Row(("pairwise",), paper=(53.5,), evaluate={"frame_order": "pairwise"}),
            Row(("block-wise",), paper=(56.5,), evaluate={"frame_order": "block-wise"}),
            Row(("sequential",), paper=(58.9,), evaluate={"frame_order": "sequential"}),
        ),
    ),
    "table2": Table(
        "Table 2: backward scan, without a class token",
        ("Backward scan",),
        TWO_SETS,
        (
            Row(("spatial",), scan("spatial"), (61.9, 43.3)),
            Row(("temporal",), scan("temporal"), (63.3, 52.9)),
            Row(("spatio-temporal",), {"config_overrides": "class_token_position=none"}, (64.7, 55.2)),
        ),
    ),
    "table3": Table(
        "Table 3: position embeddings",
        ("Positions", "Initialisation"),
        TWO_SETS,
        (
            Row(("none", "–"), {}, (63.2, 48.7), "none"),
            Row(("sinusoidal", "–"), {}, (63.3, 47.5), "sinusoidal"),
            Row(("learned", "random"), {}, (63.4, 47.9), "random"),
            Row(("learned", "interpolate-s"), {}, (63.6, 49.4), "interpolate-spatial"),
            Row(("learned", "interpolate-d"), {}, (63.6, 51.5), "interpolate-embedding"),
            Row(("learned", "expanding"), {}, (63.7, 58.9), "expand"),
        ),
        needs=("image_checkpoint",),
    ),
    "table4": Table(
        "Table 4: initialisation and regularisation",
        ("Recipe",),
        ("HMDB51",),
        (
            Row(("image checkpoint",), PLAIN, (53.6,)),
            Row(("video checkpoint",), PLAIN, (66.6,), "video"),
            Row(("+ RandAugment",), RAND_AUGMENT, (67.6,), "video"),
            Row(("+ label smoothing",), SMOOTHED, (68.6,), "video"),
        ),
        needs=("image_checkpoint", "video_checkpoint"),
    ),
    "table5": Table(
        "Table 5: frames",
        ("Frames",),
        ("GFLOPs", *TWO_SETS),
        (
            Row(("8",), frames(8), (17.1, 61.0, 52.7)),
            Row(("16",), frames(16), (34.2, 63.7, 58.9)),
            Row(("32",), frames(32), (68.5, 64.2, 59.3)),
        ),
        counts=True,
    ),
    "table6": Table(
        "Table 6: width",
        ("Width",),
        ("GFLOPs", "K400", *TWO_SETS),
        (
            Row(("192",), {"hidden_size": "192"}, (8.8, 69.5, 54.6, 56.5)),
            Row(("384",), {"hidden_size": "384"}, (34.2, 76.2, 63.7, 68.6)),
        ),
        counts=True,
    ),
    "single_frame": Table(
        "What one frame tells (not in the paper)",
        ("Frames",),
        (),
        (
            Row(("1",), frames(1) | {"config_overrides": "tubelet_size=1"}),
            Row(("16",), frames(16)),
        ),
    ),
}


class Published(NamedTuple):
    """What tables 7 to 9 print. `columns` name the entries of each row."""

    title: str
    columns: tuple
    rows: tuple
    views: dict  # flags of the evaluation of your own checkpoints


PUBLISHED = {
    "table7": Published(
        "Table 7: HMDB51",
        ("Method", "Backbone", "Pretrain", "Frames", "Param (M)", "Top-1"),
        (
            ("I3D", "Inception", "IN-1K", "30", "25.0", "49.8"),
            ("SpeedNet", "S3D-G", "K400", "64", "9.0", "48.8"),
            ("VTHCL", "SlowOnly-R50", "K400", "32", "32.0", "67.9"),
            ("MemDPC", "R-2D3D", "K400", "40", "32.0", "54.5"),
            ("CVRL", "SlowOnly-R50", "K400", "32", "32.0", "49.2"),
            ("VideoSwin-T (reproduced by the paper)", "Swin-T", "IN-1K", "32", "27.9", "54.4"),
            ("VideoSwin-T (reproduced by the paper)", "Swin-T", "K400", "32", "27.9", "69.9"),
            ("VideoSwin-S (from Mamba-ND)", "Swin-T", "IN-1K", "32", "54.0", "58.1"),
            ("VideoMAE, 4800 epochs", "ViT-B", "–", "16", "87.0", "62.6"),
            ("VideoMAE, 4800 epochs", "ViT-B", "K400", "16", "87.0", "73.3"),
            ("S4ND-ConvNeXt-3D (from Mamba-ND)", "ConvNeXt", "IN-1K", "30", "29.0", "55.2"),
            ("Mamba-ND (from Mamba-ND)", "Mamba", "IN-1K", "32", "36.0", "59.0"),
            ("VideoMamba", "Mamba", "IN-1K", "16", "26.3", "58.9"),
            ("VideoMamba", "Mamba", "IN-1K", "32", "26.8", "59.3"),
            ("VideoMamba", "Mamba", "K400", "16", "26.3", "68.6"),
            ("VideoMamba", "Mamba", "K400", "32", "26.8", "75.7"),
        ),
        {"num_clips": "5", "num_crops": "3"},  # the paper does not say: Kinetics' views
    ),
    "table8": Published(
        "Table 8: Something-Something V2",
        ("Method", "Backbone", "Pretrain", "Frames", "Views", "GFLOPs", "Param (M)", "Top-1", "Top-5"),
        (
            ("SlowFast", "ResNet101", "K400", "8+32", "1 × 3", "106", "53.3", "63.1", "87.6"),
            ("TSM-RGB", "ResNet50", "K400", "16", "2 × 3", "62", "42.9", "63.4", "88.2"),
            ("VideoSwin-T (reproduced by the paper)", "Swin-T", "IN-1K", "32", "1 × 3", "88", "27.8", "52.3", "81.9"),
            ("VideoSwin-T (reproduced by the paper)", "Swin-T", "K400", "32", "1 × 3", "88", "27.8", "57.2", "85.7"),
            ("TimeSformer", "ViT-B", "IN-21K", "8", "1 × 3", "196", "121.4", "59.5", "–"),
            ("TimeSformer", "ViT-L", "IN-21K", "64", "1 × 3", "5549", "430.0", "62.4", "–"),
            ("ViViT FE", "ViT-L", "IN-21K + K400", "32", "4 × 3", "995", "–", "65.9", "89.9"),
            ("VideoMAE, 2400 epochs", "ViT-S", "–", "16", "2 × 3", "57", "22.0", "66.8", "90.3"),
            ("VideoMamba", "Mamba", "IN-1K", "16", "2 × 3", "34", "26.3", "63.7", "87.8"),
            ("VideoMamba", "Mamba", "IN-1K", "32", "2 × 3", "68", "26.8", "64.2", "88.0"),
        ),
        {"num_clips": "2", "num_crops": "3"},
    ),
    "table9": Published(
        "Table 9: Kinetics-400",
        ("Method", "Backbone", "Pretrain", "Frames", "Views", "GFLOPs", "Param (M)", "Top-1", "Top-5"),
        (
            ("R(2+1)D", "R(2+1)D", "–", "32", "10 × 1", "75", "61.8", "72.0", "90.0"),
            ("I3D", "Inception", "IN-1K", "32", "10 × 3", "108", "25.0", "72.1", "90.3"),
            ("NL I3D", "ResNet101", "IN-1K", "32", "10 × 3", "359", "62.0", "77.7", "93.3"),
            ("SlowFast", "R101+NL", "–", "16+64", "10 × 3", "234", "59.9", "79.8", "93.9"),
            ("MViT-S", "MViT-S", "–", "16", "5 × 1", "33", "26.1", "76.0", "92.1"),
            ("MViT-B, 16 × 4", "MViT-B", "–", "16", "5 × 1", "71", "36.6", "78.4", "93.5"),
            ("VideoSwin-T", "Swin-T", "IN-1K", "32", "4 × 3", "88", "28.2", "78.8", "93.6"),
            ("VideoMAE, 1600 epochs", "ViT-S", "–", "16", "5 × 3", "57", "22.0", "79.0", "93.8"),
            ("VideoMamba", "Mamba", "IN-1K", "16", "5 × 3", "34", "26.4", "76.1", "92.5"),
            ("VideoMamba", "Mamba", "IN-1K", "32", "5 × 3", "68", "26.8", "77.7", "93.3"),
        ),
        {"num_clips": "5", "num_crops": "3"},
    ),
}

# Figure 1's models: the paper's GFLOPs and accuracies (tables 7 to 9), and which of benchmark.py's models measures it.
FIGURE1 = {
    "VideoMamba, 16 frames": ("VideoMamba-S", 16, 34.2, {"HMDB51": 58.9, "SSV2": 63.7, "K400": 76.1}),
    "VideoMamba, 32 frames": ("VideoMamba-S", 32, 68.5, {"HMDB51": 59.3, "SSV2": 64.2, "K400": 77.7}),
    "VideoSwin-T, 32 frames": ("Swin3D-T", 32, 88.0, {"HMDB51": 54.4, "SSV2": 52.3, "K400": 78.8}),
    "VideoMAE-S, 16 frames": ("VideoMAE-S", 16, 57.0, {"SSV2": 66.8, "K400": 79.0}),
}

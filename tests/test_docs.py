"""The Markdown pages: their links lead somewhere, what they tell to run runs, and the README fits one screen."""

import importlib.util
import re
import runpy
from pathlib import Path

import pytest
import torch

import docs_commands
from docs_commands import LEFT_OUT, SHIPPED


ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    path for path in ROOT.rglob("*.md") if not {".venv", ".cache", "node_modules"} & set(path.relative_to(ROOT).parts)
)


def anchors(page):
    """The names that the headings of a page have on a Git host."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://|mailto:", link):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{page.name} links to {link}"


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"} <= set(
        re.findall(r"\]\((.+?)\)", index)
    )


def test_readme_is_short():
    shown = re.sub(r"<!--.*?-->", "", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(shown.split()) <= 900
    assert (ROOT / "docs" / "images" / "camera_motion.gif").stat().st_size <= 2e6


@pytest.mark.parametrize(
    "rule, text, fault",
    [
        ("452 = clips_per_s of inference,Swin3D-T,bfloat16,eager,16,64", "452 clips/s", None),
        ("0.45 = clips_per_s of inference,Swin3D-T,bfloat16,eager,16,64 / 1000", "0.45 of them", None),
        ("453 = clips_per_s of inference,Swin3D-T,bfloat16,eager,16,64", "453 clips/s", "453 stands there, 452.2"),
        ("452 = clips_per_s of inference,Swin3D-T,bfloat16,eager,16,64", "295 clips/s", "452 is not in the text"),
        ("452 = clips_per_s of inference,Swin3D-T,bfloat16,eager,16,65", "452 clips/s", "0 lines of h100"),
        ("column 2 = clips_per_s of inference,Swin3D-T,bfloat16,eager,{0},{1}", "| 16 × 64 | 452 | |", None),
        (
            "column 2 = clips_per_s of inference,Swin3D-T,bfloat16,eager,{0},{1}",
            "| 64 × 16 | 452 | |",
            "452 stands there",
        ),
    ],
)
def test_figures_are_compared_with_the_tables(rule, text, fault):
    faults = runpy.run_path(str(ROOT / "docs" / "check_figures.py"))["faults"]
    table = "| frames × batch | clips/s | |\n| --- | --- | --- |\n" if text.startswith("|") else ""
    found = list(faults(f"Before.\n\n<!-- figures h100\n{rule}\n-->\n{table}{text}\n\nAfter: 452.\n"))
    assert len(found) == (fault is not None)
    assert all(sentence.startswith(fault) for sentence in found)


# ---------------------------------------------------------------------------------------------------------------------
# What is fenced
# ---------------------------------------------------------------------------------------------------------------------

UNPUBLISHED = ROOT / "csrc" / "hub" / "README.md"  # the card of a repository that is on no Hub yet
RUNNABLE = [
    page
    for page in PAGES
    if page != UNPUBLISHED and {language for _, language, _ in docs_commands.blocks(page)} & {"bash", "python"}
]
# What stands before a page's snippets: the names that its text has explained.
BEFORE = f"""
import torch, modeling_videomamba
from transformers import AutoImageProcessor, AutoModelForVideoClassification, AutoVideoProcessor, pipeline
folder = {SHIPPED!r}
files = ["clip.mp4", "film.mkv"]
model = AutoModelForVideoClassification.from_pretrained(folder)
inputs = AutoVideoProcessor.from_pretrained(folder)("clip.mp4", return_tensors="pt")
"""
BEFORE_ON = {
    "usage.md": """
num_frames, clips = 16, torch.randn(1, 16, 3, 112, 112)
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
""",
    "deploy.md": """
clips = torch.randn(1, 16, 3, 112, 112)
if TEXT.startswith("import openvino"):
    clips = torch.randn(1, 4, 3, 32, 32).numpy()
""",
    "streaming.md": """
folder = "my-streaming-checkpoint"
camera = torch.randint(256, (3, 2, 64, 96, 3), dtype=torch.uint8).numpy()
""",
    "kernels.md": """
import runpy
from pathlib import Path
from kernels import get_local_kernel
code = Path("docs").resolve().parent / "csrc/make_kernel_repo.py"
Path("kernel").exists() or runpy.run_path(str(code))["assemble"]("kernel")
scan = get_local_kernel(Path("kernel"))
""",
    "README.md": """
camera = torch.randint(256, (3, 2, 64, 96, 3), dtype=torch.uint8).numpy()
""",
}
# What a page makes itself.
MADE = {
    "docs/knowledge.md": ["pictures"],
    "docs/streaming.md": ["clips"],
    "docs/tools.md": ["clips"],
    f"{SHIPPED}/README.md": ["clips"],
    "model_cards/videomamba-tiny-camera-stream/README.md": ["clips"],
}
# Snippets of packages that the tests do not ask for.
NEEDS = {"import openvino": "openvino", "from torchao": "torchao", "import get_local_kernel": "kernels"}


@pytest.fixture(scope="module")
def pages_hub(hub, tmp_path_factory):
    docs_commands.fill_hub(hub, tmp_path_factory.mktemp("hub"))
    return hub


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_tells_to_run_runs(page, pages_hub, python, tmp_path):
    """In the page's order, in one folder, with tiny models and clips; what must not fail is each command's exit."""
    docs_commands.write_data(tmp_path, MADE.get(page.relative_to(ROOT).as_posix(), ()))
    found = list(docs_commands.blocks(page))
    scripts = iter(docs_commands.words_of([text for _, language, text in found if language == "bash"], tmp_path))
    for line, language, text in found:
        if language == "bash":
            runs = [docs_commands.python_words(words) for words in next(scripts) if not left_out(words)]
        elif language == "python" and not any(word in text and not installed(NEEDS[word]) for word in NEEDS):
            before = f"TEXT = {text!r}\n{BEFORE}{BEFORE_ON.get(page.name, '')}"
            runs = [["-c", before + (text if torch.cuda.is_available() else text.replace('"cuda"', '"cpu"'))]]
        else:
            runs = []
        for words in runs:
            try:
                python.run(words, tmp_path, [tmp_path])
            except AssertionError as error:
                pytest.fail(f"{page.name}, line {line}: {words}\n{error}", pytrace=False)


def left_out(words):
    return any(f"{' '.join(words)} ".startswith(f"{beginning} ") for beginning in LEFT_OUT)


def installed(package):
    return importlib.util.find_spec(package) is not None

"""The Markdown pages: their links lead somewhere, and the README fits one screen."""

import re
import runpy
from pathlib import Path

import pytest


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

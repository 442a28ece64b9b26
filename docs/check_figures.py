"""Compare figures of the pages with the benchmark tables that they come from: `python docs/check_figures.py`.

A hidden comment right above a paragraph, a list or a table names the folder of examples/benchmarks/results/ and says
where figures come from: a column of the CSV file, `of` how its line begins. ` / ` divides, by a number too.

    <!-- figures h100
    452 = clips_per_s of inference,Swin3D-T,bfloat16,eager,16,64
    column 2 = median_ms of training,VideoMamba-S,bfloat16,eager,{0},{1}; peak_gib of training,VideoMamba-S,...
    -->

`column 2` checks that column in every row of a table, where the cell is not empty. {0} is the first word of the row;
`;` stands between the figures of one cell.
"""

import argparse
import csv
import re
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
# The folder, the lines of the comment, and the text below, up to an empty line.
COMMENT = re.compile(r"<!-- figures (\w+)\n(.*?)-->\n(?=(.*?)(?:\n\n|\Z))", re.DOTALL)
FIGURE = re.compile(r"\d+(?:\.\d+)?")


def value(expression, folder):
    """What the CSV files of a folder say; ValueError if not exactly one line begins so."""
    result = None
    for term in expression.split(" / "):
        column, _, key = term.partition(" of ")
        if key:
            found = [
                row[column]
                for file in sorted((ROOT / "examples" / "benchmarks" / "results" / folder).glob("*.csv"))
                for row in csv.DictReader(file.open(encoding="utf-8"))
                if (",".join(row.values()) + ",").startswith(key + ",")
            ]
            if len(found) != 1:
                raise ValueError(f"{len(found)} lines of {folder} begin with {key}")
            term = found[0]
        result = float(term) if result is None else result / float(term)
    return result


def pairs(rule, below):
    """The figures that a rule is about and their expressions."""
    left, _, expression = rule.partition(" = ")
    if not left.startswith("column "):
        if not re.search(rf"(?<![\d.]){re.escape(left)}(?!\.?\d)", re.sub(r"<!--.*?-->", "", below, flags=re.DOTALL)):
            raise ValueError(f"{left} is not in the text below")
        yield left, expression
        return
    for row in re.findall(r"^\|.*\|$", below, re.MULTILINE)[2:]:
        figures = FIGURE.findall(row.split("|")[int(left.removeprefix("column "))])
        words = re.findall(r"[\w.]+", row)
        yield from zip(figures, expression.format(*words).split("; "), strict=False)


def faults(text):
    """Sentences about the figures of a page that are not those of the tables."""
    for folder, rules, below in COMMENT.findall(text):
        for rule in rules.splitlines():
            try:
                for figure, expression in pairs(rule, below):
                    measured = value(expression, folder)
                    # Half of the last digit that stands there; the CSV files are rounded, too.
                    if abs(float(figure) - measured) > 0.5 * 10.0 ** -len(figure.partition(".")[2]) + 1e-4 * measured:
                        yield f"{figure} stands there, {measured:.4g} is measured: {expression}"
            except ValueError as error:
                yield str(error)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
    found = [
        f"{page.relative_to(ROOT)}: {fault}" for page in pages for fault in faults(page.read_text(encoding="utf-8"))
    ]
    sys.exit("\n".join(found) or None)

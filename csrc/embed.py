"""
Writes the kernels' sources into the package, as the module that the GPU backend compiles from.

    python csrc/embed.py            # after each change of a kernel
    python csrc/embed.py --check    # fails if the module is not what the files say
"""

import argparse
import ast
import re
import sys
from pathlib import Path


FOLDER = Path(__file__).resolve().parent
TARGET = FOLDER.parent / "modeling_videomamba" / "selective_scan_cuda_source.py"


def embedded():
    """The module's text."""
    parts = ["# GENERATED from the files of csrc/ by csrc/embed.py: change those, and run it again.\nSOURCES = {\n"]
    sources = {
        path.name: path.read_text(encoding="utf-8") for path in sorted([*FOLDER.glob("*.cu"), *FOLDER.glob("*.cuh")])
    }
    for name, source in sources.items():
        for number, line in enumerate(source.splitlines(), 1):
            # transformers looks for imports in the raw text of a module that comes with a checkpoint.
            if re.match(r"\s*(import|from)\b", line):
                sys.exit(f"csrc/{name}:{number}: no line may begin with `import` or `from`: {line.strip()}")
        parts.append(f'    "{name}": r"""{source}""",\n')
    text = "".join([*parts, "}\n"])
    if ast.literal_eval(text[text.index("{") :]) != sources:
        sys.exit(
            "A file of csrc/ holds three double quotes in a row, or a quote at its end; Python cannot carry that."
        )
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the module is up to date")
    arguments = parser.parse_args()
    text = embedded()
    if not arguments.check:
        TARGET.write_text(text, encoding="utf-8")
    elif not TARGET.exists() or TARGET.read_text(encoding="utf-8") != text:
        sys.exit(f"{TARGET.name} is not what csrc/ says: run `python csrc/embed.py`.")


if __name__ == "__main__":
    main()

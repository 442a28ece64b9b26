"""Prints pip constraints that hold each dependency at the lower bound that pyproject.toml gives it."""

import re
from pathlib import Path


text = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text(encoding="utf-8")
dependencies = re.search(r"^dependencies = \[(.*?)^\]", text, re.DOTALL | re.MULTILINE)[1]
for name, version in re.findall(r'"([\w-]+)>=([\d.]+)', dependencies):
    print(f"{name}=={version}")

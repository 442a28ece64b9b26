#!/usr/bin/env python
"""
Assembles a Kernel Hub repository of the selective scan, for models other than VideoMamba, and pushes it.

    python csrc/make_kernel_repo.py output-folder --push-to-hub you/videomamba-scan

The package `kernels` loads it: `get_kernel("you/videomamba-scan", version=1)`, or `get_local_kernel` from the folder.
Its public functions are in csrc/hub/; the modules that these import are copied from modeling_videomamba/.
"""

import argparse
import ast
import hashlib
import json
import shutil
import sys
from pathlib import Path


FOLDER = Path(__file__).resolve().parent
HUB, PACKAGE, LICENSE = FOLDER / "hub", FOLDER.parent / "modeling_videomamba", FOLDER.parent / "LICENSE"
NAME, LICENSE_NAME = "videomamba-scan", "Apache-2.0"
VERSION = 1  # of what the public functions take and return: the branch v1
# The same files: the kernels are compiled where they run, and plain PyTorch takes their place on a CPU.
BACKENDS = "cuda", "cpu"


def imported_modules(path):
    """Names of the modules of its own package that a module imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield from [node.module] if node.module else [alias.name for alias in node.names]


def find_modules():
    """The modules of csrc/hub/, and those of the package that they reach."""
    found, waiting = {}, sorted(HUB.glob("*.py"))
    while waiting:
        path = waiting.pop()
        if path.name in found:
            continue
        found[path.name] = path
        for name in imported_modules(path):
            here = HUB / f"{name}.py"
            waiting.append(here if here.exists() else PACKAGE / f"{name}.py")
    return [found[name] for name in sorted(found)]


def package_version():
    for node in ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "__version__":
            return ast.literal_eval(node.value)
    raise ValueError(f"{PACKAGE / '__init__.py'} has no `__version__`")


def assemble(output):
    """
    Write the repository.

    Args:
        output (`str` or `Path`): a folder that does not exist yet, or is empty.

    Returns:
        `list[str]`: the files, relative to it.

    Raises:
        ValueError: if something is in `output`.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not an empty folder. Name another one.")
    modules = find_modules()
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in modules)).hexdigest()[:12]
    for backend in BACKENDS:
        variant = output / "build" / f"torch-{backend}"
        variant.mkdir(parents=True)
        for path in modules:
            shutil.copyfile(path, variant / path.name)
        metadata = {
            "id": f"{NAME.replace('-', '_')}_{backend}_{digest}",
            "name": NAME,
            "version": VERSION,
            "license": LICENSE_NAME,
            "python-depends": [],
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(LICENSE, output / "LICENSE")
    card = (HUB / "README.md").read_text(encoding="utf-8")
    (output / "README.md").write_text(card.replace("PACKAGE_VERSION", package_version()), encoding="utf-8")
    return sorted(str(path.relative_to(output)) for path in output.rglob("*") if path.is_file())


def push(output, repo, files):
    """Upload the files to `main`, where the card is read, and to the version's branch, where `kernels` looks."""
    from huggingface_hub import HfApi

    api = HfApi()
    repo_id = api.create_repo(repo, repo_type="kernel", exist_ok=True).repo_id
    upload = {"repo_id": repo_id, "repo_type": "kernel", "folder_path": output, "allow_patterns": files}
    api.upload_folder(**upload)
    api.create_branch(repo_id, branch=f"v{VERSION}", repo_type="kernel", exist_ok=True)
    return api.upload_folder(**upload, revision=f"v{VERSION}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="the folder to write")
    parser.add_argument("--push-to-hub", metavar="REPO", help="also upload it to this repository of the Kernel Hub")
    arguments = parser.parse_args()
    try:
        files = assemble(arguments.output)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"Wrote {arguments.output}: {len(files)} files")
    if arguments.push_to_hub:
        try:
            url = push(arguments.output, arguments.push_to_hub, files)
        except Exception as error:  # no network, no token, no access: each has its own class
            sys.exit(f"error: {arguments.output} is written, but not pushed: {error}")
        print(f"Pushed to {url}")


if __name__ == "__main__":
    main()

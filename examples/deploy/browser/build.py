#!/usr/bin/env python
"""Writes the browser page with a model: a folder that any web server or a static Space can serve.

    python examples/deploy/browser/build.py model_cards/videomamba-tiny-camera-motion page
    python -m http.server --directory page

With a model that can stream (docs/streaming.md), the camera's labels come after every step of two frames.

`npm` fetches ONNX Runtime's WebAssembly files. The model is exported by ../export_onnx.py, or taken from a folder
that this script wrote.
"""

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path


HERE = Path(__file__).resolve().parent
RUNTIME = "onnxruntime-web@1.30.0"
RUNTIME_FILES = ("ort.wasm.min.js", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")


def fetch_runtime(folder):
    """ONNX Runtime's files for the browser, 15 MB, from its npm package into `folder`."""
    if shutil.which("npm") is None:
        raise FileNotFoundError("`npm` was not found: install Node.js, which includes npm.")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(["npm", "pack", "--silent", RUNTIME], cwd=scratch, check=True, stdout=subprocess.DEVNULL)
        (package,) = Path(scratch).glob("*.tgz")
        with tarfile.open(package) as archive:
            for name in RUNTIME_FILES:
                (folder / name).write_bytes(archive.extractfile(f"package/dist/{name}").read())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or a Hub repository, or a folder that export_onnx.py wrote")
    parser.add_argument("output", type=Path, help="folder to write")
    args = parser.parse_args()

    if (Path(args.model) / "model.onnx").exists():
        args.output.mkdir(parents=True, exist_ok=True)
        for name in ("model.onnx", "config.json", "video_preprocessor_config.json"):
            shutil.copy(Path(args.model) / name, args.output)
    else:
        export = [sys.executable, HERE.parent / "export_onnx.py", args.model, args.output, "--browser"]
        if status := subprocess.run(export).returncode:
            sys.exit(status)  # the script has said why
    for name in ("index.html", "app.js", "preprocessing.js", "stream.js", "README.md"):
        shutil.copy(HERE / name, args.output)
    if not all((args.output / "ort" / name).exists() for name in RUNTIME_FILES):
        print(f"Fetching {RUNTIME} with npm, 15 MB to keep ...", flush=True)
        fetch_runtime(args.output / "ort")
    print(f"Serve it: python -m http.server --directory {args.output}")


if __name__ == "__main__":
    main()

#!/usr/bin/env bash
# A package with a kernel of `numba.njit(cache=True)` is installed, used once, and uninstalled. It can still be imported:
# numba keeps its machine code in the package's own `__pycache__`, pip leaves files that it did not write, and Python
# takes the folder that is left for a namespace package. That empty package hides an editable installation made
# afterwards: its modules "have no attribute", or cannot be found.
#
# Why: setuptools' editable finder stands at the end of `sys.meta_path`, behind the search of site-packages.
# What to do: for an installed package, choose the folder of the cache before numba is imported (NUMBA_CACHE_DIR, or the
# user's cache folder); to mend an environment, delete the folder in site-packages.
#
# Seen on 2026-11-30, on a CPU:
#   Python 3.11.7, pip 23.2.1, numba 0.68.1, setuptools 84.2.1
#   installed and called: 3
#   left by pip uninstall: __pycache__/kernel.twice-4.py311.1.nbc __pycache__/kernel.twice-4.py311.nbi
#   imported after pip uninstall: a namespace package
#   after an editable installation: AttributeError: module 'tinykernel' has no attribute 'twice'
#   the same without numba's files: 3
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"${PYTHON:-python3}" -m venv "$folder/env"
python="$folder/env/bin/python"
"$python" -m pip install --quiet numba==0.68.1 numpy==2.4.6 setuptools==84.2.1
mkdir -p "$folder/project/source"
cd "$folder/project"
cat >pyproject.toml <<'TOML'
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "tinykernel"
version = "1"
[tool.setuptools]
packages = ["tinykernel"]
package-dir = { tinykernel = "source" }
TOML
echo 'from .kernel import twice' >source/__init__.py
cat >source/kernel.py <<'PYTHON'
import numba


@numba.njit(cache=True)
def twice(x):
    return x + x
PYTHON
cd "$folder"
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
use() { "$python" -c 'import tinykernel; print(int(tinykernel.twice(1.5)))' 2>&1 | tail -n 1 || true; }

"$python" -c 'import sys
from importlib.metadata import version
names = "pip", "numba", "setuptools"
print(f"Python {sys.version.split()[0]}", *(f"{name} {version(name)}" for name in names), sep=", ")'
"$python" -m pip install --quiet --no-build-isolation --no-deps "$folder/project"
first=$(use)
echo "installed and called: $first"
"$python" -m pip uninstall --quiet --yes tinykernel
left=$(cd "$site/tinykernel" 2>/dev/null && find . -type f | sort | sed 's|^\./||' | xargs) || left=""
echo "left by pip uninstall: ${left:-nothing}"
kind=$("$python" -c 'import tinykernel
print("a package with a file" if tinykernel.__file__ else "a namespace package")' 2>&1 | tail -n 1 || true)
echo "imported after pip uninstall: $kind"
"$python" -m pip install --quiet --no-build-isolation --no-deps --editable "$folder/project"
hidden=$(use)
echo "after an editable installation: $hidden"
rm -rf "${site:?}/tinykernel"
mended=$(use)
echo "the same without numba's files: $mended"
if [ "$first" = 3 ] && [[ $left == *.nbi* ]] && [ "$kind" = "a namespace package" ] && [[ $hidden == AttributeError* ]] &&
    [ "$mended" = 3 ]; then
    exit 0
fi
echo "The behaviour has changed." >&2
exit 1

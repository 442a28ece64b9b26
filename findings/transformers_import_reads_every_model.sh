#!/usr/bin/env bash
# `import transformers` is lazy: it loads no model. It opens and reads the source of every model all the same, to learn
# what each defines, and a second time when the first model, processor or Auto class is used. No cache keeps what it
# found: every start of every process pays, a quarter of a second of a core each time where the files are in memory.
#
# What to do: in short-lived commands, answer `--help` and check arguments before importing transformers; in process
# pools, fork workers from one process that has imported it.
#
# Seen on 2026-11-30, on a CPU:
#   Python 3.11.7, transformers 5.24.0
#   import transformers: 1698 source files of models opened, 0 of them executed
#   the same in a second process: 1698
#   from transformers import AutoConfig: 3405 opened, 1698 different ones
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"${PYTHON:-python3}" -m venv "$folder/env"
python="$folder/env/bin/python"
"$python" -m pip install --quiet transformers==5.24.0 huggingface_hub==2.4.0
cat >"$folder/count.py" <<'PYTHON'
import re
import sys
from importlib import import_module

MODEL = re.compile(r".*[\\/]transformers[\\/]models[\\/].+\.py$")
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" and MODEL.match(str(args[0])) else None)
module = import_module("transformers")
for name in sys.argv[1:]:
    getattr(module, name)
executed = sum(1 for name in sys.modules if re.match(r"transformers\.models\.\w+\.\w+", name))
print(len(opened), len(set(opened)), executed)
PYTHON
count() { "$python" "$folder/count.py" "$@" 2>/dev/null | tail -n 1; }

"$python" -c 'import sys
from importlib.metadata import version
print("Python", sys.version.split()[0] + ", transformers", version("transformers"))'
count >/dev/null # so that the next finds its bytecode
read -r opened different executed < <(count)
echo "import transformers: $opened source files of models opened, $executed of them executed"
read -r again _ _ < <(count)
echo "the same in a second process: $again"
read -r both both_different _ < <(count AutoConfig)
echo "from transformers import AutoConfig: $both opened, $both_different different ones"
if [ "$opened" -gt 1000 ] && [ "$executed" = 0 ] && [ "$again" = "$opened" ] && [ "$both" -ge "$((2 * opened))" ] &&
    [ "$both_different" -le "$((different + 50))" ]; then
    exit 0
fi
echo "The behaviour has changed." >&2
exit 1

"""Code that travels with a checkpoint: what its modules may import."""

import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports

import modeling_videomamba


MODULES = sorted(Path(modeling_videomamba.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.name)
def test_what_may_be_absent_is_imported_inside_try(module):
    """transformers refuses remote code with an import, outside of `try`, that is not installed."""
    allowed = {"PIL", "huggingface_hub", "numpy", "torch", "torchvision", "transformers"}
    assert set(get_imports(module)) - set(sys.stdlib_module_names) <= allowed

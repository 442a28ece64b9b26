"""Where this copy of the code registers its PyTorch operators: several copies may live in one process."""

import re


def _namespace(package):
    """A name that only this copy has, in the characters that PyTorch takes; a checkpoint's folder may have others."""
    name = package.replace("modeling_videomamba", "videomamba").replace(".", "_")
    return re.sub("[^A-Za-z0-9_]", lambda match: f"_{ord(match[0]):x}_", name)


NAMESPACE = _namespace(__package__)

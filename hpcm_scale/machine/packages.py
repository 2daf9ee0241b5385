"""What machine receivers take from other packages: their code, and the weights that lie in them."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from hpcm_scale.errors import UserError

MEND = "install hpcm-scale[machine]"
"""What a user can do about a missing package."""


def required(receiver: str, module: str, package: str, mend: str = MEND) -> ModuleType:
    """The module, imported.

    Raises UserError, which ends with `mend`, if `package`, which has the module, is not installed or does not load.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(f"{receiver} needs the package {package} ({error}); {mend}") from error


def packaged_file(receiver: str, package: str, path: str) -> Path:
    """A file inside an installed package, found without importing the package: `path` is from the package's folder.

    Raises UserError if the package is not installed, or does not have the file.
    """
    module = package.replace("-", "_")
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{receiver} needs the package {package}; {MEND} with a Python that {package} supports")
    file = Path(spec.submodule_search_locations[0], path)
    if not file.is_file():
        raise UserError(f"the package {package} that is installed has no {path}; {MEND} again")
    return file


def first_sentence(error: Exception) -> str:
    """What an error of another library says, without the advice that follows."""
    return str(error).strip().partition("\n")[0].partition(". ")[0].removesuffix(".")

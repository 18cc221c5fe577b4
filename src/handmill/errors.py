"""The one exception that a user's mistake raises, and the sentence for a missing extra."""

import importlib
from types import ModuleType


class UserError(Exception):
    """Something only the user can mend. The text is one sentence that names the file, line or key and the remedy.

    The command line prints it without a traceback and exits with 2.
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, of torch on any device or of the loader of libraries says that memory ran out."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or (isinstance(error, (RuntimeError, ImportError, OSError)) and any(
        words in said for words in ("can't allocate memory", "cannot allocate memory", "out of memory",
                                    "failed to map segment")))


def optional(module: str, extra: str) -> ModuleType:
    """Import an optional package, or say which extra brings it.

    Raises UserError when `module` is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != module.split(".")[0]:
            raise
        raise UserError(
            f"this needs the package '{module.split('.')[0]}', which is not installed: "
            f"pip install 'handmill[{extra}]'"
        ) from None

"""Handmill: your files in; a generative model you own out.

    import handmill
    folder = handmill.train("gpt", "runs/mine", ["data.paths=['notes/']"])
    print(handmill.load(folder).generate("Once"))
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["UserError", "check", "export", "load", "plan", "train"]

if TYPE_CHECKING:
    from handmill.errors import UserError
    from handmill.verbs.check import check
    from handmill.verbs.export import export
    from handmill.verbs.load import load
    from handmill.verbs.plan import plan
    from handmill.verbs.train import train


def __getattr__(name: str) -> Any:
    """The verbs are imported when first named, so that `import handmill` costs nothing."""
    import importlib

    homes = {"UserError": "errors", "load": "verbs.load", "train": "verbs.train", "check": "verbs.check",
             "export": "verbs.export", "plan": "verbs.plan"}
    if name not in homes:
        raise AttributeError(f"module 'handmill' has no attribute {name!r}")
    return getattr(importlib.import_module(f"handmill.{homes[name]}"), name)

"""One file a medium. `codec` loads what a medium is coded with."""

from pathlib import Path
from typing import Any


def codec(settings: Any, folder: Path) -> Any:
    """The trained codec of a recipe's [codec] table, from its folder."""
    from handmill.media import tokenizers

    return tokenizers.load(settings, folder)

"""What reaches the disk."""

import os
from pathlib import Path


def flush(path: Path) -> None:
    """Return only when the file, or the names in the folder, are on the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Text: the [data] table."""

from dataclasses import dataclass
from typing import Literal

from handmill.errors import UserError
from handmill.recipe import positive, within


@dataclass(frozen=True)
class Data:
    """The [data] table of a text model."""

    paths: tuple[str, ...] = ()  # files, folders and patterns such as "notes/**/*.md"
    licence: str = "unknown"  # of the sources, for the manifest
    field: str = "text"  # key of a jsonl record, column of a csv or parquet file
    document: Literal["file", "paragraph", "line"] = "file"  # what one document is in a text file
    shortest: int = 1  # characters; shorter documents are dropped
    clean: bool = True  # control characters, line ends, Unicode form, boilerplate lines; false: text as it is
    boilerplate: float = 0.3  # lines that more than this share of text files begin or end with go; 0: none
    near_duplicates: float = 0.8  # Jaccard similarity of 5-word shingles of a copy; 0: exact copies only
    split: Literal["hash", "tail"] = "hash"  # held out by hash of the text; tail: the last, or the end of one
    validation: float = 0.05  # share of the bytes
    test: float = 0.05  # share of the bytes; 0: no test split

    def __post_init__(self) -> None:
        positive(self, "shortest", "validation")
        within(self, 0.0, 0.5, "validation", "test")
        within(self, 0.0, 1.0, "boilerplate", "near_duplicates")
        if self.validation + self.test >= 1:
            raise UserError("validation + test must leave a part to train on: lower them")
        if 0 < self.near_duplicates < 0.3:
            raise UserError(f"near_duplicates = {self.near_duplicates:g} would take unlike texts for copies: "
                            "choose 0 (exact copies only) or a similarity from 0.3 to 1")

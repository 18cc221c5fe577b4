"""Small corpora and recipes for tests of the data."""

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

from handmill.data.packed import Packed
from handmill.data.text_prepare import prepare
from handmill.media.text import Data
from handmill.media.tokenizers import ByteSettings
from handmill.recipe import Recipe, Training

VOCABULARY = [a + b + c for a in ("ba", "ce", "di", "fo", "gu", "sta") for b in ("l", "mn", "rt", "s")
              for c in ("a", "en", "ing", "o", "ud", "y")]


def sentence(generator: random.Random, words: int = 12) -> str:
    return " ".join(generator.choices(VOCABULARY, k=words)).capitalize() + "."


def text(seed: int, sentences: int = 12) -> str:
    """A text that shares no run of five words with that of another seed, but by accident."""
    generator = random.Random(seed)
    return "\n".join(sentence(generator) for _ in range(sentences)) + "\n"


def recipe_of(*paths: Path | str, codec: Any = None, seed: int = 1, **data: Any) -> Recipe:
    settings = Data(paths=tuple(map(str, paths)), **data)
    return Recipe("test", "text", "autoregressive", seed, settings, codec or ByteSettings(), None, None, Training(),
                  None, None)


def prepared(cache: Path, *paths: Path | str, **settings: Any) -> Packed:
    return prepare(recipe_of(*paths, **settings), cache, progress=False)


def documents(packed: Packed, split: str) -> list[str]:
    """The documents of a split as texts."""
    codec, tokens = packed.codec(), packed.tokens(split)
    starts = [*packed.starts(split).tolist(), len(tokens)]
    return [codec.decode(tokens[a:b]) for a, b in pairwise(starts)]


def everything(packed: Packed) -> list[str]:
    """The documents of all splits, sorted."""
    return sorted(text for split in ("train", "validation", "test") for text in documents(packed, split))

"""What the autoregressive family reads: packed text, packed music, or the codes of images.

N sequences, T context, R rows of an evaluation, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from handmill.data.noise import uniform
from handmill.data.order import draw
from handmill.data.streams import Streams, in_rows
from handmill.data.windows import Windows, in_turn
from handmill.errors import UserError
from handmill.recipe import Recipe
from handmill.training.batches import Batch

EVALUATED_AT_ONCE = 8192  # tokens
ROWS = 16  # that held-out tokens are read in by a network that carries its state
SHOWN = 4  # pieces in the picture of training

Places = NDArray[np.int64]


@dataclass
class Source:
    """Batches and held-out sequences, and how a network shows what it has learnt."""

    batch: Callable[[Places], Batch]
    held_out: Tensor  # (N, T + 1), or (turns, R, T + 1) where they are `streamed`
    sample: Callable[[nn.Module], str]
    length: int  # tokens predicted of an element of a batch
    unit: str = "token"
    picture: Path | None = None  # the file that `sample` draws into
    streamed: bool = False  # elements of successive batches follow each other
    per: dict[str, int] = field(default_factory=dict)  # what else the held-out loss is told by -> how many of it


def of(network: Any, codec: Any, prepared: Any, recipe: Recipe, out: Path) -> Source:
    """The source for a recipe's medium. Raises UserError for data and settings that do not go together."""
    if recipe.medium == "image":
        return of_codes(codec, prepared, recipe, out)
    streamed = bool(getattr(network, "carries", False))
    return (of_music if recipe.medium == "music" else of_text)(codec, prepared, recipe, out, streamed)


def of_text(codec: Any, packed: Any, recipe: Recipe, out: Path, streamed: bool) -> Source:
    """Windows of a packed token stream, some with their middle last; or segments of it that follow each other."""
    def sample(module: nn.Module) -> str:
        from handmill.families.autoregressive import Sampling, generate

        pieces = generate(module, codec, [""], Sampling(temperature=0.8, max_tokens=60), recipe.seed)
        return " ".join("".join(p.text for p in pieces).split())

    source = _packed(packed, recipe, sample, streamed)
    rate = recipe.objective.middle
    if not rate:
        return source
    from handmill.data.middle import Middle

    if streamed:
        raise UserError("objective.middle goes with windows that stand alone, and this network carries its state from "
                        "one to the next: set it to 0, or network.memory = 0")
    windows, middle = source.batch, Middle(codec, recipe.seed, rate, recipe.objective.suffix_first,
                                             recipe.objective.middle_lines)

    def batch(places: Places) -> Tensor:
        some = windows(places)
        assert isinstance(some, Tensor)
        return middle(some, places)

    source.batch = batch
    return source


def _packed(packed: Any, recipe: Recipe, sample: Callable[[nn.Module], str], streamed: bool, head: int = 0) -> Source:
    """Windows, or segments, of packed tokens; a window within a document begins with its first `head` tokens."""
    context, training, tokens = recipe.network.context, recipe.training, packed.tokens("train")
    validation = packed.tokens("validation")
    if streamed:
        held_out = in_rows(validation, context, ROWS, training.evaluate_items)
        return Source(Streams(tokens, context, training.batch, recipe.seed).batch, held_out, sample, context,
                      streamed=True)
    starts = packed.starts("train") if head else None
    windows = Windows(tokens, context, recipe.seed, starts, head)
    return Source(windows.batch, in_turn(validation, context, training.evaluate_items), sample, context)


def of_music(codec: Any, pieces: Any, recipe: Recipe, out: Path, streamed: bool) -> Source:
    """As of text, in other keys now and then; conditions are given, and so is a melody where the codec says so."""
    picture = out / "samples" / "training.png"
    source = _packed(pieces, recipe, _shown(codec, recipe, picture), streamed, len(codec.asked))
    source.picture, plain = picture, source.batch
    told = bool(codec.asked) or getattr(codec.settings, "melody", False)
    epochs = Streams(pieces.tokens("train"), recipe.network.context, recipe.training.batch, recipe.seed).epochs \
        if streamed else None

    def batch(places: Places) -> Batch:
        some = plain(places)
        tokens = some if isinstance(some, Tensor) else some["tokens"]
        which = places if epochs is None else epochs(places) * recipe.training.batch + places % recipe.training.batch
        tokens = transposed(codec, tokens, which, recipe.data.transpose, recipe.data.transpose_share, recipe.seed)
        tokens = hidden(codec, tokens, which, recipe.objective.label_dropout, recipe.seed)
        if not told:
            return tokens if isinstance(some, Tensor) else some | {"tokens": tokens}
        counted = torch.from_numpy(np.stack([~codec.given(row)[1:] for row in tokens.numpy()]))  # (N, T)
        return ({} if isinstance(some, Tensor) else some) | {"tokens": tokens, "counted": counted}

    source.batch = batch
    if codec.kind == "frames":
        source.per = {"nats_per_frame": max(1, codec.steps(source.held_out[..., 1:].flatten().numpy()))}
    return source


def transposed(codec: Any, tokens: Tensor, places: Places, most: int, share: float, seed: int) -> Tensor:
    """A `share` of the rows (N, T) in a key drawn from (seed, place), `most` semitones away at most.

    A row stays as it is where a pitch would leave the vocabulary.
    """
    if not most:
        return tokens
    chances = uniform(draw(seed, "transpose"), torch.from_numpy(places), 2)  # (N, 2)
    shifts = torch.where(chances[:, 0] < share, (chances[:, 1] * (2 * most + 1)).long() - most, 0)  # (N,)
    rows = [codec.transpose(row, int(by)) for row, by in zip(tokens.numpy(), shifts, strict=True)]
    return torch.stack([old if new is None else torch.from_numpy(new.astype(np.int64))
                        for old, new in zip(tokens, rows, strict=True)])


def hidden(codec: Any, tokens: Tensor, places: Places, share: float, seed: int) -> Tensor:
    """The rows (N, T) with each kind of condition unknown in a `share` of them, so that none need be asked for."""
    if not codec.asked:
        return tokens
    chances = uniform(draw(seed, "conditions"), torch.from_numpy(places), len(codec.asked))  # (N, kinds)
    for section, chance in zip(codec.asked, chances.T, strict=True):
        first = codec.first[section]
        told = (tokens >= first) & (tokens < first + codec.count[section])
        tokens = torch.where(told & (chance < share)[:, None], first, tokens)
    return tokens


def _shown(codec: Any, recipe: Recipe, picture: Path) -> Callable[[nn.Module], str]:
    """Pieces as piano rolls, and a line about the first."""
    def sample(module: nn.Module) -> str:
        from dataclasses import replace

        from handmill.families.composing import Wish, compose
        from handmill.media import performing, piano_roll
        from handmill.media.notes import Piece

        sampling = replace(recipe.sampling, max_tokens=min(recipe.sampling.max_tokens, 200))
        made = compose(module, codec, [Wish()] * SHOWN, sampling, recipe.seed)
        scores = [codec.score(tokens) if codec.kind == "frames" else codec.decode(tokens) for tokens in made]
        pieces = [Piece(f"sample {i + 1}", performing.seconds(score)) for i, score in enumerate(scores)]
        picture.parent.mkdir(parents=True, exist_ok=True)
        piano_roll.save(picture, pieces)
        return f"{len(scores[0].notes)} notes, {scores[0].seconds(scores[0].end):.0f} s, in {picture}"

    return sample


def of_codes(codec: Any, prepared: Any, recipe: Recipe, out: Path) -> Source:
    """The codes of each image after the token of its class, which is hidden now and then.

    Raises UserError for a context that does not hold an image.
    """
    from handmill.data.items import Items, enough
    from handmill.families.previews import samples

    if recipe.network.context < codec.length:
        raise UserError(f"network.context = {recipe.network.context} is less than the {codec.length} codes of an image:"
                        f" set network.context = {codec.length}")
    enough(prepared, recipe.training.batch)
    items, null = Items(prepared, "train", codec, recipe.data, recipe.seed), len(codec.classes)
    items.keep()
    key = draw(recipe.seed, "labels")

    def batch(places: Places) -> Tensor:
        some = items.batch(places)
        told = uniform(key, some["place"], 1)[:, 0] >= recipe.objective.label_dropout
        return codec.tokens(some["x"], torch.where(told, some["label"], null))

    most = recipe.training.evaluate_items // codec.length
    held = Items(prepared, "validation", codec, recipe.data, recipe.seed).first(most)
    held_out = codec.tokens(held["x"], held["label"])
    sample, picture = samples(codec, recipe, out)
    return Source(batch, held_out, sample, held_out.shape[1] - 1, "code", picture)

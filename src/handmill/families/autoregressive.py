"""The autoregressive family: a text is made one token at a time, each drawn given all before it.

One sampler serves every network that is called alike: logits, state = network(tokens (B, T), state). What a network
remembers is its `state`, a (named) tuple of tensors whose first axis is the row: a decoder's keys and values, what a
recurrent network carries, or what an ONNX runtime gives out. A network that `carries` can go on from its state for
ever; any other one sees its context, and where that is full its last half becomes the prompt.

B rows (samples made at once), T positions, V vocabulary.
"""

import codecs
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from handmill.errors import UserError
from handmill.families.sampling import draw, filtered
from handmill.recipe import Recipe, positive, within

SEEDS = 2**63  # seeds are below this and not negative
WITNESSES = 32  # tokens that the receipt keeps of a greedy sample


@dataclass(frozen=True)
class Objective:
    """The [objective] table: the likelihood of each token given those before it."""

    label_dropout: float = 0.1  # share of images whose class is hidden, so that one can be made without a class; of
    # music, of the windows in which a condition is
    middle: float = 0.0  # share of a text's training windows that are learnt with their middle last; 0: none
    suffix_first: float = 0.5  # share of these in which the suffix stands before the prefix
    middle_lines: float = 0.0  # share of these whose middle is whole lines; the others are cut anywhere

    def __post_init__(self) -> None:
        within(self, 0.0, 1.0, "label_dropout", "middle", "suffix_first", "middle_lines")


@dataclass(frozen=True)
class Sampling:
    """The [sampling] table: how a token is drawn and when a sample ends."""

    temperature: float = 1.0  # divides the logits; 0: always the likeliest token
    top_k: int = 0  # tokens to choose from; 0: all
    top_p: float = 1.0  # probability mass to choose from, in (0, 1]
    min_p: float = 0.0  # least probability of a token, as a share of the likeliest one's
    repetition_penalty: float = 1.0  # above 1: tokens already in the text become less likely
    max_tokens: int = 256  # new tokens a sample
    stop: tuple[str, ...] = ()  # a sample ends before the one of these strings that is complete first
    voice_temperatures: tuple[float, ...] = ()  # of music on a grid: of a chord's notes from the highest down, the last
    # one of all below it; none: `temperature` of all

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature = {self.temperature} must be 0 or more")
        if self.top_k < 0:
            raise UserError(f"top_k = {self.top_k} must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p} must be above 0 and at most 1")
        within(self, 0.0, 1.0, "min_p")
        within(self, 0.1, 10.0, "repetition_penalty")
        positive(self, "max_tokens")
        if not all(0 <= t < float("inf") for t in self.voice_temperatures):
            raise UserError(f"voice_temperatures = {list(self.voice_temperatures)} must all be 0 or more")
        if "" in self.stop:
            raise UserError("stop holds an empty string: leave it out, or name the text that ends a sample")


class Piece(NamedTuple):
    """What `generate` yields: some new text of one sample."""

    row: int  # which sample: its place among the prompts
    text: str  # "" while nothing may be shown yet
    tokens: int  # new tokens drawn so far, without the end token
    finish: str  # "" while the sample goes on, then "stop" (end token or stop string) or "length"


class Text:
    """Joins tokens into text as they come, holding back what may still change.

    Held back are the bytes of an unfinished UTF-8 character and a tail that may grow into a stop string.
    """

    def __init__(self, token_bytes: Sequence[bytes], stop: Sequence[str] = ()) -> None:
        self.token_bytes, self.stop = token_bytes, stop
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that this token makes certain; sets `stopped` when a stop string has come."""
        return self._take(self.decoder.decode(self.token_bytes[token]))

    def end(self) -> str:
        """The text still held back; an unfinished character becomes U+FFFD."""
        shown = self._take(self.decoder.decode(b"", final=True)) + self.held
        self.held = ""
        return shown

    def _take(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self.held + new
        found = [(at + len(stop), at) for stop in self.stop if (at := text.find(stop)) >= 0]
        if found:  # the first to be complete, so that it does not matter how tokens cut the text
            self.stopped, self.held = True, ""
            return text[:min(found)[1]]
        keep = max((_overlap(text, stop) for stop in self.stop), default=0)
        shown, self.held = text[:len(text) - keep], text[len(text) - keep:]
        return shown


def _overlap(text: str, stop: str) -> int:
    """The length of the longest tail of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def encode(codec: Any, prompt: str) -> list[int]:
    """The end token, at which every document begins, and then the prompt's tokens.

    Raises UserError naming a character that a character tokenizer has never seen.
    """
    unknown = getattr(codec, "unknown", None)
    tokens = [int(token) for token in codec.encode(prompt)]
    if unknown is not None and unknown in tokens:
        character = prompt[tokens.index(unknown)]  # this codec has one token a character
        raise UserError(f"the prompt holds the character {character!r}, which is not in the training text: "
                        "leave it out, or train with a byte or bpe codec")
    return [codec.end, *tokens]


def generate(network: Any, codec: Any, prompts: Sequence[str | Sequence[int]], sampling: Sampling, seed: int,
             cached: bool = True, first: int = 0) -> Iterator[Piece]:
    """Continue every prompt, all at once, yielding each sample's new text as soon as it is certain.

    A prompt is a text, or tokens that are taken as they are. Of one longer than the network's context the tail is
    kept, unless the network carries its state. When the context is full, its last half becomes the prompt and
    sampling goes on, with the state kept from token to token (`cached`) or without. The repetition penalty sees the
    prompt and the new tokens that are in the context, but not the end token. The codec's special tokens are never
    drawn. The draws of sample i depend on (seed, first + i) alone, so a batch may be cut anywhere without changing
    the texts.

    `network` is a network in evaluation mode, or what is called alike: network.settings.context, and perhaps
    network.carries and network.padded.
    Raises UserError for an unknown character in a prompt, before anything is made.
    """
    assert 0 <= seed < SEEDS, seed
    assert not getattr(network, "training", False), "call network.eval() first: dropout disturbs samples"
    rows = []
    for i, prompt in enumerate(prompts):
        tokens = encode(codec, prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
        rows.append(_Row(i, tokens[-limit(network):], Text(codec.token_bytes, sampling.stop)))
    return _generate(network, rows, codec, sampling, seed, cached, first)


@torch.inference_mode()
def fixed_length(network: Any, first: Tensor, length: int, codes: int, sampling: Sampling, seed: int,
                 rows: Sequence[int]) -> Tensor:
    """`length` tokens below `codes` after each of the tokens `first` (B,): (B, length) int64.

    The draws of row i depend on (seed, rows[i]) alone.
    """
    made, state, tokens = torch.zeros(len(first), 0, dtype=torch.int64, device=first.device), None, first[:, None]
    for step in range(length):
        logits, state = network(tokens, state)  # (B, 1, V)
        logits = logits[:, -1, :codes].float()
        seen = torch.zeros_like(logits, dtype=torch.bool)
        if sampling.repetition_penalty != 1:
            seen.scatter_(1, made, True)
        logits = filtered(logits, seen, temperature=sampling.temperature, k=sampling.top_k, p=sampling.top_p,
                          least=sampling.min_p, penalty=sampling.repetition_penalty)
        tokens = draw(logits, seed, rows, step)[:, None].to(first)
        made = torch.cat((made, tokens), 1)
    return made


def greedy(network: Any, prompt: Sequence[int], count: int, cached: bool = True) -> list[int]:
    """The likeliest next token, `count` times over: `generate` at temperature 0, but past the end token."""
    longest, reading, tokens = limit(network), None, []
    window = [int(token) for token in prompt][-longest:]
    for _ in range(count):
        logits, reading = following(network, [window], reading if cached else None)
        tokens.append(int(logits.argmax()))
        window = slide(window, tokens[-1], longest)
    return tokens


def witness(network: Any, codec: Any, prepared: Any, recipe: Recipe) -> dict[str, Any]:
    """The likeliest continuation of the first held-out tokens, for the receipt: what a served copy must repeat."""
    prompt = [int(token) for token in prepared.tokens("validation")[:16]]
    return {"prompt_tokens": prompt, "tokens": greedy(network, prompt, WITNESSES)}


def faithful(network: Any, recipe: Recipe, kept: dict[str, Any]) -> bool:
    """Whether a network continues as the receipt says, where it does."""
    if "tokens" not in kept:
        return True
    return greedy(network, kept["prompt_tokens"], len(kept["tokens"])) == kept["tokens"]


@dataclass
class _Row:
    """One sample in the making."""

    number: int
    window: list[int]  # the tokens that the next one is drawn from
    text: Text
    made: int = 0  # new tokens
    finish: str = ""

    def add(self, token: int, end: int, most: int, longest: int) -> Piece:
        """Take a drawn token; a sample has `most` new ones, a window `longest`."""
        shown = ""
        if token != end:
            self.made += 1
            self.window = slide(self.window, token, longest)
            shown = self.text.add(token)
        if token == end or self.text.stopped:
            self.finish = "stop"
        elif self.made == most:
            self.finish = "length"
        if self.finish:
            shown += self.text.end()
        return Piece(self.number, shown, self.made, self.finish)


def _generate(network: Any, rows: list[_Row], codec: Any, sampling: Sampling, seed: int, cached: bool,
              first: int) -> Iterator[Piece]:
    reading, special = None, torch.tensor([*getattr(codec, "special", {}).values()], dtype=torch.int64)
    for step in range(sampling.max_tokens):
        logits, reading = following(network, [row.window for row in rows], reading if cached else None)  # (B, V)
        logits = logits.index_fill(1, special.to(logits.device), -1e9)  # finite, as the filters want it
        seen = torch.zeros_like(logits, dtype=torch.bool)
        if sampling.repetition_penalty != 1:
            for i, row in enumerate(rows):
                seen[i, row.window[-network.settings.context:]] = True
            seen[:, codec.end] = False
        logits = filtered(logits, seen, temperature=sampling.temperature, k=sampling.top_k, p=sampling.top_p,
                          least=sampling.min_p, penalty=sampling.repetition_penalty)
        tokens = draw(logits, seed, [first + row.number for row in rows], step).tolist()
        for row, token in zip(rows, tokens, strict=True):
            yield row.add(token, codec.end, sampling.max_tokens, limit(network))
        on = [i for i, row in enumerate(rows) if not row.finish]
        if not on:
            return
        if len(on) < len(rows):
            rows, reading = [rows[i] for i in on], reading.rows(on)


class Reading(NamedTuple):
    """What a network has read of several windows, all of them but for what comes next."""

    state: Any
    lengths: tuple[int, ...]  # tokens of each window that are in the state
    width: int  # positions in the state: the longest window that was read, its padding included

    def rows(self, rows: Sequence[int]) -> "Reading":
        """Of these rows alone."""
        return Reading(_mapped(lambda x: x[list(rows)], self.state), tuple(self.lengths[i] for i in rows), self.width)


def limit(network: Any) -> int:
    """The longest window of tokens that a network reads: its context, or any where it carries its state."""
    return sys.maxsize if getattr(network, "carries", False) else int(network.settings.context)


def slide(window: list[int], token: int, longest: int) -> list[int]:
    """The window with the token added; only its last half where it would outgrow `longest`."""
    grown = [*window, token]
    return grown if len(grown) <= longest else grown[-max(1, longest // 2):]


@torch.inference_mode()
def following(network: Any, windows: list[list[int]], reading: Reading | None) -> tuple[Tensor, Reading]:
    """Logits (B, V) of the token after each window, and what was read, all of the windows.

    Goes on from `reading` where that holds every window but for its last token, and else reads the windows anew.
    """
    lengths = tuple(map(len, windows))
    device = next(network.parameters()).device if isinstance(network, nn.Module) else torch.device("cpu")
    if reading is not None and reading.width < limit(network) and all(
            read + 1 == length for read, length in zip(reading.lengths, lengths, strict=True)):
        last = torch.tensor([window[-1:] for window in windows], device=device)  # (B, 1)
        logits, state = network(last, reading.state)
        return logits[:, -1].float(), Reading(state, lengths, reading.width + 1)
    if len(set(lengths)) == 1 or hasattr(network, "padded"):
        logits, state = _read(network, windows, device)
        return logits, Reading(state, lengths, max(lengths))
    return _read_apart(network, windows, lengths)


def _read(network: Any, windows: list[list[int]], device: torch.device) -> tuple[Tensor, Any]:
    """The windows from their beginning, padded on the left to one length; long ones a context at a time."""
    padding = [max(map(len, windows)) - len(window) for window in windows]
    tokens = torch.tensor([[0] * pad + window for pad, window in zip(padding, windows, strict=True)], device=device)
    state = network.padded(torch.tensor(padding, device=device)) if any(padding) else None
    for piece in tokens.split(network.settings.context, 1):  # (B, T)
        logits, state = network(piece, state)
    return logits[:, -1].float(), state


def _read_apart(network: Any, windows: list[list[int]], lengths: Sequence[int]) -> tuple[Tensor, Reading]:
    """For a network that knows no padding: the windows of each length by themselves, and their states joined."""
    order = sorted(range(len(windows)), key=lambda i: lengths[i])
    groups = [[i for i in order if lengths[i] == length] for length in sorted(set(lengths))]
    parts = [following(network, [windows[i] for i in group], None) for group in groups]
    back = sorted(range(len(order)), key=lambda place: order[place])
    state = _joined([reading.state for _, reading in parts])
    reading = Reading(state, tuple(lengths[i] for i in order), max(lengths))
    return torch.cat([logits for logits, _ in parts])[back], reading.rows(back)


def _mapped(work: Any, state: Any) -> Any:
    """The state with every tensor in its (named) tuples changed by `work`."""
    if isinstance(state, Tensor):
        return work(state)
    if not isinstance(state, tuple):
        return state
    parts = [_mapped(work, part) for part in state]
    return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)


def _joined(states: list[Any]) -> Any:
    """The rows of several states, one after another."""
    if isinstance(states[0], Tensor):
        return torch.cat(states)
    if not isinstance(states[0], tuple):
        return states[0]
    parts = [_joined([*part]) for part in zip(*states, strict=True)]
    return type(states[0])(*parts) if hasattr(states[0], "_fields") else tuple(parts)

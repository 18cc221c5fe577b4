"""The autoregressive family: a text is made one token at a time, each drawn given all before it.

B rows (samples made at once), T positions, S positions so far, V vocabulary.
"""

import codecs
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

    label_dropout: float = 0.1  # share of images whose class is hidden, so that one can be made without a class

    def __post_init__(self) -> None:
        within(self, 0.0, 1.0, "label_dropout")


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


def generate(network: Any, codec: Any, prompts: Sequence[str], sampling: Sampling, seed: int,
             cached: bool = True, first: int = 0) -> Iterator[Piece]:
    """Continue every prompt, all at once, yielding each sample's new text as soon as it is certain.

    Of a prompt longer than the network's context the tail is kept. When the context is full, its last half
    becomes the prompt and sampling goes on, with the key/value cache (`cached`) or without. The repetition
    penalty sees the prompt and the new tokens that are in the context, but not the end token. The draws of
    sample i depend on (seed, first + i) alone, so a batch may be cut anywhere without changing the texts.

    `network` is a Decoder in evaluation mode, or what is called alike: logits, state = network(tokens,
    state), network.settings.context, network.padded.
    Raises UserError for an unknown character in a prompt, before anything is made.
    """
    assert 0 <= seed < SEEDS, seed
    assert not getattr(network, "training", False), "call network.eval() first: dropout disturbs samples"
    rows = [_Row(i, encode(codec, prompt)[-network.settings.context:], Text(codec.token_bytes, sampling.stop))
            for i, prompt in enumerate(prompts)]
    return _generate(network, rows, codec.end, sampling, seed, cached, first)


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
    context = network.settings.context
    window, state, tokens = [int(token) for token in prompt][-context:], None, []
    for _ in range(count):
        logits, state = _next(network, [window], state if cached else None)
        tokens.append(int(logits.argmax()))
        window = _slide(window, tokens[-1], context)
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

    def add(self, token: int, end: int, longest: int, context: int) -> Piece:
        """Take a drawn token."""
        shown = ""
        if token != end:
            self.made += 1
            self.window = _slide(self.window, token, context)
            shown = self.text.add(token)
        if token == end or self.text.stopped:
            self.finish = "stop"
        elif self.made == longest:
            self.finish = "length"
        if self.finish:
            shown += self.text.end()
        return Piece(self.number, shown, self.made, self.finish)


def _generate(network: Any, rows: list[_Row], end: int, sampling: Sampling, seed: int, cached: bool,
              first: int) -> Iterator[Piece]:
    state = None
    for step in range(sampling.max_tokens):
        logits, state = _next(network, [row.window for row in rows], state if cached else None)  # (B, V)
        seen = torch.zeros_like(logits, dtype=torch.bool)
        if sampling.repetition_penalty != 1:
            for i, row in enumerate(rows):
                seen[i, row.window] = True
            seen[:, end] = False
        logits = filtered(logits, seen, temperature=sampling.temperature, k=sampling.top_k, p=sampling.top_p,
                          least=sampling.min_p, penalty=sampling.repetition_penalty)
        tokens = draw(logits, seed, [first + row.number for row in rows], step).tolist()
        for row, token in zip(rows, tokens, strict=True):
            yield row.add(token, end, sampling.max_tokens, network.settings.context)
        on = [i for i, row in enumerate(rows) if not row.finish]
        if not on:
            return
        rows, state = [rows[i] for i in on], state if len(on) == len(rows) else _rows_of(state, on)


def _slide(window: list[int], token: int, context: int) -> list[int]:
    """The window with the token added; only its last half where it would outgrow the context."""
    grown = [*window, token]
    return grown if len(grown) <= context else grown[-max(1, context // 2):]


@torch.inference_mode()
def _next(network: Any, windows: list[list[int]], state: Any) -> tuple[Tensor, Any]:
    """Logits (B, V) of the token after each window, and the state with all windows in it.

    Goes on from `state` where it holds every window but for its last token, and else reads the windows anew,
    padded on the left to one length.
    """
    device = next(network.parameters()).device if isinstance(network, nn.Module) else torch.device("cpu")
    if state is not None and state.length < network.settings.context:
        padding = [0] * len(windows) if state.padding is None else state.padding.tolist()
        if all(state.length - pad + 1 == len(w) for w, pad in zip(windows, padding, strict=True)):
            logits, state = network(torch.tensor([w[-1:] for w in windows], device=device), state)
            return logits[:, -1].float(), state
    longest = max(len(w) for w in windows)
    padding = [longest - len(w) for w in windows]
    tokens = [[0] * pad + w for w, pad in zip(windows, padding, strict=True)]  # (B, T)
    start = network.padded(torch.tensor(padding, device=device)) if any(padding) else None
    logits, state = network(torch.tensor(tokens, device=device), start)
    return logits[:, -1].float(), state


def _rows_of(state: Any, rows: list[int]) -> Any:
    """The state of some rows: every tensor in its (named) tuples indexed at the first axis."""
    if isinstance(state, Tensor):
        return state[rows]
    if not isinstance(state, tuple):
        return state
    parts = [_rows_of(part, rows) for part in state]
    return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)

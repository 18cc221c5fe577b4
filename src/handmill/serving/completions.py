"""POST /v1/completions: text, whole or streamed, shaped as OpenAI's."""

import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from handmill import recipe as recipes
from handmill.families import filling
from handmill.families.autoregressive import SEEDS, Piece, Sampling, encode, generate, limit
from handmill.folder import Model
from handmill.serving.answers import Refusal, as_error, no_others, weights
from handmill.serving.engine import Limits

# what OpenAI's interface has and this one has not, with the values that some clients send without meaning anything
NEUTRAL: dict[str, tuple[Any, ...]] = {"logprobs": (), "best_of": (1,), "frequency_penalty": (0,),
                                       "presence_penalty": (0,), "logit_bias": ({},)}
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_tokens")


class StreamOptions(BaseModel):
    """What a stream says besides text."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = Field(False, description="end with a chunk that holds the token counts")


class Completion(BaseModel):
    """A request for text. What is left out is as in the model's recipe, under [sampling]."""

    model_config = ConfigDict(extra="allow")  # `no_others` says which
    model: str = Field(description="a name that /v1/models lists")
    prompt: str | list[str] = Field("", description="text to continue, or several; empty: a new document")
    max_tokens: int | None = Field(None, ge=1, description="new tokens a sample")
    temperature: float | None = Field(None, ge=0, description="0: always the likeliest token")
    top_p: float | None = Field(None, gt=0, le=1, description="probability mass to choose from")
    n: int = Field(1, ge=1, description="samples a prompt")
    suffix: str | None = Field(None, description="text after a gap: what stands between prompt and suffix is made, by "
                                                 "a model taught to fill in the middle; of long texts it reads what is "
                                                 "nearest the gap")
    stream: bool = Field(False, description="answer in server-sent events as the text is made")
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = Field(None, description="text that ends a sample and is not part of it")
    seed: int | None = Field(None, ge=0, lt=SEEDS, description="the same seed gives the same text")
    echo: bool = Field(False, description="begin each text with its prompt")
    user: str | None = Field(None, description="ignored")
    top_k: int | None = Field(None, ge=0, description="tokens to choose from; 0: all")
    min_p: float | None = Field(None, ge=0, le=1, description="least share of the best token's probability")
    repetition_penalty: float | None = Field(None, ge=0.1, le=10, description="above 1: less repetition")


class Answer:
    """One request on its way: its checked settings, its work, and the chunks made of its pieces."""

    def __init__(self, asked: Completion, model: Model, limits: Limits) -> None:
        no_others(asked, NEUTRAL)
        prompts = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
        if not prompts or len(prompts) * asked.n > limits.samples:
            raise Refusal(400, f"prompts times n must be from 1 to {limits.samples}", "n")
        self.asked, self.model, self.sampling = asked, model, _sampling(asked, model, limits)
        read = [_tokens(asked, model, prompt, self.sampling.max_tokens) for prompt in prompts]
        self.prompt_tokens = sum(map(len, read))
        self.prompts = [prompt for prompt in prompts for _ in range(asked.n)]
        self.read = [tokens for tokens in read for _ in range(asked.n)]
        self.seed = secrets.randbelow(2**32) if asked.seed is None else asked.seed
        self.made = [0] * len(self.prompts)  # new tokens of each sample
        self.head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion",
                     "created": int(time.time()), "model": asked.model, "system_fingerprint": weights(model)}

    def work(self, _dropped: Callable[[], bool]) -> Iterable[Piece]:
        return generate(self.model.network, self.model.codec, self.read, self.sampling, self.seed)

    def choice(self, index: int, text: str, finish: str) -> dict[str, Any]:
        return {"index": index, "text": text, "finish_reason": finish or None, "logprobs": None}

    def usage(self) -> dict[str, int]:
        total = sum(self.made)
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": total,
                "total_tokens": self.prompt_tokens + total}

    async def whole(self, pieces: AsyncIterator[Piece]) -> dict[str, Any]:
        """The answer in one object."""
        texts = list(self.prompts) if self.asked.echo else [""] * len(self.prompts)
        finishes = [""] * len(self.prompts)
        async for piece in pieces:
            texts[piece.row] += piece.text
            finishes[piece.row], self.made[piece.row] = piece.finish, piece.tokens
        choices = [self.choice(i, *both) for i, both in enumerate(zip(texts, finishes, strict=True))]
        return self.head | {"choices": choices, "usage": self.usage()}

    async def events(self, pieces: AsyncIterator[Piece]) -> AsyncIterator[str]:
        """The answer as server-sent events, [DONE] last."""
        if self.asked.echo:
            for i, prompt in enumerate(self.prompts):
                yield _event(self.head | {"choices": [self.choice(i, prompt, "")]})
        try:
            async for piece in pieces:
                self.made[piece.row] = piece.tokens
                if piece.text or piece.finish:
                    yield _event(self.head | {"choices": [self.choice(piece.row, piece.text, piece.finish)]})
        except Exception as fault:  # the status line is sent, so the stream itself must say it
            yield _event({"error": as_error(f"{type(fault).__name__}: {fault}", "server_error")})
        else:
            if self.asked.stream_options and self.asked.stream_options.include_usage:
                yield _event(self.head | {"choices": [], "usage": self.usage()})
        yield "data: [DONE]\n\n"


def _sampling(asked: Completion, model: Model, limits: Limits) -> Sampling:
    """The recipe's [sampling] table with what the request says in its place."""
    values = {name: getattr(asked, name) for name in SAMPLING if getattr(asked, name) is not None}
    if asked.stop is not None:
        values["stop"] = [asked.stop] if isinstance(asked.stop, str) else asked.stop
    if len(values.get("stop", ())) > limits.stops:
        raise Refusal(400, f"stop holds more than {limits.stops} strings, the most allowed", "stop")
    table = model.recipe.table()["sampling"]
    gap = filling.longest(model.recipe) if asked.suffix else limits.max_tokens
    table["max_tokens"] = min(table["max_tokens"], limits.max_tokens, gap)
    sampling: Sampling = recipes.build(Sampling, table | values, "sampling")
    if sampling.max_tokens > limits.max_tokens:
        raise Refusal(400, f"max_tokens is above {limits.max_tokens}, the most allowed", "max_tokens")
    return sampling


def _tokens(asked: Completion, model: Model, prompt: str, new: int) -> list[int]:
    """What the network reads for a prompt. Raises Refusal where it does not fit, or a suffix means nothing to it."""
    if asked.suffix:
        if not filling.taught(model.recipe, model.codec):
            raise Refusal(400, f"suffix needs a model that was taught to fill in the middle, and {asked.model!r} was "
                          "not: leave it out", "suffix")
        return filling.prompt(model.recipe, model.codec, prompt, asked.suffix, new)
    context = limit(model.network)
    # a first look that costs nothing: no token stands for more bytes than the longest
    count = len(prompt) // max(map(len, model.codec.token_bytes))
    if count <= context:
        tokens = encode(model.codec, prompt)
        if len(tokens) <= context:
            return tokens
        count = len(tokens)
    raise Refusal(400, f"the prompt has {count} tokens or more, but this model's context is {context}: "
                  "send the last part of it", "prompt", "context_length_exceeded")


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"

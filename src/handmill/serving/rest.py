"""The REST interface, shaped as OpenAI's so that its clients work: /v1/models, /v1/completions, /health.

`create_app` needs the serve extra, and is imported by `handmill serve` alone.
"""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from difflib import get_close_matches
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from handmill import __version__
from handmill import recipe as recipes
from handmill.errors import UserError
from handmill.families.autoregressive import SEEDS, Piece, Sampling, encode
from handmill.folder import Model
from handmill.serving.engine import Busy, Engine, Job, Limits
from handmill.serving.page import render

# what OpenAI's interface has and this one has not, with the values that some clients send without meaning anything
NEUTRAL: dict[str, Any] = {"logprobs": None, "suffix": None, "best_of": 1, "frequency_penalty": 0,
                           "presence_penalty": 0, "logit_bias": {}}
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_tokens")


class StreamOptions(BaseModel):
    """What a stream says besides text."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = Field(False, description="end with a chunk that holds the token counts")


class Completion(BaseModel):
    """A request for text. What is left out is as in the model's recipe, under [sampling]."""

    model_config = ConfigDict(extra="allow")  # `_no_others` says which
    model: str = Field(description="a name that /v1/models lists")
    prompt: str | list[str] = Field("", description="text to continue, or several; empty: a new document")
    max_tokens: int | None = Field(None, ge=1, description="new tokens a sample")
    temperature: float | None = Field(None, ge=0, description="0: always the likeliest token")
    top_p: float | None = Field(None, gt=0, le=1, description="probability mass to choose from")
    n: int = Field(1, ge=1, description="samples a prompt")
    stream: bool = Field(False, description="answer in server-sent events as the text is made")
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = Field(None, description="text that ends a sample and is not part of it")
    seed: int | None = Field(None, ge=0, lt=SEEDS, description="the same seed gives the same text")
    echo: bool = Field(False, description="begin each text with its prompt")
    user: str | None = Field(None, description="ignored")
    top_k: int | None = Field(None, ge=0, description="tokens to choose from; 0: all")
    min_p: float | None = Field(None, ge=0, le=1, description="least share of the best token's probability")
    repetition_penalty: float | None = Field(None, ge=0.1, le=10, description="above 1: less repetition")


class Refusal(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        self.status, self.message, self.param, self.code = status, message, param, code


class Answer:
    """One request on its way: its checked settings, its job, and the chunks made of its pieces."""

    def __init__(self, asked: Completion, model: Model, limits: Limits) -> None:
        _no_others(asked)
        prompts = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
        if not prompts or len(prompts) * asked.n > limits.samples:
            raise Refusal(400, f"prompts times n must be from 1 to {limits.samples}", "n")
        self.asked, self.sampling = asked, _sampling(asked, model, limits)
        self.prompt_tokens = sum(_prompt_tokens(model, prompt) for prompt in prompts)
        self.prompts = [prompt for prompt in prompts for _ in range(asked.n)]
        self.seed = secrets.randbelow(2**32) if asked.seed is None else asked.seed
        self.made = [0] * len(self.prompts)  # new tokens of each sample
        self.head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion",
                     "created": int(time.time()), "model": asked.model, "system_fingerprint": _weights(model)}

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
        except Exception as error:  # the status line is sent, so the stream itself must say it
            yield _event({"error": _error(f"{type(error).__name__}: {error}", "server_error")})
        else:
            if self.asked.stream_options and self.asked.stream_options.include_usage:
                yield _event(self.head | {"choices": [], "usage": self.usage()})
        yield "data: [DONE]\n\n"


def create_app(models: Mapping[str, Model], limits: Limits | None = None,
               hosts: Sequence[str] = ("*",)) -> FastAPI:
    """The application that serves `models` by their names. `hosts` are the Host headers it answers to.

    One engine answers requests in turn. Errors have OpenAI's shape: {"error": {message, type, param, code}}.
    """
    limits = limits or Limits()
    engine = Engine(limits.waiting)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        engine.close()

    app = FastAPI(title="Handmill", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.engine = engine
    app.add_middleware(BodyLimit, most=limits.body)
    # against pages of other sites that rebind their name to this machine's loopback address
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    _answer_errors(app)
    _describe(app, models, engine)

    @app.post("/v1/completions", summary="Continue a text", response_model=None)
    async def completions(asked: Completion, request: Request) -> Response | dict[str, Any]:
        if asked.model not in models:
            raise Refusal(404, f"there is no model {asked.model!r} here, only {', '.join(models)}", "model",
                          "model_not_found")
        answer = Answer(asked, models[asked.model], limits)
        pieces = _submit(answer, models[asked.model], engine, request)
        if not asked.stream:
            return await answer.whole(pieces)
        return StreamingResponse(answer.events(pieces), media_type="text/event-stream",
                                 headers={"Cache-Control": "no-store"})

    return app


def _submit(answer: Answer, model: Model, engine: Engine, request: Request) -> AsyncIterator[Piece]:
    """Queue the job and return its pieces as they come; it is dropped when the client goes away."""
    loop, made = asyncio.get_running_loop(), asyncio.Queue[Piece | Exception | None]()

    def emit(item: Piece | Exception | None) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server has ended
            loop.call_soon_threadsafe(made.put_nowait, item)

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        engine.cancel(job)

    async def pieces() -> AsyncIterator[Piece]:
        try:
            while (item := await made.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            watcher.cancel()
            engine.cancel(job)

    job = Job(model, answer.prompts, answer.sampling, answer.seed, emit)
    try:
        engine.submit(job)
    except Busy:
        raise Refusal(429, f"{engine.most} requests are waiting already: try again later",
                      code="rate_limit_exceeded") from None
    watcher = asyncio.create_task(watch())
    return pieces()


def _no_others(asked: Completion) -> None:
    """Refuse fields that would be ignored, so that no client believes they were obeyed."""
    for name, value in (asked.model_extra or {}).items():
        if name not in NEUTRAL or value not in (None, NEUTRAL[name]):
            hint = get_close_matches(name, Completion.model_fields, 1)
            raise Refusal(400, f"{name} is not supported here"
                          + (f", did you mean {hint[0]}?" if hint else ": leave it out"), name)


def _sampling(asked: Completion, model: Model, limits: Limits) -> Sampling:
    """The recipe's [sampling] table with what the request says in its place."""
    values = {name: getattr(asked, name) for name in SAMPLING if getattr(asked, name) is not None}
    if asked.stop is not None:
        values["stop"] = [asked.stop] if isinstance(asked.stop, str) else asked.stop
    if len(values.get("stop", ())) > limits.stops:
        raise Refusal(400, f"stop holds more than {limits.stops} strings, the most allowed", "stop")
    table = model.recipe.table()["sampling"]
    table["max_tokens"] = min(table["max_tokens"], limits.max_tokens)
    sampling: Sampling = recipes.build(Sampling, table | values, "sampling")
    if sampling.max_tokens > limits.max_tokens:
        raise Refusal(400, f"max_tokens is above {limits.max_tokens}, the most allowed", "max_tokens")
    return sampling


def _prompt_tokens(model: Model, prompt: str) -> int:
    """How many tokens the network reads for a prompt. Raises Refusal when they do not fit its context."""
    context = model.recipe.network.context
    # a first look that costs nothing: no token stands for more bytes than the longest
    count = len(prompt) // max(map(len, model.codec.token_bytes))
    if count <= context:
        count = len(encode(model.codec, prompt))
    if count > context:
        raise Refusal(400, f"the prompt has {count} tokens or more, but this model's context is {context}: "
                      "send the last part of it", "prompt", "context_length_exceeded")
    return count


def _describe(app: FastAPI, models: Mapping[str, Model], engine: Engine) -> None:
    """The pages that say what is here."""
    def about(name: str) -> dict[str, Any]:
        created = datetime.strptime(models[name].receipt["created"], "%Y-%m-%dT%H:%M:%S%z")
        return {"id": name, "object": "model", "created": int(created.timestamp()), "owned_by": "handmill"}

    @app.get("/v1/models", summary="The models served here")
    def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [about(name) for name in models]}

    @app.get("/v1/models/{name}", summary="One model")
    def one_model(name: str) -> dict[str, Any]:
        if name not in models:
            raise Refusal(404, f"there is no model {name!r} here", "model", "model_not_found")
        return about(name)

    @app.get("/health", summary="Whether the server answers, and how many requests wait")
    def health() -> dict[str, Any]:
        return {"status": "ok", "models": list(models), "waiting": engine.waiting}

    @app.get("/docs", include_in_schema=False)
    def docs(request: Request) -> HTMLResponse:
        return HTMLResponse(render(app.openapi(), list(models), str(request.base_url)))

    @app.get("/", include_in_schema=False)
    def root() -> RedirectResponse:
        return RedirectResponse("/docs")


def _answer_errors(app: FastAPI) -> None:
    """Give every error OpenAI's shape."""
    def answer(status: int, error: dict[str, Any]) -> JSONResponse:
        headers = {"Retry-After": "1"} if status == 429 else None
        return JSONResponse({"error": error}, status, headers)

    @app.exception_handler(Refusal)
    def refusal(_request: Request, error: Refusal) -> JSONResponse:
        kind = "rate_limit_error" if error.status == 429 else "invalid_request_error"
        return answer(error.status, _error(error.message, kind, error.param, error.code))

    @app.exception_handler(UserError)
    def user_error(_request: Request, error: UserError) -> JSONResponse:
        return answer(400, _error(str(error), "invalid_request_error"))

    @app.exception_handler(RequestValidationError)
    def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:]) or "the body"
        return answer(400, _error(f"{where}: {first['msg']}", "invalid_request_error", where))

    @app.exception_handler(HTTPException)
    def http(_request: Request, error: HTTPException) -> JSONResponse:
        return answer(error.status_code, _error(str(error.detail), "invalid_request_error"))

    @app.exception_handler(Exception)
    def fault(_request: Request, error: Exception) -> JSONResponse:
        return answer(500, _error(f"{type(error).__name__}: {error}", "server_error"))


def _error(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"message": message, "type": kind, "param": param, "code": code}


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _weights(model: Model) -> str:
    """A short name for exactly these weights."""
    digest: str = model.receipt["files"]["weights.safetensors"]["sha256"]
    return f"handmill-{digest[:12]}"


class BodyLimit:
    """Refuses a request once more than `most` bytes of its body have come, whatever length it announced."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.most:
                raise HTTPException(413, f"a request may have at most {self.most} bytes")
            return message

        await self.app(scope, counted if scope["type"] == "http" else receive, send)

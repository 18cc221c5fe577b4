"""What answers of every medium share: refusals, the way to the engine and back, names."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import suppress
from difflib import get_close_matches
from typing import Any

from fastapi import Request
from pydantic import BaseModel

from handmill.folder import Model
from handmill.serving.engine import Busy, Engine, Job

ENDPOINTS = {"text": "/v1/completions", "image": "/v1/images/generations", "music": "/v1/music/generations"}


class Refusal(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        self.status, self.message, self.param, self.code = status, message, param, code


def as_error(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    return {"message": message, "type": kind, "param": param, "code": code}


def chosen(models: Mapping[str, Model], name: str, medium: str) -> Model:
    """The model of that name. Raises Refusal for another name, and for a model of another medium."""
    if name not in models:
        raise Refusal(404, f"there is no model {name!r} here, only {', '.join(models)}", "model", "model_not_found")
    makes = models[name].recipe.medium
    if makes != medium:
        raise Refusal(400, f"{name!r} makes {makes}, which is asked for at {ENDPOINTS[makes]}", "model")
    return models[name]


def no_others(asked: BaseModel, neutral: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse fields that would be ignored, so that no client believes they were obeyed; null asks for nothing."""
    for name, value in (asked.model_extra or {}).items():
        if name not in neutral or value not in (None, *neutral[name]):
            hint = get_close_matches(name, type(asked).model_fields, 1)
            raise Refusal(400, f"{name} is not supported here"
                          + (f", did you mean {hint[0]}?" if hint else ": leave it out"), name)


def results(work: Callable[[Callable[[], bool]], Iterable[Any]], engine: Engine,
            request: Request) -> AsyncIterator[Any]:
    """Queue the work and return its results as they come; it is dropped when the client goes away.

    Raises Refusal when the queue is full, and what the work raises.
    """
    loop, made = asyncio.get_running_loop(), asyncio.Queue[Any]()

    def emit(item: Any) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server has ended
            loop.call_soon_threadsafe(made.put_nowait, item)

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        engine.cancel(job)

    async def each() -> AsyncIterator[Any]:
        try:
            while (item := await made.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            watcher.cancel()
            engine.cancel(job)

    job = Job(work, emit)
    try:
        engine.submit(job)
    except Busy:
        raise Refusal(429, f"{engine.most} requests are waiting already: try again later",
                      code="rate_limit_exceeded") from None
    watcher = asyncio.create_task(watch())
    return each()


def weights(model: Model) -> str:
    """A short name for exactly these weights."""
    digest: str = model.receipt["files"]["weights.safetensors"]["sha256"]
    return f"handmill-{digest[:12]}"

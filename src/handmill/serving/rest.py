"""The REST interface, shaped as OpenAI's so that its clients work: /v1/models, /v1/completions, /v1/images/generations.

OpenAI has nothing for notes: /v1/music/generations is shaped as images are.

`create_app` needs the serve extra, and is imported by `handmill serve` alone.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from handmill import __version__
from handmill.errors import UserError
from handmill.families import tensors
from handmill.folder import Model
from handmill.serving import completions, images, music
from handmill.serving.answers import ENDPOINTS, Refusal, as_error, chosen, results
from handmill.serving.engine import Engine, Limits
from handmill.serving.page import render


def create_app(models: Mapping[str, Model], limits: Limits | None = None,
               hosts: Sequence[str] = ("*",)) -> FastAPI:
    """The application that serves `models` by their names. `hosts` are the Host headers it answers to.

    One engine answers requests in turn, for text, images and music. Errors have OpenAI's shape: {"error": {message,
    type, param, code}}.
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

    @app.post(ENDPOINTS["text"], summary="Continue a text", response_model=None)
    async def complete(asked: completions.Completion, request: Request) -> Response | dict[str, Any]:
        answer = completions.Answer(asked, chosen(models, asked.model, "text"), limits)
        pieces = results(answer.work, engine, request)
        if not asked.stream:
            return await answer.whole(pieces)
        return StreamingResponse(answer.events(pieces), media_type="text/event-stream",
                                 headers={"Cache-Control": "no-store"})

    @app.post(ENDPOINTS["image"], summary="Make images", response_model=None)
    async def generate(asked: images.Generation, request: Request) -> dict[str, Any]:
        answer = images.Answer(asked, chosen(models, asked.model, "image"), limits)
        return await answer.whole(results(answer.work, engine, request))

    @app.post(ENDPOINTS["music"], summary="Make music", response_model=None)
    async def compose(asked: music.Composition, request: Request) -> dict[str, Any]:
        answer = await run_in_threadpool(music.Answer, asked, chosen(models, asked.model, "music"), limits)
        return await answer.whole(results(answer.work, engine, request))

    return app


def _describe(app: FastAPI, models: Mapping[str, Model], engine: Engine) -> None:
    """The pages that say what is here."""
    def about(name: str) -> dict[str, Any]:
        created = datetime.strptime(models[name].receipt["created"], "%Y-%m-%dT%H:%M:%S%z")
        return {"id": name, "object": "model", "created": int(created.timestamp()), "owned_by": "handmill",
                **_about(models[name])}

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
        makes = {name: model.recipe.medium for name, model in models.items()}
        takes = {name: music.takes(model) for name, model in models.items() if makes[name] == "music"}
        return HTMLResponse(render(app.openapi(), makes, str(request.base_url), takes))

    @app.get("/", include_in_schema=False)
    def root() -> RedirectResponse:
        return RedirectResponse("/docs")


def _about(model: Model) -> dict[str, Any]:
    """What a list of models says of one, beside its name."""
    facts: dict[str, Any] = {"medium": model.recipe.medium, "endpoint": ENDPOINTS[model.recipe.medium]}
    if model.recipe.medium == "image":
        facts |= {"size": images.size(model), "classes": list(tensors.classes(model.recipe, model.codec))}
    if model.recipe.medium == "music":
        facts |= music.about(model)
    return facts


def _answer_errors(app: FastAPI) -> None:
    """Give every error OpenAI's shape."""
    def answer(status: int, error: dict[str, Any]) -> JSONResponse:
        headers = {"Retry-After": "1"} if status == 429 else None
        return JSONResponse({"error": error}, status, headers)

    @app.exception_handler(Refusal)
    def refusal(_request: Request, error: Refusal) -> JSONResponse:
        kind = "rate_limit_error" if error.status == 429 else "invalid_request_error"
        return answer(error.status, as_error(error.message, kind, error.param, error.code))

    @app.exception_handler(UserError)
    def user_error(_request: Request, error: UserError) -> JSONResponse:
        return answer(400, as_error(str(error), "invalid_request_error"))

    @app.exception_handler(RequestValidationError)
    def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:]) or "the body"
        return answer(400, as_error(f"{where}: {first['msg']}", "invalid_request_error", where))

    @app.exception_handler(HTTPException)
    def http(_request: Request, error: HTTPException) -> JSONResponse:
        return answer(error.status_code, as_error(str(error.detail), "invalid_request_error"))

    @app.exception_handler(Exception)
    def fault(_request: Request, error: Exception) -> JSONResponse:
        return answer(500, as_error(f"{type(error).__name__}: {error}", "server_error"))


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

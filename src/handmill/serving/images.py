"""POST /v1/images/generations: images as PNG files in base64, shaped as OpenAI's."""

import base64
import io
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

from handmill import recipe as recipes
from handmill.errors import UserError
from handmill.families import tensors
from handmill.families.diffusion import samplers
from handmill.families.diffusion.denoiser import Denoiser
from handmill.folder import Model
from handmill.serving.answers import Refusal, no_others, weights
from handmill.serving.engine import Dropped, Limits

AT_ONCE = 16  # images in one pass of the network

# what OpenAI's interface has and this one has not, with the values that ask for nothing
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "quality": ("auto", "standard"), "style": (), "background": ("auto", "opaque"), "moderation": ("auto", "low"),
    "output_compression": (100,), "stream": (False,), "partial_images": (0,)}
Name = Annotated[StrictStr, Field(max_length=1000)]
SAMPLING = ("steps", "guidance", "sampler", "truncation", "temperature", "top_k", "top_p", "min_p")


class Generation(BaseModel):
    """A request for images. What is left out is as in the model's recipe, under [sampling]."""

    model_config = ConfigDict(extra="allow")  # `no_others` says which
    model: str = Field(description="a name that /v1/models lists")
    prompt: Name = Field("", description="the name of a class; empty: any")
    label: Name | StrictInt | None = Field(None, description="the class by its name or its number, from 0")
    n: int = Field(1, ge=1, description="images")
    size: str | None = Field(None, description='width x height, the model\'s own, or "auto"')
    seed: int | None = Field(None, ge=0, lt=tensors.SEEDS, description="the same seed gives the same images")
    response_format: str | None = Field(None, description="b64_json")
    output_format: str | None = Field(None, description="png")
    steps: int | None = Field(None, ge=1, description="of a diffusion model: more are finer and slower")
    guidance: float | None = Field(None, ge=0, description="of a diffusion model: above 1, more like the class")
    sampler: str | None = Field(None, description="of a diffusion model: ddpm, ddim, euler, heun, dpmpp_2m or unipc")
    truncation: float | None = Field(None, ge=0, le=2, description="of an adversarial model: below 1, less varied")
    temperature: float | None = Field(None, ge=0, description="of a variational or autoregressive model: the same")
    top_k: int | None = Field(None, ge=0, description="of an autoregressive model: codes to choose from; 0: all")
    top_p: float | None = Field(None, gt=0, le=1, description="of an autoregressive model: mass to choose from")
    min_p: float | None = Field(None, ge=0, le=1, description="of an autoregressive model: least share of the best's")
    user: str | None = Field(None, description="ignored")
    safety_identifier: str | None = Field(None, description="ignored")


class Answer:
    """One request on its way: its checked settings, its work, and the answer made of its images."""

    def __init__(self, asked: Generation, model: Model, limits: Limits) -> None:
        no_others(asked, NEUTRAL)
        _format(asked, model)
        self.asked, self.model = asked, model
        self.values = {name: getattr(asked, name) for name in SAMPLING if getattr(asked, name) is not None}
        self.sampling = _sampling(self.values, model)
        _bounded(asked.n, model, self.sampling, limits)
        self.label = _label(asked, model)
        self.name = dict(enumerate(tensors.classes(model.recipe, model.codec))).get(self.label, "")
        self.seed = secrets.randbelow(2**32) if asked.seed is None else asked.seed
        self.head = {"created": int(time.time()), "model": asked.model, "system_fingerprint": weights(model)}

    def work(self, dropped: Callable[[], bool]) -> Iterator[dict[str, Any]]:
        """The images one by one, as the answer's data."""
        network = watched(self.model, dropped)
        for first in range(0, self.asked.n, AT_ONCE):
            labels = [self.label] * min(AT_ONCE, self.asked.n - first)
            images = tensors.make(network, self.model.codec, self.model.recipe, labels, self.sampling, self.seed, first)
            for index, image in enumerate(images, first):
                yield self.datum(index, image)

    def datum(self, index: int, image: NDArray[np.uint8]) -> dict[str, Any]:
        from handmill.verbs.making import about

        notes = about(self.model, self.name, self.seed, index, self.values)
        return {"b64_json": base64.b64encode(encode_png(image, notes)).decode(), "seed": self.seed, "index": index,
                "label": self.name or None}

    async def whole(self, data: AsyncIterator[dict[str, Any]]) -> dict[str, Any]:
        """The answer in one object."""
        return self.head | {"data": [datum async for datum in data], "size": size(self.model), "output_format": "png"}


@dataclass(frozen=True)
class Watched:
    """A denoiser, or a decoder, that stops once nobody waits for its answer."""

    inner: Callable[..., Any]
    device: Any
    dropped: Callable[[], bool]

    def __call__(self, *inputs: Any) -> Any:
        if self.dropped():
            raise Dropped
        return self.inner(*inputs)


def watched(model: Model, dropped: Callable[[], bool]) -> Any:
    """What `tensors.make` takes for the model's network, to be left between its evaluations."""
    objective, network = model.recipe.objective, model.network
    if model.recipe.family == "diffusion":
        denoiser = Denoiser(network, objective, objective.sigma_data or model.codec.deviation)
        return Watched(denoiser, model.device, dropped)
    return Watched(network, model.device, dropped) if model.recipe.family == "autoregressive" else network


def size(model: Model) -> str:
    """Width x height, as OpenAI writes it."""
    height, width = model.recipe.data.size
    return f"{width}x{height}"


def encode_png(image: NDArray[np.uint8], notes: Mapping[str, str]) -> bytes:
    """A PNG file of (H, W, C), C 1 or 3, with `notes` in its text chunks."""
    from PIL import Image, PngImagePlugin

    chunks, file = PngImagePlugin.PngInfo(), io.BytesIO()
    for key, value in notes.items():
        chunks.add_text(key, value)
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(file, "PNG", pnginfo=chunks)
    return file.getvalue()


def _format(asked: Generation, model: Model) -> None:
    """Refuse what this server does not put out."""
    if asked.response_format not in (None, "b64_json"):
        raise Refusal(400, f"response_format = {asked.response_format!r} is not supported here: nothing is kept that a "
                      'link could lead to, so ask for "b64_json"', "response_format")
    if asked.output_format not in (None, "png"):
        raise Refusal(400, f'output_format = {asked.output_format!r} is not supported here: ask for "png"',
                      "output_format")
    if asked.size not in (None, "auto", size(model)):
        raise Refusal(400, f'size = {asked.size!r} is not this model\'s: ask for "{size(model)}" (width x height) or '
                      '"auto"', "size")


def _sampling(values: Mapping[str, Any], model: Model) -> Any:
    """The recipe's [sampling] table with what the request says in its place."""
    table = model.recipe.table()["sampling"]
    for name in values:
        if name not in table:
            known = ", ".join(n for n in SAMPLING if n in table)
            raise Refusal(400, f"{name} is no setting of this model, which has {known}: leave it out", name)
    return recipes.build(type(model.recipe.sampling), table | values, "sampling")


def _bounded(n: int, model: Model, sampling: Any, limits: Limits) -> None:
    """Refuse what would take too long."""
    if n > limits.images:
        raise Refusal(400, f"n is above {limits.images}, the most allowed", "n")
    evaluations = model.codec.length if model.recipe.family == "autoregressive" else 1  # of the network, an image
    if model.recipe.family == "diffusion":
        evaluations = samplers.evaluations(sampling.sampler, sampling.steps)
        if evaluations > limits.evaluations:
            raise Refusal(400, f"steps = {sampling.steps} with {sampling.sampler} evaluate the network {evaluations} "
                          f"times, above {limits.evaluations}, the most allowed: ask for fewer steps", "steps")
        evaluations *= 1 if sampling.guidance == 1 else 2
    if n * evaluations > limits.work:
        raise Refusal(400, f"{n} images of {evaluations} evaluations each are above {limits.work} evaluations, the "
                      f"most allowed: ask for at most {limits.work // evaluations} images, or for fewer steps", "n")


def _label(asked: Generation, model: Model) -> int:
    """The number of the class asked for. Raises Refusal for what is none, and for two that differ."""
    codec, recipe = model.codec, model.recipe
    known = tensors.classes(recipe, codec)
    if isinstance(asked.label, int) and not 0 <= asked.label < len(known):
        raise Refusal(400, f"label = {asked.label} is no class of this model, which has {len(known)}", "label")
    named = {"prompt": asked.prompt, "label": known[asked.label] if isinstance(asked.label, int) else asked.label or ""}
    for param, name in named.items():
        try:
            tensors.label_of(recipe, codec, name)
        except UserError as fault:
            raise Refusal(400, str(fault), param) from None
    if asked.prompt and named["label"] not in ("", asked.prompt):
        raise Refusal(400, f"prompt and label name two classes, {asked.prompt!r} and {named['label']!r}: keep one",
                      "label")
    return tensors.label_of(recipe, codec, asked.prompt or named["label"])

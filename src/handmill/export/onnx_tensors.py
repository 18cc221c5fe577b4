"""The .onnx files of an image model, each with a free batch, and what runs them without Handmill.

    denoiser.onnx  diffusion: x (B, C, *S), sigma (B,) and label (B,) int64 to D(x, sigma, label) (B, C, *S)
    encoder.onnx   images (B, C, H, W) to codes: an autoencoder's "mean" and "log_variance" (B, *L) or its "codes"
                   (B, *s) int64, the normalised "codes" (B, C, *S) of a model that works on them
    decoder.onnx   codes, or "latent" (B, *L), to images (B, C, H, W)
    generator.onnx adversarial: latent (B, Z), noise (B, P) where it has any, truncation (B,) and label (B,) int64 to
                   images (B, C, H, W), or to "codes"

An autoregressive model of codes has encoder.onnx, decoder.onnx and the model.onnx of onnx_decoder.py.

Values are fp32, images lie in [-1, 1]. `label` is there where a network was taught classes; one past the last class
asks for none, but of a generator.

B batch, C channels, *S space of what is denoised, H height, W width, L the latent's shape, s the space of codes,
Z numbers of a generator's latent, P of its noise.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from handmill.export import onnx_decoder
from handmill.export.onnx import FORMAT, OPSET, save
from handmill.families import tensors
from handmill.families.diffusion import making, noise_levels
from handmill.families.diffusion.denoiser import Denoiser
from handmill.folder import Model

EXAMPLES = 3  # items: neither 0 nor 1, which capturing would take for constants


class Graph(NamedTuple):
    """One file: what it computes, and examples of its inputs by name."""

    file: str
    module: nn.Module  # called with the inputs in their order; returns one output or a tuple of them
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]


class Denoise(nn.Module):
    """D(x, sigma, label) of a diffusion model."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.network = model.network
        self.objective, self.sigma_data = model.recipe.objective, sigma_data(model)

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        return Denoiser(self.network, self.objective, self.sigma_data)(x, sigma, _condition(label))


class ToCodes(nn.Module):
    """Images to the codes that a diffusion or adversarial model is of."""

    def __init__(self, codec: Any) -> None:
        super().__init__()
        self.network, self.codec = codec.model.network, codec  # the network as a part, so that it is copied and cast

    def forward(self, images: Tensor) -> Tensor:
        codes: Tensor = self.codec.encode(images)
        return codes


class FromCodes(ToCodes):
    """These codes to images."""

    encoded = ToCodes.forward

    def forward(self, codes: Tensor) -> Tensor:
        images: Tensor = self.codec.decode(codes)
        return images


class Encode(nn.Module):
    """Images to an autoencoder's mean and log variance, or to its codes."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.network: Any = model.network
        self.likelihood = model.recipe.objective.likelihood

    def forward(self, images: Tensor, label: Tensor | None = None) -> Any:
        z = self.network.encode(images, _condition(label))
        return z.unbind(1) if self.network.quantiser is None else self.network.quantise(z).codes

    def distance(self, codes: Tensor, images: Tensor, label: Tensor | None = None) -> Tensor:
        """How far the vectors of `codes` (B, *s) lie from what they stand for: (B, *s); infinite for no code."""
        network = self.network
        z = network.encode(images, _condition(label))
        z = z.tanh() if network.grid is not None else z  # the grid's levels are those of a bounded z
        known = (codes >= 0) & (codes < network.vocabulary)
        vectors = network.lookup(codes.where(known, 0))  # (B, D, *s)
        return (z.double() - vectors.double()).norm(dim=1).where(known, torch.inf)


class Decode(Encode):
    """A latent or codes to images."""

    def encoded(self, images: Tensor, label: Tensor | None = None) -> Tensor:
        """The latent, or codes, that images come back from."""
        z = super().forward(images, label)
        return z[0] if self.network.quantiser is None else z

    def forward(self, latent: Tensor, label: Tensor | None = None) -> Tensor:
        z = latent if self.network.quantiser is None else self.network.lookup(latent)
        images: Tensor = self.network.images(z, self.likelihood, _condition(label))
        return images


class Generate(nn.Module):
    """A latent to images or codes, by a generator without noise of its own."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.network: Any = model.network

    def forward(self, latent: Tensor, truncation: Tensor, label: Tensor | None = None) -> Tensor:
        return self.made(latent, latent[:, :0], truncation, label)

    def made(self, latent: Tensor, noise: Tensor, truncation: Tensor, label: Tensor | None) -> Tensor:
        network, asked = self.network, _condition(label)
        w = network.truncated(network.map(latent, asked), asked, truncation[:, None, None])  # (B, L, W)
        made: Tensor = network.render(w, noise)
        return made


class GenerateWithNoise(Generate):
    """A latent and the noise of the layers to images or codes."""

    def forward(self, latent: Tensor, noise: Tensor, truncation: Tensor,  # type: ignore[override]
                label: Tensor | None = None) -> Tensor:
        return self.made(latent, noise, truncation, label)


def sigma_data(model: Model) -> float:
    """The deviation that a diffusion model's denoiser reckons with."""
    return float(model.recipe.objective.sigma_data or model.codec.deviation)


def graphs(model: Model) -> list[Graph]:
    """What is exported of an image model, without the decoder of an autoregressive one."""
    codec = model.codec
    if model.recipe.family == "variational":
        return _autoencoder(model, bool(tensors.classes(model.recipe, codec)))
    if model.recipe.family == "autoregressive":
        return _autoencoder(codec.model, False)
    coded = model.recipe.codec.kind == "model"
    made = [_generator(model, coded) if model.recipe.family == "adversarial" else _denoiser(model)]
    if coded:
        images, codes = torch.zeros(EXAMPLES, *codec.model.network.shape), torch.zeros(EXAMPLES, *codec.shape)
        made += [Graph("encoder.onnx", ToCodes(codec), {"images": images}, ("codes",)),
                 Graph("decoder.onnx", FromCodes(codec), {"codes": codes}, ("images",))]
    return made


def _autoencoder(model: Model, asked: bool) -> list[Graph]:
    network: Any = model.network
    images, latent = torch.zeros(EXAMPLES, *network.shape), torch.zeros(EXAMPLES, *network.latent_shape)
    encoded: tuple[str, ...] = ("mean", "log_variance")
    name = "latent"
    if network.quantiser is not None:
        encoded, name, latent = ("codes",), "codes", latent[:, 0].long()
    return [Graph("encoder.onnx", Encode(model), {"images": images} | _labels(asked), encoded),
            Graph("decoder.onnx", Decode(model), {name: latent} | _labels(asked), ("images",))]


def _denoiser(model: Model) -> Graph:
    inputs = {"x": torch.zeros(EXAMPLES, *model.codec.shape), "sigma": torch.ones(EXAMPLES)}
    return Graph("denoiser.onnx", Denoise(model), inputs | _labels(bool(model.codec.classes)), ("denoised",))


def _generator(model: Model, coded: bool) -> Graph:
    network: Any = model.network
    latent, truncation = torch.zeros(EXAMPLES, *network.latent_shape), torch.ones(EXAMPLES)
    noise = {"noise": torch.zeros(EXAMPLES, *network.noise_shape)} if network.noise_shape[0] else {}
    return Graph("generator.onnx", (GenerateWithNoise if noise else Generate)(model),
                 {"latent": latent} | noise | {"truncation": truncation} | _labels(bool(network.classes)),
                 ("codes" if coded else "images",))


def write(graph: Graph, folder: Path) -> None:
    """Write a graph's file into `folder`. Raises UserError without the onnx extra."""
    batch = torch.export.Dim("batch")
    save(graph.module, tuple(graph.inputs.values()), tuple({0: batch} for _ in graph.inputs), list(graph.inputs),
         graph.outputs, folder / graph.file)


def about(model: Model, made: list[Graph]) -> dict[str, Any]:
    """The values of export.json: what a program needs to know to run the files."""
    codec, table = model.codec, model.recipe.table()
    height, width, channels = model.recipe.data.shape
    facts = {"format": FORMAT, "name": model.recipe.name, "opset": OPSET, "medium": "image",
             "family": model.recipe.family, "images": [channels, height, width],
             "classes": list(tensors.classes(model.recipe, codec)),
             "network": table["network"], "objective": table["objective"], "sampling": table["sampling"],
             "graphs": {graph.file: {"inputs": list(graph.inputs), "outputs": list(graph.outputs)} for graph in made}}
    facts |= {"no_label": len(codec.classes)} if _none_asked(model) else {}
    match model.recipe.family:
        case "diffusion":
            low, high = noise_levels.ends(model.recipe.objective)
            grid = making.grid(model.recipe.objective, model.recipe.sampling)
            return facts | {"shape": list(codec.shape), "sigma_data": sigma_data(model), "sigma_min": low,
                            "sigma_max": high, "sigmas": grid.tolist()}
        case "autoregressive":
            return onnx_decoder.about(model) | facts | {"shape": list(codec.shape), "length": codec.length,
                                                        "codes": codec.codes}
    network: Any = model.network
    if model.recipe.family == "adversarial":
        return facts | {"shape": list(network.latent_shape), "noise": list(network.noise_shape)}
    return facts | {"shape": list(network.latent_shape), "codes": network.vocabulary}


def readme(model: Model, made: list[Graph]) -> str:
    """The text of README.md, whose program runs as it stands."""
    lines = [f"# {model.recipe.name} as ONNX graphs", "",
             "Made with Handmill. Images are float32 (batch, channels, height, width), from -1 (black) to 1 (white).",
             "", "| file | takes | gives |", "| --- | --- | --- |"]
    for graph in made:
        takes = ", ".join(f"{name} {_form(value)}" for name, value in graph.inputs.items())
        lines.append(f"| {graph.file} | {takes} | {', '.join(graph.outputs)} |")
    if model.recipe.family == "autoregressive":
        lines.append("| model.onnx | tokens, padding and past, as export.json names them | logits, and the next past |")
    if tensors.classes(model.recipe, model.codec):
        none = f"; {len(model.codec.classes)} asks for none" if _none_asked(model) else ", and one must be asked for"
        lines += ["", f"Classes count from 0 as in export.json{none}."]
    return "\n".join([*lines, "", _SAID[_kind(model)], "", "```python", *_program(model, made), "```", "",
                      "`export.json` holds the sizes and the comparison with the trained network; `codec.json` says "
                      "what the codes are.", ""])


_SAID = {
    "diffusion": "`denoised` is the estimate of y in x = y + sigma n (Karras et al. 2022), for n standard normal; "
                 "what it leads to, by Euler's method:",
    "autoregressive": "An image is a row of codes, each drawn from what `model.onnx` expects after the class and the "
                      "codes before:",
    "adversarial": "A standard normal latent becomes a new image; `truncation` is 1 for images as in training, below 1 "
                   "for ones nearer to the centre of what the generator knows, and 0 for the centre itself:",
    "gaussian": "A standard normal latent becomes a new image; an image is described by `mean`, and comes back:",
    "codes": "An image becomes codes, and comes back from them:",
}

_HEAD = """import json

import numpy as np
import onnxruntime

about = json.load(open("export.json", encoding="utf-8"))
n = 4"""

_EULER = """sigmas = about["sigmas"]  # descending to 0
x = np.hypot(sigmas[0], about["sigma_data"]) * np.random.standard_normal((n, *about["shape"]))
for sigma, after in zip(sigmas, sigmas[1:]):
    inputs = {"x": x.astype(np.float32), "sigma": np.full(n, sigma, np.float32)LABEL}
    (denoised,) = denoiser.run(None, inputs)
    x = x + (after - sigma) * (x - denoised) / sigma"""

_DRAW = """tokens = np.full((n, 1), about["codes"] + about["no_label"])  # or the number of a class
past = [np.zeros((n, about["key_heads"], 0, about["head_width"]), np.float32)] * (2 * about["layers"])
codes = []
for _ in range(about["length"]):
    inputs = dict(zip(about["inputs"], [tokens, np.zeros(n, np.int64), *past]))
    logits, *past = model.run(about["outputs"], inputs)
    logits = logits[:, -1, :about["codes"]]
    tokens = (logits + np.random.gumbel(size=logits.shape)).argmax(-1)[:, None]
    codes.append(tokens)
codes = np.concatenate(codes, 1).reshape(n, *about["shape"])
(images,) = decoder.run(None, {"codes": codes})"""

_GENERATE = """latent = np.random.standard_normal((n, *about["shape"])).astype(np.float32)
truncation = np.full(n, about["sampling"]["truncation"], np.float32)
(GIVES,) = generator.run(None, {"latent": latent, "truncation": truncationNOISELABEL})"""

_LATENT = """latent = np.random.standard_normal((n, *about["shape"])).astype(np.float32)
(images,) = decoder.run(None, {"latent": latentLABEL})
mean, log_variance = encoder.run(None, {"images": imagesLABEL})
(again,) = decoder.run(None, {"latent": meanLABEL})"""

_CODES = """images = np.zeros((n, *about["images"]), np.float32)
(codes,) = encoder.run(None, {"images": imagesLABEL})
(again,) = decoder.run(None, {"codes": codesLABEL})"""

_WAYS = {"diffusion": _EULER, "autoregressive": _DRAW, "adversarial": _GENERATE, "gaussian": _LATENT, "codes": _CODES}


def _program(model: Model, made: list[Graph]) -> list[str]:
    """A program that makes images, in numpy and ONNX Runtime alone."""
    files = [graph.file for graph in made] + ["model.onnx"] * (model.recipe.family == "autoregressive")
    parts = [_HEAD, *(f'{file.removesuffix(".onnx")} = onnxruntime.InferenceSession("{file}")' for file in files)]
    label, noise = (name in made[0].inputs for name in ("label", "noise"))
    if label:
        parts.append('label = np.full(n, about["no_label"])  # or the number of a class' if _none_asked(model) else
                     'label = np.arange(n) % len(about["classes"])  # numbers of classes')
    if noise:
        parts.append('noise = np.random.standard_normal((n, *about["noise"])).astype(np.float32)')
    parts.append(_WAYS[_kind(model)])
    if model.recipe.family == "diffusion":
        parts.append("codes = x.astype(np.float32)" if len(made) > 1 else "images = x")
    if model.recipe.family in ("diffusion", "adversarial") and len(made) > 1:
        parts.append('(images,) = decoder.run(None, {"codes": codes})')
    given = {"LABEL": ', "label": label' * label, "NOISE": ', "noise": noise' * noise, "GIVES": made[0].outputs[0]}
    program = "\n".join(parts)
    for mark, text in given.items():
        program = program.replace(mark, text)
    return program.split("\n")


def _kind(model: Model) -> str:
    if model.recipe.family != "variational":
        return model.recipe.family
    return "gaussian" if model.recipe.network.bottleneck == "gaussian" else "codes"


def _none_asked(model: Model) -> bool:
    """Whether it can be asked for no class in particular; a generator is told one, or none ever."""
    return model.recipe.family != "adversarial"


def _form(value: Tensor) -> str:
    """(batch, 1, 16, 16) float32."""
    sizes = ", ".join(["batch", *map(str, value.shape[1:])]) + ("," if value.ndim == 1 else "")
    return f"({sizes}) {str(value.dtype).removeprefix('torch.')}"


def _labels(wanted: bool) -> dict[str, Tensor]:
    return {"label": torch.zeros(EXAMPLES, dtype=torch.long)} if wanted else {}


def _condition(label: Tensor | None) -> dict[str, Tensor]:
    return {} if label is None else {"label": label}

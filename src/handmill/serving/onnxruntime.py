"""Exported .onnx files called as the networks they come from are, on the CPU.

B batch, T new positions, P past positions, K key/value heads, D head width, H units of a layer, V vocabulary,
C channels, *S space, *L the latent's shape; of a generator Z its latent, N its noise.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from handmill import recipe as recipes
from handmill.errors import UserError, optional
from handmill.export.onnx_decoder import cache_names
from handmill.export.onnx_recurrent import PARTS, memory_names
from handmill.networks import autoencoder, recurrent
from handmill.networks.decoder import Decoder, Settings, State


class Runtime:
    """A decoder: logits, state = runtime(tokens, state)."""

    device = torch.device("cpu")

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.settings: Settings = recipes.build(Settings, about["network"], "network")
        self.graph = Graph(folder / "model.onnx")
        self.outputs = ["logits", *cache_names(self.settings.layers, "present")]
        self.carries = self.settings.memory > 0

    padded = staticmethod(Decoder.padded)

    def __call__(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """As Decoder.forward: tokens (B, T) int64 to logits (B, T, V) and the state, all on the CPU."""
        assert tokens.ndim == 2, tokens.shape
        s, none = self.settings, torch.zeros(tokens.shape[0], dtype=torch.long)
        before = State((), ()) if state is None else state
        empty = (torch.zeros(len(none), s.key_heads, 0, s.head_width),) * (2 * s.layers)  # (B, K, 0, D)
        past = (*before.keys, *before.values) or empty
        inputs = dict(zip(cache_names(s.layers, "past"), past, strict=True)) | {"tokens": tokens}
        inputs["padding"] = none if before.hidden is None else before.hidden
        logits, *present = self.graph(inputs, self.outputs)
        after = State(tuple(present[:s.layers]), tuple(present[s.layers:]), before.padding, before.dropped)
        if self.carries:
            gone = before.kept + tokens.shape[1] - after.kept
            after = after._replace(dropped=(none if before.dropped is None else before.dropped) + gone)
        return logits, after  # (B, T, V)


class RecurrentRuntime:
    """A recurrent network: logits, state = runtime(tokens, state)."""

    device, carries = torch.device("cpu"), True

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.settings: recurrent.Settings = recipes.build(recurrent.Settings, about["network"], "network")
        self.graph, self.parts = Graph(folder / "model.onnx"), len(PARTS[self.settings.cell])
        self.inputs = memory_names(self.settings, "past")
        self.outputs = ["logits", *memory_names(self.settings, "present")]

    def __call__(self, tokens: Tensor, state: recurrent.State | None = None) -> tuple[Tensor, recurrent.State]:
        """As Recurrent.forward: tokens (B, T) int64 to logits (B, T, V) and the state, all on the CPU."""
        assert tokens.ndim == 2, tokens.shape
        memories = self._blank(len(tokens)) if state is None else state.layers
        past = [part for memory in memories for part in memory]  # (B, H) each
        logits, *present = self.graph(dict(zip(self.inputs, past, strict=True)) | {"tokens": tokens}, self.outputs)
        each = range(0, len(present), self.parts)
        return logits, recurrent.State(tuple(tuple(present[i:i + self.parts]) for i in each))  # (B, T, V)

    def _blank(self, rows: int) -> tuple[tuple[Tensor, ...], ...]:
        return tuple((torch.zeros(rows, units),) * self.parts for units in self.settings.widths)


class DenoiserGraph:
    """A diffusion model: the denoiser itself, D = runtime(x, sigma, condition)."""

    device = torch.device("cpu")

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.graph, self.no_label = Graph(folder / "denoiser.onnx"), int(about["no_label"])

    def __call__(self, x: Tensor, sigma: Tensor | float, condition: Mapping[str, Tensor]) -> Tensor:
        """As Denoiser: x (B, C, *S) to D (B, C, *S) in the dtype of x; sigma (B,) or one for all."""
        inputs = {"x": x.float(), "sigma": torch.as_tensor(sigma, dtype=torch.float32).expand(len(x))}
        (denoised,) = self.graph(inputs | _label(self.graph, condition, len(x), self.no_label))
        return denoised.to(x.dtype)


class AutoencoderGraphs:
    """A variational model: what families.variational needs to make samples of it."""

    device = torch.device("cpu")

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.settings: autoencoder.Settings = recipes.build(autoencoder.Settings, about["network"], "network")
        self.decoder, self.no_label = Graph(folder / "decoder.onnx"), int(about["no_label"])
        self.latent_shape, self.likelihood = tuple(about["shape"]), about["objective"]["likelihood"]
        self.quantiser = None if self.settings.bottleneck == "gaussian" else self.settings.bottleneck

    def images(self, z: Tensor, likelihood: str, condition: Mapping[str, Tensor]) -> Tensor:
        """As Autoencoder.images: z (B, *L) to images (B, C, *S) in [-1, 1]."""
        assert likelihood == self.likelihood, (likelihood, self.likelihood)
        (images,) = self.decoder({"latent": z.float()} | _label(self.decoder, condition, len(z), self.no_label))
        return images


class GeneratorGraph:
    """An adversarial model: images, or codes of a codec, = runtime(z, layers, truncation, conditions)."""

    device = torch.device("cpu")

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.graph = Graph(folder / "generator.onnx")
        self.latent_shape, self.noise_shape = tuple(about["shape"]), tuple(about["noise"])

    def __call__(self, z: Tensor, layers: Tensor, truncation: float, conditions: Mapping[str, Tensor]) -> Tensor:
        """Latents (B, Z), noise of the layers (B, N) and a condition of B rows to images (B, C, *S)."""
        given = {"latent": z, "noise": layers, "truncation": torch.full((len(z),), float(truncation)), **conditions}
        (made,) = self.graph({name: given[name] for name in self.graph.inputs})
        return made


class Graph:
    """An ONNX Runtime session with as many threads as torch has; called with tensors by name, it returns tensors."""

    def __init__(self, file: Path) -> None:
        """Open a file. Raises UserError when it cannot be read."""
        runtime = _package()
        try:
            options = runtime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            self.session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            if not type(error).__module__.startswith("onnxruntime"):  # its errors share no public base class
                raise
            raise _broken(file, error) from None
        self.inputs = [entry.name for entry in self.session.get_inputs()]

    def __call__(self, inputs: Mapping[str, Tensor], outputs: list[str] | None = None) -> tuple[Tensor, ...]:
        """The `outputs` asked for, or all of them, on the CPU."""
        arrays = {name: value.contiguous().cpu().numpy() for name, value in inputs.items()}
        return tuple(map(torch.from_numpy, self.session.run(outputs, arrays)))


def load(folder: Path) -> Runtime | RecurrentRuntime | DenoiserGraph | AutoencoderGraphs | GeneratorGraph:
    """What is exported in `folder`, called as its network is. Raises UserError when it cannot be read."""
    about = read(folder)
    try:
        match about.get("family", "autoregressive"):
            case "diffusion":
                return DenoiserGraph(folder, about)
            case "variational":
                return AutoencoderGraphs(folder, about)
            case "adversarial":
                return GeneratorGraph(folder, about)
        return (RecurrentRuntime if about["network"]["kind"] == "recurrent" else Runtime)(folder, about)
    except (KeyError, TypeError, ValueError) as error:
        raise _broken(folder, error) from None


def read(folder: Path) -> dict[str, Any]:
    """The values of export.json. Raises UserError when it cannot be read."""
    try:
        about: dict[str, Any] = json.loads((folder / "export.json").read_text(encoding="utf-8"))
        if not isinstance(about, dict):
            raise TypeError("export.json is not a table")
    except (OSError, ValueError, TypeError) as error:
        raise _broken(folder, error) from None
    return about


def name() -> str:
    """The runtime and its version. Raises UserError without the onnx extra."""
    return f"onnxruntime {_package().__version__}"


def _package() -> Any:
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # some builds report their use; read on import
    return optional("onnxruntime", "onnx")


def _label(graph: Graph, condition: Mapping[str, Tensor], batch: int, null: int) -> dict[str, Tensor]:
    """The label (B,) where the graph takes one; without one in the condition, none asked for."""
    if "label" not in graph.inputs:
        return {}
    return {"label": condition.get("label", torch.full((batch,), null))}


def _broken(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} cannot be read ({type(error).__name__}: {error}): "
                     "export again with `handmill export --to onnx`")

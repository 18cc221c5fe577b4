"""An exported .onnx file called as the network is: logits, state = runtime(tokens, state).

B batch, T new positions, P past positions, K key/value heads, D head width, V vocabulary.
"""

import json
import os
from pathlib import Path

import torch
from torch import Tensor

from handmill import recipe as recipes
from handmill.errors import UserError, optional
from handmill.export.onnx import cache_names
from handmill.networks.decoder import Decoder, Settings, State


class Runtime:
    """An ONNX Runtime session on the CPU, with as many threads as torch has."""

    def __init__(self, folder: Path) -> None:
        """Open `folder`, which `handmill export --to onnx` wrote. Raises UserError when it cannot be read."""
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # some builds report their use; read on import
        runtime = optional("onnxruntime", "onnx")
        file = folder / "model.onnx"
        try:
            about = json.loads((folder / "export.json").read_text(encoding="utf-8"))
            self.settings: Settings = recipes.build(Settings, about["network"], "network")
            options = runtime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            self.session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _broken(folder, error) from None
        except Exception as error:
            if not type(error).__module__.startswith("onnxruntime"):  # its errors share no public base class
                raise
            raise _broken(file, error) from None
        self.name = f"onnxruntime {runtime.__version__}"
        self.outputs = ["logits", *cache_names(self.settings.layers, "present")]

    padded = staticmethod(Decoder.padded)

    def __call__(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """As Decoder.forward: tokens (B, T) int64 to logits (B, T, V) and the state, all on the CPU."""
        assert tokens.ndim == 2, tokens.shape
        s, batch = self.settings, tokens.shape[0]
        padding = state.padding if state is not None else None
        past = (*state.keys, *state.values) if state is not None else ()
        if not past:
            past = (torch.zeros(batch, s.key_heads, 0, s.head_width),) * (2 * s.layers)  # (B, K, 0, D)
        inputs = dict(zip(cache_names(s.layers, "past"), past, strict=True)) | {"tokens": tokens}
        inputs["padding"] = torch.zeros(batch, dtype=torch.long) if padding is None else padding
        arrays = {name: value.contiguous().numpy() for name, value in inputs.items()}
        logits, *present = map(torch.from_numpy, self.session.run(self.outputs, arrays))
        return logits, State(tuple(present[:s.layers]), tuple(present[s.layers:]), padding)  # (B, T, V)


def _broken(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} cannot be read ({type(error).__name__}: {error}): "
                     "export again with `handmill export --to onnx`")

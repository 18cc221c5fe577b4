"""One file a network. `build` makes the network that a recipe's [network] table describes."""

import importlib
from typing import Any

from torch import nn

NETWORKS = {"autoencoder": "Autoencoder", "unet": "UNet", "dit": "DiT"}  # of (B, C, *S): module -> class


def build(settings: Any, codec: Any) -> nn.Module:
    """The network of `settings` (a network file's Settings) for what `codec` makes, from torch's random state.

    Tokens have a vocabulary (codec.size), tensors a shape (codec.shape) and classes to ask for (codec.classes).
    """
    if settings.kind == "decoder":
        from handmill.networks.decoder import Decoder

        return Decoder(settings, codec.size)
    module = importlib.import_module(f"handmill.networks.{settings.kind}")
    network: nn.Module = getattr(module, NETWORKS[settings.kind])(settings, codec.shape, len(codec.classes))
    return network

"""One file a network. `build` makes the network that a recipe's [network] table describes."""

import importlib
from typing import Any

from torch import nn

from handmill.errors import UserError

TOKENS = {"decoder": "Decoder", "recurrent": "Recurrent"}  # networks of tokens (B, T): module -> class
# of (B, C, *S): module -> class
NETWORKS = {"autoencoder": "Autoencoder", "unet": "UNet", "dit": "DiT", "dcgan": "Generator", "stylegan2": "Generator"}
CHOOSING = ("dcgan", "stylegan2")  # whose settings say whether they are told a class


def build(settings: Any, codec: Any) -> nn.Module:
    """The network of `settings` (a network file's Settings) for what `codec` makes, from torch's random state.

    Tokens have a vocabulary (codec.size), tensors a shape (codec.shape) and classes to ask for (codec.classes).
    """
    if settings.kind in TOKENS:
        module = importlib.import_module(f"handmill.networks.{settings.kind}")
        network: nn.Module = getattr(module, TOKENS[settings.kind])(settings, codec.size)
        return network
    return _made(settings, codec, NETWORKS[settings.kind])


def critic(settings: Any, codec: Any) -> nn.Module:
    """The discriminator that goes with the generator of `settings`."""
    return _made(settings, codec, "Discriminator")


def _made(settings: Any, codec: Any, name: str) -> nn.Module:
    module = importlib.import_module(f"handmill.networks.{settings.kind}")
    network: nn.Module = getattr(module, name)(settings, codec.shape, told(settings, codec))
    return network


def told(settings: Any, codec: Any) -> int:
    """How many classes a network is told of: those of its data, unless it says that it is not conditional.

    Raises UserError for a generator that is to be told of fewer than two.
    """
    classes = len(codec.classes)
    if settings.kind not in CHOOSING:
        return classes
    if settings.conditional and classes < 2:
        raise UserError(f"network.conditional = true needs images of two classes or more, and these have {classes}: "
                        "put them into a folder for every class, or set it to false")
    return classes if settings.conditional else 0

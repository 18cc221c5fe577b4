"""One file a network. `build` makes the network that a recipe's [network] table describes."""

from typing import Any

from torch import nn

from handmill.networks.decoder import Decoder


def build(settings: Any, vocabulary: int) -> nn.Module:
    """The network of `settings` (a network file's Settings), freshly initialised from torch's random state."""
    networks = {"decoder": Decoder}
    return networks[settings.kind](settings, vocabulary)

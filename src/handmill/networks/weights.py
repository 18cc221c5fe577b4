"""What a network's weights are: its state dict without the names that share storage with others."""

from collections.abc import Iterable

from torch import Tensor, nn


def tied_names(network: nn.Module) -> Iterable[str]:
    """Names in the state dict that share storage with an earlier name, so that saving one of them is enough."""
    seen: dict[int, str] = {}
    for name, tensor in network.state_dict(keep_vars=True).items():
        if seen.setdefault(id(tensor), name) != name:
            yield name


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """The state dict without the tied doubles: what model folders and checkpoints hold."""
    state = network.state_dict()
    for name in list(tied_names(network)):
        del state[name]
    return state

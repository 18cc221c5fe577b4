"""Making tensors: images from a variational, diffusion or adversarial model, each its own function of the seed.

N samples, C channels, H height, W width, *S of the codes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from handmill.data.noise import normal, uniform
from handmill.data.order import draw
from handmill.errors import UserError
from handmill.media.pictures import to_uint8
from handmill.recipe import Recipe

AT_ONCE = 256  # samples
SEEDS = 2**63  # seeds are below this and not negative
WITNESSES = 16  # numbers of a network's answer that the receipt keeps
ALIKE = 1e-3  # of their largest: other machines round otherwise

Images = NDArray[np.uint8]


@torch.inference_mode()
def make(network: Any, codec: Any, recipe: Recipe, labels: Sequence[int], sampling: Any, seed: int,
         first: int = 0, progress: bool = False) -> Images:
    """One image (H, W, C) uint8 for each of `labels` (the number of classes: none asked for), as (N, H, W, C).

    Sample i depends on (seed, first + i) alone, so that a batch may be cut anywhere. Raises UserError for a model
    that cannot make samples from nothing.
    """
    turns = tqdm(range(0, len(labels), AT_ONCE), desc="samples", unit_scale=AT_ONCE, disable=not progress)
    return np.concatenate([_some(network, codec, recipe, labels[i:i + AT_ONCE], sampling, seed, first + i)
                           for i in turns])


def _some(network: Any, codec: Any, recipe: Recipe, labels: Sequence[int], sampling: Any, seed: int,
          first: int) -> Images:
    device = device_of(network)
    places = torch.arange(first, first + len(labels), device=device)
    condition = {"label": torch.tensor(labels, device=device)} if codec.classes else {}

    def noise(step: int, shape: tuple[int, ...] = codec.shape) -> Tensor:  # (N, *shape)
        return normal(draw(seed, "sample", step), places, shape)

    if recipe.family == "diffusion":
        from handmill.families.diffusion import making

        sigma = recipe.objective.sigma_data or codec.deviation
        codes = making.sample(network, recipe.objective, sampling, codec.shape, condition, noise, sigma,
                              len(codec.classes), device)
    elif recipe.family == "autoregressive":
        from handmill.families.autoregressive import fixed_length

        start = torch.tensor([codec.codes + label for label in labels], device=device)
        rows = list(range(first, first + len(labels)))
        return to_uint8(codec.decode(fixed_length(network, start, codec.length, codec.codes, sampling, seed, rows)))
    elif recipe.family == "adversarial":
        from handmill.families.adversarial import making as adversarial

        codes = adversarial.sample(network, sampling, chosen(condition, codec, seed, places), noise)
    else:
        from handmill.families import variational

        codes = variational.sample(network, recipe.objective, sampling, condition, noise(0, network.latent_shape))
    return to_uint8(codec.decode(codes.float()))


def chosen(condition: dict[str, Tensor], codec: Any, seed: int, places: Tensor) -> dict[str, Tensor]:
    """The condition with a class drawn for every sample that none was asked for."""
    if not condition:
        return condition
    drawn = (uniform(draw(seed, "class"), places, 1)[:, 0] * len(codec.classes)).long()
    return {"label": torch.where(condition["label"] < len(codec.classes), condition["label"], drawn)}


def device_of(network: Any) -> torch.device:
    """Where a network computes, or what stands for one and says so itself."""
    device: torch.device = network.device if hasattr(network, "device") else next(network.parameters()).device
    return device


def classes(recipe: Recipe, codec: Any) -> tuple[str, ...]:
    """What the model can be asked for: its data's classes, where its network was told them."""
    told = recipe.family not in ("variational", "adversarial") or recipe.network.conditional
    return tuple(codec.classes) if told else ()


def every_class(recipe: Recipe, codec: Any, count: int) -> list[int]:
    """Labels for `count` samples, the classes in turn; without classes, none asked for."""
    known = len(classes(recipe, codec))
    return [i % known if known else len(codec.classes) for i in range(count)]


def label_of(recipe: Recipe, codec: Any, prompt: str) -> int:
    """The number of the class that a prompt names; "" asks for none. Raises UserError naming the classes."""
    known = classes(recipe, codec)
    if not prompt:
        return len(codec.classes)
    if prompt in known:
        return known.index(prompt)
    if not known:
        raise UserError(f"this model was not told classes and cannot be asked for {prompt!r}: leave it out")
    names = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
    raise UserError(f"{prompt!r} is no class of this model: choose one of {names}")


def witness(network: Any, codec: Any, prepared: Any, recipe: Recipe) -> dict[str, Any]:
    """Some numbers of the network's answer to a fixed input, for the receipt."""
    return {"answer": _answer(network, recipe).tolist()}


def faithful(network: Any, recipe: Recipe, kept: dict[str, Any]) -> bool:
    """Whether a network gives the numbers in a receipt, where there are any."""
    if "answer" not in kept:
        return True
    expected = torch.tensor(kept["answer"])
    return bool((_answer(network, recipe) - expected).abs().max() <= ALIKE * expected.abs().max())


@torch.inference_mode()
def _answer(network: Any, recipe: Recipe) -> Tensor:
    """WITNESSES numbers, evenly spread over what the network makes of fixed noise."""
    device = next(network.parameters()).device
    one = torch.zeros(1, dtype=torch.int64, device=device)
    if recipe.family == "diffusion":
        answer = network(normal(0, one, network.shape), one.float(), {})
    elif recipe.family == "autoregressive":
        answer = network(torch.arange(min(8, recipe.network.context), device=device)[None])[0]
    elif recipe.family == "adversarial":
        told = {"label": one} if network.classes else {}
        answer = network.render(network.map(normal(0, one, network.latent_shape), told),
                                normal(1, one, network.noise_shape))
    else:
        answer = network.decode(normal(0, one, network.latent_shape), {})
    flat: Tensor = answer.flatten().float().cpu()
    return flat[torch.linspace(0, flat.numel() - 1, WITNESSES).long()]

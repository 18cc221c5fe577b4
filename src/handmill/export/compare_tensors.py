"""Whether the written graphs of an image model give what the trained network gives, item by item.

N items compared, B items in a pass, C channels, *S space, H height, W width, *L a latent, *s the space of codes.
"""

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from handmill.data.noise import normal
from handmill.data.order import draw
from handmill.errors import UserError
from handmill.export.compare import ROUNDING, TOLERANCE
from handmill.export.onnx_tensors import Graph
from handmill.families.diffusion import noise_levels
from handmill.folder import Model

SIGMAS = 6  # compared, from the least to the largest that is sampled
TRUNCATIONS = (0.0, 0.5, 0.7, 1.0, 1.5)  # compared
PASS = 8  # items at once; the first goes alone, so that the batch is seen to be free

Run = Callable[[dict[str, Tensor]], tuple[Tensor, ...]]


@torch.no_grad()
def compare(graph: Graph, run: Run, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Compare what `run` makes of `inputs` (N, ...) by name with `graph.module` in fp32, and record the figures.

    Each item may be off by TOLERANCE or, where that is more, by ROUNDING times its own fp32 error, measured against
    float64. Of codes it is the distance of their vectors from what they stand for that may be off: where two codes
    are as near, rounding decides. The figures are of the item that comes nearest to what it may be off by. Raises
    UserError when an item is off by more, or holds a NaN.
    """
    module, exact = graph.module, copy.deepcopy(graph.module).double()
    expected = _passes(lambda some: _tuple(module(*some.values())), inputs)
    made = _passes(run, inputs)
    double = {name: v.double() if v.is_floating_point() else v for name, v in inputs.items()}
    right = _passes(lambda some: _tuple(exact(*some.values())), double)
    if _are_codes(right):
        wanted, made, right = (_distances(exact, codes, double) for codes in (expected, made, right))
        errors, rounding = _apart(made, right), _apart(wanted, right)
    else:
        errors, rounding = _apart(made, expected), _apart(expected, right)  # (N,)
    allowed = (ROUNDING * rounding).clamp(min=TOLERANCE)
    worst = int((errors / allowed).argmax())  # a NaN is the largest
    error, most = errors[worst].item(), allowed[worst].item()
    if not error <= most:  # so written, a NaN is refused
        raise UserError(f"{graph.file} does not compute what the trained network does (it is off by {error:.1e}, at "
                        f"most {most:.0e} allowed): the export was removed; try another version of the package that "
                        "runs it")
    return {"largest_error": error, "tolerance": most, "fp32_rounding": rounding[worst].item(),
            "items_compared": len(errors), "numbers_compared": sum(v.numel() for v in expected)}


def inputs_of(graph: Graph, model: Model, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What a graph is compared on, by name: `images` (N, C, H, W) in [-1, 1] with `labels` (N,), or what they become.

    A denoiser gets them at SIGMAS noise levels, a decoder what the encoder makes of them and as much from nothing, a
    generator as many latents at every one of TRUNCATIONS.
    """
    first = next(iter(graph.inputs))
    if first == "images":
        return _with_labels(graph, {"images": images}, labels)
    if first == "x":
        return _noised(graph, model, images, labels)
    if "truncation" in graph.inputs:
        return _truncated(graph, model, labels)
    module: Any = graph.module
    with torch.no_grad():
        encoded = module.encoded(*_with_labels(graph, {"images": images}, labels).values())
    return _with_labels(graph, {first: torch.cat((encoded, _from_nothing(graph, model, len(images))))},
                        labels.repeat(2))


@torch.no_grad()
def _noised(graph: Graph, model: Model, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """x = y + sigma n of every image at every sigma: (SIGMAS * N, C, *S)."""
    low, high = noise_levels.ends(model.recipe.objective)
    y = model.codec.encode(images).repeat(SIGMAS, *[1] * (len(model.codec.shape)))
    sigma = noise_levels.logsnr_grid(SIGMAS, low, high)[:-1].float().repeat_interleave(len(images))
    noise = normal(draw(model.recipe.seed, "compare"), torch.arange(len(y)), model.codec.shape)
    x = y + sigma.view(-1, *[1] * (y.ndim - 1)) * noise
    mixed = torch.arange(len(y)).view(SIGMAS, -1).T.flatten()  # so that a batch holds several sigmas
    return _with_labels(graph, {"x": x[mixed], "sigma": sigma[mixed]}, labels.repeat(SIGMAS)[mixed])


def _truncated(graph: Graph, model: Model, labels: Tensor) -> dict[str, Tensor]:
    """Standard normal latents and noise, every truncation in turn; the classes of `labels`, where one is asked for."""
    count = len(TRUNCATIONS) * len(labels)
    classes = max(1, len(model.codec.classes))
    given = {"truncation": torch.tensor(TRUNCATIONS).repeat(len(labels)),
             "label": (labels % classes).repeat_interleave(len(TRUNCATIONS))}
    for i, (name, example) in enumerate(graph.inputs.items()):
        given.setdefault(name, normal(draw(model.recipe.seed, "compare", i), torch.arange(count),
                                      tuple(example.shape[1:])))
    return {name: given[name] for name in graph.inputs}


def _from_nothing(graph: Graph, model: Model, count: int) -> Tensor:
    """Codes drawn evenly from all there are, or a standard normal latent: (count, ...)."""
    module: Any = graph.module
    example = next(iter(graph.inputs.values()))
    if example.is_floating_point():
        return normal(draw(model.recipe.seed, "compare"), torch.arange(count), tuple(example.shape[1:]))
    generator = torch.Generator().manual_seed(model.recipe.seed)
    return torch.randint(module.network.vocabulary, (count, *example.shape[1:]), generator=generator)


def _with_labels(graph: Graph, inputs: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
    return inputs | ({"label": labels} if "label" in graph.inputs else {})


def _passes(run: Run, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Every output (N, ...) of `run`."""
    count = len(next(iter(inputs.values())))
    cuts = sorted({0, 1, count, *range(1 + PASS, count, PASS)})
    parts = [run({name: value[a:b] for name, value in inputs.items()}) for a, b in pairwise(cuts)]
    return tuple(torch.cat(output) for output in zip(*parts, strict=True))


def _distances(module: nn.Module, codes: tuple[Tensor, ...], inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    distances: Tensor = module.distance(codes[0], *inputs.values())  # type: ignore[operator]
    return (distances,)


def _apart(some: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> Tensor:
    """The largest difference of each item, over all outputs: (N,) float64."""
    each = [(a.double() - b.double()).abs().flatten(1).amax(1) for a, b in zip(some, others, strict=True)]
    return torch.stack(each).amax(0)


def _are_codes(outputs: tuple[Tensor, ...]) -> bool:
    return not outputs[0].is_floating_point()


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)

"""Whether another form of a network gives its outputs: the largest logits error, and the greedy tokens.

A network that carries its state is also followed from segment to segment and far beyond its context, where an error
of the state would have grown.

B windows, T tokens a window, V vocabulary.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from handmill.errors import UserError
from handmill.families.autoregressive import greedy

TOLERANCE = 1e-4  # largest absolute error of a logit, both networks in fp32 ...
ROUNDING = 8  # ... or so many times what fp32 itself changes, where that is more: large logits of a deep network
GREEDY = 32  # tokens
SEGMENTS = 4  # that a window is cut into for a network that carries its state ...
CONTEXTS = 4  # ... and contexts beyond its memory that the continuation of each is followed for ...
LONGEST = 4096  # ... but no more tokens than these


@torch.inference_mode()
def compare(network: Any, other: Any, windows: Tensor, cached: bool = True) -> dict[str, Any]:
    """Compare `other` with the trained `network` on windows (B, T) of tokens and record the figures.

    The logits of whole windows; with `cached` also of windows cut into a prompt, single tokens and a chunk,
    and of a batch padded on the left; then the greedy continuation of every window's first half. Of a network that
    `carries` its state a window is its first segment here, and all of them are followed too (see _carried). Raises
    UserError when an error is above what is allowed (see TOLERANCE) or a greedy token differs.
    """
    carries = cached and getattr(network, "carries", False)
    segments = windows.split(max(1, windows.shape[1] // SEGMENTS), 1) if carries else (windows,)
    first, exact = segments[0], copy.deepcopy(network).double()
    expected = network(first)[0]  # (B, T, V)
    errors, roundings = [_largest(other(first)[0], expected)], [_largest(exact(first)[0], expected)]
    if cached:
        errors.append(_largest(_in_steps(other, first), expected))
    if cached and hasattr(network, "padded"):
        errors += _padded(network, other, first)
    followed = _carried((network, other, exact), segments, errors, roundings) if carries else {}
    error, rounding = (float(torch.tensor(x, dtype=torch.float64).max()) for x in (errors, roundings))
    # not max(errors), which loses a NaN
    allowed = max(TOLERANCE, ROUNDING * rounding)
    half = max(1, first.shape[1] // 2)
    prompts = [window[:half].tolist() for window in first]
    same = all(greedy(network, prompt, GREEDY) == greedy(other, prompt, GREEDY, cached) for prompt in prompts)
    if not error <= allowed or not same:  # so written, a NaN is refused
        raise UserError(
            f"the export does not compute what the trained network does (logits differ by {error:.1e}, at "
            f"most {allowed:.0e} allowed; greedy tokens {'agree' if same else 'differ'}): it was removed; "
            "try another version of the package that runs it")
    return {"logits_error": error, "tolerance": allowed, "fp32_rounding": rounding,
            "logits_compared": expected.numel(), "greedy_tokens": GREEDY * len(prompts), "steps_with_cache": cached,
            **followed}


def _carried(networks: tuple[Any, Any, Any], segments: Sequence[Tensor], errors: list[float],
             roundings: list[float]) -> dict[str, int]:
    """Hand the states of the trained network, the other and the exact one (in fp64) on from segment to segment, then
    along the trained network's greedy continuation, and add the errors to the lists.

    A token of the continuation at which the other's likeliest is another one is no fault by itself: so many are
    followed that some are ties, which the logits' error accounts for. They are counted.
    """
    settings, states, same = networks[0].settings, [None] * 3, 0

    def read(tokens: Tensor) -> tuple[Tensor, Tensor]:  # the likeliest next tokens of the first two, (B, 1)
        made = [network(tokens, state) for network, state in zip(networks, states, strict=True)]
        states[:] = [state for _, state in made]
        expected, logits, exact = (logits for logits, _ in made)
        errors.append(_largest(logits, expected))
        roundings.append(_largest(exact, expected))
        return expected[:, -1:].argmax(-1), logits[:, -1:].argmax(-1)

    for segment in segments:
        mine, its = read(segment)
    steps = min(CONTEXTS * settings.context + getattr(settings, "memory", 0), LONGEST)
    for _ in range(steps):
        same += int((mine == its).sum())
        mine, its = read(mine)
    return {"segments": len(segments), "continued_tokens": steps * len(mine), "continued_alike": same}


def _largest(logits: Tensor, expected: Tensor) -> float:
    return float((logits.double().cpu() - expected.double().cpu()).abs().max())


def _in_steps(network: Any, windows: Tensor) -> Tensor:
    """The logits of the windows read as a prompt, single tokens and a chunk, the state carried on."""
    length, state, parts = windows.shape[1], None, []
    for chunk in windows.tensor_split(list(range(max(1, length - 6), max(1, length - 2))), 1):
        logits, state = network(chunk, state)
        parts.append(logits)
    return torch.cat(parts, 1)  # (B, T, V)


def _padded(network: Any, other: Any, windows: Tensor) -> list[float]:
    """The largest errors where row i has i tokens of padding: of a prompt, and of a single token after it."""
    padding = torch.arange(windows.shape[0]).clamp(max=windows.shape[1] - 1)  # (B,)
    errors, mine, its = [], network.padded(padding), other.padded(padding)
    for chunk in windows.tensor_split([windows.shape[1] - 1], 1):
        expected, mine = network(chunk, mine)
        logits, its = other(chunk, its)
        real = torch.arange(mine.length - chunk.shape[1], mine.length) >= padding[:, None]  # (B, T)
        errors.append(_largest(logits[real], expected[real]) if real.any() else 0.0)
    return errors

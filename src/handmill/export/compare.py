"""Whether another form of a network gives its outputs: the largest logits error, and the greedy tokens.

A network that carries its state is also followed from segment to segment and far beyond its context. Along the way
each step starts from the trained network's own state, and what it makes of the state is compared as well: errors that
grow by themselves, as they may in recurrent networks, would otherwise hide any other.

B windows, T tokens a window, V vocabulary.
"""

import copy
import math
from collections.abc import Iterator, Sequence
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
    `carries` its state a window is its first segment here, and all of them are followed too (see _followed). Raises
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
    for error, rounding in _handed_on(network, other, exact, segments) if carries else ():
        errors.append(error)
        roundings.append(rounding)
    found = _judged("logits", errors, roundings)
    if carries:
        found |= _followed(network, other, exact, segments)
    half = max(1, first.shape[1] // 2)
    prompts = [window[:half].tolist() for window in first]
    if not all(greedy(network, prompt, GREEDY) == greedy(other, prompt, GREEDY, cached) for prompt in prompts):
        raise _refusal(f"greedy tokens differ, and logits by {found['logits_error']:.1e}")
    return {**found, "logits_compared": expected.numel(), "greedy_tokens": GREEDY * len(prompts),
            "steps_with_cache": cached}


def _judged(what: str, errors: list[float], roundings: list[float]) -> dict[str, Any]:
    """The largest error beside what is allowed of it. Raises UserError when it is above that."""
    error, rounding = (float(torch.tensor(x, dtype=torch.float64).max()) for x in (errors, roundings))
    allowed = max(TOLERANCE, ROUNDING * rounding)
    if not error <= allowed:  # so written, and not with max(errors), a NaN is refused
        raise _refusal(f"{what} differ by {error:.1e}, at most {allowed:.0e} allowed")
    return {f"{what}_error": error, "tolerance": allowed, "fp32_rounding": rounding}


def _refusal(why: str) -> UserError:
    return UserError(f"the export does not compute what the trained network does ({why}): it was removed; "
                     "try another version of the package that runs it")


def _handed_on(network: Any, other: Any, exact: Any, segments: Sequence[Tensor]) -> Iterator[tuple[float, float]]:
    """The largest error and rounding of each segment, all three reading on from their own states."""
    mine, its, precisely = None, None, None
    for segment in segments:
        expected, mine = network(segment, mine)
        logits, its = other(segment, its)
        precise, precisely = exact(segment, precisely)
        yield _largest(logits, expected), _largest(precise, expected)


def _followed(network: Any, other: Any, exact: Any, segments: Sequence[Tensor]) -> dict[str, Any]:
    """The trained network's greedy continuation of the segments, each step from its own state: the largest error of
    logits and of the state, and at how many tokens the other's likeliest is the same (not where two are tied).
    """
    state, settings = None, network.settings
    for segment in segments:
        logits, state = network(segment, state)
    tokens, errors, roundings, alike = logits[:, -1:].argmax(-1), [], [], 0
    steps = min(CONTEXTS * settings.context + getattr(settings, "memory", 0), LONGEST)
    for step in range(steps):
        expected, after = network(tokens, state)
        logits, its = other(tokens, state)
        errors += [_largest(logits, expected), *_differences(its, after)]
        if step < GREEDY:
            precise, precisely = exact(tokens, _wide(state))
            roundings += [_largest(precise, expected), *_differences(precisely, after)]
        alike += int((logits.argmax(-1) == expected.argmax(-1)).sum())
        tokens, state = expected.argmax(-1), after
    judged = _judged("steps", errors, roundings)
    return {"segments": len(segments), "steps_error": judged["steps_error"], "steps_tolerance": judged["tolerance"],
            "steps_tokens": steps * len(tokens), "steps_alike": alike}


def _tensors(state: Any) -> list[Tensor]:
    return [state] if isinstance(state, Tensor) else [tensor for part in state or () for tensor in _tensors(part)]


def _differences(state: Any, expected: Any) -> list[float]:
    """The largest difference of each tensor of a state."""
    return [float((one - two).abs().max()) if one.shape == two.shape else math.inf
            for one, two in zip(_tensors(state), _tensors(expected), strict=True)]


def _wide(state: Any) -> Any:
    """The state in fp64."""
    if isinstance(state, Tensor):
        return state.double() if state.is_floating_point() else state
    if not isinstance(state, tuple):
        return state
    parts = [_wide(part) for part in state]
    return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)


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

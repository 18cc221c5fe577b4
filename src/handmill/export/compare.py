"""Whether another form of a network gives its outputs: the largest logits error, and the greedy tokens.

B windows, T tokens a window, V vocabulary.
"""

import copy
from typing import Any

import torch
from torch import Tensor

from handmill.errors import UserError
from handmill.families.autoregressive import greedy

TOLERANCE = 1e-4  # largest absolute error of a logit, both networks in fp32 ...
ROUNDING = 8  # ... or so many times what fp32 itself changes, where that is more: large logits of a deep network
GREEDY = 32  # tokens


@torch.inference_mode()
def compare(network: Any, other: Any, windows: Tensor, cached: bool = True) -> dict[str, Any]:
    """Compare `other` with the trained `network` on windows (B, T) of tokens and record the figures.

    The logits of whole windows; with `cached` also of windows cut into a prompt, single tokens and a chunk,
    and of a batch padded on the left; then the greedy continuation of every window's first half. Raises
    UserError when an error is above what is allowed (see TOLERANCE) or a greedy token differs.
    """
    expected = network(windows)[0]  # (B, T, V)
    errors = [_largest(other(windows)[0], expected)]
    if cached:
        errors += [_largest(_in_steps(other, windows), expected), *_padded(network, other, windows)]
    error = float(torch.tensor(errors, dtype=torch.float64).max())  # not max(errors), which loses a NaN
    rounding = _largest(copy.deepcopy(network).double()(windows)[0], expected)
    allowed = max(TOLERANCE, ROUNDING * rounding)
    half = max(1, windows.shape[1] // 2)
    prompts = [window[:half].tolist() for window in windows]
    same = all(greedy(network, prompt, GREEDY) == greedy(other, prompt, GREEDY, cached) for prompt in prompts)
    if not error <= allowed or not same:  # so written, a NaN is refused
        raise UserError(
            f"the export does not compute what the trained network does (logits differ by {error:.1e}, at "
            f"most {allowed:.0e} allowed; greedy tokens {'agree' if same else 'differ'}): it was removed; "
            "try another version of the package that runs it")
    return {"logits_error": error, "tolerance": allowed, "fp32_rounding": rounding,
            "logits_compared": expected.numel(), "greedy_tokens": GREEDY * len(prompts), "steps_with_cache": cached}


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

"""What a cached step costs as the sequence grows, and tokens per second in training and sampling, network by network.

    python benchmarks/stepping.py --out docs/images/cached-step.png

Networks of about 0.8M parameters with random weights. Without a cache a step reads its whole window again; a plain
decoder's window ends at its context, a decoder with a memory and a recurrent network go on for ever.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from networks import NETWORKS
from table import append
from torch import nn

from handmill.families.autoregressive import following, limit, slide
from handmill.networks import build
from handmill.recipe import KINDS, Training
from handmill.recipe import build as settings
from handmill.training.optimizers import optimizers
from handmill.training.precision import HalfPrecision

VOCABULARY, BATCH = 67, 32
PLACES = (16, 64, 256, 1024, 4096)  # tokens in the sequence


class Codec:
    size = VOCABULARY


def network_of(name: str, **changes: Any) -> Any:
    import importlib

    table = NETWORKS[name][0] | changes
    module, _, cls = KINDS["network"][table["kind"]].partition(":")
    return build(settings(getattr(importlib.import_module(module), cls), table, "network"), Codec()).eval()


def steps(network: Any, length: int, cached: bool) -> Iterator[float]:
    """Seconds of each greedy step, one token after another until the sequence has `length`."""
    window, reading = [1], None
    for _ in range(length):
        start = time.perf_counter()
        logits, reading = following(network, [window], reading if cached else None)
        yield time.perf_counter() - start
        window = slide(window, int(logits.argmax()), limit(network))


def cost(network: Any, cached: bool, most: int) -> list[float]:
    """Milliseconds of a step, the median over 16 steps up to each of PLACES."""
    found = list(steps(network, most, cached))
    return [1000 * statistics.median(found[max(0, place - 16):place]) for place in PLACES if place <= len(found)]


def training(network: nn.Module, context: int, seconds: float) -> float:
    """Tokens per second of whole bf16 steps with carried state, the median."""
    network.train()
    module, made = HalfPrecision(network), optimizers(network, Training())
    tokens = torch.randint(VOCABULARY, (BATCH, context + 1))
    state = network.blank(BATCH, torch.device("cpu")) if getattr(network, "carries", False) else None
    taken: list[float] = []
    while sum(taken) < seconds or len(taken) < 5:
        start = time.perf_counter()
        loss, after = module(tokens[:, :-1], state, targets=tokens[:, 1:])
        (loss / tokens.numel()).backward()
        for optimizer in made:
            for group in optimizer.param_groups:
                group["lr"] = 0.0
            optimizer.step()
        network.zero_grad(set_to_none=True)
        state = network.detached(after) if state is not None else None
        taken.append(time.perf_counter() - start)
    network.eval()
    return BATCH * context / statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("cached-step.png"))
    parser.add_argument("--seconds", type=float, default=5.0, help="of training steps, each network")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    curves = {}
    for name in NETWORKS:
        network = network_of(name)
        long = network_of(name, context=PLACES[-1]) if name == "GPT" else network
        speed = training(network, network.settings.context, args.seconds)
        cached, anew = cost(long, True, PLACES[-1]), cost(long, False, 1024)
        curves[name], curves[f"{name}, read anew"] = cached, anew
        append("stepping", {"network": name, "parameters": f"{sum(p.numel() for p in network.parameters()):,}",
                            "training tokens/s": f"{speed:,.0f}",
                            **{f"ms at {place}": f"{ms:.2f}" for place, ms in zip(PLACES, cached, strict=True)},
                            "anew, ms at 1024": f"{anew[-1]:.1f}"})
    draw(curves, args.out)


def draw(curves: dict[str, list[float]], out: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure((7, 4.2), layout="constrained")
    axes = figure.subplots()
    colours = {name: f"C{i}" for i, name in enumerate(NETWORKS)}
    for name, values in curves.items():
        plain = name.removesuffix(", read anew")
        axes.plot(PLACES[:len(values)], values, "o-" if name == plain else "x:", color=colours[plain], label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens in the sequence", ylabel="milliseconds a token",
             title="A step with its state kept, and one that reads everything anew (one core)")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    main()

"""Training speed: tokens/s and the share of the measured matrix peak, ours beside a plain eager fp32 loop, in turns.

    python benchmarks/step.py [--seconds 20] [--only small|124m]

small: 4 layers, 128 wide, context 64, batch 32, 67 tokens in the vocabulary.
124m: GPT-2's smallest shape, 4 x 512 tokens.
Both sides do a whole step: forward, backward, clipping, optimizer (ours Muon in the small one, AdamW in the large,
where Muon's share is large because the batch is small). Medians over steps of alternating rounds.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import peer
import torch
from table import append
from torch import Tensor

from handmill.families import next_token
from handmill.networks.decoder import Decoder, Settings
from handmill.recipe import Training
from handmill.training.loop import Choices, Phase, Run, Task
from handmill.training.monitor import Monitor
from handmill.training.optimizers import optimizers
from handmill.training.precision import keep_freed_memory, matrix_peak

CPU = torch.device("cpu")
SHAPES = {
    "small": (Settings(layers=4, width=128, heads=4, context=64, norm="layer"), 67, 32, "muon"),
    "124m": (Settings(layers=12, width=768, heads=12, context=512, norm="layer", tied=True), 50304, 4, "adamw"),
}


def our_step(settings: Settings, vocabulary: int, batch: int, optimizer: str, precision: str,
             folder: Path) -> tuple[Callable[[], None], Task]:
    torch.manual_seed(1)
    network = Decoder(settings, vocabulary)
    training = Training(steps=10**6, batch=batch, optimizer=optimizer,  # type: ignore[arg-type]
                        evaluate_every=10**6, save_every=10**6)
    data = torch.randint(vocabulary, (batch, settings.context + 1))
    phase = Phase("network", network, next_token.loss, lambda b: b[:, 1:].numel(), optimizers(network, training))
    task = Task([phase], lambda places: data, lambda m: (0.0, 1.0), lambda m: "", settings.context,
                network.flops_per_token())
    run = Run(task, training, 1, folder, CPU, Monitor(folder, quiet=True), Choices(precision=precision))
    return run.step, task


def peer_step(settings: Settings, vocabulary: int, batch: int) -> Callable[[], None]:
    model = peer.GPT(vocabulary, settings.layers, settings.width, settings.heads, settings.context)
    optimizer = peer.adamw(model, 1e-3)
    data: Tensor = torch.randint(vocabulary, (batch, settings.context + 1))
    return lambda: void(peer.step(model, optimizer, data[:, :-1], data[:, 1:]))


def void(_: object) -> None:
    """Drop a value."""


def in_turns(steps: dict[str, Callable[[], None]], seconds: float) -> dict[str, float]:
    """Median seconds of each step, measured in alternating rounds so that a drifting machine treats all alike."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    end = time.perf_counter() + seconds * len(steps)
    while time.perf_counter() < end or min(map(len, times.values())) < 3:
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each side")
    parser.add_argument("--only", choices=tuple(SHAPES))
    args = parser.parse_args()
    keep_freed_memory()
    peaks = {p: matrix_peak(CPU, d, 1.0) for p, d in (("fp32", torch.float32), ("bf16", torch.bfloat16))}
    for name in [args.only] if args.only else SHAPES:
        settings, vocabulary, batch, optimizer = SHAPES[name]
        with tempfile.TemporaryDirectory() as folder:
            sides, task = {"peer": peer_step(settings, vocabulary, batch)}, None
            for precision in ("fp32", "bf16"):
                sides[precision], task = our_step(settings, vocabulary, batch, optimizer, precision, Path(folder))
            seconds = in_turns(sides, args.seconds)
        assert task is not None
        tokens = batch * settings.context
        row = {"model": name, "our optimizer": optimizer,
               "peak fp32 / bf16, GFLOP/s": " / ".join(f"{peak / 1e9:.0f}" for peak in peaks.values())}
        for side in ("fp32", "bf16"):
            share = tokens / seconds[side] * task.flops / peaks[side]
            row[f"ours {side}, tokens/s"] = f"{tokens / seconds[side]:.0f} ({100 * share:.0f} % of the peak)"
        share = tokens / seconds["peer"] * task.flops / peaks["fp32"]
        row["peer fp32, tokens/s"] = f"{tokens / seconds['peer']:.0f} ({100 * share:.0f} % of the peak)"
        row["times faster"] = f"{seconds['peer'] / min(seconds['fp32'], seconds['bf16']):.2f}"
        append("step", row)


if __name__ == "__main__":
    main()

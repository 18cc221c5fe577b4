"""U-Net training speed: images/s of a whole step, ours beside diffusers' UNet2DModel of like size, in turns.

    pip install --target PEER --no-deps diffusers==0.42.1 requests urllib3 charset-normalizer importlib_metadata zipp
    PYTHONPATH=PEER python benchmarks/unet.py [--seconds 20] [--threads N]

32 x 32 x 3 images, batch 32: forward, backward, AdamW. Ours in fp32 and on bf16 copies of the weights; the peer in fp32
and under bf16 autocast, with torch's AdamW. Both see three sizes of map at widths of 64 and 128 (the peer 128, ours 192
on the smallest), two residual blocks a level and attention at 8 x 8. The peer's up path has three blocks a level at
double width, so one of its images costs more arithmetic: the row says how much. Medians of alternating rounds.
"""

import argparse
import importlib.metadata
from collections.abc import Callable

import torch
from step import in_turns
from table import append
from torch import Tensor, nn

from handmill.networks.unet import Settings, UNet
from handmill.recipe import Training
from handmill.training.optimizers import optimizers
from handmill.training.precision import HalfPrecision, keep_freed_memory

SHAPE, BATCH = (3, 32, 32), 32
OURS = Settings(width=64, multipliers=(1, 2, 3), blocks=2)


def ours(images: Tensor, noise: Tensor, half: bool) -> tuple[Callable[[], None], UNet]:
    torch.manual_seed(1)
    network = UNet(OURS, SHAPE)
    chosen = optimizers(network, Training(optimizer="adamw", learning_rate=2e-4))
    module: nn.Module = HalfPrecision(network) if half else network

    def step() -> None:
        (module(images, noise, {}) - images).square().mean().backward()
        for optimizer in chosen:
            optimizer.step()
        network.zero_grad(set_to_none=True)

    return step, network


def peer(images: Tensor, noise: Tensor, half: bool) -> tuple[Callable[[], None], nn.Module]:
    from diffusers import UNet2DModel

    torch.manual_seed(1)
    network = UNet2DModel(
        sample_size=32, in_channels=3, out_channels=3, block_out_channels=(64, 128, 128), layers_per_block=2,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"))
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-4)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            estimate = network(images, noise).sample
        (estimate.float() - images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, network


def forward_flops(network: nn.Module, *arguments: object) -> int:
    """Of one image, without attention's own products, which the counter does not see in a CPU's flash kernel."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, *SHAPE), torch.zeros(1), *arguments)
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each of the four sides")
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    args = parser.parse_args()
    keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    images, noise = torch.randn(BATCH, *SHAPE), torch.randn(BATCH)
    makers = {"ours fp32": (ours, False), "ours bf16": (ours, True), "peer fp32": (peer, False),
              "peer bf16 autocast": (peer, True)}
    sides = {name: make(images, noise, half) for name, (make, half) in makers.items()}
    seconds = in_turns({name: step for name, (step, _) in sides.items()}, args.seconds)
    row: dict[str, object] = {"peer": f"diffusers {importlib.metadata.version('diffusers')}",
                              "threads": torch.get_num_threads()}
    for side, extra in (("ours", [{}]), ("peer", [])):
        network = sides[f"{side} fp32"][1]
        row[f"{side}, M parameters"] = f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f}"
        row[f"{side}, forward GFLOP an image"] = f"{forward_flops(network, *extra) / 1e9:.2f}"
    for name, median in seconds.items():
        row[f"{name}, images/s"] = f"{BATCH / median:.1f}"
    best = {side: min(t for name, t in seconds.items() if name.startswith(side)) for side in ("ours", "peer")}
    row["times faster"] = f"{best['peer'] / best['ours']:.2f}"
    append("unet", row)


if __name__ == "__main__":
    main()

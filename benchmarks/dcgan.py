"""DCGAN training speed: images/s of a whole step, ours beside a plain implementation of the same network, in turns.

    python benchmarks/dcgan.py [--seconds 20] [--threads N]

64 x 64 x 3 images, batch 16: the discriminator on real and on made images, its AdamW, the generator through it, its
AdamW; non-saturating loss. Ours in fp32 and on bf16 copies of the weights. The plain one is torch's layers as they come
(nn.ConvTranspose2d, nn.BatchNorm2d, binary cross-entropy, Adam; fp32, channels first), and the same under bf16 autocast
with channels last. Medians of alternating rounds.
"""

import argparse
from collections.abc import Callable

import torch
from step import in_turns
from table import append
from torch import Tensor, nn
from torch.nn import functional as F

from handmill.networks.dcgan import Discriminator, Generator, Settings
from handmill.training.optimizers import AdamW
from handmill.training.precision import HalfPrecision, keep_freed_memory

SHAPE, BATCH, STANDARD = (3, 64, 64), 16, Settings(latent=100)
RATE, BETAS = 2e-4, (0.5, 0.999)


def ours(images: Tensor, half: bool) -> Callable[[], None]:
    torch.manual_seed(1)
    networks = Generator(STANDARD, SHAPE), Discriminator(STANDARD, SHAPE)
    optimizers = [AdamW([{"params": list(n.parameters())}], RATE, BETAS) for n in networks]
    make, judge = (HalfPrecision(n) if half else n for n in networks)

    def sample() -> Tensor:
        return make(torch.randn(BATCH, STANDARD.latent), {}, torch.empty(BATCH, 0))[0]

    def update(which: int, loss: Callable[[], Tensor]) -> None:
        for i, network in enumerate(networks):
            network.requires_grad_(i == which)
        loss().backward()
        optimizers[which].step()
        networks[which].zero_grad(set_to_none=True)

    def step() -> None:
        update(1, lambda: F.softplus(judge(sample(), {})).mean() + F.softplus(-judge(images, {})).mean())
        update(0, lambda: F.softplus(-judge(sample(), {})).mean())

    return step


def plain_networks() -> tuple[nn.Sequential, nn.Sequential]:
    widths = [512, 256, 128, 64]
    make: list[nn.Module] = [nn.ConvTranspose2d(STANDARD.latent, 512, 4, bias=False)]
    judge: list[nn.Module] = [nn.Conv2d(3, 64, 4, 2, 1, bias=False), nn.LeakyReLU(0.2)]
    for a, b in zip(widths, [*widths[1:], 3], strict=True):
        make += [nn.BatchNorm2d(a), nn.ReLU(), nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False)]
    for a, b in zip(widths[:0:-1], widths[-2::-1], strict=True):
        judge += [nn.Conv2d(a, b, 4, 2, 1, bias=False), nn.BatchNorm2d(b), nn.LeakyReLU(0.2)]
    return nn.Sequential(*make, nn.Tanh()), nn.Sequential(*judge, nn.Conv2d(512, 1, 4, bias=False), nn.Flatten(0))


def plain(images: Tensor, half: bool) -> Callable[[], None]:
    torch.manual_seed(1)
    networks = plain_networks()
    make, judge = (n.to(memory_format=torch.channels_last) if half else n for n in networks)
    images = images.contiguous(memory_format=torch.channels_last) if half else images
    for_make, for_judge = (torch.optim.Adam(n.parameters(), lr=RATE, betas=BETAS) for n in networks)
    real, made = torch.ones(BATCH), torch.zeros(BATCH)

    def loss(x: Tensor, target: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            scores = judge(x)
        return F.binary_cross_entropy_with_logits(scores.float(), target)

    def step() -> None:
        for_judge.zero_grad()
        loss(images, real).backward()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            fakes = make(torch.randn(BATCH, STANDARD.latent, 1, 1))
        loss(fakes.detach(), made).backward()
        for_judge.step()
        for_make.zero_grad()
        loss(fakes, real).backward()
        for_make.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each of the four sides")
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    args = parser.parse_args()
    keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    images = torch.rand(BATCH, *SHAPE) * 2 - 1
    sides = {"ours fp32": ours(images, False), "ours bf16": ours(images, True), "plain fp32": plain(images, False),
             "plain bf16 autocast, channels last": plain(images, True)}
    seconds = in_turns(sides, args.seconds)
    row: dict[str, object] = {"threads": torch.get_num_threads()}
    row |= {f"{name}, images/s": f"{BATCH / median:.1f}" for name, median in seconds.items()}
    best = min(seconds[name] for name in sides if name.startswith("ours"))
    row["times plain fp32"] = f"{seconds['plain fp32'] / best:.2f}"
    append("dcgan", row)


if __name__ == "__main__":
    main()

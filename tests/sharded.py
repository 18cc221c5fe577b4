"""Runs that two processes share: `python sharded.py FOLDER RANK NAME ...` is one of the two.

It trains the cases of these names into FOLDER/NAME; "relay" takes turns with a single process at one run.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import test_carried
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch import distributed as dist

from handmill.data.windows import Windows, in_turn
from handmill.families import next_token, variational
from handmill.families.diffusion import denoiser
from handmill.families.diffusion.noise_levels import Objective
from handmill.networks.autoencoder import Autoencoder
from handmill.networks.autoencoder import Settings as AutoencoderSettings
from handmill.networks.decoder import Decoder
from handmill.networks.decoder import Settings as DecoderSettings
from handmill.networks.unet import Settings as UNetSettings
from handmill.networks.unet import UNet
from handmill.networks.weights import weights_of
from handmill.recipe import Training
from handmill.training import checkpoint, distributed, sharding
from handmill.training.batches import Batch
from handmill.training.loop import Choices, Phase, Run, Task
from handmill.training.monitor import Monitor
from handmill.training.optimizers import Optimizer, optimizers

CPU = torch.device("cpu")
VOCABULARY = 11
TRAINING = Training(steps=6, batch=8, warmup=2, matrix_rate=5e-3, evaluate_every=3, save_every=4, sample_every=1e-9,
                    ema=0.9, clip=0.5, shard=True)


def gpt(training: Training, **settings: Any) -> Task:
    torch.manual_seed(0)
    network = Decoder(DecoderSettings(**{"layers": 2, "width": 32, "heads": 2, "context": 16} | settings), VOCABULARY)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, 2000).astype(np.uint16)
    windows, held_out = Windows(tokens[:1500], 16, 1), in_turn(tokens[1500:], 16)
    phase = Phase("network", network, next_token.loss, next_token.count, optimizers(network, training))
    return Task([phase], windows.batch, lambda m: next_token.evaluate(m, held_out), shown, 16, 1.0)


def shown(network: nn.Module) -> str:
    """A sample, taken without the hooks of a forward pass: the weights must be there."""
    return f"{sum(p.double().square().sum().item() for p in network.parameters()):.3f}"


def images(network: nn.Module, training: Training, rules: list[Optimizer],
           loss: Callable[[nn.Module, Batch], Tensor]) -> Task:
    """One noise an image and step, whichever process has it."""
    def batch(places: Any) -> Batch:
        made = [torch.randn(2, 1, 12, 12, generator=torch.Generator().manual_seed(int(p))) for p in places]
        return {"x": torch.stack(made)[:, 0], "noise": torch.stack(made)[:, 1]}

    def evaluate(module: nn.Module) -> dict[str, float]:
        mine = np.arange(1000, 1005)[distributed.rank()::distributed.world()]
        return {"loss": loss(module, batch(mine)).item(), "items": float(len(mine))}

    phase = Phase("network", network, lambda m, b: (loss(m, b), {}), lambda b: len(b["x"]), rules)  # type: ignore[index]
    return Task([phase], batch, evaluate, shown, 1, 1.0)


def vqvae(training: Training) -> Task:
    torch.manual_seed(0)
    network = Autoencoder(AutoencoderSettings(patch=2, width=8, multipliers=(1, 2), latent=4, flat=False,
                                              bottleneck="vq", codes=16), (1, 12, 12), 3)
    objective = variational.Objective(likelihood="gaussian")

    def loss(module: nn.Module, batch: Any) -> Tensor:
        return variational.loss_parts(module, batch["x"], torch.zeros(0), {}, objective)["loss"].float().sum()

    return images(network, training, variational.optimizers(network, training), loss)


def unet(training: Training) -> Task:
    torch.manual_seed(0)
    network = UNet(UNetSettings(width=8, multipliers=(1, 2), blocks=1, attention=(1,), head_width=8, groups=4),
                   (1, 12, 12), 0)

    def loss(module: nn.Module, batch: Any) -> Tensor:
        u = batch["noise"][:, 0, 0, 0].sigmoid()
        d = denoiser.Denoiser(module, Objective(), 1.0)
        return denoiser.loss(d, batch["x"], batch["noise"], u, {}).float().sum()

    return images(network, training, optimizers(network, training), loss)


def carried(kind: str) -> Callable[[Training], Task]:
    return lambda training: replace(test_carried.task_of(kind, training), sample=shown)


# name -> (task, settings of its training, choices)
CASES: dict[str, tuple[Callable[[Training], Task], dict[str, Any], Choices]] = {
    "muon": (gpt, {}, Choices()),
    "adamw": (gpt, {"optimizer": "adamw"}, Choices(micro_batch=2)),
    "tied": (lambda t: gpt(t, tied=True, positions="learned", norm="layer", bias=True, start="gpt2"), {"ema": 0.0},
             Choices()),
    "bf16": (gpt, {}, Choices("bf16")),
    "transformer-xl": (carried("relative"), {}, Choices()),
    "lstm": (carried("lstm"), {"ema": 0.0}, Choices(micro_batch=2)),
    "vqvae": (vqvae, {"optimizer": "adamw"}, Choices()),
    "vqvae-bf16": (vqvae, {"optimizer": "adamw"}, Choices("bf16")),
    "unet": (unet, {"optimizer": "adamw"}, Choices()),
}


def run_of(name: str, folder: Path, **training: Any) -> Run:
    make, settings, choices = CASES[name]
    folder.mkdir(parents=True, exist_ok=True)
    settings = replace(TRAINING, **settings | training)
    saved = checkpoint.newest_facts(folder / "checkpoints")
    monitor = Monitor(folder, distributed.rank() > 0, saved["progress"]["step"] if saved else 0)
    return Run(make(settings), settings, 1, folder, CPU, monitor, choices)


def trained(name: str, folder: Path) -> None:
    """Train a case; FOLDER/weights.safetensors is what a model folder would get."""
    run = run_of(name, folder)
    run.train()
    run.monitor.close()
    network = run.task.phases[0].network.eval()
    if distributed.rank() == 0:
        with run.chosen():
            save_file({k: v.contiguous() for k, v in weights_of(network).items()}, folder / "weights.safetensors")


def two_steps(folder: Path, **training: Any) -> None:
    """Go on with the run in `folder` for two steps and save."""
    run = run_of("adamw", folder, steps=8, **training)
    run.resume()
    run.step()
    run.step()
    run.save()
    run.monitor.close()


def held(run: Run) -> int:
    """Bytes of this process's parameters and optimizer states."""
    states = [t for o in run.task.phases[0].optimizers for state in o.state.values() for t in state.values()]
    return sum(sharding.local(t).nbytes for t in [*run.trained("network").parameters(), *states])


@contextmanager
def both(folder: Path, rank: int) -> Iterator[None]:
    dist.init_process_group("gloo", f"file://{folder}", rank=rank, world_size=2)
    yield
    dist.barrier()
    dist.destroy_process_group()


def relay(folder: Path, rank: int) -> None:
    """Two processes, then one, then two, then two that split nothing: two steps each, from checkpoint to checkpoint."""
    with both(folder / "before", rank):
        two_steps(folder / "relay")
    if rank == 0:
        two_steps(folder / "relay")
    with both(folder / "after", rank):
        two_steps(folder / "relay")
        two_steps(folder / "relay", shard=False)


def main(folder: Path, rank: int, names: list[str]) -> None:
    with both(folder / "meeting", rank):
        for name in filter(CASES.__contains__, names):
            trained(name, folder / name)
        run = run_of("muon", folder / "held")
        run.step()
        (folder / f"held-{rank}.json").write_text(json.dumps(held(run)))
    if "relay" in names:
        relay(folder, rank)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])

"""The adversarial family in training: a discriminator learns to tell, a generator to deceive it.

The step is a list of phases: the generator, its path lengths now and then, the discriminator, its R1 penalty now and
then. An evaluation makes images and sets them beside held-out ones; a run that loses its variety is sent back.

B items, Z width of the latent, L styles an image.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from handmill.checks import collapse, features
from handmill.data.items import Batch, Items, enough
from handmill.data.noise import normal, uniform
from handmill.data.order import draw
from handmill.errors import UserError
from handmill.families import previews
from handmill.families.adversarial import objective as game
from handmill.families.adversarial.augmenting import DRAWS, Augment
from handmill.media.pictures import to_uint8
from handmill.networks import critic
from handmill.recipe import Recipe
from handmill.training import distributed
from handmill.training.loop import Phase, Task
from handmill.training.optimizers import Optimizer, optimizers
from handmill.training.precision import bare

EVALUATED_AT_ONCE = 256  # images
FIGURES = ("frechet", "precision", "recall", "density", "coverage")  # of an evaluation
FEW = 200  # held-out images: with fewer, training images stand in for them
STUCK = 5  # evaluations without a lower Fréchet distance: a slow start gains at each
PATH_DECAY = 0.99  # of the moving mean of path lengths, a time they are taken (Karras et al. 2020, appendix B)

Loss = tuple[Tensor, dict[str, Tensor]]


class Critic(nn.Module):
    """The discriminator as training sees it: behind the augmentation, beside what the penalties keep."""

    mean_path: Tensor

    def __init__(self, network: Any, objective: game.Objective) -> None:
        super().__init__()
        self.network = network
        self.augment = Augment(objective.augment, objective.augment_target, objective.augment_images)
        self.register_buffer("mean_path", torch.zeros(()))
        self.exact = tuple(f"network.{name}" for name in network.exact)

    def forward(self, x: Tensor, condition: dict[str, Tensor], draws: Tensor) -> Tensor:  # (B, C, *S) -> (B,)
        return self.network(self.augment(x, draws), condition)  # type: ignore[no-any-return]

    def learn_sign(self, figures: dict[str, float], images: float) -> None:
        """From a step of telling: how far it overfits."""
        self.augment.watch(figures["sign"], int(images))

    @torch.no_grad()
    def learn_path(self, figures: dict[str, float], images: float) -> None:
        """From a step of smoothing: the moving mean of path lengths."""
        length = torch.tensor(figures["length"], device=self.mean_path.device)
        self.mean_path.copy_(torch.where(self.mean_path == 0, length, self.mean_path.lerp(length, 1 - PATH_DECAY)))


class Game:
    """The losses of the phases, each a function of the modules it reads, a batch and the noise of its places."""

    def __init__(self, generator: Any, recipe: Recipe) -> None:
        self.objective, self.seed = recipe.objective, recipe.seed
        self.latent_shape, self.noise_shape = generator.latent_shape, generator.noise_shape
        self.layers, self.classes = generator.layers, generator.classes

    def condition(self, batch: Batch) -> dict[str, Tensor]:
        return {"label": batch["label"]} if self.classes else {}

    def made(self, generator: nn.Module, batch: Batch, turn: str) -> tuple[Tensor, Tensor]:
        """Images and their styles, new ones for every place and turn."""
        def noise(what: str, shape: tuple[int, ...]) -> Tensor:
            return normal(draw(self.seed, turn, what), batch["place"], shape)

        z, layers, mixing = noise("latent", self.latent_shape), noise("layers", self.noise_shape), self.objective.mixing
        if not mixing or self.layers == 1:
            return generator(z, self.condition(batch), layers)  # type: ignore[no-any-return]
        told = uniform(draw(self.seed, turn, "mixing"), batch["place"], 2)  # (B, 2)
        cut = 1 + (told[:, 0] * (self.layers - 1)).long()
        cut = torch.where(told[:, 1] < mixing, cut, self.layers)  # the last: no layer of the second
        second = noise("second", self.latent_shape)
        return generator(z, self.condition(batch), layers, second, cut)  # type: ignore[no-any-return]

    def draws(self, batch: Batch, turn: str) -> Tensor:
        return uniform(draw(self.seed, turn, "augment"), batch["place"], DRAWS)

    def deceive(self, generator: nn.Module, batch: Batch, judge: nn.Module) -> Loss:
        """The generator's phase."""
        images, _ = self.made(generator, batch, "generator")
        fake = judge(images, self.condition(batch), self.draws(batch, "generator"))
        return game.generator_loss(self.objective.loss, fake).sum(), {}

    def tell(self, judge: nn.Module, batch: Batch, generator: nn.Module) -> Loss:
        """The discriminator's phase."""
        with torch.no_grad():
            images, _ = self.made(generator, batch, "discriminator")
        condition, real_draws = self.condition(batch), self.draws(batch, "real")
        real = judge(batch["x"], condition, real_draws)
        fake = judge(images, condition, self.draws(batch, "fake"))
        loss = game.discriminator_loss(self.objective.loss, real, fake)
        if self.objective.gradient_penalty:
            share = uniform(draw(self.seed, "between"), batch["place"], 1)[:, 0]
            loss = loss + self.objective.gradient_penalty * game.gradient_penalty(
                lambda x: judge(x, condition, real_draws), batch["x"], images, share)
        return loss.sum(), {"certainty": game.certainty(real, fake).sum(), "sign": real.sign().sum()}

    def flatten(self, judge: nn.Module, batch: Batch) -> Loss:
        """R1, for all the steps that go without it."""
        condition, draws = self.condition(batch), self.draws(batch, "r1")
        slope = game.squared_slope(lambda x: judge(x, condition, draws), batch["x"])
        return (self.objective.r1 / 2 * self.objective.r1_every * slope).sum(), {"slope": slope.sum()}

    def smooth(self, generator: nn.Module, batch: Batch, judge: nn.Module) -> Loss:
        """Path lengths near to their moving mean, for all the steps that go without it (Karras et al. 2020, eq. 4)."""
        some = {name: value[::self.objective.path_items] for name, value in batch.items()}
        images, styles = self.made(generator, some, "path")
        noise = normal(draw(self.seed, "path", "direction"), some["place"], tuple(images.shape[1:]))
        lengths, mean = game.path_lengths(images, styles, noise), critic_of(judge).mean_path
        mean = torch.where(mean == 0, lengths.detach(), mean)  # the first time; a mean of 0 would silence the styles
        weight = self.objective.path_length * self.objective.path_every
        return (weight * (lengths - mean).square()).sum(), {"length": lengths.sum()}

    def paths(self, batch: Batch) -> int:
        """Images of a batch that path lengths are taken from."""
        return len(batch["place"][::self.objective.path_items])


def task(network: Any, codec: Any, prepared: Any, recipe: Recipe, out: Path) -> Task:
    """What the loop needs to train the generator `network`.

    Raises UserError for fewer images than a batch, and for images without a class where a class is to be told.
    """
    training, objective = recipe.training, recipe.objective
    enough(prepared, training.batch)
    labelled(prepared, recipe)
    items = Items(prepared, "train", codec, recipe.data, recipe.seed)
    items.keep()
    device = next(network.parameters()).device
    judge = Critic(critic(recipe.network, codec).to(device), objective).to(device)
    phases = phases_of(Game(network, recipe), network, judge, recipe)
    evaluate, held_out = evaluation(codec, prepared, recipe)
    sample, picture = previews.samples(codec, recipe, out)
    flops = network.flops_per_item() + 3 * judge.network.flops_per_item()
    return Task(phases, items.batch, evaluate, sample, 1, flops, held_out=held_out, at_once=EVALUATED_AT_ONCE,
                positions=math.prod(codec.shape[1:]), unit="images", measure="Fréchet distance",
                training_measure=f"{objective.loss} loss of the generator", picture=picture,
                judge=judged, remark=collapse.lacking, shown=("coverage", "recall"),
                uncompiled="the compiler cannot take gradients of gradients")


def critic_of(module: nn.Module) -> Critic:
    """The critic within what training wrapped it in."""
    critic = bare(module)
    assert isinstance(critic, Critic)
    return critic


def phases_of(play: Game, network: nn.Module, judge: Critic, recipe: Recipe) -> list[Phase]:
    """The phases of a step, the generator's first."""
    objective = recipe.objective
    own, others = optimizers(network, recipe.training), slower(optimizers(judge, recipe.training), objective)

    def count(batch: Batch) -> int:
        return len(batch["place"])

    phases = [Phase("generator", network, play.deceive, count, own, objective.discriminator_steps, (judge,))]
    if objective.path_length:
        phases.append(Phase("path", network, play.smooth, play.paths, own, objective.path_every, (judge,),
                            judge.learn_path))
    phases.append(Phase("discriminator", judge, play.tell, count, others, 1, (network,), judge.learn_sign))
    if objective.r1:
        phases.append(Phase("r1", judge, play.flatten, count, others, objective.r1_every))
    return phases


def slower(made: list[Optimizer], objective: game.Objective) -> list[Optimizer]:
    """The discriminator's optimizers at their own rate."""
    for optimizer in made:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] = group["peak"] * objective.discriminator_rate
    return made


def labelled(prepared: Any, recipe: Recipe) -> None:
    """Raise UserError where a class is to be told and an image has none."""
    missing = int((np.asarray(prepared.labels("train")) < 0).sum())
    if recipe.network.conditional and missing:
        raise UserError(f"{missing} training images have no class: give every image a class, or set "
                        "network.conditional = false")


def judged(history: list[dict[str, float]]) -> str:
    """What went wrong by the newest of the evaluations, in a sentence; "" where nothing did."""
    names = {"loss": "frechet", "discriminator_certainty": "certainty"}
    kept = {*FIGURES, "step", "certainty", "gradient_norm"}
    told = [{names.get(k, k): v for k, v in entry.items() if names.get(k, k) in kept} for entry in history]
    distances = [entry["frechet"] for entry in told]
    stuck = min(distances) < min(distances[-STUCK:])  # nan is said by `judge`
    return collapse.judge(told) or (collapse.never(told) if stuck else "")


def evaluation(codec: Any, prepared: Any, recipe: Recipe) -> tuple[Callable[[nn.Module], dict[str, float]], int]:
    """What measures a generator beside real images it was not trained on, and how many images that takes.

    Real images come from the validation split; where it is small, from the training split.
    """
    split = "validation" if prepared.count("validation") >= FEW else "train"
    count = min(recipe.objective.judged, prepared.count(split))
    some = np.linspace(0, prepared.count(split) - 1, count).astype(np.int64)
    with distributed.first() as mine:
        if mine:
            features.of(prepared)
    watch = collapse.Watch(np.asarray(prepared.images(split))[some], features.of(prepared))
    labels, key = np.asarray(prepared.labels(split))[some], draw(recipe.seed, "evaluation")

    def made(module: nn.Module) -> np.ndarray[Any, np.dtype[np.uint8]]:
        generator: Any = bare(module)
        device, pieces = next(module.parameters()).device, []
        for places in torch.arange(count, device=device).split(EVALUATED_AT_ONCE):
            told = {"label": torch.from_numpy(labels)[places.cpu()].to(device)} if generator.classes else {}
            images, _ = module(normal(key, places, generator.latent_shape), told,
                               normal(key + 1, places, generator.noise_shape))
            pieces.append(to_uint8(codec.decode(images.float())))
        return np.concatenate(pieces)

    def evaluate(module: nn.Module) -> dict[str, float]:
        found = watch.watch(made(module)) if distributed.rank() == 0 else dict.fromkeys(FIGURES, 0.0)
        own = float(distributed.rank() == 0)  # one process measures; a sum over all is its figure
        found = {"loss": found["frechet"]} | {name: value for name, value in found.items() if name != "frechet"}
        return {"items": own} | found

    return evaluate, count

"""The adversarial game: losses and penalties against closed forms and finite differences, its phases in the loop."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from handmill.errors import UserError
from handmill.families.adversarial import objective as game
from handmill.families.adversarial.objective import Objective
from handmill.recipe import Training
from handmill.training import checkpoint
from handmill.training.loop import Choices, Phase, Run, Task
from handmill.training.monitor import Monitor
from handmill.training.optimizers import optimizers

CPU = torch.device("cpu")
REAL, FAKE = (0.5, 1.2), (-0.8, 0.7)  # mean and deviation of two normal distributions


class Quadratic(nn.Module):
    """A discriminator of numbers that can be the best one between two normal distributions."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:  # (B,) -> (B,)
        return torch.stack((torch.ones_like(x), x, x.square()), 1) @ self.weight


class Affine(nn.Module):
    """A generator of numbers: mean + deviation * z."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.deviation = nn.Parameter(torch.tensor(FAKE[0])), nn.Parameter(torch.tensor(FAKE[1]))

    def forward(self, z: Tensor) -> Tensor:
        return self.mean + self.deviation * z


def best_score() -> Tensor:
    """log p(x) - log q(x) of REAL and FAKE as weights of 1, x and x^2: the best scores (Goodfellow 2014, prop. 1)."""
    (m, s), (n, t) = REAL, FAKE
    return torch.tensor([math.log(t / s) - m**2 / (2 * s**2) + n**2 / (2 * t**2), m / s**2 - n / t**2,
                         -1 / (2 * s**2) + 1 / (2 * t**2)])


def test_the_discriminator_of_numbers_becomes_the_best_one() -> None:
    """Newton's method on the sample mean of the loss, whose minimum is known for infinitely many samples."""
    z = torch.distributions.Normal(0, 1).icdf((torch.arange(20_000) + 0.5) / 20_000)
    real, fake, judge = REAL[0] + REAL[1] * z, FAKE[0] + FAKE[1] * z, Quadratic()

    def loss(weight: Tensor) -> Tensor:
        scores = [torch.func.functional_call(judge, {"weight": weight}, (x,)) for x in (real, fake)]
        return game.discriminator_loss("nonsaturating", *scores).mean()

    weight = torch.zeros(3)
    for _ in range(12):
        weight = weight - torch.linalg.solve(torch.func.hessian(loss)(weight), torch.func.grad(loss)(weight))
    torch.testing.assert_close(weight, best_score(), rtol=0, atol=5e-3)


def test_the_loss_at_the_best_scores_is_known_by_the_divergence() -> None:
    """Its minimum is log 4 - 2 JS(p, q) (Goodfellow et al. 2014, theorem 1), here by quadrature."""
    x = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    p, q = (torch.distributions.Normal(*map(torch.tensor, d)).log_prob(x).exp().double() for d in (REAL, FAKE))
    middle, dx = (p + q) / 2, x[1] - x[0]
    js = ((p * (p / middle).log() + q * (q / middle).log()).nan_to_num() / 2).sum() * dx
    score = (p.log() - q.log()).clamp(-60, 60)
    loss = (p * nn.functional.softplus(-score) + q * nn.functional.softplus(score)).sum() * dx
    assert loss.item() == pytest.approx(math.log(4) - 2 * js.item(), abs=1e-4)
    at_equal = game.discriminator_loss("nonsaturating", torch.zeros(3), torch.zeros(3))
    torch.testing.assert_close(at_equal, torch.full((3,), math.log(4)))


def numbers(training: Training, seed: int = 0, judge: object = None) -> Task:
    """The game of two numbers, mean and deviation, as the loop plays it."""
    generator, critic = Affine(), Quadratic()

    def fakes(generator: nn.Module, batch: Tensor) -> Tensor:
        return generator(batch[:, 1])  # type: ignore[no-any-return]

    def deceive(generator: nn.Module, batch: Tensor, critic: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        assert not any(p.requires_grad for p in critic.parameters())
        return game.generator_loss("nonsaturating", critic(fakes(generator, batch))).sum(), {}

    def tell(critic: nn.Module, batch: Tensor, generator: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        assert not any(p.requires_grad for p in generator.parameters())
        real, fake = critic(REAL[0] + REAL[1] * batch[:, 0]), critic(fakes(generator, batch))
        certainty = game.certainty(real, fake).sum()
        return game.discriminator_loss("nonsaturating", real, fake).sum(), {"certainty": certainty}

    def flatten(critic: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x = REAL[0] + REAL[1] * batch[:, :1]
        return 0.02 * game.squared_slope(lambda x: critic(x[:, 0]), x).sum(), {}

    def draw(places: np.ndarray) -> Tensor:
        return torch.from_numpy(np.random.default_rng([seed, int(places[0])]).normal(size=(len(places), 2))).float()

    def evaluate(module: nn.Module) -> dict[str, float]:
        network: Affine = module  # type: ignore[assignment]
        return {"loss": abs(network.mean.item() - REAL[0]) + abs(abs(network.deviation.item()) - REAL[1]), "items": 1.0}

    own, others = optimizers(generator, training), optimizers(critic, training)
    phases = [Phase("generator", generator, deceive, len, own, beside=(critic,)),
              Phase("discriminator", critic, tell, len, others, beside=(generator,)),
              Phase("r1", critic, flatten, len, others, every=4)]
    return Task(phases, draw, evaluate, lambda m: "", 1, 1.0, judge=judge)  # type: ignore[arg-type]


TRAINING = Training(steps=400, batch=512, optimizer="adamw", learning_rate=0.03, weight_decay=0.0, betas=(0.0, 0.9),
                    warmup=1, clip=0.0, ema=0.97, evaluate_every=100, save_every=100, sample_every=0)


def run_of(task: Task, training: Training, folder: Path) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    return Run(task, training, 1, folder, CPU, Monitor(folder), Choices())


def test_the_game_of_numbers_ends_where_the_distributions_are_equal(tmp_path: Path) -> None:
    task = numbers(TRAINING)
    run = run_of(task, TRAINING, tmp_path)
    progress = run.train()
    assert progress.validation < 0.1
    lines = (tmp_path / "metrics.jsonl").read_text()
    assert all(name in lines for name in ("discriminator_certainty", "r1_gradient_norm", "discriminator_loss"))
    torch.testing.assert_close(task.phases[1].network.weight.detach(), torch.zeros(3), rtol=0, atol=0.3)


def test_lazy_phases_share_the_weights_and_optimizers_of_the_first(tmp_path: Path) -> None:
    task = numbers(TRAINING)
    run = run_of(task, TRAINING, tmp_path)
    run.step()
    assert [p.name for p in task.owners] == ["generator", "discriminator"]
    assert {*run.tensors()} == {"generator", "generator-average", "generator-optimizer-0", "discriminator",
                                "discriminator-optimizer-0"}
    states = [task.phases[i].optimizers[0].tensors()["0.step"].item() for i in (0, 1)]
    assert states == [1.0, 2.0]  # the penalty is a step of its own
    for _ in range(4):
        run.step()
    assert task.phases[2].optimizers[0].tensors()["0.step"].item() == 7.0  # 5 steps, the penalty due at two of them


def everything(run: Run) -> dict[str, Tensor]:
    return {f"{part}/{k}": v.clone() for part, tensors in run.tensors().items() for k, v in tensors.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def lost_at(*steps: int) -> object:
    """A judge that finds fault with the first evaluation at each of these steps, in its own memory of the run."""
    left = list(steps)

    def judge(history: list[dict[str, float]]) -> str:
        if left and history[-1]["step"] == left[0]:
            left.pop(0)
            return "collapsed: made up for this test"
        return ""

    return judge


def test_a_run_that_is_judged_lost_goes_back_to_its_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training = replace(TRAINING, keep=1)
    run = run_of(numbers(training, judge=lost_at(300)), training, tmp_path)
    progress = run.train()
    said = capsys.readouterr().err
    assert progress.step == training.steps
    (fault,) = progress.faults
    assert fault.startswith("step 300: collapsed: made up for this test; went back to step ")
    assert progress.slowed == 0.5
    assert progress.shift == 300 - int(said.partition("best checkpoint, of step ")[2].partition(";")[0])
    assert progress.seconds["train"] > 0
    assert "went back to the best checkpoint" in said


def test_the_best_checkpoint_outlives_later_ones(tmp_path: Path) -> None:
    training = replace(TRAINING, keep=1, save_every=20)
    progress = run_of(numbers(training, judge=lost_at()), training, tmp_path).train()
    kept = [p.name for p in checkpoint.checkpoints(tmp_path / "checkpoints")]
    assert kept == list(dict.fromkeys([f"step-{training.steps}", f"step-{progress.best_step}"]))


def test_a_run_that_went_back_resumes_bit_equal(tmp_path: Path) -> None:
    straight = run_of(numbers(TRAINING, judge=lost_at(300)), TRAINING, tmp_path / "straight")
    straight.train()
    halted = replace(TRAINING, steps=350)
    first = run_of(numbers(TRAINING, judge=lost_at(300)), halted, tmp_path / "broken")
    first.training = replace(TRAINING, save_every=350)
    while first.progress.step < 350 or not first.progress.faults:
        first.step()
        if first.progress.step % 100 == 0:
            first.evaluate()
            if first.progress.best_step == first.progress.step:
                first.save()
    first.save()
    second = run_of(numbers(TRAINING, judge=lost_at()), TRAINING, tmp_path / "broken")
    assert second.resume()
    assert second.progress.faults
    second.train()
    assert same(everything(straight), everything(second))


def test_a_run_lost_again_and_again_ends_with_its_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(numbers(TRAINING, judge=lost_at(300, 300, 300, 300)), TRAINING, tmp_path)
    progress = run.train()
    assert progress.stopped
    assert len(progress.faults) == 4
    assert f"training ends here, the weights of step {progress.best_step} are kept" in capsys.readouterr().err
    assert "ended" in progress.faults[-1]


def slope_by_differences(network: nn.Module, x: Tensor, step: float = 1e-5) -> Tensor:
    """|d score / d x|^2 of each item (B,) by central differences."""
    total = torch.zeros(len(x), dtype=x.dtype)
    for i in range(x[0].numel()):
        nudge = torch.zeros_like(x).flatten(1)
        nudge[:, i] = step
        up, down = (network(x + sign * nudge.view_as(x)) for sign in (1, -1))
        total += ((up - down) / (2 * step)).square().detach()
    return total


def small_critic() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Softplus(), nn.Flatten(), nn.Linear(36, 1),
                         nn.Flatten(0)).double()


def test_r1_and_its_gradient_are_those_of_finite_differences() -> None:
    network, x = small_critic(), torch.randn(3, 2, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(game.squared_slope(network, x), slope_by_differences(network, x), rtol=1e-6, atol=1e-9)
    weight = network[0].weight  # type: ignore[index]
    (found,) = torch.autograd.grad(game.squared_slope(network, x).sum(), weight)
    for place in [(0, 0, 0, 0), (3, 1, 1, 2), (2, 0, 2, 1)]:
        values = []
        for nudge in (1e-5, -1e-5):
            with torch.no_grad():
                weight[place] += nudge
            values.append(game.squared_slope(network, x).sum().item())
            with torch.no_grad():
                weight[place] -= nudge
        assert found[place].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


def test_path_lengths_and_their_gradient_are_those_of_the_jacobian() -> None:
    torch.manual_seed(1)
    network = nn.Sequential(nn.Flatten(), nn.Linear(8, 12), nn.Tanh(), nn.Unflatten(1, (3, 2, 2))).double()
    styles, noise = torch.randn(2, 2, 4).double().requires_grad_(), torch.randn(2, 3, 2, 2).double()

    def lengths() -> Tensor:
        return game.path_lengths(network(styles), styles, noise)

    for i in range(2):
        jacobian = torch.autograd.functional.jacobian(lambda w: network(w[None])[0], styles[i].detach())
        product = torch.einsum("chw,chwls->ls", noise[i] / 2, jacobian)  # 4 places, of which the root is 2
        expected = product.square().sum(1).mean().sqrt()
        torch.testing.assert_close(lengths()[i], expected, rtol=1e-9, atol=0)
    weight = network[1].weight  # type: ignore[index]
    (found,) = torch.autograd.grad(lengths().sum(), weight)
    with torch.no_grad():
        before = weight[5, 2].item()
        weight[5, 2] = before + 1e-6
    up = lengths().sum().item()
    with torch.no_grad():
        weight[5, 2] = before - 1e-6
    assert found[5, 2].item() == pytest.approx((up - lengths().sum().item()) / 2e-6, rel=1e-6)


def test_the_gradient_penalty_of_a_linear_critic() -> None:
    weight = torch.tensor([3.0, 4.0])
    found = game.gradient_penalty(lambda x: x @ weight, torch.randn(5, 2), torch.randn(5, 2), torch.rand(5))
    torch.testing.assert_close(found, torch.full((5,), 16.0))


@pytest.mark.parametrize(("kind", "generator", "discriminator"), [
    ("nonsaturating", math.log1p(math.exp(0.5)), math.log1p(math.exp(-2.0)) + math.log1p(math.exp(-0.5))),
    ("hinge", 0.5, 0.0 + 0.5), ("wasserstein", 0.5, -0.5 - 2.0)])
def test_losses_by_hand(kind: str, generator: float, discriminator: float) -> None:
    real, fake = torch.tensor([2.0]), torch.tensor([-0.5])
    assert game.generator_loss(kind, fake).item() == pytest.approx(generator)
    assert game.discriminator_loss(kind, real, fake).item() == pytest.approx(discriminator)


def test_certainty_is_a_half_by_chance_and_one_when_all_is_told() -> None:
    scores = torch.tensor([0.3, -1.0, 2.0])
    assert game.certainty(scores, scores).mean() == 0.5
    assert game.certainty(scores + 1, scores).mean() == 1.0
    assert game.certainty(scores, scores + 1).mean() == 0.0


@pytest.mark.parametrize(("settings", "says"), [
    ({"loss": "wasserstein"}, "needs a penalty"), ({"gradient_penalty": 10.0}, "no other loss takes one"),
    ({"augment": ("flop",)}, "'flop', which is none of flip"), ({"r1": -1.0}, "0 or more"),
    ({"mixing": 1.5}, "between 0 and 1")])
def test_settings_that_cannot_be(settings: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Objective(**settings)  # type: ignore[arg-type]

"""Likelihoods and divergences against torch.distributions, bounds against a model whose likelihood is known."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, distributions, nn

from handmill.errors import UserError
from handmill.families import variational
from handmill.families.variational import Objective, Sampling
from handmill.networks.autoencoder import Autoencoder, Settings
from handmill.networks.quantisers import perplexity
from handmill.recipe import Training
from handmill.training.codebook import EMACodebook
from handmill.training.optimizers import rate
from handmill.training.precision import HalfPrecision

GAUSSIAN = Objective(likelihood="gaussian", scale=0.5)
CODES: dict[str, Any] = {"flat": False, "bottleneck": "vq", "codes": 16}


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blobs(items: int, seed: int = 1) -> Tensor:
    """Images (items, 1, 12, 12) in [-1, 1] of one bright spot at a random place."""
    at = 2 + 8 * torch.rand(items, 2, 1, 1, generator=torch.Generator().manual_seed(seed))
    y, x = torch.arange(12.0)[:, None], torch.arange(12.0)
    return (2 * torch.exp(-((y - at[:, 0]).square() + (x - at[:, 1]).square()) / 4) - 1)[:, None]


def small(**settings: Any) -> Autoencoder:
    torch.manual_seed(1)
    tiny: dict[str, Any] = {"patch": 2, "width": 8, "multipliers": (1, 2), "latent": 4}
    return Autoencoder(Settings(**tiny | settings), (1, 12, 12), 3).eval()


def trained(network: Autoencoder, objective: Objective, steps: int, half: bool = False) -> list[float]:
    """The loss of each step, as the training loop takes them."""
    training = Training(steps=steps, learning_rate=5e-3, optimizer="adamw", warmup=10)
    optimizers = variational.optimizers(network, training)
    module = HalfPrecision(network) if half else network
    losses = []
    for step in range(steps):
        x = blobs(32, step)
        parts = variational.loss_parts(module, x, drawn(32, *network.latent_shape, seed=step), {}, objective)
        parts["loss"].mean().backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate(step, training)
            optimizer.step()
        network.zero_grad()
        losses.append(parts["loss"].mean().item())
    return losses


class Linear(nn.Module):
    """z standard normal (2), x = W z + b + noise of deviation GAUSSIAN.scale: log p(x) in closed form.

    The encoder has the true posterior's mean and twice its variance, so that the bounds are near but not tight.
    """

    quantiser, latent_shape = None, (2,)

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = drawn(5, 2, seed=3), drawn(5, seed=4)
        self.log_scale = torch.zeros(())
        precision = torch.eye(2) + self.weight.T @ self.weight / GAUSSIAN.scale**2
        self.covariance = precision.inverse()

    def encode(self, x: Tensor, condition: dict[str, Tensor]) -> Tensor:
        mean = (x.flatten(1) - self.bias) @ self.weight @ self.covariance / GAUSSIAN.scale**2
        return torch.stack((mean, (2 * self.covariance.diagonal()).log().expand_as(mean)), 1)

    def decode(self, z: Tensor, condition: dict[str, Tensor]) -> Tensor:
        return (z @ self.weight.T + self.bias)[:, None]

    def forward(self, x: Tensor, noise: Tensor, condition: dict[str, Tensor]) -> dict[str, Tensor]:
        mean, log_variance = self.encode(x, condition).unbind(1)
        return {"mean": mean, "log_variance": log_variance, "log_scale": self.log_scale.expand(len(x)),
                "output": self.decode(mean + (log_variance / 2).exp() * noise, condition)}

    def log_evidence(self, x: Tensor) -> Tensor:
        spread = self.weight @ self.weight.T + GAUSSIAN.scale**2 * torch.eye(5)
        return distributions.MultivariateNormal(self.bias, spread).log_prob(x.flatten(1))


def test_kl_is_torchs() -> None:
    mean, log_variance = drawn(6, 3, 4), drawn(6, 3, 4, seed=2)
    expected = distributions.kl_divergence(distributions.Normal(mean, (log_variance / 2).exp()),
                                           distributions.Normal(torch.tensor(0.0), torch.tensor(1.0)))
    torch.testing.assert_close(variational.kl_to_standard(mean, log_variance), expected.flatten(1).sum(1))


def test_likelihoods_are_torchs() -> None:
    x, output, log_scale = drawn(4, 2, 3, 3).tanh(), 2 * drawn(4, 2, 3, 3, seed=2), drawn(4, seed=3)
    wide = log_scale.exp().view(4, 1, 1, 1)
    for objective, law in ((Objective(likelihood="gaussian"), distributions.Normal(output, wide)),
                           (Objective(likelihood="laplace"), distributions.Laplace(output, wide)),
                           (GAUSSIAN, distributions.Normal(output, 0.5))):
        expected = law.log_prob(x).flatten(1).sum(1)
        torch.testing.assert_close(variational.log_likelihood(x, output, objective, log_scale), expected)
    bits = x.sign()
    expected = distributions.Bernoulli(logits=output).log_prob((bits + 1) / 2).flatten(1).sum(1)
    torch.testing.assert_close(variational.log_likelihood(bits, output, Objective()), expected)


def test_loss_is_the_negative_elbo_and_parts_add_up() -> None:
    network, x = small(), blobs(5)
    noise = drawn(5, 4)
    parts = variational.loss_parts(network, x, noise, {}, GAUSSIAN)
    torch.testing.assert_close(parts["loss"], parts["reconstruction"] + parts["kl"])
    heavy = variational.loss_parts(network, x, noise, {}, Objective(beta=4, likelihood="gaussian", scale=0.5))
    torch.testing.assert_close(heavy["loss"], parts["reconstruction"] + 4 * parts["kl"])
    free = variational.loss_parts(network, x, noise, {}, Objective(free_bits=9, likelihood="gaussian", scale=0.5))
    torch.testing.assert_close(free["loss"], parts["reconstruction"] + 4 * 9)
    torch.testing.assert_close(free["kl"], parts["kl"])


def test_micro_batches_do_not_change_the_loss() -> None:
    network, x, noise = small(), blobs(6), drawn(6, 4)
    objective = Objective(likelihood="gaussian", free_bits=0.05)
    whole = variational.loss_parts(network, x, noise, {}, objective)
    halves = [variational.loss_parts(network, x[i:i + 3], noise[i:i + 3], {}, objective) for i in (0, 3)]
    for name, value in whole.items():
        torch.testing.assert_close(value, torch.cat([h[name] for h in halves]))


def test_bounds_of_a_linear_model() -> None:
    """Burda et al. 2016, theorem 1: ELBO <= IWAE-K <= IWAE-(K + 1) <= log p(x), here known."""
    network, x = Linear(), drawn(500, 1, 5, seed=7)
    exact = network.log_evidence(x)
    bounds = [variational.importance_bound(network, x, drawn(k, 500, 2, seed=k), {}, GAUSSIAN).mean().item()
              for k in (1, 4, 32, 1000)]
    assert bounds == sorted(bounds)
    assert bounds[0] < exact.mean().item() - 0.1
    assert bounds[-1] <= exact.mean().item() + 0.01
    tight = variational.importance_bound(network, x, drawn(4000, 500, 2), {}, GAUSSIAN)
    torch.testing.assert_close(tight, exact, atol=0.05, rtol=0)


def test_one_importance_sample_is_the_elbo_on_average() -> None:
    network, x = Linear(), drawn(1, 1, 5, seed=7).expand(20_000, 1, 5)
    noise = drawn(20_000, 2)
    one = variational.importance_bound(network, x, noise[None], {}, GAUSSIAN)
    elbo = -variational.loss_parts(network, x, noise, {}, GAUSSIAN)["loss"]
    assert one.mean().item() == pytest.approx(elbo.mean().item(), abs=0.03)


def test_the_bound_does_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x, noise = small(conditional=True), blobs(4), drawn(10, 4, 4)
    label = {"label": torch.tensor([0, 1, 2, 3])}
    whole = variational.importance_bound(network, x, noise, label, GAUSSIAN)
    monkeypatch.setattr(variational, "AT_ONCE", 8)
    torch.testing.assert_close(variational.importance_bound(network, x, noise, label, GAUSSIAN), whole)


def test_training_learns_blobs() -> None:
    network = small()
    losses = trained(network, Objective(likelihood="gaussian"), 200)
    assert sum(losses[-10:]) / 10 < sum(losses[:10]) / 10 - 80
    assert network.log_scale.item() < -1, "the learned scale follows the error (Rybkin et al. 2021)"
    test = blobs(200, seed=999)
    error = (variational.reconstruct(network, GAUSSIAN, test, {}) - test).square().mean()
    assert error < 0.2 * test.var()
    assert 2 <= int(variational.active_units(network, test, {}).sum()) <= 4


@pytest.mark.parametrize("half", [False, True])
def test_training_learns_codes(half: bool) -> None:
    network = small(**CODES)
    trained(network, Objective(likelihood="gaussian", scale=0.3), 150, half)
    test = blobs(200, seed=999)
    found = variational.codes(network, test, {})
    assert found.shape == (200, 3, 3)
    assert perplexity(variational.usage(found, network.vocabulary)) > 5
    images = variational.from_codes(network, GAUSSIAN, found, {})
    torch.testing.assert_close(images, variational.reconstruct(network, GAUSSIAN, test, {}))
    assert (images - test).square().mean() < 0.2 * test.var()


def test_optimizers_leave_the_codebook_to_its_averages() -> None:
    network = small(**CODES)
    assert network.codebook is not None
    *usual, last = variational.optimizers(network, Training(optimizer="muon"))
    assert isinstance(last, EMACodebook)
    assert not last.clipped
    held = [id(p) for o in [*usual, last] for p in o.parameters()]
    assert sorted(held) == sorted(id(p) for p in network.parameters())
    assert {id(p) for p in last.parameters()} == {id(p) for p in network.codebook.parameters()}
    assert all(p.requires_grad for p in network.parameters())
    assert all(group["peak"] == group["lr"] for o in [*usual, last] for group in o.param_groups)


def test_samples_are_means_and_depend_on_their_own_noise() -> None:
    network, noise = small(), drawn(6, 4)
    whole = variational.sample(network, Objective(), Sampling(), {}, noise)
    assert whole.shape == (6, 1, 12, 12)
    assert whole.abs().max() <= 1
    torch.testing.assert_close(whole[4:5], variational.sample(network, Objective(), Sampling(), {}, noise[4:5]))
    cold = variational.sample(network, Objective(), Sampling(temperature=1e-6), {}, noise)
    torch.testing.assert_close(cold[0], cold[1], atol=1e-4, rtol=0)
    with pytest.raises(UserError, match="no prior"):
        variational.sample(small(**CODES), Objective(), Sampling(), {}, noise)


def test_interpolation_ends_at_the_reconstructions() -> None:
    network, a, b = small(), blobs(3), blobs(3, seed=2)
    for path in ("spherical", "linear"):
        images = variational.interpolate(network, GAUSSIAN, a, b, 5, path=path)  # type: ignore[arg-type]
        assert images.shape == (5, 3, 1, 12, 12)
        for end, x in ((0, a), (-1, b)):
            torch.testing.assert_close(images[end], variational.reconstruct(network, GAUSSIAN, x, {}),
                                       atol=1e-5, rtol=1e-4)
    assert variational.interpolate(small(**CODES), GAUSSIAN, a, b, 3).shape == (3, 3, 1, 12, 12)


def test_slerp_keeps_the_length_on_a_sphere_and_survives_parallels() -> None:
    a, b = (nn.functional.normalize(drawn(4, 6, seed=s)) for s in (1, 2))
    torch.testing.assert_close(variational.slerp(a, b, 0.3).norm(dim=1), torch.ones(4))
    cosine = (variational.slerp(a, b, 0.5) * a).sum(1)
    torch.testing.assert_close(cosine.acos(), (a * b).sum(1).acos() / 2)
    torch.testing.assert_close(variational.slerp(a, 2 * a, 0.5), 1.5 * a)


def test_latent_map_of_two_units_is_the_grid_of_quantiles() -> None:
    network = small(latent=2)
    grid = variational.latent_map(network, Objective(), 3)
    assert grid.shape == (3, 3, 1, 12, 12)
    low = -math.sqrt(2) * torch.erfinv(torch.tensor(2 / 3)).item()
    expected = variational.images(network, Objective(), torch.tensor([[low, 0.0]]), {})
    torch.testing.assert_close(grid[0, 1], expected[0])


def test_latent_map_of_many_units_moves_the_most_telling_one() -> None:
    network, x = small(), blobs(50)
    unit = int(variational.unit_kl(network, x, {}).argmax())
    grid = variational.latent_map(network, Objective(), 3, x)
    z = torch.zeros(1, 4)
    torch.testing.assert_close(grid[0, 1], variational.images(network, Objective(), z, {})[0])
    z[0, unit] = math.sqrt(2) * torch.erfinv(torch.tensor(2 / 3)).item()
    torch.testing.assert_close(grid[0, 2], variational.images(network, Objective(), z, {})[0])
    assert variational.latent_map(small(flat=False), Objective(), 2, x).shape == (2, 2, 1, 12, 12)


def test_active_units_are_those_whose_means_vary() -> None:
    network = Linear()
    with torch.no_grad():
        network.weight[:, 1] = 0
    network.covariance = (torch.eye(2) + network.weight.T @ network.weight / GAUSSIAN.scale**2).inverse()
    assert variational.active_units(network, drawn(100, 1, 5), {}).tolist() == [True, False]


def test_settings_and_questions_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match="beta"):
        Objective(beta=-1)
    with pytest.raises(UserError, match="temperature"):
        Sampling(temperature=0)
    with pytest.raises(UserError, match="codes"):
        variational.codes(small(), blobs(1), {})
    with pytest.raises(UserError, match="prior"):
        variational.posterior(small(**CODES), blobs(1), {})

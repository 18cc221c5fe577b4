"""Noise levels, parameterisations, loss, guidance and `sample`, against their papers' own formulas."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from handmill.errors import UserError
from handmill.families.diffusion import noise_levels
from handmill.families.diffusion.denoiser import Denoiser, clipped, guided, loss
from handmill.families.diffusion.making import Sampling, grid, sample
from handmill.families.diffusion.noise_levels import Objective, sigmas_for_training
from handmill.recipe import build

KINDS = ("noise", "velocity", "data", "edm", "flow")
DEVIATION = 0.5  # of the data


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def beside(v: Tensor, x: Tensor) -> Tensor:
    return v.reshape(-1, *[1] * (x.ndim - 1))


def exact(x: Tensor, sigma: Tensor) -> Tensor:
    """E[y | x] for y ~ N(0, DEVIATION^2)."""
    return DEVIATION**2 / (DEVIATION**2 + sigma**2) * x


def target(kind: str, y: Tensor, n: Tensor, sigma: Tensor) -> Tensor:
    """What the network is trained to put out, by the papers' definitions with alpha y + s n or (1 - t) y + t n."""
    alpha, s = 1 / (1 + sigma**2) ** 0.5, sigma / (1 + sigma**2) ** 0.5
    skip = DEVIATION**2 / (sigma**2 + DEVIATION**2)
    out = sigma * DEVIATION / (sigma**2 + DEVIATION**2) ** 0.5
    return {"noise": n, "velocity": alpha * n - s * y, "data": y, "flow": n - y,
            "edm": (y - skip * (y + sigma * n)) / out}[kind]


class Perfect(nn.Module):
    """A network that knows `exact`, from its scaled input and c_noise = ln(sigma) / 4."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor, noise: Tensor, condition: dict[str, Tensor]) -> Tensor:
        sigma = beside((4 * noise).exp(), x)
        t = sigma / (1 + sigma)
        scale = {"flow": 1 - t, "edm": 1 / (DEVIATION**2 + sigma**2) ** 0.5}.get(self.kind, 1 / (1 + sigma**2) ** 0.5)
        x = x / scale
        y = exact(x, sigma)
        return target(self.kind, y, (x - y) / sigma, sigma)


class Linear(nn.Module):
    """An arbitrary network that sees everything: input, noise level and label."""

    def __init__(self, channels: int = 2) -> None:
        super().__init__()
        self.mix = nn.Parameter(0.3 * draws(channels, channels).float())
        self.embedding = nn.Parameter(0.1 * draws(11, channels, seed=1).float())
        self.calls: list[int] = []

    def forward(self, x: Tensor, noise: Tensor, condition: dict[str, Tensor]) -> Tensor:
        assert x.dtype == self.mix.dtype
        assert noise.dtype == torch.promote_types(x.dtype, torch.float32), "a noise level in bfloat16 is too coarse"
        self.calls.append(len(x))
        label = condition.get("label", torch.full((len(x),), 10))
        shift = self.embedding[label] * (1 + noise[:, None]).to(x.dtype)  # (B, C)
        return torch.einsum("cd,bd...->bc...", self.mix, x) + shift.view(*shift.shape, *[1] * (x.ndim - 2))


# Noise levels


def test_alphas_bar_of_ddpm():
    linear = noise_levels.alphas_bar("linear", 1000)
    assert linear[0].item() == pytest.approx(1 - 1e-4)
    assert linear[-1].item() == pytest.approx(4.0358e-5, rel=1e-4)  # Ho et al. 2020: KL of the prior about 1e-5 bits
    cosine = noise_levels.alphas_bar("cosine", 1000)
    at = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
          for t in (1, 501, 900)]
    torch.testing.assert_close(cosine[[0, 500, 899]], torch.tensor(at, dtype=torch.float64))
    assert (cosine[1:] < cosine[:-1]).all()
    assert cosine[-1] > 0


def test_training_sigmas_of_the_discrete_schedules():
    u = torch.linspace(0, 1, 1000, dtype=torch.float64)
    for schedule in ("linear", "cosine"):
        table = noise_levels.ddpm_sigmas(noise_levels.alphas_bar(schedule, 1000))
        torch.testing.assert_close(sigmas_for_training(Objective(schedule=schedule), u), table)


def test_training_sigmas_of_edm_and_flow():
    u = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    level = sigmas_for_training(Objective(), u).log()
    assert level.mean().item() == pytest.approx(-1.2, abs=0.01)
    assert level.std().item() == pytest.approx(1.2, abs=0.01)
    t = noise_levels.flow_time(sigmas_for_training(Objective(schedule="flow"), u))
    torch.testing.assert_close(t, u.clamp(0.001, 0.999), rtol=1e-4, atol=1e-6)
    logit = sigmas_for_training(Objective(p_mean=0.5, p_std=0.8, parameterisation="flow"), u)
    torch.testing.assert_close(noise_levels.flow_time(logit), (0.5 + 0.8 * torch.special.ndtri(u)).sigmoid(),
                               rtol=1e-4, atol=1e-6)  # Esser et al. 2024, equation 19


@pytest.mark.parametrize("schedule", ["linear", "cosine", "edm", "flow"])
def test_sigmas_keep_to_their_ends_and_ascend(schedule):
    u = torch.cat((torch.zeros(1), torch.rand(500, generator=torch.Generator().manual_seed(1)).sort().values,
                   torch.tensor([1 - 2**-24])))
    for objective in (Objective(schedule=schedule), Objective(schedule=schedule, sigma_min=0.1, sigma_max=5.0)):
        sigma = sigmas_for_training(objective, u)
        low, high = noise_levels.ends(objective)
        assert low * 0.999 <= sigma.min() <= sigma.max() <= high * 1.001
        assert (sigma[1:] >= sigma[:-1]).all()


def test_times_and_back():
    table = noise_levels.ddpm_sigmas(noise_levels.alphas_bar("linear", 1000))
    t = torch.tensor([0.0, 0.5, 17.25, 998.9, 999.0], dtype=torch.float64)
    torch.testing.assert_close(noise_levels.ddpm_time(noise_levels.ddpm_sigma(t, table), table), t)
    torch.testing.assert_close(noise_levels.ddpm_sigma(t[[0, -1]], table), table[[0, -1]])
    assert noise_levels.ddpm_time(torch.tensor([1e-9, 1e9], dtype=torch.float64), table).tolist() == [0, 999]
    t = torch.tensor([0.0, 0.1, 0.999])
    torch.testing.assert_close(noise_levels.flow_time(noise_levels.flow_sigma(t)), t)


def test_grids():
    karras = noise_levels.karras_grid(18, 0.002, 80.0)  # the eighteen steps of Karras et al. 2022
    assert karras[[0, 1, 16, 17, 18]].tolist() == pytest.approx([80, 57.5860, 0.007528, 0.002, 0], rel=1e-3)
    ratio = noise_levels.logsnr_grid(5, 0.01, 100.0)
    torch.testing.assert_close(ratio[1:-1] / ratio[:-2], torch.full((4,), 0.1, dtype=torch.float64))
    t = noise_levels.flow_time(noise_levels.flow_grid(4, 999.0))
    assert t.tolist() == pytest.approx([0.999, 0.74925, 0.4995, 0.24975, 0])
    times = {s: noise_levels.ddpm_times(5, 1000, s).tolist() for s in ("leading", "linspace", "trailing")}
    assert times == {"leading": [800, 600, 400, 200, 0], "linspace": [999, 749, 500, 250, 0],
                     "trailing": [999, 799, 599, 399, 199]}  # Lin et al. 2024, table 2, counted from 0
    for sigmas in (karras, ratio, noise_levels.karras_grid(1, 0.002, 80.0)):
        assert sigmas.dtype == torch.float64
        assert sigmas[-1] == 0


# Denoiser


@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_network_gives_the_same_denoiser_in_every_parameterisation(kind):
    sigma = torch.tensor([0.002, 0.1, 1.0, 7.0, 80.0], dtype=torch.float64)
    for space in ((4,), (3, 4), (2, 3, 4)):
        x = beside(sigma, torch.empty(5, 1, *space)) * draws(5, 2, *space)
        denoiser = Denoiser(Perfect(kind), Objective(parameterisation=kind), DEVIATION)
        torch.testing.assert_close(denoiser(x, sigma, {}), exact(x, beside(sigma, x)), rtol=1e-8, atol=1e-9)
        one = torch.full((1,), 0.7, dtype=x.dtype)
        torch.testing.assert_close(denoiser(x, 0.7, {}), exact(x, one), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_loss_is_the_squared_error_of_what_the_network_puts_out(kind):
    y, n, u = DEVIATION * draws(6, 2, 5), draws(6, 2, 5, seed=1), torch.linspace(0.05, 0.95, 6, dtype=torch.float64)
    seen: list[Tensor] = []
    network = Linear().double()
    network.register_forward_hook(lambda module, inputs, out: seen.append(out))
    objective = Objective(parameterisation=kind)
    measured = loss(Denoiser(network, objective, DEVIATION), y, n, u, {"label": torch.arange(6)})
    wanted = target(kind, y, n, beside(sigmas_for_training(objective, u), y))
    torch.testing.assert_close(measured, (seen[0] - wanted).square().flatten(1).mean(1), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighting", ["plain", "min-snr", "edm"])
def test_loss_at_the_optimum(kind, weighting):
    """E ||D - y||^2 = s^2 sigma^2 / (s^2 + sigma^2) an element, times the weight."""
    objective = Objective(parameterisation=kind, weighting=weighting)
    u = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    sigma = sigmas_for_training(objective, u)
    y, n = DEVIATION * draws(3, 1, 40_000), draws(3, 1, 40_000, seed=1)
    measured = loss(Denoiser(Perfect(kind), objective, DEVIATION), y, n, u, {})
    total = DEVIATION**2 + sigma**2
    edm = total / (sigma * DEVIATION) ** 2
    weight = {"min-snr": (1 / sigma**2).clamp(max=5), "edm": edm,
              "plain": {"noise": 1 / sigma**2, "velocity": 1 / sigma**2 + 1, "data": torch.ones(3).double(),
                        "edm": edm, "flow": (1 + 1 / sigma) ** 2}[kind]}[weighting]
    torch.testing.assert_close(measured, weight * DEVIATION**2 * sigma**2 / total, rtol=0.03, atol=0)
    if weighting == "edm":
        torch.testing.assert_close(measured, torch.ones(3).double(), rtol=0.03, atol=0)


def test_loss_is_of_each_item_alone_and_draws_nothing():
    network = Linear()
    denoiser = Denoiser(network, Objective(), DEVIATION)
    y, n, u, label = draws(4, 2, 3, 3).float(), draws(4, 2, 3, 3, seed=1).float(), torch.rand(4), torch.arange(4)
    before = torch.get_rng_state()
    whole = loss(denoiser, y, n, u, {"label": label})
    parts = [loss(denoiser, y[i:i + 1], n[i:i + 1], u[i:i + 1], {"label": label[i:i + 1]}) for i in range(4)]
    torch.testing.assert_close(whole, torch.cat(parts))
    assert whole.dtype == torch.float32
    assert torch.equal(before, torch.get_rng_state())
    whole.mean().backward()
    assert network.mix.grad is not None
    assert network.mix.grad.abs().sum() > 0


def test_the_network_keeps_its_dtype_and_the_rest_that_of_x():
    for weights in (torch.float32, torch.bfloat16):
        denoiser = Denoiser(Linear().to(weights), Objective(), DEVIATION)
        assert denoiser(draws(3, 2, 4), 0.5, {}).dtype == torch.float64


# Guidance


def test_guidance_is_one_doubled_batch_equal_to_two_calls():
    network = Linear().double()
    denoiser, x, label = Denoiser(network, Objective(), DEVIATION), draws(3, 2, 4, 4), torch.tensor([1, 5, 9])
    with_label = denoiser(x, 0.7, {"label": label})
    null = denoiser(x, 0.7, {})
    for scale in (0.0, 0.5, 1.0, 3.0):
        network.calls.clear()
        made = guided(denoiser, scale, 10)(x, 0.7, {"label": label})
        torch.testing.assert_close(made, null + scale * (with_label - null), rtol=1e-12, atol=1e-12)
        assert network.calls == ([3] if scale == 1 else [6])


def test_guidance_in_an_interval_and_without_labels():
    network = Linear().double()
    denoiser, x, label = Denoiser(network, Objective(), DEVIATION), draws(3, 2, 4), {"label": torch.tensor([1, 5, 9])}
    guide = guided(denoiser, 3.0, 10, (0.2, 2.0))
    for sigma, doubled in ((0.1, False), (0.2, False), (0.21, True), (2.0, True), (2.1, False)):
        network.calls.clear()
        made = guide(x, sigma, label)
        assert network.calls == ([6] if doubled else [3]), sigma
        assert torch.equal(made, denoiser(x, sigma, label)) != doubled
    assert torch.equal(guide(x, 1.0, {}), denoiser(x, 1.0, {}))
    null = {"label": torch.full((3,), 10)}
    torch.testing.assert_close(guide(x, 1.0, null), denoiser(x, 1.0, null), rtol=1e-12, atol=1e-12)


def test_clipping():
    denoiser, x = Denoiser(Linear().double(), Objective(), DEVIATION), 5 * draws(3, 2, 4)
    assert clipped(denoiser, -0.3, 0.2)(x, 1.0, {}).aminmax() == (-0.3, 0.2)


# Making


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", ["linear", "cosine", "edm", "flow"])
def test_sample_gives_the_data_of_a_perfect_network(kind, schedule):
    made = sample(Perfect(kind).eval(), Objective(parameterisation=kind, schedule=schedule), Sampling(steps=40),
                  (2, 3), {}, lambda i: draws(2000, 2, 3, seed=i).float(), DEVIATION, 10, "cpu")
    assert made.shape == (2000, 2, 3)
    assert made.dtype == torch.float32
    assert made.mean().item() == pytest.approx(0, abs=0.02)
    assert made.std().item() == pytest.approx(DEVIATION, rel=0.03)


@pytest.mark.parametrize("sampling", [
    Sampling(sampler="ddpm", guidance=2.0), Sampling(sampler="ddim", eta=0.5, clip=1.0), Sampling(sampler="heun"),
    Sampling(sampler="unipc", grid="logsnr", guidance=2.0, guidance_interval=(0.1, 1.0))])
def test_sample_is_a_function_of_its_arguments(sampling):
    """Also of each row alone: one sample of many is that sample made by itself."""
    network, before = Linear().eval(), torch.get_rng_state()

    def make(rows: list[int]) -> Tensor:
        return sample(network, Objective(), replace(sampling, steps=8), (2, 4), {"label": torch.tensor(rows)},
                      lambda i: torch.stack([draws(2, 4, seed=100 * row + i).float() for row in rows]), 0.5, 10, "cpu")

    whole = make([0, 1, 2, 3])
    assert torch.equal(whole, make([0, 1, 2, 3]))
    torch.testing.assert_close(make([2]), whole[2:3])
    assert torch.equal(before, torch.get_rng_state())
    assert not whole.requires_grad
    if sampling.clip:
        assert whole.abs().max() <= 1


def test_sample_refuses_a_network_in_training():
    with pytest.raises(AssertionError, match="eval"):
        sample(Linear(), Objective(), Sampling(), (2, 4), {}, lambda i: draws(1, 2, 4), 0.5, 10, "cpu")


def test_the_grid_follows_the_schedule():
    assert torch.equal(grid(Objective(), Sampling(steps=9)), noise_levels.karras_grid(9, 0.002, 80.0))
    assert torch.equal(grid(Objective(schedule="flow"), Sampling(steps=9)), noise_levels.flow_grid(9, 999.0))
    table = noise_levels.ddpm_sigmas(noise_levels.alphas_bar("linear", 1000))
    linear = Objective(schedule="linear")
    assert torch.equal(grid(linear, Sampling(steps=9)), noise_levels.ddpm_grid(9, table))
    assert torch.equal(grid(linear, Sampling(steps=1000))[:-1], table.flip(0))
    assert grid(replace(linear, sigma_max=50.0), Sampling(steps=9))[0] <= 50, "what was not trained is not sampled"
    for kind in ("karras", "logsnr", "flow"):
        assert grid(linear, Sampling(steps=9, grid=kind))[0].item() == pytest.approx(table[-1].item())


# Settings


@pytest.mark.parametrize(("cls", "table", "said"), [
    (Objective, {"schedule": "cosin"}, "did you mean 'cosine'"),
    (Objective, {"label_dropout": 1.5}, "label_dropout"),
    (Objective, {"sigma_min": 3.0, "sigma_max": 2.0}, "sigma_min = 3 must be below sigma_max = 2"),
    (Objective, {"p_std": 0}, "p_std"),
    (Sampling, {"steps": 0}, "steps"),
    (Sampling, {"eta": 0.5}, "eta = 0.5 belongs to"),
    (Sampling, {"guidance_interval": [2.0, 1.0]}, "ascending")])
def test_settings_that_cannot_be(cls, table, said):
    with pytest.raises(UserError, match=said):
        build(cls, table, "objective")


def test_grids_that_cannot_be():
    with pytest.raises(UserError, match="discrete steps"):
        grid(Objective(), Sampling(grid="ddpm"))
    with pytest.raises(UserError, match="1 and the schedule's 100"):
        grid(Objective(schedule="cosine", steps=100), Sampling(steps=101))

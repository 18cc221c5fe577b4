"""StyleGAN2 against definitions written out: filters, modulation, gradients of gradients, statistics, contract."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.signal import upfirdn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from handmill.errors import UserError
from handmill.networks.resampling import blur, upsample
from handmill.networks.stylegan2 import (
    Dense,
    Discriminator,
    Generator,
    Layer,
    Settings,
    modulated_conv,
    pyramid,
    with_deviation,
)
from handmill.training.precision import HalfPrecision

Condition = dict[str, Tensor]
SMALL: dict[str, Any] = {"latent": 6, "style": 8, "mapping": 2, "width": 4, "most": 16, "discriminator_width": 4}
TAPS = np.array([1.0, 3.0, 3.0, 1.0]) / 8


def generator(shape: tuple[int, ...] = (3, 16, 16), classes: int = 0, **settings: Any) -> Generator:
    """One whose noise counts and whose biases are not 0."""
    torch.manual_seed(1)
    network = Generator(Settings(**SMALL | settings), shape, classes)
    for name, p in network.named_parameters():
        if name.endswith(("strength", "bias")):
            nn.init.normal_(p, 0.3, 0.3)
    nn.init.normal_(network.centre)
    return network


def discriminator(shape: tuple[int, ...] = (3, 16, 16), classes: int = 0, **settings: Any) -> Discriminator:
    torch.manual_seed(1)
    network = Discriminator(Settings(**SMALL | settings), shape, classes)
    for name, p in network.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p, 0.0, 0.3)
    return network


def inputs(network: Generator, items: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Condition, Tensor]:
    source = torch.Generator().manual_seed(2)
    label = torch.arange(items) % max(1, network.classes)
    z = torch.randn(items, *network.latent_shape, generator=source, dtype=dtype)
    noise = torch.randn(items, *network.noise_shape, generator=source, dtype=dtype)
    return z, {"label": label} if network.classes else {}, noise


def pictures(network: Discriminator, items: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Condition]:
    x = torch.randn(items, *network.shape, generator=torch.Generator().manual_seed(3), dtype=dtype)
    return x, {"label": torch.arange(items) % network.classes} if network.classes else {}


def filtered(x: np.ndarray, up: int = 1, down: int = 1) -> np.ndarray:
    return upfirdn(TAPS * up, upfirdn(TAPS * up, x, up, down, axis=2), up, down, axis=3)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 1, 4, 6), (2, 5, 9, 4)])
@pytest.mark.parametrize("padding", [0, 1, 2, 3])
def test_blur_is_the_binomial_filter(shape: tuple[int, ...], padding: int) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    sides = ((0, 0), (0, 0), (padding, padding), (padding, padding))
    full = filtered(np.pad(x.numpy(), sides))  # 3 more on every side than "valid"
    assert np.allclose(blur(x, padding, 2.0), 2 * full[:, :, 3:-3, 3:-3])


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 1, 4, 7), (1, 2, 2, 5)])
def test_upsample_is_the_binomial_filter_with_edges_that_continue(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    edged = np.pad(x.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    cut = slice(3, -2)  # upfirdn gives 2 (n + 2) + 2 places
    full = filtered(edged, up=2)[:, :, cut, cut][:, :, :2 * shape[2], :2 * shape[3]]
    assert np.allclose(upsample(x), full)
    assert torch.allclose(upsample(x), F.interpolate(x, scale_factor=2, mode="bilinear"))


def test_resampling_differentiates_twice() -> None:
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    for function in (lambda x: blur(x, 2, 4.0), lambda x: blur(x, 1) ** 2, upsample, lambda x: upsample(x) ** 2):
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)


def unfused(x: Tensor, weight: Tensor, style: Tensor, demodulate: bool, up: bool) -> Tensor:
    """Weights of its own for every item, by torch's grouped convolutions."""
    b, c, h, w = x.shape
    own = weight[None] * style[:, None, :, None, None]  # (B, C', C, k, k)
    if demodulate:
        own = own / (own.square().sum((2, 3, 4), keepdim=True) + 1e-8).sqrt()
    if not up:
        return F.conv2d(x.reshape(1, b * c, h, w), own.flatten(0, 1), padding="same", groups=b).unflatten(1, (b, -1))[0]
    y = F.conv_transpose2d(x.reshape(1, b * c, h, w), own.transpose(1, 2).flatten(0, 1), stride=2, groups=b)
    kernel = torch.tensor(4 * np.outer(TAPS, TAPS))[None, None]
    return F.conv2d(y.transpose(0, 1), kernel, padding=1).view(b, -1, 2 * h, 2 * w)


@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize(("kernel", "up"), [(1, False), (3, False), (3, True)])
def test_modulated_convolution_is_one_with_weights_for_every_item(kernel: int, up: bool, demodulate: bool) -> None:
    parts = [torch.randn(s, dtype=torch.float64, requires_grad=True)
             for s in ((3, 4, 5, 6), (7, 4, kernel, kernel), (3, 4))]
    y, wanted = modulated_conv(*parts, demodulate, up), unfused(*parts, demodulate, up)
    assert torch.allclose(y, wanted)
    direction = torch.randn_like(y)
    for a, b in zip(*(torch.autograd.grad(v, parts, direction) for v in (y, wanted)), strict=True):
        assert torch.allclose(a, b)


def slope(function: Any, at: Tensor, direction: Tensor, step: float = 1e-6) -> Tensor:
    """The derivative along a direction, by central differences."""
    with torch.no_grad():
        up, down = at + step * direction, at - step * direction
    return (function(up) - function(down)).detach() / (2 * step)


def test_the_path_length_gradient_and_its_own_gradient() -> None:
    network = generator(classes=3).double()
    z, condition, noise = inputs(network, 2, torch.float64)
    w = network.map(z, condition).detach().requires_grad_()
    target = torch.randn(2, *network.shape, dtype=torch.float64)

    def score(w: Tensor) -> Tensor:
        return (network.render(w, noise) * target).sum()

    def steepness(w: Tensor) -> Tensor:
        return torch.autograd.grad(score(w), w, create_graph=True)[0].square().sum()

    direction = torch.randn_like(w)
    (first,) = torch.autograd.grad(score(w), w)
    assert torch.allclose((first * direction).sum(), slope(score, w, direction), rtol=1e-6)
    (second,) = torch.autograd.grad(steepness(w), w)
    assert torch.allclose((second * direction).sum(),
                          slope(lambda v: steepness(v.requires_grad_()), w, direction), rtol=1e-5)


def test_the_styles_returned_are_those_of_the_images() -> None:
    network = generator()
    z, condition, noise = inputs(network)
    images, w = network(z, condition, noise, z.flip(0), torch.tensor([0, 1, 5, 99]))
    (gradient,) = torch.autograd.grad(images.square().sum(), w, create_graph=True)
    gradient.square().sum().backward()
    assert gradient.shape == (4, network.layers, network.settings.style)
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any()
               for n, p in network.named_parameters() if not n.startswith("colours") or "bias" not in n)


@pytest.mark.parametrize("classes", [0, 3])
def test_the_discriminators_input_gradient_and_its_own_gradient(classes: int) -> None:
    network = discriminator(classes=classes).double()
    x, condition = pictures(network, dtype=torch.float64)
    x.requires_grad_()

    def score(x: Tensor) -> Tensor:
        return network(x, condition).sum()

    def steepness(x: Tensor) -> Tensor:
        return torch.autograd.grad(score(x), x, create_graph=True)[0].square().sum()

    direction = torch.randn_like(x)
    (first,) = torch.autograd.grad(score(x), x)
    assert torch.allclose((first * direction).sum(), slope(score, x, direction), rtol=1e-6)
    (second,) = torch.autograd.grad(steepness(x), x)
    assert torch.allclose((second * direction).sum(),
                          slope(lambda v: steepness(v.requires_grad_()), x, direction), rtol=1e-5)
    steepness(x).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in network.named_parameters()
               if n != "score.bias")


@pytest.mark.parametrize("rate", [1.0, 0.01])
def test_equalised_rates(rate: float) -> None:
    torch.manual_seed(1)
    layer = Dense(400, 300, bias=1.0, rate=rate)
    assert layer.weight.std().item() == pytest.approx(1 / rate, rel=0.01)
    x = torch.randn(500, 400)
    y = layer(x)
    assert (y - 1).std().item() == pytest.approx(1.0, rel=0.02)
    assert y.mean().item() == pytest.approx(1.0, abs=0.02)
    before = layer(torch.eye(400)).detach()
    adam = torch.optim.Adam(layer.parameters(), lr=0.1)
    y.sum().backward()
    adam.step()  # by 0.1 in every parameter, which is the rate and the scale less in what is used
    moved = (layer(torch.eye(400)) - before).abs().mean().item()
    assert moved == pytest.approx(0.1 * rate, rel=0.1)  # the bias moves by rate; one weight by rate / 20


def test_layers_keep_the_variance() -> None:
    torch.manual_seed(1)
    layer = Layer(Settings(), 64, 64, (16, 16), up=False)
    y = layer(torch.randn(8, 64, 16, 16), torch.randn(8, 128), torch.zeros(8, 256))
    assert y.square().mean().item() == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(("items", "size"), [(8, 4), (6, 3), (5, 1), (2, 2), (1, 1)])
def test_minibatch_deviation(items: int, size: int) -> None:
    x = torch.randn(items, 3, 4, 5)
    y = with_deviation(x, 4)
    groups = x.numpy().reshape(items // size, size, 3, 4, 5)
    wanted = np.repeat(np.sqrt(groups.var(axis=1) + 1e-8).mean(axis=(1, 2, 3)), size)
    assert torch.equal(y[:, :3], x)
    assert np.allclose(y[:, 3], wanted[:, None, None], atol=1e-6)


def test_truncation_pulls_towards_the_centre_of_the_label() -> None:
    network = generator(classes=3)
    z, condition, _ = inputs(network, 6)
    w = network.map(z, condition)
    centre = network.centre[condition["label"]][:, None].expand_as(w)
    assert torch.equal(network.truncated(w, condition, 0.0), centre)
    assert torch.allclose(network.truncated(w, condition, 1.0), w, atol=1e-6)
    psi = torch.linspace(0, 1, 6)
    by_item = network.truncated(w, condition, psi)
    assert torch.allclose(by_item, torch.lerp(centre, w, psi[:, None, None]), atol=1e-6)
    assert torch.allclose(network.truncated(w, condition, torch.tensor(0.3)), torch.lerp(centre, w, 0.3), atol=1e-6)


@pytest.mark.parametrize("classes", [0, 3])
def test_the_centre_is_an_average_of_each_class(classes: int) -> None:
    network = generator(classes=classes, style_average=0.9)
    z, condition, noise = inputs(network, 5)
    condition = {"label": torch.tensor([0, 2, 2, 0, 2])} if classes else {}
    before, w = network.centre.clone(), network.map(z, condition)[:, 0]
    network.eval()(z, condition, noise)
    assert torch.equal(network.centre, before)
    network.train()(z, condition, noise)
    label = condition.get("label", torch.zeros(5, dtype=torch.int64))
    for k, (old, new) in enumerate(zip(before, network.centre, strict=True)):
        mine = w[label == k]
        wanted = 0.9 * old + 0.1 * mine.mean(0) if len(mine) else old
        assert torch.allclose(new, wanted, atol=1e-6)


def test_layers_from_the_cut_on_take_the_second_style() -> None:
    network = generator().eval()
    z, condition, noise = inputs(network)
    first, second = network.map(z, condition), network.map(z.flip(0), condition)
    images, w = network(z, condition, noise, z.flip(0), torch.tensor([0, 2, network.layers - 1, network.layers]))
    assert torch.equal(w[0], second[0])
    assert torch.equal(w[1, :2], first[1, :2])
    assert torch.equal(w[1, 2:], second[1, 2:])
    assert torch.equal(w[2, :-1], first[2, :-1])
    assert torch.equal(w[2, -1], second[2, -1])
    assert torch.equal(w[3], first[3])
    assert torch.equal(images, network.render(w, noise))


def test_every_style_and_every_number_of_noise_counts() -> None:
    network = generator()
    z, condition, noise = inputs(network, 2)
    w = network.map(z, condition).detach().requires_grad_()
    by_style, by_noise = torch.autograd.grad(network.render(w, noise.requires_grad_()).square().sum(), (w, noise))
    assert (by_style.abs().sum(-1) > 0).all()
    assert (by_noise != 0).all()
    fresh = Generator(network.settings, network.shape)
    assert torch.equal(fresh.render(w, noise), fresh.render(w, -noise))  # the noise's strength starts at 0


@pytest.mark.parametrize(("shape", "settings", "first"), [
    ((1, 28, 28), {}, (7, 7)),
    ((3, 32, 32), {}, (4, 4)),
    ((3, 32, 32), {"first": 8}, (8, 8)),
    ((3, 32, 32), {"noise": False}, (4, 4)),
    ((3, 64, 64), {}, (4, 4)),
    ((1, 24, 40), {}, (6, 10)),
    ((3, 64, 16), {}, (16, 4)),
])
def test_shapes(shape: tuple[int, ...], settings: dict[str, Any], first: tuple[int, int]) -> None:
    assert pyramid(shape, settings.get("first", 0))[0] == first
    g, d = generator(shape, 2, **settings), discriminator(shape, 2, **settings)
    z, condition, noise = inputs(g, 3)
    assert (noise.shape[1] > 0) == g.settings.noise
    images, w = g(z, condition, noise)
    assert images.shape == (3, *shape)
    assert w.shape == (3, g.layers, 8)
    assert d(images, condition).shape == (3,)


@pytest.mark.parametrize(("shape", "first", "remedy"), [
    ((3, 4, 4), 0, "4 to 7 times 2"), ((1, 27, 27), 0, "4 to 7 times 2"), ((1, 30, 30), 0, "network.first = 15"),
    ((3, 32, 32), 5, "5 times 2"), ((3, 32, 32), 32, "32 times 2"), ((1, 16000), 0, "dcgan"),
])
def test_sizes_that_do_not_fit_name_a_remedy(shape: tuple[int, ...], first: int, remedy: str) -> None:
    for network in (Generator, Discriminator):
        with pytest.raises(UserError, match=remedy):
            network(Settings(**SMALL, first=first), shape)


@pytest.mark.parametrize("setting", [{"width": 0}, {"style_average": 1.5}, {"first": -1}, {"group": 0}])
def test_settings_are_checked(setting: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(setting))):
        Settings(**setting)


def alike(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether two tensors differ by no more than a share of their norm."""
    return bool((a.double() - b.double()).norm() <= tolerance * a.double().norm())


def test_half_precision_is_close() -> None:
    g, d = generator((3, 32, 32), 3, width=16, most=64), discriminator((3, 32, 32), 3, discriminator_width=16, most=64)
    z, condition, noise = inputs(g, 8)
    x = pictures(d, 8)[0].requires_grad_()
    results = []
    for run in (lambda m: m, HalfPrecision):
        images, w = run(g)(z, condition, noise)
        scores = run(d)(x, condition)
        by_style = torch.autograd.grad(images.square().sum(), w, create_graph=True)[0]
        by_image = torch.autograd.grad(scores.sum(), x, create_graph=True)[0]
        (by_style.square().mean() + by_image.square().mean() + scores.mean()).backward()
        assert images.dtype == scores.dtype == w.dtype == torch.float32
        results.append((images, scores, by_style, by_image, *[p.grad for p in (g.constant, d.colours.weight)]))
        g.zero_grad(), d.zero_grad()
    for full, half, tolerance in zip(*results, (0.02, 0.05, 0.05, 0.1, 0.1, 0.1), strict=True):
        assert alike(full, half, tolerance), (full.norm(), (full - half).norm())


def test_labels_count() -> None:
    g, d = generator(classes=3), discriminator(classes=3)
    z, condition, noise = inputs(g)
    other = {"label": (condition["label"] + 1) % 3}
    images, _ = g.eval()(z, condition, noise)
    assert not torch.allclose(images, g(z, other, noise)[0], atol=1e-3)
    assert not torch.allclose(d(images, condition), d(images, other), atol=1e-3)


def test_items_of_other_groups_do_not_matter() -> None:
    network = discriminator()
    x, condition = pictures(network, 8)
    assert torch.allclose(network(x, condition)[:4], network(x[:4], condition), atol=1e-5)


def test_flops_are_those_torch_counts() -> None:
    g, d = generator(classes=3, width=16, most=64), discriminator(classes=3, discriminator_width=16, most=64)
    z, condition, noise = inputs(g)
    for network, run in ((g, lambda: g.eval()(z, condition, noise)), (d, lambda: d(*pictures(d)))):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run()
        ours = network.flops_per_item() * 4 / 3
        assert ours <= counter.get_total_flops() <= 1.15 * ours  # filters and demodulation are not weights


class Pictures(nn.Module):
    def __init__(self, network: Generator) -> None:
        super().__init__()
        self.network = network

    def forward(self, z: Tensor, label: Tensor, noise: Tensor, psi: Tensor) -> Tensor:
        condition = {"label": label}
        return self.network.render(self.network.truncated(self.network.map(z, condition), condition, psi), noise)


@pytest.mark.parametrize("noise", [True, False])
def test_exports_with_any_number_of_items(noise: bool) -> None:
    network = Pictures(generator(classes=3, noise=noise)).eval()
    z, condition, fresh = inputs(network.network, 4)
    example = (z, condition["label"], fresh, torch.full((4,), 0.7))
    items = torch.export.Dim("items")
    program = torch.export.export(network, example, dynamic_shapes=({0: items},) * 4)
    z, condition, fresh = inputs(network.network, 7)
    other = (z, condition["label"], fresh, torch.full((7,), 0.5))
    assert torch.allclose(program.module()(*other), network(*other), atol=1e-5)


def test_runs_on_shapes_alone() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        g, d = (HalfPrecision(network(Settings(), (3, 32, 32), 3)) for network in (Generator, Discriminator))
        condition = {"label": torch.zeros(4, dtype=torch.int64)}
        images, w = g(torch.empty(4, 128), condition, torch.empty(4, *g.network.noise_shape))
        torch.autograd.grad(images.sum(), w, create_graph=True)[0].sum().backward()
        d(images.detach(), condition).sum().backward()

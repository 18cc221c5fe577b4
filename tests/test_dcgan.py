"""DCGAN against torch's own layers, the published parameter counts, singular values, counters and exporter."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.flop_counter import FlopCounterMode

from handmill.errors import UserError
from handmill.networks import dcgan
from handmill.networks.dcgan import BatchNorm, Convolution, Discriminator, Generator, Settings, Spectral
from handmill.training.precision import HalfPrecision

STANDARD = Settings(latent=100)
SMALL = Settings(latent=6, width=8, most=16, label_width=5)
SHAPES = [(1, 16), (3, 28, 28), (1, 32, 32), (3, 64, 64), (3, 8, 16), (2, 8, 8, 12)]
NORMS = ("batch", "spectral", "none")


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def labels(n: int, classes: int = 3) -> dict[str, Tensor]:
    return {"label": torch.arange(n) % classes}


def pair(settings: Settings, shape: tuple[int, ...], classes: int = 0) -> tuple[Generator, Discriminator]:
    torch.manual_seed(1)
    return Generator(settings, shape, classes), Discriminator(settings, shape, classes)


def images(generator: Generator, z: Tensor, condition: dict[str, Tensor]) -> Tensor:
    return generator(z, condition, z.new_zeros(len(z), 0))[0]


def usual() -> tuple[nn.Sequential, nn.Sequential]:
    """The standard networks as torch's layers, generator and discriminator."""
    widths = [512, 256, 128, 64]
    make: list[nn.Module] = [nn.ConvTranspose2d(100, 512, 4, bias=False)]
    for a, b in itertools.pairwise([*widths, 3]):
        make += [nn.BatchNorm2d(a), nn.ReLU(), nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False)]
    judge: list[nn.Module] = [nn.Conv2d(3, 64, 4, 2, 1, bias=False), nn.LeakyReLU(0.2)]
    for a, b in itertools.pairwise(widths[::-1]):
        judge += [nn.Conv2d(a, b, 4, 2, 1, bias=False), nn.BatchNorm2d(b), nn.LeakyReLU(0.2)]
    return nn.Sequential(*make, nn.Tanh()), nn.Sequential(*judge, nn.Conv2d(512, 1, 4, bias=False), nn.Flatten(0))


def as_usual(generator: Generator, discriminator: Discriminator, gradients: bool = False) -> list[list[Tensor]]:
    """Our convolutions' weights (or their gradients) in torch's shapes, in the order of `usual`."""
    def of(layer: nn.Module) -> Tensor:
        weight = layer.weight
        return weight.grad if gradients and weight.grad is not None else weight.detach()

    return [[of(generator.dense).T.reshape(100, 512, 4, 4), *(of(up).movedim(-1, 1) for up in generator.ups)],
            [*(of(down).movedim(-1, 1) for down in discriminator.downs), of(discriminator.head).view(1, 512, 4, 4)]]


def convolutions(network: nn.Sequential) -> list[nn.Module]:
    return [m for m in network if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]


def test_the_standard_networks_are_torchs_layers_with_the_same_weights() -> None:
    ours, theirs = pair(STANDARD, (3, 64, 64)), usual()
    assert [sum(p.numel() for p in n.parameters()) for n in ours] == [3_576_704, 2_765_568]  # as published
    for network, weights in zip(theirs, as_usual(*ours), strict=True):
        for layer, weight in zip(convolutions(network), weights, strict=True):
            layer.weight.data.copy_(weight)
    z = drawn(3, 100)
    fakes, expected = images(ours[0], z, {}), theirs[0](z[:, :, None, None])
    assert torch.allclose(fakes, expected, atol=1e-5)
    scores, wanted = ours[1](fakes, {}), theirs[1](expected)
    assert torch.allclose(scores, wanted, atol=1e-5)
    F.softplus(-scores).sum().backward()
    F.softplus(-wanted).sum().backward()
    for network, gradients in zip(theirs, as_usual(*ours, gradients=True), strict=True):
        for layer, gradient in zip(convolutions(network), gradients, strict=True):
            assert (gradient - layer.weight.grad).norm() <= 1e-5 * gradient.norm()
    for mine, other in zip(ours, theirs, strict=True):
        running = [m for m in other if isinstance(m, nn.BatchNorm2d)]
        for norm, torchs in zip([n for n in mine.norms if isinstance(n, BatchNorm)], running, strict=True):
            assert torch.allclose(norm.mean, torchs.running_mean, atol=1e-6)
            assert torch.allclose(norm.variance, torchs.running_var, atol=1e-6)
            assert torch.allclose(norm.weight.grad, torchs.weight.grad, atol=1e-6, rtol=1e-4)
    evaluated = [network.eval() for network in (*ours, *theirs)]
    assert torch.allclose(images(ours[0], z, {}), evaluated[2](z[:, :, None, None]), atol=1e-5)
    assert torch.allclose(ours[1](expected, {}), evaluated[3](expected), atol=1e-5)


def test_gradient_penalty_is_that_of_torchs_layers() -> None:
    ours, theirs = pair(STANDARD, (3, 64, 64)), usual()
    for layer, weight in zip(convolutions(theirs[1]), as_usual(*ours)[1], strict=True):
        layer.weight.data.copy_(weight)
    x = drawn(2, 3, 64, 64).requires_grad_()
    for scores in (ours[1](x, {}), theirs[1](x)):
        slope, = torch.autograd.grad(scores.sum(), x, create_graph=True)
        slope.square().sum().backward()
    for layer, gradient in zip(convolutions(theirs[1]), as_usual(*ours, gradients=True)[1], strict=True):
        assert (gradient - layer.weight.grad).norm() <= 1e-4 * gradient.norm()


def test_weights_start_as_published() -> None:
    for network in pair(STANDARD, (3, 64, 64)):
        assert all(p.std().item() == pytest.approx(0.02, rel=0.05) for p in network.parameters() if p.ndim > 1)


def test_figure_1_of_the_paper() -> None:
    with torch.device("meta"):
        generator = Generator(Settings(latent=100, width=128, most=1024), (3, 64, 64))
    assert generator.small == (1024, 4, 4)
    assert [up.weight.shape[0] for up in generator.ups] == [1024, 512, 256, 128]


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_up_is_the_transpose_of_down(dims: int) -> None:
    torch.manual_seed(1)
    down, up = Convolution(3, 5, dims, bias=False), Convolution(3, 5, dims, bias=False, up=True)
    nn.init.normal_(down.weight)
    up.weight = down.weight
    x, y = drawn(2, 3, *[8] * dims), drawn(2, 5, *[4] * dims)
    assert (down(x) * y).sum().item() == pytest.approx((x * up(y)).sum().item(), rel=1e-4)


def test_half_precision_kernels_have_all_derivatives() -> None:
    """They are polynomials in three tensors, so float64 says whether each derivative is right."""
    parts = [drawn(*s).double().requires_grad_() for s in ((2, 2, 4, 6), (3, 4, 4, 2), (2, 3, 2, 3))]
    for missing in range(3):
        given = [p for i, p in enumerate(parts) if i != missing]
        assert torch.autograd.gradcheck(dcgan._Partial.apply, (missing, *given))
        assert torch.autograd.gradgradcheck(dcgan._Partial.apply, (missing, *given))
    x, weight, y = (p.detach() for p in parts)
    down, gradients = torch.func.vjp(lambda x, w: F.conv2d(x, w.movedim(-1, 1), stride=2, padding=1), x, weight)
    assert torch.allclose(dcgan._by_y(x, weight), down)
    assert torch.allclose(dcgan._by_x(weight, y), gradients(y)[0])
    assert torch.allclose(dcgan._by_weight(x, y), gradients(y)[1])


@pytest.mark.parametrize("up", [False, True])
def test_a_convolution_in_half_precision_is_torchs(up: bool) -> None:
    torch.manual_seed(1)
    layer = Convolution(6, 8, 2, bias=True, up=up).bfloat16()
    nn.init.normal_(layer.weight)
    x = drawn(2, 8 if up else 6, 8, 8).bfloat16()
    convolve = F.conv_transpose2d if up else F.conv2d
    expected = convolve(x.float(), layer.weight.float().movedim(-1, 1), layer.bias.float(), stride=2, padding=1)
    assert layer(x).dtype == torch.bfloat16
    assert (layer(x) - expected).norm() <= 0.01 * expected.norm()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", NORMS)
def test_shapes_and_gradients(shape: tuple[int, ...], norm: str) -> None:
    settings = Settings(latent=6, width=8, most=16, label_width=5, norm="none" if norm == "none" else "batch",
                        discriminator_norm=norm)  # type: ignore[arg-type]
    generator, discriminator = pair(settings, shape, 3)
    fakes, w = generator(drawn(4, 6), labels(4), torch.zeros(4, 0))
    scores = discriminator(fakes, labels(4))
    assert fakes.shape == (4, *shape)
    assert w.shape == (4, 1, 11)
    assert scores.shape == (4,)
    assert fakes.abs().max() <= 1
    assert 4 <= min(generator.small[1:]) <= 7
    F.softplus(-scores).sum().backward()
    for network in (generator, discriminator):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
        assert all(t.is_floating_point() for t in network.state_dict().values())  # an average of weights needs that


def test_first_map_may_be_chosen() -> None:
    assert Generator(Settings(width=8, first=2), (1, 32, 32)).small == (64, 2, 2)
    assert Generator(Settings(width=8, first=8), (1, 32, 64)).small == (16, 8, 16)


@pytest.mark.parametrize(("shape", "first"), [((3, 6, 6), 0), ((1, 36, 36), 0), ((1, 32, 33), 0), ((1, 32, 32), 7),
                                              ((1, 32, 32), 32), ((1, 4), 0)])
def test_spaces_that_do_not_halve(shape: tuple[int, ...], first: int) -> None:
    for network in (Generator, Discriminator):
        with pytest.raises(UserError, match="choose sides that are a power of two times"):
            network(Settings(first=first), shape)


@pytest.mark.parametrize("bad", [{"latent": 0}, {"width": 64, "most": 32}, {"momentum": 1.5}, {"first": -1}])
def test_settings_out_of_range(bad: dict[str, int]) -> None:
    with pytest.raises(UserError, match=f"{list(bad)[-1]} = "):
        Settings(**bad)  # type: ignore[arg-type]


def test_sigma_is_the_largest_singular_value() -> None:
    torch.manual_seed(1)
    layer = Spectral(nn.Linear(30, 20))
    for _ in range(300):
        layer.sigma()
    expected = torch.linalg.svdvals(layer.layer.weight)[0]
    assert layer.sigma().item() == pytest.approx(expected.item(), rel=1e-5)
    x = drawn(4, 30)
    assert torch.allclose(layer(x), F.linear(x, layer.layer.weight / expected, layer.layer.bias), atol=1e-5)


def test_spectral_normalisation_is_torchs() -> None:
    """From the same vectors, far from converged: values, and gradients that pass through sigma alone."""
    torch.manual_seed(1)
    plain = nn.Linear(12, 7).double()
    ours, theirs = Spectral(copy.deepcopy(plain)).double(), spectral_norm(plain)
    weight, inner, x = ours.layer.weight, theirs.parametrizations.weight[0], drawn(5, 12).double()
    before = ours.u.clone()
    ours(x)
    assert torch.allclose(ours.u, F.normalize(weight @ (weight.T @ before), dim=0))  # algorithm 1
    inner._u.copy_(ours.u)
    inner._v.copy_(F.normalize(weight.T @ ours.u, dim=0))
    y, expected = ours.eval()(x), theirs.eval()(x)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert torch.allclose(y, expected)
    assert torch.allclose(weight.grad, theirs.parametrizations.weight.original.grad)


def test_power_iteration_rests_in_evaluation() -> None:
    torch.manual_seed(1)
    network = Discriminator(Settings(width=8, most=16, discriminator_norm="spectral"), (1, 16, 16), 3)
    x, before = drawn(2, 1, 16, 16), network.downs[1].u.clone()
    network.eval()
    assert torch.equal(network(x, labels(2)), network(x, labels(2)))
    assert torch.equal(network.downs[1].u, before)
    network.train()(x, labels(2))
    assert not torch.equal(network.downs[1].u, before)


@pytest.mark.parametrize("label", ["projection", "embedding"])
def test_every_label_changes_image_and_score(label: str) -> None:
    generator, discriminator = pair(Settings(latent=6, width=8, label=label), (1, 16, 16), 4)  # type: ignore[arg-type]
    every, z = labels(4, 4), drawn(1, 6).expand(4, -1)
    fakes = images(generator.eval(), z, every)
    scores = discriminator.eval()(fakes[:1].expand(4, -1, -1, -1), every)
    for a, b in itertools.combinations(range(4), 2):
        assert not torch.allclose(fakes[a], fakes[b], atol=1e-6)
        assert scores[a] != scores[b]


def test_projection_is_equation_4_with_a_mean() -> None:
    torch.manual_seed(1)
    network = Discriminator(SMALL, (1, 16, 16), 3).eval()
    x = drawn(5, 1, 16, 16)
    h = x
    for i, down in enumerate(network.downs):
        h = F.conv2d(h, down.weight.movedim(-1, 1), stride=2, padding=1)
        h = F.leaky_relu(h / (1 + 1e-5) ** 0.5 if i else h, 0.2)
    phi = h.mean((2, 3))  # (B, C)
    v = network.projection.weight[labels(5)["label"]]
    assert torch.allclose(network(x, labels(5)), network.head(h.flatten(1))[:, 0] + (v * phi).sum(1), atol=1e-6)


def test_evaluation_makes_an_image_alone_as_in_a_batch() -> None:
    generator, _ = pair(SMALL, (1, 16, 16), 3)
    z = drawn(4, 6)
    images(generator, z, labels(4))
    generator.eval()
    together = images(generator, z, labels(4))
    alone = torch.cat([images(generator, z[i:i + 1], {"label": torch.tensor([i % 3])}) for i in range(4)])
    assert torch.allclose(together, alone, atol=1e-6)


def test_truncation_shrinks_the_noise_and_keeps_the_label() -> None:
    generator, _ = pair(SMALL, (1, 16, 16), 3)
    w = generator.map(drawn(4, 6), labels(4))
    half = generator.truncated(w, labels(4), torch.tensor(0.5))
    assert torch.equal(half[..., :6], w[..., :6] / 2)
    assert torch.equal(half[..., 6:], w[..., 6:])
    assert torch.equal(generator.truncated(w, labels(4), 1.0), w)


@pytest.mark.parametrize(("norm", "shape"), [("batch", (3, 32, 32)), ("spectral", (3, 32, 32)), ("none", (3, 32, 32)),
                                             ("batch", (1, 32)), ("spectral", (1, 8, 8, 8))])
def test_half_precision_is_close(norm: str, shape: tuple[int, ...]) -> None:
    settings = Settings(latent=32, width=16, most=64, discriminator_norm=norm)  # type: ignore[arg-type]
    gradients, kept = [], []
    for half in (False, True):
        networks = pair(settings, shape, 3)
        make, judge = (HalfPrecision(n) if half else n for n in networks)
        fakes, _ = make(drawn(16, 32), labels(16), torch.zeros(16, 0))
        scores = judge(fakes, labels(16))
        assert fakes.dtype == scores.dtype == torch.float32
        F.softplus(-scores).mean().backward()
        kept.append((fakes.detach(), scores.detach()))
        gradients.append([p.grad for n in networks for p in n.parameters()])
    assert (kept[0][0] - kept[1][0]).norm() <= 0.02 * kept[0][0].norm()
    assert (kept[0][1] - kept[1][1]).abs().max() <= 0.03
    for exact, rounded in zip(*gradients, strict=True):
        assert rounded.dtype == torch.float32
        assert F.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0) > 0.98


def test_half_precision_computes_in_bf16_what_it_can() -> None:
    for norm in NORMS:
        network = Discriminator(Settings(width=8, discriminator_norm=norm), (3, 16, 16), 3)  # type: ignore[arg-type]
        seen: list[torch.dtype] = []
        network.downs[1].register_forward_hook(lambda m, i, o, seen=seen: seen.append(o.dtype))
        HalfPrecision(network)(drawn(2, 3, 16, 16), labels(2))
        assert seen == [torch.bfloat16]


@pytest.mark.parametrize("norm", NORMS)
def test_gradient_penalty(norm: str) -> None:
    """The gradient of a squared gradient (Mescheder et al. 2018) in half precision is close to that in fp32."""
    settings = Settings(width=8, most=32, discriminator_norm=norm)  # type: ignore[arg-type]
    found: list[Tensor] = []
    for half in (False, True):
        _, network = pair(settings, (3, 32, 32))
        x = drawn(8, 3, 32, 32).requires_grad_()
        scores = (HalfPrecision(network) if half else network)(x, {})
        slope, = torch.autograd.grad(scores.sum(), x, create_graph=True)
        slope.square().sum().backward()
        found.append(network.downs[1].get_parameter("layer.weight" if norm == "spectral" else "weight").grad)
    assert F.cosine_similarity(*(g.flatten() for g in found), dim=0) > 0.97


@pytest.mark.parametrize("shape", [(1, 16), (3, 32, 32), (1, 8, 8, 8)])
def test_flops_are_three_forward_passes(shape: tuple[int, ...]) -> None:
    generator, discriminator = (n.eval() for n in pair(SMALL, shape))
    for network, arguments in ((generator, (drawn(1, 6), {}, torch.zeros(1, 0))),
                               (discriminator, (drawn(1, *shape), {}))):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(*arguments)
        assert network.flops_per_item() == 3 * counter.get_total_flops()


def test_a_step_without_data_plans_memory() -> None:
    with FakeTensorMode():
        networks = pair(SMALL, (3, 32, 32), 3)
        make, judge = (HalfPrecision(n) for n in networks)
        fakes, _ = make(torch.randn(4, 6), labels(4), torch.zeros(4, 0))
        judge(fakes, labels(4)).sum().backward()
        assert all(p.grad is not None for n in networks for p in n.parameters())


def test_export_of_any_batch(tmp_path: Path) -> None:
    class Sampler(nn.Module):
        def __init__(self, generator: Generator) -> None:
            super().__init__()
            self.generator = generator

        def forward(self, z: Tensor, label: Tensor, psi: Tensor) -> Tensor:
            condition = {"label": label}
            w = self.generator.truncated(self.generator.map(z, condition), condition, psi)
            return self.generator.render(w, z.new_zeros(z.shape[0], 0))

    sampler = Sampler(pair(SMALL, (3, 32, 32), 3)[0]).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    arguments = (drawn(2, 6), labels(2)["label"], torch.tensor(0.7))
    program = torch.export.export(sampler, arguments, dynamic_shapes=({0: batch}, {0: batch}, None))
    torch.export.save(program, tmp_path / "sampler.pt2")
    z, label = drawn(5, 6), labels(5)["label"]
    assert torch.allclose(program.module()(z, label, arguments[2]), sampler(z, label, arguments[2]), atol=1e-6)

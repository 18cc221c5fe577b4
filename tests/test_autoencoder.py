"""Shapes for every number of dimensions and size, labels, precision, export, and the operations counted."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from handmill.errors import UserError
from handmill.networks.autoencoder import Autoencoder, Settings
from handmill.training.precision import HalfPrecision

SMALL: dict[str, Any] = {"patch": 2, "width": 8, "multipliers": (1, 2), "latent": 3}
MAP = SMALL | {"flat": False}


def inputs(network: Autoencoder, items: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(items, *network.shape, generator=generator) * 2 - 1,
            torch.randn(items, *network.latent_shape, generator=generator))


def made(shape: tuple[int, ...], classes: int = 0, **settings: Any) -> Autoencoder:
    """A network whose residual blocks are no longer the identity."""
    torch.manual_seed(1)
    network = Autoencoder(Settings(**settings), shape, classes)
    for name, p in network.named_parameters():
        if name.endswith("outer.weight"):
            nn.init.normal_(p, std=0.05)
    return network


@pytest.mark.parametrize(("shape", "settings", "latent"), [
    ((1, 28, 28), {}, (3,)),
    ((1, 28, 28), {"flat": False}, (3, 7, 7)),
    ((3, 28, 28), {"flat": False, "multipliers": (1, 2, 2, 2)}, (3, 2, 2)),
    ((1, 28, 28), {"flat": False, "patch": 1, "multipliers": (1, 2, 2, 2)}, (3, 4, 4)),
    ((2, 30, 45), {"flat": False, "patch": 4, "multipliers": (1,)}, (3, 8, 12)),
    ((2, 19, 7), {"flat": False, "patch": 3, "blocks": 2}, (3, 4, 2)),
    ((2, 50), {"flat": False}, (3, 13)),
    ((1, 6, 5, 7), {"flat": False}, (3, 2, 2, 2)),
    ((1, 6, 5, 7), {"flat": True, "blocks": 0}, (3,)),
    ((1, 12, 12), {"flat": False, "bottleneck": "vq", "codes": 9}, (3, 3, 3)),
    ((1, 12, 12), {"flat": False, "bottleneck": "fsq", "fsq_levels": (3, 4)}, (2, 3, 3)),
])
def test_shapes_and_gradients(shape: tuple[int, ...], settings: dict[str, Any], latent: tuple[int, ...]) -> None:
    network = made(shape, **SMALL | settings)
    assert network.latent_shape == latent
    x, noise = inputs(network)
    parts = network(x, noise, {})
    assert parts["output"].shape == x.shape
    names = {"codes", "commitment", "statistics"} if network.vocabulary else {"mean", "log_variance"}
    assert set(parts) == names | {"output", "log_scale"}
    if not network.vocabulary:
        assert parts["mean"].shape == parts["log_variance"].shape == noise.shape
    sum(v.sum() for v in parts.values() if v.is_floating_point()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    assert network.images(network.mean(x), "gaussian").shape == x.shape


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 9, 8, 7), (2, 21)])
def test_every_pixel_reaches_the_latent_and_every_pixel_is_decoded_from_it(shape: tuple[int, ...]) -> None:
    network = made(shape, **MAP)
    x, _ = inputs(network, 1)
    x.requires_grad_()
    network.encode(x, {}).square().sum().backward()
    assert x.grad is not None
    assert (x.grad != 0).all()
    z = torch.zeros(1, *network.latent_shape)
    assert ((network.decode(z, {}) - network.decode(z + 1, {})) != 0).all()


def test_items_do_not_see_each_other() -> None:
    network = made((1, 14, 14), **SMALL).eval()
    x, noise = inputs(network, 4)
    whole, alone = network(x, noise, {}), network(x[2:3], noise[2:3], {})
    assert all(torch.allclose(whole[k][2:3], alone[k], atol=1e-5) for k in alone)


def test_the_label_matters_where_it_is_asked_for() -> None:
    network = made((1, 12, 12), 4, conditional=True, **SMALL)
    x, noise = inputs(network)
    first, second = torch.tensor([0, 1, 2]), torch.tensor([3, 3, 3])
    a, b = network.encode(x, {"label": first}), network.encode(x, {"label": second})
    assert ((a - b).abs().amax((1, 2)) > 1e-6).all()
    assert ((network.decode(noise, {"label": first}) - network.decode(noise, {"label": second})).abs() > 0).any()
    none = torch.full((3,), 4)
    assert torch.equal(network.encode(x, {}), network.encode(x, {"label": none}))
    deaf = made((1, 12, 12), 4, **SMALL)
    assert torch.equal(deaf.encode(x, {}), deaf.encode(x, {"label": first}))


@pytest.mark.parametrize("settings", [SMALL, MAP, MAP | {"bottleneck": "vq", "codes": 8}, MAP | {"bottleneck": "fsq"}])
def test_half_precision_is_close_and_its_gradients_arrive(settings: dict[str, Any]) -> None:
    network = made((1, 14, 14), **settings)
    x, noise = inputs(network)
    full, half = network(x, noise, {}), HalfPrecision(network)(x, noise, {})
    assert half["output"].dtype == torch.float32
    if not network.vocabulary:
        torch.testing.assert_close(half["mean"], full["mean"], atol=0.05, rtol=0.05)
    sum(v.sum() for v in half.values() if v.is_floating_point()).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in network.parameters())


@pytest.mark.parametrize("settings", [SMALL, MAP | {"bottleneck": "vq", "codes": 8}, MAP | {"bottleneck": "fsq"}])
def test_trains_on_tensors_without_data(settings: dict[str, Any]) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        network = Autoencoder(Settings(**settings), (1, 14, 14))
        x, noise = torch.zeros(5, 1, 14, 14), torch.zeros(5, *network.latent_shape)
        parts = HalfPrecision(network)(x, noise, {})
        sum(v.sum() for v in parts.values() if v.is_floating_point()).backward()
        assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize(("shape", "settings"), [
    ((1, 28, 28), {}), ((3, 15), {"flat": False, "blocks": 2, "patch": 2, "multipliers": (1, 2)}),
    ((1, 28, 28), MAP | {"conditional": True}),
    ((2, 9, 8, 7), {"flat": False})])
def test_operations_are_those_that_torch_counts(shape: tuple[int, ...], settings: dict[str, Any]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    network = Autoencoder(Settings(**settings), shape, 10)
    x, noise = inputs(network, 1)
    with FlopCounterMode(display=False) as counter:
        network(x, noise, {})["output"].sum().backward()
    assert network.flops_per_item() == pytest.approx(counter.get_total_flops(), rel=0.01)


class Encode(nn.Module):
    def __init__(self, network: Autoencoder) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network.encode(x, {}) if not self.network.vocabulary else self.network.quantise(
            self.network.encode(x, {})).codes


class Decode(Encode):
    def forward(self, x: Tensor) -> Tensor:
        z = self.network.lookup(x) if self.network.vocabulary else x
        return self.network.images(z, "bernoulli")


@pytest.mark.parametrize("settings", [SMALL, MAP, MAP | {"bottleneck": "vq", "codes": 8}, MAP | {"bottleneck": "fsq"}])
def test_both_halves_export_with_a_free_batch(settings: dict[str, Any]) -> None:
    network = made((1, 13, 14), **settings).eval()
    x, z = inputs(network, 5)
    z = network.quantise(network.encode(x, {})).codes if network.vocabulary else z
    for wrapper, example in ((Encode(network), x), (Decode(network), z)):
        program = torch.export.export(wrapper, (example[:3],), dynamic_shapes=({0: torch.export.Dim("batch")},))
        torch.testing.assert_close(program.module()(example), wrapper(example), atol=1e-5, rtol=1e-5)


def test_images_are_the_means_of_the_pixels() -> None:
    network = made((1, 8, 8), **SMALL)
    _, z = inputs(network)
    logits = network.decode(z, {})
    torch.testing.assert_close(network.images(z, "bernoulli"), 2 * logits.sigmoid() - 1)
    assert torch.equal(network.images(z, "laplace"), logits.clamp(-1, 1))


@pytest.mark.parametrize(("settings", "word"), [
    ({"bottleneck": "vq"}, "flat"), ({"multipliers": ()}, "multipliers"), ({"multipliers": (0,)}, "multipliers"),
    ({"fsq_levels": (1, 5)}, "fsq_levels"), ({"width": 0}, "width"), ({"codes": 1}, "codes"), ({"patch": 0}, "patch"),
    ({"dropout": 1.5}, "dropout")])
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        Settings(**settings)


def test_a_condition_needs_labels() -> None:
    with pytest.raises(UserError, match="labels"):
        made((1, 8, 8), 0, conditional=True)


def test_gradients_lie_in_memory_as_their_weights_do() -> None:
    """Fused optimizers walk weights, gradients and states side by side."""
    network = made((3, 12, 12), **SMALL)
    x, noise = inputs(network)
    for module in (network, HalfPrecision(network)):
        sum(v.sum() for v in module(x, noise, {}).values()).backward()
        assert all(p.grad is not None and p.grad.stride() == p.stride() for p in network.parameters())
        network.zero_grad()


def test_vocabulary() -> None:
    assert made((1, 8, 8), **MAP | {"bottleneck": "vq", "codes": 9}).vocabulary == 9
    assert made((1, 8, 8), **MAP | {"bottleneck": "fsq"}).vocabulary == math.prod(Settings().fsq_levels)
    assert made((1, 8, 8), **SMALL).vocabulary == 0

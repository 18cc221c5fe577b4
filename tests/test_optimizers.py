"""Muon against torch's, the grouping of parameters, and the schedule against closed forms."""

import math

import pytest
import torch
from torch import nn

from handmill.networks.decoder import Decoder, Settings
from handmill.recipe import Training
from handmill.training.optimizers import AdamW, Muon, optimizers, orthogonalise, rate


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16)])
def test_orthogonalise_moves_singular_values_towards_one(shape: tuple[int, int]) -> None:
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalise(matrices))
    assert values.min() > 0.4
    assert values.max() < 1.4
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    cosine = torch.cosine_similarity(orthogonalise(matrices).flatten(1), (left @ right).flatten(1))
    assert cosine.min() > 0.96


@pytest.mark.parametrize("shape", [(32, 16), (16, 32), (16, 16)])
def test_muon_takes_the_steps_of_torchs(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(2)
    start, gradients = torch.randn(shape, generator=generator), torch.randn(4, *shape, generator=generator)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    steps = (Muon([ours], 0.02, 0.95, 0.1),
             torch.optim.Muon([theirs], 0.02, 0.1, momentum=0.95, nesterov=True, adjust_lr_fn="original"))
    for gradient in gradients:
        for p, optimizer in zip((ours, theirs), steps, strict=True):
            p.grad = gradient.clone()
            optimizer.step()
    moved = (theirs - start).norm()
    assert moved > 0.1
    assert (ours - theirs).norm() < 0.01 * moved  # both work in bf16, in another order


def test_adamw_takes_the_steps_of_torchs() -> None:
    generator = torch.Generator().manual_seed(4)
    start, gradients = torch.randn(5, 3, generator=generator), torch.randn(4, 5, 3, generator=generator)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    steps = (AdamW([{"params": [ours]}], 0.01, (0.9, 0.95), weight_decay=0.1),
             torch.optim.AdamW([theirs], 0.01, (0.9, 0.95), weight_decay=0.1))
    for gradient in gradients:
        for p, optimizer in zip((ours, theirs), steps, strict=True):
            p.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=0)
    assert (ours - start).abs().max() > 0.01


def test_muon_treats_matrices_together_as_apart() -> None:
    generator = torch.Generator().manual_seed(3)
    starts = [torch.randn(8, 12, generator=generator) for _ in range(3)]
    gradients = [torch.randn(8, 12, generator=generator) for _ in range(3)]
    together, apart = ([nn.Parameter(s.clone()) for s in starts] for _ in range(2))
    for p, g in zip(together + apart, gradients * 2, strict=True):
        p.grad = g.clone()
    Muon(together, 0.1).step()
    for p in apart:
        Muon([p], 0.1).step()
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=0)


def test_every_parameter_has_one_optimizer() -> None:
    network = Decoder(Settings(layers=2, width=16, heads=2, bias=True, norm="layer", positions="learned"), 20)
    adamw, muon = optimizers(network, Training())
    owned = [id(p) for o in (adamw, muon) for g in o.param_groups for p in g["params"]]
    assert sorted(owned) == sorted(id(p) for p in network.parameters())
    inner = {id(p) for n, p in network.named_parameters() if p.ndim == 2 and n.startswith("blocks")}
    assert {id(p) for g in muon.param_groups for p in g["params"]} == inner
    (only,) = optimizers(network, Training(optimizer="adamw"))
    decays = {id(p): g["weight_decay"] for g in only.param_groups for p in g["params"]}
    assert all(decays[id(p)] == (0.1 if p.ndim == 2 else 0.0) for p in network.parameters())


def test_rate_closed_forms() -> None:
    training = Training(steps=110, warmup=10, final_rate=0.2, schedule="linear")
    assert [rate(s, training) for s in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert rate(10, training) == 1.0
    assert rate(60, training) == pytest.approx(0.6)
    assert rate(110, training) == pytest.approx(0.2)
    cosine = Training(steps=110, warmup=10, final_rate=0.2, schedule="cosine")
    assert rate(35, cosine) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert rate(99, Training(warmup=0, schedule="constant")) == 1.0


def test_muon_leaves_a_matrix_without_gradient_signal_where_it_is() -> None:
    p = nn.Parameter(torch.ones(4, 6))
    p.grad = torch.zeros_like(p)
    Muon([p], 0.1, weight_decay=0.5).step()
    torch.testing.assert_close(p, torch.full((4, 6), 0.95))


def test_a_state_taken_back_goes_on_the_same() -> None:
    """Two steps, against one step, its state moved to a second optimizer, and the other step there: bit for bit."""
    generator = torch.Generator().manual_seed(5)
    start = [torch.randn(6, 4, generator=generator), torch.randn(4, generator=generator)]
    gradients = [[torch.randn_like(s) for s in start] for _ in range(2)]

    def made() -> tuple[list[nn.Parameter], list[Muon | AdamW]]:
        ps = [nn.Parameter(s.clone()) for s in start]
        return ps, [Muon([ps[0]], 0.1), AdamW([{"params": [ps[1]]}], 0.1)]

    def step(ps: list[nn.Parameter], steppers: list[Muon | AdamW], number: int) -> None:
        for p, g in zip(ps, gradients[number], strict=True):
            p.grad = g.clone()
        for optimizer in steppers:
            optimizer.step()

    (one, first), (two, second) = made(), made()
    step(one, first, 0)
    for a, b, p, q in zip(first, second, one, two, strict=True):
        b.load(a.tensors())
        q.data.copy_(p.data)
    step(one, first, 1)
    step(two, second, 1)
    assert all(torch.equal(p, q) for p, q in zip(one, two, strict=True))

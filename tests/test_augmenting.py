"""Discriminator augmentation: each change against numpy and scipy, and the clean distribution back from changed images.

A change drawn from a group acts on distributions as T = (1 - p) I + p A (Karras et al. 2020, appendix C), whose
eigenvalue at a character is 1 - p + p phi, phi the mean of the character over the draws.
"""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from handmill.data.noise import uniform
from handmill.errors import UserError
from handmill.families.adversarial.augmenting import (
    BLIT,
    BRIGHTNESS,
    COLOUR,
    CONTRAST,
    DRAWS,
    EVERY,
    GEOMETRY,
    GREY,
    OPERATIONS,
    PLACES,
    SATURATION,
    SCALE,
    SHIFT,
    SLIDE,
    STEPS,
    Augment,
    adapted,
    augmented,
    matrices,
)

SIZE = (12, 12)
MANY = 40_000
ALWAYS, NEVER, OFTEN = torch.tensor(1.0), torch.tensor(0.0), torch.tensor(0.7)


def draws_of(n: int, key: int = 7) -> Tensor:
    return uniform(key, torch.arange(n), DRAWS)


def chosen(step: str, *numbers: float, n: int = 1) -> Tensor:
    """Draws (n, DRAWS) whose numbers for `step` are these."""
    draws = torch.full((n, DRAWS), 0.5)
    start = PLACES[step] + 1
    draws[:, start:start + len(numbers)] = torch.tensor(numbers)
    return draws


def picture(*shape: int, key: int = 3) -> Tensor:
    return uniform(key, torch.arange(shape[0]), math.prod(shape[1:])).reshape(shape) * 2 - 1


def quantile(z: float) -> float:
    """The uniform number whose normal quantile is z."""
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))


# What each change does


@pytest.mark.parametrize(("number", "flipped"), [(0.2, True), (0.7, False)])
def test_flip_is_numpys(number: float, flipped: bool) -> None:
    x = picture(2, 3, 7, 10)
    found = augmented(x, ALWAYS, chosen("flip", 1 - number, n=2), ("flip",))
    assert np.array_equal(found.numpy(), np.flip(x.numpy(), 3) if flipped else x.numpy())


@pytest.mark.parametrize("quarters", range(4))
@pytest.mark.parametrize("side", [1, 9, 28, 32])
def test_rotate90_is_numpys(quarters: int, side: int) -> None:
    x = picture(2, 3, side, side)
    found = augmented(x, ALWAYS, chosen("rotate90", quarters / 4 + 0.1, n=2), ("rotate90",))
    assert np.array_equal(found.numpy(), np.rot90(x.numpy(), quarters, (2, 3)))


@pytest.mark.parametrize(("across", "down"), [(0, 0), (3, -2), (-4, 1), (4, 3)])
def test_shift_is_a_roll_of_the_mirrored_image(across: int, down: int) -> None:
    height, width = 28, 36
    x = picture(1, 3, height, width)
    numbers = [0.5 + side / (2 * SHIFT * n) for side, n in ((across, width), (down, height))]
    mirrored = np.pad(x.numpy(), ((0, 0), (0, 0), (8, 8), (8, 8)), "symmetric")
    expected = np.roll(mirrored, (down, across), (2, 3))[..., 8:-8, 8:-8]
    assert np.array_equal(augmented(x, ALWAYS, chosen("shift", *numbers), ("shift",)).numpy(), expected)


def against_scipy(x: Tensor, found: Tensor, forward: np.ndarray, offset: tuple[float, float] = (0, 0)) -> float:
    """The largest difference from scipy's bilinear reading; `forward` and offset in (x, y), about the centre."""
    inverse = np.linalg.inv(forward)[::-1, ::-1]  # (row, column)
    middle = (np.array(x.shape[2:]) - 1) / 2
    shift = middle - inverse @ (middle + np.array(offset[::-1]))
    expected = [ndimage.affine_transform(c, inverse, shift, order=1, mode="reflect") for c in x[0].double().numpy()]
    return float(np.abs(found[0].numpy() - np.stack(expected)).max())


@pytest.mark.parametrize("angle", [0.3, -1.2, 2.9])
@pytest.mark.parametrize("step", ["rotate", "rotate again"])
def test_rotate_is_scipys(angle: float, step: str) -> None:
    x = picture(1, 3, 16, 21)
    draws = chosen("rotate again", 0.5)  # no turn
    draws[:, PLACES[step] + 1] = 0.5 + angle / (2 * math.pi)
    cos, sin = math.cos(angle), math.sin(angle)
    assert against_scipy(x, augmented(x, ALWAYS, draws, ("rotate",)), np.array([[cos, sin], [-sin, cos]])) < 1e-4


def test_rotate_is_the_turn_that_scipys_rotate_makes() -> None:
    row, column = torch.meshgrid(torch.linspace(-1, 1, 33), torch.linspace(-1, 1, 33), indexing="ij")
    x = (torch.sin(3 * row) * torch.cos(2 * column) + column)[None, None]
    found = augmented(x, ALWAYS, chosen("rotate", 0.5 + 30 / 360), ("rotate",))
    expected = ndimage.rotate(x[0, 0].numpy(), 30, reshape=False, order=3)
    assert np.abs(found[0, 0].numpy() - expected)[8:-8, 8:-8].max() < 0.01


@pytest.mark.parametrize("z", [-1.5, 1.0])
def test_scale_stretch_and_slide_are_scipys(z: float) -> None:
    x = picture(1, 2, 20, 17)
    s = 2 ** (SCALE * z)
    for step, forward in (("scale", np.diag([s, s])), ("stretch", np.diag([s, 1 / s]))):
        found = augmented(x, ALWAYS, chosen(step, quantile(z)), (step,))
        assert against_scipy(x, found, forward) < 1e-4, step
    found = augmented(x, ALWAYS, chosen("slide", quantile(z), quantile(-0.3)), ("slide",))
    assert against_scipy(x, found, np.eye(2), (17 * SLIDE * z, 20 * SLIDE * -0.3)) < 1e-4


def test_the_affine_matrix_is_the_product_in_the_papers_order() -> None:
    draws = draws_of(50)
    whole = matrices(ALWAYS, draws, BLIT + GEOMETRY, SIZE)[0].double()
    product = torch.eye(3, dtype=torch.double)
    for step, (_, entries) in STEPS.items():
        if step in COLOUR:
            continue
        matrix = torch.eye(3, dtype=torch.double).repeat(50, 1, 1)
        numbers = draws[:, PLACES[step] + 1:][:, :STEPS[step][0]]
        for (row, column), value in entries(numbers, SIZE).items():
            matrix[:, row, column] = value.double()
        product = matrix @ product
    assert torch.allclose(whole, product, atol=1e-5)
    assert torch.allclose(whole[:, :2, :2].det().abs(), torch.exp2(2 * SCALE * z_of(draws, "scale")), rtol=1e-4)


def z_of(draws: Tensor, step: str) -> Tensor:
    return math.sqrt(2) * torch.erfinv(2 * draws[:, PLACES[step] + 1].double() - 1)


def test_blits_read_through_the_geometry_are_the_copies() -> None:
    """A unit scale makes every image take the bilinear way."""
    x, draws = picture(64, 3, *SIZE), draws_of(64)
    draws[:, PLACES["scale"] + 1] = 0.5
    copies = augmented(x, ALWAYS, draws, BLIT)
    assert torch.allclose(augmented(x, ALWAYS, draws, (*BLIT, "scale")), copies, atol=1e-5)
    pixels = x.flatten(2).unique(dim=2)
    assert torch.isin(copies, pixels).all()


@pytest.mark.parametrize("z", [-1.0, 0.5])
def test_colours_are_their_closed_forms(z: float) -> None:
    x = picture(1, 3, 4, 5)
    grey = x.mean(1, keepdim=True)
    cases = {
        "brightness": x + BRIGHTNESS * z,
        "contrast": x * 2 ** (CONTRAST * z),
        "luma_flip": x - 2 * grey if z > 0 else x,
        "saturation": grey + 2 ** (SATURATION * z) * (x - grey),
    }
    for step, expected in cases.items():
        found = augmented(x, ALWAYS, chosen(step, quantile(z)), (step,))
        assert torch.allclose(found, expected, atol=1e-5), step


def test_hue_turns_about_grey() -> None:
    x = picture(1, 3, 4, 5)
    third = augmented(x, ALWAYS, chosen("hue", 0.5 + 1 / 3), ("hue",))
    assert torch.allclose(third, x.roll(1, 1), atol=1e-5)  # 120 degrees: red to green to blue
    turn = matrices(ALWAYS, draws_of(500), ("hue",), SIZE)[1][:, :3, :3]
    assert torch.allclose(turn @ turn.mT, torch.eye(3).expand_as(turn), atol=1e-5)
    assert torch.allclose(turn.det(), torch.ones(500), atol=1e-5)
    assert torch.allclose(turn.sum(2), torch.ones(500, 3), atol=1e-5)
    angle = 2 * math.pi * (draws_of(500)[:, PLACES["hue"] + 1] - 0.5)
    assert torch.allclose(turn.diagonal(dim1=1, dim2=2).sum(1), 1 + 2 * angle.cos(), atol=1e-5)


def test_one_channel_keeps_brightness_and_contrast() -> None:
    x, draws = picture(20, 1, 6, 6), draws_of(20)
    found = augmented(x, ALWAYS, draws, COLOUR)
    assert torch.equal(found, augmented(x, ALWAYS, draws, GREY))
    b, c = BRIGHTNESS * z_of(draws, "brightness"), 2 ** (CONTRAST * z_of(draws, "contrast"))
    expected = (x.double() + b[:, None, None, None]) * c[:, None, None, None]
    assert torch.allclose(found.double(), expected, atol=1e-5)
    assert augmented(x, ALWAYS, draws, ("hue", "saturation", "luma_flip")) is x


# What holds for all of them


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(28, 28), (32, 32), (13, 13)])
def test_p_zero_is_the_identity_bit_for_bit(channels: int, size: tuple[int, int]) -> None:
    x = picture(8, channels, *size)
    x[0, 0, 0] = -0.0
    draws = draws_of(8)
    draws[0] = 0.0
    found = augmented(x, NEVER, draws, OPERATIONS)
    assert torch.equal(found.view(torch.int32), x.view(torch.int32))
    assert augmented(x, ALWAYS, draws, ()) is x


def test_images_do_not_depend_on_their_batch() -> None:
    x, draws = picture(12, 3, *SIZE), draws_of(12)
    whole = augmented(x, OFTEN, draws, OPERATIONS)
    assert torch.equal(whole, augmented(x, OFTEN, draws, OPERATIONS))
    parts = [augmented(a, OFTEN, b, OPERATIONS) for a, b in zip(x.split(5), draws.split(5), strict=True)]
    assert torch.allclose(whole, torch.cat(parts), atol=1e-6)
    assert whole.isfinite().all()
    last = x.to(memory_format=torch.channels_last)
    assert torch.allclose(whole, augmented(last, OFTEN, draws, OPERATIONS), atol=1e-6)


def test_an_operation_draws_the_same_beside_others() -> None:
    draws = draws_of(30)
    alone, both = (matrices(OFTEN, draws, o, SIZE)[1] for o in (("hue",), (*GEOMETRY, "hue")))
    assert torch.equal(alone, both)
    places = [PLACES[name] + i for name, (count, _) in STEPS.items() for i in range(count + 1)]
    assert places == list(range(DRAWS))


def test_the_extremes_of_the_draws_are_finite() -> None:
    x = picture(2, 3, *SIZE)
    draws = torch.stack((torch.zeros(DRAWS), torch.full((DRAWS,), 1 - 2**-24)))
    assert augmented(x, ALWAYS, draws, OPERATIONS).isfinite().all()


@pytest.mark.parametrize("operations", [BLIT, GEOMETRY, COLOUR, OPERATIONS])
def test_gradients_of_first_and_second_order(operations: tuple[str, ...]) -> None:
    x = picture(3, 3, 4, 4).double().requires_grad_()
    draws = draws_of(3, key=1)

    def f(x: Tensor) -> Tensor:  # the sine makes the second derivative more than zero
        return augmented(x, OFTEN, draws, operations).sin()

    assert torch.autograd.gradcheck(f, x)
    assert torch.autograd.gradgradcheck(f, x)


def test_the_gradient_is_the_adjoint() -> None:
    """<A x, y> = <x, A^T y> for the linear operations."""
    x, y = picture(6, 3, *SIZE, key=1).double().requires_grad_(), picture(6, 3, *SIZE, key=2).double()
    moved = augmented(x, ALWAYS, draws_of(6), BLIT + GEOMETRY)
    back, = torch.autograd.grad(moved, x, y)
    assert torch.allclose((moved * y).sum(), (x * back).sum())


def test_shapes_follow_without_data() -> None:
    with FakeTensorMode():
        augment = Augment()
        x = torch.randn(4, 3, 16, 16, requires_grad=True)
        found = augment(x, torch.rand(4, DRAWS))
        gradient, = torch.autograd.grad(found.square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        assert found.shape == x.shape == gradient.shape


def test_what_cannot_be_done_is_said() -> None:
    with pytest.raises(UserError, match="'twirl' is not known"):
        Augment(("flip", "twirl"))
    with pytest.raises(UserError, match=r"rotate90.*square.*4 x 6"):
        augmented(picture(1, 3, 4, 6), ALWAYS, draws_of(1), ("rotate90",))


# The clean distribution is recoverable


def eigenvalues(angles: Tensor, met: Tensor, orders: range) -> Tensor:
    """The mean character exp(i n angle) of what was drawn, the identity where nothing was; (orders,) complex."""
    return torch.stack([torch.where(met, torch.exp(1j * n * angles.double()), 1.0 + 0j).mean() for n in orders])


@pytest.mark.parametrize("p", [0.3, 0.7, 0.9])
def test_characters_of_uniform_groups_are_one_less_p(p: float) -> None:
    """phi = 0 at every character but the first, so that T can be undone for all p < 1; at p = 1 it cannot."""
    tolerance, draws = 5 / math.sqrt(MANY), draws_of(MANY)
    for operation, orders in (("rotate90", range(1, 4)), ("rotate", range(1, 6)), ("hue", range(1, 6))):
        for chance in (p, 1.0):
            affine, colour = matrices(torch.tensor(chance), draws, (operation,), SIZE)
            angle = (torch.atan2(affine[:, 0, 1], affine[:, 0, 0]) if operation != "hue" else
                     torch.atan2((colour[:, 0, 2] - colour[:, 0, 1]) * 3**0.5, 3 * colour[:, 0, 0] - 1))
            found = eigenvalues(angle, torch.tensor(True), orders)
            assert (found - (1 - chance)).abs().max() < tolerance, operation
    for operation, sign in (("flip", lambda a, c: a[:, 0, 0]), ("luma_flip", lambda a, c: c[:, :3, :3].det())):
        found = sign(*matrices(torch.tensor(p), draws, (operation,), SIZE)).mean()
        assert abs(found - (1 - p)) < tolerance, operation


@pytest.mark.parametrize("p", [0.3, 0.45, 0.7])
def test_characters_of_other_changes_keep_their_bound(p: float) -> None:
    """|1 - p + p phi| >= 1 - 2 p for any draws as |phi| <= 1, and >= 1 - p where phi >= 0, as a normal's is."""
    draws, chance, tolerance = draws_of(MANY), torch.tensor(p), 5 / math.sqrt(MANY)
    frequencies = torch.arange(1, 9) * 0.8

    def characters(values: Tensor, sigma: float) -> Tensor:  # of values in standard deviations
        return torch.exp(1j * frequencies[:, None] * (values.double() / sigma)).mean(1)

    def drawn_at(p: Tensor, operation: str) -> tuple[Tensor, Tensor]:
        return matrices(p, draws, (operation,), SIZE)

    normal = 1 - p + p * torch.exp(-frequencies**2 / 2)
    for operation, sigma in (("scale", SCALE), ("stretch", SCALE), ("contrast", CONTRAST), ("brightness", BRIGHTNESS),
                             ("slide", SLIDE * SIZE[1]), ("saturation", SATURATION)):
        affine, colour = drawn_at(chance, operation)
        value = {"scale": affine[:, 0, 0].log2(), "stretch": affine[:, 0, 0].log2(), "slide": affine[:, 0, 2],
                 "contrast": colour[:, 0, 0].log2(), "brightness": colour[:, 0, 3],
                 "saturation": (colour[:, 0, 0] - colour[:, 0, 1]).log2()}[operation]
        found = characters(value, sigma)
        assert (found - normal).abs().max() < tolerance, operation
        assert found.abs().min() > 1 - p - tolerance, operation

    phi = characters(drawn_at(ALWAYS, "shift")[0][:, 0, 2], 1.0)
    found = characters(drawn_at(chance, "shift")[0][:, 0, 2], 1.0)
    assert phi.real.min() < -0.1  # the shift's character changes its sign, so only the weaker bound holds
    assert (found - (1 - p + p * phi)).abs().max() < tolerance
    assert found.abs().min() > 1 - 2 * p - tolerance


TRUTH = torch.tensor([0.4, 0.25, 0.05, 0.1, 0.02, 0.03, 0.1, 0.05], dtype=torch.double)


def orbit() -> Tensor:
    """The eight views (8, 1, 5, 5) of an image without symmetry: four quarter turns, and those of its mirror image."""
    x = picture(1, 1, 5, 5)
    return torch.cat([view.rot90(k, (2, 3)) for view in (x, x.flip(3)) for k in range(4)])


def seen(views: Tensor, which: Tensor, p: Tensor, key: int) -> Tensor:
    """The share (8,) of each view among the images `which`, augmented."""
    found = augmented(views[which], p, draws_of(len(which), key), ("flip", "rotate90"))
    matches = (found[:, None] == views).flatten(2).all(2)  # (B, 8)
    assert matches.sum(1).eq(1).all()
    return matches.double().mean(0)


def operator(views: Tensor, p: Tensor) -> Tensor:
    """T (8, 8), each column from one view's own augmented copies."""
    return torch.stack([seen(views, torch.full((MANY,), i), p, 100 + i) for i in range(8)], 1)


def test_the_clean_distribution_comes_back_from_augmented_images() -> None:
    views, p = orbit(), OFTEN
    which = torch.multinomial(TRUTH, MANY, True, generator=torch.Generator().manual_seed(1))
    clean = torch.bincount(which, minlength=8) / MANY
    observed = seen(views, which, p, 5)
    assert (observed - clean).abs().max() > 0.2  # what the discriminator sees is far from the truth

    quarter, both = torch.full((4, 4), 0.25, dtype=torch.double), torch.full((2, 2), 0.5, dtype=torch.double)
    turns = torch.block_diag(*[0.3 * torch.eye(4).double() + 0.7 * quarter] * 2)
    flip = 0.3 * torch.eye(2).double() + 0.7 * both
    mirrored = torch.tensor([0, 3, 2, 1])  # the flip of view k is the mirror image turned -k times
    flips = torch.kron(flip, torch.eye(4).double())
    flips[:4, 4:] = flip[0, 1] * torch.eye(4).double()[mirrored]
    flips[4:, :4] = flip[1, 0] * torch.eye(4).double()[mirrored]
    closed, measured = turns @ flips, operator(views, p)
    assert (measured - closed).abs().max() < 5 * 0.5 / math.sqrt(MANY)
    assert torch.linalg.svdvals(closed).min() > (1 - 0.7) ** 2 - 1e-6
    for t in (closed, measured):
        back = torch.linalg.solve(t, observed)
        assert (back - clean).abs().max() < 5 * 0.5 / math.sqrt(MANY) / (1 - 0.7) ** 2
        assert (back - clean).abs().max() < (observed - clean).abs().max() / 5


def test_at_p_one_nothing_of_it_is_left() -> None:
    views = orbit()
    measured = operator(views, ALWAYS)
    assert (measured - 1 / 8).abs().max() < 5 * math.sqrt(7 / 64 / MANY)
    assert torch.linalg.svdvals(measured)[1] < 0.02


# The controller


def test_p_follows_a_sequence_made_by_hand() -> None:
    p = torch.tensor(0.0)
    expected = (0.1, 0.2, 0.1, 0.1, 0.0, 0.0, 0.1)
    for mean, value in zip((0.9, 0.61, 0.59, 0.6, -1.0, 0.2, 1.0), expected, strict=True):
        p = adapted(p, torch.tensor(mean), 100, 1000, target=0.6)
        assert p.item() == pytest.approx(value, abs=1e-6)
    for _ in range(20):
        p = adapted(p, torch.tensor(1.0), 100, 1000)
    assert p.item() == pytest.approx(0.8)


def test_watching_adapts_every_few_calls() -> None:
    augment = Augment(target=0.6, horizon=1000)
    known, mixed = (1.0, 25), (-0.2, 25)  # of 10 scores above 0 and 15 below
    for call in range(1, EVERY + 1):
        augment.watch(*known)
        assert augment.p.item() == pytest.approx(0.1 if call == EVERY else 0.0)
    for _ in range(EVERY):
        assert augment.p.item() == pytest.approx(0.1)
        augment.watch(*mixed)
    assert augment.p.item() == 0.0
    assert augment.signs.item() == augment.seen.item() == augment.calls.item() == 0.0
    augment.watch(math.nan, 5)
    assert augment.p.isfinite()


def test_it_resumes_from_its_state() -> None:
    signs = (picture(40, 16) + 0.65).sign().mean(1).tolist()
    straight, first, second = (Augment(horizon=500) for _ in range(3))
    for each in signs:
        straight.watch(each, 16)
    for each in signs[:18]:
        first.watch(each, 16)
    second.load_state_dict(first.state_dict())
    for each in signs[18:]:
        second.watch(each, 16)
    assert 0 < straight.p < 0.8
    assert all(torch.equal(a, b) for a, b in zip(straight.buffers(), second.buffers(), strict=True))
    assert {b.dtype for b in straight.buffers()} == {torch.float32}

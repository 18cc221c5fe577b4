"""Codes against brute force, the codebook's averages against the published update, FSQ against its definition."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from handmill.networks.quantisers import FSQ, Codebook, nearest, perplexity, straight_through
from handmill.training.codebook import EMACodebook
from handmill.training.precision import HalfPrecision


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clusters(items: int, number: int, width: int, seed: int = 1) -> Tensor:
    """Inputs (items, width, 1) around `number` centres far from each other."""
    centres = 10 * drawn(number, width, seed=0)
    return (centres[torch.arange(items) % number] + 0.1 * drawn(items, width, seed=seed))[..., None]


def taught(book: Codebook, optimizer: EMACodebook, *batches: Tensor) -> None:
    """One step from the sum of the batches' losses over their items."""
    items = sum(len(b) for b in batches)
    for z in batches:
        (book(z).statistics.sum() / items).backward()
    optimizer.step()
    book.zero_grad()


@pytest.mark.parametrize(("positions", "size", "width"), [(1000, 64, 3), (7, 2, 1), (300, 512, 32)])
def test_nearest_is_the_closest_by_distance(positions: int, size: int, width: int) -> None:
    x, table = drawn(positions, width, seed=2), drawn(size, width, seed=3)
    assert torch.equal(nearest(x, table), torch.cdist(x, table, compute_mode="donot_use_mm_for_euclid_dist").argmin(1))


def test_nearest_tells_codes_apart_far_from_the_origin() -> None:
    table = 1000 + 0.1 * drawn(32, 4)
    assert torch.equal(nearest(table, table), torch.arange(32))


def test_nearest_in_pieces_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    x, table = drawn(100, 5), drawn(16, 5, seed=2)
    whole = nearest(x, table)
    monkeypatch.setattr("handmill.networks.quantisers.SCORES_AT_ONCE", 48)
    assert torch.equal(nearest(x, table), whole)


def test_straight_through_is_exact_forwards_and_the_identity_backwards() -> None:
    x = drawn(4, 5).bfloat16().requires_grad_()
    rounded = 3 * x.detach().round()
    y = straight_through(x, rounded)
    assert torch.equal(y, rounded)
    y.backward(torch.full_like(y, 2.0))
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full_like(x, 2.0))


@pytest.mark.parametrize("space", [(6,), (3, 4), (2, 3, 2)])
def test_codebook_gives_the_nearest_vectors_and_their_statistics_as_gradients(space: tuple[int, ...]) -> None:
    book, z = Codebook(8, 5), drawn(3, 5, *space).requires_grad_()
    q = book(z)
    flat, codes = z.detach().movedim(1, -1).reshape(-1, 5), q.codes.flatten()
    assert q.codes.shape == (3, *space)
    assert torch.equal(q.vectors, book.lookup(q.codes))
    torch.testing.assert_close(q.vectors.detach().movedim(1, -1).reshape(-1, 5), book.weight.detach()[codes])
    torch.testing.assert_close(q.commitment, (z - q.vectors.detach()).square().flatten(1).sum(1))
    assert torch.equal(q.statistics, torch.zeros(3))
    q.statistics.sum().backward()
    assert z.grad is None or not z.grad.any()
    assert book.weight.grad is not None
    expected = torch.zeros(8, 5).index_add(0, codes, flat)
    torch.testing.assert_close(book.weight.grad, expected)
    assert book.counts.grad is not None
    assert torch.equal(book.counts.grad, torch.bincount(codes, minlength=8).float())


def test_commitment_and_vectors_leave_the_codebook_to_its_statistics() -> None:
    book, z = Codebook(8, 5), drawn(2, 5, 7).requires_grad_()
    q = book(z)
    (q.commitment.sum() + q.vectors.sum()).backward()
    assert book.weight.grad is None
    torch.testing.assert_close(z.grad, 2 * (z - q.vectors).detach() + 1)


def test_counts_do_not_change_the_result() -> None:
    book, z = Codebook(8, 5), drawn(2, 5, 7)
    before = book(z)
    with torch.no_grad():
        book.counts.copy_(drawn(8))
    assert all(torch.equal(a, b) for a, b in zip(before, book(z), strict=True))


def test_moving_averages_are_the_published_ones() -> None:
    """van den Oord et al. 2017, eqs. 6 to 8, in counts of assignments."""
    book = Codebook(6, 3)
    optimizer, decay = EMACodebook(book.weight, book.counts, 0.9, revival=0.0), 0.9
    table = book.weight.detach().clone().double()
    n, m = torch.zeros(6).double(), torch.zeros(6, 3).double()
    for step in range(8):
        z = drawn(10, 3, 4, seed=step)
        flat = z.movedim(1, -1).reshape(-1, 3).double()
        hot = nn.functional.one_hot(torch.cdist(flat, table).argmin(1), 6).double()
        n = decay * n + (1 - decay) * hot.sum(0)
        m = decay * m + (1 - decay) * hot.T @ flat
        table = torch.where(n[:, None] > 0, m / n[:, None], table)
        taught(book, optimizer, z)
    torch.testing.assert_close(book.weight.detach().double(), table, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(book.counts.detach().double(), n / n.sum(), atol=1e-6, rtol=1e-5)


def test_two_half_batches_are_one_whole() -> None:
    books = [Codebook(6, 3), Codebook(6, 3)]
    books[1].load_state_dict(books[0].state_dict())
    optimizers = [EMACodebook(b.weight, b.counts, 0.9) for b in books]
    for step in range(5):
        z = drawn(10, 3, 4, seed=step)
        taught(books[0], optimizers[0], z)
        taught(books[1], optimizers[1], z[:5], z[5:])
    torch.testing.assert_close(books[0].weight, books[1].weight, atol=1e-6, rtol=1e-5)


def test_revival_puts_every_code_to_work() -> None:
    shares = {}
    for revival in (0.0, 0.1):
        torch.manual_seed(0)
        book = Codebook(32, 4)
        optimizer = EMACodebook(book.weight, book.counts, 0.9, revival)
        for step in range(60):
            taught(book, optimizer, clusters(320, 32, 4, seed=step))
        test = book(clusters(320, 32, 4, seed=99))
        shares[revival] = perplexity(torch.bincount(test.codes.flatten(), minlength=32)).item()
    assert shares[0.0] < 16
    assert shares[0.1] > 24, "a few pairs of clusters share a code, as in k-means"


def test_revival_is_a_function_of_the_step_alone() -> None:
    def trained(seed: int) -> Tensor:
        torch.manual_seed(0)
        book = Codebook(32, 4)
        optimizer = EMACodebook(book.weight, book.counts, 0.9)
        torch.manual_seed(seed)
        for step in range(6):
            taught(book, optimizer, clusters(64, 8, 4, seed=step))
        return book.weight.detach()

    assert torch.equal(trained(1), trained(2))


def test_a_rate_of_zero_changes_nothing() -> None:
    book = Codebook(16, 4)
    optimizer, before = EMACodebook(book.weight, book.counts), copy.deepcopy(book.state_dict())
    taught(book, optimizer, clusters(64, 8, 4))
    assert not torch.equal(book.weight, before["weight"])
    before, state = copy.deepcopy(book.state_dict()), copy.deepcopy(optimizer.tensors())
    optimizer.param_groups[0]["lr"] = 0.0
    taught(book, optimizer, clusters(64, 8, 4, seed=2))
    assert all(torch.equal(v, before[k]) for k, v in book.state_dict().items())
    assert all(torch.equal(v, state[k]) for k, v in optimizer.tensors().items())


def test_resumed_is_never_stopped() -> None:
    whole = Codebook(32, 4)
    optimizer = EMACodebook(whole.weight, whole.counts, 0.9)
    for step in range(3):
        taught(whole, optimizer, clusters(64, 8, 4, seed=step))
    halted = Codebook(32, 4)
    halted.load_state_dict(whole.state_dict())
    resumed = EMACodebook(halted.weight, halted.counts, 0.9)
    resumed.load(optimizer.tensors())
    for step in range(3, 8):
        taught(whole, optimizer, clusters(64, 8, 4, seed=step))
        taught(halted, resumed, clusters(64, 8, 4, seed=step))
    assert torch.equal(whole.weight, halted.weight)
    assert all(torch.equal(v, resumed.tensors()[k]) for k, v in optimizer.tensors().items())


def test_statistics_stay_exact_in_half_precision() -> None:
    book, z = Codebook(8, 5), drawn(64, 5, 20)
    HalfPrecision(book)(z).statistics.sum().backward()
    assert book.weight.grad is not None
    assert book.counts.grad is not None
    codes = nearest(z.movedim(1, -1).reshape(-1, 5), book.weight.detach())
    expected = torch.zeros(8, 5).index_add(0, codes, z.movedim(1, -1).reshape(-1, 5))
    torch.testing.assert_close(book.weight.grad, expected)
    assert torch.equal(book.counts.grad, torch.bincount(codes, minlength=8).float())


def test_optimizer_steps_on_tensors_without_data() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        book = Codebook(8, 5)
        optimizer = EMACodebook(book.weight, book.counts)
        optimizer.param_groups[0]["lr"] = 0.0
        taught(book, optimizer, torch.zeros(4, 5, 3))
        assert optimizer.tensors()["0.sums"].shape == (8, 5)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=5))
def test_fsq_codes_and_vectors_are_a_bijection(levels: list[int]) -> None:
    grid = FSQ(tuple(levels))
    codes = torch.arange(min(grid.size, 4096))[None]
    vectors = grid.lookup(codes)  # (1, D, K)
    assert vectors.abs().max() <= 1
    assert grid(torch.atanh(vectors * 0.999)).codes.equal(codes)
    assert len(vectors[0].T.unique(dim=0)) == codes.numel()
    assert grid.digits(codes).amax((0, 1)).lt(torch.tensor(levels)).all()


def test_fsq_takes_the_nearest_level_and_passes_the_gradient() -> None:
    grid, z = FSQ((5, 4)), drawn(3, 2, 6, 7).requires_grad_()
    q = grid(z)
    for channel, count in enumerate((5, 4)):
        levels = torch.linspace(-1, 1, count)
        bounded = z.detach()[:, channel].tanh()
        expected = levels[(bounded[..., None] - levels).abs().argmin(-1)]
        torch.testing.assert_close(q.vectors[:, channel], expected)
    torch.testing.assert_close(grid.lookup(q.codes), q.vectors)
    q.vectors.sum().backward()
    torch.testing.assert_close(z.grad, 1 - z.detach().tanh().square())


def test_perplexity() -> None:
    assert perplexity(torch.tensor([5, 5, 5, 5])).item() == pytest.approx(4)
    assert perplexity(torch.tensor([7, 0, 0])).item() == 1
    assert perplexity(torch.tensor([3, 1])).item() == pytest.approx(math.exp(-0.75 * math.log(0.75) + math.log(4) / 4))

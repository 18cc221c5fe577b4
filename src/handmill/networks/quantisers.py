"""Discrete bottlenecks: a learned codebook (VQ) and a fixed grid (FSQ), each with the gradient passed straight through.

van den Oord et al. 2017, "Neural Discrete Representation Learning" (VQ-VAE; the moving averages of its appendix are
taken by training/codebook.py); Mentzer et al. 2023, "Finite Scalar Quantization: VQ-VAE Made Simple";
Bengio et al. 2013 (straight-through estimator).

B batch, D channels of the latent, S its space, P positions of a batch in one row, K codes.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SCORES_AT_ONCE = 1 << 24  # of the (P, K) matrix of distances


class Quantised(NamedTuple):
    """What a bottleneck makes of z (B, D, *S)."""

    codes: Tensor  # (B, *S) int64
    vectors: Tensor  # (B, D, *S), the codes' vectors; their gradient is z's
    commitment: Tensor  # (B,) sum of |z - vector|^2, which draws z to its code; fp32
    statistics: Tensor  # (B,) zero, with the gradient that `Codebook` describes


class Codebook(nn.Module):
    """K vectors of which each position takes the nearest, learned from statistics that travel as gradients.

    The published update needs, of every batch, the sum of the z that each code was nearest to and their number.
    d statistics / d weight is that sum and d statistics / d counts that number: so they are added up over
    micro-batches, averaged over processes and dropped with a bad batch like any gradient. In bf16 training these two
    parameters stay in fp32.
    """

    exact = ("weight", "counts")

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        assert size > 1, size
        assert width > 0, width
        self.size, self.width = size, width
        self.weight = nn.Parameter(torch.randn(size, width))  # (K, D)
        self.counts = nn.Parameter(torch.ones(size) / size)  # (K,) share of each code; the result is free of it

    def forward(self, z: Tensor) -> Quantised:  # (B, D, *S)
        flat = z.movedim(1, -1).flatten(1, -2).float()  # (B, P / B, D)
        table = self.weight.float()
        codes = nearest(flat.detach().flatten(0, 1), table.detach()).view(flat.shape[:2])  # (B, P / B)
        vectors = F.embedding(codes, table.detach())  # (B, P / B, D)
        commitment = (flat - vectors).square().sum((1, 2))  # (B,)
        zero = F.embedding(codes, table - table.detach())  # its gradient is the codebook's
        number = self.counts.float() - self.counts.float().detach()
        statistics = (flat.detach() * zero).sum((1, 2)) + number[codes].sum(1)  # (B,)
        chosen = codes.unflatten(1, z.shape[2:])
        return Quantised(chosen, straight_through(z, self.lookup(chosen)), commitment, statistics)

    def lookup(self, codes: Tensor) -> Tensor:  # (B, *S) -> (B, D, *S)
        """The vectors of `codes`; codes must be below K."""
        return F.embedding(codes, self.weight.detach()).movedim(-1, 1)


class FSQ(nn.Module):
    """Each channel rounded to one of its few levels in [-1, 1]; the code is the number that the levels spell.

    The bound is (1 + tanh z) / 2 times the last level: symmetric for odd and even numbers of levels, where the
    paper shifts the even ones by half a step.
    """

    levels: Tensor  # (D,) levels of each channel
    places: Tensor  # (D,) what one step of each channel is worth in the code

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        assert levels
        assert min(levels) > 1, levels
        self.size, self.width = math.prod(levels), len(levels)
        places = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("places", torch.tensor(places), persistent=False)

    def forward(self, z: Tensor) -> Quantised:  # (B, D, *S)
        last = (self.levels - 1).float()
        bounded = (1 + z.movedim(1, -1).float().tanh()) / 2 * last  # (B, *S, D) in [0, L - 1]
        digits = bounded.detach().round()
        vectors = straight_through(bounded, digits) / last * 2 - 1
        nothing = z.new_zeros(z.shape[0], dtype=torch.float32)
        codes = (digits.long() * self.places).sum(-1)  # (B, *S)
        return Quantised(codes, vectors.movedim(-1, 1).to(z.dtype), nothing, nothing)

    def digits(self, codes: Tensor) -> Tensor:  # (B, *S) -> (B, *S, D)
        """The level, from 0, of each channel."""
        return codes[..., None] // self.places % self.levels

    def lookup(self, codes: Tensor) -> Tensor:  # (B, *S) -> (B, D, *S)
        """The vectors of `codes`; codes must be below K."""
        return (self.digits(codes).float() / (self.levels - 1) * 2 - 1).movedim(-1, 1)


def nearest(x: Tensor, table: Tensor) -> Tensor:
    """The row of `table` (K, D) nearest to each of x (P, D): (P,) int64; the first of equals.

    argmin |x - e|^2 = argmin |e|^2 - 2 x e, a matrix product; both are centred first, because their distance from
    the origin would cost the digits that tell near codes apart.
    """
    centre = table.mean(0)
    x, table = x - centre, table - centre
    norms = table.square().sum(1)  # (K,)
    if torch.compiler.is_compiling():
        return torch.addmm(norms, x, table.T, alpha=-2).argmin(1)
    rows = max(1, SCORES_AT_ONCE // table.shape[0])
    return torch.cat([torch.addmm(norms, part, table.T, alpha=-2).argmin(1) for part in x.split(rows)])


def straight_through(x: Tensor, quantised: Tensor) -> Tensor:
    """`quantised` exactly, with the gradient of x: both of one shape."""
    assert x.shape == quantised.shape, (x.shape, quantised.shape)
    return quantised.detach() + (x - x.detach())


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of the codes' use, from counts (K,): 1 where one code does everything, K where all share."""
    share = counts.double() / counts.sum()
    return torch.special.entr(share).sum().exp()

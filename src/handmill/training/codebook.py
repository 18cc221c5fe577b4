"""The moving averages that a VQ codebook is learned by, as an optimizer.

van den Oord et al. 2017, appendix A.1: with n_i inputs z_ij nearest to code i in this batch,
N_i <- decay N_i + (1 - decay) n_i,  m_i <- decay m_i + (1 - decay) sum_j z_ij,  e_i <- m_i / N_i.
The sums and numbers arrive as the gradients of networks.quantisers.Codebook.

K codes, D their width.
"""

import torch
from torch import Tensor, nn

from handmill.data.order import draw
from handmill.training.optimizers import Optimizer

EPSILON = 1e-8  # Laplace smoothing, in shares of all assignments
SPLIT = 0.01  # how far apart the halves of a code start, in deviations of the codebook


class EMACodebook(Optimizer):
    """The published update of a codebook (K, D), and new work for codes that have none.

    n and m are divided by the batch's assignments, so that N is each code's share and nothing depends on the size of
    a batch; N and m start at zero, and their common bias cancels in m / N. A code whose share is below `revival` / K
    is put beside a code drawn in proportion to the shares, and takes half of its share (the splitting of Linde,
    Buzo & Gray 1980). A rate of zero changes nothing; any other is 1.
    """

    clipped = False  # these gradients are sums of inputs: a bound on their norm would have no meaning

    def __init__(self, weight: nn.Parameter, counts: nn.Parameter, decay: float = 0.99, revival: float = 0.1) -> None:
        assert counts.shape == weight.shape[:1], (weight.shape, counts.shape)
        assert 0 <= decay < 1, decay
        super().__init__([{"params": [weight, counts]}], lr=1.0, peak=1.0, decay=decay, revival=revival)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            weight, counts = group["params"]
            if weight.grad is None or counts.grad is None:
                continue
            step, sums = self._kept(weight, "step", "sums")
            (shares,) = self._kept(counts, "shares")
            if group["lr"] == 0:
                continue
            step += 1
            total = counts.grad.sum()
            sums.lerp_(weight.grad / total, 1 - group["decay"])  # m (K, D)
            shares.lerp_(counts.grad / total, 1 - group["decay"])  # N (K,)
            whole = shares.sum()
            smooth = (shares / whole + EPSILON) / (1 + len(shares) * EPSILON)
            used = (shares > 0)[:, None]
            weight.copy_(torch.where(used, sums / whole / smooth[:, None], weight))
            if group["revival"]:
                _revive(weight, sums, shares, group["revival"], int(step))
            counts.copy_(shares / whole)


def _revive(weight: Tensor, sums: Tensor, shares: Tensor, revival: float, step: int) -> None:
    """Split much-used codes, drawn in proportion to their shares, so that half of each goes to an unused one."""
    size, width = weight.shape
    least = revival / size * shares.sum()
    dead, rich = shares < least, shares > 2 * least
    number = int(torch.minimum(dead.sum(), rich.sum()))
    if not number:
        return
    generator = torch.Generator().manual_seed(draw("codebook", step))
    gumbel = -torch.rand(size, generator=generator).log().neg().log().to(weight.device)
    scores = torch.where(rich, shares.log() + gumbel, -torch.inf)  # its top k: k draws without replacement
    sources, targets = scores.topk(number).indices, shares.argsort(stable=True)[:number]
    apart = torch.randn(number, width, generator=generator).to(weight.device) * SPLIT * weight[~dead].std(0, False)
    shares[sources] /= 2
    sums[sources] /= 2
    weight[targets] = weight[sources] + apart
    shares[targets] = shares[sources]
    sums[targets] = weight[targets] * shares[targets, None]

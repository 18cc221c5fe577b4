"""The peer of the benchmarks: a plain GPT and its training loop, eager and in fp32, as the well-known small
reference implementations do it (GPT-2's shape, AdamW, cosine schedule, random windows). Written for this comparison.

    python benchmarks/peer.py FILE     nanoGPT's documented CPU settings on FILE; prints the full-validation-set loss

B batch, T time, C channels, V vocabulary.
"""

import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C)
        b, t, c = x.shape
        q, k, v = (y.view(b, t, self.heads, -1).transpose(1, 2) for y in self.qkv(self.norm1(x)).split(c, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, c)
        x = x + self.out(y)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, vocabulary: int, layers: int, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width, bias=False), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for name, p in self.named_parameters():
            if p.ndim == 2:
                last = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers) if last else 0.02)

    def forward(self, x: Tensor) -> Tensor:  # (B, T) -> (B, T, V)
        h = self.tokens(x) + self.places(torch.arange(x.shape[1]))
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


def adamw(model: nn.Module, rate: float, betas: tuple[float, float] = (0.9, 0.99)) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
                             lr=rate, betas=betas)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


@torch.no_grad()
def full_loss(model: nn.Module, data: Tensor, context: int) -> float:
    windows = (len(data) - 1) // context
    x, y = data[:windows * context].view(windows, context), data[1:windows * context + 1].view(windows, context)
    total = sum(F.cross_entropy(model(a).flatten(0, 1), b.flatten(), reduction="sum").item()
                for a, b in zip(x.split(128), y.split(128), strict=True))
    return total / (windows * context)


def main(path: str, steps: int = 2000, batch: int = 12, context: int = 64) -> None:
    start = time.perf_counter()
    torch.manual_seed(1337)
    text = Path(path).read_text(encoding="utf-8")
    letters = sorted(set(text))
    table = {c: i for i, c in enumerate(letters)}
    data = torch.from_numpy(np.array([table[c] for c in text]))
    train, held_out = data[:int(0.9 * len(data))], data[int(0.9 * len(data)):]
    model = GPT(len(letters), 4, 128, 4, context)
    optimizer = adamw(model, 1e-3)
    for i in range(steps):
        scale = (i + 1) / 100 if i < 100 else 0.1 + 0.45 * (1 + math.cos(math.pi * (i - 100) / (steps - 100)))
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * scale
        at = torch.randint(len(train) - context - 1, (batch, 1)) + torch.arange(context)
        step(model, optimizer, train[at], train[at + 1])
        if i % 250 == 249:  # its estimate of the loss: 20 random batches of either split
            with torch.no_grad():
                for part in (train, held_out):
                    for _ in range(20):
                        at = torch.randint(len(part) - context - 1, (batch, 1)) + torch.arange(context)
                        F.cross_entropy(model(part[at]).flatten(0, 1), part[at + 1].flatten())
    print(f"validation {full_loss(model, held_out, context):.4f} seconds {time.perf_counter() - start:.2f}")


if __name__ == "__main__":
    main(sys.argv[1])

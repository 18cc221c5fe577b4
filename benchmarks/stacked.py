"""The 1000-mode test: how many of the 1000 triples of digits a generator makes, when shown them as coloured images.

    python benchmarks/stacked.py --train mnist-train10k.npz --test mnist-test10k.npz --recipe dcgan --out runs/stacked

Each image stacks three digits drawn at random as red, green and blue (Metz et al. 2017, section 3.3.1); 25,600 samples
are classified channel by channel and counted, and the Kullback-Leibler divergence is taken from the generated triples
to the data's (Srivastava et al. 2017, section 4; 26,000 in Lin et al. 2018). Real stacks of the test digits, counted in
the same way, are the floor. Public, on stacks of all 60,000 digits (Srivastava et al. 2017; Lin et al. 2018): DCGAN 99
modes and 3.40 nats, ALI 16 and 5.40, unrolled GAN 48.7 and 4.32, VEEGAN 150 and 2.95, PacDCGAN2 1000 and 0.06.

N stacks, K = 10 digits, modes K^3.
"""

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from table import append

DIGITS, CHANNELS = 10, 3
SAMPLES = 25_600
HELD_OUT = 2000  # stacks of test digits that the product's own check compares with


class Data(NamedTuple):
    """Single digits: (M, H, W) uint8 and their labels (M,)."""

    x: NDArray[np.uint8]
    y: NDArray[np.int64]


def read(path: Path) -> Data:
    with np.load(path, allow_pickle=False) as file:
        return Data(file["x"], file["y"].astype(np.int64))


def stack(digits: Data, count: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (N, H, W, 3) of three digits drawn with replacement, and their labels (N, 3)."""
    chosen = np.random.default_rng(seed).integers(len(digits.y), size=(count, CHANNELS))
    return np.ascontiguousarray(digits.x[chosen].transpose(0, 2, 3, 1)), digits.y[chosen]


def modes_of(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """The number 0 to 999 of each triple of labels (N, 3)."""
    assert labels.ndim == 2, labels.shape
    assert labels.shape[1] == CHANNELS, labels.shape
    assert ((labels >= 0) & (labels < DIGITS)).all()
    return labels @ DIGITS ** np.arange(CHANNELS - 1, -1, -1)


def triples(y: NDArray[np.int64]) -> NDArray[np.float64]:
    """The share (1000,) that stacks of digits drawn independently from labels y (M,) have of each mode."""
    one = np.bincount(y, minlength=DIGITS) / len(y)
    return np.einsum("i,j,k->ijk", one, one, one).ravel()


def count_modes(labels: NDArray[np.int64], shares: NDArray[np.float64]) -> dict[str, Any]:
    """Modes seen in labels (N, 3), and KL(generated || data) in nats against the data's shares (1000,), all above 0.

    "kl_by_chance" is what as many stacks of the data would give on average, (modes - 1) / 2N, where N is many times
    the number of modes.
    """
    assert shares.shape == (DIGITS**CHANNELS,), shares.shape
    assert (shares > 0).all(), "a mode without data"
    counts = np.bincount(modes_of(labels), minlength=len(shares))
    seen = counts > 0
    q, p = counts[seen] / len(labels), shares[seen]
    return {"modes": int(seen.sum()), "kl": float((q * np.log(q / p)).sum()), "samples": len(labels),
            "kl_by_chance": (len(shares) - 1) / (2 * len(labels))}


def classified(images: NDArray[np.uint8], classifier: Any) -> NDArray[np.int64]:
    """The likeliest digit (N, 3) in each channel of stacks (N, H, W, 3)."""
    channels = [classifier.probabilities(images[..., c:c + 1]).argmax(1) for c in range(images.shape[3])]
    return np.stack(channels, 1)


def digit_classifier(digits: Data, folder: Path) -> Any:
    """The product's own feature network, trained on the single digits once and kept in the folder."""
    from handmill.checks import features

    fingerprint = hashlib.blake2b(digits.x.tobytes() + digits.y.tobytes(), digest_size=16).hexdigest()
    return features.for_data(folder, digits.x[..., None], digits.y, DIGITS, fingerprint, 0, progress=True)


def write(path: Path, digits: Data, count: int, seed: int) -> Path:
    """Stacks as an npz file, without labels: the generator is not told them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, x=stack(digits, count, seed)[0])
    return path


def overrides(args: argparse.Namespace, train: Data, test: Data) -> list[str]:
    """What the recipe is told beside its own settings."""
    paths = {"paths": write(args.out / "stacks.npz", train, args.count, args.seed),
             "test_paths": write(args.out / "held-out.npz", test, HELD_OUT, args.seed + 1)}
    told = [f"data.{key}={json.dumps([str(path.resolve())])}" for key, path in paths.items()]
    told += [f"data.size={list(train.x.shape[1:])}", 'data.colour="rgb"', 'data.label="none"',
             "data.near_duplicates=0", f"seed={args.seed}"]
    return told + ([f"training.steps={args.steps}"] if args.steps else []) + args.override


def make(path: Path, count: int, seed: int) -> NDArray[np.uint8]:
    """Samples (N, H, W, 3) of the model folder, as `handmill generate` makes them."""
    import handmill
    from handmill.verbs.generate import images

    return images(handmill.load(path), [""] * count, seed=seed)


def row(args: argparse.Namespace, made: dict[str, Any], real: dict[str, Any], accuracy: Any,
        seconds: tuple[float, float]) -> dict[str, Any]:
    training = json.loads((args.out / "model" / "receipt.json").read_text())["training"]
    return {"recipe": " ".join([args.recipe, *args.override]), "seed": args.seed, "stacks": f"{args.count:,}",
            "s, train": f"{seconds[0]:.0f}", "parameters": f"{training['parameters']:,}",
            "items": f"{training['items']:,} {training['unit']}", "samples": f"{made['samples']:,}",
            "s, samples": f"{seconds[1]:.0f}", "modes of 1000": f"{made['modes']} (real {real['modes']})",
            "KL, nats": f"{made['kl']:.3f} (real {real['kl']:.3f}, by chance {real['kl_by_chance']:.3f})",
            "classifier": f"{accuracy.value:.4f} [{accuracy.low:.4f}, {accuracy.high:.4f}] of a digit"}


def main() -> None:
    import handmill

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, default=Path("../shared/data/images/mnist-train10k.npz"))
    parser.add_argument("--test", type=Path, default=Path("../shared/data/images/mnist-test10k.npz"))
    parser.add_argument("--recipe", default="dcgan")
    parser.add_argument("--out", type=Path, default=Path("runs/stacked"))
    parser.add_argument("--count", type=int, default=30_000, help="stacks to train on")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--steps", type=int, default=0, help="of training; 0: the recipe's own")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--override", action="append", default=[], help="key.sub=value of the recipe; repeatable")
    args = parser.parse_args()
    train, test = read(args.train), read(args.test)
    classifier = digit_classifier(train, args.out / "features")
    accuracy, shares = classifier.measure(test.x[..., None], test.y), triples(train.y)
    real = count_modes(classified(stack(test, args.samples, args.seed + 2)[0], classifier), shares)
    print(f"real test stacks: {real}; accuracy of a digit {accuracy.value:.4f}")
    started = time.perf_counter()
    path = handmill.train(args.recipe, args.out / "model", overrides(args, train, test))
    trained = time.perf_counter()
    samples = make(path, args.samples, args.seed)
    seconds = (trained - started, time.perf_counter() - trained)
    append("stacked", row(args, count_modes(classified(samples, classifier), shares), real, accuracy, seconds))


if __name__ == "__main__":
    main()

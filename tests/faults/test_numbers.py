"""A loss or a gradient that is not finite, in one process of two: skipped, named, and never in the weights."""

import re
from pathlib import Path

import harness
import pytest
import ranks
from ranks import Fault

STEPS = 16
SHORT = (f"training.steps={STEPS}", "training.micro_batch=0", "training.evaluate_every=8")  # saved every 4 steps
SKIPPED = re.compile(r"step (\d+): the loss or a gradient of rank (\d) is not finite; batch (\d+) to (\d+) is skipped")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return harness.data(tmp_path_factory.mktemp("numbers"))


def spoilt(name: str, home: Path, fault: Fault) -> Path:
    """The notes of a run of two processes whose weights were finite after every step, and equal in the end."""
    notes = home / f"{name}-{fault.kind.replace(' ', '-')}-{fault.rank}-{len(fault.turns)}"
    codes = ranks.finish(ranks.forked(harness.words(name, home, notes / "run", *SHORT), notes, fault))
    assert codes == [0, 0], (notes / "said").read_text()
    assert all(line["finite"] for rank in (0, 1) for line in ranks.steps(notes, rank))
    assert ranks.digest(notes, 0) == ranks.digest(notes, 1)
    return notes


def skipped(notes: Path) -> list[tuple[int, ...]]:
    """(step, rank, first place, last place) of what the run said."""
    return [tuple(map(int, found)) for found in SKIPPED.findall((notes / "said").read_text())]


def turns(notes: Path, rank: int = 0) -> list[int]:
    """The batches that steps ended with."""
    return [line["turn"] for line in ranks.steps(notes, rank)]


def one_in_a_while(name: str, home: Path, fault: Fault) -> None:
    """Batches 5, and 9 to 11: three in a row are still skipped."""
    notes = spoilt(name, home, fault)
    assert skipped(notes) == [(step + 1, fault.rank, 8 * turn, 8 * turn + 7)
                              for step, turn in ((5, 5), (8, 9), (8, 10), (8, 11))]
    assert turns(notes, 0) == turns(notes, 1) == [t for t in range(STEPS + 4) if t not in fault.turns]


def four_in_a_row(name: str, home: Path, fault: Fault) -> None:
    """Batches 6 to 9: the run goes back to the checkpoint of step 4, and on with batch 10."""
    notes = spoilt(name, home, fault)
    assert [turn // 8 for _, _, turn, _ in skipped(notes)] == [6, 7, 8, 9]
    assert "went back to the checkpoint of step 4; the data goes on after the bad" in (notes / "said").read_text()
    steps = [(line["step"], line["turn"]) for line in ranks.steps(notes, 1)]
    assert steps == [(s, s) for s in range(6)] + [(6, 9)] + [(s, s + 6) for s in range(4, STEPS)]  # (6, 9): not taken


ONCE, ROW = (5, 9, 10, 11), (6, 7, 8, 9)


def test_a_gradient_of_one_rank(home: Path) -> None:
    one_in_a_while("gpt", home, Fault("infinite gradient", 1, ONCE))


def test_four_losses_of_one_rank(home: Path) -> None:
    four_in_a_row("gpt", home, Fault("nan loss", 1, ROW))


@pytest.mark.faults
@pytest.mark.parametrize("name", ["gpt", "lstm", "ddpm"])
def test_what_is_not_finite(name: str, home: Path) -> None:
    kinds = [f"{how} {what}" for how in ranks.SPOILT for what in ("loss", "gradient")]
    for i, kind in enumerate(kinds):
        one_in_a_while(name, home, Fault(kind, i % 2, ONCE))
        four_in_a_row(name, home, Fault(kind, (i + 1) % 2, ROW))
    harness.tell("NaN or infinity in the loss or the gradient of one process of two", name,
                 f"{len(kinds) * 8} batches, each named with step and rank: skipped up to three in a row, then back "
                 "to the last checkpoint and past them; weights finite after every step, equal in both processes")

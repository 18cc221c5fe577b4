"""The road with music: from MIDI files and JSON chorales to models that are checked, asked, exported and compared."""

import json
import random
from pathlib import Path

import musical
import numpy as np
import pytest
import torch

import handmill
from handmill.data.windows import Windows
from handmill.errors import UserError
from handmill.families.token_sources import hidden, transposed
from handmill.media import chorales
from handmill.media.music_tokens import Asked, Frames, FrameSettings
from handmill.verbs.compare import compare
from handmill.verbs.generate import generate

TINY = ["network.layers=1", "network.width=16", "network.heads=2", "training.steps=12", "training.batch=4",
        "training.evaluate_every=6", "training.save_every=6", "training.sample_every=0", "training.precision=fp32",
        "check.samples=3", "check.sample_tokens=60"]
CODEC = Frames(FrameSettings(lowest=40, highest=80, voices=4, steps=1, keys=True, tempos=(100.0,), names=("bach",)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of chorales and two of free MIDI, one with a memory and one without."""
    home = tmp_path_factory.mktemp("music")
    chance = random.Random(0)
    pieces = [tuple(tuple(sorted(chance.sample(range(48, 76), chance.randint(2, 4)))) for _ in range(20))
              for _ in range(12)]
    chorales.write(home / "some.json", {"train": pieces[:8], "valid": pieces[8:10], "test": pieces[10:]})
    album = musical.album(home / "album", 14)
    data = f"data.paths={json.dumps([str(home / 'some.json')])}"
    free = [f"data.paths={json.dumps([str(album)])}", "data.validation=0.2", "data.test=0.2", "network.context=32"]
    return {
        "chorales": handmill.train("chorales", home / "chorales",
                                   [data, "data.key=C", "network.context=64", *TINY], True),
        "memory": handmill.train("midi", home / "memory", [*free, "network.memory=24", *TINY], True),
        "midi": handmill.train("midi", home / "midi", [*free, "network.memory=0", *TINY], True)}


@pytest.mark.parametrize("name", ["chorales", "memory"])
def test_a_model_is_checked_and_makes_music(trained: dict[str, Path], name: str) -> None:
    result = handmill.check(trained[name], False)
    frames = result["likelihood"].get("nats_per_frame")
    assert (frames is not None) == (name == "chorales")
    assert 0 < result["likelihood"]["nats_per_note"]["value"] < 100
    model = handmill.load(trained[name])
    asked = "key=G" if name == "chorales" else "name=even key=Am"
    score = model.generate(asked, seed=3, max_tokens=60)
    assert score == generate(model, [asked], seed=3, max_tokens=60)[0]
    kept = json.loads((trained[name] / "receipt.json").read_text())["training"]
    assert kept["measure"] == "nats per token"


def test_a_memory_is_measured_at_several_lengths(trained: dict[str, Path]) -> None:
    result = handmill.check(trained["memory"], False, memories=[8, 24])
    assert [row["memory"] for row in result["memory"]] == [0, 8, 24]
    with pytest.raises(UserError, match=r"train with network\.memory"):
        handmill.check(trained["midi"], False, memories=[8])


def test_models_of_one_album_stand_side_by_side(trained: dict[str, Path], tmp_path: Path) -> None:
    result = compare([trained["memory"], trained["midi"]], tmp_path / "compare", progress=False)
    what = [row["what"] for row in result["rows"]]
    assert "nats per note struck" in what
    assert result["columns"] == ["memory", "midi", "trigram model"]
    with pytest.raises(UserError, match="cannot be compared"):
        compare([trained["memory"], trained["chorales"]], tmp_path / "compare", progress=False)


def test_windows_within_a_piece_begin_with_what_it_is() -> None:
    chance = random.Random(1)
    pieces = [CODEC.encode([(chance.randint(40, 80),) for _ in range(40)], Asked(key, 80.0, "bach"))
              for key in range(4)]
    tokens = np.concatenate([np.append([0], piece) for piece in pieces]).astype(np.uint16)
    starts = np.flatnonzero(tokens == 0)
    windows = Windows(tokens, 24, 1, starts, 3).batch(np.arange(12)).numpy()
    plain = Windows(tokens, 24, 1).batch(np.arange(12)).numpy()
    for ours, before in zip(windows, plain, strict=True):
        place = next(i for i in range(len(tokens)) if (tokens[i:i + 25] == before).all())
        start = starts[starts <= place][-1]
        if place <= start + 3:
            assert (ours == before).all()
        else:
            assert (ours[:3] == tokens[start + 1:start + 4]).all()
            assert (ours[3:] == before[:-3]).all()


def test_a_moved_window_tells_its_key_and_conditions_are_hidden_now_and_then() -> None:
    row = CODEC.encode(((60, 67), (62,)), Asked(0, 80.0, "bach"))
    rows, places = torch.from_numpy(np.tile(row.astype(np.int64), (4000, 1))), np.arange(4000)
    moved = transposed(CODEC, rows, places, 3, 0.5, 1)
    keys = [CODEC.asked_of(one).key for one in moved.numpy()]
    pitches = [max(CODEC.decode(one)[0]) - 67 for one in moved.numpy()]
    assert keys == [shift % 12 for shift in pitches]
    assert np.mean(np.array(pitches) != 0) == pytest.approx(0.5 * 6 / 7, abs=0.03)
    assert set(pitches) == set(range(-3, 4))
    told = hidden(CODEC, rows, places, 0.25, 1)
    found = map(CODEC.asked_of, told.numpy())
    known = np.array([[one.key >= 0, one.tempo > 0, one.name != ""] for one in found])
    assert known.mean(0) == pytest.approx([0.75] * 3, abs=0.03)
    assert (told[:, 3:] == rows[:, 3:]).all()
    assert abs(np.corrcoef(known.T)[0, 1]) < 0.06


def test_too_high_a_share_out_of_range_stays_as_it_is() -> None:
    row = torch.from_numpy(CODEC.encode(((40, 80),)).astype(np.int64))[None]
    assert (transposed(CODEC, row, np.arange(1), 12, 1.0, 1) == row).all()

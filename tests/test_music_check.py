"""The check of music models: scores against one token at a time, and samples whose faults are known."""

import json
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from handmill.checks import likelihood, music, music_figures
from handmill.checks.music_verdict import lines, verdict
from handmill.data.music import FORMAT, Pieces, write_split
from handmill.data.prepared import write_json
from handmill.errors import UserError
from handmill.families.autoregressive import Sampling
from handmill.folder import Model
from handmill.media.music_tokens import Asked, Events, EventSettings, Frames, FrameSettings
from handmill.media.scores import Grid, Note, Score
from handmill.networks.decoder import Decoder
from handmill.networks.decoder import Settings as DecoderSettings
from handmill.networks.recurrent import Recurrent
from handmill.networks.recurrent import Settings as RecurrentSettings

CPU = torch.device("cpu")
SCALE = [0, 2, 4, 5, 7, 9, 11]
FRAMES = FrameSettings(lowest=40, highest=90, voices=3, keys=True)
EVENTS = EventSettings(lowest=40, highest=90, velocities=4, grain=25, longest=500)


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without drawing, but for the check that the module shares."""
    monkeypatch.setattr("handmill.media.performing.save_rolls", lambda *_: None)


def chorale(seed: int, steps: int = 24) -> Grid:
    """Triads of C major at random, each held for some steps."""
    generator, grid = random.Random(seed), []
    while len(grid) < steps:
        tones = [60 + SCALE[(generator.randrange(7) + third) % 7] - 12 * (third == 4) for third in (0, 2, 4)]
        grid += [tuple(sorted(set(tones)))] * generator.choice((1, 2, 2, 4))
    return tuple(grid[:steps])


def played(seed: int) -> Score:
    """A tune in free time, a tick a millisecond."""
    generator, notes, now = random.Random(seed), [], 0
    for _ in range(20):
        length = 125 * generator.choice((1, 2, 4))
        notes.append(Note(now, now + length, 60 + generator.choice(SCALE)))
        now += length
    return Score(tuple(notes), 500)


def network_of(kind: str, codec: Any) -> Any:
    """A tiny network with weights large enough to tell tokens apart."""
    torch.manual_seed(0)
    made: Any
    if kind in ("lstm", "gru"):
        made = Recurrent(RecurrentSettings(cell=kind, layers=2, width=12, context=16), codec.size)
    else:
        made = Decoder(DecoderSettings(layers=2, width=16, heads=2, context=16, memory=24 if kind == "memory" else 0,
                                       positions="relative" if kind == "memory" else "rotary"), codec.size)
    for parameter in made.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return made.eval()


def write_pieces(folder: Path, codec: Any, splits: dict[str, list[Any]]) -> None:
    """Prepared pieces, as the medium writes them."""
    folder.mkdir(parents=True)
    about: dict[str, Any] = {}
    for split in ("train", "validation", "test"):
        names = [f"{split}/{i}.mid" for i in range(len(splits.get(split, [])))]
        tokens = write_split(folder, split, codec, names, map(codec.encode, splits.get(split, [])))
        about[split] = {"documents": len(names), "tokens": tokens}
    write_json(folder / "data.json", {"format": FORMAT, "fingerprint": "f00d", "dtype": "uint16", "splits": about})
    codec.save(folder / "codec")
    for name in ("report.json", "manifest.json"):
        write_json(folder / name, {"made": "up"})
    (folder / "roll.png").write_bytes(b"picture")


def model_of(where: Path, codec: Any, network: Any, splits: dict[str, list[Any]], training: bool = True,
             transpose: int = 0) -> Model:
    """A model folder beside its prepared pieces."""
    if training:
        write_pieces(where / ".prepared" / "f00d", codec, splits)
    write_pieces(where / "model" / "data", codec, {k: v for k, v in splits.items() if k != "train"})
    recipe: Any = SimpleNamespace(seed=1, network=network.settings, sampling=Sampling(),
                                  data=SimpleNamespace(transpose=transpose))
    receipt = {"files": {"weights.safetensors": {"sha256": "beef"}}, "training": {"fingerprint": "f00d"}}
    return Model(where / "model", recipe, network, codec, receipt)


@torch.no_grad()
def slowly(network: Any, tokens: Sequence[int], context: int, stride: int, head: int) -> list[float]:
    """Nats of each token after its own history: a carried state's, or that of its window after the conditions."""
    nats: list[float] = []
    state, predictions = None, len(tokens) - 1
    for j in range(predictions):
        if network.carries:
            logits, state = network(torch.tensor([tokens[j:j + 1]]), state)
        else:
            start = 0 if j < context else min(-(-(j - context + 1) // stride) * stride, predictions - context)
            history = [*tokens[1:1 + head], *tokens[start + head:j + 1]] if start else tokens[:j + 1]
            logits, _ = network(torch.tensor([history]))
        nats.append(-float(torch.log_softmax(logits[0, -1].double(), 0)[tokens[j + 1]]))
    return nats


# likelihood


@pytest.mark.parametrize("kind", ["lstm", "gru", "memory", "plain"])
def test_each_prediction_against_one_token_at_a_time(kind: str) -> None:
    codec = Frames(FRAMES)
    network = network_of(kind, codec)
    pieces = [chorale(1, 3), chorale(2, 30), chorale(3, 11), chorale(4, 17), chorale(5, 4)]
    packed = [[codec.end, *codec.encode(piece, Asked(key=5)).tolist()] for piece in pieces]
    stream = np.array([token for piece in packed for token in piece], np.uint16)
    lengths = np.array([*map(len, packed)])
    selection = likelihood.Selection("test", stream, np.cumsum(lengths) - lengths, lengths, 5, True)
    plan = likelihood.plan_for(network, selection, 16, 8)
    found = likelihood.each(network, selection, codec.end, codec.size, plan, CPU, head=1)
    expected = [x for piece in packed for x in slowly(network, [*piece, codec.end], 16, 8, 1)]
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_segments_hold_every_prediction_once_in_order(lengths: list[int], context: int) -> None:
    counts = np.array(lengths)
    starts = np.cumsum(counts) - counts
    plan = likelihood.segments(likelihood.Selection("test", np.zeros(counts.sum()), starts, counts, 1, True), context)
    places = [start + i for start, length in zip(plan.start, plan.length, strict=True) for i in range(length)]
    assert places == list(range(counts.sum()))
    assert plan.length.max() <= context
    assert not plan.skip.any()


@pytest.mark.parametrize("kind", ["lstm", "plain"])
def test_text_is_scored_alike_by_windows_and_by_predictions(kind: str) -> None:
    codec = Frames(FRAMES)
    spelling: Any = SimpleNamespace(bytes=np.ones(codec.size, int), characters=np.ones(codec.size, int))
    network = network_of(kind, codec)
    tokens = np.array([0, *range(1, 50), 0, *range(3, 12)], np.uint16)
    selection = likelihood.Selection("test", tokens, np.array([0, 50]), np.array([50, 10]), 2, True)
    scores = likelihood.score(network, selection, spelling, 0, 16, 4, CPU)
    plan = likelihood.plan_for(network, selection, 16, 4)
    nats = likelihood.each(network, selection, 0, codec.size, plan, CPU)
    assert scores.tokens.sum() == 60
    np.testing.assert_allclose(scores.by_document(scores.nats), likelihood.by_document(selection, nats), rtol=1e-9)


def test_padding_of_shorter_pieces_and_their_end_do_not_reach_longer_ones() -> None:
    codec = Frames(FRAMES)
    network = network_of("memory", codec)
    tokens = np.array([0, *range(1, 45), 0, 5, 6], np.uint16)
    both = likelihood.Selection("test", tokens, np.array([0, 45]), np.array([45, 3]), 2, True)
    alone = likelihood.Selection("test", tokens, np.array([0]), np.array([45]), 1, True)
    nats = [likelihood.each(network, some, 0, codec.size, likelihood.segments(some, 16), CPU) for some in (both, alone)]
    np.testing.assert_allclose(nats[0][:45], nats[1], rtol=1e-5)


# figures


def test_total_variation_of_shares() -> None:
    assert music_figures.total_variation([1, 0, 3], [2, 0, 6]) == pytest.approx(0)
    assert music_figures.total_variation([1, 0], [0, 5]) == pytest.approx(1)
    assert music_figures.total_variation([[1, 1], [1, 0]], [3, 1]) == pytest.approx([0.25, 0.25])


def test_novelty_in_any_key_knows_a_piece_that_was_moved() -> None:
    piece = chorale(1)
    moved = music_figures.transposed(piece, 3)
    assert music_figures.Novelty([piece]).share([moved]) > 0.5
    assert music_figures.Novelty([piece], any_key=True).share([moved]) == 0
    assert music_figures.Novelty([piece], any_key=True).counts(chorale(2))[0] > 0


@given(st.lists(st.lists(st.integers(0, 2), max_size=9), max_size=4), st.lists(st.integers(0, 2), max_size=9),
       st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_novelty_against_sets(training: list[list[int]], piece: list[int], n: int) -> None:
    grids = [tuple((60 + pitch,) for pitch in one) for one in [*training, piece]]
    known = {grid[i:i + n] for grid in grids[:-1] for i in range(len(grid) - n + 1)}
    grams = [grids[-1][i:i + n] for i in range(len(grids[-1]) - n + 1)]
    found = music_figures.Novelty(grids[:-1], n).counts(grids[-1])
    assert found == (sum(gram not in known for gram in grams), len(grams))


@given(st.lists(st.lists(st.integers(0, 2), max_size=12), min_size=1, max_size=3),
       st.lists(st.lists(st.integers(0, 2), max_size=12), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_longest_run_against_python(pieces: list[list[int]], training: list[list[int]]) -> None:
    made, known = ([tuple((60 + pitch, 70) for pitch in one) for one in many] for many in (pieces, training))
    runs = [grid[i:j] for grid in made for i in range(len(grid)) for j in range(i + 1, len(grid) + 1)]

    def within(run: Grid, grid: Grid) -> bool:
        return any(grid[i:i + len(run)] == run for i in range(len(grid)))

    best = max((len(run) for run in runs if any(within(run, grid) for grid in known)), default=0)
    found = music_figures.longest_run(made, known)
    assert (found.steps if found else 0) == best
    if found:
        whole = made[found.piece]
        assert any(within(whole[i:i + best], known[found.source]) for i in range(len(whole) - best + 1))


def test_longest_run_in_another_key() -> None:
    training = [chorale(1), chorale(2)]
    piece = (*chorale(7, 5), *music_figures.transposed(training[1][4:18], 2))
    run = music_figures.longest_run([chorale(8), piece], training, range(-3, 4))
    assert run is not None
    assert run.steps >= 14
    assert run[1:] == (1, 1)
    assert music_figures.longest_run([()], training) is None


def test_steps_of_free_midi_are_125_ms() -> None:
    codec = Events(EVENTS)
    score = Score((Note(0, 250, 60), Note(250, 375, 64), Note(250, 375, 67)), 500)
    assert music_figures.steps_of(codec, codec.encode(score)) == ((60,), (60,), (64, 67))


def test_steps_of_endless_waiting_end_somewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("checks.music_figures", "media.scores"):
        monkeypatch.setattr(f"handmill.{module}.MOST_STEPS", 1000)
    codec = Events(EventSettings(longest=10_000, grain=1000))
    wait, on = codec.first["shift"] + 9, codec.first["on"]
    assert len(music_figures.steps_of(codec, [0, on, *[wait] * 40, on + 1, wait])) == 999


# the whole check


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Any]]:
    return {"train": [chorale(i) for i in range(40)], "test": [chorale(100 + i) for i in range(24)]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, splits: dict[str, list[Any]]) -> Model:
    codec = Frames(FRAMES)
    return model_of(tmp_path_factory.mktemp("runs"), codec, network_of("lstm", codec), splits)


SMALL = music.Settings(samples=10, sample_tokens=90)


@pytest.fixture(scope="module")
def result(model: Model) -> dict[str, Any]:
    return music.run(model, SMALL, progress=False) | {"created": "today"}


def test_figures_against_the_pieces_themselves(model: Model, splits: dict[str, list[Any]],
                                               result: dict[str, Any]) -> None:
    codec, nats, each = model.codec, 0.0, []
    for grid in splits["test"]:
        tokens = [0, *codec.encode(grid).tolist(), 0]
        own = slowly(model.network, tokens, 16, 8, 1)[1:-1]  # neither the key nor the end
        nats, each = nats + sum(own), [*each, sum(own) / 24]
    frames, notes = 24 * 24, sum(len(step) for grid in splits["test"] for step in grid)
    found = result["likelihood"]
    assert found["nats_per_frame"]["value"] == pytest.approx(nats / frames, rel=1e-4)
    assert found["nats_per_frame_mean_of_pieces"]["value"] == pytest.approx(np.mean(each), rel=1e-4)
    assert found["nats_per_note"]["value"] == pytest.approx(nats / notes, rel=1e-4)
    assert found["nats_per_token"]["value"] == pytest.approx(nats / (notes + frames), rel=1e-4)
    assert found["nats_per_frame"]["n"] == 24
    assert found["nats_per_frame"]["low"] < found["nats_per_frame"]["value"] < found["nats_per_frame"]["high"]
    assert (result["held_out"]["notes"], result["held_out"]["steps"]) == (notes, frames)
    assert "key" in found["counted"]
    assert "not the end" in found["counted"]


def test_an_untrained_model_is_worse_than_the_trigram_and_not_good(result: dict[str, Any]) -> None:
    trigram, single = result["baselines"]["trigram"], result["baselines"]["unigram"]
    assert trigram["nats_per_token"]["value"] < single["nats_per_token"]["value"]
    assert single["nats_per_token"]["value"] < result["likelihood"]["nats_per_token"]["value"]
    assert result["verdict"]["better_than_trigram"] is False
    assert result["verdict"]["good"] is False
    assert result["verdict"]["tonal"] is False
    assert "worse than a trigram model" in result["verdict"]["text"]


def test_single_tokens_reach_their_entropy(splits: dict[str, list[Any]], result: dict[str, Any]) -> None:
    codec = Frames(FRAMES)
    tokens = np.concatenate([codec.encode(grid)[1:] for grid in splits["test"]])
    shares = np.unique(tokens, return_counts=True)[1] / len(tokens)
    assert result["baselines"]["unigram"]["nats_per_token"]["value"] == pytest.approx(-(shares * np.log(shares)).sum())


def test_trigram_spreads_the_rest_over_the_tokens_not_seen(tmp_path: Path) -> None:
    codec = Frames(FRAMES)
    made = model_of(tmp_path, codec, network_of("gru", codec), {"train": [((60,),)] * 9, "test": [((61,),)] * 9})
    found = music.run(made, music.Settings(samples=0), progress=False)
    assert found["baselines"]["trigram"]["nats_per_token"]["value"] < math.log(codec.size) + 2  # not of all Unicode


def test_files_of_the_samples(model: Model, result: dict[str, Any]) -> None:
    rows = [json.loads(line) for line in (model.path / "samples/check.jsonl").read_text().splitlines()]
    assert len(rows) == result["samples"]["count"] == 10
    assert all(row["tokens"][0] == 0 and len(row["tokens"]) <= 2 + 90 for row in rows)
    assert all((model.path / name).is_file() for name in result["samples"]["files"])
    assert sum(name.endswith(".mid") for name in result["samples"]["files"]) == 6
    assert json.loads(json.dumps(result, allow_nan=False))["verdict"] == result["verdict"]


def test_lines_name_a_unit_on_every_row(result: dict[str, Any]) -> None:
    told = "\n".join(lines(result))
    for words in ("nats per frame (step of 1/4 quarter note), over all frames", "mean of the pieces' means",
                  "nats per note of a step", "nats per token", "steps of 1/4 quarter note a piece",
                  "4 steps in a row", "8 steps in a row", "a training piece", "verdict: worse"):
        assert words in told, words


def copier(pieces: Sequence[Grid]) -> Any:
    """Stands in for compose: a model that gives out pieces."""
    given: Iterator[Grid] = iter(pieces)

    def made(network: Any, codec: Any, wishes: Sequence[Any], *_: Any) -> list[list[int]]:
        return [[0, *codec.encode(next(given)).tolist()] for _ in wishes]
    return made


def test_copies_of_training_pieces_are_found_and_named(model: Model, splits: dict[str, list[Any]],
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(music, "compose", copier(splits["train"][3:]))
    found = music.run(model, SMALL, progress=False)
    for row in found["novelty"]["found"]["steps_in_a_row"].values():
        assert row["generated"]["value"] == 0
        assert row["held_out"]["value"] > 0.1
    longest = found["novelty"]["found"]["longest"]["generated"]
    assert (longest["steps"], longest["training_piece"]) == (24, f"train/{3 + longest['piece']}.mid")
    assert found["verdict"]["copies"] is True
    assert found["verdict"]["tonal"] is True
    assert "copies: only 0.0%" in found["verdict"]["text"]
    assert f"train/{3 + longest['piece']}.mid" in "\n".join(lines(found))


def test_new_pieces_in_the_style_are_no_copies(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(music, "compose", copier([chorale(i) for i in range(200, 240)]))
    found = music.run(model, SMALL, progress=False)
    assert (found["verdict"]["copies"], found["verdict"]["tonal"]) == (False, True)
    assert found["verdict"]["pitch_classes"] is True
    assert found["pitch_classes"]["distance"]["value"] < found["pitch_classes"]["floor"]["high"] + 0.05
    notes = found["style"]["notes_per_step"]
    assert notes["generated"]["value"] == pytest.approx(notes["held_out"]["value"], abs=0.2)


def test_one_chord_for_ever_has_other_pitch_classes(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(music, "compose", copier([((61, 66),) * 20] * 10))
    found = music.run(model, SMALL, progress=False)
    assert found["verdict"]["pitch_classes"] is False
    assert found["pitch_classes"]["distance"]["value"] == pytest.approx(1)
    assert found["verdict"]["good"] is False


def test_copies_in_another_key_are_found_where_training_moved_pieces(tmp_path: Path, splits: dict[str, list[Any]],
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    codec = Frames(FRAMES)
    made = model_of(tmp_path, codec, network_of("gru", codec), splits, transpose=3)
    monkeypatch.setattr(music, "compose", copier([music_figures.transposed(grid, 2) for grid in splits["train"]]))
    found = music.run(made, SMALL, progress=False)
    assert found["verdict"]["copies"] is True
    assert found["novelty"]["found"]["longest"]["generated"]["steps"] == 24
    assert found["pitch_classes"]["from"].startswith("the tonic")
    assert "in any key" in "\n".join(lines(found))


def test_without_training_pieces_it_says_so_and_takes_earlier_figures(tmp_path: Path, splits: dict[str, list[Any]],
                                                                      result: dict[str, Any]) -> None:
    codec = Frames(FRAMES)
    bare = model_of(tmp_path, codec, network_of("lstm", codec), splits, training=False)
    found = music.run(bare, SMALL, progress=False) | {"created": "tomorrow"}
    assert found["baselines"]["trigram"]["missing"] == music.NO_TRAINING_DATA
    assert found["novelty"]["found"]["missing"] == found["pitch_classes"]["floor"]["missing"] == music.NO_TRAINING_DATA
    assert found["verdict"]["good"] is False
    assert "not measured" in "\n".join(lines(found))
    carried = music.carry(found, json.loads(json.dumps(result)))
    assert carried["carried"]["created"] == "today"
    assert carried["baselines"]["trigram"] == result["baselines"]["trigram"]
    assert carried["novelty"] == result["novelty"]
    assert carried["verdict"] == result["verdict"] == verdict(result)
    other = music.carry(found, result | {"samples": result["samples"] | {"sha256": "other"}})
    assert "missing" in other["novelty"]["found"]
    assert other["baselines"]["trigram"] == result["baselines"]["trigram"]
    assert music.carry(found, result | {"weights": "other"}) == found
    assert music.carry(found, {}) == found


def test_free_midi_has_notes_and_no_frames(tmp_path: Path) -> None:
    codec = Events(EVENTS)
    splits = {"train": [played(i) for i in range(12)], "validation": [played(50 + i) for i in range(9)]}
    made = model_of(tmp_path, codec, network_of("plain", codec), splits)
    found = music.run(made, music.Settings(samples=8, sample_tokens=60, pieces=8), progress=False)
    assert "nats_per_frame" not in found["likelihood"]
    tokens = [codec.encode(score) for score in splits["validation"]]
    assert found["held_out"]["pieces"] == 8
    assert found["held_out"]["notes"] == 8 * 20
    assert found["held_out"]["tokens"] < sum(map(len, tokens))
    assert found["held_out"]["split"] == "validation"
    told = "\n".join(lines(found))
    assert "nats per note struck" in told
    assert "steps of 125 ms a piece" in told


def test_a_model_that_harmonises_is_given_melodies_and_not_judged_on_them(tmp_path: Path,
                                                                          splits: dict[str, list[Any]]) -> None:
    codec = Frames(FrameSettings(lowest=40, highest=90, voices=3, melody=True))
    made = model_of(tmp_path, codec, network_of("plain", codec), splits)
    found = music.run(made, SMALL, progress=False)
    assert found["samples"]["asked"] == "melodies of held-out pieces"
    assert found["held_out"]["notes"] == sum(len(step) - 1 for grid in splits["test"] for step in grid)
    assert "highest note" in found["likelihood"]["counted"]
    rows = [json.loads(line) for line in (made.path / "samples/check.jsonl").read_text().splitlines()]
    grid = codec.decode(rows[0]["tokens"])
    assert [max(step) for step in grid] == [max(step) for step in splits["test"][0][:len(grid)]]


def test_no_samples_and_few_pieces_are_said(tmp_path: Path, splits: dict[str, list[Any]]) -> None:
    codec = Frames(FRAMES)
    made = model_of(tmp_path, codec, network_of("gru", codec), {"train": splits["train"], "test": splits["test"][:3]})
    found = music.run(made, music.Settings(samples=0), progress=False)
    assert found["style"]["missing"] == music.NO_SAMPLES
    assert "stretches of 128 tokens" in found["likelihood"]["nats_per_token"]["method"]
    assert music.NO_SAMPLES in "\n".join(lines(found))
    few = music.run(made, music.Settings(samples=3, sample_tokens=40), progress=False)
    assert few["pitch_classes"]["distance"]["low"] is None
    assert few["verdict"]["good"] is False


def test_samples_are_the_same_whatever_is_made_at_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    ground = music._ground(model, SMALL, False)
    whole = music._samples(ground)
    monkeypatch.setattr(music, "_AT_ONCE", 3)
    assert music._samples(ground) == whole


@pytest.mark.parametrize("setting", [{"pieces": -1}, {"samples": -1}, {"ngrams": (0,)}, {"sample_tokens": 0}])
def test_settings_that_cannot_be(setting: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(setting))):
        music.Settings(**setting)


def test_pieces_kept_open_as_written(model: Model) -> None:
    assert music.training_split(model) is not None
    assert Pieces.open(model.path / "data").documents("test") == 24

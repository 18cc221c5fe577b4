"""Making music: every piece follows the grammar and the melody, whatever the network, the seed and the batch."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from handmill.errors import UserError
from handmill.families.autoregressive import Sampling
from handmill.families.composing import Wish, check, compose, shortened
from handmill.media.music_tokens import END, Asked, Events, EventSettings, Frames, FrameSettings
from handmill.networks import decoder, recurrent

CHORDS = Frames(FrameSettings(lowest=48, highest=72, voices=4, keys=True, tempos=(80.0,), names=("bach", "liszt")))
PLAIN = Frames(FrameSettings(lowest=60, highest=66, voices=2))
FREE = Events(EventSettings(lowest=60, highest=66, velocities=3, longest=50, programs=(0, 40), drums=False, keys=True))
DRUMMED = Events(EventSettings(lowest=60, highest=62, velocities=2, longest=30, shifts="doubling", drums=True))
CODECS: list[Any] = [CHORDS, PLAIN, FREE, DRUMMED]
SHORT = Sampling(max_tokens=60)
NETWORKS = {
    "decoder": decoder.Settings(layers=2, width=16, heads=2, context=24),
    "long": decoder.Settings(layers=2, width=16, heads=2, context=512),
    "xl": decoder.Settings(layers=2, width=16, heads=2, context=16, memory=12, positions="relative"),
    "lstm": recurrent.Settings(layers=1, width=16, context=16)}


@cache
def network(kind: str, size: int, seed: int = 1) -> Any:
    """A network whose predictions are far from uniform."""
    torch.manual_seed(seed)
    made: Any = (recurrent.Recurrent if kind == "lstm" else decoder.Decoder)(NETWORKS[kind], size)  # type: ignore[arg-type]
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return made.eval()


def ungrammatical(codec: Any, tokens: Sequence[int]) -> list[int]:
    """Where the grammar did not allow what stands there, END at the end included."""
    piece = [*tokens, END]
    return [i for i in range(1, len(piece)) if not codec.grammar(piece[:i])[piece[i]]]


def openings(codec: Frames, tokens: Sequence[int]) -> list[int]:
    body = [codec.step, *tokens[1 + len(codec.asked):]]
    return [token for before, token in pairwise(body) if before == codec.step]


def melody(codec: Frames, *pitches: int) -> tuple[int, ...]:
    return tuple(codec.melody([(pitch,) if pitch else () for pitch in pitches]).tolist())


TUNE = melody(CHORDS, 60, 60, 0, 64, 72, 48)


@given(st.sampled_from(CODECS), st.sampled_from([*NETWORKS]), st.integers(0, 10_000), st.integers(1, 70),
       st.floats(0, 3))
@settings(max_examples=40, deadline=None)
def test_every_piece_follows_the_grammar(codec: Any, kind: str, seed: int, most: int, temperature: float) -> None:
    sampling = Sampling(max_tokens=most, temperature=temperature, top_k=9, repetition_penalty=1.2)
    wishes = [Wish(), Wish(Asked(key=3))]
    for tokens, wish in zip(compose(network(kind, codec.size), codec, wishes, sampling, seed), wishes, strict=True):
        assert tokens[:1 + len(codec.asked)] == [END, *codec.header(wish.asked)]
        body = tokens[1 + len(codec.asked):]
        assert not body or not ungrammatical(codec, tokens)
        if isinstance(codec, Frames):
            np.testing.assert_array_equal(codec.encode(codec.decode(tokens), wish.asked), tokens[1:])
            assert len(body) <= most
        elif body:
            assert codec.decode(tokens).notes


@given(st.sampled_from(CODECS), st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_few_tokens_tell_the_grammar_as_much_as_all(codec: Any, seed: int) -> None:
    random, tokens = np.random.default_rng(seed), [END, *codec.header()]
    recent = [*tokens]
    for _ in range(150):
        allowed = codec.grammar(tokens)
        np.testing.assert_array_equal(codec.grammar(recent), allowed)
        token = int(random.choice(np.flatnonzero(allowed)))
        if token == END:
            break
        tokens, recent = [*tokens, token], shortened(codec, [*recent, token])
        assert len(recent) < 40 or codec.section(token)[0] not in ("step", "shift")


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_melody_is_kept_to_the_note_and_the_piece_is_as_long(kind: str) -> None:
    for tokens in compose(network(kind, CHORDS.size), CHORDS, [Wish(melody=TUNE)] * 3, SHORT, 5):
        assert openings(CHORDS, tokens) == [*TUNE]
        assert CHORDS.steps(tokens) == len(TUNE)
        assert not ungrammatical(CHORDS, tokens)


def test_pieces_of_other_lengths_and_wishes_do_not_change_each_other() -> None:
    start = tuple(PLAIN.encode(((60, 62), (), (64,))).tolist())
    wishes = [Wish(), Wish(melody=melody(PLAIN, 60, 0, 66)), Wish(beginning=start), Wish(steps=2),
              Wish(beginning=start[:4], steps=9)]
    for kind in NETWORKS:
        whole = compose(network(kind, PLAIN.size), PLAIN, wishes, SHORT, 3, 10)
        cut = [compose(network(kind, PLAIN.size), PLAIN, wishes[a:b], SHORT, 3, 10 + a)
               for a, b in ((0, 1), (1, 4), (4, 5))]
        assert whole == [tokens for part in cut for tokens in part]
        assert whole[2][1:1 + len(start)] == [*start]
        assert PLAIN.steps(whole[3]) <= 2
        assert PLAIN.steps(whole[4]) <= 9
        assert whole != compose(network(kind, PLAIN.size), PLAIN, wishes, SHORT, 4, 10)


def test_a_piece_goes_on_beyond_the_context_and_keeps_what_was_asked() -> None:
    seen: list[list[int]] = []

    class Watched(decoder.Decoder):
        def forward(self, tokens: Any, state: Any = None, targets: Any = None) -> Any:
            if state is None:
                seen.append(tokens[0].tolist())
            return super().forward(tokens, state, targets)

    torch.manual_seed(2)
    watched: Any = Watched(NETWORKS["decoder"], CHORDS.size).eval()  # type: ignore[arg-type]
    asked = Asked(5, 70.0, "bach")
    made, = compose(watched, CHORDS, [Wish(asked, melody=TUNE * 30)], Sampling(max_tokens=2000), 1)
    assert CHORDS.steps(made) == 180
    assert len(seen) > 10
    assert seen[0][:4] == [END, *CHORDS.header(asked)]
    assert all(window[:3] == CHORDS.header(asked) for window in seen[1:])  # END would say that the piece begins here
    assert max(map(len, seen)) <= 24
    beginning = made[4:200]
    again, = compose(watched, CHORDS, [Wish(asked, tuple(beginning), TUNE * 30)], Sampling(max_tokens=2000), 2)
    assert again[:200] == made[:200]
    assert again != made


def test_each_voice_has_its_temperature() -> None:
    def pieces(*temperatures: float) -> list[tuple[tuple[int, ...], ...]]:
        sampling = Sampling(max_tokens=40, voice_temperatures=temperatures)
        return [CHORDS.decode(compose(network("long", CHORDS.size), CHORDS, [Wish()], sampling, seed)[0])
                for seed in range(8)]

    assert len({tuple(max(step, default=0) for step in piece[:1]) for piece in pieces(0.0, 3.0)}) == 1
    assert len({piece[:1] for piece in pieces(0.0, 3.0)}) > 1  # the voices below are free
    assert len({*pieces(0.0)}) == 1  # the last holds for all below
    wild = Sampling(max_tokens=40, voice_temperatures=(0.7,))
    same = Sampling(max_tokens=40, temperature=0.7)
    made = [compose(network("long", CHORDS.size), CHORDS, [Wish()], s, 7) for s in (wild, same)]
    assert made[0] == made[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", NETWORKS)
def test_an_onnx_runtime_makes_the_same_pieces(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from handmill.export import onnx_decoder, onnx_recurrent
    from handmill.serving.onnxruntime import RecurrentRuntime, Runtime

    trained = network(kind, CHORDS.size)
    (onnx_recurrent if kind == "lstm" else onnx_decoder).write(trained, tmp_path / "model.onnx")
    about = {"network": asdict(trained.settings)}
    runtime = (RecurrentRuntime if kind == "lstm" else Runtime)(tmp_path, about)
    wishes = [Wish(), Wish(melody=TUNE), Wish(Asked(key=3), steps=5)]
    assert compose(runtime, CHORDS, wishes, SHORT, 2) == compose(trained, CHORDS, wishes, SHORT, 2)


def test_draws_follow_the_networks_probabilities_among_what_the_grammar_allows() -> None:
    model, counts, rows = network("long", PLAIN.size), np.zeros(PLAIN.size), 2000
    for tokens in compose(model, PLAIN, [Wish(steps=1)] * rows, Sampling(max_tokens=5), 1):
        counts[tokens[1]] += 1
    with torch.no_grad():
        logits = model(torch.tensor([[END]]))[0][0, -1].double()
    allowed = torch.from_numpy(PLAIN.grammar([END]))
    expected = rows * logits.masked_fill(~allowed, -torch.inf).softmax(-1).numpy()
    assert not counts[~allowed.numpy()].any()
    kept = expected > 0
    chi2 = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    assert chi2 < 24.3  # the 0.1 % point with 7 degrees of freedom


def test_notes_that_still_sound_are_let_go() -> None:
    on, shift = FREE.first["on"], FREE.first["shift"]
    start = (FREE.first["velocity"], on, on + 2, FREE.first["program"] + 1, on + 1, shift + 3)
    tokens, = compose(network("long", FREE.size), FREE, [Wish(beginning=start)], Sampling(max_tokens=1), 1)
    assert not ungrammatical(FREE, tokens)
    offs = [token for token in tokens if FREE.section(token)[0] == "off"]
    assert len(offs) >= 3


HARMONISER = Frames(replace(PLAIN.settings, melody=True))


@pytest.mark.parametrize(("codec", "wish", "sampling", "sentence"), [
    (FREE, Wish(melody=TUNE), SHORT, "free time"), (FREE, Wish(steps=3), SHORT, "free time"),
    (FREE, Wish(), replace(SHORT, voice_temperatures=(1.0,)), "set temperature"),
    (HARMONISER, Wish(), SHORT, "no melody of its own"),
    (CHORDS, Wish(melody=TUNE), replace(SHORT, max_tokens=22), "may take 23 tokens .* set max_tokens to 23"),
    (PLAIN, Wish(beginning=tuple(PLAIN.encode(((60,), (61,))).tolist()), melody=melody(PLAIN, 60, 62, 60)), SHORT,
     "highest notes of the beginning"),
    (PLAIN, Wish(beginning=tuple(PLAIN.encode(((60,), (61,))).tolist()), steps=2), SHORT, "fills all 2 steps")])
def test_what_cannot_be_made_is_a_sentence(codec: Any, wish: Wish, sampling: Sampling, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        compose(network("long", codec.size), codec, [wish], sampling, 1)


def test_the_least_room_for_a_melody_is_enough() -> None:
    check(CHORDS, [Wish(melody=TUNE)], replace(SHORT, max_tokens=23))
    start = tuple(CHORDS.encode(((50, 60),)).tolist())[3:]  # without the header
    check(CHORDS, [Wish(beginning=start, melody=TUNE)], replace(SHORT, max_tokens=18))
    check(CHORDS, [Wish(beginning=start[:-1], melody=TUNE)], replace(SHORT, max_tokens=22))
    made = compose(network("long", CHORDS.size), CHORDS, [Wish(melody=TUNE)], replace(SHORT, max_tokens=23), 1)
    assert CHORDS.steps(made[0]) == len(TUNE)
    assert compose(network("long", CHORDS.size), CHORDS, [], SHORT, 1) == []

"""Fill in the middle: no character is lost wherever a text is cut, windows keep their length, nothing keeps a state."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from handmill.data.middle import (
    DRAWS,
    NAMES,
    Middle,
    Parts,
    arranged,
    assembled,
    cuts,
    encoded,
    filled,
    line_cuts,
    marks,
    shortened,
)
from handmill.data.windows import Windows
from handmill.errors import UserError
from handmill.media import tokenizers
from handmill.media.tokenizers import BPESettings, ByteSettings, CharacterSettings, Tokenizer

SOURCE = Path(__file__).read_text(encoding="utf-8") + "naïve 東京 \U0001f600"
CODECS = {"byte": tokenizers.train(ByteSettings(special=NAMES), []),
          "bpe": tokenizers.train(BPESettings(vocabulary=400, special=NAMES), [SOURCE]),
          "character": tokenizers.train(CharacterSettings(special=NAMES), [SOURCE])}
KINDS = pytest.mark.parametrize("kind", CODECS)
DOCUMENTS = [SOURCE[a:a + 37 * (a % 11 + 1)] for a in range(0, len(SOURCE), 211)]


def turned(kind: str, seed: int = 1, rate: float = 1.0, suffix_first: float = 0.5,
           context: int = 64, count: int = 200) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Windows as they are and as they become, both (N, T + 1)."""
    codec = CODECS[kind]
    windows, places = Windows(codec.pack(DOCUMENTS), context, seed), np.arange(count)
    before = windows.batch(places)
    return before.numpy(), Middle(codec, seed, rate, suffix_first)(before, places).numpy()


def texts(row: NDArray[np.int64], codec: Tokenizer) -> list[NDArray[np.int64]]:
    """The texts of a window, without the ends between them."""
    parts = np.split(row, np.flatnonzero(row == codec.end))
    return [part[part != codec.end] for part in parts if len(part)]


def is_turned(text: NDArray[np.int64], codec: Tokenizer) -> bool:
    return all((text == mark).sum() == 1 for mark in marks(codec))


@KINDS
@given(text=st.text(), cuts=st.tuples(st.floats(0, 1), st.floats(0, 1)), suffix_first=st.booleans())
@settings(deadline=None)
def test_any_text_cut_anywhere_is_assembled_again(kind: str, text: str, cuts: tuple[float, float],
                                                  suffix_first: bool) -> None:
    codec = CODECS[kind]
    a, b = sorted(int(cut * len(text)) for cut in cuts)
    parts = Parts(*encoded(codec, (text[:a], text[a:b], text[b:])))
    made = arranged(parts, marks(codec), suffix_first)
    assert assembled(codec, made.tolist()) == codec.decode(codec.encode(text))
    assert len(made) == sum(map(len, parts)) + 3


def test_the_two_orders_are_the_papers() -> None:
    prefix, suffix, middle = CODECS["byte"].special.values()
    parts = Parts(*encoded(CODECS["byte"], ("A", "B", "C")))
    assert arranged(parts, marks(CODECS["byte"]), False).tolist() == [prefix, 65, suffix, 67, middle, 66]
    assert arranged(parts, marks(CODECS["byte"]), True).tolist() == [prefix, suffix, 67, middle, 65, 66]


@KINDS
@given(text=st.text(st.sampled_from("ab 東\n"), min_size=1),
       chance=st.tuples(*[st.floats(0, 1, exclude_max=True, width=32)] * DRAWS))
@settings(deadline=None)
def test_every_document_within_a_window_is_whole(kind: str, text: str, chance: tuple[float, ...]) -> None:
    codec = CODECS[kind]
    tokens = codec.encode(text).astype(np.int64)
    made = Middle(codec, 1, 1.0, 0.5)._text(tokens, np.array(chance, np.float32), 10**6)
    assert made[-1] == codec.end
    assert assembled(codec, made.tolist()) == codec.decode(codec.encode(text))


@KINDS
def test_windows_keep_their_length_and_their_text(kind: str) -> None:
    codec = CODECS[kind]
    before, after = turned(kind)
    assert after.shape == before.shape
    assert after.dtype == np.int64
    for was, row in zip(before, after, strict=True):
        whole = codec.decode(was)
        for text in texts(row, codec):
            spelled = assembled(codec, text.tolist()) if is_turned(text, codec) else codec.decode(text)
            assert spelled.strip("\ufffd") in whole  # a cut may go through a character


@KINDS
def test_the_middle_is_never_cut_and_always_ends(kind: str) -> None:
    codec = CODECS[kind]
    _, after = turned(kind)
    last = [row for row in after if (row == marks(codec).middle).any() and row[-1] == codec.end]
    assert len(last) > 0.8 * len(after)


def test_windows_of_one_long_document_are_turned_to_the_last_token() -> None:
    codec = CODECS["bpe"]
    windows, places = Windows(codec.pack([SOURCE]), 64, 1), np.arange(100)
    rows = Middle(codec, 1, 1.0)(windows.batch(places), places).numpy()
    assert np.mean(rows[:, -1] == codec.end) > 0.95
    begin = np.argmax(rows == codec.special[NAMES[0]], 1)[rows[:, -1] == codec.end]
    assert all(((begin >= low) & (begin < low + 15)).mean() > 0.05 for low in (0, 15, 30, 45))  # no fixed way


@KINDS
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9])
def test_the_share_is_that_asked_for(kind: str, rate: float) -> None:
    codec = CODECS[kind]
    before, after = turned(kind, rate=rate, context=256, count=500)
    count = sum(len(text) > 1 for row in before for text in texts(row, codec))
    found = int((after == marks(codec).prefix).sum())
    assert rate - 0.08 <= found / count <= rate + 0.04  # a text at a window's close may have no room for the marks
    if not rate:
        assert np.array_equal(before, after)


def test_middles_are_as_likely_of_a_line_as_of_a_page_and_lie_anywhere() -> None:
    chance = np.random.default_rng(1)
    begin, end = np.array([cuts("a" * 9, *chance.random(2)) for _ in range(4000)]).T
    lengths = np.bincount(end - begin, minlength=10) / 4000
    wanted = np.array([0, *(math.log10((n + 1) / n) for n in range(1, 10))])
    assert abs(lengths - wanted).max() < 0.02
    for length in (1, 2, 4):
        places = begin[end - begin == length]
        shares = np.bincount(places, minlength=10 - length) / len(places)
        assert abs(shares - 1 / (10 - length)).max() < 0.06
    assert {cuts("", *chance.random(2)) for _ in range(9)} == {(0, 0)}


def test_middles_of_lines_are_whole_lines_and_any_of_them() -> None:
    chance = np.random.default_rng(1)
    text = "begun elsewhere\none\ntwo\nthree\ngoes on elsewh"
    found = {text[slice(*line_cuts(text, *chance.random(2)))] for _ in range(500)}
    assert found == {"one\n", "two\n", "three\n", "one\ntwo\n", "two\nthree\n", "one\ntwo\nthree\n"}
    assert line_cuts("no line", 0.5, 0.5) == cuts("no line", 0.5, 0.5)


@KINDS
def test_as_many_middles_are_lines_as_asked_for(kind: str) -> None:
    codec = CODECS[kind]
    windows, places = Windows(codec.pack([SOURCE]), 200, 1), np.arange(400)
    for share in (0.0, 0.5, 1.0):
        rows = Middle(codec, 1, 1.0, 0.0, share)(windows.batch(places), places).numpy()
        whole = [row[np.argmax(row == marks(codec).middle) + 1:-1] for row in rows if row[-1] == codec.end]
        found = np.mean([codec.decode(middle).endswith("\n") for middle in whole])
        assert 0.6 * share <= found <= share + 0.1, (share, found)  # a short text may have no two ends of lines


def test_what_becomes_of_a_window_depends_on_seed_and_place_alone() -> None:
    codec = CODECS["bpe"]
    windows, places = Windows(codec.pack(DOCUMENTS), 64, 5), np.arange(40)
    change = Middle(codec, 5, 0.5, 0.5)
    whole = change(windows.batch(places), places)
    halves = [Middle(codec, 5, 0.5, 0.5)(windows.batch(some), some) for some in (places[:7], places[7:])]
    assert torch.equal(whole, torch.cat(halves))
    assert not torch.equal(whole, Middle(codec, 6, 0.5, 0.5)(windows.batch(places), places))
    again = places + 40 * len(places)  # the same text at another visit is cut elsewhere
    assert not torch.equal(whole, change(windows.batch(places), again))


def test_suffix_first_has_its_own_share() -> None:
    codec = CODECS["byte"]
    _, after = turned("byte", suffix_first=0.25, count=1000)
    first = after[:, :-1] == marks(codec).prefix
    apart = (after[:, 1:] == marks(codec).suffix)[first]
    _, never = turned("byte", suffix_first=0.0, count=1000)
    empty = (never[:, 1:] == marks(codec).suffix)[never[:, :-1] == marks(codec).prefix]  # no prefix before the suffix
    assert abs(apart.mean() - empty.mean() - 0.25) < 0.05


@given(st.tuples(*[st.integers(0, 9)] * 3), st.integers(-3, 30))
def test_shortening_takes_from_suffix_then_from_prefix(sizes: tuple[int, ...], by: int) -> None:
    parts = Parts(*np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1]))
    short = shortened(parts, by)
    if short is None:
        assert by > sizes[0] + sizes[2]
        return
    assert sum(map(len, parts)) - sum(map(len, short)) == max(0, by)
    assert short.middle.tolist() == parts.middle.tolist()
    assert (np.diff(np.concatenate(short)) == 1).all()
    assert len(short.suffix) == 0 or len(short.prefix) == len(parts.prefix)


@KINDS
def test_text_that_names_a_mark_stays_text(kind: str) -> None:
    nasty = "".join(NAMES) + "x"
    codec = tokenizers.train(CharacterSettings(special=NAMES), [nasty]) if kind == "character" else CODECS[kind]
    prompt = filled(codec, nasty, nasty, 10_000, 10)
    assert [prompt.count(mark) for mark in marks(codec)] == [1, 1, 1]
    assert assembled(codec, prompt) == nasty + nasty
    row = torch.from_numpy(codec.pack([nasty] * 3).astype(np.int64))[None]
    for text in texts(Middle(codec, 1, 1.0)(row, np.array([4])).numpy()[0], codec):
        assert all((text == mark).sum() <= 1 for mark in marks(codec))


@KINDS
@given(before=st.text(st.sampled_from("ab 東\n")), after=st.text(st.sampled_from("ab 東\n")),
       context=st.integers(16, 200), suffix_first=st.booleans())
@settings(deadline=None)
def test_prompts_fit_and_keep_what_is_near_the_middle(kind: str, before: str, after: str, context: int,
                                                      suffix_first: bool) -> None:
    codec = CODECS[kind]
    prompt = filled(codec, before, after, context, context // 2, suffix_first)
    assert len(prompt) <= context - context // 2
    prefix, suffix, middle = (prompt.index(mark) for mark in marks(codec))
    left = prompt[middle + 1:] if suffix_first else prompt[prefix + 1:suffix]
    right, (wanted_left, wanted_right) = prompt[suffix + 1:middle], encoded(codec, (before, after))
    assert left == wanted_left.tolist()[len(wanted_left) - len(left):]
    assert right == wanted_right.tolist()[:len(right)]
    assert (prompt[0] == codec.end) == (len(left) == len(wanted_left))
    whole = len(left) == len(wanted_left) and len(right) == len(wanted_right)
    assert whole or len(prompt) >= context - context // 2 - 1


def test_a_prompt_is_what_training_shows_before_the_middle() -> None:
    codec = CODECS["bpe"]
    parts = Parts(*encoded(codec, ("def f(", "x)", ": return x\n")))
    for first in (False, True):
        prompt = filled(codec, "def f(", ": return x\n", 100, 20, first)
        made = [codec.end, *arranged(parts, marks(codec), first).tolist()]
        assert made == [*prompt, *codec.encode("x)").tolist()]
        assert assembled(codec, [*prompt, *codec.encode("x)").tolist(), codec.end]) == "def f(x): return x\n"


def test_what_cannot_be_filled_is_an_error() -> None:
    with pytest.raises(UserError, match=r"codec\.special"):
        Middle(tokenizers.train(ByteSettings(), []), 1, 0.5)
    with pytest.raises(UserError, match=r"codec\.special"):
        filled(tokenizers.train(ByteSettings(), []), "a", "b", 100, 10)
    with pytest.raises(UserError, match="max_tokens"):
        filled(CODECS["byte"], "a", "b", 64, 60)
    with pytest.raises(UserError, match="training text"):
        filled(CODECS["character"], "\u0378", "b", 100, 10)

"""Tokenizers: round trips, parity with Hugging Face's byte-level BPE, merges against a plain implementation."""

import json
import random
from collections import Counter
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from handmill.data.merges import learn
from handmill.errors import UserError
from handmill.media import tokenizers
from handmill.media.tokenizers import BPESettings, ByteSettings, CharacterSettings, Tokenizer

TEXT = ("It was the best of times, it was the worst of times; we'd 1234 reasons (and 5).\n\n"
        "  Indented text\twith tabs, naïve café, 東京 and Ωmega… don't DON'T \U0001f600!\r\n") * 3
BPE = tokenizers.train(BPESettings(vocabulary=400), [TEXT])
BYTE = tokenizers.train(ByteSettings(), [])
# what the Unicode tables of all the engines agree on
COMMON = st.text(st.one_of(st.characters(max_codepoint=0x24F, exclude_characters="\x85\x1c\x1d\x1e\x1f"),
                           st.sampled_from("東京テキスト한국어привет…—“”\u3000\u2028é\u0301\U0001f600 \n\r\t'abcST12"),
                           st.sampled_from("  \n\n\r\n\t'sdmtllvere12 .,(abc")))


@given(st.text())
@settings(deadline=None)
def test_bytes_and_bpe_give_back_any_text(text: str) -> None:
    for codec in (BYTE, BPE):
        tokens = codec.encode(text)
        assert codec.decode(tokens) == text
        assert codec.end not in tokens
        assert b"".join(codec.token_bytes[t] for t in tokens) == text.encode()
        assert codec.characters(tokens) == len(text)


@given(st.text(), st.text(min_size=1))
@settings(deadline=None)
def test_characters_give_back_what_they_know(text: str, other: str) -> None:
    codec = tokenizers.train(CharacterSettings(), [text])
    assert codec.decode(codec.encode(text)) == text
    expected = "".join(c if c in set(text) else "\ufffd" for c in other)
    assert codec.decode(codec.encode(other)) == expected
    assert codec.characters(codec.encode(other)) == len(other)
    unknown = sum(c not in set(text) for c in other)
    assert int((codec.encode(other) == codec.unknown).sum()) == unknown


def test_character_ids_follow_the_code_points() -> None:
    codec = tokenizers.train(CharacterSettings(), ["cab", "\U0001f600"])
    assert codec.encode("abc\U0001f600?").tolist() == [2, 3, 4, 5, 1]
    assert (codec.end, codec.unknown, codec.size, codec.token_bytes[0]) == (0, 1, 6, b"")


@pytest.mark.parametrize("kind", ["character", "byte", "bpe"])
def test_no_text_encodes_to_end(kind: str) -> None:
    settings_of = {"character": CharacterSettings(), "byte": ByteSettings(),
                   "bpe": BPESettings(vocabulary=300)}
    nasty = "<|end|><|endoftext|></s>\x00\ud800\udfff\uffff\xff" + chr(256)
    codec = tokenizers.train(settings_of[kind], [TEXT, nasty.encode("utf-8", "replace").decode()])
    assert codec.end not in codec.encode(nasty)
    assert codec.decode([codec.end]) == ""
    assert codec.characters([codec.end]) == 0


@pytest.mark.parametrize("codec", [BYTE, BPE, tokenizers.train(CharacterSettings(), [TEXT])],
                         ids=["byte", "bpe", "character"])
def test_pack_is_end_and_tokens_of_each_text(codec: Tokenizer) -> None:
    texts = ["one", "", TEXT, "été"]
    expected = [t for text in texts for t in [codec.end, *codec.encode(text).tolist()]]
    packed = codec.pack(texts)
    assert packed.tolist() == expected
    assert packed.dtype == np.uint16
    assert codec.pack([]).tolist() == []


@pytest.mark.parametrize("codec", [BYTE, BPE, tokenizers.train(CharacterSettings(), [TEXT])],
                         ids=["byte", "bpe", "character"])
def test_saved_tokenizers_load_as_they_were(codec: Tokenizer, tmp_path: Path) -> None:
    codec.save(tmp_path / "codec")
    again = tokenizers.load(None, tmp_path / "codec")
    assert (again.kind, again.size, again.end, again.token_bytes) == (
        codec.kind, codec.size, codec.end, codec.token_bytes)
    assert again.encode(TEXT).tolist() == codec.encode(TEXT).tolist()


@given(COMMON)
@settings(deadline=None, max_examples=300)
def test_bpe_agrees_with_hugging_face(text: str) -> None:
    assert BPE.encode(text).tolist() == _hugging_face(BPE).encode(text).ids


def test_bpe_agrees_with_hugging_face_on_long_words() -> None:
    generator = random.Random(7)
    word = "".join(generator.choice(["the", "est", "naï", "of", "ti", "x"]) for _ in range(500))
    assert len(word) > 1000
    assert BPE.encode(word).tolist() == _hugging_face(BPE).encode(word).ids


@given(st.text(st.characters(max_codepoint=127, exclude_characters="\x1c\x1d\x1e\x1f")))
@settings(deadline=None, max_examples=300)
def test_the_fast_pattern_for_ascii_cuts_as_the_full_one(text: str) -> None:
    assert tokenizers.split(text) == regex.findall(tokenizers.PATTERN, text)


@given(st.text())
@settings(deadline=None)
def test_words_are_the_text(text: str) -> None:
    assert "".join(tokenizers.split(text)) == text


@given(st.lists(st.text("aabbc \n", min_size=1), min_size=1, max_size=5), st.integers(1, 12))
@settings(deadline=None, max_examples=200)
def test_learnt_merges_are_those_of_a_plain_implementation(texts: list[str], merges: int) -> None:
    words = tokenizers.count_words(texts)
    assert learn(words, merges).merges == _plain_merges(words, merges)


def test_learning_on_real_text_is_that_of_a_plain_implementation() -> None:
    words = tokenizers.count_words([TEXT, Path(__file__).read_text(encoding="utf-8")])
    assert learn(words, 120).merges == _plain_merges(words, 120)


@given(st.lists(st.text("aabbcé \n", min_size=1), max_size=5), st.integers(0, 12))
@settings(deadline=None, max_examples=200)
def test_words_known_from_learning_are_as_encoded_afresh(texts: list[str], merges: int) -> None:
    texts.append("ab" * 300 + " " + "é" * 200)  # too long to be known
    codec = tokenizers.train(BPESettings(vocabulary=257 + merges), texts)
    fresh = Tokenizer("bpe", merges=codec.merges)
    for content in (*texts, "unseen ab"):
        assert codec.encode(content).tolist() == fresh.encode(content).tolist()


def test_no_two_tokens_have_the_same_bytes() -> None:
    codec = tokenizers.train(BPESettings(vocabulary=600), ["aaaa aaa aa a aaaaaaa " * 9, TEXT])
    assert len(set(codec.token_bytes)) == codec.size


def test_a_small_text_gives_a_smaller_vocabulary_than_asked() -> None:
    codec = tokenizers.train(BPESettings(vocabulary=4096), ["abab"])
    assert codec.size == 258
    assert codec.encode("abab").tolist() == [256, 256]


def test_large_vocabularies_take_uint32() -> None:
    alphabet = "".join(map(chr, range(0x10000, 0x10000 + 70_000)))
    codec = Tokenizer("character", alphabet)
    assert codec.encode(alphabet[-1]).dtype == np.uint32
    assert codec.decode(codec.encode(alphabet[-1])) == alphabet[-1]


def test_the_table_of_words_may_be_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = tokenizers.train(BPESettings(vocabulary=300), [TEXT])
    before = codec.encode(TEXT).tolist()
    monkeypatch.setattr(tokenizers, "_WORDS_KEPT", 3)
    assert [codec.encode(TEXT).tolist() for _ in range(3)] == [before] * 3


def test_counting_words_forgets_the_rarest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizers, "_WORDS_KEPT", 8)
    counts = tokenizers.count_words([" the" * 50] + [f" w{chr(97 + i)}" for i in range(20)])
    assert counts[b" the"] == 50
    assert len(counts) <= 8


@pytest.mark.parametrize(("change", "said"), [
    ({"format": "else/1"}, "format"), ({"kind": "wordpiece"}, "kind"), ({"merges": [[1, 300]]}, "merge 0"),
    ({"merges": [[True, 1]]}, "merge 0"), ({"merges": 3}, "list"), ({"pattern": "(a+)+$"}, "pattern"),
    ({"merges": [[1, 2, 3]]}, "merge 0"), ({"merges": [7]}, "merge 0")])
def test_a_broken_tokenizer_is_an_error(tmp_path: Path, change: dict[str, object], said: str) -> None:
    BPE.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=said) as error:
        tokenizers.load(None, tmp_path)
    assert "tokenizer.json" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"format": "handmill-tokenizer/1"}'])
def test_a_file_that_is_no_tokenizer_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        tokenizers.load(None, tmp_path)


@pytest.mark.parametrize("alphabet", ["ba", "aa", "a\ud800", 5])
def test_a_broken_alphabet_is_an_error(tmp_path: Path, alphabet: object) -> None:
    content = {"format": tokenizers.FORMAT, "kind": "character", "alphabet": alphabet}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="alphabet"):
        tokenizers.load(None, tmp_path)


def test_a_missing_or_other_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is missing"):
        tokenizers.load(None, tmp_path)
    BYTE.save(tmp_path)
    with pytest.raises(UserError, match=r"codec\.kind"):
        tokenizers.load(BPESettings(), tmp_path)


MARKS = ("<one>", "the")  # the second is a word of the text
SPECIAL = {"character": CharacterSettings(special=MARKS), "byte": ByteSettings(special=MARKS),
           "bpe": BPESettings(vocabulary=402, special=MARKS)}
PLAIN = {"character": CharacterSettings(), "byte": ByteSettings(), "bpe": BPESettings(vocabulary=400)}
KINDS = pytest.mark.parametrize("kind", SPECIAL)


@KINDS
@given(text=st.one_of(st.text(), st.sampled_from(["<one>", "the the<one>the"])))
@settings(deadline=None)
def test_no_text_encodes_to_a_special_token(kind: str, text: str) -> None:
    codec, plain = trained(SPECIAL[kind]), trained(PLAIN[kind])
    assert codec.encode(text).tolist() == plain.encode(text).tolist()
    assert codec.pack([text, text]).tolist() == plain.pack([text, text]).tolist()
    assert not {*codec.special.values()} & {*codec.encode(text).tolist()}


@KINDS
def test_special_tokens_come_after_all_others(kind: str, tmp_path: Path) -> None:
    codec, plain = trained(SPECIAL[kind]), trained(PLAIN[kind])
    assert codec.special == {"<one>": plain.size, "the": plain.size + 1}
    assert (codec.size, codec.end, codec.unknown) == (plain.size + 2, plain.end, plain.unknown)
    assert codec.token_bytes == [*plain.token_bytes, b"", b""]
    assert codec.decode([*codec.encode("ab"), *codec.special.values()]) == "ab"
    assert codec.characters([*codec.special.values()]) == 0
    codec.save(tmp_path)
    again = tokenizers.load(SPECIAL[kind], tmp_path)
    assert (again.special, again.size, again.end) == (codec.special, codec.size, codec.end)
    assert again.encode(TEXT).tolist() == codec.encode(TEXT).tolist()


@KINDS
def test_a_tokenizer_without_special_tokens_is_written_and_read_as_before(kind: str, tmp_path: Path) -> None:
    plain = trained(PLAIN[kind])
    plain.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert set(content) - {"alphabet", "pattern", "merges"} == {"format", "kind", "size", "end"}
    assert tokenizers.load(PLAIN[kind], tmp_path).special == {}
    with pytest.raises(UserError, match=r"codec\.special"):
        tokenizers.load(SPECIAL[kind], tmp_path)


@pytest.mark.parametrize("special", [3, [""], ["a", "a"], [1], "ab"])
def test_broken_special_tokens_are_an_error(tmp_path: Path, special: object) -> None:
    BYTE.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"special": special}))
    with pytest.raises(UserError, match="special"):
        tokenizers.load(None, tmp_path)


@pytest.mark.parametrize("special", [("",), ("a", "b", "a")])
def test_names_that_no_file_could_tell_apart_are_errors(special: tuple[str, ...]) -> None:
    for cls in (CharacterSettings, ByteSettings, BPESettings):
        with pytest.raises(UserError, match="special"):
            cls(special=special)
    with pytest.raises(UserError, match="between 259"):
        BPESettings(vocabulary=258, special=("a", "b"))


@lru_cache
def trained(settings_of: Any) -> Tokenizer:
    return tokenizers.train(settings_of, [TEXT])


@pytest.mark.parametrize("vocabulary", [256, 0, -5, 10**7])
def test_impossible_vocabularies_are_errors(vocabulary: int) -> None:
    with pytest.raises(UserError, match="vocabulary"):
        BPESettings(vocabulary=vocabulary)


def _plain_merges(words: Counter[bytes], merges: int) -> list[tuple[int, int]]:
    """Sennrich et al. 2016, recounting everything for every merge."""
    states = [(list(word), count) for word, count in words.items()]
    pieces = [bytes([value]) for value in range(256)]
    learnt: list[tuple[int, int]] = []
    passed: set[tuple[int, int]] = set()
    while len(learnt) < merges:
        counts: Counter[tuple[int, int]] = Counter()
        for symbols, count in states:
            for pair in pairwise(symbols):
                counts[pair] += count
        # a run like "aaa" counts its pair at every place, as it stands
        ranked = sorted((-count, pair) for pair, count in counts.items() if count > 1 and pair not in passed)
        if not ranked:
            break
        left, right = ranked[0][1]
        if pieces[left] + pieces[right] in pieces:
            passed.add((left, right))
            continue
        pieces.append(pieces[left] + pieces[right])
        states = [(_merged(symbols, left, right, 256 + len(learnt)), count) for symbols, count in states]
        learnt.append((left, right))
    return learnt


def _merged(symbols: list[int], left: int, right: int, new: int) -> list[int]:
    out: list[int] = []
    at = 0
    while at < len(symbols):
        if symbols[at:at + 2] == [left, right]:
            out.append(new)
            at += 2
        else:
            out.append(symbols[at])
            at += 1
    return out


@lru_cache
def _hugging_face(codec: Tokenizer) -> Any:
    """The same vocabulary, merges and pattern in the `tokenizers` package."""
    hf = pytest.importorskip("tokenizers")
    letters = _byte_letters()
    names = ["".join(letters[b] for b in piece) for piece in codec.token_bytes[:-1]]
    merges = [(names[a], names[b]) for a, b in codec.merges]
    other = hf.Tokenizer(hf.models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=merges))
    other.pre_tokenizer = hf.pre_tokenizers.Sequence([
        hf.pre_tokenizers.Split(hf.Regex(tokenizers.PATTERN), "isolated"),
        hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return other


def _byte_letters() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}

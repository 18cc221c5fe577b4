"""Duplicates against brute force, splits without leaks, and an overlap check that sees a leak."""

import random
import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from corpora import VOCABULARY, documents, everything, prepared, recipe_of, text
from hypothesis import given, settings
from hypothesis import strategies as st

from handmill.data import duplicates, overlap, splits
from handmill.data.corpus import Batch, Corpus, Spool
from handmill.errors import UserError


def corpus_of(folder: Path, texts: list[str]) -> Corpus:
    with Spool(folder / "spool") as spool:
        for number, content in enumerate(texts):
            spool.add(content.encode(), number, 1)
    return spool.corpus()


def brute_jaccard(a: str, b: str, size: int = 5) -> float:
    one, other = ({tuple(w[i:i + size]) for i in range(len(w) - size + 1)}
                  for w in (re.findall(r"[a-z0-9]+", t.lower()) for t in (a, b)))
    return len(one & other) / max(1, len(one | other))


def changed(content: str, share: float, generator: random.Random) -> str:
    """A copy with a share of its words replaced, in clumps."""
    words = content.split()
    for _ in range(max(1, int(len(words) * share))):
        words[generator.randrange(len(words))] = generator.choice(VOCABULARY)
    return " ".join(words)


def similar_texts(count: int = 60) -> list[str]:
    generator = random.Random(3)
    texts = []
    for seed in range(count):
        texts.append(text(seed, generator.randint(4, 60)))
        texts += [changed(texts[-1], generator.choice([0.002, 0.01, 0.02, 0.04, 0.1]), generator) for _ in range(3)]
    return texts


def test_near_duplicates_are_those_of_brute_force(tmp_path: Path) -> None:
    texts = similar_texts()
    corpus = corpus_of(tmp_path, texts)
    signed = duplicates.sign(corpus, tmp_path / "bands", 0.8, lambda _: None)
    alive = duplicates.exact_duplicates(signed.exact) == np.arange(len(texts))
    dropped, links = duplicates.near_duplicates(corpus, signed, alive, 0.8)
    for a, b, jaccard in links:
        assert jaccard == pytest.approx(brute_jaccard(texts[a], texts[b]))
        assert jaccard >= 0.8
    true_pairs = [(a, b) for a, b in combinations(range(len(texts)), 2) if brute_jaccard(texts[a], texts[b]) >= 0.8]
    together = [(a, b) for a, b in true_pairs if dropped.get(a, a) == dropped.get(b, b)]
    assert len(true_pairs) > 60
    assert len(together) / len(true_pairs) >= 0.98
    assert all(root < document for document, root in dropped.items())
    assert not set(dropped) & set(dropped.values())


def test_signatures_estimate_the_similarity() -> None:
    generator = random.Random(5)
    for size in (30, 300):
        original = text(1, size)
        other = changed(original, 0.03, generator)
        rows = []
        for content in (original, other):
            data = content.encode()
            batch = Batch(np.array([0]), data, np.array([0]), np.array([len(data)]))
            hashes, places = duplicates.shingles(batch, 5)
            rows.append(duplicates.signatures(hashes, places, 1)[0])
        estimate = float((rows[0] == rows[1]).mean())
        assert abs(estimate - brute_jaccard(original, other)) < 0.15


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.95, 1.0])
def test_bands_find_nearly_all_pairs_at_the_threshold(threshold: float) -> None:
    bands, rows = duplicates.banding(threshold)
    assert bands * rows <= duplicates.BINS
    assert 1 - (1 - threshold**rows) ** bands >= 0.99


@given(st.lists(st.text("ab c\n.é東", max_size=30), min_size=1, max_size=6), st.integers(1, 5))
@settings(deadline=None, max_examples=300)
def test_shingles_are_equal_where_the_words_are(texts: list[str], size: int) -> None:
    data = "\n".join(texts).encode()
    lengths = [len(t.encode()) for t in texts]
    begins = np.cumsum([0, *[n + 1 for n in lengths[:-1]]])
    hashes, rows = duplicates.shingles(Batch(np.arange(len(texts)), data, begins, begins + lengths), size)
    expected = []
    for row, content in enumerate(texts):
        words = re.findall("東(?:[abcé]*)|[abcé]+", content)
        expected += [(tuple(words[i:i + size]), row) for i in range(len(words) - size + 1)]
    assert rows.tolist() == [row for _, row in expected]
    numbers: dict[tuple[str, ...], int] = {}
    for (words, _), value in zip(expected, hashes.tolist(), strict=True):
        assert numbers.setdefault(words, value) == value
    assert len(set(numbers.values())) == len(numbers)


def test_case_and_punctuation_do_not_matter() -> None:
    found = []
    for content in ("The cat, the DOG!", "the cat\nthe dog", "the cat the dig"):
        data = content.encode()
        found.append(duplicates.shingles(Batch(np.array([0]), data, np.array([0]), np.array([len(data)])), 4)[0])
    assert found[0] == found[1] != found[2]


def test_exact_duplicates_keep_the_first(tmp_path: Path) -> None:
    texts = ["a", "b", " a\n", "c", "b", "a"]
    signed = duplicates.sign(corpus_of(tmp_path, texts), tmp_path / "bands", 0.8, lambda _: None)
    assert duplicates.exact_duplicates(signed.exact).tolist() == [0, 1, 0, 3, 1, 0]


def test_long_copies_are_found(tmp_path: Path) -> None:
    long = "".join(text(seed, 50) for seed in range(400))
    assert len(long) > 1 << 20
    texts = [long, text(1000), long, long + "and a little more", text(1001), text(1002)]
    for number, content in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(content)
    packed = prepared(tmp_path / "cache", f"{tmp_path}/*.txt")
    assert everything(packed) == sorted([texts[0], texts[1], texts[4], texts[5]])
    assert (packed.report["duplicates"]["exact"], packed.report["duplicates"]["near"]) == (1, 1)


def test_only_exact_copies_go_when_asked(tmp_path: Path) -> None:
    texts = [text(seed) for seed in range(8)]
    texts += [texts[0], texts[1] + "more"]
    for number, content in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(content)
    packed = prepared(tmp_path / "cache", f"{tmp_path}/*.txt", near_duplicates=0)
    assert everything(packed) == sorted([*texts[:8], texts[9]])
    assert packed.report["duplicates"] | {"first": []} == {"exact": 1, "near": 0, "jaccard": 0.0, "first": []}
    copy = packed.report["duplicates"]["first"][0]
    assert (Path(copy["copy"]).name, Path(copy["of"]).name) == ("8.txt:1", "0.txt:1")


def test_short_lines_are_no_near_duplicates(tmp_path: Path) -> None:
    names = sorted({f"{a}{b}" for a in VOCABULARY[:20] for b in VOCABULARY[20:40]})
    (tmp_path / "names.txt").write_text("\n".join([*names, names[0]]) + "\n")
    packed = prepared(tmp_path / "cache", tmp_path / "names.txt", document="line")
    assert everything(packed) == names
    assert packed.report["overlap"]["windows"]["share"] is None


@pytest.mark.parametrize("split", ["hash", "tail"])
def test_nothing_leaks_between_the_splits(tmp_path: Path, split: str) -> None:
    texts = similar_texts(80)
    random.Random(1).shuffle(texts)
    (tmp_path / "a.txt").write_text("\n\n".join(t.strip().replace("\n", " ") for t in texts))
    packed = prepared(tmp_path / "cache", tmp_path / "a.txt", document="paragraph", split=split,
                      validation=0.2, test=0.2)
    train = documents(packed, "train")
    held = documents(packed, "validation") + documents(packed, "test")
    assert max(brute_jaccard(a, b) for a in train for b in held) < 0.8
    assert not set(train) & set(held)
    assert not set(documents(packed, "validation")) & set(documents(packed, "test"))
    for name in ("validation", "test"):
        share = packed.report["splits"][name]["bytes"] / sum(s["bytes"] for s in packed.report["splits"].values())
        assert share == pytest.approx(0.2, abs=0.05)
    assert (packed.report["overlap"]["exact"], packed.report["overlap"]["near"]["pairs"]) == (0, 0)


def test_the_overlap_check_sees_a_leak(tmp_path: Path) -> None:
    texts = [text(seed, 20) for seed in range(20)]
    near = changed(texts[1], 0.005, random.Random(2))
    quoted = text(99, 10) + texts[2]
    corpus = corpus_of(tmp_path, [*texts, texts[0], near, quoted])
    parts = {"train": np.arange(20), "validation": np.array([20, 22]), "test": np.array([21])}
    signed = duplicates.sign(corpus, tmp_path / "bands", 0.8, lambda _: None)
    seen = overlap.check(corpus, parts, signed, 0.8, lambda _: None)
    assert seen["exact"] == 1
    assert seen["near"]["pairs"] == 2
    train = {w for t in texts for w in _windows(t)}
    held = [w for t in (texts[0], near, quoted) for w in _windows(t)]
    assert seen["windows"]["windows"] == len(held)
    assert seen["windows"]["seen"] == sum(w in train for w in held)
    assert seen["windows"]["share"] == pytest.approx(seen["windows"]["seen"] / len(held))
    assert seen["windows"]["mostly_seen"] == 3


def _windows(content: str) -> list[tuple[str, ...]]:
    words = re.findall("[a-z0-9]+", content.lower())
    return [tuple(words[i:i + 13]) for i in range(len(words) - 12)]


@given(st.lists(st.integers(1, 5000), min_size=3, max_size=40), st.floats(0.001, 0.49), st.floats(0.0, 0.49),
       st.integers(0, 9))
@settings(deadline=None, max_examples=300)
def test_every_split_holds_something_and_no_document_is_in_two(
        sizes: list[int], validation: float, test: float, seed: int) -> None:
    lengths = np.array(sizes)
    hashes = np.arange(len(sizes), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for parts in (splits.by_hash(lengths, hashes, seed, validation, test),
                  splits.by_place(lengths, validation, test)):
        assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(len(sizes)))
        assert min(len(parts["train"]), len(parts["validation"])) > 0
        assert bool(len(parts["test"])) == (test > 0)
        assert all((np.diff(part) > 0).all() for part in parts.values())


def test_the_tail_is_the_end_in_order(tmp_path: Path) -> None:
    texts = [text(seed, 3) for seed in range(20)]
    for number, content in enumerate(texts):
        (tmp_path / f"{number:02}.txt").write_text(content)
    packed = prepared(tmp_path / "cache", f"{tmp_path}/*.txt", split="tail", validation=0.1, test=0.2)
    assert documents(packed, "train") + documents(packed, "validation") + documents(packed, "test") == texts
    assert len(documents(packed, "test")) in (3, 4, 5)
    assert len(documents(packed, "validation")) in (1, 2, 3)


def test_the_seed_moves_the_hash_split_and_order_does_not(tmp_path: Path) -> None:
    for number in range(60):
        (tmp_path / f"{number}.txt").write_text(text(number, 3))
        (tmp_path / f"{100 - number}.md").write_text(text(number, 3))
    one = prepared(tmp_path / "cache", f"{tmp_path}/*.txt", validation=0.2, test=0)
    other = prepared(tmp_path / "cache", f"{tmp_path}/*.txt", validation=0.2, test=0, seed=2)
    moved = prepared(tmp_path / "cache", f"{tmp_path}/*.md", validation=0.2, test=0)
    assert set(documents(one, "validation")) != set(documents(other, "validation"))
    assert set(documents(one, "validation")) == set(documents(moved, "validation"))


def test_one_text_is_cut_at_characters_in_the_tail_split(tmp_path: Path) -> None:
    content = "".join(text(seed) + "é東\U0001f600" for seed in range(30))
    (tmp_path / "a.txt").write_text(content, encoding="utf-8")
    packed = prepared(tmp_path / "cache", tmp_path / "a.txt", split="tail", validation=0.1, test=0)
    cut = int(len(content) * 0.9)
    assert documents(packed, "train") == [content[:cut]]
    assert documents(packed, "validation") == [content[cut:]]
    packed = prepared(tmp_path / "cache", tmp_path / "a.txt", split="tail", validation=0.2, test=0.1)
    assert "".join(documents(packed, name)[0] for name in ("train", "validation", "test")) == content
    assert len(documents(packed, "test")[0]) == len(content) - int(len(content) * 0.9)


def test_one_text_is_cut_in_blocks_in_the_hash_split(tmp_path: Path) -> None:
    content = "".join(text(seed, 5) + "\n" * (1 + seed % 3) for seed in range(200))
    (tmp_path / "a.txt").write_text(content)
    packed = prepared(tmp_path / "cache", tmp_path / "a.txt")
    blocks = everything(packed)
    assert sum(map(len, blocks)) == len(content)
    assert all(len(block) >= 2000 for block in blocks if not content.endswith(block))
    assert all(block in content and (block.endswith("\n\n") or content.endswith(block)) for block in blocks)
    assert packed.report["documents"]["cut"] == f"cut at blank lines into {len(blocks):,}"


@pytest.mark.parametrize(("content", "data", "said"), [
    ("too short", {}, r"1 document, too few for train, validation and test.*data\.document"),
    ("too short", {"test": 0}, "1 document, too few for train and validation"),
    ("x", {"split": "tail"}, r"1 characters, too short.*data\.validation"),
    ("one\ntwo\n", {"document": "line"}, "2 documents, too few for train, validation and test"),
    ("one\ntwo\n", {"document": "line", "split": "tail"}, "2 documents, too few"),
    ("same\nsame\nsame\nsame\n", {"document": "line"}, "1 document, too few")])
def test_a_corpus_too_short_for_its_splits_is_an_error(
        tmp_path: Path, content: str, data: dict[str, object], said: str) -> None:
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(UserError, match=said):
        prepared(tmp_path / "cache", tmp_path / "a.txt", **data)
    assert list((tmp_path / "cache").iterdir()) == []


def test_two_lines_are_enough_without_a_test_split(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    packed = prepared(tmp_path / "cache", tmp_path / "a.txt", document="line", test=0)
    assert everything(packed) == ["one", "two"]
    assert packed.count("train") == packed.count("validation") == 4


@pytest.mark.parametrize("data", [{"validation": 0.0}, {"validation": 0.9}, {"near_duplicates": 1.5},
                                  {"near_duplicates": 0.1}, {"shortest": 0},
                                  {"validation": 0.5, "test": 0.5}])
def test_impossible_settings_are_errors(data: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(data))):
        recipe_of(**data)


def test_near_copies_that_stay_are_said(tmp_path: Path) -> None:
    generator = random.Random(4)
    for number in range(12):
        content = text(number, 30)
        (tmp_path / f"{number}.txt").write_text(content)
        (tmp_path / f"{number}-copy.txt").write_text(changed(content, 0.01, generator))
    report = prepared(tmp_path / "cache", f"{tmp_path}/*.txt", near_duplicates=0, validation=0.2, test=0.2).report
    assert report["overlap"]["near"]["pairs"] > 0
    assert any("near_duplicates" in remark for remark in report["remarks"])

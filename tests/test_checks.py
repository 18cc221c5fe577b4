"""Checks: intervals, likelihood, baselines and copying, each against an independent computation."""

import hashlib
import json
import lzma
import math
import shutil
from collections import Counter
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import checked
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from handmill import folder
from handmill.checks import baselines, likelihood, memorisation
from handmill.checks import text as checks
from handmill.checks.characters import END, Spelling, documents, of, string
from handmill.checks.intervals import Figure, block_ratio, difference, ratio, share, wilson
from handmill.errors import UserError
from handmill.media.tokenizers import BPESettings, ByteSettings, CharacterSettings, train
from handmill.networks.decoder import Decoder, Settings
from handmill.verbs.check import check

CPU = torch.device("cpu")
TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), min_size=1, max_size=8)


def packed(codec, texts, split="test"):
    """What likelihood.select needs of a prepared folder."""
    pieces = [np.concatenate(([codec.end], codec.encode(text))) for text in texts]
    tokens = np.concatenate(pieces).astype(np.uint16) if pieces else np.zeros(0, np.uint16)
    starts = np.cumsum([0, *map(len, pieces)])[:-1].astype(np.int64)
    filled, empty = (tokens, starts), (np.zeros(0, np.uint16), np.zeros(0, np.int64))
    return SimpleNamespace(folder=Path("data"), tokens=lambda name: (filled if name == split else empty)[0],
                           starts=lambda name: (filled if name == split else empty)[1])


def training_codes(*texts):
    return np.concatenate([np.append(np.int32(END), of(text)) for text in texts]).astype(np.int32)


# intervals


def test_bootstrap_interval_holds_the_truth_as_often_as_it_says():
    generator, held = np.random.default_rng(0), 0
    for trial in range(300):
        sizes = generator.integers(10, 200, 60)
        bits = sizes * 2.0 + generator.normal(0, 1, 60) * sizes  # the truth is 2 bits a byte
        figure = ratio(bits, sizes, trial)
        assert figure.n == 60
        held += figure.low <= 2 <= figure.high
    assert 0.90 <= held / 300 <= 0.98


def test_block_bootstrap_holds_under_dependence_where_the_plain_one_fails():
    generator, plain, blocks = np.random.default_rng(1), 0, 0
    for trial in range(150):
        noise = generator.normal(size=600)
        for i in range(1, 600):
            noise[i] += 0.5 * noise[i - 1]
        values = 3 + noise  # the truth is 3
        a, b = ratio(values, np.ones(600), trial), block_ratio(values, np.ones(600), trial)
        plain, blocks = plain + (a.low <= 3 <= a.high), blocks + (b.low <= 3 <= b.high)
    assert plain / 150 < 0.82
    assert blocks / 150 > 0.87


def test_intervals_depend_on_the_seed_alone_and_pair_the_same_units():
    generator = np.random.default_rng(2)
    size, a = np.full(50, 10.0), generator.normal(20, 5, 50)
    assert ratio(a, size, 1) == ratio(a, size, 1) != ratio(a, size, 2)
    assert ratio(a - (a - 1), size, 1).low == pytest.approx(0.1)  # a constant gap has no spread


@pytest.mark.parametrize("units", [1, 7])
def test_too_few_units_have_no_interval(units):
    for function in (ratio, block_ratio):
        figure = function(np.arange(units) + 1.0, np.ones(units), 1)
        assert (figure.low, figure.high, figure.n) == (None, None, units)
        assert figure.value == pytest.approx((units + 1) / 2)
        assert "no interval" in figure.method


@pytest.mark.parametrize(("successes", "n", "low", "high"), [
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)])
def test_wilson_against_the_table_of_newcombe_1998(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("a", "m", "b", "n", "low", "high"), [
    (56, 70, 48, 80, 0.0524, 0.3339), (9, 10, 3, 10, 0.1705, 0.8090), (10, 10, 0, 20, 0.6791, 1.0)])
def test_difference_of_shares_against_newcombe_1998_method_10(a, m, b, n, low, high):
    first, second = (Figure(k / of_n, *wilson(k, of_n), of_n, "") for k, of_n in ((a, m), (b, n)))
    found = difference(first, second)
    assert (found.value, found.low, found.high) == pytest.approx((a / m - b / n, low, high), abs=5e-5)


def test_share_where_all_units_agree_still_has_width():
    none, some = share([0] * 32, [100] * 32, 1), share([10, 0] * 16, [100] * 32, 1)
    assert none.low == 0
    assert 0.05 < none.high < 0.15
    assert "Wilson" in none.method
    assert some.low < 0.05 < some.high
    assert "bootstrap" in some.method
    assert "Wilson" in share([10, 0] * 8, [100] * 16, 1).method  # too few to draw from


# characters


@given(TEXTS, st.sampled_from(["byte", "character", "bpe"]))
@settings(max_examples=60, deadline=None)
def test_tokens_read_as_the_characters_python_reads(texts, kind):
    made = {"byte": ByteSettings(), "character": CharacterSettings(), "bpe": BPESettings(vocabulary=270)}
    codec = train(made[kind], texts)
    spelling, tokens = Spelling(codec), packed(codec, texts).tokens("test")
    assert [string(piece) for piece in documents(spelling.read(tokens))] == [text for text in texts if text]
    assert spelling.bytes[tokens].sum() == sum(len(text.encode()) for text in texts)
    assert spelling.characters[tokens].sum() == sum(map(len, texts))


def test_reading_in_pieces_cuts_no_character(monkeypatch):
    codec, text = train(ByteSettings(), []), "aé北🙂" * 5
    tokens = packed(codec, [text, text]).tokens("test")
    for chunk in range(1, 9):
        monkeypatch.setattr("handmill.checks.characters.CHUNK", chunk)
        assert [string(piece) for piece in documents(Spelling(codec).read(tokens))] == [text, text]


# likelihood


class Fixed(torch.nn.Module):
    """The same distribution at every place."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.as_tensor(logits, dtype=torch.float32)

    def forward(self, tokens, state=None):
        return self.logits.expand(*tokens.shape, -1), None


def scores_of(network, codec, texts, context, stride, limit=0):
    selection = likelihood.select(packed(codec, texts), limit, 1)
    return selection, likelihood.score(network, selection, Spelling(codec), codec.end, context, stride, CPU)


def test_uniform_model_over_bytes_needs_log2_257_bits_a_token():
    codec, texts = train(ByteSettings(), []), ["héllo", "x" * 70, ""]
    _, scores = scores_of(Fixed(np.zeros(257)), codec, texts, 16, 8)
    assert scores.bytes.sum() == 76
    assert scores.characters.sum() == 75
    assert scores.tokens.sum() == 76 + 3  # and a closing end each
    assert scores.nats.sum() / math.log(2) == pytest.approx(79 * math.log2(257), rel=1e-6)


def test_model_that_knows_only_bytes_needs_8_bits_a_byte_and_pays_for_ends():
    codec, p = train(ByteSettings(), []), 2.0 ** -20  # of the end token
    logits = np.full(257, math.log((1 - p) / 256))
    logits[256] = math.log(p)
    _, scores = scores_of(Fixed(logits), codec, ["a" * 1000], 32, 16)
    bits = scores.nats.sum() / math.log(2) / scores.bytes.sum()
    assert bits == pytest.approx(8 + 0.020, abs=1e-4)


@given(st.lists(st.integers(0, 90), min_size=1, max_size=6), st.integers(1, 20), st.data())
@settings(max_examples=60, deadline=None)
def test_every_token_is_counted_once_with_history(lengths, context, data):
    stride = data.draw(st.integers(1, context))
    codec = train(ByteSettings(), [])
    texts = ["".join(chr(97 + (i * 7 + n) % 26) for i in range(n)) for n in lengths]
    selection, scores = scores_of(Fixed(-np.arange(257) / 50), codec, texts, context, stride)
    whole = likelihood.targets(selection, codec.end)
    assert [string(t) for t in documents(Spelling(codec).read(whole))] == [t for t in texts if t]
    expected = torch.log_softmax(-torch.arange(257) / 50, 0)
    for number, text in enumerate(texts):
        tokens = [*text.encode(), 256]
        mine = scores.document == number
        assert scores.tokens[mine].sum() == len(tokens)
        assert scores.symbols[mine].sum() == len(text) + 1
        assert scores.nats[mine].sum() == pytest.approx(-float(expected[tokens].sum()), rel=1e-5)
    plan = likelihood._plan(selection, context, stride)
    later = plan.start > selection.starts[plan.document]
    assert (plan.skip[later] >= context - stride).all()  # the history of the first token that counts
    assert (plan.length <= context).all()


@pytest.mark.parametrize("kind", ["rotary", "learned"])
def test_score_of_a_decoder_against_one_token_at_a_time(kind):
    codec = train(CharacterSettings(), ["abcdefgh "])
    torch.manual_seed(0)
    made = Settings(layers=2, width=16, heads=2, context=12, positions=kind)
    network = Decoder(made, codec.size).eval()
    for parameter in network.parameters():
        parameter.data.mul_(4)
    texts = ["abc", "hgfedcba abc abcdefgh", "", "h" * 12, "ab cd ef gh ab cd ef gh ab cd ef gh"]
    _, scores = scores_of(network, codec, texts, 12, 5)
    for number, text in enumerate(texts):
        tokens = [codec.end, *map(int, codec.encode(text)), codec.end]
        assert scores.nats[scores.document == number].sum() == pytest.approx(
            slowly(network, tokens, 12, 5), rel=1e-5), text


@torch.no_grad()
def slowly(network, tokens, context, stride):
    """Each token after its own history: all before it in the first window, else from its window's start."""
    predictions, nats = len(tokens) - 1, 0.0
    for j in range(predictions):
        window = 0 if j < context else min(-(-(j - context + 1) // stride) * stride, predictions - context)
        logits, _ = network(torch.tensor([tokens[window:j + 1]]))
        nats -= float(torch.log_softmax(logits[0, -1].double(), 0)[tokens[j + 1]])
    return nats


def test_limit_takes_whole_documents_in_random_order_and_cuts_the_last():
    codec, texts = train(ByteSettings(), []), [chr(97 + i) * (i + 5) for i in range(20)]
    selection = likelihood.select(packed(codec, texts), 60, 3)
    assert selection.predictions.sum() == 60
    assert not selection.whole
    assert (np.diff(selection.starts) > 0).all()
    everything = likelihood.select(packed(codec, texts), 0, 3)
    assert everything.whole
    full = dict(zip(everything.starts, everything.predictions, strict=True))
    cut = [n for start, n in zip(selection.starts, selection.predictions, strict=True) if n < full[start]]
    assert len(cut) <= 1
    other = likelihood.select(packed(codec, texts), 60, 4)
    assert list(other.starts) != list(selection.starts)


def test_test_split_comes_first_then_validation_then_an_error():
    codec = train(ByteSettings(), [])
    assert likelihood.select(packed(codec, ["a"], "test"), 0, 1).split == "test"
    assert likelihood.select(packed(codec, ["a"], "validation"), 0, 1).split == "validation"
    with pytest.raises(UserError, match=r"data\.test"):
        likelihood.select(packed(codec, [], "test"), 0, 1)


# baselines


def test_xz_after_the_same_text_needs_almost_nothing():
    noise = np.random.default_rng(0).integers(0, 256, 20_000).astype(np.uint8)
    alone = baselines.xz(noise)
    assert 8 * 20_000 <= alone <= 8.02 * 20_000  # random bytes cannot be compressed
    assert baselines.xz(noise, noise) < 0.02 * alone
    assert alone <= 8 * len(lzma.compress(noise.tobytes(), preset=9 | lzma.PRESET_EXTREME))


def test_excerpt_is_all_or_spread_evenly():
    codec = train(ByteSettings(), [])
    tokens = np.arange(200_000) % 256
    spelling = Spelling(codec)
    assert len(baselines.excerpt(tokens, spelling, 10**6)) == 200_000
    some = baselines.excerpt(np.arange(200_000) * 256 // 200_000, spelling, 20_000)
    assert 19_000 <= len(some) <= 20_000
    assert some[0] == 0
    assert some[-1] == 255
    assert len(np.unique(some)) > 60


@given(st.lists(st.text("abç🙂 ", max_size=30), min_size=1, max_size=4),
       st.text("abç🙂 zй", max_size=20))
@settings(max_examples=60, deadline=None)
def test_trigram_against_a_slow_model_in_fractions(texts, asked):
    model, slow = baselines.Trigram(np.append(training_codes(*texts)[1:], END)), Slow(texts)
    codes = np.append(of(asked), END).astype(np.int32)
    expected, context = [], (END, END)
    for symbol in codes.tolist():
        expected.append(-math.log(slow.probability(*context, symbol)))
        context = (context[1], symbol)
    assert model.nats(codes) == pytest.approx(expected, rel=1e-9)


class Slow:
    """Interpolated Kneser-Ney with dictionaries, from the formula in the paper."""

    def __init__(self, texts):
        three = Counter()
        for text in texts:
            symbols = [END, END, *map(ord, text), END]
            three.update(zip(symbols, symbols[1:], symbols[2:], strict=False))
        two = Counter((b, c) for _, b, c in three)
        self.counts = [Counter((c,) for _, c in two), two, three]
        self.seen = {c for (c,) in self.counts[0]} | {END}

    def probability(self, a, b, c, order=3):
        if order == 0:
            each = Fraction(1, len(self.seen) + 1)
            return each if c in self.seen else each / (0x110000 - len(self.seen) + 1)
        counts, gram = self.counts[order - 1], (a, b, c)[3 - order:]
        after = {g: n for g, n in counts.items() if g[:-1] == gram[:-1]}
        below = self.probability(a, b, c, order - 1)
        if not after:
            return below
        once, twice = sum(n == 1 for n in counts.values()), sum(n == 2 for n in counts.values())
        discount = max(Fraction(1, 10), Fraction(once, once + 2 * twice)) if once else Fraction(1, 10)
        total = sum(after.values())
        return (max(Fraction(0), after.get(gram, 0) - discount) + discount * len(after) * below) / total


def test_trigram_by_hand():
    # "aab" and no end. Trigrams ^^a, ^aa, aab once each: D = 3 / 3 = 1, so all goes to the pairs. Pairs ^a,
    # aa, ab once each: D = 1 too. Singles: a after two symbols, b after one: D = 1 / (1 + 2).
    # Seen: a, b, end, and one place for all else. p(a) = (2 - 1/3)/3 + (1/3)(2)/3 * 1/4 = 11/18
    model = baselines.Trigram(of("aab"))
    found = model.probability(*(np.array([ord(x)]) for x in "aaa"))
    assert found[0] == pytest.approx(11 / 18)


@given(st.text("abc", min_size=1, max_size=30), st.sampled_from("abcd"), st.sampled_from("abcd"))
@settings(max_examples=30, deadline=None)
def test_trigram_probabilities_sum_to_one_over_unicode(text, a, b):
    model, every = baselines.Trigram(of(text)), np.arange(END + 1)
    chances = model.probability(np.full_like(every, ord(a)), np.full_like(every, ord(b)), every)
    assert chances.min() > 0
    assert chances.sum() == pytest.approx(1, abs=1e-9)


def test_trigram_needs_8_bits_for_random_bytes_and_little_for_a_pattern():
    generator = np.random.default_rng(0)
    known, new = (generator.integers(0, 256, n).astype(np.int32) for n in (5_000, 20_000))
    bits = baselines.Trigram(known).nats(new).mean() / math.log(2)
    assert 8 < bits < 8.2
    pattern = of("abcabd" * 2000)
    assert baselines.Trigram(pattern).nats(pattern).mean() / math.log(2) < 0.4  # c or d: 1 bit in 6


# copying


ALPHABET = st.text("ab", max_size=25)


@given(st.lists(ALPHABET, min_size=1, max_size=4), st.lists(ALPHABET, min_size=1, max_size=4),
       st.lists(st.integers(1, 7), min_size=1, max_size=3, unique=True), st.integers(1, 30))
@settings(max_examples=150, deadline=None)
def test_copying_against_python(texts, training, lengths, chunk):
    codes = training_codes(*training)
    pieces = [codes[i:i + chunk] for i in range(0, len(codes), chunk)]
    counts, longest = memorisation.copied([of(t) for t in texts], pieces, lengths, len(texts))
    for length in lengths:
        windows = [[t[i:i + length] for i in range(len(t) - length + 1)] for t in texts]
        assert counts[length].windows.tolist() == [len(w) for w in windows]
        found = [sum(any(x in d for d in training) for x in w) for w in windows]
        assert counts[length].found.tolist() == found
    runs = [t[i:j] for t in texts for i in range(len(t)) for j in range(i + 1, len(t) + 1)]
    best = max((len(r) for r in runs if any(r in d for d in training)), default=0)
    assert (longest.characters if longest else 0) == best
    if longest:
        assert longest.copied in training[longest.document]
        assert longest.copied in texts[longest.text]
        assert len(longest.copied) == best


def test_copying_of_training_text_is_one_and_of_random_text_nought():
    generator = np.random.default_rng(0)
    training = ["".join(chr(97 + x) for x in generator.integers(0, 26, 3000)) + "é北🙂" for _ in range(5)]
    copies = [of(text[100:600]) for text in training] + [of(training[0][-40:])]
    random = [generator.integers(97, 123, 500).astype(np.int32) for _ in range(5)]
    counts, longest = memorisation.copied([*copies, *random], iter([training_codes(*training)]), [16, 32], 6)
    for count in counts.values():
        assert (count.found[:6] == count.windows[:6]).all()
        assert count.windows[:6].all()
        assert not count.found[6:].any()
    assert (longest.characters, longest.text, longest.document) == (500, 0, 0)


def test_windows_that_share_a_hash_are_told_apart():
    windows = memorisation.Windows(of("abcacb"), 3, base=1)  # base 1 only adds the characters up
    assert windows.base != 1
    windows.search(of("xxcacbxx"))
    assert {string(windows.codes[i:i + 3]) for i in windows.first[windows.found]} == {"cac", "acb"}


@given(st.lists(st.integers(0, END), min_size=1, max_size=40), st.data())
@settings(max_examples=60, deadline=None)
def test_rolling_hash_against_the_sum(codes, data):
    length = data.draw(st.integers(1, len(codes)))
    base = data.draw(st.integers(1, 2**64 - 1))
    found = memorisation.rolling_hash(np.array(codes, np.int32), length, base)
    for i, value in enumerate(found.tolist()):
        assert value == sum(codes[i + j] * base ** (length - 1 - j) for j in range(length)) % 2**64


# the whole check


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checked.write(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def result(model):
    return check(model, progress=False)


def test_check_of_an_untrained_model_says_so_and_is_recorded(model, result):
    receipt = folder.verify(model)
    assert receipt["check"] == json.loads(json.dumps(result))
    assert result["verdict"]["better_than_trigram"] is False
    assert result["verdict"]["better_than_xz"] is False
    assert result["verdict"]["copies"] is False
    assert result["verdict"]["good"] is False
    assert "worse than a trigram model; worse than xz" in result["verdict"]["text"]
    held = result["held_out"]
    assert (held["split"], held["whole"]) == ("test", True)
    assert held["documents"] >= 20
    assert held["tokens"] == held["bytes"] + held["documents"]


def test_figures_of_the_check_against_the_text_itself(model, result):
    loaded = folder.load(model)
    tokens = np.fromfile(model / "data/test.tokens", "<u2").astype(int)
    nats, documents = 0.0, np.split(tokens, np.flatnonzero(tokens == 256))[1:]
    for document in documents:
        sequence = [*document.tolist(), 256]
        nats += slowly(loaded.network, sequence, 32, 16)
    known = sum(len(document) - 1 for document in documents)
    found = result["likelihood"]
    assert found["bits_per_byte"]["value"] == pytest.approx(nats / math.log(2) / known, rel=1e-5)
    assert found["perplexity"]["value"] == pytest.approx(math.exp(nats / (known + len(documents))), rel=1e-4)
    assert found["bits_per_byte"]["low"] < found["bits_per_byte"]["value"] < found["bits_per_byte"]["high"]
    assert found["bits_per_byte"]["n"] == len(documents)
    trigram, train = result["baselines"]["trigram"], checks.training_split(loaded)
    texts = [bytes(d[1:].tolist()).decode() for d in documents]
    train_texts = train.codec().decode(train.tokens("train")).split(".")  # each line ends in its only full stop
    slow = baselines.Trigram(np.append(training_codes(*(t + "." for t in train_texts if t))[1:], END))
    expected = sum(slow.nats(np.append(of(t), END).astype(np.int32)).sum() for t in texts) / math.log(2) / known
    assert trigram["bits_per_byte"]["value"] == pytest.approx(expected, rel=1e-9)
    gap = trigram["bits_per_character"]["value"] - found["bits_per_character"]["value"]
    assert trigram["model_saves_bits_per_character"]["value"] == pytest.approx(gap)
    xz = [result["baselines"][name]["bits_per_byte"]["value"] for name in ("xz_trained", "xz")]
    assert xz[0] < xz[1]


def test_samples_are_kept_and_the_check_repeats_itself(model, result):
    file = model / result["samples"]["file"]
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == result["samples"]["count"] == 8
    assert hashlib.sha256(file.read_bytes()).hexdigest() == result["samples"]["sha256"]
    again = check(shutil.copytree(model, model.parent / "again"), progress=False)
    for part in ("likelihood", "baselines", "copying", "samples"):
        assert again[part] == result[part]


def test_lines_show_the_figures(result):
    shown = "\n".join(checks.lines(result))
    for figure in (result["likelihood"]["bits_per_character"], result["baselines"]["trigram"]["bits_per_character"]):
        assert f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]" in shown
    assert result["verdict"]["text"] in shown


def test_a_model_that_recites_is_found_out(model):
    loaded = folder.load(model)
    ground = checks._ground(loaded, checks.Settings(lengths=(16, 32)), progress=False)
    training = loaded.codec.decode(ground.training).split(".")
    recited = checks._copying(ground, [line.strip() for line in training[:30]])
    assert recited["more_at"] == recited["much_more_at"] == [16, 32]
    assert recited["lengths"]["32"]["generated"]["value"] == 1
    assert recited["lengths"]["32"]["held_out"]["value"] < 0.2
    fresh = checks._copying(ground, [line[::-1] for line in checked.sentences(30, 7)])
    assert fresh["more_at"] == []
    assert fresh["lengths"]["16"]["generated"]["value"] == 0
    held_out = loaded.codec.decode(ground.held_out).split(".")
    assert checks._copying(ground, held_out[:30])["more_at"] == []


def copying(more=(), much_more=()):
    return {"more_at": list(more), "much_more_at": list(much_more), "margin": 0.01}


@pytest.mark.parametrize(("low", "high", "model_low", "model_high", "expected"), [
    (0.1, 0.3, 1.4, 1.6, (True, True, "better than a trigram model; better than xz")),
    (-0.3, -0.1, 2.4, 2.6, (False, False, "worse than a trigram model; worse than xz")),
    (-0.1, 0.1, 1.9, 2.1, (None, None, "not shown to be better than a trigram model; not shown to be better than xz")),
    (None, None, None, None, (None, None, "not shown to be better than a trigram model; not shown to be better"))])
def test_verdict_says_no_more_than_the_intervals_do(low, high, model_low, model_high, expected):
    value = {"bits_per_character": {"value": 2.0, "low": model_low, "high": model_high}}
    trigram = {"model_saves_bits_per_character": {"value": 0.0, "low": low, "high": high}}
    reached = {"trigram": trigram, "xz": {"bits_per_character": {"value": 2.5}},
               "xz_trained": {"bits_per_character": {"value": 2.0}}}
    found = checks.verdict({"likelihood": value, "baselines": reached, "copying": copying()})
    assert (found["better_than_trigram"], found["better_than_xz"]) == expected[:2]
    assert found["text"].startswith(expected[2])
    assert found["good"] is (expected[0] is True)
    for row, copies, words in ((copying([16]), False, "slightly more"), (copying([16, 64], [64]), True, "copies: ")):
        found = checks.verdict({"likelihood": value, "baselines": reached, "copying": row})
        assert found["copies"] is copies
        assert words in found["text"]
        assert found["good"] is (expected[0] is True and not copies)


def test_excerpts_are_held_out_text_of_the_samples_length():
    held_out, made = [of("abcdefghij"), of("xy"), of("klmnopqrstuvwxyz")], [of("?" * n) for n in (5, 12, 40)]
    excerpts = checks._excerpts(held_out, made, 1)
    assert sum(map(len, excerpts)) >= 57
    assert [len(e) for e in excerpts[:2]] == [5, 12]
    assert all(any(string(e) in string(h) for h in held_out) for e in excerpts)
    assert max(map(len, excerpts)) == 16  # no document is longer


def test_moved_folder_measures_what_it_can_and_keeps_the_rest(model, result, tmp_path):
    moved = shutil.copytree(model, tmp_path / "moved")
    kept = check(moved, progress=False)
    assert kept["likelihood"] == result["likelihood"]
    assert kept["carried"] == {"created": folder.read_receipt(model)["check"]["created"],
                               "parts": ["trigram", "xz_trained", "copying"]}
    assert kept["copying"] == json.loads(json.dumps(result["copying"]))
    again = check(moved, progress=False)
    assert again["carried"] == kept["carried"]  # still the date of the measurement
    bare = check(moved, progress=False, samples=2, tokens=500)  # other settings: nothing to carry
    assert bare["copying"] == bare["baselines"]["trigram"] == {"missing": checks.NO_TRAINING_DATA}
    assert bare["verdict"]["better_than_trigram"] is None
    assert bare["verdict"]["copies"] is None
    assert bare["verdict"]["good"] is False
    assert bare["held_out"]["tokens"] == 500
    assert "not measured: training data is not on this machine" in "\n".join(checks.lines(bare))


def test_one_long_text_is_measured_by_blocks_of_windows(tmp_path):
    path = checked.write(tmp_path, "long", codec="character", data={"document": "file", "split": "tail"})
    found = check(path, progress=False, samples=0)
    assert found["held_out"]["documents"] == 1
    assert "blocks" in found["likelihood"]["bits_per_character"]["method"]
    assert found["likelihood"]["bits_per_character"]["n"] > 100
    assert found["copying"] == {"missing": checks.NO_SAMPLES}


@pytest.mark.parametrize(("override", "said"), [
    ({"stride": 33}, r"check\.stride = 33"), ({"tokns": 5}, "did you mean check.tokens"), ({"lengths": []}, "lengths"),
    ({"samples": -1}, "samples = -1"), ({"tokens": "many"}, "check.tokens")])
def test_wrong_settings_of_the_check_are_named(model, override, said):
    with pytest.raises(UserError, match=said):
        check(model, progress=False, **override)


def test_model_without_held_out_data_says_what_to_do(model, tmp_path):
    bare = shutil.copytree(model, tmp_path / "bare")
    shutil.rmtree(bare / "data")
    receipt = folder.read_receipt(bare)
    receipt["files"] = {k: v for k, v in receipt["files"].items() if not k.startswith("data/")}
    (bare / "receipt.json").write_text(folder.sealed(receipt))
    with pytest.raises(UserError, match=r"data\.json"):
        check(bare, progress=False)

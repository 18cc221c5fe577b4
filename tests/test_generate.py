"""Sampling: filters against `transformers`, draws against their probabilities, texts against each other."""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from handmill.errors import UserError
from handmill.families import sampling as filters
from handmill.families.autoregressive import Sampling, Text, encode, generate, greedy
from handmill.folder import Model
from handmill.media import tokenizers
from handmill.verbs import generate as verb

BYTES = tokenizers.Tokenizer("byte")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny.load(tmp_path_factory.mktemp("generate") / "tiny")


@pytest.fixture(scope="module", params=["default", "gpt2", "llama", "lstm", "transformer_xl"])
def each(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    network = getattr(tiny, request.param.upper())
    return tiny.load(tmp_path_factory.mktemp("each") / request.param, network=network)


def some_logits(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(5, 40, generator=generator, dtype=torch.float64)  # (B, V)


# filters

@pytest.mark.parametrize(("ours", "theirs", "value"), [
    (filters.top_k, "TopKLogitsWarper", 1), (filters.top_k, "TopKLogitsWarper", 7),
    (filters.top_k, "TopKLogitsWarper", 90), (filters.top_p, "TopPLogitsWarper", 0.05),
    (filters.top_p, "TopPLogitsWarper", 0.6), (filters.top_p, "TopPLogitsWarper", 0.95),
    (filters.min_p, "MinPLogitsWarper", 0.02), (filters.min_p, "MinPLogitsWarper", 0.5),
])
def test_filters_keep_what_transformers_keep(ours: Callable[..., Tensor], theirs: str, value: Any) -> None:
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = some_logits()
    expected = getattr(process, theirs)(value)(torch.zeros(5, 1, dtype=torch.long), logits.clone())
    assert torch.equal(ours(logits, value), expected)


@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.8])
def test_the_penalty_is_that_of_transformers(penalty: float) -> None:
    process = pytest.importorskip("transformers.generation.logits_process")
    logits, text = some_logits(), torch.randint(40, (5, 9), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(5, 40, dtype=torch.bool).scatter(1, text, True)
    expected = process.RepetitionPenaltyLogitsProcessor(penalty)(text, logits.clone())
    assert (filters.penalise(logits, seen, penalty) - expected).abs().max() < 1e-12


def test_the_penalty_lowers_every_seen_token() -> None:
    logits = some_logits()
    lowered = filters.penalise(logits, torch.ones_like(logits, dtype=torch.bool), 1.5)
    assert (lowered < logits).all()


@given(st.integers(0, 10_000), st.floats(0.001, 1.0))
@settings(max_examples=60, deadline=None)
def test_the_nucleus_is_the_smallest_that_holds_p(seed: int, p: float) -> None:
    logits = some_logits(seed)
    kept = filters.top_p(logits, p).isfinite()
    for probability, keep in zip(logits.softmax(-1), kept, strict=True):
        ordered = probability.sort(descending=True).values
        count = int(keep.sum())
        assert ordered[:count].sum() >= p - 1e-12
        assert count == 1 or ordered[:count - 1].sum() < p + 1e-12
        assert probability[keep].min() >= probability[~keep].max() if (~keep).any() else True


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_temperature_divides_the_logits(temperature: float) -> None:
    logits, none = some_logits(), torch.zeros(5, 40, dtype=torch.bool)
    got = filters.filtered(logits, none, temperature=temperature, k=0, p=1.0, least=0.0, penalty=1.0)
    assert (got.softmax(-1) - (logits / temperature).softmax(-1)).abs().max() < 1e-12


def test_temperature_zero_is_the_likeliest_token() -> None:
    logits, none = some_logits(), torch.zeros(5, 40, dtype=torch.bool)
    got = filters.filtered(logits, none, temperature=0.0, k=3, p=0.5, least=0.1, penalty=1.0)
    assert torch.equal(filters.draw(got, 3, range(5), 0), logits.argmax(-1))


@given(st.integers(0, 1000), st.floats(0.0, 3.0), st.integers(0, 50), st.floats(0.001, 1.0),
       st.floats(0.0, 1.0), st.floats(0.5, 3.0))
@settings(max_examples=60, deadline=None)
def test_every_mix_of_filters_leaves_a_token(seed: int, t: float, k: int, p: float, least: float,
                                             penalty: float) -> None:
    logits = some_logits(seed)
    got = filters.filtered(logits, logits > 1, temperature=t, k=k, p=p, least=least, penalty=penalty)
    assert got.isfinite().any(-1).all()
    drawn = filters.draw(got, seed, range(5), 0)
    assert got.gather(1, drawn[:, None]).isfinite().all()


def test_a_broken_network_is_noticed() -> None:
    logits, none = torch.tensor([[0.0, torch.nan]]), torch.zeros(1, 2, dtype=torch.bool)
    with pytest.raises(AssertionError, match="not a number"):
        filters.filtered(logits, none, temperature=1.0, k=0, p=1.0, least=0.0, penalty=1.0)


# draws

def test_draws_follow_the_probabilities() -> None:
    probability = torch.tensor([[0.5, 0.0, 0.25, 0.15, 0.1]], dtype=torch.float64)
    draws = 4000
    counts = Counter(int(filters.draw(probability.log(), 7, [0], step)) for step in range(draws))
    assert counts[1] == 0
    expected = [p * draws for p in probability[0].tolist()]
    chi2 = sum((counts[i] - e) ** 2 / e for i, e in enumerate(expected) if e)
    assert chi2 < 16.3  # the 0.1 % point with 3 degrees of freedom


def test_uniform_numbers_are_uniform_and_depend_on_all_three() -> None:
    some = range(12)
    numbers = [filters.uniform(seed, row, step) for seed in some for row in some for step in some]
    assert len(set(numbers)) == len(numbers)
    assert min(numbers) >= 0
    assert max(numbers) < 1
    worst = max(abs((i + 1) / len(numbers) - x) for i, x in enumerate(sorted(numbers)))
    assert worst < 1.95 / math.sqrt(len(numbers))  # Kolmogorov-Smirnov at 0.1 %
    assert filters.uniform(1, 2, 3) == filters.uniform(1, 2, 3)


def test_a_draw_does_not_depend_on_the_other_rows() -> None:
    logits = some_logits()
    together = filters.draw(logits, 5, [3, 9, 4, 0, 1], 2)
    alone = [int(filters.draw(logits[i:i + 1], 5, [row], 2)) for i, row in enumerate([3, 9, 4, 0, 1])]
    assert together.tolist() == alone


# settings

@pytest.mark.parametrize(("wrong", "says"), [
    ({"temperature": -0.1}, "temperature = -0.1 must be 0 or more"),
    ({"temperature": math.nan}, "temperature"), ({"temperature": math.inf}, "temperature"),
    ({"top_k": -1}, "top_k"), ({"top_p": 0.0}, "top_p"),
    ({"top_p": 1.1}, "top_p"), ({"top_p": math.nan}, "top_p"), ({"min_p": -0.1}, "min_p"),
    ({"min_p": 1.5}, "min_p"), ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ({"max_tokens": 0}, "max_tokens"), ({"stop": ["a", ""]}, "empty string"),
    ({"temprature": 1.0}, "did you mean sampling.temperature"),
    ({"seed": -1}, "seed"), ({"seed": 1.5}, "seed"),
    ({"top_k": 1.5}, "sampling.top_k = 1.5 must be a whole number"),
    ({"runtime": "tpu"}, "runtime = 'tpu' is not known"),
])
def test_wrong_settings_are_refused(model: Model, wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        verb.generate(model, ["a"], **wrong)


# texts

def texts(model: Model, prompts: list[str], cached: bool = True, seed: int = 1, **settings: Any) -> list[str]:
    made = [""] * len(prompts)
    for piece in generate(model.network, model.codec, prompts, Sampling(**settings), seed, cached):
        made[piece.row] += piece.text
    return made


PROMPTS = ["", "Hello", "The quick brown fox jumps over the lazy dog, and again, and again!", "x" * 48]
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0}, {"temperature": 0.8, "top_k": 20}, {"top_p": 0.9, "min_p": 0.01},
    {"repetition_penalty": 1.3, "temperature": 0.5}]


@pytest.mark.parametrize("how", SETTINGS)
def test_cached_equals_uncached_token_by_token(each: Model, how: dict[str, Any]) -> None:
    """120 tokens with a context of 48: it fills up several times, and at another time in each row."""
    settings = Sampling(**how, max_tokens=120)
    one = list(generate(each.network, each.codec, PROMPTS, settings, 1))
    two = list(generate(each.network, each.codec, PROMPTS, settings, 1, cached=False))
    assert one == two
    assert sum(p.tokens for p in one if p.finish) > 300


@pytest.mark.parametrize("how", SETTINGS)
def test_many_at_once_equal_one_by_one(each: Model, how: dict[str, Any]) -> None:
    together = texts(each, PROMPTS, **how, max_tokens=90)
    for i, prompt in enumerate(PROMPTS):
        pieces = generate(each.network, each.codec, [prompt], Sampling(**how, max_tokens=90), 1, first=i)
        assert "".join(piece.text for piece in pieces) == together[i]


@torch.no_grad()
def test_generate_is_the_plain_loop(each: Model) -> None:
    """Greedy text against the shortest program that makes it: all tokens through the network each time."""
    tokens = encode(each.codec, "Hello")
    for _ in range(30):
        tokens.append(int(each.network(torch.tensor([tokens]))[0][0, -1].argmax()))
    made = tokens[6:]
    if each.codec.end in made:
        made = made[:made.index(each.codec.end)]
    assert texts(each, ["Hello"], temperature=0.0, max_tokens=30) == [each.codec.decode(made)]
    assert greedy(each.network, tokens[:6], 30) == tokens[6:]
    assert greedy(each.network, tokens[:6], 90) == greedy(each.network, tokens[:6], 90, cached=False)


def test_the_full_context_goes_on_from_its_last_half(model: Model) -> None:
    context = model.recipe.network.context
    made = greedy(model.network, [7] * context, 5)
    window = ([7] * context + made[:1])[-(context // 2):]
    assert made[1:] == greedy(model.network, window, 4)


def test_of_a_long_prompt_the_tail_is_kept(model: Model) -> None:
    long = "abcdefghij" * 30
    assert texts(model, [long], max_tokens=20) == texts(model, [long[-100:]], max_tokens=20)
    assert texts(model, [long], max_tokens=20) != texts(model, [long[:-1]], max_tokens=20)


def test_the_same_seed_gives_the_same_text_and_another_another(model: Model) -> None:
    assert texts(model, ["a", "a"], seed=5) == texts(model, ["a", "a"], seed=5)
    one, two = texts(model, ["a", "a"], seed=5)
    assert one != two
    assert texts(model, ["a"], seed=6) != [one]
    assert verb.generate(model, ["a"]) != verb.generate(model, ["a"])  # without a seed


def test_turns_do_not_change_texts(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = verb.generate(model, ["a", "bc", "d"], seed=2, max_tokens=20)
    monkeypatch.setattr(verb, "AT_ONCE", 2)
    assert verb.generate(model, ["a", "bc", "d"], seed=2, max_tokens=20) == expected
    assert verb.generate(model, [], seed=2) == []


def test_streaming_gives_the_same_text(model: Model) -> None:
    parts = list(verb.stream(model, "Hello", seed=3, max_tokens=80))
    assert len(parts) > 20
    assert all(parts)
    assert "".join(parts) == verb.generate(model, ["Hello"], seed=3, max_tokens=80)[0]


def test_max_tokens_and_finish(model: Model) -> None:
    pieces = list(generate(model.network, model.codec, ["a"], Sampling(max_tokens=7, temperature=0.0), 1))
    assert [p.tokens for p in pieces] == list(range(1, 8))
    assert [p.finish for p in pieces] == [""] * 6 + ["length"]


def test_the_end_token_ends_a_sample(model: Model) -> None:
    """A network to which the end token is certain after the letter e, and impossible elsewhere."""
    network = model.network

    class Ending:
        settings, padded = network.settings, network.padded

        def __call__(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
            logits, state = network(tokens, state)
            logits[..., model.codec.end] = torch.where(tokens == ord("e"), 1e4, -1e4)
            return logits, state

    pieces = list(generate(Ending(), model.codec, ["bee", "boo"], Sampling(max_tokens=999), 1))
    ends = {p.row: p for p in pieces if p.finish}
    assert ends[0].finish == "stop"
    assert ends[0].tokens == 0
    made = ["".join(p.text for p in pieces if p.row == row) for row in (0, 1)]
    assert made[0] == ""
    assert "e" in made[1]
    assert made[1].index("e") == len(made[1]) - 1
    assert ends[1].finish == "stop"


def test_a_repetition_penalty_makes_tokens_rarer(model: Model) -> None:
    plain = texts(model, ["a"], temperature=0.3, max_tokens=200)[0]
    varied = texts(model, ["a"], temperature=0.3, max_tokens=200, repetition_penalty=3.0)[0]
    assert len(set(varied)) > len(set(plain))


def test_evaluation_mode_is_demanded(model: Model) -> None:
    model.network.train()
    try:
        with pytest.raises(AssertionError, match="eval"):
            texts(model, ["a"])
    finally:
        model.network.eval()


# stop strings, UTF-8

@pytest.mark.parametrize("stop", [("e",), ("zz", "th"), ("never there",)])
def test_a_stop_string_ends_the_text_before_it(model: Model, stop: tuple[str, ...]) -> None:
    for seed in range(6):
        free = list(generate(model.network, model.codec, ["a"], Sampling(max_tokens=200), seed))
        whole = "".join(p.text for p in free)
        cut = min([at for s in stop if (at := whole.find(s)) >= 0], default=len(whole))
        settings = Sampling(stop=stop, max_tokens=200)
        pieces = list(generate(model.network, model.codec, ["a"], settings, seed))
        assert "".join(p.text for p in pieces) == whole[:cut]
        assert pieces[-1].finish == (free[-1].finish if cut == len(whole) else "stop")


LETTERS = "ab<|é🙂"


STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=5), max_size=3)


@given(st.text(LETTERS, max_size=30), STOPS, st.data())
@settings(max_examples=300, deadline=None)
def test_streaming_never_shows_part_of_a_stop(text: str, stop: list[str], data: st.DataObject) -> None:
    """Tokens cut anywhere: what is shown is final, and it ends before the stop string complete first."""
    raw = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=12)))
    tokens = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    joiner, shown = Text(tokens, stop), ""
    found = [(at + len(s), at) for s in stop if (at := text.find(s)) >= 0]
    at = min(found)[1] if found else len(text)
    for i in range(len(tokens)):
        shown += joiner.add(i)
        assert text[:at].startswith(shown)
    stopped = joiner.stopped
    shown += joiner.end()
    assert shown == text[:at]
    assert stopped == (at < len(text))


@given(st.lists(st.integers(0, 255), max_size=40))
@settings(max_examples=200, deadline=None)
def test_joined_tokens_are_decoded_tokens(tokens: list[int]) -> None:
    """Any bytes at all, broken UTF-8 included, read the same in parts as at once."""
    joiner = Text(BYTES.token_bytes)
    assert "".join([joiner.add(token) for token in tokens] + [joiner.end()]) == BYTES.decode(tokens)


def test_a_character_is_shown_when_its_last_byte_has_come() -> None:
    joiner = Text(BYTES.token_bytes)
    assert [joiner.add(byte) for byte in "é🙂".encode()] == ["", "é", "", "", "", "🙂"]
    assert joiner.add(0xC3) == ""
    assert joiner.end() == "\N{REPLACEMENT CHARACTER}"


# codecs

def test_an_unknown_character_is_named(tmp_path: Path) -> None:
    model = tiny.load(tmp_path / "character", codec="character")
    with pytest.raises(UserError, match="'ß', which is not in the training text"):
        verb.generate(model, ["The", "Theß cat"])
    with pytest.raises(UserError, match="'ß'"):
        verb.stream(model, "ß")
    assert len(verb.generate(model, ["The 北京"], max_tokens=9, seed=1)[0]) <= 9


@pytest.mark.parametrize("codec", ["byte", "bpe", "character"])
def test_every_codec_streams(tmp_path: Path, codec: str) -> None:
    model = tiny.load(tmp_path / codec, codec=codec)
    assert encode(model.codec, "The cat")[0] == model.codec.end
    assert model.codec.decode(encode(model.codec, "The cat → 北京 🙂")) == "The cat → 北京 🙂"
    parts = list(verb.stream(model, "The", seed=1, max_tokens=60))
    assert "".join(parts) == verb.generate(model, ["The"], seed=1, max_tokens=60)[0]
    assert sum(map(len, parts)) > 10

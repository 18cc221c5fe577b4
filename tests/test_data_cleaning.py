"""Cleaning, boilerplate, secrets and e-mail addresses, languages."""

import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from corpora import everything, prepared, text
from hypothesis import given, settings
from hypothesis import strategies as st

from handmill.data.cleaning import Boilerplate, clean, without
from handmill.data.languages import language
from handmill.data.sensitive import Findings, emails, scan, secrets

MESSY = st.text(st.one_of(st.characters(), st.sampled_from("\r\n\ufeff\x00\x1b\x7f\x85\t e\u0301\u1100\u1161\ud800")))


@given(MESSY)
@settings(deadline=None, max_examples=400)
def test_cleaning_twice_changes_nothing_more(content: str) -> None:
    once = clean(content)
    assert clean(once) == once


@given(MESSY)
@settings(deadline=None, max_examples=400)
def test_clean_text_holds_nothing_it_should_not(content: str) -> None:
    done = clean(content)
    assert not [c for c in done if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"]
    assert unicodedata.is_normalized("NFC", done)
    assert not done.startswith("\ufeff")
    done.encode()


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126)))
def test_plain_text_is_left_alone(content: str) -> None:
    assert clean(content + "\n\ttab\n") == content + "\n\ttab\n"


def test_cleaning_counts_what_it_does() -> None:
    counts: Counter[str] = Counter()
    assert clean("\ufeffe\u0301\r\nb\rc\x00\x07", counts) == "é\nb\nc"
    assert counts == {"control characters": 2, "carriage returns": 2, "byte order marks": 1,
                      "texts brought to NFC": 1}


def test_clean_false_leaves_the_text_as_it_is(tmp_path: Path) -> None:
    texts = [f"{text(seed)}\r\ne\u0301\x07 \ufeff\n" for seed in range(4)]
    for number, content in enumerate(texts):
        (tmp_path / f"{number}.txt").write_bytes(content.encode())
    assert everything(prepared(tmp_path / "cache", f"{tmp_path}/*.txt", clean=False)) == sorted(texts)
    assert everything(prepared(tmp_path / "cache", f"{tmp_path}/*.txt")) == sorted(map(clean, texts))


def files(folder: Path, suffix: str, count: int = 12) -> list[str]:
    folder.mkdir()
    notice = "All rights reserved by the Example Company, 2024."
    texts = [f"{text(seed, 1)}\n{notice}\n{text(seed + 50, 14)}" for seed in range(count)]
    for number, content in enumerate(texts):
        (folder / f"{number}{suffix}").write_text(content)
    return [content.replace(notice + "\n", "") for content in texts]


def test_lines_that_many_documents_begin_with_go(tmp_path: Path) -> None:
    expected = files(tmp_path / "in", ".txt")
    packed = prepared(tmp_path / "cache", tmp_path / "in")
    assert everything(packed) == sorted(expected)
    assert packed.report["boilerplate"]["lines"] == 12
    assert packed.report["boilerplate"]["top"] == [
        {"line": "All rights reserved by the Example Company, 2024.", "documents": 12}]


@pytest.mark.parametrize(("suffix", "count", "settings_"), [
    (".py", 12, {}), (".txt", 9, {}), (".txt", 12, {"boilerplate": 0.0}), (".txt", 12, {"clean": False})])
def test_boilerplate_stays_in_code_small_corpora_and_when_asked(
        tmp_path: Path, suffix: str, count: int, settings_: dict[str, float]) -> None:
    files(tmp_path / "in", suffix, count)
    packed = prepared(tmp_path / "cache", tmp_path / "in", **settings_)
    assert all("All rights reserved" in document for document in everything(packed))


def test_only_edges_are_searched_for_boilerplate() -> None:
    line = "a line of at least twenty characters"
    seen = Boilerplate(0.3)
    inner = "\n".join("abcdefg"[i % 7] * 30 + str(i) for i in range(60))
    for _ in range(20):
        seen.see(f"{inner}\n{line}\n{inner}")
    assert line not in seen.lines()
    assert without(f"{line}\n{inner}\n{line}\n{inner}\n{line}", [line]) == (f"{inner}\n{line}\n{inner}", 2)


def test_boilerplate_is_found_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handmill.data.cleaning._KEPT", 50)
    seen = Boilerplate(0.3)
    for number in range(500):
        seen.see(f"unique line of document {number}\n" + ("page header that comes back" if number % 2 else "") + "\nx")
        assert len(seen.counts) <= 53
    assert list(seen.lines()) == ["page header that comes back"]


KEYS = {
    "AWS access key": "AKIA" + "IOSFODNN7EXAMPLE",
    "GitHub token": "ghp_" + "a1B2" * 9,
    "Slack token": "xoxb-" + "123456789012-abcdef",
    "Google API key": "AIza" + "Sy0" * 11 + "ab",
    "Stripe key": "sk_live_" + "4eC39HqLyjWDarjtT1",
    "sk- key": "sk-" + "proj-abc123DEF456ghi789jkl",
    "JSON web token": "eyJ" + "hbGciOiJIUzI1NiJ9.eyJ" + "zdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w",
    "private key": "-----BEGIN RSA PRIVATE " + "KEY-----",
    "assigned secret": 'api_key = "' + 'q9X2' + 'vT7mK4pL8wZ1nB6yR3' + '"',
}


@pytest.mark.parametrize("kind", KEYS)
def test_every_kind_of_secret_is_found(kind: str) -> None:
    found = [(name, value) for name, value, _ in secrets(f"some text\nkey {KEYS[kind]} and more text")]
    assert [name for name, _ in found] == [kind]
    assert found[0][1] in KEYS[kind]


@pytest.mark.parametrize("harmless", [
    "The secret of the token is a password: patience and twenty more characters.",
    "token = self.tokenizer.convert_tokens_to_ids", "password: correcthorsebatterystaple",
    "sha = 3a7bd3e2360a3d29eea436fcfb7e44c735d117c4", "AKIA is short", "task-specific-language-model-training",
    'secret_number = "12345678901234567890"'])
def test_ordinary_text_is_no_secret(harmless: str) -> None:
    assert list(secrets(harmless)) == []


@pytest.mark.parametrize(("content", "expected"), [
    ("mail jane.doe+x@mail.example.org now", ["jane.doe+x@mail.example.org"]),
    ("a@b.co,c@d.de", ["a@b.co", "c@d.de"]), ("@decorator and me@localhost and x @ y.z", []),
    ("é@example.org", []), ("@" * 1000, [])])
def test_email_addresses(content: str, expected: list[str]) -> None:
    assert [value for value, _ in emails(content)] == expected


def test_findings_are_counted_placed_and_not_repeated() -> None:
    found, addresses = Findings(), Findings()
    body = "".join(f"line {i}\nuser{i}@example.org {KEYS['AWS access key']}\n" for i in range(30))
    scan(body, "a.txt", 5, False, found, addresses)
    assert addresses.counts == {"e-mail address": 30}
    assert found.counts == {"AWS access key": 30}
    assert len(addresses.first) == 20
    assert addresses.first[1] == {"kind": "e-mail address", "document": "a.txt", "line": 8,
                                  "value": "us… (17 characters)"}
    assert not any("IOSFODNN" in str(finding) for finding in found.first)


def test_the_report_names_the_line_of_a_secret(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"{text(1)}{KEYS['GitHub token']}\n{text(2)}")
    (tmp_path / "b.jsonl").write_text("".join(
        f'{{"text": "{text(seed, 1)[:-1]}\\n\\n\\n me@example.org"}}\n' for seed in (5, 6, 7)))
    report = prepared(tmp_path / "cache", f"{tmp_path}/*.*").report
    assert report["secrets"]["counts"] == {"GitHub token": 1}
    assert report["secrets"]["first"][0]["line"] == 13
    assert [finding["line"] for finding in report["emails"]["first"]] == [1, 2, 3]
    assert "a1B2a1" not in str(report)


SAMPLES = {
    "English": "It was a bright cold day in April, and the clocks were striking thirteen when he came in.",
    "German": "Der Hund ist nicht in dem Haus, und die Katze schläft auf dem Dach, wenn es warm ist.",
    "French": "Longtemps, je me suis couché de bonne heure, et la nuit n'était pas encore dans le jardin.",
    "Spanish": "En un lugar de la Mancha, de cuyo nombre no quiero acordarme, no ha mucho tiempo que vivía.",
    "Italian": "Nel mezzo del cammin di nostra vita mi ritrovai per una selva oscura, che non era la via.",
    "Portuguese": "O homem não sabia que a casa era muito antiga, mas ele gostava do jardim e da rua.",
    "Dutch": "De man liep door het bos en hij zag dat er een grote hond voor het huis stond te wachten.",
    "Swedish": "Det var en gång en flicka som hade en röd luva och hon gick till sin mormor i skogen.",
    "Polish": "To nie jest prawda, że on był w domu i czytał książkę, ale już tam nie mieszka od dawna.",
    "Turkish": "Bir gün çok güzel bir kedi vardı ve bu kedi her şey için daha fazla süt istedi ama yoktu.",
    "Japanese": "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。",
    "Chinese": "北京是中国的首都，历史悠久，文化丰富。",
    "Korean": "안녕하세요. 오늘은 날씨가 정말 좋습니다.",
    "Cyrillic script": "Все счастливые семьи похожи друг на друга.",
    "Greek": "Η θάλασσα είναι γαλάζια και ο ουρανός καθαρός.",
    "unknown": "Basen staling gurten certa disy dirtud foso gurty barten balud stala dirting.",
}


@pytest.mark.parametrize("name", SAMPLES)
def test_languages(name: str) -> None:
    assert language(SAMPLES[name]) == name


def test_languages_in_the_report(tmp_path: Path) -> None:
    for number, content in enumerate([*SAMPLES.values()][:6]):
        (tmp_path / f"{number}.txt").write_text(content)
    (tmp_path / "a.py").write_text("print('the and of to in is that it was for with as his')")
    languages = prepared(tmp_path / "cache", f"{tmp_path}/*.*").report["languages"]
    assert languages["estimated"] is True
    assert set(languages["shares"]) == {"code", *[*SAMPLES][:6]}
    assert sum(languages["shares"].values()) == pytest.approx(1, abs=1e-3)

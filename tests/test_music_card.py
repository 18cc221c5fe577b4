"""The card of a music model: true, clear about what is missing, playing its samples, without paths of the machine."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import musical
import pytest

from handmill import folder, page
from handmill.card import NOT_CHECKED
from handmill.card import music as parts
from handmill.checks.tables import percent, shown
from handmill.media import sound
from handmill.media.music_tokens import Events, EventSettings
from handmill.media.notes import Note, Piece
from handmill.page import Raw, Section
from handmill.verbs.card import card
from handmill.verbs.check import check

pytest.importorskip("mido")

NAMED = musical.CHORALES | {"names": []}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("runs")
    data = {"paths": [str(musical.album(home / "album"))], "names": "folder", "validation": 0.2, "test": 0.2,
            "transpose": 2, "licence": "CC0-1.0"}
    path = musical.write(home / "model", codec=NAMED, data=data)
    check(path, progress=False, samples=6, sample_tokens=60, ngrams=[2, 3])
    return path


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


def written(path: Path) -> tuple[str, str]:
    """The Markdown, unescaped for reading, and the HTML."""
    markdown, html = (file.read_text(encoding="utf-8") for file in card(path))
    return re.sub(r"\\(.)", r"\1", markdown), html


def record(path: Path, change: dict[str, Any]) -> None:
    folder.record(path, "check", folder.read_receipt(path)["check"] | change)


def test_card_tells_vocabulary_data_figures_copying_and_licence(model: Path) -> None:
    markdown, html = written(model)
    receipt, report = folder.read_receipt(model), json.loads((model / "data/report.json").read_text())
    found, source = receipt["check"], json.loads((model / "data/manifest.json").read_text())["sources"][0]
    novelty, style = found["novelty"]["found"], found["style"]
    said = ["A music model", "54,321", "chords on a grid, ", "4 steps a quarter note", "C2 to A5 (MIDI 36 to 81)",
            "4 at once", "key (24), tempo (3), name (2)", "48 tokens", source["sha256"], "CC0-1.0",
            f"| pieces kept | {report['pieces']['kept']} |", f"| notes (in each step that they sound in) | "
            f"{report['totals']['notes']:,} |", "even 5, odd 5", "up to 2 semitones up and down",
            *map(shown, (found["likelihood"][name] for name in ("nats_per_frame", "nats_per_note", "nats_per_token"))),
            "nats per frame (step of 1/4 quarter note), over all frames", "trigram model",
            *(shown(style["scale_consistency"][side]) for side in ("generated", "held_out")),
            *(percent(novelty["steps_in_a_row"][n]["generated"]) for n in "23"), "in any key",
            f"{found['pitch_classes']['generated'][0]:.1%}", shown(found["pitch_classes"]["distance"]),
            found["verdict"]["text"], "not to be passed off", "under copyright stays so", "a tempo, in classes",
            "a name (even, odd)", "does not tell a note that is held", "samples/check-0.mid"]
    for value in said:
        assert value in markdown, value
    for key, count in report["keys"]["pieces"].items():
        assert f"{key} {count}" in markdown
    for split, part in report["splits"].items():
        assert f"| {split} | {part['documents']} | {part['tokens']:,} | {part['notes']:,} |" in markdown
    for title in ("Use and limits", "Data", "Training", "Quality on held-out pieces", "Samples beside held-out pieces",
                  "Copying from the training pieces", "Samples", "Exports", "Settings", "Licence"):
        assert f"\n## {title}\n" in markdown
    for file in ("data/roll.png", "samples/check.png"):
        assert f"]({file})" in markdown
    assert html.count("data:image/png;base64,") == 2


class Page(HTMLParser):
    """The players of a page: their captions, notes and recordings."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.captions: list[str] = []
        self.data: list[Any] = []
        self.sources: list[str] = []
        self.inside = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        kind = dict(attrs).get("type")
        self.inside = "json" if kind == "application/json" else tag
        if tag == "audio":
            self.sources.append(str(dict(attrs)["src"]))

    def handle_data(self, data: str) -> None:
        if self.inside == "figcaption":
            self.captions.append(data)
        if self.inside == "json":
            self.data.append(json.loads(data))

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""


def test_samples_play_in_the_html_and_are_named_in_the_markdown(model: Path) -> None:
    markdown, html = written(model)
    read = Page(html)
    assert [caption for caption in read.captions if caption.startswith("Sample")][1:] == [f"Sample {i}" for i in
                                                                                         range(6)]
    made = [json.loads(line)["tokens"] for line in (model / "samples/check.jsonl").read_text().splitlines()]
    assert len(made) == 6
    scores = [folder.load(model).codec.score(tokens) for tokens in made]
    assert [len(player["notes"]) for player in read.data] == [len(score.notes) for score in scores]
    first = read.data[0]["notes"][0]
    assert (first[0], first[2]) == (round(1000 * float(scores[0].seconds(scores[0].notes[0].start))),
                                    scores[0].notes[0].pitch)
    wav = sound.from_bytes(page.base64.b64decode(read.sources[0].removeprefix("data:audio/wav;base64,")))
    assert 0 < wav.seconds < 16
    assert abs(wav.samples).max() > 0.05
    assert "<script" not in markdown
    assert "A player of them is in card.html; as MIDI files they are samples/check-0.mid" in markdown
    assert "The first 6 of 6, not chosen, asked for nothing with seed 1" in markdown


def test_no_path_of_the_machine_gets_in(model: Path) -> None:
    for text in written(model):
        assert str(model.parent) not in text
        assert not re.search(r"(?<![\w<.])/(home|tmp|work|root|private|Users)\b", text)
        assert "http" not in text


def test_card_without_a_check_says_so(copy: Path) -> None:
    record(copy, {"weights": "0" * 64})
    markdown, html = written(copy)
    assert markdown.count(NOT_CHECKED) == 4  # at the head and in three sections
    assert "None recorded: `handmill check` makes them" in markdown
    assert "do not rely on either" in markdown
    assert "<audio" not in html


def test_parts_that_were_not_measured_say_why(copy: Path) -> None:
    gone = {"missing": "not measured: training data is not on this machine"}
    check_ = folder.read_receipt(copy)["check"]
    record(copy, {"novelty": {"found": gone}, "pitch_classes": gone, "style": gone,
                  "baselines": check_["baselines"] | {"trigram": gone}})
    markdown = written(copy)[0]
    assert markdown.count("Not measured: training data is not on this machine.") == 2
    assert "entropy of single tokens" in markdown
    for name in ("novelty", "style", "likelihood", "samples", "verdict"):
        receipt = folder.read_receipt(copy)
        del receipt["check"][name]
        (copy / "receipt.json").write_text(folder.sealed(receipt))
    markdown = written(copy)[0]
    for said in ("Not measured: likelihood.", "Not measured: style.", "Not measured: found.",
                 "None recorded: `handmill check` makes them"):
        assert said in markdown, said


def test_card_of_a_bare_folder_names_what_is_missing(copy: Path) -> None:
    receipt = folder.read_receipt(copy)
    shutil.rmtree(copy / "data")
    files = {name: entry for name, entry in receipt["files"].items() if not name.startswith("data/")}
    (copy / "receipt.json").write_text(folder.sealed({"format": receipt["format"], "files": files}))
    markdown = written(copy)[0]
    for said in ("Not recorded: the sources", "Not recorded: how the pieces", "Not drawn: the loss curve", "None made",
                 "Not recorded: the licence", "| steps | not recorded |"):
        assert said in markdown, said
    assert "not recorded" in str(parts.data(copy, {"pieces": {"read": 3}}))


@pytest.mark.parametrize("content", ["", "{", "[]\n", '{"tokens": 5}\n', '{"tokens": ["x"]}\n', '{"text": "x"}\n'])
def test_samples_that_are_none_are_not_played(copy: Path, content: str) -> None:
    (copy / "samples/check.jsonl").write_text(content)
    assert "None recorded" in written(copy)[0]


def test_a_receipt_cannot_play_other_files(copy: Path) -> None:
    (copy.parent / "secret.jsonl").write_text('{"tokens": [0, 70]}\n')
    for name in ("../secret.jsonl", str(copy.parent / "secret.jsonl"), "", "samples"):
        record(copy, {"samples": {"file": name, "count": 1}})
        assert "None recorded" in written(copy)[0]


def test_raw_html_is_in_the_html_alone(tmp_path: Path) -> None:
    blocks = [Raw("<b>player</b>", "A *player* stands in card.html.")]
    assert "<b>player</b>" in page.html([Section("t", blocks)], tmp_path)
    assert "<b>" not in page.markdown([Section("t", blocks)])
    assert r"A \*player\* stands in card.html." in page.markdown([Section("t", blocks)])


def test_a_long_piece_is_shown_in_part() -> None:
    notes = [Note(0, 700, 60), Note(650, 660, 64)]
    assert parts._within("Sample 0", notes, 600) == Piece("Sample 0, the first 10 min 00 s", [Note(0, 600, 60)])
    assert parts._within("Sample 0", notes, 700) == Piece("Sample 0", notes)


def test_events_and_a_melody_are_told(tmp_path: Path) -> None:
    assert parts._asked(Events(EventSettings())) == ("It was not told keys, tempos or names and cannot be asked for "
                                                     "any.")
    markdown = written(musical.write(tmp_path / "piano", codec=musical.PIANO, network=musical.LSTM))[0]
    for said in ("events in free time, ", "10 ms, 4 velocities", "| programs | 0 (General MIDI, from 0) |",
                 "no beats, bars or voices", "| can be asked for | nothing |", "1 layers, 16 wide"):
        assert said in markdown, said
    markdown = written(musical.write(tmp_path / "harmoniser", codec=musical.HARMONISER))[0]
    assert "4 at once; the highest one is given, and it puts the others under it" in markdown

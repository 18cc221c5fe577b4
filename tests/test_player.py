"""The player's HTML: well formed, complete, escaped, asking nothing of the network; its script run where node is."""

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handmill.errors import UserError
from handmill.media import player
from handmill.media.notes import COLOURS, DRUMS, FAMILIES, Note, Piece
from handmill.media.player import Recording, fragment
from handmill.media.sound import Sound, wav_bytes

NOTES = [Note(0.5 * i, 0.5 * i + 0.25, 60 + i, 100, 8 * i if i else DRUMS, i % 2) for i in range(8)]
WAV = wav_bytes(Sound(np.zeros(100, np.float32), 8000))


class Page(HTMLParser):
    """The elements of a page; it complains of a tag that does not close what was open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag != "input":  # it has no end
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.setdefault(self.open[-1], []).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def data(page: Page) -> list[dict[str, Any]]:
    """What the script reads, piece by piece."""
    return [json.loads(text) for text in page.text["script"] if text.startswith("{")]


def test_pieces_stand_in_order_with_what_they_need() -> None:
    page = Page(fragment([Piece("one", NOTES), Recording("two", WAV), Piece("three", NOTES[:3])], ("alto",)))
    assert page.text["figcaption"] == ["one", "two", "three"]
    assert [len(page.all(tag)) for tag in ("div", "canvas", "button", "audio", "style")] == [5, 2, 2, 1, 1]
    source = page.all("audio")[0]["src"] or ""
    assert base64.b64decode(source.removeprefix("data:audio/wav;base64,")) == WAV
    assert page.all("canvas")[0]["aria-label"] == "Piano roll: 8 notes from C4 to G4 in 4 seconds"
    assert [page.all("input")[0][key] for key in ("type", "max")] == ["range", "3.75"]
    assert page.text["span"][:2] == ["alto", "voice 2"]


def test_notes_arrive_with_instruments_and_colours() -> None:
    piece, = data(Page(fragment([Piece("one", NOTES)])))
    assert piece["seconds"] == 3.75
    assert piece["colours"] == list(COLOURS[:2])
    assert [note[:4] for note in piece["notes"]] == [[500 * i, 500 * i + 250, 60 + i, 100] for i in range(8)]
    assert [note[5] for note in piece["notes"]] == [0, 1] * 4
    sounds = [piece["instruments"][note[4]] for note in piece["notes"]]
    assert "tone" in sounds[0]
    assert [s["partials"][0] for s in sounds[1:]] == [
        round(player.TIMBRES[name].partials[0], 4) for name in FAMILIES[1:8]]


def test_nothing_is_asked_of_the_network() -> None:
    text = fragment([Piece("one", NOTES), Recording("two", WAV)])
    assert not re.search(r"https?:|//[a-z]|@import|url\(|fetch\(|XMLHttp|<link|<iframe", text)
    assert all(not (attributes.get("src") or "data:").startswith(("http", "/")) for _, attributes in Page(text).found)


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=40), st.text(max_size=20))
def test_titles_and_names_are_escaped(title: str, name: str) -> None:
    shown = fragment([Piece(title, NOTES), Recording(title, WAV), Piece(title, [])], (name, "</script><b>"))
    plain = fragment([Piece("", NOTES), Recording("", WAV), Piece("", [])], ("", "</script><b>"))
    assert [tag for tag, _ in Page(shown).found] == [tag for tag, _ in Page(plain).found]
    Page(fragment([Piece("</figure><script>alert(1)</script>\"'", NOTES)]))
    assert data(Page(shown)) == data(Page(plain))


def test_sizes_are_bounded_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(player, "_MOST_NOTES", 10)
    monkeypatch.setattr(player, "_MOST_BYTES", len(WAV) + 10)
    text = fragment([Piece("a", NOTES), Piece("b", NOTES), Piece("c", NOTES), Recording("d", WAV), Recording("e", WAV)])
    page = Page(text)
    assert [len(piece["notes"]) for piece in data(page)] == [8, 2]
    assert page.text["figcaption"][1] == "b (the first 2 of 8 notes)"
    assert page.text["p"] == ["Too many notes for this page: 8.", "Too large for this page: a wav file of 0.0 MiB."]
    assert len(page.all("audio")) == 1


def test_empty_and_wrong_pieces() -> None:
    page = Page(fragment([Piece("none", []), Piece("short", [Note(0, 0, 60)])]))
    assert page.text["p"] == ["No notes."]
    assert data(page)[0]["seconds"] > 0  # the script divides by it
    assert Page(fragment([])).all("figure") == []
    with pytest.raises(UserError, match="no MIDI note"):
        fragment([Piece("", [Note(0, 1, 400)])])


# A document and an audio context of just what the script uses; it prints what was scheduled.
_BROWSER = """
const log = [];
let clock = 0;
const param = (node, name) => new Proxy({}, {get: (_, what) => (...a) => log.push([node, name, what, ...a])});
class Node {
  constructor(context, options) { this.kind = new.target.name; this.frequency = param(options?.frequency, "frequency");
    this.gain = param(this.kind, "gain"); }
  connect(to) { return to; } disconnect() {} setPeriodicWave(wave) { this.wave = wave; }
  start(when) { log.push([this.kind, "start", when]); } stop(when) { log.push([this.kind, "stop", when]); } }
class GainNode extends Node {} class OscillatorNode extends Node {
  constructor(context, options) { super(context, options); log.push(["hertz", options.frequency]); } }
class BiquadFilterNode extends Node {} class DynamicsCompressorNode extends Node {}
class AudioBufferSourceNode extends Node {}
class AudioContext { sampleRate = 8000; destination = {}; resume() {} get currentTime() { return clock; }
  createBuffer(c, n) { return {getChannelData: () => new Float32Array(n)}; }
  createPeriodicWave(a, b) { return b; } }
class ResizeObserver { constructor(f) { this.f = f; } observe() { this.f(); } }
const element = more => ({listeners: {}, attributes: {}, dataset: {}, clientWidth: 300, clientHeight: 100,
  addEventListener(kind, f) { this.listeners[kind] = f; }, setAttribute(k, v) { this.attributes[k] = v; },
  getAttribute(k) { return this.attributes[k]; },
  getContext: () => new Proxy({}, {get: () => () => {}, set: () => true}), ...more});
const parts = {script: element({textContent: JSON.stringify(DATA)}), button: element(), input: element({value: 0}),
               output: element(), canvas: element()};
parts.button.attributes["aria-label"] = "Play x";
const figure = element({querySelector: q => parts[q]});
const document = {querySelectorAll: () => [figure], createElement: () => element()};
const devicePixelRatio = 2, frames = [], timers = [];
const requestAnimationFrame = f => frames.push(f);
globalThis.setInterval = f => timers.push(f); globalThis.clearInterval = () => {}; globalThis.setTimeout = () => {};
"""
_PLAYED = """
parts.button.listeners.click();
const ahead = log.filter(entry => entry[1] === "start").length;
for (clock = 0.25; clock < 6; clock += 0.25) { timers[0](); frames.shift()?.(); }
console.log(JSON.stringify({log, ahead, said: parts.output.textContent, label: parts.button.attributes["aria-label"],
                            bar: parts.input.value}));
"""


@pytest.mark.skipif(not shutil.which("node"), reason="node is not installed")
def test_the_script_plays_every_note_at_its_time() -> None:
    page = Page(fragment([Piece("one", NOTES)]))
    code = f"const DATA = {json.dumps(data(page)[0])};" + _BROWSER + player._SCRIPT + _PLAYED
    done = subprocess.run(["node", "-"], input=code, capture_output=True, text=True, timeout=60)
    assert not done.returncode, done.stderr
    told = json.loads(done.stdout)
    starts = sorted({entry[2] for entry in told["log"] if entry[1] == "start"})
    assert starts == pytest.approx([0.05 + 0.5 * i for i in range(8)])
    assert told["ahead"] < 8  # the rest was scheduled as time went on
    hertz = [entry[1] for entry in told["log"] if entry[0] == "hertz"]
    assert hertz[-7:] == pytest.approx([440 * 2 ** ((note.pitch - 69) / 12) for note in NOTES[1:]])
    assert told["said"] == "0:03 / 0:03"
    assert told["label"] == "Play x"  # it stopped at the end
    assert told["bar"] == 3.75

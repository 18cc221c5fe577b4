"""Music to play in a page: HTML that stands alone and asks nothing of the network.

A recording is an audio element that holds its wav file. Notes get a piano roll on a canvas, whose cursor moves, and
are played by the browser's own oscillators (W3C, "Web Audio API 1.1") with the partials and envelopes of
media/synthesis.py.
"""

import base64
import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, NamedTuple

from handmill.media.notes import DRUMS, Note, Piece, duration, family, ordered, pitch_name
from handmill.media.piano_roll import colours_of, group
from handmill.media.synthesis import LONGEST, TIMBRES, drum_of

_MOST_NOTES = 20_000  # of a fragment, about half a megabyte
_MOST_BYTES = 32 * 2**20  # of the wav files in a fragment
_PARTIALS = 24
_SHORTEST = 0.1  # seconds of a piece


class Recording(NamedTuple):
    """A wav file under a title."""

    title: str
    wav: bytes


def fragment(pieces: Iterable[Piece | Recording], names: Sequence[str] = ()) -> str:
    """One <div> with a player for each piece, in order; several fragments may stand on one page.

    `names` are of the voices. A fragment holds at most 20,000 notes, of which the last piece may be cut, and 32 MiB of
    wav files; in the place of what goes beyond stands a sentence. Raises UserError for a note out of range.
    """
    notes, size, parts = _MOST_NOTES, _MOST_BYTES, []
    for piece in pieces:
        if isinstance(piece, Recording):
            parts.append(_recording(piece, size))
            size -= len(piece.wav) if len(piece.wav) <= size else 0
        else:
            parts.append(_notes(piece, names, notes))
            notes -= min(notes, len(piece.notes))
    return (f'<div class="music">\n<style>{_STYLE}</style>\n' + "\n".join(parts)
            + f"\n<script>{_SCRIPT}</script>\n</div>")


def _recording(piece: Recording, room: int) -> str:
    if len(piece.wav) > room:
        return _instead(piece.title, f"Too large for this page: a wav file of {len(piece.wav) / 2**20:,.1f} MiB.")
    data = base64.b64encode(piece.wav).decode()
    return (f'<figure class="recording"><figcaption>{escape(piece.title)}</figcaption>'
            f'<audio controls preload="metadata" src="data:audio/wav;base64,{data}"></audio></figure>')


def _notes(piece: Piece, names: Sequence[str], room: int) -> str:
    notes = ordered(piece.notes, LONGEST)
    if not notes:
        return _instead(piece.title, "No notes.")
    if not room:
        return _instead(piece.title, f"Too many notes for this page: {len(notes):,}.")
    shown = notes[:room]
    cut = f" (the first {room:,} of {len(notes):,} notes)" if len(notes) > room else ""
    seconds = max(duration(shown), _SHORTEST)
    low, high = (pitch_name(choose(note.pitch for note in shown)) for choose in (min, max))
    told = f"Piano roll: {len(shown):,} notes from {low} to {high} in {seconds:.0f} seconds"
    colours = colours_of(shown, "voice", names)
    legend = "".join(f'<span><i style="background:{colour}"></i>{escape(what)}</span>'
                     for what, colour in colours.items()) if len(colours) > 1 else ""
    data = json.dumps(_data(shown, colours, names), separators=(",", ":")).replace("<", "\\u003c")
    return (f'<figure class="notes"><figcaption>{escape(piece.title)}{cut}</figcaption>'
            f'<div class="bar"><button type="button" aria-label="Play {escape(piece.title)}">Play</button>'
            f'<input type="range" min="0" max="{seconds:.2f}" step="0.01" value="0" aria-label="Position in seconds">'
            f'<output>{_clock(0)} / {_clock(seconds)}</output></div>'
            f'<canvas role="img" aria-label="{told}"></canvas><div class="legend">{legend}</div>'
            f'<noscript>JavaScript plays this.</noscript>'
            f'<script type="application/json">{data}</script></figure>')


def _instead(title: str, sentence: str) -> str:
    return f"<figure><figcaption>{escape(title)}</figcaption><p>{escape(sentence)}</p></figure>"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _data(notes: Sequence[Note], colours: dict[str, str], names: Sequence[str]) -> dict[str, Any]:
    """What the script reads: each note as start ms, end ms, pitch, velocity, instrument, colour."""
    groups = list(colours)
    instruments = list(dict.fromkeys(_instrument(note) for note in notes))
    return {"seconds": max(round(duration(notes), 3), _SHORTEST), "colours": list(colours.values()),
            "instruments": [_sounding(name, key) for name, key in instruments],
            "notes": [[round(1000 * note.start), round(1000 * note.end), note.pitch, note.velocity,
                       instruments.index(_instrument(note)), groups.index(group(note, "voice", names))]
                      for note in notes]}


def _instrument(note: Note) -> tuple[str, int]:
    """Family, and key of percussion."""
    return family(note.program), note.pitch if note.program == DRUMS else 0


def _sounding(name: str, key: int) -> dict[str, Any]:
    """A timbre or drum for the script, times in seconds."""
    if name == "drums":
        drum = drum_of(key)
        return {"tone": drum.tone, "hertz": drum.hertz, "sweep": drum.sweep, "ring": drum.ring, "hiss": drum.hiss,
                "bright": drum.bright}
    timbre = TIMBRES[name]
    return {"partials": [round(amplitude, 4) for amplitude in timbre.partials[:_PARTIALS]], "attack": timbre.attack,
            "decay": timbre.decay, "sustain": timbre.sustain, "release": timbre.release}


_STYLE = """
.music figure { margin: 1rem 0 }
.music audio { width: 100% }
.music .bar { display: flex; gap: .75rem; align-items: center; margin: .3rem 0 }
.music input { flex: 1; min-width: 4rem }
.music output { font-variant-numeric: tabular-nums; font-size: .9rem }
.music button { font: inherit; min-width: 4.5rem; padding: .2rem .8rem; border-radius: 6px; cursor: pointer;
  border: 1px solid var(--line, #bbb); background: var(--wash, #f5f7f8); color: inherit }
.music canvas { display: block; width: 100%; height: 11rem; border-radius: 6px; background: #fff; cursor: pointer }
.music .legend { font-size: .85rem; margin: .3rem 0 }
.music .legend span { margin-right: 1rem; white-space: nowrap }
.music .legend i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .35em }
"""

_SCRIPT = """
(() => {
  "use strict";
  const AHEAD = 1.5;  // seconds scheduled: a tab in the background is woken once a second
  let context = null, playing = null;

  const clock = s => Math.floor(s / 60) + ":" + String(Math.floor(s % 60)).padStart(2, "0");

  function noise() {
    const buffer = context.createBuffer(1, 2 * context.sampleRate, context.sampleRate);
    const x = buffer.getChannelData(0);
    for (let i = 0, seed = 1; i < x.length; i++) {
      seed = (Math.imul(seed, 1664525) + 1013904223) | 0;
      x[i] = seed / 2 ** 31;
    }
    return buffer;
  }

  function fading(node, level, when, rise, fall, end, into) {
    const gain = new GainNode(context, {gain: 0});
    gain.gain.setValueAtTime(0, when);
    gain.gain.linearRampToValueAtTime(level, when + rise);
    gain.gain.setTargetAtTime(0, when + rise, fall);
    node.connect(gain).connect(into);
    node.start(when);
    node.stop(end);
  }

  function drum(d, level, when, into) {
    if (d.tone > 0) {
      const tone = new OscillatorNode(context, {frequency: d.hertz});
      tone.frequency.setValueAtTime(d.hertz * 2 ** d.sweep, when);
      tone.frequency.setTargetAtTime(d.hertz, when, 0.02);
      fading(tone, level * d.tone, when, 0.001, d.ring, when + 7 * d.ring, into);
    }
    const hiss = new AudioBufferSourceNode(context, {buffer: context.noise ??= noise(), loop: true});
    const filter = new BiquadFilterNode(context, d.bright > 0 ? {type: "highpass", frequency: 3000 * d.bright}
                                                             : {type: "lowpass", frequency: d.bright < 0 ? 500 : 9000});
    filter.connect(into);
    fading(hiss, level * (1 - d.tone), when, 0.001, d.hiss, when + 7 * d.hiss, filter);
  }

  function tone(t, pitch, level, when, end, into) {
    t.wave ??= context.createPeriodicWave(new Float32Array(t.partials.length + 1),
                                          new Float32Array([0, ...t.partials]));
    const source = new OscillatorNode(context, {frequency: 440 * 2 ** ((pitch - 69) / 12)});
    source.setPeriodicWave(t.wave);
    const gain = new GainNode(context, {gain: 0}), off = Math.max(end, when + t.attack);
    const decay = t.sustain ? t.decay : t.decay * 2 ** ((60 - pitch) / 24);
    gain.gain.setValueAtTime(0, when);
    gain.gain.linearRampToValueAtTime(level, when + t.attack);
    gain.gain.setTargetAtTime(level * t.sustain, when + t.attack, decay);
    gain.gain.setTargetAtTime(0, off, t.release);
    source.connect(gain).connect(into);
    source.start(when);
    source.stop(off + 8 * t.release);
  }

  function player(figure) {
    const data = JSON.parse(figure.querySelector("script").textContent);
    const [button, bar, output, canvas] = ["button", "input", "output", "canvas"].map(q => figure.querySelector(q));
    const title = button.getAttribute("aria-label").slice(5);
    const roll = document.createElement("canvas");
    let from = 0, begun = 0, next = 0, timer = 0, into = null;

    const now = () => into ? Math.min(data.seconds, from + Math.max(0, context.currentTime - begun)) : from;

    function schedule() {
      for (; next < data.notes.length && data.notes[next][0] / 1000 < now() + AHEAD; next++) {
        const [start, end, pitch, velocity, instrument] = data.notes[next];
        if (end / 1000 < from || (start / 1000 < from && end === start)) continue;
        const at = s => begun + Math.max(s / 1000, from) - from;
        const level = 0.3 * (velocity / 127) ** 2, sound = data.instruments[instrument];
        if (sound.partials) tone(sound, pitch, level, at(start), at(end), into);
        else if (start / 1000 >= from) drum(sound, level, at(start), into);
      }
    }

    function play() {
      playing?.();
      context ??= new AudioContext();
      context.resume();
      if (from >= data.seconds) from = 0;
      into = new GainNode(context);
      into.connect(new DynamicsCompressorNode(context)).connect(context.destination);
      [begun, next, playing] = [context.currentTime + 0.05, 0, stop];
      schedule();
      timer = setInterval(schedule, 200);
      button.textContent = "Pause";
      button.setAttribute("aria-label", "Pause " + title);
      requestAnimationFrame(frame);
    }

    function stop() {
      from = now();
      clearInterval(timer);
      const fading = into;
      fading.gain.setTargetAtTime(0, context.currentTime, 0.02);
      setTimeout(() => fading.disconnect(), 200);
      into = playing = null;
      button.textContent = "Play";
      button.setAttribute("aria-label", "Play " + title);
      show();
    }

    function seek(seconds) {
      const again = into !== null;
      if (again) stop();
      from = Math.min(Math.max(0, seconds), data.seconds);
      if (again) play(); else show();
    }

    function frame() {
      if (!into) return;
      if (now() >= data.seconds && context.currentTime > begun + data.seconds - from + 0.5) return stop();
      show();
      requestAnimationFrame(frame);
    }

    function show() {
      bar.value = now();
      output.textContent = clock(now()) + " / " + clock(data.seconds);
      const pen = canvas.getContext("2d"), x = now() / data.seconds * canvas.width;
      pen.clearRect(0, 0, canvas.width, canvas.height);
      if (roll.width && roll.height) pen.drawImage(roll, 0, 0);
      pen.fillStyle = "#c22";
      pen.fillRect(x - devicePixelRatio, 0, 2 * devicePixelRatio, canvas.height);
    }

    function draw() {
      for (const c of [canvas, roll]) {
        c.width = Math.max(1, Math.round(canvas.clientWidth * devicePixelRatio));
        c.height = Math.max(1, Math.round(canvas.clientHeight * devicePixelRatio));
      }
      const pen = roll.getContext("2d");
      let low = 127, high = 0;
      for (const note of data.notes) { low = Math.min(low, note[2]); high = Math.max(high, note[2]); }
      const room = Math.max(2, 12 - (high - low) >> 1);
      [low, high] = [low - room, high + room];
      const tall = roll.height / (high - low + 1), y = pitch => (high - pitch) * tall;
      for (let pitch = low; pitch <= high; pitch++) {
        pen.fillStyle = [1, 3, 6, 8, 10].includes((pitch % 12 + 12) % 12) ? "#f1f3f5" : "#fff";
        pen.fillRect(0, y(pitch), roll.width, tall + 1);
      }
      pen.fillStyle = "#6b7077";
      pen.font = 10 * devicePixelRatio + "px system-ui, sans-serif";
      for (let pitch = 12 * Math.ceil(low / 12); pitch <= high; pitch += 12) {
        pen.fillRect(0, y(pitch) + tall, roll.width, 1);
        pen.fillText("C" + (pitch / 12 - 1), 3, y(pitch) + tall - 2);
      }
      for (const [start, end, pitch, velocity, , colour] of data.notes) {
        const scale = roll.width / data.seconds / 1000;
        pen.globalAlpha = 0.3 + 0.7 * velocity / 127;
        pen.fillStyle = data.colours[colour];
        pen.fillRect(start * scale, y(pitch) + tall * 0.05, Math.max(1.5, (end - start) * scale - 1), tall * 0.9);
      }
      pen.globalAlpha = 1;
      show();
    }

    figure.dataset.ready = "";
    button.addEventListener("click", () => into ? stop() : play());
    bar.addEventListener("input", () => seek(Number(bar.value)));
    canvas.addEventListener("click", e => seek(e.offsetX / canvas.clientWidth * data.seconds));
    new ResizeObserver(draw).observe(canvas);
  }

  document.querySelectorAll(".music figure.notes:not([data-ready])").forEach(player);
})();
"""

"""Archives and model folders from elsewhere: refused in a sentence; nothing runs, nothing outside is touched.

Every verb runs in a process of its own with a limit of memory and of time. Files around the folder are compared after.
"""

import hashlib
import json
import os
import shutil
import stat
import sys
from pathlib import Path
from typing import Any

import harness
import hostile
import limited
import pytest
import tiny_images
from test_data import MUSIC, picture, song

VERBS = {"generate": ("{}", "a", "--max-tokens", "5"), "check": ("{}", "samples=2", "sample_tokens=8"),
         "serve": ("{}",), "export": ("{}", "--to", "onnx"), "card": ("{}",),
         "compare": ("{}", "{}-twin", "--out", "{}/compare")}
# what a card says stands elsewhere, and so does what is compared of a model that was checked
NOT_LOADED = ("pickle under another name", "safetensors that lies", "recipe of another network", "tokenizer that grows")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of memory and devices are Linux's")


def around(home: Path, *but: str) -> dict[str, str]:
    """Every file below `home` with its content, but for some folders in it."""
    return {file.relative_to(home).as_posix(): os.readlink(file) if file.is_symlink() else
            hashlib.sha256(file.read_bytes()).hexdigest() if stat.S_ISREG(file.lstat().st_mode) else "other"
            for file in sorted(home.rglob("*")) if not {*file.relative_to(home).parts[:1]} & {*but}}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as `train` leaves it."""
    home = harness.data(tmp_path_factory.mktemp("sound"))
    command = harness.words("gpt", home, home / "runs" / "gpt", "training.steps=2")
    harness.finish(command, home / "log")
    shutil.rmtree(home / "runs" / "gpt" / "checkpoints")
    code, said = limited.ended(["check", str(home / "runs" / "gpt"), "samples=2", "sample_tokens=8"], home / "log")
    assert code == 0, said
    return home / "runs" / "gpt"


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of images whose codec is a model folder."""
    return tiny_images.write(tmp_path_factory.mktemp("latents") / "model", "latents")


def beside(model: Path, home: Path) -> Path:
    """A copy of the model with things beside it that are not to be touched."""
    shutil.copytree(model, home / "model")
    shutil.copytree(model, home / "model-twin")
    (home / "outside").mkdir()
    (home / "outside" / "data.json").write_text("{}")
    (home / "secret.jsonl").write_text('{"text": "the secret"}\n')
    (home / "victim").write_text("as it was")
    return home / "model"


def withstood(model: Path, attack: hostile.Attack, verbs: list[str], home: Path, unread: tuple[str, ...] = ()) -> int:
    """How many verbs refused the attacked folder in one sentence; only the `unread` may do their work, as they never
    come upon what was attacked. Nothing else happens."""
    refused = 0
    for name in verbs:
        shutil.rmtree(home, ignore_errors=True)
        path = beside(model, home)
        attack(path)
        before, log = around(home, "model"), home.parent / "log"
        code, said = limited.ended([name, *(word.format(path) for word in VERBS[name])], log)
        assert "Traceback" not in said, said[-3000:]
        assert code == 2 or (code == 0 and name in unread), (name, code, said)
        lines = [line for line in said.splitlines() if line.startswith(f"handmill {name}: ")]
        assert len(lines) == (code == 2), said
        assert code == 0 or len(lines[0]) < 1000, len(lines[0])
        assert "\x1b" not in said
        assert around(home, "model", *(["model-twin"] if name == "compare" else [])) == {
            file: content for file, content in before.items() if name != "compare" or not file.startswith("model-twin")}
        refused += code == 2
    return refused


def unread(kind: str, case: str) -> tuple[str, ...]:
    """The verbs that may do their work on an attacked folder."""
    if case in ("data", "report", "manifest"):  # these only say where the data came from
        return tuple(VERBS)
    if case == "witness beyond":
        return tuple(verb for verb in VERBS if verb != "serve")
    if kind in hostile.ARRAYS:
        return "generate", "serve", "export", "card", "compare"
    return ("card", "compare") if kind in NOT_LOADED or case == "tokenizer" else ()


def cases(table: dict[str, dict[str, hostile.Attack]]) -> list[Any]:
    """Quick: each attack through one verb, in turn; the others through all."""
    found: list[Any] = []
    for kind, attacks in table.items():
        turns = [(case, attack, [list(VERBS)[i % len(VERBS)]]) for i, (case, attack) in enumerate(attacks.items())]
        found.append(pytest.param(kind, turns, id=kind.replace(" ", "-")))
        full = [(case, attack, list(VERBS)) for case, attack in attacks.items()]
        found.append(pytest.param(kind, full, id=f"{kind.replace(' ', '-')}-all-verbs", marks=pytest.mark.faults))
    return found


@pytest.mark.parametrize(("kind", "turns"), cases(hostile.ATTACKS))
def test_a_folder_made_to_do_harm_is_refused(sound: Path, tmp_path: Path, kind: str, turns: list[Any]) -> None:
    count = 0
    for case, attack, verbs in turns:
        count += withstood(sound, attack, verbs, tmp_path / "home", unread(kind, case))
    tried = sum(len(verbs) for _, _, verbs in turns)
    harness.tell("folder from elsewhere", kind, f"{tried} verbs on it: {count} refused it in one sentence, "
                 f"{tried - count} never read it; nothing outside was touched")


@pytest.mark.parametrize(("kind", "turns"), cases(hostile.ARRAYS))
def test_an_array_with_a_pickle_is_not_opened(sound: Path, tmp_path: Path, kind: str, turns: list[Any]) -> None:
    for case, attack, verbs in turns:
        withstood(sound, attack, [*verbs, "check"], tmp_path / "home", unread(kind, case))
    harness.tell("folder from elsewhere", kind, "refused by the check, never read by other verbs; no code ran")


@pytest.mark.parametrize(("kind", "turns"), cases(hostile.OF_IMAGES))
def test_a_codec_made_to_do_harm_is_refused(latents: Path, tmp_path: Path, kind: str, turns: list[Any]) -> None:
    """Generating and serving, as its codec is loaded for both; what a card says of it is not."""
    for _, attack, _ in turns:
        assert withstood(latents, attack, ["serve"], tmp_path / "home") == 1
    harness.tell("folder from elsewhere", kind, f"{len(turns)} of {len(turns)} refused in one sentence")


def test_a_card_quotes_nothing_from_outside(sound: Path, tmp_path: Path) -> None:
    path = beside(sound, tmp_path / "home")
    hostile.told(path, lambda receipt: receipt["check"]["samples"].update(file="../secret.jsonl"))
    code, said = limited.ended(["card", str(path)], tmp_path / "log")
    assert code == 0, said
    assert "the secret" not in (path / "card.md").read_text()
    harness.tell("folder from elsewhere", "samples that lie outside it", "the card does not quote them")


@pytest.mark.parametrize("medium", ["image", "music"])
@pytest.mark.parametrize("bomb", [40_000_000, pytest.param(1_500_000_000, marks=pytest.mark.faults)])
def test_a_zip_made_to_do_harm_gives_its_good_entries(tmp_path: Path, medium: str, bomb: int) -> None:
    """Bombs are refused by what their header says, unpack to no more than that, or are not packed by deflate."""
    home = tmp_path / "home"
    (home / "in").mkdir(parents=True)
    (home / "victim").write_text("as it was")
    make, suffix = (picture, ".png") if medium == "image" else (song, ".mid")
    good = {f"{'ab'[i % 2]}/{i}{suffix}": make(i) for i in range(14)}
    bad = hostile.archive(home / "in" / "all.zip", good, bomb)
    before = around(home)
    sources = trained(medium, home / "in", tmp_path / "run")
    assert around(home) == before
    assert sources["left_out"] == len(bad)
    for name, said in bad.items():
        shown = name.replace("\x07", "\\x07").replace("\x1b", "\\x1b")
        assert any(f"all.zip/{shown}: " in line and said in line for line in sources["first_left_out"]), name
    assert not any("\x1b" in line for line in sources["first_left_out"])
    harness.tell("archive from elsewhere", f"{medium}: ../ and absolute paths, links, double and strange names, bombs "
                 f"of {bomb:,} bytes, a zip in the zip", f"{len(bad)} of {len(bad)} entries left out and named, the "
                 f"other {len(good)} trained on; nothing outside was touched")


def trained(medium: str, folder: Path, out: Path) -> dict[str, Any]:
    """What a run on the folder, within limits, left out."""
    settings = [*harness.COMMON, f"data.paths=['{folder}']", "training.steps=1", "--out", str(out)]
    recipe, *tiny = MUSIC if medium == "music" else harness.FAMILIES["ddpm"]
    tiny = [*tiny, "training.batch=4", "data.largest=1000000"] if medium == "image" else tiny
    code, said = limited.ended(["train", recipe, *tiny, *settings], out.with_suffix(".log"))
    assert code == 0, said
    return dict(json.loads((out / "data" / "report.json").read_text())["sources"])


def test_archives_that_claim_more_than_there_is_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(14):
        (folder / f"{i}.png").write_bytes(picture(i))
    hostile.overlapping_zip(folder / "overlap.zip", 65_000, 7_000_000)
    hostile.huge_array(folder / "header.npz", header=True)
    hostile.huge_array(folder / "images.npz", header=False)
    sources = trained("image", folder, tmp_path / "run")
    assert sources["left_out"] == 3, sources
    harness.tell("archive from elsewhere", "65,000 overlapping entries; arrays that claim 4 GB of header, 2^40 images",
                 "3 of 3 left out and named within 20 s of computing and 2 GB of memory")

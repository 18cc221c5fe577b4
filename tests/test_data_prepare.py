"""Packing, the cache, the report, and preparations that fail half way."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from corpora import documents, everything, prepared, recipe_of, text

from handmill.data.packed import Packed
from handmill.data.text_prepare import prepare
from handmill.data.text_report import report_lines
from handmill.errors import UserError
from handmill.media.tokenizers import BPESettings, ByteSettings, CharacterSettings

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inside = tmp_path / "in"
    inside.mkdir()
    for number in range(30):
        (inside / f"{number:02}.txt").write_text(text(number, 5 + number % 7))
    return inside


@pytest.mark.parametrize("codec", [CharacterSettings(), ByteSettings(), BPESettings(vocabulary=300)],
                         ids=["character", "byte", "bpe"])
def test_the_packed_folder(tmp_path: Path, folder: Path, codec: object) -> None:
    packed = prepared(tmp_path / "cache", folder, codec=codec, validation=0.1, test=0.1)
    assert packed.folder.parent == tmp_path / "cache"
    assert packed.folder.name == packed.fingerprint
    names = sorted(p.relative_to(packed.folder).as_posix() for p in packed.folder.rglob("*") if p.is_file())
    assert names == sorted(["data.json", "hashes.json", "manifest.json", "report.json", "codec/tokenizer.json"] + [
        f"{split}.{end}" for split in ("train", "validation", "test") for end in ("tokens", "starts.npy")])
    tokenizer = packed.codec()
    for split in ("train", "validation", "test"):
        tokens, starts = packed.tokens(split), packed.starts(split)
        assert isinstance(tokens, np.memmap)
        assert tokens.dtype == np.uint16
        assert (len(tokens), len(starts)) == (packed.count(split), packed.documents(split))
        assert starts.tolist() == np.flatnonzero(tokens == tokenizer.end).tolist()
        assert starts[0] == 0
        assert starts.dtype == np.int64
        assert int(tokens.max()) < tokenizer.size
    assert everything(packed) == sorted(text(number, 5 + number % 7) for number in range(30))
    assert list((tmp_path / "cache").iterdir()) == [packed.folder]


def test_a_prepared_corpus_is_used_again(tmp_path: Path, folder: Path) -> None:
    first = prepared(tmp_path / "cache", folder)
    before = {p: p.stat().st_mtime_ns for p in first.folder.rglob("*")}
    assert prepared(tmp_path / "cache", folder).folder == first.folder
    assert {p: p.stat().st_mtime_ns for p in first.folder.rglob("*")} == before


def test_equal_settings_give_equal_files(tmp_path: Path, folder: Path) -> None:
    one = prepared(tmp_path / "one", folder, codec=BPESettings(vocabulary=300))
    other = prepared(tmp_path / "other", folder, codec=BPESettings(vocabulary=300))
    assert (one.fingerprint, one.content) == (other.fingerprint, other.content)
    for path in one.folder.rglob("*"):
        if path.is_file() and path.name not in ("report.json", "hashes.json"):  # the report tells of times
            assert path.read_bytes() == (other.folder / path.relative_to(one.folder)).read_bytes()


def test_the_fingerprint_covers_settings_seed_codec_and_files(tmp_path: Path, folder: Path) -> None:
    marks = [prepared(tmp_path / "cache", folder, **settings).fingerprint for settings in (
        {}, {"seed": 2}, {"codec": CharacterSettings()}, {"clean": False}, {"validation": 0.1})]
    (folder / "03.txt").write_text(text(99, 4))
    marks.append(prepared(tmp_path / "cache", folder).fingerprint)
    os.utime(folder / "04.txt", ns=(1, 1))
    marks.append(prepared(tmp_path / "cache", folder).fingerprint)
    assert len(set(marks)) == 7


@pytest.mark.parametrize("damage", ["data.json", "train.tokens", "validation.starts.npy", "codec/tokenizer.json",
                                    "report.json"])
@pytest.mark.parametrize("how", ["gone", "cut"])
def test_a_damaged_cache_is_made_again(tmp_path: Path, folder: Path, damage: str, how: str) -> None:
    packed = prepared(tmp_path / "cache", folder)
    file = packed.folder / damage
    content = file.read_bytes()
    file.unlink() if how == "gone" else file.write_bytes(content[:len(content) // 2])
    again = prepared(tmp_path / "cache", folder)
    assert again.complete()
    if damage != "report.json":  # it holds the seconds taken
        assert file.read_bytes() == content


def test_held_out_splits_open_without_the_training_split(tmp_path: Path, folder: Path) -> None:
    packed = prepared(tmp_path / "cache", folder)
    model = tmp_path / "model"
    shutil.copytree(packed.folder, model / "data", ignore=shutil.ignore_patterns("train.*", "codec"))
    shutil.copytree(packed.folder / "codec", model / "codec")
    held = Packed.open(model / "data")
    assert documents(held, "validation") == documents(packed, "validation")
    assert documents(held, "test") == documents(packed, "test")
    with pytest.raises(UserError, match=r"train\.tokens is missing"):
        held.tokens("train")


def test_opening_what_is_not_prepared_data_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.json is missing"):
        Packed.open(tmp_path)
    for content in ("[]", "{", '{"format": "else"}', '{"format": "handmill-data/1", "dtype": "object"}',
                    '{"format": "handmill-data/1", "dtype": "uint16", "splits": {"train": {}}}'):
        (tmp_path / "data.json").write_text(content)
        with pytest.raises(UserError, match=r"data\.json"):
            Packed.open(tmp_path)


def test_starts_are_never_unpickled(tmp_path: Path, folder: Path) -> None:
    packed = prepared(tmp_path / "cache", folder)
    np.save(packed.folder / "test.starts.npy", np.array([{"a": 1}], dtype=object))
    with pytest.raises(UserError, match=r"test\.starts\.npy is damaged"):
        packed.starts("test")


def test_the_report(tmp_path: Path, folder: Path) -> None:
    (folder / "copy.txt").write_text(text(3, 8))
    (folder / "near.txt").write_text(text(13, 11).replace("\n", " ") + " one more")
    (folder / "blank.txt").write_text(" \n ")
    packed = prepared(tmp_path / "cache", folder, codec=CharacterSettings(), validation=0.1, test=0.1)
    report = packed.report
    assert report["documents"] == {"read": 32, "too_short": 1, "cut": "", "kept": 30}
    assert (report["duplicates"]["exact"], report["duplicates"]["near"]) == (1, 1)
    assert report["tokens"] == sum(packed.count(split) for split in ("train", "validation", "test"))
    lengths = sorted(len(document) for document in everything(packed))
    assert (report["lengths"]["shortest"], report["lengths"]["longest"]) == (lengths[0], lengths[-1])
    assert report["lengths"]["median"] in lengths[14:16]
    assert report["tokenizer"] == {"kind": "character", "size": packed.codec().size, "bytes_per_token": 1.0,
                                   "measured_on": "validation"}
    for split, about in report["splits"].items():
        held = documents(packed, split)
        assert (about["documents"], about["characters"]) == (len(held), sum(map(len, held)))
        assert about["bytes"] == sum(len(document.encode()) for document in held)
    assert report["overlap"]["windows"]["documents"] == report["overlap"]["windows"]["held_out_documents"]
    assert report["megabytes_per_second"] > 0
    lines = report_lines(report)
    assert all("\n" not in line for line in lines)
    assert "1 exact and 1 near duplicates removed" in lines[0]
    json.dumps(report)


def test_characters_that_only_held_out_text_has_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text(1, 40) + "ééé" + text(2, 2), encoding="utf-8")
    packed = prepared(tmp_path / "cache", tmp_path / "a.txt", split="tail", validation=0.1, test=0,
                      codec=CharacterSettings())
    assert packed.report["splits"]["validation"]["unknown"] == 3
    assert "\ufffd\ufffd\ufffd" in documents(packed, "validation")[0]
    assert any("3 characters of validation" in line for line in report_lines(packed.report))


def test_a_share_that_cannot_be_met_is_said(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(text(number))
    report = prepared(tmp_path / "cache", f"{tmp_path}/*.txt").report
    assert any("validation holds 33" in line for line in report_lines(report))


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot be written to .*file.*make the folder writable"):
        prepared(tmp_path / "file" / "cache", folder)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_without_permission_is_an_error(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o500)
    with pytest.raises(UserError, match="cannot be written"):
        prepared(tmp_path / "cache", folder)


@pytest.mark.parametrize("room", [100, 25_000])  # the corpus file does not fit, the tokens do not
def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path, folder: Path, room: int) -> None:
    pytest.importorskip("resource")
    script = textwrap.dedent(f"""
        import resource, signal, sys
        sys.path[:0] = [{str(ROOT / "src")!r}, {str(ROOT / "tests")!r}]
        from corpora import prepared
        from handmill.errors import UserError
        from pathlib import Path
        resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))
        try:
            prepared(Path({str(tmp_path / "cache")!r}), {str(folder)!r})
        except UserError as error:
            print(error)
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert re.match(r"the disk that holds .*cache is full: free", done.stdout), done.stderr
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_a_killed_run_left_is_removed(tmp_path: Path, folder: Path) -> None:
    mark = prepared(tmp_path / "first", folder).fingerprint
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    stale, living = (tmp_path / "cache" / f"{mark}.tmp-{number}" for number in (ended.pid, os.getppid()))
    for left in (stale, living):
        left.mkdir(parents=True)
        (left / "corpus").write_text("half")
    packed = prepared(tmp_path / "cache", folder)
    assert sorted((tmp_path / "cache").iterdir()) == sorted([packed.folder, living])


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("handmill.data.text_prepare.write_split", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path / "cache", folder)
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_recipe_table_prepares(tmp_path: Path, folder: Path) -> None:
    packed = prepare(recipe_of(folder, licence="MIT"), tmp_path / "cache", progress=True)
    assert packed.manifest["licence"] == "MIT"
    assert packed.about["codec"] == {"kind": "byte"}


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "prepare.py"), "--sizes", "5,80", "--codecs",
               "byte,bpe", "--results", str(tmp_path / "rows.md")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]]
            for line in (tmp_path / "rows.md").read_text().splitlines() if line.startswith("| 2")]
    peaks = {(row[3], round(float(row[4]), -1)): float(row[7]) for row in rows}
    assert len(peaks) == 4
    small, large = ([peak for (_, size), peak in peaks.items() if (size > 40) == big] for big in (False, True))
    assert max(large) < 400
    assert all(after < before + 120 for before, after in zip(small, large, strict=True))
    assert all(row[8].split(" of ")[0] == row[8].split(" of ")[1] for row in rows)

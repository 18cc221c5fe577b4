"""Every source format, what is left out of folders, and every way in which input can be bad."""

import csv
import gzip
import json
import os
import random
import re
from pathlib import Path

import pytest
import zstandard
from corpora import documents, everything, prepared, text
from hypothesis import given, settings
from hypothesis import strategies as st

from handmill.data.packed import Packed
from handmill.data.pieces import lines, pieces
from handmill.errors import UserError

TEXTS = [text(seed) for seed in range(6)]


def fill(folder: Path, texts: list[str] = TEXTS) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    for number, content in enumerate(texts):
        (folder / f"{number}.txt").write_text(content)
    return folder


def left(cache: Path) -> list[Path]:
    """What a failed preparation left in the cache."""
    return list(cache.glob("*")) if cache.exists() else []


def as_jsonl(texts: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, key: t}) + "\n" for i, t in enumerate(texts)).encode()


def as_csv(path: Path, texts: list[str], delimiter: str = ",") -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["id", "text"])
        writer.writerows([i, t] for i, t in enumerate(texts))


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("form", ["txt", "jsonl", "csv", "tsv"])
def test_every_format_gives_the_same_documents(tmp_path: Path, form: str, suffix: str) -> None:
    folder = tmp_path / "in"
    fill(folder) if form == "txt" else folder.mkdir()
    if form == "jsonl":
        (folder / "a.jsonl").write_bytes(as_jsonl(TEXTS))
    if form in ("csv", "tsv"):
        as_csv(folder / f"a.{form}", TEXTS, "\t" if form == "tsv" else ",")
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    for file in list(folder.iterdir()):
        content = file.read_bytes()
        file.unlink()
        (folder / (file.name + suffix)).write_bytes(pack(content))
    assert everything(prepared(tmp_path / "cache", folder)) == sorted(TEXTS)


def test_parquet(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"text": [*TEXTS, None], "n": range(7)}), tmp_path / "a.parquet")
    packed = prepared(tmp_path / "cache", tmp_path / "a.parquet")
    assert everything(packed) == sorted(TEXTS)
    assert packed.report["sources"]["records_left_out"] == 1
    with pytest.raises(UserError, match=r"a\.parquet.*no column 'body'.*'text'.*data\.field"):
        prepared(tmp_path / "cache", tmp_path / "a.parquet", field="body")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"b\.parquet.*not a parquet file"):
        prepared(tmp_path / "cache", tmp_path / "b.parquet")


def test_several_frames_in_one_zst_file(tmp_path: Path) -> None:
    frames = [zstandard.ZstdCompressor().compress(t.encode()) for t in TEXTS]
    (tmp_path / "a.txt.zst").write_bytes(b"".join(frames))
    packed = prepared(tmp_path / "cache", tmp_path / "a.txt.zst", split="tail", validation=0.2, test=0.2)
    assert "".join(documents(packed, name)[0] for name in ("train", "validation", "test")) == "".join(TEXTS)


def test_lines_and_paragraphs_as_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n\n  \nthree four\nfive\n\n\n six\n")
    by_line = prepared(tmp_path / "cache", tmp_path / "a.txt", document="line")
    assert everything(by_line) == sorted(["one", "two", "three four", "five", " six"])
    by_paragraph = prepared(tmp_path / "cache", tmp_path / "a.txt", document="paragraph")
    assert everything(by_paragraph) == sorted(["one\ntwo", "three four\nfive", " six\n"])


def test_paths_may_be_globs_and_overlap(tmp_path: Path) -> None:
    folder = fill(tmp_path / "in")
    fill(folder / "sub", [text(seed + 100) for seed in range(6)])
    packed = prepared(tmp_path / "cache", f"{tmp_path}/in/**/*.txt", folder, folder / "0.txt")
    assert len(everything(packed)) == 12
    assert len(packed.manifest["sources"]) == 12


def test_folders_skip_what_is_hidden_or_made_by_tools(tmp_path: Path) -> None:
    folder = fill(tmp_path / "in")
    for name in (".git", "__pycache__", "node_modules", ".venv", "env/lib"):
        fill(folder / name, ["not this " * 50])
    (folder / "env" / "pyvenv.cfg").write_text("home = /usr")
    (folder / ".hidden.txt").write_text("nor this " * 50)
    assert everything(prepared(tmp_path / "cache", folder)) == sorted(TEXTS)


def test_what_handmill_wrote_is_not_read_again(tmp_path: Path) -> None:
    folder = fill(tmp_path / "in")
    cache = folder / "runs" / ".prepared"
    fill(folder / "runs" / "model", ["not this " * 50])
    assert everything(prepared(cache, folder)) == sorted(TEXTS)
    assert everything(prepared(cache, folder)) == sorted(TEXTS)
    assert len(list(cache.iterdir())) == 1


def test_manifest_names_every_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    folder = fill(tmp_path / "in")
    (folder / "LICENSE").write_text("Do what you like with these texts, but keep this note.\n")
    monkeypatch.chdir(tmp_path)
    packed = prepared(tmp_path / "cache", "in", licence="CC0-1.0")
    entries = {entry["path"]: entry for entry in packed.manifest["sources"]}
    assert sorted(entries) == sorted([*(f"in/{i}.txt" for i in range(6)), "in/LICENSE"])
    entry = entries["in/3.txt"]
    assert entry["sha256"] == hashlib.sha256((folder / "3.txt").read_bytes()).hexdigest()
    assert (entry["bytes"], entry["licence"], entry["licence_file"]) == (len(TEXTS[3]), "CC0-1.0", "in/LICENSE")
    assert (entry["documents"], entry["kept"]) == (1, 1)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", entry["modified"])


def test_broken_files_in_a_folder_are_left_out_counted_and_named(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = fill(tmp_path / "in")
    packed_text = gzip.compress(random.Random(1).randbytes(5000).hex().encode())
    broken = {"latin.txt": b"caf\xe9 au lait", "cut.txt": "é".encode()[:1], "image.png": b"\x89PNG\r\n\x1a\n\0\0\0",
              "short.txt.gz": packed_text[:-50], "not.gz": b"no gzip at all",
              "wide.txt": "wide".encode("utf-16"), "table.csv": b"a,b\n1,2\n",
              "short.txt.zst": zstandard.ZstdCompressor().compress(packed_text.hex().encode())[:-9]}
    for name, content in broken.items():
        (folder / name).write_bytes(content)
    (folder / "empty.txt").touch()
    packed = prepared(tmp_path / "cache", folder)
    assert everything(packed) == sorted(TEXTS)
    assert packed.report["documents"]["too_short"] == 1
    assert packed.report["sources"]["left_out"] == len(broken)
    said = {Path(line.split(":")[0]).name: line for line in packed.report["sources"]["first_left_out"]}
    assert set(said) == set(broken)
    assert "byte 3 (0xe9) is not UTF-8" in said["latin.txt"]
    assert "byte 0 (0xc3)" in said["cut.txt"]
    assert "binary" in said["image.png"]
    assert "UTF-16" in said["wide.txt"]
    assert "no column 'text'" in said["table.csv"]
    for name in ("short.txt.gz", "short.txt.zst", "not.gz"):
        assert "cut short or damaged" in said[name]
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert "8 files" in warning


@pytest.mark.parametrize(("name", "content", "said"), [
    ("a.txt", b"fine \xff not", r"a\.txt.*byte 5 \(0xff\) is not UTF-8.*iconv"),
    ("a.txt", b"x" * (3 << 20) + b"\n\xc3(", r"byte 3145729 \(0xc3\)"),
    ("a.txt", "é".encode() * (1 << 20) + b"\xc3", r"byte 2097152 \(0xc3\)"),
    ("a.txt", b"\x7fELF\0\0\0", r"a\.txt.*binary"),
    ("a.txt", b"", r"a\.txt.*empty"),
    ("a.txt.gz", gzip.compress(os.urandom(4000).hex().encode())[:-500], r"a\.txt\.gz.*gz packing is cut short"),
    ("a.txt.gz", b"plain", r"a\.txt\.gz.*gz packing"),
    ("a.jsonl.gz", gzip.compress(as_jsonl(TEXTS))[:-100], r"a\.jsonl\.gz.*gz packing is cut short"),
    ("a.txt.zst", zstandard.ZstdCompressor().compress(b"abc" * 999)[:-3], r"zst packing is cut short"),
    ("a.txt.zst", b"plain", r"zst packing"),
    ("a.csv", b"title,body\n1,2\n", r"a\.csv.*no column 'text' but 'title', 'body'.*data\.field"),
    ("a.csv", b"", r"no column 'text' but no columns at all"),
    ("a.csv", b"text\nfine\n\xff\n", r"byte 10 \(0xff\)"),
    ("a.jsonl", b"not json\n{\n", r"nothing is left.*a\.jsonl, line 1: not JSON"),
    ("a.jsonl", b'{"body": "x"}\n', r"a\.jsonl, line 1: no key 'text' but 'body': set data\.field"),
    ("a.txt", b" \n \n", r"nothing is left.*empty"),
])
def test_a_broken_file_that_was_named_is_an_error(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        prepared(tmp_path / "cache", tmp_path / name)
    assert "\n" not in str(error.value)
    assert left(tmp_path / "cache") == []


def test_bad_records_are_left_out_counted_and_named(tmp_path: Path) -> None:
    records = as_jsonl(TEXTS).splitlines(keepends=True)
    bad = [b"{broken\n", b'{"other": 1}\n', b'{"text": 3}\n', b"[1]\n", b'{"text": "\xff"}\n', b"[" * 100_000 + b"\n"]
    (tmp_path / "a.jsonl").write_bytes(b"".join([*records[:3], *bad, b"\n", *records[3:]]))
    packed = prepared(tmp_path / "cache", tmp_path / "a.jsonl")
    assert everything(packed) == sorted(TEXTS)
    assert packed.report["sources"]["records_left_out"] == len(bad)
    said = packed.report["sources"]["first_left_out"]
    assert [re.search(r"line (\d+)", line)[1] for line in said] == [str(n) for n in range(4, 10)]


def test_short_csv_rows_are_left_out(tmp_path: Path) -> None:
    rows = "id,text\n" + "".join(f'{i},"{t}"\n' for i, t in enumerate(TEXTS)) + "7\n\n"
    (tmp_path / "a.csv").write_text("\ufeff" + rows.replace("\n", "\r\n"), newline="")
    packed = prepared(tmp_path / "cache", tmp_path / "a.csv")
    assert everything(packed) == sorted(TEXTS)
    assert "has 1 of 2 columns" in packed.report["sources"]["first_left_out"][0]


def test_half_a_surrogate_pair(tmp_path: Path) -> None:
    bad = b'{"text": "half \\ud83d of a pair"}\n'
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(TEXTS) + bad)
    cleaned = prepared(tmp_path / "cache", tmp_path / "a.jsonl")
    assert everything(cleaned) == sorted([*TEXTS, "half  of a pair"])
    kept = prepared(tmp_path / "cache", tmp_path / "a.jsonl", clean=False)
    assert everything(kept) == sorted(TEXTS)
    assert "surrogate" in kept.report["sources"]["first_left_out"][0]


@pytest.mark.parametrize(("path", "said"), [
    ("nowhere.txt", r"nowhere\.txt.*does not exist"), ("*.none", "no file matches"),
    ("empty", "holds no files"), ("/dev/null", "neither a file nor a folder")])
def test_missing_paths_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=said):
        prepared(tmp_path / "cache", path)
    assert left(tmp_path / "cache") == []


def test_no_paths_at_all() -> None:
    with pytest.raises(UserError, match=r"data\.paths is empty"):
        prepared(Path("nowhere"))


def test_nothing_but_broken_files_is_an_error(tmp_path: Path) -> None:
    fill(tmp_path / "in", [])
    (tmp_path / "in" / "a.png").write_bytes(b"\x89PNG\0")
    with pytest.raises(UserError, match=r"nothing is left.*a\.png: it is binary"):
        prepared(tmp_path / "cache", tmp_path / "in")
    assert left(tmp_path / "cache") == []


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that fails when it is read")
def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    folder = fill(tmp_path / "in")
    (folder / "bad.txt").symlink_to("/proc/self/mem")
    packed = prepared(tmp_path / "cache", folder)
    assert everything(packed) == sorted(TEXTS)
    assert "bad.txt: it cannot be read" in packed.report["sources"]["first_left_out"][0]
    with pytest.raises(UserError, match=r"bad\.txt.*it cannot be read"):
        prepared(tmp_path / "cache", folder / "bad.txt")


@given(st.binary(max_size=200), st.integers(1, 9))
@settings(deadline=None)
def test_lines_of_blocks_are_the_lines(data: bytes, size: int) -> None:
    blocks = [data[i:i + size] for i in range(0, len(data), size)]
    expected = data.split(b"\n")
    assert list(lines(blocks)) == (expected if expected[-1] else expected[:-1])


def test_a_line_too_long_for_memory_is_an_error() -> None:
    with pytest.raises(ValueError, match="longer"):
        list(lines([b"x" * 100] * 100, longest=1 << 10))


@given(st.lists(st.sampled_from(["word", " ", "\n", "\n\n", "é", "東" * 30, "\n x"]), max_size=60))
@settings(deadline=None)
def test_pieces_joined_are_the_whole_and_end_between_characters(parts: list[str]) -> None:
    import handmill.data.pieces as module

    data = "".join(parts).encode()
    piece, module.PIECE = module.PIECE, 40
    try:
        cut = list(pieces(data[i:i + 7] for i in range(0, len(data), 7)))
    finally:
        module.PIECE = piece
    assert b"".join(cut) == data
    assert "".join(piece.decode() for piece in cut) == "".join(parts)


def test_a_long_text_is_packed_as_if_in_one_piece(tmp_path: Path) -> None:
    from handmill.media.tokenizers import BPESettings

    whole = "".join(text(seed, 40) + "\n" * (seed % 4) for seed in range(1100))
    assert len(whole) > 3 << 20
    (tmp_path / "a.txt").write_text(whole)
    packed: Packed = prepared(tmp_path / "cache", tmp_path / "a.txt", split="tail", validation=0.1, test=0,
                              codec=BPESettings(vocabulary=300))
    cut = int(len(whole) * 0.9)
    tokens = packed.tokens("train")
    assert len(packed.starts("train")) == 1
    assert tokens[1:].tolist() == packed.codec().encode(whole[:cut]).tolist()
    assert documents(packed, "validation") == [whole[cut:]]
    assert packed.tokens("test").tolist() == []


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    folder = fill(tmp_path / "in")
    (folder / os.fsdecode(b"caf\xe9.txt")).write_text(text(50))
    (folder / os.fsdecode(b"bad\xe9.txt")).write_bytes(b"\xff")
    packed = prepared(tmp_path / "cache", folder)
    assert everything(packed) == sorted([*TEXTS, text(50)])
    names = [Path(entry["path"]).name for entry in packed.manifest["sources"]]
    assert r"caf\xe9.txt" in names


def test_records_before_a_break_are_kept_in_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    pack = zstandard.ZstdCompressor().compress
    (folder / "a.jsonl.zst").write_bytes(pack(as_jsonl(TEXTS)) + pack(as_jsonl(["lost"] * 50))[:-9])
    packed = prepared(tmp_path / "cache", folder)
    assert everything(packed) == sorted(TEXTS)
    assert "(the 6 records before that are kept)" in packed.report["sources"]["first_left_out"][0]

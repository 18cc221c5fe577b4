"""Corrupt files and records among good ones: left out, counted and named, and the run goes through to its good end.

After the cases one by one comes chance: files with bits flipped, parts cut and bytes put in, and files of nothing but
random bytes. They are left out, or read for what they still say, or refused in one sentence; nothing else ever.
"""

import gzip
import io
import json
import random
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import corpora
import harness
import musical
import numpy as np
import pytest
import tiny_images
import zstandard
from PIL import Image

from handmill import recipe as recipes
from handmill.data import prepare
from handmill.data.prepared import HASHES
from handmill.errors import UserError
from handmill.media import midi
from handmill.media.scores import from_grid

DATA = {"validation": 0.2, "test": 0.2}
MUSIC = ("midi", "data.validation=0.2", "data.test=0.2", "data.transpose=0", "network.layers=1", "network.width=16",
         "network.heads=2", "network.context=16", "network.memory=16", "training.batch=2")
LONG = 5 << 18  # bytes of the one long line in the quick form; 100 MB in the other


def text(seed: int) -> str:
    return corpora.text(seed, 6)


def parquet(texts: list[str]) -> bytes:
    arrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    writer.write_table(arrow.table({"text": texts}), file)
    return file.getvalue()


def picture(number: int, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(tiny_images.drawing(number)).save(file, form)
    return file.getvalue()


def zipped(entries: dict[str, bytes], packing: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", packing) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return file.getvalue()


def arrays(count: int = 4) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, x=np.stack([tiny_images.drawing(i) for i in range(count)]), y=np.arange(count))
    return file.getvalue()


def song(seed: int) -> bytes:
    chance = random.Random(seed)
    return midi.to_bytes(from_grid([(chance.randrange(40, 80),) for _ in range(30)], 4))


def chorales(seed: int = 1) -> bytes:
    chance = random.Random(seed)
    pieces = [[[chance.randrange(40, 70)] for _ in range(20)] for _ in range(6)]
    return json.dumps({"train": pieces[:4], "valid": pieces[4:5], "test": pieces[5:]}).encode()


def bomb_png() -> bytes:
    """A sound PNG of few bytes that would be 50,000 x 50,000 pixels."""
    return picture(1).replace((16).to_bytes(4) * 2, (50_000).to_bytes(4) * 2)


def broken_text(long: int) -> dict[str, bytes]:
    """Files of text that cannot be read to their end, or not at all."""
    good, packed = text(1).encode() * 20, random.Random(1).randbytes(3000).hex().encode()
    return {"utf8.txt": good[:100] + b"\xc3\x28" + good[100:], "cut.txt": good + "é".encode()[:1],
            "cut.txt.gz": gzip.compress(packed)[:-900],
            "cut.txt.zst": zstandard.ZstdCompressor().compress(packed)[:-90],
            "bitten.txt.gz": gzip.compress(packed)[:500] + b"\0" * 20 + gzip.compress(packed)[520:],
            "cut.parquet": parquet([text(i) for i in range(9)])[:-300], "nul.txt": good[:50] + b"\0" * 500 + good,
            "nul.csv": b"text\n\0\0\0\n", "empty.parquet": b"", "wide.txt": good.decode().encode("utf-16"),
            "long.jsonl": b'{"text": "' + b"a" * long + b"\n" + b"", "pickle.txt": b"\x80\x04\x95" + b"\0" * 99}


BROKEN_LINES = {  # file -> records of which 5 and 2 are bad
    "lines.jsonl": b'{"text": "%s"}\n{"text": \n[1]\n{"text": 7}\n\xff\n{"text": "a\n',
    "quotes.csv": b'text,n\n"%s",1\n"half" of it,2\n"fine",3\n"never closed,4\n'}


def broken_images() -> dict[str, bytes]:
    """Files of images that cannot be read, or must not be."""
    deep = zipped({"1.png": picture(1), "2.png": picture(2)})
    return {"cut.png": picture(3)[:-40], "cut.jpg": picture(4, "JPEG")[:-300], "bomb.png": bomb_png(),
            "text.png": b"no image", "empty.jpg": b"", "short.npz": arrays()[:-60], "list.zip": deep[:-30],
            "head.zip": b"PK\3\4" + deep[9:], "program.jpg": b"\x7fELF" + bytes(200), "photo.tiff": b"II*\0",
            "pickled.npz": zipped({"x.npy": pickled()})}


def pickled() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([None, "a"], object), allow_pickle=True)
    return file.getvalue()


def broken_music() -> dict[str, bytes]:
    """Files of music that cannot be read."""
    good, steps = song(1), json.loads(chorales())
    steps["train"][0][3], steps["train"][1] = [60, "x"], "no list"
    return {"cut.mid": good[:-20], "chunk.mid": good[:18] + b"\xff" + good[19:], "empty.mid": b"", "head.mid": good[4:],
            "text.mid": b"no music", "steps.json": json.dumps(steps).encode(), "broken.json": chorales()[:-9],
            "deep.json": b"[" * 100_000, "cut.zip": zipped({"1.mid": good})[:-9], "song.mp3": b"ID3"}


def put(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)


def trained(name: str, folder: Path, out: Path) -> dict[str, Any]:
    """What a run of two steps on the folder left out: the report's table of its sources, the manifest compared."""
    if name == "music":
        words = [sys.executable, "-m", "handmill", "train", *MUSIC, f"data.paths=['{folder}']", "--out", str(out)]
        words[5:5] = harness.COMMON
    else:
        words = harness.words(name, folder.parent, out)
    harness.finish([*words, "training.steps=2"], out.with_suffix(".log"))
    sources = json.loads((out / "data" / "report.json").read_text())["sources"]
    assert json.loads((out / "data" / "manifest.json").read_text())["left_out"] == sources["first_left_out"]
    assert all("\n" not in sentence for sentence in sources["first_left_out"])
    return dict(sources)


def named(sources: dict[str, Any], files: dict[str, bytes]) -> None:
    for name in files:
        assert any(f"/{name}" in sentence for sentence in sources["first_left_out"]), name


@pytest.mark.parametrize("long", [LONG, pytest.param(100_000_000, marks=pytest.mark.faults)])
def test_broken_text_is_left_out_and_named(tmp_path: Path, long: int) -> None:
    texts = harness.data(tmp_path) / "texts"
    files = broken_text(long)
    put(texts, files)
    put(texts, {name: content.replace(b"%s", text(5).encode().replace(b"\n", b" "))
                for name, content in BROKEN_LINES.items()})
    (texts / "one-line.txt").write_bytes(b"word " * (long // 5))  # is read: nothing is wrong with it
    sources = trained("gpt", texts, tmp_path / "out")
    named(sources, {name: content for name, content in files.items() if name != "long.jsonl"} | BROKEN_LINES)
    assert sources["left_out"] == len(files) - 1  # of long.jsonl only the record
    assert sources["records_left_out"] == 1 + 5 + 2
    harness.tell("corrupt records", f"text, a line of {long:,} bytes among them",
                 f"{sources['left_out']} files and {sources['records_left_out']} records left out and named, run ended")


def test_broken_images_are_left_out_and_named(tmp_path: Path) -> None:
    images = harness.data(tmp_path) / "images"
    files = broken_images()
    put(images, files)
    (images / "wrong.jpg").write_bytes(picture(8))  # a PNG, which is read for what it is
    sources = trained("ddpm", images, tmp_path / "out")
    named(sources, files)
    assert sources["left_out"] == len(files)
    harness.tell("corrupt records", "images", f"{len(files)} files left out and named, run ended")


def test_broken_music_is_left_out_and_named(tmp_path: Path) -> None:
    folder = musical.album(tmp_path / "music", 12)
    files = broken_music()
    put(folder, files)
    sources = trained("music", folder, tmp_path / "out")
    named(sources, files)
    assert sources["left_out"] == len(files) + 1  # of steps.json two pieces
    harness.tell("corrupt records", "music", f"{len(files)} files left out and named, run ended")


# Chance

Kind = tuple[str, Callable[[int], bytes]]  # the file's name with {}, and a good one by number
KINDS: dict[str, tuple[Kind, ...]] = {
    "text": (
        ("{}.txt", lambda n: text(n).encode()), ("{}.txt.gz", lambda n: gzip.compress(text(n).encode())),
        ("{}.txt.zst", lambda n: zstandard.ZstdCompressor().compress(text(n).encode())),
        ("{}.jsonl", lambda n: b"".join(b'{"text": "%d %s"}\n' % (i, b"word " * 20) for i in range(n, n + 5))),
        ("{}.csv", lambda n: b"n,text\n" + b"".join(b'%d,"%d %s"\n' % (i, i, b"word, " * 9) for i in range(n, n + 5))),
        ("{}.parquet", lambda n: parquet([text(n), text(n + 1)])),
        ("{}.jsonl.gz", lambda n: gzip.compress(b'{"text": "%d"}\n' % n * 30))),
    "image": (
        *((f"{{}}.{form.lower()}", lambda n, form=form: picture(n, form)) for form in ("PNG", "JPEG", "GIF", "WEBP",
                                                                                      "BMP")),
        ("{}.npz", lambda n: arrays(1 + n % 4)),
        ("{}.zip", lambda n: zipped({f"a/{n}.png": picture(n), "captions.csv": f"file,caption\na/{n}.png,x\n".encode()},
                                    zipfile.ZIP_DEFLATED * (n % 2)))),
    "music": (
        ("{}.mid", song), ("{}.json", chorales),
        ("{}.zip", lambda n: zipped({f"a/{n}.mid": song(n)}, zipfile.ZIP_DEFLATED * (n % 2)))),
}
CODECS = {"text": {"kind": "byte"}, "image": {"kind": "pixels"}, "music": {"kind": "events"}}


def mutated(content: bytes, chance: random.Random) -> bytes:
    """A copy with one to four bits flipped, parts cut, bytes put in, or what a length might be overwritten."""
    if chance.random() < 0.1:
        return chance.randbytes(chance.randrange(400))
    data = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) + 1)
        match chance.choice(("flip", "cut", "insert", "end", "length")):
            case "flip" if at < len(data):
                data[at] ^= 1 << chance.randrange(8)
            case "cut":
                del data[at:at + chance.randrange(1, 40)]
            case "insert":
                data[at:at] = chance.choice((chance.randbytes(9), data[:chance.randrange(60)], b"\0" * 8, b'"'))
            case "end":
                del data[max(at, len(data) // 2):]
            case "length":
                data[at:at + 4] = chance.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\0\x80"))
    return bytes(data)


def recipe_of(medium: str, paths: list[str]) -> recipes.Recipe:
    family = "variational" if medium == "image" else "autoregressive"
    data = DATA | {"paths": paths} | ({"size": [16, 16], "colour": "grey"} if medium == "image" else {})
    return recipes.parse({"medium": medium, "family": family, "data": data, "codec": CODECS[medium],
                          "network": {"kind": "autoencoder" if medium == "image" else "decoder"}})


def prepared(medium: str, folder: Path, cache: Path) -> Any:
    return prepare(recipe_of(medium, [str(folder)]), cache, progress=False)


def good(medium: str, folder: Path) -> Path:
    """A folder with as many good files as the preparation asks for."""
    folder.mkdir(parents=True)
    name, make = KINDS[medium][0]
    put(folder, {f"good-{name.format(i)}": make(90_000 + i) for i in range(12)})
    return folder


def batches(count: int) -> list[Any]:
    """For each kind of file, so many mutated ones: 30 in the quick form."""
    return [(medium, name, make, count) for medium, kinds in KINDS.items() for name, make in kinds]


def name_of(value: Any) -> str | None:
    return value.replace("{}", "") if isinstance(value, str) else "" if callable(value) else None


@pytest.mark.parametrize(("medium", "name", "make", "count"), [
    *batches(30), *(pytest.param(*case, marks=pytest.mark.faults) for case in batches(400))], ids=name_of)
def test_mutated_files_among_good_ones_end_nothing(tmp_path: Path, medium: str, name: str,
                                                   make: Callable[[int], bytes], count: int) -> None:
    """All in one folder; where an image's table says that it cannot be used, which ends a preparation, one by one."""
    chance = random.Random(f"{name} {count}")
    folder = good(medium, tmp_path / "in")
    files = {name.format(i): mutated(make(i), chance) for i in range(count)}
    put(folder, files)
    try:
        sources = prepared(medium, folder, tmp_path / "cache").report["sources"]
        said = f"{sources['left_out']} left out, the others read"
    except UserError as refused:
        if "captions.csv" not in str(refused):
            raise
        said = f"{sum(alone(medium, each, tmp_path) for each in files.values())} refused, the others read"
    harness.tell("mutated files", name.replace("{}", ""), f"{count}: {said}")


def alone(medium: str, content: bytes, home: Path) -> bool:
    """Whether a file that is named by the user, beside good ones, is refused."""
    with tempfile.TemporaryDirectory(dir=home) as scratch:
        file = Path(scratch) / "one.zip"
        file.write_bytes(content)
        return refused(medium, [good(medium, Path(scratch) / "in"), file], Path(scratch) / "cache")


def refused(medium: str, paths: list[Path], cache: Path) -> bool:
    """Whether the preparation ends in a sentence, and not well."""
    try:
        prepare(recipe_of(medium, [*map(str, paths)]), cache, progress=False)
    except UserError as error:
        return "\n" not in str(error) or pytest.fail(str(error))
    return False


@pytest.mark.parametrize("count", [20, pytest.param(400, marks=pytest.mark.faults)])
def test_mutated_tables_of_captions_are_read_or_refused(tmp_path: Path, count: int) -> None:
    chance, times = random.Random(count), 0
    images = good("image", tmp_path / "in")
    names = [file.name for file in images.iterdir()]
    tables = {"captions.csv": "file,caption,kind\n" + "".join(f'{name},"a ""small"" one",x\n' for name in names),
              "metadata.jsonl": "".join(json.dumps({"file_name": name, "text": "a\ud83d"}) + "\n" for name in names)}
    for i in range(count):
        table = ("captions.csv", "metadata.jsonl")[i % 2]
        (images / table).write_bytes(mutated(tables[table].encode(), chance))
        times += refused("image", [images], tmp_path / f"cache{i}")
        (images / table).unlink()
    harness.tell("mutated files", "tables of captions", f"{count}: {times} refused in one sentence, the others read")


# Prepared data that lie between two runs

@pytest.mark.parametrize("count", [3, pytest.param(60, marks=pytest.mark.faults)])
@pytest.mark.parametrize("medium", KINDS)
def test_prepared_data_that_are_damaged_are_prepared_again(tmp_path: Path, medium: str, count: int,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    """A bit of any of its files flipped, or a file cut or gone; the data are then what they were before."""
    chance, folder = random.Random(f"{medium} {count}"), good(medium, tmp_path / "in")
    first = prepared(medium, folder, tmp_path / "cache")
    made, content, files = first.folder, first.content, sorted(f for f in first.folder.rglob("*") if f.is_file())
    inode, times = made.stat().st_ino, 0
    assert prepared(medium, folder, tmp_path / "cache").folder.stat().st_ino == inode  # sound ones stay
    for i in range(count):
        file = chance.choice([file for file in files if file.stat().st_size])
        data = bytearray(file.read_bytes())
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        if i % 3 == 0:
            file.write_bytes(data)
        elif i % 3 == 1:
            file.write_bytes(data[:chance.randrange(len(data))])
        else:
            file.unlink()
        capsys.readouterr()
        again = prepared(medium, folder, tmp_path / "cache")
        assert again.folder.stat().st_ino != inode, file.name
        assert again.content == content
        said = capsys.readouterr().err
        assert said.startswith(f"warning: {made}/")
        assert said.endswith("is not as it was written: the data are prepared again\n")
        assert file.name in said or file.name == HASHES  # whose hash of another file may be what changed
        inode, times = again.folder.stat().st_ino, times + 1
        assert prepared(medium, folder, tmp_path / "cache").folder.stat().st_ino == inode
    harness.tell("prepared data damaged between two runs", medium, f"{times} of {count} flipped, cut or missing files "
                 "found when the next run began; the same data were prepared again")

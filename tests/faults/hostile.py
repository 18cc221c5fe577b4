"""Model folders made to do harm: each entry of ATTACKS changes a sound one, its receipt made to fit.

Beside the folder lie `secret.jsonl`, `victim` and the folder `outside`; a pickle that is opened leaves `canary` there.
"""

import json
import os
import pickle
import shutil
import stat
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file

from handmill import folder

Attack = Callable[[Path], object]
DEEP = 100_000  # brackets of JSON in JSON; the suite's other form has 100 MB


class Canary:
    """What leaves a file behind where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.file}'",)


def canary(path: Path) -> bytes:
    return pickle.dumps(Canary(path.absolute().parent / "canary"))


def receipt_of(path: Path) -> dict[str, Any]:
    return dict(json.loads((path / "receipt.json").read_text()))


def vouched(path: Path, *also: str) -> None:
    """The receipt with the fingerprints of the files as they are now, and of some more."""
    receipt = receipt_of(path)
    names = {*receipt["files"], *also}
    receipt["files"] = {name: folder.fingerprint(path / name) for name in sorted(names) if (path / name).is_file()}
    (path / "receipt.json").write_text(folder.sealed(receipt), "utf-8", "surrogatepass")


def told(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """The receipt with a change."""
    receipt = receipt_of(path)
    change(receipt)
    (path / "receipt.json").write_text(folder.sealed(receipt), "utf-8", "surrogatepass")


def names(name: str) -> Attack:
    """A receipt that vouches for a file of that name."""
    return lambda path: told(path, lambda receipt: receipt["files"].update({name: {"bytes": 1, "sha256": "0" * 64}}))


def link(name: str, to: str) -> Attack:
    """A link in the place of a file or folder; {home} is the folder around it all."""
    def change(path: Path) -> None:
        _away(path / name)
        (path / name).symlink_to(to.format(home=path.absolute().parent))
        if name != "receipt.json":
            vouched(path)

    return change


def pipe(name: str) -> Attack:
    """A FIFO in the place of a file."""
    def change(path: Path) -> None:
        _away(path / name)
        os.mkfifo(path / name)

    return change


def device(name: str) -> Attack:
    """The device of endless zeros in the place of a file, where the system lets one be made, else a link to it."""
    def change(path: Path) -> None:
        _away(path / name)
        try:
            os.mknod(path / name, 0o20666, os.makedev(1, 5))
        except OSError:
            (path / name).symlink_to("/dev/zero")

    return change


def content(name: str, data: bytes | Callable[[Path], bytes]) -> Attack:
    """Another content of a file."""
    def change(path: Path) -> None:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data(path) if callable(data) else data)
        vouched(path)

    return change


def header(change: Callable[[dict[str, Any]], object]) -> Attack:
    """A safetensors file whose header says something else."""
    def attack(path: Path) -> None:
        data = (path / "weights.safetensors").read_bytes()
        length = int.from_bytes(data[:8], "little")
        table = json.loads(data[8:8 + length])
        change(table)
        text = json.dumps(table).encode()
        (path / "weights.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length:])
        vouched(path)

    return attack


def first(table: dict[str, Any]) -> dict[str, Any]:
    return dict.__getitem__(table, min(name for name in table if name != "__metadata__"))


def overlapping(table: dict[str, Any]) -> None:
    a, b, *_ = [entry for name, entry in table.items() if name != "__metadata__"]
    b["data_offsets"] = [a["data_offsets"][0], a["data_offsets"][0] + b["data_offsets"][1] - b["data_offsets"][0]]


def whole_numbers(path: Path) -> None:
    """Weights of the right shapes, but of another type."""
    weights = load_file(path / "weights.safetensors")
    save_file({name: weight.int() for name, weight in weights.items()}, path / "weights.safetensors")
    vouched(path)


def one_more(path: Path) -> None:
    weights = load_file(path / "weights.safetensors")
    save_file(weights | {"more": next(iter(weights.values())).clone()}, path / "weights.safetensors")
    vouched(path)


def recipe(key: str, value: str) -> Attack:
    """Another value in the recipe."""
    def change(path: Path) -> None:
        lines = (path / "recipe.toml").read_text().split("\n")
        place = next(i for i, line in enumerate(lines) if line.startswith(f"{key} ="))
        lines[place] = f"{key} = {value}"
        (path / "recipe.toml").write_text("\n".join(lines))
        vouched(path)

    return change


def merges(*pairs: list[Any]) -> Attack:
    """A tokenizer of these merges."""
    def change(path: Path) -> None:
        file = path / "codec" / "tokenizer.json"
        table = json.loads(file.read_text())
        file.write_text(json.dumps(table | {"merges": list(pairs), "size": 257 + len(pairs)}))
        vouched(path)

    return change


def array(name: str) -> Attack:
    """A numpy file that holds a pickle."""
    def change(path: Path) -> None:
        np.save(path / name, np.array([Canary(path.absolute().parent / "canary")], object), allow_pickle=True)
        vouched(path)

    return change


def sparse(name: str, size: int) -> Attack:
    """A file of so many zeros that take no room."""
    def change(path: Path) -> None:
        with (path / name).open("wb") as file:
            file.truncate(size)

    return change


def itself(path: Path) -> None:
    """A codec that is the model itself, by the recipe's word."""
    shutil.rmtree(path / "codec")
    (path / "codec").mkdir()
    (path / "codec" / "model").symlink_to("../..")


def nested(path: Path) -> None:
    """A model folder in the codec of another, and so on, as deep as a path may be long."""
    inner, levels = path, 150
    keep = {name: (path / name).read_bytes() for name in ("recipe.toml", "weights.safetensors", "codec/codec.json")}
    for _ in range(levels):
        inner = inner / "codec" / "model"
        for name, data in keep.items():
            (inner / name).parent.mkdir(parents=True, exist_ok=True)
            (inner / name).write_bytes(data)
    for level in range(levels, -1, -1):
        here = path.joinpath(*("codec", "model") * level)
        files = [name for name in folder.files_below(here, "codec")] if level > levels - 3 else []
        receipt = receipt_of(path) | {"files": {}}
        (here / "receipt.json").write_text(folder.sealed(receipt), "utf-8", "surrogatepass")
        vouched(here, "recipe.toml", "weights.safetensors", "codec/codec.json", *files)


def _away(file: Path) -> None:
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    file.unlink(missing_ok=True)
    file.parent.mkdir(parents=True, exist_ok=True)


TOKENIZER, WEIGHTS = "codec/tokenizer.json", "weights.safetensors"
FILES = ("receipt.json", "recipe.toml", WEIGHTS, TOKENIZER, "data/data.json", "data/report.json", "samples/check.jsonl")
ATTACKS: dict[str, dict[str, Attack]] = {
    "receipt with a path that leads out": {
        "up": names("../secret.jsonl"), "far up": names("codec/../../secret.jsonl"), "absolute": names("/etc/passwd"),
        "nothing": names(""), "nul": names("codec/\0"), "controls": names("codec/\x1b[2J\r\n"),
        "half a pair": names("codec/\ud800"), "endless": names("codec/" + "x" * 100_000), "itself": names("."),
        "no table": lambda path: told(path, lambda r: r.update(files=["recipe.toml"])),
        "strange sections": lambda path: told(path, lambda r: r.update(training=[1], exports="onnx", check=3)),
        "witness beyond": lambda path: told(path, lambda r: r["training"].update(
            witness={"prompt_tokens": [1 << 40], "tokens": [1]})),
        "strange witness": lambda path: told(path, lambda r: r["training"].update(witness={"tokens": "x" * 99}))},
    "link in the place of a file": {
        **{f"{name} out": link(name, "/etc/passwd") for name in FILES},
        "zeros": link(WEIGHTS, "/dev/zero"), "loop": link(WEIGHTS, "weights.safetensors"),
        "codec": link("codec", "{home}/outside"), "data": link("data", "{home}/outside"),
        "samples": link("samples", "{home}/outside"), "exports": link("exports", "../outside"),
        "card": link("card.md", "{home}/victim"), "what a card is written to": link("card.md.tmp", "../victim"),
        "what a receipt is written to": link("receipt.json.tmp", "{home}/victim"),
        "export in the making": link("exports/onnx", "{home}/outside")},
    "pipe or device in the place of a file": {
        **{f"pipe {name}": pipe(name) for name in FILES}, **{f"device {name}": device(name) for name in FILES},
        "pipe loss.png": pipe("loss.png"), "pipe card.md.tmp": pipe("card.md.tmp")},
    "pickle under another name": {
        "weights": content(WEIGHTS, canary), "weights with a length": content(
            WEIGHTS, lambda path: struct.pack("<Q", len(canary(path))) + canary(path)),
        "tokenizer": content(TOKENIZER, canary), "recipe": content("recipe.toml", canary)},
    "safetensors that lies": {
        "header of 2^62 bytes": content(WEIGHTS, struct.pack("<Q", 1 << 62) + b"{}"),
        "header of 99 MB": content(WEIGHTS, struct.pack("<Q", 99_000_000) + b"{}"), "empty": content(WEIGHTS, b""),
        "deep header": content(WEIGHTS, struct.pack("<Q", DEEP) + b"[" * DEEP), "overlap": header(overlapping),
        "negative shape": header(lambda t: first(t).update(shape=[-1, -32])),
        "huge shape": header(lambda t: first(t).update(shape=[1 << 62, 4])),
        "endless shape": header(lambda t: first(t).update(shape=[1] * 100_000)),
        "offsets beyond": header(lambda t: first(t).update(data_offsets=[0, 1 << 62])),
        "backwards": header(lambda t: first(t).update(data_offsets=[64, 0])),
        "half the type": header(lambda t: first(t).update(dtype="F16")),
        "unknown type": header(lambda t: first(t).update(dtype="F4096")), "whole numbers": whole_numbers,
        "one more": one_more, "cut": lambda path: (os.truncate(path / WEIGHTS, 900), vouched(path))},
    "JSON or TOML without end": {
        "receipt": lambda path: (path / "receipt.json").write_bytes(b"[" * DEEP),
        "tokenizer": content(TOKENIZER, b'{"a":' * DEEP), "data": content("data/data.json", b"[" * DEEP),
        "report": content("data/report.json", b"[" * DEEP), "manifest": content("data/manifest.json", b"[" * DEEP),
        "huge receipt": sparse("receipt.json", 1 << 40), "huge recipe": sparse("recipe.toml", 1 << 40),
        "huge tokenizer": sparse(TOKENIZER, 1 << 40), "huge report": sparse("data/report.json", 1 << 40),
        "lists in lists": content("recipe.toml", b"a = " + b"[" * DEEP),
        "tables in tables": content("recipe.toml", b"a = " + b"{a = " * DEEP),
        "long key": content("recipe.toml", b"a." * 500_000 + b"a = 1"),
        "quoted key": content("recipe.toml", b'"a".' * 500_000 + b"a = 1"),
        "many keys": content("recipe.toml", b"\n".join(b"a." * 30 + b"k%d = 1" % i for i in range(55_000))),
        "huge number": content("recipe.toml", b"seed = " + b"9" * 1_000_000)},
    "recipe of another network": {
        "layers": recipe("layers", "1000000000"), "width": recipe("width", "67108864"),
        "wider": recipe("width", "64"), "hidden": recipe("hidden", "100000000000"),
        "heads": recipe("kv_heads", "1"), "dropout": recipe("dropout", "nan"),
        "learned": recipe("positions", '"learned"')},
    "tokenizer that grows": {
        "cycle": merges([256, 256]), "later": merges([97, 257], [97, 256]),
        "doubled": merges(*([97, 97] if i == 0 else [255 + i, 255 + i] for i in range(40))),
        "no pairs": merges(["a", "b"]), "many": merges(*([97, 97] for _ in range(1_000_000))),
        "negative": merges([-1, 97])},
}
OF_IMAGES: dict[str, dict[str, Attack]] = {  # of a model whose codec is a model folder
    "codec that is the model itself": {"link": itself, "nested": nested},
    "codec that lies": {
        "shape": content("codec/model/codec/codec.json", b'{"format": "handmill-pixels/1", "shape": [1, 65535, 65535], '
                         b'"classes": [], "deviation": 1}'),
        "deep": content("codec/codec.json", b"[" * DEEP)},
}
ARRAYS: dict[str, dict[str, Attack]] = {  # which only what reads the held-out data comes upon
    "numpy file with a pickle": {"starts": array("data/test.starts.npy")},
}


def archive(file: Path, good: dict[str, bytes], bomb: int) -> dict[str, str]:
    """A zip of good entries among others that are to be left out: the names of these, and a word of what is said.

    `bomb` bytes are what the bombs grow to.
    """
    (name, content), zeros = next(iter(good.items())), bytes(bomb)
    suffix = Path(name).suffix
    entries = [(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED) for name, content in good.items()]
    bad = {f"../up{suffix}": "leads out", f"a/../../up{suffix}": "leads out", f"/tmp/up{suffix}": "leads out",
           f"link{suffix}": "", f"bell\x07\x1b[2J{suffix}": "", f"bzip{suffix}": "not deflate",
           f"lzma{suffix}": "not deflate", f"liar{suffix}": "unpacked", f"open{suffix}": "bytes unpacked"}
    for entry in bad:
        data = b"../../victim" if entry[:4] in ("link", "bell") else content if "up" in entry else zeros
        packing = {"bzip": zipfile.ZIP_BZIP2, "lzma": zipfile.ZIP_LZMA}.get(entry[:4], zipfile.ZIP_DEFLATED)
        info = zipfile.ZipInfo(entry)
        if entry.startswith("link"):
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
        entries.append((info, data, packing))
    entries += [(zipfile.ZipInfo("inner.zip"), b"PK", 0), (zipfile.ZipInfo(name), content, 0)]
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w") as made:
        warnings.simplefilter("ignore")  # of the name that comes twice
        for info, data, packing in entries:
            made.writestr(info, data, packing)
    for liar in ("liar", "bzip", "lzma"):
        _lie(file, f"{liar}{suffix}", 1000)
    return bad | {name: "has its name"}


def _lie(file: Path, name: str, size: int) -> None:
    """Let both headers of an entry say that it is of `size` bytes when unpacked."""
    data, wanted = bytearray(file.read_bytes()), name.encode()
    for mark, length, at in ((b"PK\3\4", 30, 22), (b"PK\1\2", 46, 24)):
        place = data.find(mark)
        while data[place + length:place + length + len(wanted)] != wanted:
            place = data.find(mark, place + 1)
            assert place > 0, name
        struct.pack_into("<I", data, place + at, size)
    file.write_bytes(data)


def overlapping_zip(file: Path, entries: int, size: int) -> None:
    """Many entries that are the same bytes of the archive (Fifield 2019, without the quoting)."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = packer.compress(bytes(size)) + packer.flush()
    crc, names = zlib.crc32(bytes(size)), [b"%05d.png" % i for i in range(entries)]
    head = struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 8, 0, 0, crc, len(packed), size, 9, 0) + names[0] + packed
    listed = b"".join(struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, 8, 0, 0, crc, len(packed), size, 9, 0, 0, 0, 0,
                                  0, 0) + name for name in names)
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, entries, entries, len(listed), len(head), 0)
    file.write_bytes(head + listed + end)


def huge_array(file: Path, header: bool) -> None:
    """An npz that claims a header of 4 GB, or 2^40 images, and packs zeros for a part of it."""
    dtype = np.lib.format.magic(2, 0) + struct.pack("<I", 0xFFFFFFFF)
    text = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1099511627776, 8, 8), }"
    text += b" " * (117 - len(text)) + b"\n"
    start = dtype if header else np.lib.format.magic(1, 0) + struct.pack("<H", len(text)) + text
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made, made.open("x.npy", "w", force_zip64=True) as entry:
        entry.write(start)
        for _ in range(300):
            entry.write(bytes(1 << 20))

"""Finding and decoding images: every format and mode against known pixels, limits, broken files, tables."""

import contextlib
import io
import json
import os
import struct
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pixels import album, prepared, recipe_of, save, scene

from handmill.data import image_files
from handmill.data.decoding import Refused, decode
from handmill.data.image_files import Notes
from handmill.errors import UserError
from handmill.media.image import Data

PLAIN = Data(size=(16, 16))
GREY = Data(size=(16, 16), colour="grey")


def packed(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pixels(content: bytes, data: Data = PLAIN) -> np.ndarray[Any, Any]:
    return decode(content, data).pixels[0].astype(int)


def png_claiming(width: int, height: int, bits: int = 8, colour: int = 2) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(("form", "options"), [("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True})])
def test_lossless_formats_give_their_pixels(form: str, options: dict[str, Any]) -> None:
    expected = scene(1, 16)
    assert (pixels(packed(Image.fromarray(expected), form, **options)) == expected).all()


@pytest.mark.parametrize("form", ["JPEG", "WEBP"])
def test_lossy_formats_come_near(form: str) -> None:
    expected = np.broadcast_to(scene(1, 16, 1), (16, 16, 3))
    assert np.abs(pixels(packed(Image.fromarray(expected), form, quality=95)) - expected).max() <= 8


def test_modes_become_rgb_and_grey() -> None:
    colour, grey = Image.fromarray(scene(2, 16)), Image.fromarray(scene(2, 16)).convert("L")
    luma = np.asarray(grey).astype(int)
    assert (pixels(packed(grey, "PNG")) == luma[..., None]).all()
    assert (pixels(packed(colour, "PNG"), GREY)[..., 0] == luma).all()
    assert (pixels(packed(grey.convert("1"), "PNG")) == np.asarray(grey.convert("1"))[..., None] * 255).all()
    palette = colour.quantize(16)
    assert (pixels(packed(palette, "PNG")) == np.asarray(palette.convert("RGB"))).all()
    assert (pixels(packed(palette, "GIF")) == np.asarray(palette.convert("RGB"))).all()


def test_sixteen_bits_are_scaled_not_cut() -> None:
    deep = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    result = decode(packed(Image.fromarray(deep), "PNG"), GREY)
    assert np.abs(result.pixels[0, ..., 0] - deep / 257).max() <= 0.5
    assert "16 bits made 8" in result.remarks


def test_cmyk_jpeg_becomes_rgb() -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # no cyan, full magenta and yellow: red
    assert np.abs(pixels(packed(image, "JPEG", quality=95))[8, 8] - (255, 0, 0)).max() <= 12


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_transparency_is_composed_on_the_background(form: str) -> None:
    image = Image.new("RGBA", (16, 16), (200, 0, 0, 0))
    image.paste((200, 0, 0, 128), (8, 0, 16, 16))
    result = pixels(packed(image, form, **({"lossless": True} if form == "WEBP" else {})),
                    Data(size=(16, 16), background=(0, 100, 0)))
    assert (result[:, :8] == (0, 100, 0)).all()
    assert np.abs(result[:, 8:] - (100, 50, 0)).max() <= 1


def test_transparent_palette_and_key_colours() -> None:
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([9, 9, 9, 200, 10, 20])
    assert (pixels(packed(palette, "PNG", transparency=1)) == 255).all()
    assert (pixels(packed(palette, "GIF", transparency=1)) == 255).all()
    key = Image.new("RGB", (16, 16), (1, 2, 3))
    assert (pixels(packed(key, "PNG", transparency=(1, 2, 3))) == 255).all()
    assert (pixels(packed(Image.new("LA", (16, 16), (0, 0)), "PNG")) == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    upright = scene(3, 16)
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
              5: upright.transpose(1, 0, 2), 6: np.rot90(upright), 7: upright[::-1, ::-1].transpose(1, 0, 2),
              8: np.rot90(upright, -1)}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    result = decode(packed(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif), PLAIN)
    assert (result.pixels[0] == upright).all()
    assert ("turned upright" in result.remarks) == (orientation > 1)


def test_exif_turn_swaps_the_sides() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    result = decode(packed(Image.new("RGB", (64, 32)), "JPEG", exif=exif), PLAIN)
    assert (result.height, result.width) == (64, 32)


def test_of_an_animation_the_first_frame() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    result = decode(packed(frames[0], "GIF", save_all=True, append_images=frames[1:]), PLAIN)
    assert (result.pixels == (255, 0, 0)).all()
    assert result.remarks == ("first frame of an animation",)


def test_fit() -> None:
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = 255  # the middle third is white
    content = packed(Image.fromarray(wide), "PNG")
    black = {"size": (16, 16), "background": (0, 0, 9)}
    assert (pixels(content, Data(fit="crop", **black))[:, 1:-1] == 255).all()
    stretched = pixels(content, Data(fit="stretch", **black))
    assert (stretched[:, 7:9] == 255).all()
    assert (stretched[:, [0, -1]] == 0).all()
    padded = pixels(content, Data(fit="pad", **black))
    assert (padded[:5] == (0, 0, 9)).all()
    assert (padded[-5:] == (0, 0, 9)).all()
    assert (padded[6:9, 8] == 255).all()


@given(st.integers(1, 200), st.integers(1, 200), st.sampled_from(["crop", "pad", "stretch"]))
@settings(max_examples=40, deadline=None)
def test_any_shape_fits_and_flat_stays_flat(height: int, width: int, fit: Any) -> None:
    data = Data(size=(12, 20), fit=fit, smallest=1, background=(7, 7, 7))
    assert (pixels(packed(Image.new("RGB", (width, height), (7, 7, 7)), "PNG"), data) == 7).all()


def test_large_jpeg_is_decoded_small_and_right() -> None:
    image = Image.fromarray(scene(4, 512))
    small = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(pixels(packed(image, "JPEG", quality=95)) - small).max() <= 10


def test_bomb_is_refused_by_its_header() -> None:
    with pytest.raises(Refused, match="make it smaller") as caught:
        decode(png_claiming(50_000, 50_000), PLAIN)
    assert caught.value.kind == "too large"
    with pytest.raises(Refused, match=r"100 x 100 pixels, above data.largest = 9,999"):
        decode(png_claiming(100, 100), Data(largest=9_999))


def test_small_truncated_empty_and_foreign_files() -> None:
    jpeg = packed(Image.fromarray(scene(5, 64)), "JPEG")
    for content, kind in ((jpeg[:len(jpeg) // 2], "damaged"), (b"", "damaged"), (b"hello", "not an image"),
                          (png_claiming(64, 64), "damaged"), (packed(Image.new("RGB", (1, 1)), "PNG"), "too small"),
                          (packed(Image.new("RGB", (64, 64)), "TIFF"), "not an image")):
        with pytest.raises(Refused) as caught:
            decode(content, PLAIN)
        assert caught.value.kind == kind


_SAMPLES = [packed(Image.fromarray(scene(6, 16)), form) for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP")]


@given(st.sampled_from(_SAMPLES), st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=12),
       st.integers(0, 10_000))
@settings(max_examples=150, deadline=None)
def test_damaged_bytes_give_pixels_or_refused(sample: bytes, changes: list[tuple[int, int]], end: int) -> None:
    content = bytearray(sample)
    for place, value in changes:
        content[place % len(content)] = value
    with warnings.catch_warnings(), contextlib.suppress(Refused):
        warnings.simplefilter("ignore")
        assert decode(bytes(content[:1 + end]), PLAIN).pixels.shape == (1, 16, 16, 3)


@given(st.binary(max_size=400))
@settings(max_examples=100, deadline=None)
def test_random_bytes_are_refused(content: bytes) -> None:
    for head in (b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"BM", b"RIFF\x10\0\0\0WEBPVP8 "):
        with pytest.raises(Refused):
            decode(head + content, PLAIN)


def test_arrays_of_grey_colour_and_alpha() -> None:
    grey = np.stack([scene(i, 16, 1)[..., 0] for i in range(3)])
    assert (decode(grey, GREY).pixels[..., 0] == grey).all()
    assert (decode(grey, PLAIN).pixels == grey[..., None]).all()
    colour = np.stack([scene(i, 16) for i in range(3)])
    assert (decode(colour, PLAIN).pixels == colour).all()
    clear = np.concatenate([colour, np.zeros((3, 16, 16, 1), np.uint8)], 3)
    assert (decode(clear, PLAIN).pixels == 255).all()
    assert decode(np.stack([scene(0, 24)]), PLAIN).pixels.shape == (1, 16, 16, 3)


def read(tmp_path: Path, *paths: Path | str, **data: Any) -> tuple[list[image_files.Item], Notes]:
    recipe, notes = recipe_of(*paths, **data), Notes()
    found = image_files.find(recipe.data, tmp_path / "cache")
    return [item for one in found for item in image_files.items(one, recipe.data, notes)], notes


def test_sub_folders_are_classes_and_each_file_is_once(tmp_path: Path) -> None:
    album(tmp_path / "a", 4)
    items, notes = read(tmp_path, tmp_path / "a", tmp_path / "a" / "cat", f"{tmp_path}/a/**/*.png")
    assert [(item.names, item.labels) for item in items] == [
        (["cat/000.png"], ["cat"]), (["cat/002.png"], ["cat"]), (["dog/001.png"], ["dog"]), (["dog/003.png"], ["dog"])]
    assert not notes.skipped.first


def test_captions_and_a_label_column(tmp_path: Path) -> None:
    album(tmp_path / "a", 3, classes=())
    (tmp_path / "a" / "captions.csv").write_text(
        'file,caption,kind\n000.png,"red, round",x\n001.png,blue,y\n../secret.png,no,z\ngone.png,no,z\n'
        "001.png,again,y\n")
    items, notes = read(tmp_path, tmp_path / "a", label="kind")
    assert [(item.captions[0], item.labels[0]) for item in items] == [("red, round", "x"), ("blue", "y"), ("", "")]
    assert notes.captionless == 1
    assert notes.skipped.records == 3
    said = " ".join(notes.skipped.first)
    assert "line 4: '../secret.png' is no path below its folder" in said
    assert "line 5: gone.png is not there: mend the path or remove the line" in said
    assert "line 6: 001.png has its line already" in said


def test_metadata_jsonl(tmp_path: Path) -> None:
    album(tmp_path / "a", 2, classes=())
    lines = [json.dumps({"file_name": "000.png", "text": "one\u2028line"}, ensure_ascii=False), "not json",
             json.dumps({"file_name": "001.png", "text": None})]
    (tmp_path / "a" / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    items, notes = read(tmp_path, tmp_path / "a")
    assert [item.captions for item in items] == [["one\u2028line"], [""]]
    assert notes.skipped.records == 1


@pytest.mark.parametrize(("content", "setting", "said"), [
    (b"name,caption\n", {}, "has no column 'file or file_name' but name, caption"),
    (b"file,caption\n000.png,a\n", {"label": "kind"}, "has no column 'kind' but file, caption"),
    (b"file,caption\n000.png,a\n", {"caption": "words"}, "has no column 'words'"),
    (b"file,caption\nx.png,a\n", {}, "none of the 1 images that"),
    (b"file,caption\n\xff\n", {}, "byte 13: it is not UTF-8"),
    (b'file,caption\n"000.png', {}, "after line 1: it is not csv")])
def test_unusable_tables(tmp_path: Path, content: bytes, setting: dict[str, str], said: str) -> None:
    album(tmp_path / "a", 2, classes=())
    (tmp_path / "a" / "captions.csv").write_bytes(content)
    with pytest.raises(UserError, match=said):
        read(tmp_path, tmp_path / "a", **setting)


def test_a_column_without_values(tmp_path: Path) -> None:
    folder = album(tmp_path / "a", 6, classes=())
    (folder / "captions.csv").write_text("file,kind\n000.png,\n")
    for setting in ({"label": "kind"}, {"caption": "kind"}):
        with pytest.raises(UserError, match="no image has a value in the column"):
            prepared(tmp_path / "cache", folder, **setting)


def test_a_column_without_a_table(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'data.label = "kind" names a column, but no folder'):
        read(tmp_path, album(tmp_path / "a", 2), label="kind")


def test_zip_is_read_where_it_lies(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for i in range(3):
            archive.writestr(f"top/{'ab'[i % 2]}/{i}.png", packed(Image.fromarray(scene(i, 16)), "PNG"))
        archive.writestr("top/captions.csv", "file,caption\na/0.png,first\n")
        archive.writestr("top/notes.txt", "hello")
        archive.writestr("__MACOSX/top/a/._0.png", "x")
    items, notes = read(tmp_path, tmp_path / "a.zip")
    assert [(item.names[0], item.labels[0], item.captions[0]) for item in items] == [
        ("a/0.png", "a", "first"), ("b/1.png", "b", ""), ("a/2.png", "a", "")]
    assert notes.other == 1


def test_broken_entries_are_named_and_broken_archives_are_errors(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(4):
            archive.writestr(f"{i}.png", packed(Image.fromarray(scene(i, 16)), "PNG"))
        archive.writestr("bomb.png", b"\0" * 30_000_000)
        archive.writestr("text.png", "hello")
    images = prepared(tmp_path / "cache", tmp_path / "a.zip", size=(16, 16), largest=100_000)
    assert images.report["images"]["kept"] == 4
    assert images.report["sources"]["kinds"] == {"too large": 1, "not an image": 1}
    assert any("a.zip/bomb.png: it is 30,000,000 bytes unpacked" in line
               for line in images.report["sources"]["first_left_out"])
    (tmp_path / "b.zip").write_bytes((tmp_path / "a.zip").read_bytes()[:200])
    with pytest.raises(UserError, match=r"b.zip in data.paths: it cannot be opened as a zip archive"):
        prepared(tmp_path / "cache", tmp_path / "b.zip")


def npz(path: Path, **arrays: Any) -> Path:
    np.savez_compressed(path, **arrays)
    return path


_X = np.zeros((4, 16, 16), np.uint8)


@pytest.mark.parametrize(("arrays", "said"), [
    ({"images": _X}, "no array x but images"),
    ({"x": _X.astype(np.float32)}, r"its array x is float32: save whole numbers from 0 to 255"),
    ({"x": _X[0]}, r"shape \(16, 16\)"), ({"x": np.zeros((2, 16, 16, 2), np.uint8)}, "with 1, 3 or 4 channels"),
    ({"x": _X[:0]}, "holds no images"), ({"x": _X[:, :2]}, "it is 16 x 2 pixels, below data.smallest = 8"),
    ({"x": np.array([None, "a"])}, "holds Python objects"), ({"x": _X.T}, "column order"),
    ({"x": _X, "y": np.zeros(3, np.int64)}, "y is int64 of shape"),
    ({"x": _X, "y": np.zeros(4)}, "y is float64")])
def test_unusable_npz(tmp_path: Path, arrays: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        read(tmp_path, npz(tmp_path / "a.npz", **arrays))


def test_npz_of_absurd_size_and_cut_short(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (1 << 40, 28, 28)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", header.getvalue() + b"\0" * 1000)
    with pytest.raises(UserError, match="does not agree with its"):
        read(tmp_path, tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("x.npy", b"no array at all")
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path, tmp_path / "b.npz")


def test_npz_labels(tmp_path: Path) -> None:
    x = np.stack([scene(i, 16, 1)[..., 0] for i in range(30)])
    path = npz(tmp_path / "a.npz", x=x, y=np.arange(30) % 3 + 9)
    images = prepared(tmp_path / "cache", path, size=(16, 16), colour="grey")
    assert images.classes == ("9", "10", "11")
    assert images.names("train")[0].startswith("a[")
    assert prepared(tmp_path / "cache", path, size=(16, 16), colour="grey", label="none").classes == ()


def test_broken_files_in_a_folder_are_skipped_counted_and_named(tmp_path: Path) -> None:
    folder = album(tmp_path / "a", 6, classes=())
    whole = (folder / "000.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[:len(whole) // 2])
    (folder / "scan.tiff").write_bytes(b"II*\0")
    (folder / "readme.md").write_text("hello")
    save(folder / "dot.png", np.zeros((1, 1, 3), np.uint8))
    images = prepared(tmp_path / "cache", folder)
    assert images.report["images"] == {"read": 6, "kept": 6}
    assert images.report["sources"]["kinds"] == {"damaged": 1, "too small": 1, "not an image": 1}
    said = "\n".join(images.report["sources"]["first_left_out"])
    assert "cut.png: it is damaged or cut short" in said
    assert "dot.png: it is 1 x 1 pixels, below data.smallest = 8" in said
    assert "scan.tiff: .tiff is not read: convert it to PNG" in said
    assert images.report["sources"]["other_files"] == 1


def test_a_broken_file_that_was_named_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"hello")
    with pytest.raises(UserError, match=r"a.jpg in data.paths: it is no PNG, JPEG"):
        prepared(tmp_path / "cache", path)


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.paths is empty"):
        prepared(tmp_path / "cache")
    with pytest.raises(UserError, match=r"in data\.test_paths does not exist"):
        prepared(tmp_path / "cache", album(tmp_path / "a"), test_paths=(str(tmp_path / "gone"),))
    (tmp_path / "b").mkdir()
    with pytest.raises(UserError, match="name one that holds images"):
        prepared(tmp_path / "cache", tmp_path / "b")
    (tmp_path / "b" / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match="holds no images that can be used"):
        prepared(tmp_path / "cache", tmp_path / "b")


def test_unreadable_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, closed = album(tmp_path / "a", 4), tmp_path / "a" / "closed"
    closed.mkdir()
    real = os.scandir

    def scandir(path: Any) -> Any:
        if str(path) == str(closed):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    items, notes = read(tmp_path, folder)
    assert len(items) == 4
    assert "closed: this folder cannot be read: make it readable" in notes.skipped.first[0]


def test_digits_of_scikit_learn(tmp_path: Path) -> None:
    try:
        import sklearn  # type: ignore[import-untyped]  # noqa: F401
    except ModuleNotFoundError:
        with pytest.raises(UserError, match=r"handmill\[digits\]"):
            prepared(tmp_path / "cache", image_files.DIGITS)
        return
    images = prepared(tmp_path / "cache", image_files.DIGITS, size=(8, 8), colour="grey")
    assert images.classes == tuple("0123456789")
    assert images.report["images"]["read"] == 1797

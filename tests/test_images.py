"""Prepared images: copies, splits, what is written and reported, the cache; pictures for people."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance
from pixels import album, prepared, recipe_of, save, scene, shared

from handmill.data import image_copies
from handmill.data.image_prepare import by_class
from handmill.data.image_report import report_lines
from handmill.data.images import Images
from handmill.data.splits import NAMES
from handmill.errors import UserError
from handmill.media import pictures
from handmill.media.image import Data


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def sized(image: Image.Image, side: int) -> Image.Image:
    return image.resize((side, side), Image.Resampling.BICUBIC)


CHANGES = {
    "jpeg 75": lambda image: jpeg(image, 75),
    "jpeg 50": lambda image: jpeg(image, 50),
    "half as large": lambda image: sized(image, image.width // 2),
    "half as large again": lambda image: sized(image, image.width * 3 // 2),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.05),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.92),
    "less contrast": lambda image: ImageEnhance.Contrast(image).enhance(0.92),
    "small, compressed, brighter": lambda image: ImageEnhance.Brightness(jpeg(sized(image, 36), 75)).enhance(1.04),
}


def found(pixels: np.ndarray[Any, Any], changed: np.ndarray[Any, Any], distance: int = 6) -> float:
    """The share of changed images that are found to be copies of their own original."""
    count = len(pixels)
    copies = image_copies.find(image_copies.sign(np.concatenate([pixels, changed])), distance)
    assert (copies.of[:count] == np.arange(count)).all(), "unlike images were merged"
    hits = copies.of[count:] == np.arange(count)
    assert (hits | (copies.of[count:] == np.arange(count) + count)).all(), "a copy of the wrong image"
    return float(hits.mean())


@pytest.mark.parametrize("change", CHANGES)
def test_near_copies_of_scenes_are_found(change: str) -> None:
    originals = [Image.fromarray(scene(i)) for i in range(60)]
    changed = [sized(CHANGES[change](image), 48) for image in originals]
    assert found(np.stack([*map(np.asarray, originals)]), np.stack([*map(np.asarray, changed)])) >= 0.95


def emoji(count: int) -> list[Image.Image]:
    import zipfile

    with zipfile.ZipFile(shared("emoji64.zip")) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".png"))[::1900 // count]
        loaded = [Image.open(io.BytesIO(archive.read(name))).convert("RGBA") for name in names]
    white = Image.new("RGBA", (64, 64), "white")
    return [Image.alpha_composite(white, image).convert("RGB") for image in loaded]


def test_emoji_copies_are_found_and_unlike_ones_are_not(tmp_path: Path) -> None:
    originals = emoji(380)
    pixels = np.stack([*map(np.asarray, originals)])
    pixels = pixels[image_copies.find(image_copies.sign(pixels), 0).kept]
    originals = [Image.fromarray(image) for image in pixels]
    for change, least in (("jpeg 75", 0.97), ("jpeg 50", 0.94), ("half as large again", 0.99), ("darker", 0.97),
                          ("less contrast", 0.99)):
        changed = np.stack([np.asarray(sized(CHANGES[change](image), 64)) for image in originals])
        assert found(pixels, changed) >= least, change


def test_all_emoji_but_one_flag_are_distinct(tmp_path: Path) -> None:
    images = prepared(tmp_path / "cache", shared("emoji64.zip"), label="category")
    copies = images.report["duplicates"]
    assert (copies["exact"], copies["near"]) == (14, 1)  # the flags of Chad and Romania differ by a shade of blue
    assert len(images.classes) == 10
    assert images.report["captions"] == 1896


def test_no_two_digits_are_merged() -> None:
    x = np.load(shared("mnist-train10k.npz"))["x"][..., None]
    assert len(image_copies.find(image_copies.sign(x), Data().near_duplicates).kept) == len(x)
    changed = [np.asarray(jpeg(Image.fromarray(image[..., 0]), 75).convert("L"))[..., None] for image in x[:1000]]
    assert found(x[:1000], np.stack(changed)) >= 0.99


def test_candidates_are_all_close_pairs_once() -> None:
    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 1 << 64, 40, np.uint64, endpoint=False).repeat(10)
    for _ in range(2):  # flip up to two bits of each
        hashes ^= np.uint64(1) << generator.integers(0, 64, 400, np.uint64)
    for distance in (1, 4, 8):
        pairs = [pair for a, b in image_copies.candidates(hashes, distance) for pair in zip(a, b, strict=True)]
        a, b = np.nonzero(np.triu(np.bitwise_count(hashes[:, None] ^ hashes) <= distance, 1))
        assert sorted(pairs) == sorted(zip(a, b, strict=True))
        assert pairs


def test_likeness_does_not_run_on() -> None:
    """In a slow fade every image is like the next; what is removed is like the image that was kept."""
    start, end = scene(1).astype(float), scene(2).astype(float)
    fade = np.stack([(start + (end - start) * i / 60).round().astype(np.uint8) for i in range(61)])
    signed = image_copies.sign(fade)
    copies = image_copies.find(signed, 10)
    assert 4 < len(copies.kept) < 61
    removed = np.flatnonzero(copies.of != np.arange(61))
    assert image_copies._finely_alike(signed, removed, copies.of[removed]).all()


def test_flat_images_of_other_colours_are_not_copies() -> None:
    flat = np.stack([np.full((32, 32, 3), colour, np.uint8) for colour in
                     ((255, 255, 255), (0, 0, 0), (128, 128, 128), (150, 150, 150), (255, 0, 0), (0, 120, 0))])
    assert len(image_copies.find(image_copies.sign(flat), 10).kept) == 6


def test_official_test_images_stay_and_their_copies_leave_train(tmp_path: Path) -> None:
    album(tmp_path / "train", 12)
    for i in (3, 4):
        save(tmp_path / "test" / "cat" / f"{i}.jpg", scene(i), quality=80)
    save(tmp_path / "test" / "dog" / "a.png", scene(90))
    save(tmp_path / "test" / "dog" / "b.png", scene(90))
    images = prepared(tmp_path / "cache", tmp_path / "train", test_paths=(str(tmp_path / "test"),))
    assert sorted(images.names("test")) == ["cat/3.jpg", "cat/4.jpg", "dog/a.png", "dog/b.png"]
    assert images.count("train") + images.count("validation") == 10
    assert not {"dog/003.png", "cat/004.png"} & {*images.names("train"), *images.names("validation")}
    copies = images.report["duplicates"]
    assert (copies["near"], copies["of_test_images"], copies["of_another_class"]) == (2, 2, 1)
    assert any("stood in another class" in remark for remark in images.report["remarks"])


def test_what_is_written_is_what_was_given(tmp_path: Path) -> None:
    folder = album(tmp_path / "a", 20, ("10", "9"), size=32)
    (folder / "captions.csv").write_text("file,text\n" + "".join(f"{(10, 9)[i % 2]}/{i:03}.png,number {i}\n" for i in
                                                                  range(20)))
    images = Images.open(prepared(tmp_path / "cache", folder, test=0.2).folder)
    assert images.classes == ("9", "10")
    assert {name: images.count(name) for name in NAMES} == {"train": 15, "validation": 1, "test": 4}
    assert images.complete()
    for split in NAMES:
        pixels = images.images(split)
        assert isinstance(pixels, np.memmap)
        numbers = [int(Path(name).stem) for name in images.names(split)]
        assert (pixels == np.stack([scene(i, 32) for i in numbers])).all()
        assert images.captions(split) == [f"number {i}" for i in numbers]
        assert [images.classes[label] for label in images.labels(split)] == [name.split("/")[0] for name in
                                                                            images.names(split)]
    train = images.images("train") / 255
    assert np.allclose(images.report["pixels"]["mean"], train.mean((0, 1, 2)), atol=1e-4)
    assert np.allclose(images.report["pixels"]["deviation"], train.std((0, 1, 2)), atol=1e-4)
    kept = images.held_out_files()
    assert all((images.folder / name).is_file() for name in kept)
    assert not any(name.startswith("train") for name in kept)
    assert {path.name for path in images.folder.iterdir()} - {*kept} == {
        "train.npy", "train.labels.npy", "train.json", "hashes.json"}


def test_cache_is_used_again_and_knows_what_matters(tmp_path: Path) -> None:
    folder = album(tmp_path / "a", 12)
    first = prepared(tmp_path / "cache", folder)
    written = (first.folder / "data.json").stat().st_mtime_ns
    for augmentation in ({}, {"flip": True}, {"shift": 2}, {"rotation": 5.0}, {"colour_jitter": 0.1}):
        again = prepared(tmp_path / "cache", folder, **augmentation)
        assert again.fingerprint == first.fingerprint
        assert (again.folder / "data.json").stat().st_mtime_ns == written
    others = [prepared(tmp_path / "cache", folder, **changed) for changed in ({"size": (16, 16)}, {"seed": 2},
                                                                             {"colour": "grey"}, {"fit": "pad"})]
    save(folder / "cat" / "000.png", scene(50))
    others.append(prepared(tmp_path / "cache", folder))
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == 6
    assert not list((tmp_path / "cache").glob("*.tmp-*"))


def test_a_damaged_cache_is_made_again(tmp_path: Path) -> None:
    folder = album(tmp_path / "a", 12)
    images = prepared(tmp_path / "cache", folder)
    before = np.array(images.images("train"))
    with (images.folder / "train.npy").open("r+b") as file:
        file.truncate(1000)
    assert not images.complete()
    with pytest.raises(UserError, match="is damaged"):
        Images.open(images.folder).images("train")
    assert (prepared(tmp_path / "cache", folder).images("train") == before).all()
    (images.folder / "data.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(UserError, match="is not of the format"):
        Images.open(images.folder)


def test_a_cache_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="prepared data cannot be written to"):
        prepared(tmp_path / "file", album(tmp_path / "a", 8))
    (tmp_path / "a" / "cat" / "000.png").write_bytes(b"")
    with pytest.raises(UserError, match="it is empty"):
        prepared(tmp_path / "cache", tmp_path / "a" / "cat" / "000.png")
    assert list((tmp_path / "cache").iterdir()) == []


def test_one_sub_folder_is_no_class(tmp_path: Path) -> None:
    images = prepared(tmp_path / "cache", album(tmp_path / "a", 8, ("images",)))
    assert images.classes == ()
    assert set(images.labels("train")) == {-1}


def test_a_class_of_one_image_stays_in_train(tmp_path: Path) -> None:
    folder = album(tmp_path / "a", 20)
    save(folder / "eel" / "x.png", scene(70))
    images = prepared(tmp_path / "cache", folder, validation=0.3, test=0.3)
    assert "eel/x.png" in images.names("train")
    assert images.report["remarks"][0] == "1 of 3 classes have one image, always in train, such as 'eel': add images"


def test_too_few_images(tmp_path: Path) -> None:
    for count in (1, 2):
        with pytest.raises(UserError, match="too few to hold some out"):
            prepared(tmp_path / "cache", album(tmp_path / str(count), count, classes=()))
    with pytest.raises(UserError, match="4 images in 4 classes are too few"):
        prepared(tmp_path / "cache", album(tmp_path / "b", 4, classes=tuple("abcd")))
    images = prepared(tmp_path / "cache", album(tmp_path / "c", 3, classes=()))
    assert [images.count(name) for name in NAMES] == [1, 1, 1]


@given(st.lists(st.integers(2, 60), min_size=1, max_size=12), st.floats(0.01, 0.4), st.floats(0.0, 0.4),
       st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_splits_are_whole_stratified_and_of_their_size(sizes: list[int], validation: float, test: float,
                                                       seed: int) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    if len(labels) < 3 or (test and sum(size - 1 for size in sizes) < 2):
        return
    hashes = np.random.default_rng(1).integers(0, 1 << 63, len(labels), np.uint64)
    parts = by_class(labels, hashes, seed, validation, test)
    assert sorted(np.concatenate(list(parts.values()))) == list(range(len(labels)))
    assert set(labels[parts["train"]]) == set(range(len(sizes)))
    for name, share in (("validation", validation), ("test", test)):
        assert bool(len(parts[name])) == bool(share)
        if validation + test < 0.5:
            assert len(parts[name]) <= max(1, share * len(labels) + 0.5)
            counts = np.bincount(labels[parts[name]], minlength=len(sizes))
            assert (counts <= np.array(sizes) * share + 1).all()


def test_most_images_keep_their_side_when_others_come() -> None:
    hashes = np.random.default_rng(1).integers(0, 1 << 63, 1100, np.uint64)
    labels = np.zeros(1100, np.int64)
    before, after = (by_class(labels[:n], hashes[:n], 1, 0.1, 0.1) for n in (1000, 1100))
    stayed = np.intersect1d(before["test"], after["test"])
    assert len(stayed) >= 90
    assert (by_class(labels, hashes, 2, 0.1, 0.1)["test"] != after["test"]).any()


def test_report_on_the_screen(tmp_path: Path) -> None:
    folder = album(tmp_path / "a", 20)
    save(folder / "cat" / "again.png", scene(0))
    save(folder / "cat" / "like.jpg", scene(2), quality=80)
    save(folder / "dog" / "small.png", scene(60, 12))
    (folder / "dog" / "broken.png").write_bytes(b"hello")
    images = prepared(tmp_path / "cache", folder, licence="CC0-1.0")
    text = "\n".join(report_lines(images.report))
    for line in ("images      23 read, 21 kept; 1 exact and 1 near copies removed",
                 "splits      train 19, validation 1, test 1",
                 "pixels      32 x 32 RGB, from 2 sizes, 12 x 12 to 48 x 48, most often 48 x 48; mean 0.",
                 "classes     2: dog 11, cat 10; the largest has 1.1 times the smallest",
                 "cat/again.png of cat/000.png; cat/like.jpg of cat/002.png", "left out    1 files (1 not an image)",
                 "note        1 images are smaller than data.size = [32, 32] and were enlarged"):
        assert line in text, text
    entry = images.manifest["sources"][0]
    assert (entry["licence"], entry["files"], entry["images"], entry["kept"]) == ("CC0-1.0", 24, 23, 21)
    assert len(entry["sha256"]) == 64
    with Image.open(images.folder / "contact.png") as sheet:
        assert sheet.width > 600


@pytest.mark.parametrize(("setting", "said"), [
    ({"size": (0, 8)}, "size = "), ({"background": (0, 0, 256)}, "background = "), ({"validation": 0.0}, "validation"),
    ({"near_duplicates": 20}, "near_duplicates = 20"), ({"shift": 32}, "shift = 32"), ({"shift": -1}, "shift"),
    ({"rotation": 200.0}, "rotation"), ({"colour_jitter": 2.0}, "colour_jitter"), ({"binarise": "sampled"}, "grey"),
    ({"validation": 0.5, "test": 0.5}, "leave a part to train on"), ({"largest": 10**12}, "largest")])
def test_settings_that_cannot_be(setting: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        recipe_of("a", **setting)


def test_levels_survive_the_way_to_the_network_and_back() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    x = pictures.from_uint8(levels)
    assert x.shape == (1, 1, 16, 16)
    assert (x.min().item(), x.max().item()) == (-1, 1)
    assert (pictures.to_uint8(x) == levels).all()
    assert pictures.to_uint8(torch.tensor([-9.0, 9.0]).view(2, 1, 1, 1)).ravel().tolist() == [0, 255]


def test_grid() -> None:
    images = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1).repeat(4, 1).repeat(3, 2)
    sheet = pictures.grid(images, columns=2, gap=1, scale=2)
    assert sheet.shape == (3 * 9 + 1, 2 * 7 + 1, 3)
    assert (sheet[1:9, 1:7] == 0).all()
    assert (sheet[19:27, 1:7] == 4).all()
    assert (sheet[19:27, 8:14] == 255).all()
    assert pictures.grid(images).shape[0] >= 2 * 64


def test_labelled_rows() -> None:
    images = np.zeros((3, 8, 8, 3), np.uint8)
    sheet = pictures.labelled_rows([("a word — Ω я", images), ("", images[:1])], scale=4)
    assert sheet.shape[2] == 3
    assert (sheet == 0).all(2).sum() >= 4 * 32 * 32


@given(st.dictionaries(st.text("abcdefgh ", min_size=1, max_size=20).filter(lambda key: key == key.strip()),
                       st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=60), max_size=4))
@settings(max_examples=30, deadline=None)
def test_metadata_comes_back(tmp_path_factory: pytest.TempPathFactory, metadata: dict[str, str]) -> None:
    path = tmp_path_factory.mktemp("png") / "a.png"
    pixels = scene(1, 8)
    pictures.save_png(path, pixels, metadata)
    assert pictures.read_metadata(path) == metadata
    assert (np.asarray(Image.open(path)) == pixels).all()
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]


def test_pictures_that_cannot_be_written_or_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        pictures.save_png(tmp_path / "gone" / "a.png", scene(1, 8))
    (tmp_path / "a.png").write_bytes(b"hello")
    with pytest.raises(UserError, match="cannot be read as PNG"):
        pictures.read_metadata(tmp_path / "a.png")

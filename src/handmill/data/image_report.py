"""What the user is told of the images: the values of report.json, a few lines for the screen, a contact sheet."""

from pathlib import Path
from typing import Any

import numpy as np

from handmill.data.corpus import Ints
from handmill.data.decoding import Pixels
from handmill.data.image_copies import Copies
from handmill.data.image_files import Notes
from handmill.data.image_read import Read
from handmill.data.splits import Parts
from handmill.media.image import Data

_EXAMPLES = 20  # copies named in the report
_COMMON = 10  # sizes
_SHOWN = 8  # classes on the screen
_SHEET, _ROWS = 100, 25  # images and rows of the contact sheet
_FEW = 10  # images of a class in training, below which it is remarked on


def compose(data: Data, notes: Notes, read: Read, copies: Copies, classes: tuple[str, ...], labels: Ints,
            parts: Parts, moments: tuple[Any, Any]) -> dict[str, Any]:
    """The report, but for the time taken."""
    kept = copies.kept
    assert sum(map(len, parts.values())) == len(kept), "every kept image is in one split"
    counts = np.bincount(labels[kept] + 1, minlength=len(classes) + 1).tolist()
    report: dict[str, Any] = {
        "sources": {"left_out": notes.skipped.files, "records_left_out": notes.skipped.records,
                    "kinds": dict(notes.kinds.most_common()), "first_left_out": notes.skipped.first,
                    "other_files": notes.other},
        "images": {"read": len(read.names), "kept": len(kept)},
        "shape": list(data.shape),
        "sizes": _sizes(read),
        "decoding": dict(read.remarks.most_common()),
        "duplicates": _copies(copies, read, labels, data),
        "classes": {"images": dict(zip(classes, counts[1:], strict=True)), "unlabelled": counts[0]},
        "captions": sum(bool(read.captions[i]) for i in kept),
        "splits": {name: {"images": len(numbers)} for name, numbers in parts.items()},
        "pixels": {"measured_on": "train", "mean": np.round(moments[0], 4).tolist(),
                   "deviation": np.round(moments[1], 4).tolist()},
    }
    return report | {"remarks": _remarks(data, notes, report, classes, labels[parts["train"]])}


def _sizes(read: Read) -> dict[str, Any]:
    by_area = sorted(read.sizes, key=lambda size: (size[0] * size[1], size))
    return {"distinct": len(by_area), "smallest": list(by_area[0]), "largest": list(by_area[-1]),
            "common": [[*size, count] for size, count in read.sizes.most_common(_COMMON)]}


def _copies(copies: Copies, read: Read, labels: Ints, data: Data) -> dict[str, Any]:
    found = np.flatnonzero(copies.of != np.arange(len(copies.of)))
    of = copies.of[found]
    first = [{"copy": read.names[a], "of": read.names[b], "near": bool(copies.near[a])}
             for a, b in zip(found[:_EXAMPLES], of[:_EXAMPLES], strict=True)]
    return {"exact": int((~copies.near[found]).sum()), "near": int(copies.near[found].sum()),
            "bits": data.near_duplicates, "of_test_images": int((of < read.tests).sum()),
            "of_another_class": int((labels[found] != labels[of]).sum()), "first": first}


def _remarks(data: Data, notes: Notes, report: dict[str, Any], classes: tuple[str, ...], train: Ints) -> list[str]:
    remarks = []
    counts = np.bincount(train[train >= 0], minlength=len(classes))  # of each class in training
    alone = [name for name in classes if report["classes"]["images"][name] == 1]
    few = int((counts < _FEW).sum())
    if alone:
        remarks.append(f"{len(alone):,} of {len(classes):,} classes have one image, always in train, such as "
                       f"{alone[0]!r}: add images")
    elif few:
        remarks.append(f"{few:,} of {len(classes):,} classes have fewer than {_FEW} images to train on, such as "
                       f"{classes[int(np.argmin(counts))]!r}: add images")
    if classes and report["classes"]["unlabelled"]:
        remarks.append(f"{report['classes']['unlabelled']:,} images have no class: put them in a sub-folder of one")
    if differ := report["duplicates"]["of_another_class"]:
        remarks.append(f"{differ:,} removed copies stood in another class than the image that was kept: look at "
                       "duplicates in report.json")
    if enlarged := report["decoding"].get("enlarged", 0):
        remarks.append(f"{enlarged:,} images are smaller than data.size = {list(data.size)} and were enlarged, which "
                       "blurs them: lower data.size or raise data.smallest")
    if animated := report["decoding"].get("first frame of an animation", 0):
        remarks.append(f"of {animated:,} animations the first frame was taken")
    if notes.captionless:
        remarks.append(f"{notes.captionless:,} images are not named in the table of captions: they have none")
    return remarks


def report_lines(report: dict[str, Any]) -> list[str]:
    """The report in a few lines for the screen."""
    images, copies, sizes, left_out = (report[key] for key in ("images", "duplicates", "sizes", "sources"))
    height, width, channels = report["shape"]
    lines = [
        f"images      {images['read']:,} read, {images['kept']:,} kept; {copies['exact']:,} exact and "
        f"{copies['near']:,} near copies removed" + _of_tests(copies),
        "splits      " + ", ".join(f"{name} {split['images']:,}" for name, split in report["splits"].items()
                                   if split["images"]),
        f"pixels      {width} x {height} {'RGB' if channels == 3 else 'grey'}, from {_seen(sizes)}; mean "
        f"{_numbers(report['pixels']['mean'])}, deviation {_numbers(report['pixels']['deviation'])} (of 1)",
    ]
    if report["classes"]["images"]:
        lines.append(f"classes     {_classes(report['classes']['images'])}")
    if report["captions"]:
        lines.append(f"captions    {report['captions']:,}")
    if copies["first"]:
        lines.append("copies      " + "; ".join(f"{pair['copy']} of {pair['of']}" for pair in copies["first"][:2]))
    if left_out["first_left_out"]:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in left_out["kinds"].items())
        lines.append(f"left out    {left_out['left_out']:,} files{f' ({kinds})' if kinds else ''} and "
                     f"{left_out['records_left_out']:,} lines, first {left_out['first_left_out'][0]}")
    if report["decoding"]:
        lines.append("decoding    " + ", ".join(f"{count:,} {what}" for what, count in report["decoding"].items()))
    return lines + [f"note        {remark}" for remark in report["remarks"]]


def _of_tests(copies: dict[str, Any]) -> str:
    return f", {copies['of_test_images']:,} of them of test images" if copies["of_test_images"] else ""


def _seen(sizes: dict[str, Any]) -> str:
    (height, width, _), (low_height, low_width) = sizes["common"][0], sizes["smallest"]
    high_height, high_width = sizes["largest"]
    if sizes["distinct"] == 1:
        return f"{width} x {height}"
    return (f"{sizes['distinct']:,} sizes, {low_width} x {low_height} to {high_width} x {high_height}, most often "
            f"{width} x {height}")


def _numbers(values: list[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)


def _classes(images: dict[str, int]) -> str:
    ordered = sorted(images.items(), key=lambda pair: -pair[1])
    shown = ", ".join(f"{name} {count:,}" for name, count in ordered[:_SHOWN])
    more = f" and {len(ordered) - _SHOWN:,} more" if len(ordered) > _SHOWN else ""
    largest, smallest = ordered[0][1], ordered[-1][1]
    return f"{len(ordered):,}: {shown}{more}; the largest has {largest / max(1, smallest):.1f} times the smallest"


def contact_sheet(path: Path, pixels: Pixels, labels: Ints, classes: tuple[str, ...], kept: Ints) -> None:
    """Draw up to about a hundred of the kept images (M, H, W, C), a row for each of the largest classes."""
    from handmill.media import pictures

    if not classes:
        sheet = pictures.grid(pixels[kept[_spread(len(kept), _SHEET)]])
    else:
        counts = np.bincount(labels[kept] + 1, minlength=len(classes) + 1)[1:]
        largest = np.sort(np.argsort(-counts, kind="stable")[:_ROWS])
        each = max(4, _SHEET // len(largest))
        rows = []
        for number in largest[counts[largest] > 0]:
            mine = kept[labels[kept] == number]
            rows.append((f"{classes[number]} ({len(mine):,})", pixels[mine[_spread(len(mine), each)]]))
        sheet = pictures.labelled_rows(rows)
    pictures.save_png(path, sheet)


def _spread(count: int, most: int) -> Ints:
    """Up to `most` of 0..count-1, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))

"""Moving pictures, read back by Pillow and by PyAV's decoder."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pixels import scene

from handmill.errors import UserError
from handmill.media import moving

ABOUT = {"seed": "7", "class": "Möwe"}


def frames(count: int = 12, size: int = 28, channels: int = 3) -> np.ndarray[Any, Any]:
    """A scene that moves to the right."""
    return np.stack([np.roll(scene(1, size, channels), i, 1) for i in range(count)])


def shown(path: Path) -> tuple[np.ndarray[Any, Any], list[int]]:
    """The frames (N, H, W, 3) that a program shows of a GIF, and how long each stays, in ms."""
    images, durations = [], []
    with Image.open(path) as image:
        for i in range(image.n_frames):
            image.seek(i)
            images.append(np.asarray(image.convert("RGB")))
            durations.append(image.info["duration"])
    return np.stack(images), durations


def test_gif_keeps_every_grey_as_it_is_and_enlarges_it_pixel_by_pixel(tmp_path: Path) -> None:
    grey = frames(channels=1)
    moving.save_gif(tmp_path / "a.gif", grey, 10, ABOUT)
    images, durations = shown(tmp_path / "a.gif")
    assert durations == [100] * 12
    assert images.shape == (12, 280, 280, 3)
    np.testing.assert_array_equal(images, np.broadcast_to(grey, (12, 28, 28, 3)).repeat(10, 1).repeat(10, 2))


def test_gif_keeps_few_colours_exactly_and_many_nearly(tmp_path: Path) -> None:
    few = np.where(frames(channels=1) > 128, np.uint8([250, 10, 30]), np.uint8([3, 100, 200]))
    moving.save_gif(tmp_path / "few.gif", few)
    np.testing.assert_array_equal(shown(tmp_path / "few.gif")[0][:, ::10, ::10], few)
    moving.save_gif(tmp_path / "many.gif", frames())
    error = shown(tmp_path / "many.gif")[0][:, ::10, ::10].astype(float) - frames()
    assert np.sqrt(np.square(error).mean()) < 8
    assert np.abs(error).max() < 48


def test_gif_repeats_for_ever_and_says_what_made_it(tmp_path: Path) -> None:
    moving.save_gif(tmp_path / "a.gif", frames(), 25, ABOUT)
    with Image.open(tmp_path / "a.gif") as image:
        assert image.info["loop"] == 0
        assert json.loads(image.info["comment"]) == ABOUT


def test_gif_lasts_as_long_as_it_should_although_its_clock_ticks_in_hundredths(tmp_path: Path) -> None:
    moving.save_gif(tmp_path / "a.gif", frames(24), 24)
    durations = shown(tmp_path / "a.gif")[1]
    assert sum(durations) == 1000
    assert set(durations) == {40, 50}


def test_one_frame_is_a_moving_picture_too(tmp_path: Path) -> None:
    moving.save_gif(tmp_path / "a.gif", frames(1, channels=1))
    np.testing.assert_array_equal(shown(tmp_path / "a.gif")[0][0, ::10, ::10], frames(1, channels=1)[0].repeat(3, 2))


@pytest.mark.parametrize(("height", "width", "times"),
                         [(28, 28, 10), (32, 64, 4), (8, 8, 32), (256, 256, 1), (300, 9, 1)])
def test_small_frames_are_enlarged_to_256_pixels_or_a_little_more(height: int, width: int, times: int) -> None:
    assert moving.enlargement(height, width) == times


@pytest.mark.parametrize(("scale", "height", "width", "times"), [(9, 28, 28, 9), (9, 29, 28, 10), (1, 300, 301, 2)])
def test_sides_are_made_even(scale: int, height: int, width: int, times: int) -> None:
    assert moving.even(scale, height, width) == times


@pytest.mark.parametrize(("size", "channels", "side"), [(28, 3, 280), (27, 1, 270), (33, 1, 264)])
def test_mp4_is_read_back_with_its_frames_colours_and_speed(tmp_path: Path, size: int, channels: int,
                                                            side: int) -> None:
    av = pytest.importorskip("av")
    moving.save_mp4(tmp_path / "a.mp4", frames(12, size, channels), 12.5, ABOUT)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert float(stream.average_rate) == 12.5
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert json.loads(container.metadata["comment"]) == ABOUT
        images = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert images.shape == (12, side, side, 3)
    times = side // size
    error = images[:, times // 2::times, times // 2::times].astype(float) - frames(12, size, channels)
    assert np.abs(error).mean() < 4


def test_mp4_is_written_without_an_encoder_of_h264_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    av = pytest.importorskip("av")
    monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"libx264", "libopenh264"})
    moving.save_mp4(tmp_path / "a.mp4", frames())
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "mpeg4"
        assert sum(1 for _ in container.decode(video=0)) == 12


def test_mp4_begins_with_what_a_browser_needs_to_start(tmp_path: Path) -> None:
    pytest.importorskip("av")
    moving.save(tmp_path / "a.mp4", frames())
    content = (tmp_path / "a.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")


def test_mp4_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("av")
    with pytest.raises(UserError, match="cannot be written"):
        moving.save(tmp_path / "none" / "a.mp4", frames())


def test_without_its_package_mp4_says_which_extra_brings_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(UserError, match=r"pip install 'handmill\[video\]'"):
        moving.save(tmp_path / "a.mp4", frames())


def test_another_suffix_and_a_folder_that_is_not_there_are_refused_and_nothing_stays(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.avi .* \.gif or \.mp4"):
        moving.save(tmp_path / "a.avi", frames())
    with pytest.raises(UserError, match="cannot be written"):
        moving.save(tmp_path / "none" / "a.gif", frames())
    (tmp_path / "a.gif").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        moving.save(tmp_path / "a.gif", frames())
    assert [p.name for p in tmp_path.iterdir()] == ["a.gif"]

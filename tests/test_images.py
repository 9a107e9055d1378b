"""Decoding and the label order of class folders."""

from __future__ import annotations

import io

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from utils.cli import UserError
from utils.images import BadImage, contact_sheet, decode_rgb, draw_curves, image_size, list_image_folder


def picture(side=64):
    """A smooth image, so that lossy formats stay close to it: (side, side, 3) uint8."""
    ramp = np.linspace(0, 255, side).astype(np.uint8)
    return np.stack(
        [np.tile(ramp, (side, 1)), np.tile(ramp[:, None], (1, side)), np.full((side, side), 90, np.uint8)], 2
    )


def encoded(image, form, mode="RGB", **options):
    buffer = io.BytesIO()
    Image.fromarray(image).convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(("form", "tolerance"), [("JPEG", 8), ("PNG", 0), ("WEBP", 12), ("BMP", 0), ("TIFF", 0)])
def test_every_format_decodes_to_the_same_picture(form, tolerance, tmp_path):
    path = tmp_path / "image"
    path.write_bytes(encoded(picture(), form, **({"quality": 95} if form in ("JPEG", "WEBP") else {})))
    decoded = decode_rgb(path)
    assert decoded.dtype == np.uint8 and decoded.shape == (64, 64, 3)
    assert np.abs(decoded.astype(int) - picture()).max() <= tolerance


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_gray_and_cmyk_jpegs_become_rgb(mode):
    decoded = decode_rgb(encoded(picture(), "JPEG", mode=mode, quality=95))
    expected = np.asarray(Image.fromarray(picture()).convert(mode).convert("RGB")).astype(int)
    assert decoded.shape == (64, 64, 3) and np.abs(decoded - expected).max() <= 12


def test_transparency_and_palettes_become_rgb():
    for mode in ("RGBA", "P", "1"):
        assert decode_rgb(encoded(picture(), "PNG", mode=mode)).shape == (64, 64, 3)


def test_scaled_decoding_keeps_the_shorter_side_at_least_as_asked():
    data = encoded(picture(512), "JPEG", quality=95)
    for asked in (60, 64, 100, 250, 400):
        decoded = decode_rgb(data, min_height=asked, min_width=asked)
        assert asked <= min(decoded.shape[:2]) <= 512
    assert decode_rgb(data, min_height=64, min_width=64).shape[0] < 512


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("keep", [0, 3, 50, 0.5, 0.95])
def test_a_cut_file_is_a_bad_image_that_names_itself(form, keep, tmp_path):
    data = encoded(picture(256), form)
    path = tmp_path / "n01440764_000001.jpg"
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(BadImage, match="n01440764_000001"):
        decode_rgb(path)


def test_a_missing_file_is_a_bad_image(tmp_path):
    with pytest.raises(BadImage, match=r"none\.jpg"):
        decode_rgb(tmp_path / "none.jpg")


def test_labels_follow_torchvisions_imagefolder(tmp_path):
    from torchvision.datasets import ImageFolder

    for class_id, names in {"n2": ["b.jpg", "a.PNG"], "n10": ["c.webp"], "N1": ["d.jpeg"]}.items():
        (tmp_path / class_id).mkdir()
        for name in names:
            (tmp_path / class_id / name).write_bytes(b"x")
    (tmp_path / "n2" / ".a.jpg.1.tmp").write_bytes(b"x")
    (tmp_path / "n2" / "notes.txt").write_bytes(b"x")
    (tmp_path / ".hidden").mkdir()
    ids, samples = list_image_folder(tmp_path)
    (tmp_path / ".hidden").rmdir()
    theirs = ImageFolder(str(tmp_path))
    assert ids == theirs.classes
    assert samples == theirs.samples


@pytest.mark.parametrize("state", ["missing", "empty", "empty class"])
def test_a_folder_without_images_is_refused_by_name(state, tmp_path):
    root = tmp_path / "train"
    if state != "missing":
        root.mkdir()
    if state == "empty class":
        (root / "n1").mkdir()
    with pytest.raises(UserError, match=r"--data: .*train"):
        list_image_folder(root)


def test_a_truncated_jpeg_is_read_as_far_as_it_goes_only_on_demand(tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    whole = simplejpeg.encode_jpeg(pixels)
    path = tmp_path / "a.jpg"
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(BadImage, match=r"a\.jpg"):
        decode_rgb(path)
    half = decode_rgb(path, truncated=True)
    assert half.shape == (64, 48, 3) and np.array_equal(half[:16], simplejpeg.decode_jpeg(whole)[:16])
    assert f"truncated image {path}" in capsys.readouterr().err
    path.write_bytes(b"no image")
    with pytest.raises(BadImage):
        decode_rgb(path, truncated=True)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_the_size_is_read_from_the_header(form):
    whole = encoded(picture(256)[:200], form)
    assert image_size(whole) == (256, 200)
    assert form == "WEBP" or image_size(whole[: len(whole) * 3 // 4]) == (256, 200)
    with pytest.raises(BadImage, match=r"some\.jpg"):
        image_size(b"\xff\xd8\xff nothing", "some.jpg")


def test_a_contact_sheet_puts_each_image_where_it_belongs():
    red, blue = np.full((4, 4, 3), (255, 0, 0), np.uint8), np.full((4, 3, 3), (0, 0, 255), np.uint8)
    sheet = contact_sheet([("", [red, blue]), ("", [blue] * 9)], side=4, columns=2, gap=1, paper="#808080")
    wanted = np.full((9, 9, 3), 128, np.uint8)
    wanted[:4, :4], wanted[:4, 5:8], wanted[5:, :3], wanted[5:, 5:8] = red, blue, blue, blue
    np.testing.assert_array_equal(sheet, wanted)
    labelled = contact_sheet([("a class", [red])], side=32, columns=1, label_width=100)
    assert labelled.shape == (32, 132, 3) and labelled[:, :100].min() == 0 and (labelled[0, 100] == (255, 0, 0)).all()


def test_curves_name_what_they_draw_and_are_the_same_twice(capfd):
    names = ["$a", "_hidden", "$\\frac{$"]
    panels = {"loss $": ("epoch $", [(name, [1, 2], [3.0, 4.0], None) for name in names * 2])}
    svg = draw_curves(panels, "svg")
    assert svg == draw_curves(panels, "svg") and b"<svg" in svg
    for name in (*names, "loss $", "epoch $"):
        assert svg.decode().count(f"<!-- {name} -->") == 1
    assert draw_curves(panels, "png")[:8] == b"\x89PNG\r\n\x1a\n"
    assert capfd.readouterr().err == ""

"""Decoding and the label order of class folders."""

from __future__ import annotations

import io
import os
import resource
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from utils import images
from utils.cli import UserError
from utils.images import (
    BadImage,
    contact_sheet,
    decode_rgb,
    draw_curves,
    image_size,
    list_image_folder,
    load_eval_image,
)


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
    wild = [float("nan"), float("inf"), 1e308, -1e308]  # of a run that diverged
    assert b"<svg" in draw_curves({"loss": ("epoch", [("a", [1, 2, 3, 4], wild, None)])}, "svg")
    assert capfd.readouterr().err == ""


def jpeg_claiming(side: int) -> bytes:
    """A tiny JPEG whose header claims SIDE x SIDE pixels."""
    data = bytearray(simplejpeg.encode_jpeg(np.zeros((8, 8, 1), np.uint8), colorspace="GRAY"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = side.to_bytes(2, "big") * 2
    return bytes(data)


def png_claiming(side: int) -> bytes:
    data = bytearray(encoded(picture(), "PNG"))
    data[16:24] = side.to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize("data", [jpeg_claiming(65500), png_claiming(65500)], ids=["jpeg", "png"])
def test_an_image_that_claims_gigabytes_is_refused_by_name_before_they_are_taken(data, tmp_path):
    path = tmp_path / "huge.jpg"
    path.write_bytes(data)
    assert len(data) < 1000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for truncated in (False, True):
        with pytest.raises(BadImage, match=r"huge\.jpg: 65500 x 65500 pixels are more .* MAX_IMAGE_PIXELS=4290250000"):
            decode_rgb(path, truncated=truncated)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_the_limit_of_pixels_can_be_raised_and_lowered(monkeypatch):
    data = encoded(picture(64), "PNG")
    for value, fits in (("4095", False), ("4096", True)):
        monkeypatch.setenv("MAX_IMAGE_PIXELS", value)
        images.most_pixels.cache_clear()
        if fits:
            assert decode_rgb(data).shape == (64, 64, 3)
        else:
            with pytest.raises(BadImage, match="64 x 64 pixels are more than 4,095"):
                decode_rgb(data)
    monkeypatch.setenv("MAX_IMAGE_PIXELS", "many")
    images.most_pixels.cache_clear()
    with pytest.raises(UserError, match="MAX_IMAGE_PIXELS=many is not a whole number"):
        decode_rgb(data)
    monkeypatch.undo()
    images.most_pixels.cache_clear()


def test_an_image_that_resizing_makes_huge_is_refused():
    strip = encoded(np.zeros((2, 60_000, 3), np.uint8), "PNG")
    with pytest.raises(BadImage, match="strip: 7680000 x 256 pixels are more than"):
        load_eval_image(strip, 256, 224, name="strip")


@pytest.mark.parametrize("form", ["EPS", "GIF", "PPM", "ICO", "PDF", "TGA", "PCX"])
def test_other_formats_are_refused_whatever_their_name(form, tmp_path, monkeypatch):
    """An EPS file makes Pillow start Ghostscript."""

    def no_program(*_, **__):
        pytest.fail("a program was started")

    monkeypatch.setattr(subprocess, "Popen", no_program)
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(picture(), form))
    with pytest.raises(BadImage, match=r"a\.jpg: no JPEG, PNG, WEBP, BMP, TIFF image"):
        decode_rgb(path)
    with pytest.raises(BadImage, match=r"a\.jpg: no JPEG"):
        image_size(path.read_bytes(), "a.jpg")


@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
def test_only_regular_files_are_images(kind, tmp_path):
    path = tmp_path / "a.jpg"
    {"fifo": lambda: os.mkfifo(path), "folder": path.mkdir, "device": lambda: path.symlink_to("/dev/zero")}[kind]()
    with pytest.raises(BadImage, match=r"a\.jpg: (not a regular file|Is a directory)"):
        decode_rgb(path)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_of_grey_are_scaled_as_those_of_colour_are(form):
    """OpenCV writes 16 bits a channel of both; Pillow alone made the grey ones white."""
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, form)
    expected = np.repeat((np.arange(65536) // 256).reshape(256, 256, 1), 3, 2)
    assert np.array_equal(decode_rgb(buffer.getvalue()), expected)
    buffer = io.BytesIO()
    Image.fromarray(values.astype(np.float32)).save(buffer, "TIFF")
    with pytest.raises(BadImage, match="32 bits"):
        decode_rgb(buffer.getvalue(), name="x")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about damaged TIFF tags
@settings(max_examples=300, deadline=None)
@given(form=st.sampled_from(["JPEG", "PNG", "WEBP", "BMP", "TIFF"]), data=st.data())
def test_a_damaged_image_is_a_bad_image_and_nothing_else(form, data):
    """Bytes flipped, cut out, doubled or zeroed anywhere: decoded, or refused by name; its memory stays small."""
    whole = bytearray(encoded(picture(), form))
    for _ in range(data.draw(st.integers(1, 4))):
        at, length = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(1, 16))
        piece = whole[at : at + length]
        new = data.draw(st.sampled_from([b"", bytes(length), b"\xff" * length, piece * 2]) | st.binary(max_size=length))
        whole[at : at + length] = new
    for read in (lambda: decode_rgb(bytes(whole), name="x.jpg"), lambda: image_size(bytes(whole), "x.jpg")):
        try:
            read()
        except BadImage as error:
            assert "x.jpg" in str(error)


def test_folders_in_a_class_are_read_in_imagefolders_order(tmp_path, capsys):
    from torchvision.datasets import ImageFolder

    names = ["b/2.jpg", "b-c/1.jpg", "b/sub/deep/0.PNG", "b/sub.jpg", "b/a.jpg", "b/a-a/x.jpg", "b/a/y.jpg", "a/z.jpg"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    theirs = ImageFolder(str(tmp_path))
    assert list_image_folder(tmp_path) == (theirs.classes, theirs.samples)
    assert capsys.readouterr().err == ""
    (tmp_path / "b" / "sub" / "up").symlink_to(tmp_path / "b")  # never ends if followed
    for name in ("a/1.gif", "b/2.gif", "b/sub/notes"):
        (tmp_path / name).write_bytes(b"x")
    assert list_image_folder(tmp_path) == (theirs.classes, theirs.samples)
    assert (
        capsys.readouterr().err
        == f"--data: 3 files in {tmp_path} are not read as images (2 .gif, 1 without a suffix)\n"
    )


def test_a_folder_one_too_high_is_refused(tmp_path):
    for name in ("train/n1/a.jpg", "val/n1/b.jpg"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=r"no class folder of .* holds images itself, but .*train/n1 does"):
        list_image_folder(tmp_path)


def test_a_class_folder_that_is_not_utf8_is_named(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)  # noqa: PTH102
    Path(os.fsdecode(folder + b"/a.jpg")).write_bytes(b"x")
    with pytest.raises(UserError, match=r"caf\\udce9' is not UTF-8"):
        list_image_folder(tmp_path)


@pytest.mark.parametrize("quality", [60, 95])
def test_cmyk_jpegs_are_read_as_pillow_reads_them(quality):
    """As the transfer suite does: libjpeg-turbo's own conversion is up to two levels off."""
    ink = np.random.default_rng(0).integers(0, 256, (9, 9, 4), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(ink, "CMYK").resize((90, 70), Image.Resampling.BICUBIC).save(file, "JPEG", quality=quality)
    wanted = np.asarray(Image.open(io.BytesIO(file.getvalue())).convert("RGB"))
    assert np.array_equal(images.decode_rgb(file.getvalue()), wanted)


@pytest.mark.parametrize("resize,crop", [(20, 24), (24, 20), (21, 16), (16, 31)])
def test_the_test_transform_is_torchvisions_also_where_the_crop_is_larger(resize, crop):
    from torchvision import transforms

    rng = np.random.default_rng(resize)
    theirs = transforms.Compose([transforms.Resize(resize), transforms.CenterCrop(crop), transforms.PILToTensor()])
    for width, height in rng.integers(8, 60, (20, 2)):
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        ours = load_eval_image(encoded(image, "PNG"), resize, crop)
        assert np.array_equal(ours.numpy(), theirs(Image.fromarray(image)).numpy())

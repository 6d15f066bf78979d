"""Reading one image from whatever a dataset holds."""

import io

import numpy as np
import pytest
from PIL import Image

from repvgg_hf.training.images import convert, open_image


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_all_ways_to_store_an_image_give_the_same(tmp_path, make_images):
    (image,) = make_images(1)
    image.save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    values = [str(tmp_path / "a.png"), content, {"bytes": content, "path": None}, {"bytes": content, "path": "x.png"}]
    values += [{"bytes": None, "path": str(tmp_path / "a.png")}, {"path": str(tmp_path / "a.png")}]
    for value in values:
        assert np.array_equal(open_image(value, "RGB", "here"), image)
    assert np.array_equal(open_image("a.png", "RGB", "here", tmp_path), image)


@pytest.mark.parametrize("largest", [255, 65535])
@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "F"])
def test_sixteen_bits_keep_their_brightness(mode, largest):
    values = np.array([[0, 2000, 9000], [30000, 60000, 65535]])
    if mode == "F" and largest == 255:
        image = Image.fromarray((values / 257).astype(np.float32))
    elif mode in ("I", "F"):
        image = Image.fromarray(values.astype(np.int32 if mode == "I" else np.float32))
    else:
        image = Image.fromarray(values.astype(np.uint16))
        image = image if mode == "I;16" else Image.frombytes("I;16B", (3, 2), values.astype(">u2").tobytes())
    assert image.mode == mode
    gray = np.asarray(convert(image, "L"))
    assert np.array_equal(gray, (values / 257).round())
    assert np.array_equal(np.asarray(convert(image, "RGB")), gray[..., None].repeat(3, axis=2))


def test_floats_from_0_to_1():
    image = Image.fromarray(np.array([[0, 0.25, 1]], dtype=np.float32))
    assert np.asarray(convert(image, "L")).tolist() == [[0, 64, 255]]


@pytest.mark.parametrize("values", [[-1.0, 5.0], [np.nan, 1.0], [0.0, 70000.0]])
def test_gray_values_without_a_scale_are_refused(values):
    image = Image.fromarray(np.array([values], dtype=np.float32))
    with pytest.raises(ValueError, match="gray values .mode F.*expected 0 to 65535"):
        convert(image, "RGB")


def test_transparent_pixels_are_white():
    """As in transformers' own processors."""
    image = Image.fromarray(np.array([[[10, 20, 30, 255], [10, 20, 30, 0]]], dtype=np.uint8))
    assert np.asarray(convert(image, "RGB")).tolist() == [[[10, 20, 30], [255, 255, 255]]]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_every_mode_becomes_rgb(mode, make_images):
    source = make_images(1)[0].convert("L") if mode in ("LA", "PA") else make_images(1)[0]
    assert convert(source.convert(mode), "RGB").mode == "RGB" and convert(source.convert(mode), "L").mode == "L"


def test_a_turned_photograph_is_upright(make_images):
    (image,) = make_images(1, (5, 9))
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees
    value = encoded(image, exif=exif.tobytes())
    assert np.array_equal(open_image(value, "RGB", "here"), image.transpose(Image.Transpose.ROTATE_270))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_damaged_file_is_named(kind, tmp_path, make_images):
    path = tmp_path / "picture"
    content = encoded(make_images(1, (40, 40))[0], kind)
    for damaged in (content[: len(content) // 2], b"", b"no image"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"Image 3, column 'x', file {path}, can't be read .*: replace it"):
            open_image(str(path), "RGB", "Image 3, column 'x'")


def test_bombs_missing_files_and_empty_cells_are_named(monkeypatch, tmp_path, make_images):
    with pytest.raises(ValueError, match="here, file gone.png, does not exist, nor below .*: correct the path"):
        open_image("gone.png", "RGB", "here", tmp_path)
    for value in (None, {"bytes": None, "path": None}):
        with pytest.raises(ValueError, match=r"here is empty \(null\)"):
            open_image(value, "RGB", "here")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match="here has more pixels than PIL opens"):
        open_image(encoded(make_images(1)[0]), "RGB", "here")

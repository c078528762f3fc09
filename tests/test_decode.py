"""Crops of photographs: their geometry and distribution, and that decoding at a smaller size keeps the picture."""

import io
import math

import numpy as np
import pytest
from PIL import Image, ImageDraw

from regnet_flax.data import photos
from regnet_flax.data.photos import to_rgb


def photograph(width, height, seed=0):
    """Makes smooth shades with some shapes, which JPEG preserves well."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y = rng.integers(0, width), rng.integers(0, height)
        colour = tuple(rng.integers(0, 256, 3).tolist())
        draw.ellipse((x, y, x + width // 6, y + height // 5), fill=colour)
    return image


def encoded(image, form="JPEG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file


def get_params(width, height, random):
    """RandomResizedCrop.get_params, from torchvision's documentation and paper, with NumPy's random numbers."""
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = random.integers(0, width - w + 1), random.integers(0, height - h + 1)
            return left, top, left + w, top + h
    if width / height < 3 / 4:
        w, h = width, round(width / (3 / 4))
    elif width / height > 4 / 3:
        w, h = round(height * (4 / 3)), height
    else:
        w, h = width, height
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (300, 300), (640, 200)])
def test_random_crops_are_distributed_as_torchvisions(size):
    count, random = 4000, np.random.default_rng(0)
    ours = np.array([photos.random_box(*size, random.random(photos.UNIFORMS)) for _ in range(count)], float)
    reference = np.array([get_params(*size, random) for _ in range(count)], float)
    for boxes in (ours, reference):
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2] <= size[0]).all() and (boxes[:, 3] <= size[1]).all()

    def features(boxes):
        w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
        return {"area": w * h, "ratio": np.log(w / h), "left": boxes[:, 0], "top": boxes[:, 1]}

    for name, values in features(ours).items():
        both = np.sort(np.concatenate([values, other := features(reference)[name]]))
        cumulative = [np.searchsorted(np.sort(v), both, side="right") / count for v in (values, other)]
        # The Kolmogorov–Smirnov distance of two equal distributions stays below this in 999 of 1000 cases.
        assert np.abs(cumulative[0] - cumulative[1]).max() < 1.95 * math.sqrt(2 / count), name


def test_where_no_try_fits_the_centre_is_cropped():
    assert photos.random_box(1000, 10, [0.99] * photos.UNIFORMS) == (493, 0, 506, 10)
    assert photos.random_box(10, 1000, [0.99] * photos.UNIFORMS) == (0, 493, 10, 506)


@pytest.mark.parametrize("size", [(500, 375), (333, 500), (256, 256), (40, 90)])
def test_the_test_crop_is_resize_and_centre_crop(size):
    image = photograph(*size)
    ours = photos.read_crop(encoded(image, "PNG"), 224, lambda w, h: photos.centre_box(w, h, 224))
    width, height = (256, int(256 * size[1] / size[0])) if size[0] <= size[1] else (int(256 * size[0] / size[1]), 256)
    left, top = round((width - 224) / 2), round((height - 224) / 2)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    expected = np.asarray(resized.crop((left, top, left + 224, top + 224)), int)
    assert np.abs(ours - expected).max() <= 1  # from rounding


def test_a_crop_is_pillows_resize_of_the_box():
    image, box = photograph(120, 90), (10.5, 20, 100.25, 80)
    ours = photos.read_crop(encoded(image, "PNG"), 32, lambda w, h: box)
    np.testing.assert_array_equal(ours, np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR, box)))
    assert ours.dtype == np.uint8 and ours.shape == (32, 32, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("large", [False, True])
def test_exif_orientation_comes_before_the_crop(orientation, large):
    size = (640, 512) if large else (80, 60)  # the large image is decoded at a smaller size
    upright = photograph(*size)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Transpose.FLIP_LEFT_RIGHT …
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    seen = []

    def box(width, height):
        seen.append((width, height))
        return width / 8, 0, width, height / 2

    ours = photos.read_crop(encoded(stored, quality=95, exif=exif), 32, box)
    expected = upright.resize((32, 32), Image.Resampling.BILINEAR, (size[0] / 8, 0, size[0], size[1] / 2))
    assert seen == [size]
    assert np.abs(ours - np.asarray(expected, int)).mean() < 4  # with another orientation it is above 20


@pytest.mark.parametrize(("size", "scale"), [((2048, 1536), 4), ((1000, 750), 2), ((500, 375), 1)])
def test_a_large_jpeg_is_decoded_small_and_looks_the_same(monkeypatch, size, scale):
    decoded = []
    monkeypatch.setattr(photos, "to_rgb", lambda image: decoded.append(image.size) or to_rgb(image))
    file = encoded(photograph(*size), quality=92)
    whole = photos.read_crop(file, 224, lambda w, h: photos.centre_box(w, h, 224), draft=False)
    small = photos.read_crop(file, 224, lambda w, h: photos.centre_box(w, h, 224))
    assert decoded == [size, (math.ceil(size[0] / scale), math.ceil(size[1] / scale))]
    assert np.abs(small - whole.astype(int)).mean() < 1
    assert scale > 1 or (small == whole).all()


def test_a_small_crop_of_a_large_jpeg_keeps_its_detail(monkeypatch):
    decoded = []
    monkeypatch.setattr(photos, "to_rgb", lambda image: decoded.append(image.size) or to_rgb(image))
    photos.read_crop(encoded(photograph(2048, 1536)), 224, lambda w, h: (0, 0, 300, 300))
    assert decoded == [(2048, 1536)]


@pytest.mark.parametrize(
    ("mode", "form"), [("CMYK", "JPEG"), ("L", "JPEG"), ("P", "PNG"), ("RGBA", "PNG"), ("I;16", "PNG"), ("P", "GIF")]
)
def test_every_mode_becomes_rgb(mode, form):
    if mode == "I;16":
        image = Image.fromarray(np.full((40, 60), 200 * 256, np.uint16))
        expected = (200, 200, 200)
    else:
        image = Image.new("RGB", (60, 40), (200, 100, 50))
        expected = (124, 124, 124) if mode == "L" else (200, 100, 50)
        image = image.convert(mode)
    options = {"transparency": 0} if mode == "P" and form == "PNG" else {}
    ours = photos.read_crop(encoded(image, form, **options), 16, photos.whole_box)
    assert ours.shape == (16, 16, 3)
    assert np.abs(ours.astype(int) - expected).max() <= 26 * (form == "GIF" or mode == "P") + 3


def test_a_truncated_file_is_an_error():
    data = encoded(photograph(300, 200)).getvalue()
    with pytest.raises(OSError, match="truncated"):
        photos.read_crop(io.BytesIO(data[: len(data) // 2]), 32, photos.whole_box)

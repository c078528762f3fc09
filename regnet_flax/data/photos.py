"""Decodes photographs to upright 8-bit RGB, crops and resizes them, with Pillow."""

from __future__ import annotations

import functools
import math
import os
import stat
from collections.abc import Callable, Sequence
from typing import IO

import numpy as np
from PIL import ExifTags, Image, ImageOps

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels of the upright photograph

AREA = (0.08, 1.0)  # area of a random crop, as a share of the photograph
RATIO = (3 / 4, 4 / 3)  # width to height
TRIES = 10
UNIFORMS = 2 * TRIES + 2  # random numbers that a random crop needs
CENTRE = 0.875  # side of the test crop, as a share of the shorter side: 224 of 256

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".avif", ".jp2"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff"),
)
HEIC = (".heic", ".heif", ".hif")  # readable if pillow-heif is installed
# Pillow's names for these formats. Pillow runs other programs to decode some of the rest, such as EPS.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "AVIF", "JPEG2000", "PPM", "TIFF")
# Logged once for images that are not used exactly as stored.
TRANSPARENT = "some images have transparent parts, which are shown on white"
DARK = (
    "some images of 16 bits use the lowest 12 or fewer, and come out nearly black: multiply their values, by 16 for 12 "
    "bits, and save them again"
)
REMARKS = (TRANSPARENT, DARK)


@functools.cache
def reads_heic() -> bool:
    """Whether HEIC can be read; registers pillow-heif, the extra [heic], with Pillow."""
    try:
        import pillow_heif  # pyright: ignore[reportMissingImports]
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def extensions() -> tuple[str, ...]:
    """Returns the suffixes of readable image files, in lower case."""
    return EXTENSIONS + (HEIC if reads_heic() else ())


def formats() -> tuple[str, ...]:
    """Returns Pillow's names for the readable formats."""
    return FORMATS + (("HEIF",) if reads_heic() else ())


def open_image(file: str | os.PathLike | IO[bytes], formats: tuple[str, ...] | None = None) -> Image.Image:
    """Opens an image like Pillow's Image.open, but refuses images of suspicious size and anything but a file.

    Args:
        file: a path or a binary file.
        formats: the formats to try, by Pillow's names; None tries all.

    Raises:
        Image.DecompressionBombError: the image has more than Image.MAX_IMAGE_PIXELS pixels.
        ValueError: the path is not that of a regular file: a named pipe would block until its other end opens.
        Exception: whatever else Pillow raises for a file that it cannot open.
    """
    if isinstance(file, (str, os.PathLike)):
        if not stat.S_ISREG(os.stat(file).st_mode):
            raise ValueError("not a regular file")
        if os.fspath(file).lower().endswith(HEIC):
            reads_heic()
    # Turning Pillow's warning into an error would affect the whole process.
    image = Image.open(file, formats=formats)
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        image.close()
        raise Image.DecompressionBombError(
            f"{image.width}x{image.height} pixels, more than PIL.Image.MAX_IMAGE_PIXELS={limit}: shrink the image"
        )
    return image


def read_image(
    file: str | os.PathLike | IO[bytes], remarks: list[str] | None = None, formats: tuple[str, ...] | None = None
) -> Image.Image:
    """Reads the first frame of an image file as upright 8-bit RGB.

    Args:
        file: an image of any size and mode; 16-bit grey is scaled to 8 bits, transparent parts are shown on white.
        remarks: a list to which the applicable REMARKS are appended.
        formats: see open_image.

    Returns:
        The decoded image, mode "RGB", turned according to its EXIF orientation.

    Raises:
        Exception: see open_image, and whatever Pillow raises for a file that it cannot decode; ValueError for
            floating-point pixels.
    """
    with open_image(file, formats) as image:
        deep = _is_deep(image)
        upright = ImageOps.exif_transpose(image)
        _remark(upright, deep, remarks)
        return to_rgb(upright)


def _is_deep(image: Image.Image) -> bool:
    """Whether an image has 16 bits; call it before Pillow loads the image, which may cut them to 8."""
    return image.mode.startswith("I") or any(";16" in str(tile) for tile in getattr(image, "tile", ()))


def _remark(image: Image.Image, deep: bool, remarks: list[str] | None) -> None:
    if remarks is None:
        return
    if _is_transparent(image):
        remarks.append(TRANSPARENT)
    if deep:
        pixels = np.asarray(image)
        highest = pixels.max() // 256 if image.mode.startswith("I") else pixels[..., :3].max()
        if highest < 16 and pixels.any():
            remarks.append(DARK)


def _is_transparent(image: Image.Image) -> bool:
    if not image.has_transparency_data or image.mode.startswith("I"):
        return False
    alpha = (image if image.mode in ("RGBA", "LA") else image.convert("RGBA")).getchannel("A")
    return alpha.getextrema() != (255, 255)


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image of any mode to 8-bit RGB; see read_image."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range")
    if image.mode.startswith("I"):
        # Pillow's own conversion clips at 255, which turns nearly all of a 16-bit image white.
        image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) // 256).astype(np.uint8))
    elif _is_transparent(image):
        # The colour of transparent pixels is mostly black, and drawings may have their content in the alpha channel.
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    elif image.mode == "P":
        # Converted straight to RGB, palettes with transparency make Pillow warn.
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def random_box(width: int, height: int, uniforms: Sequence[float]) -> Box:
    """Draws a crop of random area and shape, like torchvision's RandomResizedCrop.get_params.

    Args:
      width: the photograph's width in pixels.
      height: the photograph's height in pixels.
      uniforms: UNIFORMS numbers in [0, 1): area and ratio of each of ten tries, and the position.
    """
    log_ratio = math.log(RATIO[0]), math.log(RATIO[1])
    for attempt in range(TRIES):
        area = width * height * (AREA[0] + (AREA[1] - AREA[0]) * uniforms[2 * attempt])
        ratio = math.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * uniforms[2 * attempt + 1])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(uniforms[-2] * (width - w + 1)), int(uniforms[-1] * (height - h + 1))
            return left, top, left + w, top + h
    # As much of the centre as the ratio allows.
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def centre_box(width: int, height: int, size: int) -> Box:
    """Returns the part that remains after resizing the shorter side to size / 0.875 and centre-cropping to size × size.

    It rounds like torchvision's Resize and CenterCrop.
    """
    short = round(size / CENTRE)
    if width <= height:
        resized = short, int(short * height / width)
    else:
        resized = int(short * width / height), short
    left, top = round((resized[0] - size) / 2), round((resized[1] - size) / 2)
    x, y = width / resized[0], height / resized[1]
    return left * x, top * y, (left + size) * x, (top + size) * y


def whole_box(width: int, height: int) -> Box:
    """Returns the whole photograph; resizing it to a square loses its aspect ratio."""
    return 0, 0, width, height


def read_crop(
    file: str | os.PathLike | IO[bytes],
    size: int,
    choose_box: Callable[[int, int], Box],
    draft: bool = True,
    remarks: list[str] | None = None,
) -> np.ndarray:
    """Decodes a part of a photograph, resized to size × size with antialiasing (bilinear).

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size, straight from its DCT coefficients, if the part then still has
    `size` pixels in each direction.

    Args:
      file: a photograph of any size and mode; see read_image.
      size: height and width of the result, in pixels.
      choose_box: maps width and height of the upright photograph to the part, which must not be empty.
      draft: whether to decode at a smaller size.
      remarks: see read_image.

    Returns:
      uint8 (size, size, 3), RGB.

    Raises:
      Exception: see read_image.
    """
    with open_image(file) as image:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        lies = orientation in (5, 6, 7, 8)  # the photograph lies on its side
        width, height = image.size[::-1] if lies else image.size
        left, top, right, bottom = choose_box(width, height)
        deep = _is_deep(image)
        if draft:
            x, y = math.ceil(width * size / (right - left)), math.ceil(height * size / (bottom - top))
            image.draft(None, (y, x) if lies else (x, y))
        turned = image if orientation == 1 else ImageOps.exif_transpose(image)
        _remark(turned, deep, remarks)
        upright = to_rgb(turned)
        x, y = upright.width / width, upright.height / height
        box = left * x, top * y, min(right * x, upright.width), min(bottom * y, upright.height)
        return np.asarray(upright.resize((size, size), Image.Resampling.BILINEAR, box))

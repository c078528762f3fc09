"""Photographs decoded, cropped and resized in one go, with Pillow."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import IO

import numpy as np
from PIL import ExifTags, Image, ImageOps

from regnet_flax.data.folder import open_image, to_rgb

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels of the upright photograph

AREA = (0.08, 1.0)  # of a random crop, as a share of the photograph's
RATIO = (3 / 4, 4 / 3)  # width to height
TRIES = 10
UNIFORMS = 2 * TRIES + 2  # random numbers that a random crop takes
CENTRE = 0.875  # of the shorter side that the test crop has: 224 of 256


def random_box(width: int, height: int, uniforms: Sequence[float]) -> Box:
    """A random crop of random area and shape, as torchvision's RandomResizedCrop.get_params draws it.

    Args:
      width: of the photograph, as height.
      uniforms: UNIFORMS numbers in [0, 1): area and ratio of each of ten tries, and the place.
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
    """The part that is left when the shorter side is resized to size / 0.875 and the centre cropped to size × size.

    Rounded as torchvision's Resize and CenterCrop do.
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
    """All of the photograph, whose shape is lost then."""
    return 0, 0, width, height


def read_crop(
    file: str | os.PathLike | IO[bytes], size: int, choose_box: Callable[[int, int], Box], draft: bool = True
) -> np.ndarray:
    """Decodes a part of a photograph, resized to size × size with antialiasing (bilinear).

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size, straight from its DCT coefficients, where the part still has
    `size` pixels each way then.

    Args:
      file: a photograph of any size and mode; see image_folder.read_image.
      size: height and width of the result, in pixels.
      choose_box: from width and height of the upright photograph to the part, not empty.
      draft: whether to decode at a smaller size.

    Returns:
      uint8 (size, size, 3), RGB.

    Raises:
      Exception: see image_folder.read_image.
    """
    with open_image(file) as image:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        lies = orientation in (5, 6, 7, 8)  # on its side
        width, height = image.size[::-1] if lies else image.size
        left, top, right, bottom = choose_box(width, height)
        if draft:
            x, y = math.ceil(width * size / (right - left)), math.ceil(height * size / (bottom - top))
            image.draft(None, (y, x) if lies else (x, y))
        upright = to_rgb(image if orientation == 1 else ImageOps.exif_transpose(image))
        x, y = upright.width / width, upright.height / height
        box = left * x, top * y, min(right * x, upright.width), min(bottom * y, upright.height)
        return np.asarray(upright.resize((size, size), Image.Resampling.BILINEAR, box))

"""Computes what the page shows for an image: classes, Grad-CAM, gates, state, and the network without H."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image, UnidentifiedImageError

from regnet_flax.analysis.features import BlockFeatures, inspect
from regnet_flax.analysis.grad_cam import grad_cam
from regnet_flax.analysis.plots.features import colors
from regnet_flax.analysis.state_use import fusing_stages, without_state
from regnet_flax.data import photos
from regnet_flax.data.augment import normalize
from regnet_flax.errors import DataError, one_line
from regnet_flax.trained import Trained

PICTURE = 256  # the approximate length in pixels of the larger pictures' longer side
OPACITY = 0.6  # of Grad-CAM over the image

REMARKS = {
    photos.TRANSPARENT: "Its transparent parts are shown on white.",
    photos.DARK: "It has 16 bits and uses the lowest 12 or fewer, so it comes out nearly black.",
}
NO_REGULATOR = "This network has no regulator beside its blocks: it has no gates, no state and nothing to switch off."
NOT_FUSED = "This network does not fuse its features with H, so H cannot be left out of it."


class Answers:
    """Looks at images with one network: `Answers(trained)(bytes of an image file)`.

    Args:
      trained: the network.
    """

    def __init__(self, trained: Trained):
        self._trained = trained
        stages = fusing_stages(trained.variables)
        groups = [(stage,) for stage in stages] + ([tuple(stages)] if len(stages) > 1 else [])
        self._without = {
            group: dataclasses.replace(trained, variables=without_state(trained.variables, *group)) for group in groups
        }

    def compile(self) -> None:
        """Compiles the network, by looking at an empty image."""
        self._of_image(Image.new("RGB", (32, 32), "grey"))

    def __call__(self, data: bytes) -> dict[str, Any]:
        """Looks at an image file.

        Args:
          data: the file's contents.

        Returns:
          A dict for JSON, with pictures as data: URLs:

          - "photo" and "input": the image, and the network's input; "remarks": how the image was read;
          - "classes": the `predict.top` most probable classes, each with "name" and "probability";
          - "cam": Grad-CAM of the most probable class for each stage's last block, each with "block" and "picture";
          - "stages": the stages that have a regulator, each with "stage", "blocks" (their names) and "rows". A row is
            an array of the state or a gate, with "name", the range "low" to "high" of its colours, and "cells": a
            "picture" and its "mean" for each block. A state's picture is the root mean square over the channels, and
            its colours start at 0; a gate's is the mean over the channels, and its colours cover the stage's values;
          - "without": an entry for each of these stages switched off, and for all of them: "stages", "name" and
            "probability" of the most probable class, and "first", the probability of the original one;
          - "note": why something is missing, or "".

        Raises:
          DataError: the file cannot be read as an image.
        """
        remarks: list[str] = []
        try:
            image = photos.read_image(io.BytesIO(data), remarks, photos.formats())
        except UnidentifiedImageError as error:
            known = ", ".join(photos.formats())
            raise DataError(f"the file is not an image in a readable format ({known})") from error
        except Image.DecompressionBombError as error:
            limit = f"{(Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f}"
            raise DataError(f"the image has more than {limit} million pixels: make it smaller") from error
        except Exception as error:  # Pillow's decoders raise nearly anything for a damaged file
            raise DataError(f"the file cannot be read as an image ({one_line(error)})") from error
        return self._of_image(image) | {"remarks": [REMARKS[remark] for remark in remarks]}

    def _of_image(self, image: Image.Image) -> dict[str, Any]:
        trained = self._trained
        settings, names = trained.config.dataset, trained.class_names
        pixels = trained.to_input(image)
        shares = trained.predict(pixels)[0]
        order = np.argsort(-shares, kind="stable")[: trained.config.predict.top]
        first = int(order[0])

        inputs = normalize(jnp.asarray(pixels[None]), settings.mean, settings.std)
        blocks = inspect(trained.model, trained.variables, inputs)
        last = {block.stage: block.name for block in blocks}.values()
        maps = grad_cam(trained.model, trained.variables, inputs, blocks=tuple(last), classes=np.array([first]))
        stages = _stages(blocks)

        without = []
        for group, other in self._without.items():
            changed = other.predict(pixels)[0]
            best = int(changed.argmax())
            without.append(
                {
                    "stages": group,
                    "name": names[best],
                    "probability": float(changed[best]),
                    "first": float(changed[first]),
                }
            )
        photo = image.copy()
        photo.thumbnail((PICTURE, PICTURE))
        return {
            "photo": _url(photo),
            "input": _url(Image.fromarray(pixels.squeeze())),
            "remarks": [],
            "classes": [{"name": names[index], "probability": float(shares[index])} for index in order],
            "cam": [{"block": name, "picture": _url(_over(pixels, found[0]))} for name, found in maps.items()],
            "stages": stages,
            "without": without,
            "note": NO_REGULATOR if not stages else NOT_FUSED if not without else "",
        }


def _stages(blocks: Sequence[BlockFeatures]) -> list[dict[str, Any]]:
    regulated = [block for block in blocks if block.state]
    stages = []
    for stage in dict.fromkeys(block.stage for block in regulated):
        chosen = [block for block in regulated if block.stage == stage]
        state, gates = chosen[0].state, chosen[0].gates
        rows = [_row(name, [np.sqrt((block.state[name][0] ** 2).mean(-1)) for block in chosen], 0.0) for name in state]
        # On a scale from 0 or −1 to 1, all that a gate can be, most pictures would have a single colour.
        rows += [_row(name, [block.gates[name][0].mean(-1) for block in chosen]) for name in gates]
        stages.append({"stage": stage, "blocks": [block.name for block in chosen], "rows": rows})
    return stages


def _row(name: str, maps: Sequence[np.ndarray], low: float | None = None) -> dict[str, Any]:
    low, high = float(np.min(maps)) if low is None else low, float(np.max(maps))
    cells = [{"picture": _url(Image.fromarray(colors(m, low, high))), "mean": float(m.mean())} for m in maps]
    return {"name": name, "low": low, "high": high, "cells": cells}


def _over(pixels: np.ndarray, cam: np.ndarray) -> Image.Image:
    """Draws Grad-CAM (h, w) over the image (height, width, channels)."""
    height, width = pixels.shape[:2]
    scale = max(1, round(PICTURE / max(height, width)))
    size = (width * scale, height * scale)
    picture = Image.fromarray(pixels.squeeze()).convert("RGB").resize(size, Image.Resampling.NEAREST)
    smooth = np.asarray(Image.fromarray(cam).resize(size, Image.Resampling.BILINEAR))
    return Image.blend(picture, Image.fromarray(colors(smooth, 0.0, cam.max())), OPACITY)


def _url(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()

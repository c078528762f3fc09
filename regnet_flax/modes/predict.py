"""--mode predict: a trained model's classes for image files, as a table, JSON and a figure."""

from __future__ import annotations

import contextlib
import glob
import json
import logging
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from regnet_flax.analysis.plots import classes
from regnet_flax.analysis.plots.fonts import readable
from regnet_flax.command_line import Options
from regnet_flax.data.photos import extensions, read_image
from regnet_flax.errors import ConfigError, DataError, one_line, printable
from regnet_flax.places import fetch, shown
from regnet_flax.trained import Trained, with_config
from regnet_flax.training import workdir
from regnet_flax.training.display import say_table

SHOWN = 16  # images in the picture
THUMBNAIL = 256  # pixels of their longer side

logger = logging.getLogger("regnet_flax")


def find_images(where: str) -> list[pathlib.Path]:
    """Returns the files that `predict.images` names, sorted.

    Args:
      where: a file; a folder, for all image files in and below it; or a glob of these, in which ** matches subfolders.
        In a bucket, a file or a folder.

    Raises:
      ConfigError: there is no such file.
    """
    if not where:
        raise ConfigError(
            "predict.images is '': name a file, a folder or a glob, with --config.predict.images=PATH_OR_GLOB"
        )
    path = fetch(where).expanduser()
    files: set[pathlib.Path] = set()
    for match in [path] if path.exists() else _glob(path):
        if match.is_dir():
            files.update(file for file in match.rglob("*") if _is_image(file, match))
        else:
            files.add(match)
    if not files:
        kind = f"has no image files ({' '.join(extensions())})" if path.is_dir() else "matches no file"
        raise ConfigError(f"predict.images is {where!r}, which {kind}: name a file, a folder or a glob")
    return sorted(files)


def _glob(pattern: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the matches; leading folders that exist are taken literally, even with brackets in their names."""
    base, parts = pathlib.Path(pattern.anchor or "."), list(pattern.parts[bool(pattern.anchor) :])
    while len(parts) > 1 and (base / parts[0]).is_dir():
        base /= parts.pop(0)
    return (base / name for name in glob.glob(os.path.join(*parts), root_dir=base, recursive=True))


def _is_image(file: pathlib.Path, folder: pathlib.Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return not hidden and file.name.lower().endswith(extensions()) and file.is_file()


def _read(
    files: Sequence[pathlib.Path], trained: Trained
) -> tuple[list[pathlib.Path], np.ndarray, list[np.ndarray], list[dict[str, str]]]:
    """Returns the readable files, the model's inputs, thumbnails of the first ones, and other files with reasons."""
    readable, inputs, thumbnails, skipped, remarks = [], [], [], [], []
    for file in files:
        try:
            image = read_image(file, remarks)
        except Exception as error:  # Pillow's decoders raise nearly anything for a damaged file.
            skipped.append({"file": str(file), "reason": one_line(error)})
            logger.warning("left out %s", printable(f"{file}: {skipped[-1]['reason']}"))
            continue
        readable.append(file)
        inputs.append(trained.to_input(image))
        if len(thumbnails) < SHOWN:
            image.thumbnail((THUMBNAIL, THUMBNAIL))
            thumbnails.append(np.asarray(image))
    for remark in sorted(set(remarks)):
        logger.warning("%s", remark)
    if not readable:
        raise DataError(f"none of the {len(files)} files of predict.images can be read: check that they are images")
    return readable, np.stack(inputs), thumbnails, skipped


def predict_images(trained: Trained, path: str | os.PathLike) -> dict[str, Any]:
    """Predicts the classes of the images that `predict.images` names, and writes figures/predict.png.

    Args:
      trained: the model with its config.
      path: the workdir, for the figure.

    Returns:
      "model"; "workdir"; "step"; "predictions", which has for each readable image its "file" and "top", the
      `predict.top` most probable classes, each with "class" and "probability"; "skipped", each with "file" and
      "reason"; "picture", the figure's path, None if it cannot be written; and "chosen", which weights are used and
      why.

    Raises:
      ConfigError: `predict.images` names no file.
      DataError: none of the files can be read.
    """
    config, names = trained.config, trained.class_names
    files, images, thumbnails, skipped = _read(find_images(config.predict.images), trained)
    shares = trained.predict(images)
    best = np.argsort(-shares, axis=1, kind="stable")[:, : config.predict.top]
    tops = [
        [{"class": names[c], "probability": float(row[c])} for c in order]
        for row, order in zip(shares, best, strict=True)
    ]
    picture: pathlib.Path | None = pathlib.Path(path) / workdir.FIGURES / "predict.png"
    more = f", the first {len(thumbnails)} of {len(files)} images" if len(files) > len(thumbnails) else ""
    try:
        picture.parent.mkdir(parents=True, exist_ok=True)
        captions = [file.name for file in files]
        with readable([*names, *captions[: len(thumbnails)]]):
            classes.probabilities(
                thumbnails,
                captions,
                [[(entry["class"], entry["probability"]) for entry in top] for top in tops],
                picture,
                title=f"{config.model.name}, {trained.source}{more}",
            )
    except OSError as error:  # such as in another user's workdir
        logger.warning("%s cannot be written: %s", picture, error.strerror)
        picture = None
    return {
        "model": config.model.name,
        "workdir": str(path),
        "step": trained.step,
        "chosen": _chosen(trained, pathlib.Path(path)),
        "predictions": [{"file": str(file), "top": top} for file, top in zip(files, tops, strict=True)],
        "skipped": skipped,
        "picture": str(picture) if picture else None,
    }


def _chosen(trained: Trained, path: pathlib.Path) -> str:
    """Describes which weights are used, and why."""
    which = trained.config.eval.checkpoint
    if trained.weights or which not in ("best", "last"):
        return trained.source
    if which == "last":
        return f"{trained.source}, the last checkpoint"
    evaluations = [line for line in workdir.read_metrics(path) if "eval_accuracy" in line]
    if not any(line["step"] == trained.step for line in evaluations):
        return f"{trained.source}, the last checkpoint, since none was evaluated"
    split = (workdir.read_config(path) or {}).get("evaluated", "test")
    if trained.step != workdir.best_step(evaluations):
        return f"{trained.source}, the best of the checkpoints that are left, by the {split} split"
    return f"{trained.source}, the best of {len(evaluations)} evaluations of the {split} split"


def show(result: dict[str, Any], as_json: bool) -> None:
    """Prints the result of predict_images as a table or JSON."""
    if as_json:
        print(shown(json.dumps(result, indent=2)))  # ASCII, so it works in every terminal's encoding
        return
    predictions = result["predictions"]
    files = [prediction["file"] for prediction in predictions]
    folder = os.path.commonpath([os.path.dirname(file) for file in files])
    count = f"{len(files)} images in {folder or '.'}" if len(files) > 1 else files[0]
    print(shown(f"{result['model']}, {result['chosen']}: {count}"))
    table = Table()
    table.add_column("image", overflow="fold")
    for rank in range(1, len(predictions[0]["top"]) + 1):
        table.add_column(f"{rank}.", overflow="fold")
    for file, prediction in zip(files, predictions, strict=True):
        cells = [f"{entry['class']} {entry['probability']:.1%}" for entry in prediction["top"]]
        table.add_row(os.path.relpath(file, folder or "."), *cells)
    say_table(table)
    if result["picture"]:
        logger.info("picture: %s", result["picture"])


def run(config: Any, options: Options) -> None:
    """Prints the classes of the images that `predict.images` names; see `predict_images`."""
    with contextlib.redirect_stdout(sys.stderr) if config.predict.json else contextlib.nullcontext():
        result = predict_images(with_config(config, options.workdir), options.workdir)
    show(result, config.predict.json)

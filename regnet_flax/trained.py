"""A trained model, ready for use: `load(workdir).predict(images)`."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from PIL import Image

from regnet_flax.config.check import check_config, eval_batch_size, model_options
from regnet_flax.config.fields import default_config
from regnet_flax.config.resolve import fill_in, resolve
from regnet_flax.data import photos, stream
from regnet_flax.data.augment import normalize
from regnet_flax.data.photos import read_image
from regnet_flax.errors import ConfigError, DataError, WeightsError, WorkdirError, one_line
from regnet_flax.models.registry import OPTIONS, check_model, computing_options
from regnet_flax.modes.setup.datasets import open_dataset
from regnet_flax.modes.setup.models import build_model, load_trained, load_weights
from regnet_flax.places import fetch
from regnet_flax.port import shipped
from regnet_flax.port.torch import starts_from_plain
from regnet_flax.port.weights import read_weights
from regnet_flax.training.workdir import failed_seeds, read_config

logger = logging.getLogger("regnet_flax")

Path = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model with its trained variables.

    Attributes:
      model: from create_model.
      variables: its "params" and "batch_stats"; the moving averages if the run keeps them.
      config: the run's resolved config, a ConfigDict.
      class_names: in the order of the logits.
      image_shape: (height, width, channels) of the images that the model takes.
      step: the checkpoint's step; for a file of weights, the step that it records, or 0.
      weights: the file of weights, "" for a checkpoint.
    """

    model: nn.Module
    variables: dict[str, Any]
    config: Any
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    step: int
    weights: str = ""

    @property
    def source(self) -> str:
        """Where the variables come from: "step 12", or a file's name."""
        return pathlib.Path(self.weights).name if self.weights else f"step {self.step}"

    def predict(self, images: np.ndarray | Path | Iterable[Path]) -> np.ndarray:
        """Returns the probability of each class for each image.

        Args:
          images: uint8 pixels, (N, height, width, channels), or (height, width, channels) for one image; or the path of
            an image file, or a list of paths. Arrays of `image_shape` are used as they are; all other images are
            resized like those of the test split. The images are normalised as in the run.

        Returns:
          float32 (N, classes), each row summing to 1.

        Raises:
          DataError: a file cannot be read as an image.
          ValueError: an array has another dtype or number of axes.
        """
        inputs = self._arrays(images) if isinstance(images, np.ndarray) else self._files(images)
        if not len(inputs):
            return np.empty((0, len(self.class_names)), np.float32)
        settings, size = self.config.dataset, eval_batch_size(self.config)
        return probabilities(self.model, self.variables, inputs, settings.mean, settings.std, size)

    def to_input(self, image: Image.Image) -> np.ndarray:
        """Converts an upright RGB image to the model's input: uint8 of `image_shape`; see `to_input`."""
        return to_input(image, self.image_shape, crop=stream.CROP in self.config.dataset.augment)

    def _arrays(self, images: np.ndarray) -> np.ndarray:
        if images.dtype != np.uint8 or images.ndim not in (3, 4):
            raise ValueError(
                f"images are {images.dtype} of shape {images.shape}: give uint8, (N, height, width, channels) or "
                "(height, width, channels)"
            )
        images = images.reshape(-1, *images.shape[-3:])
        if images.shape[1:] == self.image_shape:
            return images
        if images.shape[-1] not in (1, 3):
            raise ValueError(f"images have {images.shape[-1]} channels: give 1, grey, or 3, RGB")
        grey = images.shape[-1] == 1
        return self._stack(Image.fromarray(image[..., 0] if grey else image).convert("RGB") for image in images)

    def _files(self, paths: Path | Iterable[Path]) -> np.ndarray:
        def read(path: Path) -> Image.Image:
            try:
                return read_image(pathlib.Path(path))
            except Exception as error:  # Pillow's decoders raise nearly anything for a damaged file
                raise DataError(f"{path} cannot be read as an image ({one_line(error)})") from error

        return self._stack(map(read, [paths] if isinstance(paths, (str, os.PathLike)) else paths))

    def _stack(self, images: Iterable[Image.Image]) -> np.ndarray:
        inputs = [self.to_input(image) for image in images]
        return np.stack(inputs) if inputs else np.empty((0, *self.image_shape), np.uint8)


def load(workdir: Path, checkpoint: str | int = "best", *, seed: int | None = None) -> Trained:
    """See `regnet_flax.load`."""
    path = shipped.find(workdir) or fetch(workdir)
    if path.is_file():
        config = default_config().lock()
        config.model.init_from = str(path)
        return _of_file(config, None, alone=True)
    if not (stored := read_config(path)):
        raise WorkdirError(
            f"{workdir} has no config.json, so it is not the workdir of a run, and it is not a file of weights: "
            f"name one that a run wrote{shipped.alternatives()}"
        )
    seeds = stored.get("seeds", [stored.get("seed", 0)])
    if seed is not None and seed not in seeds:
        raise ConfigError(f"seed is {seed}: {path} has the seeds {', '.join(map(str, seeds))}")
    config = default_config().lock()
    fill_in(config, stored)
    left = [one for one in seeds if one not in failed_seeds(path)]
    config.seed = (left or seeds)[0] if seed is None else seed
    config.eval.checkpoint = str(checkpoint)
    return with_config(config, path)


def with_config(config: Any, workdir: Path) -> Trained:
    """Loads like `load`, but with a given config, such as the workdir's with another `eval.checkpoint`.

    With `model.init_from` the variables come from that file, and no run is needed. If the file says what it is of, as
    those of `--mode export` do, this gives the model, class names, image shape and normalisation; otherwise they come
    from the config and the workdir's run if it has one, or else from the data set.

    Raises:
      ConfigError, WeightsError: the file cannot be used; see load_weights.
      DataError: the data set is needed and cannot be read.
    """
    path = pathlib.Path(workdir)
    if config.model.init_from:
        return _of_file(config, read_config(path))
    model, variables, step = load_trained(config, path)
    record = read_config(path) or {}
    height, width, channels = record["image_shape"]
    return Trained(model, variables, config, tuple(record["class_names"]), (height, width, channels), step)


def _of_file(config: Any, record: dict[str, Any] | None, *, alone: bool = False) -> Trained:
    """Loads the weights in the file `model.init_from`; `alone`, the file must say which model they belong to."""
    check_config(config)
    file = config.model.init_from
    if config.model.new_head:
        raise ConfigError(f"model.new_head is True: without the head of {file} there is no class to predict")
    arrays, metadata = read_weights(file)
    known = take_description(config, metadata)
    if alone and not (known and "model" in metadata):
        raise WeightsError(
            f"{file} does not say which model it belongs to, as files of --mode export do: "
            "give it as model.init_from, with model.name"
        )
    known = known or record
    if starts_from_plain(arrays, build_model(config)):
        raise ConfigError(
            f"model.init_from is {file}, which has no regulators: {config.model.name} can be trained from it; "
            "to use it as it is, give the plain network's model.name"
        )
    if known:
        names, shape = tuple(known["class_names"]), tuple(known["image_shape"])
        config.dataset.num_classes = len(names)
    else:
        dataset = open_dataset(config)
        config = resolve(config, dataset)
        names, shape = dataset.class_names, dataset.image_shape
    height, width, channels = shape
    variables = load_weights(config, channels, (arrays, metadata))
    assert variables is not None
    step = metadata.get("step", "")
    step = int(step) if step.isdecimal() else 0
    model = build_model(config)
    return Trained(model, {"batch_stats": {}} | variables, config, names, (height, width, channels), step, file)


def take_description(config: Any, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """Sets the config to what the file `model.init_from` says about its model, and returns it; see `described`.

    Raises:
      WeightsError: the file describes a model that cannot be made.
    """
    file, data, known = config.model.init_from, config.dataset, described(metadata)
    if known is None:
        return None
    height, width, _ = known["image_shape"]
    if height == width:
        data.image_size = height
    data.mean, data.std = tuple(known["mean"]), tuple(known["std"])
    # check_config refuses it without a data set of photographs.
    cropped = (stream.CROP,) if metadata.get("crop") == "true" else ()
    data.augment = cropped or tuple(name for name in data.augment if name != stream.CROP)
    if "model" not in metadata:
        return known
    before = {"name": config.model.name} | dict(config.model.overrides)
    config.model.name = metadata["model"]
    for option in config.model.overrides:
        if not OPTIONS[option].rounding:  # those are the weights' own
            config.model.overrides[option] = None
    try:
        for option, value in computing_options(json.loads(metadata.get("options", "{}"))).items():
            config.model.overrides[option] = tuple(value) if isinstance(value, list) else value
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise WeightsError(f"{file} has options that no model has ({one_line(error)}): export it again") from error
    after = {"name": config.model.name} | dict(config.model.overrides)
    if changed := [f"{name}={value}" for name, value in after.items() if value != before[name]]:
        logger.info("model: %s, as %s says", ", ".join(changed), file)
    try:
        check_model(config.model.name, **model_options(config))
    except (ValueError, TypeError) as error:
        raise WeightsError(
            f"{file} is of a model that cannot be made ({one_line(error)}): if it is your own, name its module in "
            "model.plugins"
        ) from error
    return known


def description(trained: Trained) -> dict[str, str]:
    """Returns the metadata that a file of weights stores about its model; `described` reads it."""
    config = trained.config
    facts = {
        "class_names": trained.class_names,
        "image_shape": trained.image_shape,
        "mean": config.dataset.mean,
        "std": config.dataset.std,
    }
    return {name: json.dumps(list(value)) for name, value in facts.items()} | {
        "options": json.dumps(computing_options(model_options(config))),
        "crop": json.dumps(stream.CROP in config.dataset.augment),
    }


def described(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """Reads the facts of `description` from a file's metadata; None if one is missing."""
    try:
        found = {name: json.loads(metadata[name]) for name in ("class_names", "image_shape", "mean", "std")}
        counts = [int(number) for number in found["image_shape"]]
        numbers = [float(number) for number in (*found["mean"], *found["std"])]
    except (KeyError, ValueError, TypeError):
        return None
    whole = len(counts) == 3 and numbers and all(isinstance(name, str) for name in found["class_names"])
    return found if whole else None


def to_input(image: Image.Image, shape: Sequence[int], crop: bool = False) -> np.ndarray:
    """Converts an image to the model's input, resized like images of a folder in evaluation.

    Args:
      image: upright RGB, of any size.
      shape: (height, width, channels); with one channel, the image is converted to grey.
      crop: whether to take the centre, as for a model trained on random crops.

    Returns:
      uint8 of this shape.
    """
    height, width, channels = shape
    image = image.convert("L") if channels == 1 else image
    box = photos.centre_box(*image.size, size=height) if crop else None
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, box)).reshape(height, width, channels)


@functools.partial(jax.jit, static_argnames="model")
def _classify(model: nn.Module, variables: Any, images: jax.Array, mean: Any, std: Any) -> jax.Array:
    logits: Any = model.apply(variables, normalize(images, mean, std), train=False)
    return jax.nn.softmax(logits)


def probabilities(
    model: nn.Module, variables: dict[str, Any], images: np.ndarray, mean: Any, std: Any, batch_size: int
) -> np.ndarray:
    """Returns the probability of each class for each image.

    Args:
      model: from create_model.
      variables: "params" and "batch_stats".
      images: uint8 (N, height, width, channels), N at least 1.
      mean: see augment.normalize.
      std: likewise.
      batch_size: images at a time.

    Returns:
      float32 (N, classes).
    """
    batch_size = min(batch_size, len(images))
    results = []
    for start in range(0, len(images), batch_size):
        # The last batch is padded, so that only one shape is compiled.
        indices = np.minimum(np.arange(start, start + batch_size), len(images) - 1)
        results.append(np.asarray(_classify(model, variables, images[indices], mean, std)))
    return np.concatenate(results)[: len(images)]

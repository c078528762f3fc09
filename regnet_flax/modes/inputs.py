"""What a run starts from: its data set, and the weights of a file."""

from __future__ import annotations

import logging
import time
from typing import Any

from regnet_flax.data import sources, stream
from regnet_flax.errors import ConfigError, WeightsError
from regnet_flax.files import duration
from regnet_flax.port import torch as torch_port
from regnet_flax.port import weights
from regnet_flax.training.trainer import build_model

logger = logging.getLogger("regnet_flax")


def load(config: Any) -> sources.Dataset | stream.StreamedDataset:
    """The config's data set, in memory or to be streamed; says which images could not be read."""
    began = time.monotonic()
    settings = config.dataset
    options = {name: settings[name] for name in ("data_dir", "image_size", "num_classes", "strict")}
    dataset = stream.open_stream(settings.name, in_memory=settings.in_memory, augment=settings.augment, **options)
    streamed = dataset is not None
    if dataset is None:
        dataset = sources.load_dataset(settings.name, seed=config.seed, **options)
    if streamed and config.train.steps_per_call > 1:
        raise ConfigError(
            f"train.steps_per_call is {config.train.steps_per_call}: {dataset.name} is streamed, a batch a call, so it "
            "must be 1, or 0"
        )
    logger.info(
        "%s: %d training and %d test images of %d classes, %s, %s in %s",
        dataset.name,
        dataset.size("train"),
        dataset.size("test"),
        len(dataset.class_names),
        "×".join(map(str, dataset.image_shape)),
        "streamed, listed" if streamed else "read",
        duration(time.monotonic() - began),
    )
    for skipped in dataset.skipped:
        logger.warning("left out %s", skipped)
    return dataset


def load_weights(config: Any) -> dict[str, Any] | None:
    """The variables in the file `model.init_from` of a resolved config; None where it names none.

    Raises:
      WeightsError: the file cannot be read, or does not fit the model.
    """
    file = config.model.init_from
    if not file:
        return None
    arrays, metadata = weights.read_weights(file)
    model = build_model(config)
    stride = getattr(model, "bottleneck_stride", "")
    if getattr(model, "block", "") == "bottleneck":
        recorded = metadata.get("bottleneck_stride", stride)
        if recorded != stride:
            raise WeightsError(
                f"{file} is of bottlenecks with the stride in the {recorded} convolution: "
                f"set model.overrides.bottleneck_stride={recorded}"
            )
        if "bottleneck_stride" not in metadata:
            logger.warning(
                "%s does not say where its bottlenecks have their stride; it is taken to be the %s convolution "
                "(torchvision's ResNets: model.overrides.bottleneck_stride=3x3)",
                file,
                stride,
            )
    try:
        variables = torch_port.from_torch(arrays, model, new_head=config.model.new_head)
    except ValueError as error:
        raise WeightsError(f"{file}: {error}; model.new_head=True leaves the head out") from error
    logger.info("weights from %s%s", file, ", all but the head" if config.model.new_head else "")
    return variables

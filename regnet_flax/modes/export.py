"""--mode export: writes a StableHLO program or weights with PyTorch's names, and a model card."""

from __future__ import annotations

import errno
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from regnet_flax.command_line import Options
from regnet_flax.data.augment import normalize
from regnet_flax.errors import WeightsError, WorkdirError
from regnet_flax.files import replacing, write_json
from regnet_flax.models.ops import PLAIN
from regnet_flax.models.regnet import unstack_blocks
from regnet_flax.modes import model_card
from regnet_flax.places import to_write
from regnet_flax.port.torch import bottleneck_stride, to_torch
from regnet_flax.port.weights import write_weights
from regnet_flax.trained import Trained, description, with_config

FILES = {"stablehlo": "model.stablehlo", "safetensors": "weights.safetensors", "torch": "weights.pth"}
PLATFORMS = ("cpu", "cuda", "tpu")

logger = logging.getLogger("regnet_flax")


def export_model(trained: Trained, workdir: str | pathlib.Path) -> pathlib.Path:
    """Writes the file given by `export.path` and `export.format`, and a model card beside it.

    Args:
      trained: the model; its config says what to write.
      workdir: the file's directory if `export.path` is "".

    Returns:
      The file's path; for a file in a bucket, that of its local copy.

    Raises:
      PlaceError: the file cannot be sent to the bucket that `export.path` names.
      WeightsError: the path's suffix does not fit the format, or PyTorch is needed and not installed.
    """
    workdir, export = pathlib.Path(workdir), trained.config.export
    with to_write(export.path or workdir / FILES[export.format], reads=model_card.NAME) as path:
        _write(trained, workdir, path)
    return path


def _write(trained: Trained, workdir: pathlib.Path, path: pathlib.Path) -> None:
    config, model, variables = trained.config, trained.model, trained.variables
    kind = config.export.format
    metadata = {
        "model": config.model.name,
        "num_classes": str(config.dataset.num_classes),
        "dataset": config.dataset.name,
        "step": str(trained.step),
    } | description(trained)
    if stride := bottleneck_stride(model):
        metadata["bottleneck_stride"] = stride
    if kind == "stablehlo":
        if path.suffix != pathlib.Path(FILES[kind]).suffix:
            raise WeightsError(f"{path} must end in .stablehlo, or name another --config.export.format")
        program = stablehlo(model, variables, trained.image_shape, config.dataset.mean, config.dataset.std)
        with replacing(path) as part:
            part.write_bytes(program)
        beside = metadata | {"image_shape": list(trained.image_shape), "class_names": list(trained.class_names)}
        write_json(path.with_name(path.name + ".json"), beside)
        said = f"for {', '.join(PLATFORMS)}"
    else:
        if kind == "torch" and path.suffix == ".safetensors":
            raise WeightsError(
                f"export.format is torch, and {path} ends in .safetensors: name a .pth file, or leave export.format out"
            )
        arrays = to_torch(variables, model)
        write_weights(path, arrays, metadata)
        said = f"{len(arrays)} arrays"
    logger.info("%s: the model card", model_card.write(path, trained, workdir))
    logger.info("%s: %s, %s, %s", path, config.model.name, trained.source, said)


def stablehlo(
    model: nn.Module, variables: dict[str, Any], image_shape: Sequence[int], mean: Sequence[float], std: Sequence[float]
) -> bytes:
    """Exports a model as one program for CPU, CUDA and TPU that contains weights and normalisation.

    Args:
      model: from create_model.
      variables: "params" and "batch_stats".
      image_shape: (height, width, channels).
      mean, std: per channel, for pixels in 0…1.

    Returns:
      Bytes for `jax.export.deserialize`; its `call` maps uint8 (N, height, width, channels), for any N, to logits
      (N, classes), float32.
    """
    # The plain equations without a loop, whatever the exporting backend would use for itself.
    model = model.clone(ops=PLAIN)
    if hasattr(model, "scan"):
        model, variables = model.clone(scan=False), unstack_blocks(variables)

    def classify(images: jax.Array) -> Any:
        return model.apply(variables, normalize(images, mean, std), train=False)

    (count,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((count, *image_shape), jnp.uint8)
    return bytes(jax.export.export(jax.jit(classify), platforms=PLATFORMS)(images).serialize())


def run(config: Any, options: Options) -> None:
    """Exports the workdir's checkpoint `eval.checkpoint`, or `model.init_from`; see `export_model`.

    Raises:
      WorkdirError: the file cannot be written there.
    """
    trained = with_config(config, options.workdir)
    try:
        export_model(trained, options.workdir)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, None):
            raise
        place = error.filename2 or error.filename or config.export.path or options.workdir
        raise WorkdirError(
            f"{place} cannot be written ({error.strerror}): name another place with --config.export.path=FILE"
        ) from error

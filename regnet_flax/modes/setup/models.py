"""Builds the model of a config, and reads its weights from a file or from a run's checkpoint."""

from __future__ import annotations

import contextlib
import json
import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path

from regnet_flax.config.check import check_config, model_options
from regnet_flax.errors import ConfigError, WeightsError, WorkdirError
from regnet_flax.models.registry import create_model
from regnet_flax.port import torch as torch_port
from regnet_flax.port import weights
from regnet_flax.training import workdir
from regnet_flax.training.checkpoint import Checkpoints
from regnet_flax.training.trainer import take_seed

logger = logging.getLogger("regnet_flax")


def build_model(config: Any, devices: Sequence[Any] | None = None, axis_name: str | None = None) -> nn.Module:
    """Makes the model of a resolved config for these devices; by default JAX's own."""
    return create_model(
        config.model.name,
        num_classes=config.dataset.num_classes,
        dtype=jnp.dtype(config.dtype),
        axis_name=axis_name,
        devices=devices,
        **model_options(config),
    )


def load_weights(
    config: Any, channels: int, found: tuple[dict[str, Any], dict[str, str]] | None = None
) -> dict[str, Any] | None:
    """Reads the variables in the file `model.init_from` of a resolved config; None if it names no file.

    For a network with regulators, a plain network's weights give all variables except the regulators.

    Args:
      config: the resolved config.
      channels: the images' channels; with `model.adapt_stem` the file's may differ.
      found: what read_weights returned for the file, if it has been read.

    Raises:
      WeightsError: the file cannot be read, or does not fit the model.
    """
    file = config.model.init_from
    if not file:
        return None
    arrays, metadata = found or weights.read_weights(file)
    if whole := [name for name, a in arrays.items() if a.dtype != np.float32 and not name.endswith(torch_port.IGNORED)]:
        raise WeightsError(
            f"{file}: {whole[0]} is {arrays[whole[0]].dtype}, so the weights look quantised: save them as floats"
        )
    model = build_model(config)
    _check_grouping(file, model, metadata)
    plain, stride = torch_port.starts_from_plain(arrays, model), torch_port.bottleneck_stride(model)
    if stride:
        recorded = metadata.get("bottleneck_stride", stride)
        if recorded != stride and plain:
            logger.warning(
                "%s has bottlenecks with the stride in the %s convolution, but %s has it in the %s: it uses the "
                "weights, but computes something else at first",
                file,
                recorded,
                config.model.name,
                stride,
            )
        elif recorded != stride:
            raise WeightsError(
                f"{file} has bottlenecks with the stride in the {recorded} convolution: "
                f"set model.overrides.bottleneck_stride={recorded}"
            )
        if "bottleneck_stride" not in metadata:
            logger.warning(
                "%s does not say where its bottlenecks have their stride; the %s convolution is assumed "
                "(torchvision's have it in the 3x3%s)",
                file,
                stride,
                "" if plain else ": model.overrides.bottleneck_stride=3x3",
            )
    try:
        if config.model.adapt_stem:
            arrays = torch_port.adapt_stem(arrays, model, channels)
        torch_port.check_stem(arrays, model, channels)
        read = torch_port.from_plain_torch if plain else torch_port.from_torch
        variables = read(arrays, model, new_head=config.model.new_head)  # pyright: ignore[reportArgumentType]
    except torch_port.StemError as error:
        raise WeightsError(f"{file}: {error}; model.adapt_stem=True adapts it") from error
    except ValueError as error:
        hint = "" if config.model.new_head else "; model.new_head=True ignores the head"
        raise WeightsError(f"{file}: {error}{hint}") from error
    rest = [*(["the head"] if config.model.new_head else []), *(["the regulators"] if plain else [])]
    logger.info("weights from %s%s", file, f", all but {' and '.join(rest)}" if rest else "")
    return variables


def _check_grouping(file: str, model: Any, metadata: Mapping[str, str]) -> None:
    # Neither names nor shapes show it.
    options: Any = None
    with contextlib.suppress(ValueError):
        options = json.loads(metadata.get("options", "{}"))
    if not isinstance(options, dict) or not hasattr(model, "regulator_grouping"):
        return
    recorded = options.get("regulator_grouping", model.regulator_grouping)
    if recorded != model.regulator_grouping:
        raise WeightsError(
            f"{file} groups its regulators' channels differently: set model.overrides.regulator_grouping={recorded}"
        )


def read_trained(config: Any, path: pathlib.Path, like: Any) -> tuple[int, dict[str, Any]]:
    """Reads the step and the variables of a workdir's checkpoint `eval.checkpoint`, for the config's seed.

    Args:
      config: the workdir's config; its model may differ from the run's as long as the shapes agree.
      path: the workdir.
      like: shapes and placement of "params" and "batch_stats".

    Raises:
      ConfigError: the workdir has several seeds, but not the config's.
      WorkdirError, CheckpointError: there is no such checkpoint, it is damaged, or it belongs to another model.
    """
    seeds = (workdir.read_config(path) or {}).get("seeds", [])
    if seeds and config.seed not in seeds:
        raise ConfigError(f"seed is {config.seed}: {path} has the seeds {', '.join(map(str, seeds))}")
    if reason := workdir.failed_seeds(path).get(config.seed):
        others = ", ".join(str(seed) for seed in seeds if seed not in workdir.failed_seeds(path))
        raise WorkdirError(f"seed {config.seed} of {path} failed ({reason}): name another --config.seed ({others})")
    with contextlib.closing(Checkpoints(path, config.checkpoint.keep, config.checkpoint.keep_best)) as checkpoints:
        step, variables = checkpoints.read_variables(
            str(config.eval.checkpoint), jax.tree.leaves(like["params"])[0].sharding
        )
    if seeds:
        variables = jax.jit(take_seed)(variables, seeds.index(config.seed))
    wanted, found = ({keystr(k): a.shape for k, a in tree_leaves_with_path(tree)} for tree in (like, variables))
    if wanted != found:
        name = min(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
        raise WorkdirError(
            f"{path} holds another model than {config.model.name} with these options: {name} has shape "
            f"{found.get(name, 'none')}, not {wanted.get(name, 'none')}; leave model.name and model.overrides alone"
        )
    return step, variables


def load_trained(config: Any, path: str | pathlib.Path) -> tuple[nn.Module, dict[str, Any], int]:
    """Loads the model of a workdir and the variables of its checkpoint `eval.checkpoint`; reads no data set.

    Args:
      config: the workdir's config.
      path: the workdir.

    Returns:
      The model, its "params" and "batch_stats" (the averages if the run keeps them), and the step.

    Raises:
      ConfigError, WorkdirError, CheckpointError: see read_trained.
    """
    path = pathlib.Path(path)
    check_config(config)
    workdir.check_has_checkpoints(path)
    images = jnp.zeros((1, *(workdir.read_config(path) or {})["image_shape"]))
    model = build_model(config)
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False)),
    )
    step, variables = read_trained(config, path, {"batch_stats": {}} | dict(like))
    return model, variables, step

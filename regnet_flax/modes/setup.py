"""Builds the parts of a run from its config: data set, model, initial weights and trainer."""

from __future__ import annotations

import contextlib
import json
import logging
import pathlib
import sys
import time
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr, tree_leaves_with_path

from regnet_flax.config.check import check_config, model_options
from regnet_flax.data import augment, mix, sources, stream
from regnet_flax.data.feeds import make_feed
from regnet_flax.errors import ConfigError, WeightsError, WorkdirError
from regnet_flax.files import duration
from regnet_flax.models.registry import create_model
from regnet_flax.places import fetch_data
from regnet_flax.port import torch as torch_port
from regnet_flax.port import weights
from regnet_flax.training import optimizer, workdir
from regnet_flax.training.checkpoint import Checkpoints
from regnet_flax.training.parallel import AXIS, Placement
from regnet_flax.training.run import Plan
from regnet_flax.training.step import create_train_state, eval_step, train_step
from regnet_flax.training.trainer import Step, Trainer, take_seed

STEPS_PER_CALL_ON_ACCELERATORS = 50

Dataset = sources.Dataset | stream.StreamedDataset

logger = logging.getLogger("regnet_flax")


def open_dataset(config: Any, seed: int | None = None, class_names: Sequence[str] = ()) -> Dataset:
    """Opens the config's data set, in memory or streamed; logs its sizes, and the images that could not be read.

    Args:
      config: a nested config with the fields of configs/base.py.
      seed: determines the held-out images and synthetic images; by default the config's seed. Seeds that train
        together share the first one's.
      class_names: the classes of a model to evaluate on an image folder, which then needs no training images.
    """
    began = time.monotonic()
    settings = config.dataset
    options = {name: settings[name] for name in ("data_dir", "image_size", "num_classes", "strict", "validation")}
    options["data_dir"] = fetch_data(settings.data_dir, "" if settings.name == "folder" else settings.name)
    options["seed"] = config.seed if seed is None else seed
    options["class_names"] = tuple(class_names)
    dataset = stream.open_stream(settings.name, in_memory=settings.in_memory, augment=settings.augment, **options)
    streamed = dataset is not None
    if dataset is None:
        dataset = sources.load_dataset(settings.name, **options)
    if streamed and config.train.steps_per_call > 1:
        raise ConfigError(
            f"train.steps_per_call is {config.train.steps_per_call}: {dataset.name} is streamed, one batch per "
            "call, so it must be 1, or 0"
        )
    for number, note in enumerate(dataset.notes):
        logger.log(logging.WARNING if number else logging.INFO, "%s", note)
    counted = f"{dataset.size('train')} training"
    if dataset.validation is not None:
        counted += f", {dataset.size('validation')} validation"
    logger.info(
        "%s: %s and %d test images of %d classes, %s, %s in %s",
        dataset.name,
        counted,
        dataset.size("test"),
        len(dataset.class_names),
        "×".join(map(str, dataset.image_shape)),
        "streamed, listed" if streamed else "read",
        duration(time.monotonic() - began),
    )
    for skipped in dataset.skipped:
        logger.warning("left out %s", skipped)
    return dataset


def open_trained_dataset(config: Any, record: Mapping[str, Any], class_names: Sequence[str], source: Any) -> Dataset:
    """Opens the data set to measure a trained model on, with the images that its run held out.

    Args:
      config: see open_dataset.
      record: the run's config.json; empty for a file of weights.
      class_names: the model's classes; () if they are unknown.
      source: the workdir or file, for messages.

    Raises:
      ConfigError: the data set has other classes.
      DataError: it cannot be read.
    """
    seeds = record.get("seeds", [record.get("seed", config.seed)])
    # Some systems store é as two characters.
    names = tuple(unicodedata.normalize("NFC", name) for name in class_names)
    dataset = open_dataset(config, seeds[0], names)
    if names and names != dataset.class_names:
        raise ConfigError(
            f"{dataset.name} has the classes {', '.join(dataset.class_names)}, but {source} was trained on "
            f"{', '.join(names)}: use images of these"
        )
    return dataset


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
        raise WeightsError(f"{file}: {error}; model.new_head=True ignores the head") from error
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


def build_step(
    config: Any, model: nn.Module, tx: optax.GradientTransformation, image_shape: Sequence[int], unroll: bool
) -> Step:
    """Makes the Step of a resolved config, for images of shape (height, width, channels).

    Args:
      unroll: whether to unroll the loop over a batch's parts, which XLA runs slowly on a CPU.
    """
    train, settings, data = config.train, config.optimizer, config.dataset
    names = tuple(name for name in data.augment if name != stream.CROP)  # the host crops while it decodes

    def init(seed):
        variables = model.init(jax.random.key(seed), jnp.zeros((1, *image_shape)), train=False)
        return create_train_state(dict(variables), tx, ema=settings.ema_decay > 0)

    def normalize(images):
        return augment.normalize(images, data.mean, data.std)

    def train_one(state, batch, keys, seed, step):
        images, labels = augment.prepare(names, keys, batch["images"], data.mean, data.std), batch["labels"]
        if train.mixup or train.cutmix:
            alphas = {"mixup_alpha": train.mixup, "cutmix_alpha": train.cutmix}
            images, labels = mix.mix(seed, step, images, labels, classes=data.num_classes, **alphas)
        return train_step(
            state,
            {"images": images, "labels": labels},
            apply_fn=model.apply,
            tx=tx,
            label_smoothing=settings.label_smoothing,
            ema_decay=settings.ema_decay,
            accumulate_steps=settings.accumulate_steps,
            unroll=unroll,
            axis_name=AXIS,
        )

    def evaluate(variables, batch):
        batch = batch | {"images": normalize(batch["images"])}
        return eval_step(variables, batch, apply_fn=model.apply, axis_name=AXIS)

    return Step(init, train_one, evaluate, settings.accumulate_steps)


def make_plan(config: Any, train_size: int) -> Plan:
    """Makes the Plan of a resolved config for `train_size` training examples."""
    train, settings = config.train, config.optimizer
    steps_per_epoch = max(1, train_size // train.batch_size)  # there may be no whole batch in evaluation
    total_steps = min(train.epochs * steps_per_epoch, train.max_steps or sys.maxsize)
    drops = optimizer.boundary_steps(settings.boundaries, train.epochs, steps_per_epoch)
    schedule, _ = optimizer.build_optimizer(config, steps_per_epoch)
    drops = tuple(step / steps_per_epoch for step in drops) if settings.schedule == "step" else ()
    return Plan(steps_per_epoch, total_steps, schedule, drops)


def make_trainer(
    config: Any,
    dataset: Dataset,
    devices: Sequence[Any],
    seeds: Sequence[int] = (),
    start: dict[str, Any] | None = None,
) -> Trainer:
    """Makes the trainer of a resolved config.

    Args:
      config: the resolved config.
      dataset: in memory, or streamed.
      devices: the devices that share each batch.
      seeds: the runs' seeds; by default the config's.
      start: see Trainer.
    """
    train, data, seeds = config.train, config.dataset, tuple(seeds) or (config.seed,)
    on_cpu = devices[0].platform == "cpu"
    plan = make_plan(config, dataset.size("train"))
    model = build_model(config, devices, AXIS if train.batch_norm == "sync" else None)
    _, tx = optimizer.build_optimizer(config, plan.steps_per_epoch)
    step, placement = build_step(config, model, tx, dataset.image_shape, unroll=on_cpu), Placement(devices)
    feed = make_feed(
        dataset,
        seeds,
        placement,
        batch_size=train.batch_size,
        parts=step.parts,
        total_steps=plan.total_steps,
        workers=data.workers,
        prefetch=data.prefetch,
    )
    steps_per_call = train.steps_per_call or (1 if on_cpu else STEPS_PER_CALL_ON_ACCELERATORS)
    # vmap over weights makes grouped convolutions, which XLA:CPU runs slowly.
    together = config.compare.together == "always" or (config.compare.together == "auto" and not on_cpu)
    return Trainer(step, feed, seeds, placement, steps_per_call=steps_per_call, together=together, start=start)

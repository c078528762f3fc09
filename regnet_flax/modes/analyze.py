"""--mode analyze: the paper's measurements on a trained model, with figures."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from regnet_flax.analysis import features, grad_cam, readout, state_use
from regnet_flax.analysis.plots import probes
from regnet_flax.analysis.plots.fonts import readable
from regnet_flax.command_line import Options
from regnet_flax.data.augment import normalize
from regnet_flax.data.stream import StreamedDataset
from regnet_flax.errors import DataError
from regnet_flax.files import write_json
from regnet_flax.modes.setup.datasets import open_trained_dataset
from regnet_flax.trained import Trained, with_config
from regnet_flax.training import workdir

ANALYSIS = "analysis.json"
IMAGES, SHOWN = 500, 6

logger = logging.getLogger("regnet_flax")


def analyze(trained: Trained, path: pathlib.Path) -> dict[str, Any]:
    """Writes figures/analysis/*.png and analysis.json into a workdir.

    - readouts.png: the accuracy of the last layer on each of the last blocks, figure 1(b) of arXiv 2101.00590;
    - blocks.png: input, O, I and H of the first stage's first blocks for one image, figure 1(a);
    - state_use.png: how much each stage of a RegNet uses its regulator's state;
    - grad_cam.png: the positions in each stage's last block that support the predicted class.

    Args:
      trained: the model; its config names the data set.
      path: the workdir.

    Returns:
      The contents of analysis.json: "model", "step", "images" (how many of the test split were used), "readouts", which
      maps a block to an accuracy, "state_use", one dict per stage, and "gates", the range of each gate in each block
      on six images, see features.gate_ranges.

    Raises:
      ConfigError, DataError: the data set is not available, or has other classes.
    """
    config, model, variables = trained.config, trained.model, trained.variables
    record = {} if trained.weights else workdir.read_config(path) or {}
    dataset = open_trained_dataset(config, record, trained.class_names, trained.weights or path)
    pixels, labels = _examples(dataset)
    inputs = np.asarray(normalize(jnp.asarray(pixels), config.dataset.mean, config.dataset.std))
    figures = path / workdir.FIGURES / "analysis"
    figures.mkdir(parents=True, exist_ok=True)
    title = f"{config.model.name} on {config.dataset.name}, step {trained.step}"
    result: dict[str, Any] = {"model": config.model.name, "step": trained.step, "images": len(labels)}

    try:
        result["readouts"] = readout.readouts(model, variables, inputs, labels)
        probes.readouts({config.model.name: result["readouts"]}, figures / "readouts.png", title)
    except ValueError as error:  # such as for RLA-Net, whose last layer has more inputs
        logger.warning("no readouts: %s", error)
    try:
        used = state_use.state_use(model, variables, inputs, labels)
        result["state_use"] = [dataclasses.asdict(stage) for stage in used]
        probes.state_use(used, figures / "state_use.png", title)
    except ValueError as error:
        logger.info("no use of a state: %s", error)

    blocks = features.inspect(model, variables, inputs[:SHOWN])
    if ranges := features.gate_ranges(blocks):
        result["gates"] = ranges
    probes.consecutive_blocks({config.model.name: blocks}, pixels[0], figures / "blocks.png")
    last = {block.stage: block.name for block in blocks}
    maps = grad_cam.grad_cam(model, variables, inputs[:SHOWN], blocks=list(last.values()))
    chosen = trained.predict(pixels[:SHOWN]).argmax(-1)
    names = [trained.class_names[index] for index in chosen]
    with readable(names):
        probes.grad_cam(pixels[:SHOWN], maps, names, figures / "grad_cam.png", f"Grad-CAM of the chosen class, {title}")
    write_json(path / ANALYSIS, result)
    return result


def _examples(dataset: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns at most IMAGES evenly spaced test images, uint8 (N, height, width, channels), and their labels (N,)."""
    size = dataset.size("test")
    chosen = np.unique(np.linspace(0, size - 1, min(IMAGES, size)).astype(int))
    if not isinstance(dataset, StreamedDataset):
        return dataset.test.images[chosen], np.asarray(dataset.test.labels)[chosen]
    make = dataset.eval_batches("test", 1)
    read = [batch for batch in (make(int(index)) for index in chosen) if batch["mask"][0]]
    if not read:
        raise DataError(f"none of {len(chosen)} test images of {dataset.name} can be read: check that they are images")
    return np.concatenate([batch["images"] for batch in read]), np.concatenate([batch["labels"] for batch in read])


def run(config: Any, options: Options) -> None:
    """Analyses the workdir's checkpoint `eval.checkpoint`; see `analyze`."""
    path = pathlib.Path(options.workdir)
    result = analyze(with_config(config, path), path)
    for name, accuracy in result.get("readouts", {}).items():
        logger.info("the last layer on block %s: accuracy %.2f %%", name, 100 * accuracy)
    for stage in result.get("state_use", []):
        logger.info(
            "without H in stage %d: logits change by %.1f %%, %.1f %% of the classes change, accuracy %.2f → %.2f %%",
            stage["stage"],
            100 * stage["logits_change"],
            100 * stage["predictions_change"],
            *(100 * value for value in stage["accuracy"]),
        )
    for name, ranges in result.get("gates", {}).items():
        said = ", ".join(f"{gate} {low:.2f} to {high:.2f}" for gate, (low, _, high) in ranges.items())
        logger.info("98 %% of the values in block %s: %s", name, said)
    logger.info("results: %s, pictures: %s", path / ANALYSIS, path / workdir.FIGURES / "analysis")

"""The README.md beside an exported file: what others need to know to use it."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Sequence
from typing import Any

from regnet_flax import __version__
from regnet_flax.analysis.report import describe_decay, describe_optimizer
from regnet_flax.analysis.summary import count_parameters
from regnet_flax.config.check import model_options
from regnet_flax.environment import describe_hardware
from regnet_flax.files import dataset_title, duration, read_json, write_text
from regnet_flax.models.registry import computing_options
from regnet_flax.trained import Trained
from regnet_flax.training.workdir import CONFIG, RESULTS, best_step, read_metrics

NAME = "README.md"
_HEAD = "---\nlibrary_name: regnet_flax\npipeline_tag: image-classification\n"
CLASSES = 20  # the most class names that are listed

_STABLEHLO = """\
A StableHLO program for CPU, CUDA and TPU that contains weights and normalisation. It needs
`pip install jax flatbuffers`, and nothing from regnet_flax:

```python
import jax
import numpy as np
from jax import export

with open("{file}", "rb") as opened:
    model = export.deserialize(bytearray(opened.read()))
images = np.zeros((1, {shape}), np.uint8)  # yours, any number of them
logits = model.call(images)  # (images, {classes}), float32
probabilities = jax.nn.softmax(logits)
```
"""
_WEIGHTS = """\
Weights with PyTorch's names and in its layouts. With regnet_flax:

```python
import numpy as np
{plugins}import regnet_flax

trained = regnet_flax.load("{file}")
images = np.zeros((1, {shape}), np.uint8)  # yours, any number of them, or the paths of image files
probabilities = trained.predict(images)  # (images, {classes}), float32
```
"""
_CARD = """\
{head}model: {name}
step: {step}
files:
{files}
---

# {name}, trained on {dataset}

An image classifier with {classes} classes, trained and exported with regnet_flax {version}.

## Model

`{name}`, {parameters:,} parameters, arithmetic in {dtype}{options}. {origin} are those of Xu et al.,
"RegNet: Self-Regulated Network for Image Classification", arXiv 2101.00590.

## Data

`{dataset}`, as images of {height}×{width} pixels, {colours}. The classes, in the order of the logits:
{class_names}.

## Recipe

| | |
| --- | --- |
| optimiser | {optimizer}, {weight_decay}{averaged} |
| learning rate | {learning_rate:g}, {schedule} |
| length | {epochs} epochs of batches of {batch_size}; this is step {step} |
| label smoothing | {label_smoothing:g} |
| augmentation | {augment} |
| start | {start}, seed {seed} |
{run}
## Metrics

{metrics}

## Preprocessing

The model takes uint8 images of exactly {height}×{width} pixels, {colours}; others must be {fitted}.
Then each channel becomes (x / 255 − mean) / std, with mean {mean} and std {std}:
the StableHLO program and `regnet_flax.load` do that themselves.

## How to load
{load}"""


def write(path: pathlib.Path, trained: Trained, workdir: pathlib.Path) -> pathlib.Path:
    """Writes the card of an exported file: README.md beside it, or FILE.md if there is another.

    Args:
      path: the exported file.
      trained: the exported model.
      workdir: for a checkpoint, its config.json, metrics.jsonl and results.json give the other facts.

    Returns:
      The card's path.
    """
    card, files, step = path.with_name(NAME), [path.name], trained.step
    if card.exists():
        before = card.read_text(encoding="utf-8", errors="replace")
        listed = re.findall(r"^- (.+)$", before.split("---")[1], re.M) if before.startswith(_HEAD) else []
        others = [name for name in listed if name != path.name and path.with_name(name).exists()]
        if before.startswith(f"{_HEAD}model: {trained.config.model.name}\nstep: {step}\n"):
            files = sorted([*files, *others])  # other forms of the same model
        elif path.name not in listed and (others or not listed):
            card = path.with_name(path.name + ".md")
    write_text(card, describe(trained, workdir, files))
    return card


def find(path: pathlib.Path) -> pathlib.Path | None:
    """Returns the card that `write` wrote for this file, or None."""
    for card in (path.with_name(path.name + ".md"), path.with_name(NAME)):
        if card.is_file():
            text = card.read_text(encoding="utf-8", errors="replace")
            if text.startswith(_HEAD) and f"\n- {path.name}\n" in text.split("---")[1]:
                return card
    return None


def of_one_file(text: str, name: str, new_name: str) -> str:
    """Returns the text of a card without the other files that it describes, and with a new name for this one."""
    text = re.sub(r"(?m)^files:\n(- .+\n)+", f"files:\n- {new_name}\n", text, count=1)
    first, *sections = re.split(r"(?m)^### ", text)
    kept = [first]
    for section in sections:
        heading, _, body = section.partition("\n")
        names = heading.split(", ")
        if name in names:
            kept.append(f"### {new_name}\n{body.replace(names[0], new_name)}")
    return "".join(kept)


def describe(trained: Trained, workdir: pathlib.Path, files: Sequence[str]) -> str:
    """Returns the card's text for the files with these names; see `write`."""
    config, step = trained.config, trained.step
    record = {} if trained.weights else read_json(workdir / CONFIG) or {}
    results = {} if trained.weights else read_json(workdir / RESULTS)
    data, train, sgd = config.dataset, config.train, config.optimizer
    height, width, channels = trained.image_shape
    written = ", ".join(f"{name}={value!r}" for name, value in computing_options(model_options(config)).items())
    names, plugins = trained.class_names, config.model.plugins
    values = {
        "shape": f"{height}, {width}, {channels}",
        "classes": len(names),
        "mean": tuple(round(value, 6) for value in data.mean),
        "std": tuple(round(value, 6) for value in data.std),
        "plugins": "".join(f"import {name}  # registers the model\n" for name in plugins),
    }
    programs = [file for file in files if file.endswith(".stablehlo")]
    weights = [file for file in files if file not in programs]
    weights.sort(key=lambda file: not file.endswith(".safetensors"))  # PyTorch's need PyTorch
    load = "".join(
        f"\n### {', '.join(named)}\n\n{text.format(file=named[0], **values)}"
        for named, text in ((programs, _STABLEHLO), (weights, _WEIGHTS))
        if named
    )
    started = trained.weights or record["model"]["init_from"]
    augmentation = [*data.augment, *(f"{name} {train[name]:g}" for name in ("mixup", "cutmix") if train[name])]
    averaged = f"; averages of the weights over the steps, decay {sgd.ema_decay:g}" if sgd.ema_decay else ""
    fitted = "resized with a bilinear filter, like those of image folders"
    if "random_resized_crop" in data.augment:
        fitted = f"resized to {round(height / 0.875)} on the shorter side, and the centre cropped"
    return _CARD.format(
        head=_HEAD,
        name=config.model.name,
        step=step,
        files="\n".join(f"- {file}" for file in files),
        dataset=dataset_title(data),
        version=__version__,
        parameters=count_parameters(trained.variables["params"]),
        dtype=config.dtype,
        options=f", {written}" if written else "",
        origin=f"It uses {', '.join(plugins)}. Other RegNets with regulators" if plugins else "RegNets with regulators",
        height=height,
        width=width,
        colours={1: "1 channel", 3: "3 channels (RGB)"}.get(channels, f"{channels} channels"),
        class_names=", ".join(names[:CLASSES]) + (" and so on" if len(names) > CLASSES else ""),
        epochs=train.epochs,
        batch_size=train.batch_size,
        learning_rate=sgd.learning_rate,
        schedule=_schedule(sgd),
        averaged=averaged,
        fitted=fitted,
        optimizer=describe_optimizer(sgd),
        weight_decay=describe_decay(sgd),
        label_smoothing=sgd.label_smoothing,
        augment=", ".join(augmentation) or "none",
        seed=config.seed,
        start=f"the weights of {pathlib.Path(started).name}" if started else "random weights",
        run=_run(results),
        metrics=_metrics([] if trained.weights else read_metrics(workdir), results, config, trained.source),
        load=load,
        **values,
    )


def _schedule(sgd: Any) -> str:
    length = f"{sgd.warmup_epochs:g} epoch" + "s" * (sgd.warmup_epochs != 1)
    warmup = f", after a linear warm-up of {length}" if sgd.warmup_epochs else ""
    if sgd.schedule == "step":
        at = ", ".join(
            f"{boundary:.0%} of the run" if boundary < 1 else f"epoch {boundary:g}" for boundary in sgd.boundaries
        )
        return f"times {sgd.decay:g} at {at}{warmup}"
    return f"{sgd.schedule}{warmup}"


def _run(results: dict[str, Any] | None) -> str:
    if not results:
        return ""
    hardware, versions = describe_hardware(results["hardware"]), results["versions"]
    return (
        f"| trained | {duration(results['wall_time_seconds'])} on {hardware}, with jax {versions['jax']} and flax "
        f"{versions['flax']} |\n"
    )


def _metrics(lines: Sequence[dict[str, Any]], results: dict[str, Any] | None, config: Any, source: str) -> str:
    seed, results = str(config.seed), results or {}
    step = int(source.removeprefix("step ")) if source.startswith("step ") else -1

    def own(values: dict[str, Any]) -> dict[str, Any]:
        return values | values.get("seeds", {}).get(seed, {})

    found = next((own(line) for line in lines if line["step"] == step and "eval_accuracy" in line), None)
    kind, split, note = "eval", "test", ""
    if "test" in results:  # read once; another split chose the checkpoint
        split = "validation"
        test = results.get("seeds", {}).get(seed, results)["test"]
        if test["step"] == step:
            found, kind, split = test, "test", "test"
    if found is None:
        return f"No images were evaluated at {source}."
    count = sum("eval_accuracy" in line for line in lines)
    if kind == "eval" and config.eval.checkpoint == "best" and count > 1 and step == best_step(lines):
        note = f"\n\nThis was the best of the run's {count} evaluations, so it is slightly optimistic."
    shown = (
        ("accuracy", "accuracy", ".2%"),
        ("top5_accuracy", "top-5 accuracy", ".2%"),
        ("loss", "loss (cross-entropy, nats)", ".4f"),
    )
    values = ((title, found.get(f"{kind}_{name}"), form) for name, title, form in shown)
    # A loss that was not finite is missing.
    body = [f"| {title} | {value:{form}} |" for title, value, form in values if value is not None]
    return "\n".join([f"| all {split} images | |", "| --- | --- |", *body]) + note

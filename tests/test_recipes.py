"""The shipped configs: they have the recipes' values, and each runs."""

import functools
import importlib
import json
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from regnet_flax import create_model, main
from regnet_flax.config.check import check_config, flatten, model_options
from regnet_flax.models.registry import MODELS
from regnet_flax.models.regnet import RegNet
from regnet_flax.modes.train import train_and_evaluate
from regnet_flax.training.optimizer import build_optimizer

ROOT = pathlib.Path(main.__file__).resolve().parent.parent
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem not in ("__init__", "base"))
RECIPES = [name for name in CONFIGS if not name.startswith("compare_")]
LEFT_OUT = ("cifar100", "rnn_cifar10", "digits", "imagenet", "rnn_regnety_cifar10", "proj_cifar10")
LEFT_OUT += ("folder", "rnn_photos")
KEPT = ("dataset.augment", "dataset.mean", "dataset.std", "optimizer.", "train.epochs", "seed", "dtype")


def get_config(recipe, *arguments):
    return importlib.import_module(f"configs.{recipe}").get_config(*arguments)


def photographs(directory):
    """Makes a folder of random images, for recipes with augmentation for photographs of any size."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for index in range(16):
            path = directory / split / f"class{index % 2}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (40, 48, 3), np.uint8)).save(path)
    return directory


@pytest.mark.parametrize(
    ("model", "start", "new_head", "epochs"),
    [
        ("regnet20_convlstm", "regnet20_convlstm.cifar10", True, 15),
        ("resnet20", "resnet20.cifar10", True, 15),
        ("resnet20,scratch", "", False, 100),
        ("regnet50_convlstm", "", False, 100),  # no weights come with the package
        ("resnet18,finetune", "", True, 15),  # the user names them
    ],
)
def test_photographs_start_from_weights_where_there_are_some(model, start, new_head, epochs):
    config = get_config("folder", model)
    assert config.model.name == model.partition(",")[0]
    assert (config.model.init_from, config.model.new_head, config.train.epochs) == (start, new_head, epochs)


def test_the_photo_recipe_fine_tunes(tmp_path, capsys):
    """One step of the whole model, on photographs of two classes."""
    folder, workdir = photographs(tmp_path / "photographs"), tmp_path / "run"
    options = ["--config.train.max_steps=1", "--config.dataset.image_size=16", "--config.train.batch_size=8"]
    command = ["--config=configs/folder.py:resnet20", f"--config.dataset.data_dir={folder}", f"--workdir={workdir}"]
    assert main.main([*command, *options]) == 0
    assert "weights from resnet20.cifar10, all but the head" in capsys.readouterr().out
    assert json.loads((workdir / "results.json").read_text())["step"] == 1


# Those behind --thorough differ little from another one, or many other tests run them.
@pytest.mark.parametrize(
    "recipe",
    [pytest.param(r, marks=pytest.mark.thorough if r in LEFT_OUT else ()) for r in RECIPES],
)
def test_runs_on_synthetic_images(recipe, tmp_path, monkeypatch):
    """Runs two steps of the recipe, with a small model and small images, and an evaluation."""
    config = get_config(recipe)
    model = config.model.name
    few = {"depth": 2} if model.startswith("regnety") else {"stage_sizes": (1, 1)}
    monkeypatch.setitem(MODELS, model, functools.partial(MODELS[model].func, **MODELS[model].keywords | few))
    small = ["--config.train.batch_size=8", "--config.train.max_steps=2", "--config.eval.batch_size=256"]
    small += ["--config.log.every_steps=1", "--config.dataset.in_memory=auto", "--config.dataset.num_classes=0"]
    if isinstance(create_model(model), RegNet):
        small += ["--config.model.overrides.width=4", "--config.model.overrides.unroll=1"]
    if "random_resized_crop" in config.dataset.augment:
        small += ["--config.dataset.name=folder", f"--config.dataset.data_dir={photographs(tmp_path / 'photographs')}"]
    else:
        small += ["--config.dataset.name=synthetic"]
    if config.model.init_from:  # weights of the whole model
        small += ["--config.model.init_from=", "--config.model.new_head=False"]
    held_out = 64 if config.dataset.validation else 0
    small += [f"--config.dataset.validation={held_out}"]
    imagenet = getattr(create_model(model), "stem", "imagenet") == "imagenet"
    small += [f"--config.dataset.image_size={32 if imagenet else 8}"]
    workdir = tmp_path / "run"
    parsed, _ = main.parse(["--config", f"configs/{recipe}.py", *small])
    train_and_evaluate(parsed, workdir, jax.devices()[:1])

    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 2 and np.isfinite([line["train_loss"] for line in lines]).all()
    assert json.loads((workdir / "results.json").read_text())["last"]["step"] == 2
    kept = dict(flatten(json.loads((workdir / "config.json").read_text())))
    for field, value in flatten(config):
        if field.startswith(KEPT) and value != ():
            assert kept[field] == value, field
    per_epoch = (16 if "random_resized_crop" in config.dataset.augment else 1024 - held_out) // 8
    rate = build_optimizer(config, per_epoch)[0](1)
    assert lines[-1]["learning_rate"] == pytest.approx(float(rate), rel=1e-6)


CIFAR = {"batch": 128, "epochs": 200, "decay": 1e-4, "rates": {0: 0.1, 99: 0.1, 100: 0.01, 149: 0.01, 150: 1e-3}}
CIFAR |= {"augment": ("crop", "flip"), "mean": (), "std": (), "image_size": 0}
RNN = {"batch": 64, "epochs": 150, "decay": 1e-4, "rates": {0: 0.1, 79: 0.1, 80: 0.01, 149: 0.01}}
RNN |= {"augment": (), "mean": (0.5,), "std": (0.5,), "image_size": 0}
IMAGENET = {"batch": 256, "epochs": 100, "decay": 1e-4, "augment": ("random_resized_crop", "flip")}
IMAGENET |= {"rates": {0: 0.1, 29: 0.1, 30: 0.01, 59: 0.01, 60: 1e-3, 89: 1e-3, 90: 1e-4}, "image_size": 224}
IMAGENET |= {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
PHOTOS = {"augment": ("flip", "rotate", "color", "translate"), "image_size": 32}
PROJ = {"epochs": 10, "decay": 5e-4, "rates": {0: 0.1, 9: 0.1}}
PROJ |= {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}
RNN_REGNETY = {"epochs": 10, "decay": 0.0, "rates": {0: 0.1, 7: 0.1, 8: 0.01, 9: 0.01}, "image_size": 224}


@pytest.mark.parametrize(
    "recipe, expected",
    [
        ("cifar10", CIFAR),
        ("cifar100", CIFAR),
        ("proj_cifar10", CIFAR | PROJ),
        ("rnn_cifar10", RNN),
        ("rnn_regnety_cifar10", RNN | RNN_REGNETY),
        ("imagenet", IMAGENET),
        ("rnn_photos", RNN | PHOTOS),
    ],
)
def test_values_are_those_of_the_sources(recipe, expected):
    config = get_config(recipe)
    schedule, _ = build_optimizer(config, steps_per_epoch=10)
    found = {
        "batch": config.train.batch_size,
        "epochs": config.train.epochs,
        "decay": config.optimizer.weight_decay,
        "rates": {epoch: pytest.approx(float(schedule(10 * epoch)), rel=1e-6) for epoch in expected["rates"]},
        "augment": config.dataset.augment,
        "mean": config.dataset.mean,
        "std": config.dataset.std,
        "image_size": config.dataset.image_size,
    }
    assert expected == found
    settings = config.optimizer
    assert settings.momentum == 0.9 and not settings.nesterov and not settings.label_smoothing
    other = {"cifar100": "cifar100", "imagenet": "imagenet2012", "rnn_photos": "folder"}
    assert config.dataset.name == other.get(recipe, "cifar10")


@pytest.mark.parametrize(
    "recipe, model, initial",
    [
        ("cifar10", "regnet20_convlstm", "paper"),
        ("proj_cifar10", "regnet_proj_cifar", "torch"),
        ("rnn_cifar10", "resnet_rnn20_convrnn", "torch"),
        ("rnn_cifar10", "resnet20", "torch"),
        ("rnn_regnety_cifar10", "regnety_400mf", None),
    ],
)
def test_models_start_from_their_own_initial_values(recipe, model, initial):
    config = get_config(recipe) if recipe != "rnn_cifar10" else get_config(recipe, model)
    assert config.model.name == model
    assert getattr(create_model(model, **model_options(config)), "initial", None) == initial


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in RECIPES])
def test_comparisons_are_of_models_that_there_are(name):
    config = get_config(name)
    check_config(config)
    assert len(config.compare.models) > 1 and len(set(config.compare.seeds)) > 1
    for entry in config.compare.models:
        create_model(entry.split()[0], **model_options(config))

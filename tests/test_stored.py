"""Workdirs of version 0.1.0, one of each kind, resume and are evaluated; stored/ has the expected results."""

import json
import pathlib
import tarfile

import jax
import pytest
from ml_collections import config_dict

from configs import base
from regnet_flax.modes import train as loop
from regnet_flax.modes.evaluate import evaluate_only
from regnet_flax.modes.setup import models

STORED = pathlib.Path(__file__).parent / "stored"
EXPECTED = json.loads((STORED / "expected.json").read_text())


def config_of(workdir, **overrides):
    """Reads the config from config.json like the command line."""
    config, stored = base.get_config(), json.loads((workdir / "config.json").read_text())
    for name, value in config_dict.ConfigDict(stored).items():
        if name not in config:
            continue
        if not hasattr(value, "items"):
            config[name] = value
            continue
        for field, item in flat(value):
            if field in dict(flat(config[name])):
                config.update_from_flattened_dict({f"{name}.{field}": tuple(item) if isinstance(item, list) else item})
    config.update_from_flattened_dict(overrides)
    return config


def flat(tree, prefix=""):
    for name, value in tree.items():
        if hasattr(value, "items"):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k == "lone" else pytest.mark.thorough) for k in EXPECTED])
def test_a_workdir_of_before_is_evaluated_and_resumes_to_the_same_end(kind, tmp_path):
    with tarfile.open(STORED / f"{kind}.tar.gz") as tar:
        tar.extractall(tmp_path, filter="data")
    workdir, where = tmp_path / kind, {"dataset.data_dir": str(tmp_path / "photos")} if kind == "streamed" else {}
    before = json.loads((workdir / "results.json").read_text())
    seeds = tuple(json.loads((workdir / "config.json").read_text()).get("seeds", ()))
    own = before["seeds"][str(seeds[1])]["last"] if seeds else before["last"]

    config = config_of(workdir, **where, **({"seed": seeds[1]} if seeds else {}))
    found = evaluate_only(config, workdir, jax.devices()[:1])
    assert found["loss"] == pytest.approx(own["eval_loss"], rel=1e-4) and found["step"] == before["step"]
    assert models.load_trained(config, workdir)[2] == before["step"]

    config = config_of(workdir, **where, **{"train.max_steps": before["step"] + 3})
    loop.train_and_evaluate(config, workdir, jax.devices()[:1], seeds=seeds)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    lines = {line["step"]: line for line in lines}
    for expected in EXPECTED[kind]:
        line = lines[expected["step"]]
        for name in ("train_loss", "train_accuracy", "learning_rate"):
            assert line[name] == pytest.approx(expected[name], rel=2e-3), (name, expected["step"])
        assert ("eval_loss" in line) == ("eval_loss" in expected)
        if "eval_loss" in line and kind != "lone":  # its averages had no warm-up
            assert line["eval_loss"] == pytest.approx(expected["eval_loss"], rel=2e-3)

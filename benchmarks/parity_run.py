"""One training run in both frameworks: the same initial weights, batches and recipe on the digits.

    python benchmarks/parity_run.py --out parity_digits.json --picture parity_digits.png

The PyTorch model is the tests' reference, with torch.optim.SGD. In float32 the two drift apart once rounding flips the
sign of a ReLU's input; in float64 they do not.
"""

import argparse
import functools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import torch

from regnet_flax import create_model
from regnet_flax.analysis.plots import training
from regnet_flax.data import feeds, sources
from regnet_flax.environment import environment
from regnet_flax.port.torch import from_torch
from regnet_flax.training import optimizer
from regnet_flax.training import step as steps

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tests"))
import torch_reference

BATCH = 64


def batches(count):
    """Yields normalised images (N, height, width, channels) in float64, and labels."""
    train = sources.load_dataset("digits").train
    mean, std = sources.channel_statistics(train.images)
    images = (train.images / 255 - np.array(mean)) / np.array(std)
    an_epoch = len(images) // BATCH
    for step in range(count):
        epoch, k = divmod(step, an_epoch)
        order = np.asarray(feeds.epoch_order(0, epoch, len(images)))[k * BATCH : (k + 1) * BATCH]
        yield images[order], train.labels[order]


def run(name, count, dtype):
    """Returns the loss at each step, ours and PyTorch's."""
    torch.manual_seed(0)
    theirs = torch_reference.build(name, num_classes=10, in_channels=1).train()
    start = {key: value.numpy().copy() for key, value in theirs.state_dict().items()}
    theirs = theirs.to(getattr(torch, dtype))
    ours = create_model(name, num_classes=10, dtype=jnp.dtype(dtype))
    schedule = optimizer.make_schedule("step", 0.1, epochs=1, steps_per_epoch=count, boundaries=(0.5, 0.75))
    tx = optimizer.make_optimizer("sgd", schedule, momentum=0.9, weight_decay=1e-4)
    variables = jax.tree.map(lambda a: jnp.asarray(a, dtype), from_torch(start, ours))
    state = steps.create_train_state(variables, tx)
    step = jax.jit(functools.partial(steps.train_step, apply_fn=ours.apply, tx=tx))
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    losses = {"PyTorch": [], "regnet_flax": []}
    for index, (images, labels) in enumerate(batches(count)):
        batch = {"images": jnp.asarray(images, dtype), "labels": jnp.asarray(labels)}
        state, metrics = step(state, batch)
        losses["regnet_flax"].append(float(metrics["loss"]))

        sgd.param_groups[0]["lr"] = float(schedule(index))
        sgd.zero_grad()
        logits = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2)).to(getattr(torch, dtype)))
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels.astype(np.int64)))
        loss.backward()
        sgd.step()
        losses["PyTorch"].append(loss.item())
    return losses


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="regnet20_convlstm")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", help="write the losses to this JSON file")
    parser.add_argument("--picture", help="draw the float32 losses to this file")
    arguments = parser.parse_args()
    results = {"model": arguments.model, "steps": arguments.steps, "batch": BATCH}
    for dtype in ("float32", "float64"):
        with jax.enable_x64(dtype == "float64"):
            losses = run(arguments.model, arguments.steps, dtype)
        apart = np.abs(np.subtract(losses["regnet_flax"], losses["PyTorch"]))
        results[dtype] = losses | {"largest_difference": float(apart.max()), "at_step": int(apart.argmax()) + 1}
        print(
            f"{dtype}: from {losses['PyTorch'][0]:.4f} to {losses['PyTorch'][-1]:.6f} (PyTorch) and "
            f"{losses['regnet_flax'][-1]:.6f}; largest difference {apart.max():.2e} at step {apart.argmax() + 1}"
        )
        if arguments.picture and dtype == "float32":
            title = f"{arguments.model} on the digits, the same weights and batches, {dtype}"
            training.losses(losses, pathlib.Path(arguments.picture), title)
    results |= environment(jax.devices()[:1]) | {"torch": torch.__version__}
    if arguments.out:
        with open(arguments.out, "w") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()

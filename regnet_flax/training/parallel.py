"""Training on several devices, and in several processes, one per machine or one per accelerator.

`pmap` runs a function on every device. Processes start, agree and end together. Process 0, the primary, writes the
run's files; all processes write checkpoints, so all must see the workdir. With one process, the functions for
processes do nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from regnet_flax.errors import ProcessError

AXIS = "batch"
# None, 0 for an argument with a device axis, or a dict of these for an argument that is a dict.
Axes = Any


class Placement:
    """Puts host arrays on devices.

    Args:
      devices: the devices of all processes; they share each batch.

    Attributes:
      devices: as given.
      replicated: the sharding of arrays that are the same on all devices.
    """

    def __init__(self, devices: Sequence[Any]):
        self.devices = list(devices)
        mesh = Mesh(np.array(self.devices), (AXIS,))
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self._divided = NamedSharding(mesh, PartitionSpec(AXIS))

    @property
    def count(self) -> int:
        """The number of devices, over all processes."""
        return len(self.devices)

    def place(self, tree: Any) -> Any:
        """Copies a tree of arrays, which must be the same in every process, to every device.

        An argument left on one device would be copied to the others at every call.
        """
        if jax.process_count() == 1:
            return jax.device_put(tree, self.replicated)

        # device_put would first compare the arrays of all processes, even the whole data set.
        def put_global(array: Any) -> jax.Array:
            array = np.asarray(array)
            return jax.make_array_from_callback(array.shape, self.replicated, lambda index: array[index])

        return jax.tree.map(put_global, tree)

    def divide(self, array: np.ndarray) -> jax.Array:
        """Splits this process's rows into one equal part per device: (devices, rows per device, …)."""
        local = sum(device.process_index == jax.process_index() for device in self.devices)
        parts = array.reshape(local, len(array) // local, *array.shape[1:])
        return jax.make_array_from_process_local_data(self._divided, parts)


def pmap(function: Callable[..., Any], axes: Sequence[Axes], devices: Sequence[Any], donate: Sequence[int] = ()):
    """Runs `function` on every device's part; its result must be the same on all devices.

    The state has no device axis, so a checkpoint works with any number of devices. Nothing checks that the result is
    the same everywhere: a forgotten mean over devices would go unnoticed.

    With several processes, pmap would convert every process's arrays, including the state, to global ones and back at
    each call. There this uses `shard_map`, on which pmap itself is built, and whose arrays stay global.

    Args:
      function: computes one device's part, with the axis name AXIS.
      axes: the device axis of each argument.
      devices: the devices to run on.
      donate: the arguments whose buffers are donated.
    """
    if jax.process_count() > 1:
        return shard_map(function, axes, devices, donate)
    return jax.pmap(
        function,
        axis_name=AXIS,
        in_axes=tuple(axes),
        out_axes=None,  # pyright: ignore[reportArgumentType]
        devices=devices,
        donate_argnums=tuple(donate),
    )


def shard_map(function: Callable[..., Any], axes: Sequence[Axes], devices: Sequence[Any], donate: Sequence[int] = ()):
    """Works like `pmap`, for global arrays over the devices of all processes."""

    def local(*args):
        return function(*map(_squeeze, args, axes))

    mesh = Mesh(np.array(devices), (AXIS,))
    specs = tuple(map(_spec, axes))
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
    return jax.jit(mapped, donate_argnums=tuple(donate))


def _squeeze(argument: Any, axis: Axes) -> Any:
    if isinstance(axis, dict):
        return {name: _squeeze(argument[name], axis[name]) for name in axis}
    return argument if axis is None else jax.tree.map(lambda a: a.squeeze(axis), argument)


def _spec(axis: Axes) -> Any:
    if isinstance(axis, dict):
        return {name: _spec(axis[name]) for name in axis}
    return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, AXIS)


def initialize(where: str) -> None:
    """Connects this process with the others; call it before any computation.

    Args:
      where: "auto", if Slurm, Kubernetes, Open MPI or a TPU describes the processes; or "HOST:PORT,PROCESSES,INDEX":
        process 0's machine, a free port on it, the number of processes, and this process's index.

    Raises:
      ProcessError: `where` is neither of these, or there is no such cluster.
    """
    if where == "auto":
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise ProcessError(
                "--distributed=auto finds no cluster (Slurm, Kubernetes, Open MPI or TPU): "
                "name the processes with --distributed=HOST:PORT,PROCESSES,INDEX"
            ) from error
        _connect()
        return
    parts = re.fullmatch(r"(\S+:\d+),(\d+),(\d+)", where)
    if parts is None or int(parts[3]) >= int(parts[2]):
        raise ProcessError(
            f"--distributed={where} is not understood: it must be auto or HOST:PORT,PROCESSES,INDEX, INDEX from 0, "
            "such as node1:1234,2,0"
        )
    jax.distributed.initialize(parts[1], int(parts[2]), int(parts[3]), cluster_detection_method="deactivate")
    _connect()


def _connect() -> None:
    # Gloo gives up on a group of devices if some processes take more than 30 s longer than others to reach its first
    # exchange, because they compile or read data. So the groups used later connect now, while all processes are here.
    every = Mesh(np.array(jax.devices()), ("devices",))
    ones = jax.make_array_from_callback(
        (every.size,), NamedSharding(every, PartitionSpec("devices")), lambda index: np.ones(every.size)[index]
    )
    jax.block_until_ready(jax.jit(jnp.sum, out_shardings=NamedSharding(every, PartitionSpec()))(ones))
    all_agree(True)


def joined() -> bool:
    """Whether `initialize` was called; works before there are devices."""
    return jax.distributed.is_initialized()


def is_primary() -> bool:
    """Whether this is process 0."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Waits until every process has called it."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Makes an error in one process an error in all, so that no process waits for one that has ended.

    Raises:
      ProcessError: in the other processes; the failing one raises its own error.
    """
    if jax.process_count() == 1:
        yield
        return
    failed = None
    try:
        yield
    except Exception as error:
        failed = error
    failures = multihost_utils.process_allgather(np.array(failed is not None))
    if failed is not None:
        raise failed
    if failures.any():
        raise ProcessError(f"process {int(failures.argmax())} failed: its own output says why")


def all_agree(yes: bool) -> bool:
    """Whether `yes` is True in every process."""
    return yes if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(yes)).all())


def from_primary(value: Any) -> Any:
    """Returns process 0's value, which JSON must be able to hold, in every process."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8) if is_primary() else np.zeros(0, np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    text = multihost_utils.broadcast_one_to_all(text if is_primary() else np.zeros(size, np.uint8))
    return json.loads(np.asarray(text).tobytes())


def check_same(what: str, value: Any) -> None:
    """Raises ProcessError unless `value`, which JSON must be able to hold, is the same in every process."""
    if jax.process_count() == 1:
        return
    expected = from_primary(value)
    with together():
        if expected != json.loads(json.dumps(value)):
            raise ProcessError(
                f"process {jax.process_index()} has another {what} than process 0: give all of them the same"
            )


def end(code: int) -> None:
    """Ends a failed process, without waiting for the others as JAX would at exit."""
    sys.stdout.flush()
    sys.stderr.flush()
    if is_primary():
        time.sleep(2)  # The others end with it, and may still have to report why they failed.
    os._exit(code)

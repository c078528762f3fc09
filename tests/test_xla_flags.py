"""The XLA flags that the program sets for its own process."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys

import pytest

from regnet_flax import xla_flags

FLAG, LEVEL = "--xla_cpu_experimental_ynn_fusion_type", "--xla_backend_optimization_level"


@pytest.mark.parametrize(
    "version, platforms, plugins, given, expected",
    [
        ("0.10.2", "", False, "", f"{FLAG}=LIBRARY_FUSION_TYPE_REDUCE {LEVEL}=1"),
        ("0.10.2", "cpu", True, "--other=1", f"{FLAG}=LIBRARY_FUSION_TYPE_REDUCE {LEVEL}=1 --other=1"),
        ("0.10.2", "", False, f"{FLAG}=LIBRARY_FUSION_TYPE_DOT", f"{LEVEL}=1 {FLAG}=LIBRARY_FUSION_TYPE_DOT"),
        ("0.10.2", "", True, f"{LEVEL}=2", f"{FLAG}=LIBRARY_FUSION_TYPE_REDUCE {LEVEL}=2"),
        ("0.10.2", "cuda", True, "--other=1", "--other=1"),
        ("0.12.0", "", False, "--other=1", f"{LEVEL}=1 --other=1"),
        ("0.12.0", "", True, "--other=1", "--other=1"),
    ],
)
def test_flags(monkeypatch, version, platforms, plugins, given, expected):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(importlib.metadata, "version", {"jaxlib": version}.__getitem__)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if plugins and name == "jax_plugins" else None)
    monkeypatch.setenv("XLA_FLAGS", given)
    xla_flags.set_defaults()
    assert xla_flags.os.environ["XLA_FLAGS"] == expected


def test_xla_knows_them():
    """A flag that XLA does not know ends the process when it computes."""
    code = (
        "from regnet_flax import xla_flags; import jax; xla_flags.set_defaults(); jax.numpy.ones(2).block_until_ready()"
        "; print(xla_flags.os.environ['XLA_FLAGS'])"
    )
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=300, stdout=subprocess.PIPE)
    assert LEVEL in done.stdout.decode()

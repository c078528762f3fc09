"""The XLA flags that the program sets for its own process."""

import importlib.metadata
import subprocess
import sys

import pytest

from regnet_flax import xla_flags

FLAG = "--xla_cpu_experimental_ynn_fusion_type"


@pytest.mark.parametrize(
    "version, platforms, given, expected",
    [
        ("0.10.2", "", "", f"{FLAG}=LIBRARY_FUSION_TYPE_REDUCE"),
        ("0.10.2", "cpu", "--other=1", f"{FLAG}=LIBRARY_FUSION_TYPE_REDUCE --other=1"),
        ("0.10.2", "", f"{FLAG}=LIBRARY_FUSION_TYPE_DOT", f"{FLAG}=LIBRARY_FUSION_TYPE_DOT"),
        ("0.10.2", "cuda", "--other=1", "--other=1"),
        ("0.12.0", "", "--other=1", "--other=1"),
    ],
)
def test_flags(monkeypatch, version, platforms, given, expected):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(importlib.metadata, "version", {"jaxlib": version}.__getitem__)
    monkeypatch.setenv("XLA_FLAGS", given)
    xla_flags.set_defaults()
    assert xla_flags.os.environ["XLA_FLAGS"] == expected


def test_xla_knows_them():
    """A flag that XLA does not know ends the process when it computes."""
    code = (
        "from regnet_flax import xla_flags; import jax; xla_flags.set_defaults(); jax.numpy.ones(2).block_until_ready()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)

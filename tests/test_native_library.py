"""The library of native operations: its build, its cache, and the messages if it is missing."""

import functools
import logging
import os
import stat
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import pytest

from regnet_flax.models.ops import CPU, native_library

pytestmark = pytest.mark.core

# Ways to turn the operations off, and the messages.
OFF = [
    ("REGNET_FLAX_NATIVE", "0", "native operations are off: REGNET_FLAX_NATIVE is 0"),
    ("CXX", "/nonexistent/c++", "there is no C++ compiler '/nonexistent/c++': install one, or name it in CXX"),
    ("CXXFLAGS", "-no-such-flag", "c++ failed: "),
    ("CXXFLAGS", "-DA='", "native operations are off: No closing quotation"),
]


@pytest.fixture
def said(caplog, monkeypatch, tmp_path):
    monkeypatch.setattr(native_library, "cache_directory", lambda: tmp_path / "cache" / "native")
    monkeypatch.delenv("REGNET_FLAX_NATIVE", raising=False)
    caplog.set_level(logging.INFO, "regnet_flax")
    return caplog


@pytest.mark.parametrize(("name", "value", "message"), OFF)
def test_off(name, value, message, said, monkeypatch):
    """Each reason is logged, and the steps use the JAX form."""
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(native_library, "_registered", functools.cache(native_library._registered.__wrapped__))
    x, weights = jnp.zeros((2, 3, 3, 2)), (jnp.zeros((2, 3, 2)), jnp.zeros((3, 3, 3, 2)), jnp.zeros((3, 2)))
    for _ in range(2):
        program = jax.make_jaxpr(lambda x: CPU.gru_step(x, (x,), weights))(x)
        assert "regnet_flax_" not in str(program)
    assert [message in text for text in said.messages] == [True]
    assert not [*native_library.cache_directory().glob("*")]


def test_the_cache_that_cannot_be_written(said, monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setattr(native_library.shutil, "which", lambda name: name)
    assert not native_library._registered.__wrapped__()
    assert f"they cannot be built in {tmp_path / 'cache' / 'native'}: " in said.messages[0]


def test_a_damaged_library_goes(said, tmp_path, monkeypatch):
    damaged = tmp_path / "damaged.so"
    damaged.write_bytes(b"\x7fELF")
    monkeypatch.setattr(native_library, "_library", lambda: damaged)
    assert not native_library._registered.__wrapped__()
    assert said.messages[0].startswith("native operations are off: ") and not damaged.exists()


def test_what_a_killed_build_left_goes(said, monkeypatch, tmp_path):
    directory = native_library.cache_directory()
    directory.mkdir(parents=True)
    for name, age in (("tmpold.so", 1000), ("tmpnew.so", 0), ("other.so", 1000)):
        (directory / name).write_text("")
        os.utime(directory / name, (time.time() - age,) * 2)
    with pytest.raises(native_library._OffError):
        native_library._build(["false"], directory / "library.so")
    assert {file.name for file in directory.iterdir()} == {"tmpnew.so", "other.so"}


TANH = """
import jax.numpy as jnp, numpy as np
from regnet_flax.models.ops import CPU, native_library
assert native_library.available()
bias = np.linspace(-1, 1, 9, dtype=np.float32)
weights = jnp.zeros((2, 1, 9)), jnp.zeros((3, 3, 1, 9)), bias[None]
(h,), _ = CPU.rnn_step(jnp.zeros((1, 2, 2, 9)), (jnp.zeros((1, 2, 2, 9)),), weights)
np.testing.assert_allclose(h[0, 0, 0], np.tanh(bias), rtol=1e-6)
"""


@pytest.mark.thorough
def test_flags_that_would_reorder_sums_do_not(tmp_path):
    environment = os.environ | {"CXXFLAGS": "-Ofast", "XDG_CACHE_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", TANH], env=environment, check=True, timeout=300)
    assert list(tmp_path.rglob("*.so"))


def test_processes_that_build_at_once_do_not_meet(said, monkeypatch, tmp_path):
    """Each process writes its own file; the cached library is complete at every moment."""
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nfor last; do :; done\nprintf half > "$last"; sleep 0.2; printf whole > "$last"\n')
    compiler.chmod(compiler.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("CXX", str(compiler))
    path, seen = tmp_path / "cache" / "native" / "library.so", []
    builds = [threading.Thread(target=native_library._build, args=([str(compiler)], path)) for _ in range(3)]
    for build in builds:
        build.start()
    while any(build.is_alive() for build in builds):
        seen += [path.read_text()] if path.exists() else []
    assert set(seen) | {path.read_text()} == {"whole"}
    assert [file.name for file in path.parent.iterdir()] == [path.name]

"""The cache of compiled programs, and that a second start uses it."""

import os
import pathlib
import subprocess
import sys

import pytest

from regnet_flax import xla_flags

NAMES = ("JAX_COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_MAX_SIZE", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")


@pytest.fixture
def unset(monkeypatch, tmp_path):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it
        del os.environ[name]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_where_it_is(unset, monkeypatch, tmp_path):
    xla_flags.keep_compiled()
    directory = pathlib.Path(os.environ[NAMES[0]])
    assert directory.is_dir() and directory.is_relative_to(tmp_path) and os.environ[NAMES[1]] == str(1 << 30)
    # Programs of another processor must not run on this one.
    monkeypatch.setattr(xla_flags.platform, "machine", lambda: "another")
    del os.environ[NAMES[0]]
    xla_flags.keep_compiled()
    assert pathlib.Path(os.environ[NAMES[0]]) != directory
    monkeypatch.setenv(NAMES[0], "given")
    xla_flags.keep_compiled()
    assert os.environ[NAMES[0]] == "given"


def test_no_place_for_it(unset, monkeypatch, tmp_path):
    (tmp_path / "regnet_flax").write_text("a file is in the way")
    xla_flags.keep_compiled()
    assert NAMES[0] not in os.environ


def test_a_second_process_finds_what_the_first_compiled(unset, tmp_path):
    code = (
        "from regnet_flax import xla_flags; xla_flags.keep_compiled(); import jax, jax.numpy as jnp; "
        "hits = []; jax.monitoring.register_event_listener(lambda name, **_: hits.append(name)); "
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0); "
        "jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((3, 3))); "
        "print(sum(name.endswith('cache_hits') for name in hits))"
    )
    run = [sys.executable, "-W", "error", "-c", code]
    first, second = (subprocess.run(run, check=True, capture_output=True, text=True, timeout=300) for _ in range(2))
    assert int(first.stdout) == 0 and int(second.stdout) > 0
    assert first.stderr == second.stderr == ""

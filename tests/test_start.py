"""What the command line does first: huge pages. tests/test_terminals.py has Ctrl-C during the imports."""

import os
import subprocess
import sys

import pytest

from regnet_flax import start

ON = start.TUNABLES


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Sets what the system says of itself; returns the list of the programs that were started."""
    started = []

    def says(pages="always [madvise] never", libc="glibc 2.36"):
        monkeypatch.setattr(start, "_LINUX", tmp_path / "enabled")
        if pages is not None:
            (tmp_path / "enabled").write_text(pages + "\n")
        monkeypatch.setattr(os, "confstr", {"CS_GNU_LIBC_VERSION": libc}.__getitem__, raising=False)
        monkeypatch.setattr(os, "execv", lambda path, argv: started.append((path, argv, os.environ["GLIBC_TUNABLES"])))
        monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "-m", "regnet_flax.main", "--mode", "models"])
        return started

    monkeypatch.setenv("GLIBC_TUNABLES", "")
    return says


def test_the_same_command_starts_again_with_huge_pages(machine):
    started = machine()
    start.use_huge_pages()
    assert started == [
        (sys.executable, [sys.executable, "-X", "dev", "-m", "regnet_flax.main", "--mode", "models"], ON)
    ]
    start.use_huge_pages()  # as that one would
    assert len(started) == 1


def test_other_settings_stay(machine, monkeypatch):
    started = machine()
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.tcache_count=9")
    start.use_huge_pages()
    assert started[0][2] == f"glibc.malloc.tcache_count=9:{ON}"
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.mmap_max=9")
    start.use_huge_pages()
    assert started[1][2].split(":")[:2] == ["glibc.malloc.mmap_max=9", f"{start.HUGE_PAGES}=1"]
    assert started[1][2].count("mmap_max") == 1 and "trim_threshold" in started[1][2]


@pytest.mark.parametrize(
    "said",
    [
        {"pages": "[always] madvise never"},
        {"pages": None},
        {"libc": "glibc 2.34"},
        {"libc": "musl 1.2"},
        {"libc": None},
    ],
)
def test_elsewhere_nothing_starts(machine, said):
    started = machine(**said)
    start.use_huge_pages()
    assert not started and not os.environ["GLIBC_TUNABLES"]


def test_it_is_turned_off(machine, monkeypatch):
    started = machine()
    monkeypatch.setenv("GLIBC_TUNABLES", f"{start.HUGE_PAGES}=0")
    start.use_huge_pages()
    assert not started


def test_where_it_cannot_start_the_program_goes_on(machine, monkeypatch):
    refused = []

    def refuse(*arguments):
        refused.append(arguments)
        raise PermissionError

    machine()
    monkeypatch.setattr(os, "execv", refuse)
    start.use_huge_pages()
    assert len(refused) == 1


@pytest.mark.skipif(not start._can_have_huge_pages(), reason="this system does not leave huge pages to programs")
def test_the_program_has_them(tmp_path, monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    config = tmp_path / "says.py"
    config.write_text("import os\n\ndef get_config():\n    raise ValueError(os.environ.get('GLIBC_TUNABLES'))\n")
    command = [sys.executable, "-m", "regnet_flax.main", "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and ON in done.stderr, done.stderr

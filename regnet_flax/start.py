"""What the command line does before it imports anything else: it handles Ctrl-C, and gets huge pages.

The package imports this module first, so it imports next to nothing itself.
"""

import os
import pathlib
import signal
import sys
import threading

HUGE_PAGES = "glibc.malloc.hugetlb"
# Huge pages, and freed memory that stays with the process: in one arena, since those of threads have no room for a
# step's arrays, which would be mapped and unmapped each time.
TUNABLES = f"{HUGE_PAGES}=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold={4 * 2**30}:glibc.malloc.arena_max=1"
_LINUX = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def is_program() -> bool:
    """Whether this process is the command line, rather than another program that imports the package."""
    started = sys.orig_argv[1:]
    module = "-m" in started and started.index("-m") + 1 < len(started) and started[started.index("-m") + 1]
    return module == "regnet_flax.main" or os.path.basename(sys.argv[0] if sys.argv else "") == "regnet-flax"


def end_at_once() -> None:
    """Makes SIGINT end the process with exit code 130.

    A KeyboardInterrupt would end in a traceback or be lost in a library's `except`. If SIGINT is ignored, as for a
    background job of a shell, it stays ignored.
    """
    main_thread = threading.current_thread() is threading.main_thread()
    if main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))


def use_huge_pages() -> None:
    """Starts the process again so that the C library uses huge pages, where Linux leaves that to programs.

    It then also keeps freed memory. On a CPU, XLA allocates a step's arrays anew each time. Small pages make that slow,
    and so do pages that were given back, because the kernel clears them again. The C library reads its settings only
    when a process starts. GLIBC_TUNABLES=glibc.malloc.hugetlb=0 in the environment turns this off.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if HUGE_PAGES in tunables or not _can_have_huge_pages():
        return
    given = {setting.partition("=")[0] for setting in tunables.split(":")}
    ours = [setting for setting in TUNABLES.split(":") if setting.partition("=")[0] not in given]
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, *ours]))
    try:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    except OSError:  # it is only slower
        return


def _can_have_huge_pages() -> bool:
    try:
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        return (
            "[madvise]" in _LINUX.read_text(encoding="ascii")
            and name == "glibc"
            and tuple(map(int, version.split("."))) >= (2, 35)
        )
    except (AttributeError, OSError, ValueError):  # another system, or another C library
        return False


if is_program():
    end_at_once()
    use_huge_pages()

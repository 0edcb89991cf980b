"""Huge pages for the buffers of a training step on a CPU."""

import os
import sys
from pathlib import Path

SETTING = "glibc.malloc.hugetlb=1"
SWITCH = "DSB_HUGE_PAGES"
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def keep_pages() -> None:
    """Starts this program anew with huge pages for its large buffers, if its C library can; else it goes on as it is.

    XLA's CPU runtime allocates the buffers of a step at each execution; glibc maps and unmaps them, and the kernel
    spends up to a quarter of a sparse training step on pages of 4 KiB. Pages of 2 MiB cost it far less, and no more
    memory. glibc (2.35 and later) reads the setting only when a process starts: hence before jax is imported.

    (`mallopt` in the process cures as much, but a heap that is never given back grew without bound: a hole that a
    buffer leaves is too small for the next of the same size, once a small one has been put into it.)

    What the user has set stands: GLIBC_TUNABLES (empty, too), MALLOC_..., LD_PRELOAD; DSB_HUGE_PAGES=0 switches it off.
    """
    theirs = [n for n in os.environ if n in (SWITCH, "GLIBC_TUNABLES", "LD_PRELOAD") or n.startswith("MALLOC_")]
    if theirs or sys.platform != "linux" or not sys.executable:
        return
    try:
        libc, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        old = libc != "glibc" or tuple(map(int, version.split(".")[:2])) < (2, 35)
        if old or "[madvise]" not in _HUGE_PAGES.read_text():
            return  # "always" needs no asking, and "never" hears none
        # A variable of ours as well: a Python with capabilities is not given GLIBC_TUNABLES, and would start for ever.
        environment = os.environ | {"GLIBC_TUNABLES": SETTING, SWITCH: "1"}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    except (OSError, ValueError):  # musl has no such name, a container no such file
        return

"""Programs start anew with huge pages, once, where the C library can, and leave alone what the user has set."""

import os
import subprocess
import sys

import pytest

from experiments import pages

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")


@pytest.fixture
def started(monkeypatch, tmp_path):
    """What the process would be replaced by."""
    calls = []
    enabled = tmp_path / "enabled"
    enabled.write_text("always [madvise] never\n")
    monkeypatch.setattr(pages, "_HUGE_PAGES", enabled)
    monkeypatch.setattr(os, "confstr", lambda name: "glibc 2.36")
    monkeypatch.setattr(os, "execve", lambda *args: calls.append(args))
    for name in list(os.environ):
        if name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD", pages.SWITCH):
            monkeypatch.delenv(name)
    return calls


@LINUX
def test_the_same_program_is_started_with_huge_pages(started):
    pages.keep_pages()
    ((program, arguments, environment),) = started
    assert program == sys.executable
    assert arguments == [sys.executable, *sys.orig_argv[1:]]
    assert environment == os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "DSB_HUGE_PAGES": "1"}


@LINUX
@pytest.mark.parametrize("name", ["GLIBC_TUNABLES", "MALLOC_ARENA_MAX", "LD_PRELOAD", "DSB_HUGE_PAGES"])
def test_what_the_user_has_set_stands(started, monkeypatch, name):
    monkeypatch.setenv(name, "")
    pages.keep_pages()
    assert started == []


@LINUX
@pytest.mark.parametrize("libc", ["glibc 2.31", "musl 1.2", "", None])
def test_other_c_libraries_are_passed_over(started, monkeypatch, libc):
    monkeypatch.setattr(os, "confstr", lambda name: libc)
    pages.keep_pages()
    assert started == []


@LINUX
@pytest.mark.parametrize("text", ["[always] madvise never", "always madvise [never]", None])
def test_a_kernel_that_is_not_to_be_asked_is_not(started, monkeypatch, tmp_path, text):
    if text is None:
        monkeypatch.setattr(pages, "_HUGE_PAGES", tmp_path / "nowhere")
    else:
        (tmp_path / "enabled").write_text(text)
    pages.keep_pages()
    assert started == []


def test_a_program_starts_anew_once_and_keeps_its_arguments():
    environment = {name: value for name, value in os.environ.items() if name not in ("GLIBC_TUNABLES", pages.SWITCH)}
    result = subprocess.run(
        [sys.executable, "-m", "experiments.show_layout", "--out=a b", "--nowhere"],
        capture_output=True, text=True, env=environment, timeout=120,
    )  # fmt: skip
    assert result.returncode != 0
    assert "Unknown command line flag 'nowhere'" in result.stderr

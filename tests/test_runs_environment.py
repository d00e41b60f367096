"""The allocator's setting, in processes of their own."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os, pathlib, sys
print("start", os.getpid())
from moe_jax.runs.environment import use_huge_pages
use_huge_pages(pathlib.Path(sys.argv[1]))
print("GLIBC_TUNABLES", os.environ.get("GLIBC_TUNABLES"))
"""


def lines_of(setting, **changes):
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"} | changes
    command = [sys.executable, "-u", "-c", PROGRAM, str(setting)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.fixture
def setting(tmp_path):
    path = tmp_path / "enabled"
    path.write_text("always [madvise] never\n")
    return path


def test_the_interpreter_starts_anew_once_as_the_same_process(setting):
    first, second, last = lines_of(setting)
    assert first == second
    assert last == "GLIBC_TUNABLES glibc.malloc.hugetlb=1"


@pytest.mark.parametrize("content", ["[always] madvise never", "always madvise [never]", None])
def test_it_goes_on_where_the_kernel_leaves_no_choice(setting, content):
    if content is None:
        setting.unlink()
    else:
        setting.write_text(content)
    assert lines_of(setting)[1:] == ["GLIBC_TUNABLES None"]


def test_a_persons_own_setting_stays(setting):
    assert lines_of(setting, GLIBC_TUNABLES="glibc.malloc.check=0")[1:] == ["GLIBC_TUNABLES glibc.malloc.check=0"]

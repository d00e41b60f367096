"""The allocator's setting, in processes of their own."""

import os
import pathlib
import subprocess
import sys

import pytest

SETTING = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
PROGRAM = """
import os
print("start", os.getpid())
from moe_jax.runs.environment import use_huge_pages
use_huge_pages()
print("GLIBC_TUNABLES", os.environ.get("GLIBC_TUNABLES"))
"""


def lines_of(**changes: str) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"} | changes
    command = [sys.executable, "-u", "-c", PROGRAM]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.skipif(
    not (SETTING.is_file() and "[madvise]" in SETTING.read_text()), reason="this machine does not leave it to programs"
)
def test_the_interpreter_starts_anew_once_as_the_same_process():
    first, second, last = lines_of()
    assert first == second
    assert last == "GLIBC_TUNABLES glibc.malloc.hugetlb=1"


def test_a_persons_own_setting_stays():
    assert lines_of(GLIBC_TUNABLES="glibc.malloc.check=0")[1:] == ["GLIBC_TUNABLES glibc.malloc.check=0"]

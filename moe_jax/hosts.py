"""A program of several processes, one per host: how it starts, who writes its files, and how the hosts agree.

Every host runs the same command, and `jax.distributed` joins them into one program with one list of devices. The hosts
are named by `--hosts=ADDRESS:PORT,COUNT,INDEX`, where ADDRESS:PORT is a free port of the host with index 0 that the
others reach; or by `--hosts=auto` where JAX itself finds them out (SLURM, Open MPI, Cloud TPU, Kubernetes with the
package `kubernetes`). `configs/cluster` has a script for SLURM and a job for Kubernetes.

JAX ends a process by an abort, with the stack of a C++ program, if its hosts do not come together. So they meet here
first: each says who it is to host 0, and what does not fit is refused by name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import socket
import sys
import time
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from moe_jax.errors import MendableError

# A silent host counts as dead after so long. One whose process ends is noticed at once, by its closed connections.
HEARTBEAT_SECONDS = 30
_GREETING = "moe_jax host"
_SYNTAX = "--hosts=ADDRESS:PORT,COUNT,INDEX (such as --hosts=10.0.0.1:1234,4,0 on the first of four), or --hosts=auto"


class HostsError(MendableError, RuntimeError):
    """Hosts that do not come together, or do not agree; the message says which and what to do."""


@dataclasses.dataclass(frozen=True)
class Place:
    """One process's place among the hosts.

    Attributes:
      address: of host 0.
      port: on which host 0 listens.
      count: number of processes.
      index: this process, from 0.
    """

    address: str
    port: int
    count: int
    index: int


def parse_place(text: str) -> Place:
    """Reads `ADDRESS:PORT,COUNT,INDEX`.

    Raises:
      HostsError: if it is something else, or the index is not below the count.
    """
    match = re.fullmatch(r"(.+):(\d+),(\d+),(\d+)", text)
    if not match:
        raise HostsError(f"--hosts={text} is not understood; expected {_SYNTAX}")
    place = Place(match[1].strip("[]"), *(int(number) for number in match.groups()[1:]))
    if not (0 < place.port < 65536 and place.index < place.count):
        raise HostsError(f"--hosts={text}: the port must be below 65536 and the index below the count; {_SYNTAX}")
    return place


def initialize_hosts(hosts: str, timeout: float = 300.0) -> None:
    """Joins this process with those of the other hosts; before anything that starts a JAX backend.

    Args:
      hosts: `ADDRESS:PORT,COUNT,INDEX` or "auto".
      timeout: seconds to wait for the others.

    Raises:
      HostsError: if they do not come in time, disagree about their number, or two have one index.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    join = functools.partial(
        jax.distributed.initialize,
        initialization_timeout=int(timeout),
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )
    if hosts == "auto":
        try:
            join()
        except (ValueError, RuntimeError) as error:
            raise HostsError(f"--hosts=auto found no cluster ({error}); name the hosts: {_SYNTAX}") from error
        return
    place = parse_place(hosts)
    deadline = time.monotonic() + timeout
    if place.index == 0:
        _receive_guests(place, deadline)
    else:
        _greet_first_host(place, deadline)
    join(f"{place.address}:{place.port}", place.count, place.index, cluster_detection_method="deactivate")


def is_first_host() -> bool:
    """Whether this process writes the files and draws on the terminal: the only one, or the one with index 0."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def num_hosts() -> int:
    """The number of processes of this program; starts no backend where there is one."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def gather_texts(text: str) -> list[str]:
    """Tells every host a text of each; all must call it, in the same order among all that they do together.

    Args:
      text: this host's.

    Returns:
      One text a host, in the order of their indices.
    """
    if num_hosts() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size))
    # Few different lengths, since each is a program of its own to compile.
    padded = np.pad(data, (0, -int(max(sizes)) % 1024 + int(max(sizes)) - data.size))
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def any_host(is_so: bool) -> bool:
    """Whether something is so on any host; all must call it. It takes a millisecond or two between machines."""
    return is_so if num_hosts() == 1 else bool(np.any(multihost_utils.process_allgather(np.uint8(is_so))))


def leave_hosts(code: int) -> NoReturn:
    """Ends this process after an error without waiting for the other hosts, which notice it and end too."""
    if is_first_host():
        # The others are cut off as soon as this one ends: those that met the same error may say so first.
        time.sleep(2)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _receive_guests(place: Place, deadline: float) -> None:
    """Host 0: waits for one greeting of every other index and answers all of them at once."""
    guests: dict[int, socket.socket] = {}
    problem = ""
    try:
        with _listen(place) as server:
            while len(guests) < place.count - 1 and not problem:
                missing = sorted(set(range(1, place.count)) - guests.keys())
                server.settimeout(max(deadline - time.monotonic(), 0.01))
                try:
                    guest, _ = server.accept()
                except TimeoutError:
                    problem = f"of {place.count} hosts these did not come in time: {', '.join(map(str, missing))}"
                    break
                problem = _admit(place, guest, guests)
        # The port is free again before anyone hears the answer and connects to JAX's service there.
        for guest in guests.values():
            with contextlib.suppress(OSError):  # it may have ended since; JAX will miss it
                guest.sendall(f"{problem}\n".encode())
                guest.recv(1)  # until the guest has closed, so that its side keeps the port's last traces
    finally:
        for guest in guests.values():
            guest.close()
    if problem:
        raise HostsError(f"{problem}; start the same command once on every host, with indices 0 to {place.count - 1}")


def _listen(place: Place) -> socket.socket:
    """Opens the port on which host 0 waits."""
    is_dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if is_dual else socket.AF_INET
    try:
        return socket.create_server(("", place.port), family=family, dualstack_ipv6=is_dual)
    except OSError as error:
        raise HostsError(
            f"host 0 cannot listen on port {place.port} ({error.strerror}); choose another port"
        ) from error


def _admit(place: Place, guest: socket.socket, guests: dict[int, socket.socket]) -> str:
    """Hears a guest's greeting and keeps it; returns what is wrong with it, or nothing."""
    guest.settimeout(10)
    try:
        match = re.fullmatch(rf"{_GREETING} (\d+) of (\d+)\n", guest.makefile().readline(80))
    except (OSError, UnicodeDecodeError):
        match = None
    if not match:  # something that scans ports
        guest.close()
        return ""
    index, count = int(match[1]), int(match[2])
    is_twice = index in guests
    guests[index if not is_twice else -1] = guest
    if count != place.count:
        return f"host 0 was started as one of {place.count} hosts, host {index} as one of {count}"
    return f"two hosts were started with index {index}" if is_twice else ""


def _greet_first_host(place: Place, deadline: float) -> None:
    """Every other host: says who it is and waits for the answer."""
    where = f"{place.address}:{place.port}"
    while True:
        try:
            first = socket.create_connection((place.address, place.port), max(deadline - time.monotonic(), 0.01))
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise HostsError(
                    f"host {place.index} of {place.count} cannot reach host 0 at {where} ({error}); start the command "
                    "with index 0 there, and see that the address is right and no firewall closes the port"
                ) from error
            time.sleep(0.2)
    with first:
        try:
            first.settimeout(max(deadline - time.monotonic(), 0.01) + 10)
            first.sendall(f"{_GREETING} {place.index} of {place.count}\n".encode())
            answer = first.makefile().readline(1000)
        except (OSError, UnicodeDecodeError):
            answer = ""
    if not answer.endswith("\n"):
        raise HostsError(f"{where} gave no answer that host 0 would give; is another program running on that port?")
    if problem := answer.strip():
        raise HostsError(f"{problem}; start the same command once on every host, each with its own index")

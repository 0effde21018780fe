"""Which network interface carries an address of this machine, and which ports nobody else takes."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil

GLOO_VARIABLE = "GLOO_SOCKET_IFNAME"


def interface_of(address: str) -> str | None:
    """The interface that has `address`, or None when no one here has it.

    Gloo would take the one that the machine's host name resolves to, which is 127.0.1.1 on many a Debian and nothing at
    all in many a container; Ray knows under which address the other nodes reach this one.
    """
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == address for each in addresses):
            return name
    return None


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that are free, and stay so until somebody listens there who knows the number.

    They lie above those of Ray's workers and outside the range from which the kernel takes the ports of outgoing
    connections and of sockets that ask for any (ip(7)). Raises OSError when fewer are free.
    """
    first, last = 32_768, 60_999
    with suppress(FileNotFoundError):
        first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    candidates = [*range(20_000, first), *range(last + 1, 65_536)]
    random.shuffle(candidates)
    found: list[int] = []
    with ExitStack() as held:
        for port in candidates:
            if len(found) == count:
                return found
            probe = held.enter_context(socket.socket())
            with suppress(OSError):
                probe.bind(("127.0.0.1", port))
                found.append(port)
    if len(found) == count:
        return found
    raise OSError(f"{count} free ports were wanted on 127.0.0.1, {len(found)} were found outside {first} to {last}")

"""Which network interface carries an address of this machine."""

from __future__ import annotations

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

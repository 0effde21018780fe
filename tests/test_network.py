"""Ports that are given out stay free until they are used."""

import random
import socket
from pathlib import Path

from cluster.network import free_ports


def test_ports_are_distinct_and_never_those_that_the_kernel_gives_out():
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    found = free_ports(50)
    assert len(set(found)) == 50 and all(20_000 <= port < first or port > last for port in found)


def test_a_port_on_which_somebody_listens_is_not_given(monkeypatch):
    monkeypatch.setattr(random, "shuffle", lambda ports: None)
    (taken,) = free_ports(1)
    with socket.socket() as server:
        server.bind(("127.0.0.1", taken))
        server.listen()
        assert free_ports(1) != [taken]
    assert free_ports(1) == [taken]

# SPDX-License-Identifier: Apache-2.0
"""Measures one load on one set-up."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from kmap import snapshot
from kmap.demo import cpu, syscalls, wrk
from kmap.demo.children import Child
from kmap.demo.figures import CallsPerRequest, Cell, CpuPerRequest, SocketStates
from kmap.demo.programs import Programs
from kmap.demo.rig import Rig, Setup
from kmap.demo.ringbytes import Collector
from kmap.demo.wrk import Load

_LOOK_S = 0.1


def _socket_states(pids: set[int]) -> SocketStates:
    states = [
        each.state
        for each in snapshot.connections(include_kernel=True)
        if each.pid in pids
    ]
    return SocketStates(
        ring=states.count("ring"),
        pending=states.count("pending"),
        kernel=states.count("kernel"),
    )


def measure(
    programs: Programs, rig: Rig, load: Load, *, seconds: int, round_number: int
) -> Cell:
    """Runs the load once."""
    rig.nginx.check()
    rig.envoy.child.check()
    envoy = [rig.envoy.child.pid]
    service = rig.nginx.family()
    host_cpus = rig.cpus or frozenset(os.sched_getaffinity(0))
    with Collector() as client_ring, Collector() as service_ring:
        traffic = rig.envoy.traffic()
        cpu.settle([*envoy, *service])
        service_ring.look(service)
        ring_before = service_ring.ring_bytes()
        envoy_before, service_before = cpu.used_us(envoy), cpu.used_us(service)
        host = cpu.HostTime.read(host_cpus)
        with wrk.start(programs, rig, load, seconds, cpus=rig.cpus) as client:
            sockets = None
            if rig.setup is Setup.KMAP:
                sockets = _watch(client, client_ring, seconds, {*envoy, *service})
            report = wrk.report(client, seconds)
            assert client.usage is not None
            client_us = (client.usage.ru_utime + client.usage.ru_stime) * 1e6
        steal = (cpu.HostTime.read(host_cpus) - host).steal_share
        cpu.settle([*envoy, *service])
        envoy_us = cpu.used_us(envoy) - envoy_before
        service_us = cpu.used_us(service) - service_before
        service_ring.look(service)
        ring_after = service_ring.ring_bytes()
        carried = rig.envoy.traffic() - traffic
        client_bytes = client_ring.ring_bytes()
    requests = max(1, report.requests)
    return Cell(
        load=load.name,
        setup=rig.setup.value,
        round=round_number,
        duration_s=report.duration_s,
        requests=report.requests,
        errors=report.errors,
        rps=report.requests / report.duration_s,
        p50_us=report.p50_us,
        p99_us=report.p99_us,
        cpu=CpuPerRequest(
            client=client_us / requests,
            envoy=envoy_us / requests,
            service=service_us / requests,
            total=(client_us + envoy_us + service_us) / requests,
        ),
        steal=steal,
        client_hop_bytes=carried.client_hop,
        client_hop_ring_bytes=client_bytes,
        service_hop_bytes=carried.service_hop,
        service_hop_ring_bytes=ring_after - ring_before,
        sockets=sockets,
    )


def _watch(
    client: Child, ring: Collector, seconds: int, others: set[int]
) -> SocketStates:
    """Opens the client's statistics, and lists sockets in the middle of the run."""
    began = time.monotonic()
    states = SocketStates(0, 0, 0)
    listed = False
    while not client.wait(_LOOK_S) and time.monotonic() - began < seconds:
        ring.look([client.pid])
        if not listed and time.monotonic() - began > seconds / 2:
            states = _socket_states({client.pid, *others})
            listed = True
    return states


def count_calls(
    programs: Programs, rig: Rig, load: Load, cells: Sequence[Cell]
) -> CallsPerRequest | None:
    """Runs the load once more, briefly and under strace; cells are what it did."""
    requests = sum(cell.requests for cell in cells)
    if programs.strace is None or not requests:
        return None
    counted = syscalls.run(
        programs,
        rig,
        load,
        bytes_per_request=sum(cell.client_hop_bytes for cell in cells) / requests,
    )
    if counted is None:
        return None
    requests, total = counted.requests, counted.total
    return CallsPerRequest(
        stack=total.stack / requests,
        client_stack=counted.client.stack / requests,
        envoy_stack=counted.envoy.stack / requests,
        service_stack=counted.service.stack / requests,
        waits=total.waits / requests,
        doorbells=total.doorbells / requests,
        futexes=total.futexes / requests,
        requests=requests,
    )

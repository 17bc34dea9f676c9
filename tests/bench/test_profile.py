# SPDX-License-Identifier: Apache-2.0
"""scripts/perf: that it sorts call chains rightly, on samples of a real recording."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

from kmap import native
from kmap.bench import profile

KERNEL = "[kernel.kallsyms]"
LIBC = "/usr/lib/x86_64-linux-gnu/libc.so.6"
LIBRARY = "/opt/kmap/lib/libkmap_preload.so"

# As perf script prints them; the first is one of two lines of the same function.
SCRIPT = """\
redis-server  4711     500250 
\tffffffff8203a34f tcp_rate_skb_sent+0x1f ([kernel.kallsyms])
\tffffffff8202545e __tcp_transmit_skb ([kernel.kallsyms])
\tffffffff8200e45b tcp_sendmsg ([kernel.kallsyms])
\t           f8350 __GI___libc_write (/usr/lib/x86_64-linux-gnu/libc.so.6)

wrk: main  4712     500250 
\t            4c0d km_send (/opt/kmap/lib/libkmap_preload.so)
\t            2c2d main (/usr/bin/wrk)

"""  # noqa: W291


@pytest.mark.parametrize(
    ("frames", "group"),
    [
        ([("rep_movs_alternative", KERNEL), ("tcp_sendmsg", KERNEL)], "copy"),
        ([("_copy_to_iter", KERNEL), ("pipe_read", KERNEL)], "copy"),
        ([("km_user_copy", LIBRARY), ("km_ring_write", LIBRARY)], "copy"),
        ([("__memmove_avx512_unaligned_erms", LIBC)], "copy"),
        ([("km_user_begin", LIBRARY), ("km_ring_read", LIBRARY)], "copy"),
        ([("_raw_spin_unlock_irqrestore", KERNEL), ("try_to_wake_up", KERNEL),
          ("sock_def_readable", KERNEL), ("tcp_rcv_established", KERNEL)], "wake-up"),
        ([("finish_task_switch.isra.0", KERNEL), ("__schedule", KERNEL)], "wake-up"),
        ([("do_futex", KERNEL), ("__x64_sys_futex", KERNEL)], "wake-up"),
        ([("kmem_cache_free", KERNEL), ("tcp_ack", KERNEL)], "stack"),
        ([("unix_stream_sendmsg", KERNEL)], "stack"),
        ([("do_syscall_64", KERNEL), ("__write", LIBC)], "entry"),
        ([("entry_SYSRETQ_unsafe_stack", KERNEL)], "entry"),
        ([("invoke_syscall.constprop.0", KERNEL), ("el0_svc", KERNEL)], "entry"),
        ([("dput", KERNEL), ("do_syscall_64", KERNEL)], "kernel"),
        ([("path_openat", KERNEL), ("do_sys_openat2", KERNEL)], "kernel"),
        ([("km_recv", LIBRARY), ("main", "/usr/bin/wrk")], "library"),
        ([("main", "/usr/bin/wrk")], "program"),
        ([("malloc", LIBC)], "program"),
        ([], "kernel"),
    ],
)  # fmt: skip
def test_a_call_chain_has_a_group(frames: list[tuple[str, str]], group: str) -> None:
    assert profile.group_of(frames) == group


def test_samples_are_read_as_perf_prints_them() -> None:
    found = profile.parse(SCRIPT.splitlines(keepends=True))
    assert set(found) == {"redis-server", "wrk: main"}
    assert found["redis-server"].groups == {"stack": 500250}
    assert found["redis-server"].symbols["stack"] == {"tcp_rate_skb_sent": 500250}
    assert found["wrk: main"].groups == {"library": 500250}
    whole = profile.merged(found.values())
    assert (whole.total, whole.samples) == (1_000_500, 2)


@pytest.mark.skipif(os.geteuid() != 0, reason="perf needs root")
@pytest.mark.skipif(shutil.which("perf") is None, reason="apt-get install linux-perf")
def test_a_real_command_spends_less_on_the_stack_under_kmap() -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "kmap.bench.profile", "--top", "3", "--"),
            *(str(native.bench_path()), "pingpong", "--count", "20000"),
        ],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {
        match[1]: (float(match[2]), float(match[3]))
        for match in re.finditer(
            r"^\| ([\w-]+) \| ([\d.]+) \(.*?\| ([\d.]+) \(", done.stdout, re.MULTILINE
        )
    }
    assert set(rows) == set(profile.GROUPS), done.stdout
    kernel, kmap = rows["stack"]
    assert kmap < kernel / 2, done.stdout
    kernel, kmap = rows["library"]
    assert kernel == 0
    assert kmap > 0, done.stdout

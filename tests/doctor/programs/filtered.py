# SPDX-License-Identifier: Apache-2.0
"""filtered.py CALLS COMMAND...: becomes COMMAND where CALLS (commas) answer EPERM.

A call may be NAME:NUMBER, which is refused with that second argument alone.
COMMAND - is to wait for the end of standard input after printing "ready".
"""

from __future__ import annotations

import errno
import os
import sys

import pyseccomp


def main() -> None:
    """Installs the filter, which exec keeps."""
    made = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    for call in sys.argv[1].split(","):
        name, _, second = call.partition(":")
        arguments = [pyseccomp.Arg(1, pyseccomp.EQ, int(second))] if second else []
        made.add_rule(pyseccomp.ERRNO(errno.EPERM), name, *arguments)
    made.load()
    if sys.argv[2] != "-":
        os.execvp(sys.argv[2], sys.argv[2:])
    print("ready", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()

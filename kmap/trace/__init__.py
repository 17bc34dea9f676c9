# SPDX-License-Identifier: Apache-2.0
"""One request, recorded call by call: what enters the network stack, and what not.

``tracefs`` has the kernel record every system call of some processes, and every call
that programs make of the library; ``assemble`` makes calls of these events,
``recording`` is the file, ``draw`` the figures.  ``session`` runs the request, and
holds what was recorded against strace's count.
"""

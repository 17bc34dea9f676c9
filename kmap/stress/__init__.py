# SPDX-License-Identifier: Apache-2.0
"""Seeded stress with fault injection, in which every byte is verified.

Reading order: ``stream`` (what the bytes are), ``plan`` (what a case does, from its
seed alone), ``flow`` (one end of one connection), ``drive`` (how an end waits),
``worker`` (a process that runs ends), ``pair`` (two workers, seen from outside),
``judge`` (what must come out of a case), ``session`` (a whole run).
The ring level has ``rings`` in place of ``flow``, ``drive`` and ``worker``.
"""

from __future__ import annotations

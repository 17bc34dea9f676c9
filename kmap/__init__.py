# SPDX-License-Identifier: Apache-2.0
"""Kmap carries loopback TCP connections over shared memory."""

from __future__ import annotations

__version__ = "0.1.0"

# SPDX-License-Identifier: Apache-2.0
"""A packet capture of what goes by ring: ``kmap tap``.

It looks from outside, and only reads: nothing in the processes it looks at runs, waits
or changes for it.  ``docs/decisions/0015-tap.md`` says why.
"""

from __future__ import annotations

# SPDX-License-Identifier: Apache-2.0
"""What ``kmap demo`` does: real programs, with and without Kmap, side by side.

Reading order: :mod:`~kmap.demo.rig` is one set-up of Envoy and nginx,
:mod:`~kmap.demo.wrk` loads it, :mod:`~kmap.demo.cell` measures one load on one set-up,
:mod:`~kmap.demo.figures` holds what comes out, and :mod:`~kmap.demo.session` does all
of it in order.
"""

# SPDX-License-Identifier: Apache-2.0
"""What ``kmap bench`` does: transports side by side, and programs nobody here wrote.

Reading order: :mod:`~kmap.bench.workloads` is what is measured,
:mod:`~kmap.bench.driver` runs it once, :mod:`~kmap.bench.figures` holds what comes out,
:mod:`~kmap.bench.session` takes turns, :mod:`~kmap.bench.calls` counts system calls
apart from that, :mod:`~kmap.bench.apps` has the third-party programs,
:mod:`~kmap.bench.goals` judges, :mod:`~kmap.bench.compare` holds two results against
each other and :mod:`~kmap.bench.plot` draws one.
"""

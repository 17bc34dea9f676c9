# SPDX-License-Identifier: Apache-2.0
"""Whether a host, a program or a process can use Kmap, check by check."""

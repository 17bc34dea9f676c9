# SPDX-License-Identifier: Apache-2.0
"""Which connections may be upgraded: rules, and rules made from an Envoy's settings.

``docs/policy.md`` describes the format.  The library reads the rules; this package
writes them, says in words what they mean, and derives them.
"""

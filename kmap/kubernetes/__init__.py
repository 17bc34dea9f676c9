# SPDX-License-Identifier: Apache-2.0
"""Kmap in Kubernetes pods.

:mod:`~kmap.kubernetes.pods` decides what a pod gets, for ``kmap inject`` and for the
webhook alike; :mod:`~kmap.kubernetes.edit` writes such changes into YAML text, and
:mod:`~kmap.kubernetes.admission` into answers to the API server.
"""

# SPDX-License-Identifier: Apache-2.0
"""The fixtures for real programs."""

from __future__ import annotations

from tests.apps.conftest import launch, pytest_runtest_makereport

__all__ = ["launch", "pytest_runtest_makereport"]

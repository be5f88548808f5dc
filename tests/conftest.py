"""What every test can rely on: hypothesis draws the same examples each time and never fails for being slow."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("bagel_ds", deadline=None, derandomize=True)
settings.load_profile("bagel_ds")

"""What can be chosen of images and views, apart from what reads and makes them, which takes seconds to import."""

from __future__ import annotations

from typing import Literal

# Ways to make views; "auto" goes by the images.
Recipe = Literal["auto", "digits", "simclr", "weak", "none"]
MAX_PIXELS = 90_000_000  # of an image, by default: where Pillow begins to warn

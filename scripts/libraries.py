"""What the libraries below say while they work."""

from __future__ import annotations

import datasets
import huggingface_hub.utils
import transformers.utils.logging


def silence() -> None:
    """No progress bars of transformers, datasets and the Hub client: a script has one of its own."""
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    huggingface_hub.utils.disable_progress_bars()

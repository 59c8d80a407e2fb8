"""Calibration data: placeholder of the public names while the packing is being written."""

from __future__ import annotations

from hf_qep.engine.text_sources import read_texts

__all__ = ["read_texts"]

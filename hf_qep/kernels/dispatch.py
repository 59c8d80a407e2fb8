"""The seam between layers and arithmetic: every product with packed weights goes through here.

Today there is one backend, the torch reference; a faster one registers itself for the devices and shapes it serves and
must equal the reference.
"""

from __future__ import annotations

from hf_qep.kernels.reference import factored_linear, integer_linear, scaled_codes, scaled_signs, sign_linear

__all__ = ["factored_linear", "integer_linear", "scaled_codes", "scaled_signs", "sign_linear"]

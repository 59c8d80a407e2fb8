"""What may be done with a licence."""

from __future__ import annotations

import pytest

from hf_qep.hub.licences import decide


@pytest.mark.parametrize("licence", ["apache-2.0", "mit", "MIT ", "cc-by-4.0", "gpl-3.0", "bsd-3-clause"])
def test_open_licences_need_nothing(licence):
    decision = decide(licence)
    assert (decision.publish_public, decision.needs_acknowledgement, decision.gate) == (True, False, False)


@pytest.mark.parametrize("licence", ["cc-by-nc-4.0", "cc-by-nc-sa-3.0", "CC-BY-NC-4.0", "apple-amlr"])
def test_noncommercial_licences_need_an_acknowledgement_and_a_gate(licence):
    decision = decide(licence)
    assert decision.needs_acknowledgement and decision.gate and "NonCommercial" in decision.reason


@pytest.mark.parametrize("licence", ["llama3.1", "gemma", "other", "openrail", "bigscience-bloom-rail-1.0"])
def test_licences_with_terms_must_have_been_read(licence):
    decision = decide(licence)
    assert decision.publish_public and decision.needs_acknowledgement and not decision.gate


@pytest.mark.parametrize(
    "licence", [None, "", "  ", "unknown", "cc", "cc-by-nd-4.0", "cc-by-nc-nd-4.0", "my-licence", '["mit","gpl"]']
)
def test_what_is_unknown_or_forbids_adaptations_is_never_public(licence):
    decision = decide(licence)
    assert not decision.publish_public and not decision.needs_acknowledgement
    assert decision.reason


def test_a_licence_is_taken_as_a_whole_word():
    assert not decide("apache-2.0-with-riders").publish_public
    assert not decide("mit bsd").publish_public

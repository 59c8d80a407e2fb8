"""Facts of the original, from the Hub and from files."""

from __future__ import annotations

import pytest
from huggingface_hub.errors import RepositoryNotFoundError

from hf_qep.errors import CardError
from hf_qep.hub.base import BaseFacts, read_metadata

CARD = """---
license: cc-by-nc-4.0
license_link: https://example.org/licence
language: [en, no, ja]
pipeline_tag: text-generation
library_name: transformers
tags: [conversational]
extra_gated_prompt: "Agree | to `this`: <b>licence</b>"
extra_gated_fields:
  Name: text
  I agree to use this model for non-commercial use ONLY: checkbox
---
# Original
"""


def test_facts_of_a_model_on_the_hub(loopback_hub, hub_api):
    loopback_hub.add_repo("acme/original", files={"README.md": CARD.encode(), "config.json": b"{}"}, gated="manual")
    facts = BaseFacts.from_hub(hub_api, "acme/original")
    assert facts.id == "acme/original" and len(facts.sha) == 40 and facts.gated == "manual"
    assert (facts.licence, facts.licence_link) == ("cc-by-nc-4.0", "https://example.org/licence")
    assert facts.languages == ("en", "no", "ja") and facts.pipeline_tag == "text-generation"
    assert facts.gate_form["extra_gated_prompt"] == "Agree | to `this`: <b>licence</b>"
    assert facts.gate_form["extra_gated_fields"]["Name"] == "text"
    assert facts == BaseFacts.from_hub(hub_api, "acme/original", facts.sha)


def test_a_model_without_a_card_has_no_licence(loopback_hub, hub_api):
    loopback_hub.add_repo("acme/bare", files={"config.json": b"{}"})
    facts = BaseFacts.from_hub(hub_api, "acme/bare")
    assert facts.licence is None and facts.gated is None and facts.gate_form == {}


def test_a_model_that_is_not_there_is_the_clients_error(hub_api):
    with pytest.raises(RepositoryNotFoundError):
        BaseFacts.from_hub(hub_api, "acme/nobody")


def test_facts_of_a_folder(tmp_path):
    assert BaseFacts.from_folder(tmp_path) == BaseFacts()
    (tmp_path / "README.md").write_text(CARD)
    facts = BaseFacts.from_folder(tmp_path)
    assert (facts.id, facts.licence, facts.languages) == (None, "cc-by-nc-4.0", ("en", "no", "ja"))
    assert list(facts.gate_form) == ["extra_gated_prompt", "extra_gated_fields"]


@pytest.mark.parametrize("value, licence", [("[mit]", "mit"), ("[mit, gpl-3.0]", None), ("3", None), ("''", None)])
def test_only_one_licence_is_a_licence(tmp_path, value, licence):
    (tmp_path / "README.md").write_text(f"---\nlicense: {value}\n---\n")
    assert BaseFacts.from_folder(tmp_path).licence == licence


@pytest.mark.parametrize("block", ["license: [", "- a\n- b", "just words", "when: 2024-99-99", "a: !!python/name:os.x"])
def test_a_broken_card_is_refused_instead_of_read_as_empty(tmp_path, block):
    (tmp_path / "README.md").write_text(f"---\n{block}\n---\n")
    with pytest.raises(CardError, match="metadata of the card"):
        BaseFacts.from_folder(tmp_path)


def test_a_card_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CardError, match="there is no card 'CARD.md'"):
        BaseFacts.from_card(tmp_path / "CARD.md")


def test_text_without_metadata_has_none():
    assert read_metadata("# title\n\n---\n") == {}

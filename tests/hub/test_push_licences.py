"""Who sees what is pushed: licences, gates, and the order in which a repository becomes public."""

from __future__ import annotations

import pytest

from hf_qep.errors import PublishError
from hf_qep.hub.publish import execute
from tests.hub.checkpoints import BASE
from tests.hub.pushing import REPO, add_base, client, content, plan, push, writes

NC, ND = "cc-by-nc-4.0", "cc-by-nd-4.0"


@pytest.mark.parametrize(
    ("licence", "options", "message"),
    [
        (NC, {}, "NonCommercial use only; read the licence and pass --accept-license"),
        (NC, {"accept_license": True, "gated": "none"}, "must stand behind a gate"),
        ("llama3.1", {}, "sets terms for adaptations; read the licence and pass --accept-license"),
        (ND, {"accept_license": True, "gated": "auto"}, "this may not be published: .*allows no adaptations"),
        ("unknown", {"accept_license": True}, "this may not be published: .*is not known"),
        (None, {"accept_license": True}, "this may not be published: no licence is known"),
    ],
)
def test_a_licence_forbids_to_show_it_to_everybody(loopback_hub, relicensed, licence, options, message):
    add_base(loopback_hub, licence) if licence else loopback_hub.add_repo(BASE, files={"README.md": b"# x\n"})
    with pytest.raises(PublishError, match=message):
        push(loopback_hub, relicensed(licence), public=True, **options)
    assert writes(loopback_hub) == []
    assert not loopback_hub.has_repo(REPO)


@pytest.mark.parametrize("licence", [NC, ND, "unknown", None])
def test_a_private_push_is_free_of_that(loopback_hub, relicensed, licence):
    add_base(loopback_hub, licence) if licence else loopback_hub.add_repo(BASE, files={"README.md": b"# x\n"})
    push(loopback_hub, relicensed(licence))
    assert loopback_hub.repo(REPO).private


@pytest.mark.parametrize(
    ("licence", "options", "gate"),
    [
        ("apache-2.0", {}, False),
        ("apache-2.0", {"gated": "manual"}, "manual"),
        ("llama3.1", {"accept_license": True}, False),
        (NC, {"accept_license": True}, "auto"),
        (NC, {"accept_license": True, "gated": "manual"}, "manual"),
    ],
)
def test_a_public_push_stands_behind_the_gate_that_is_asked_for(loopback_hub, relicensed, licence, options, gate):
    add_base(loopback_hub, licence)
    order = []
    push(loopback_hub, relicensed(licence), public=True, remote=client(loopback_hub, on_step=order.append), **options)
    repo = loopback_hub.repo(REPO)
    assert (repo.private, repo.gated) == (False, gate)
    steps = [s for s in order if s in ("set the gate", "commit", "make the repository public")]
    assert steps == (["set the gate"] if gate else []) + ["commit", "make the repository public"]


@pytest.mark.parametrize("gate", ["auto", "manual"])
def test_the_gate_of_the_original_is_inherited(loopback_hub, finished, gate):
    add_base(loopback_hub, gated=gate)
    push(loopback_hub, finished, public=True)
    assert loopback_hub.repo(REPO).gated == gate


def test_the_users_word_on_the_gate_counts_where_the_licence_allows_it(loopback_hub, finished):
    add_base(loopback_hub, gated="auto")
    push(loopback_hub, finished, public=True, gated="none")
    assert loopback_hub.repo(REPO).gated is False


def test_a_card_cannot_relicense_the_original(loopback_hub, finished):
    add_base(loopback_hub, NC)
    with pytest.raises(PublishError, match=r"the licences differ: card 'apache-2\.0', original 'cc-by-nc-4\.0'"):
        push(loopback_hub, finished, public=True, accept_license=True, gated="auto")
    assert plan(loopback_hub, finished).problems == []
    assert any("the licences differ" in sentence for sentence in plan(loopback_hub, finished).warnings)


def test_an_original_that_is_not_there_is_no_base_for_a_public_push(loopback_hub, finished):
    private = plan(loopback_hub, finished)
    assert private.problems == []
    assert any(f"the original {BASE} could not be looked up" in sentence for sentence in private.warnings)
    with pytest.raises(PublishError, match=f"the original {BASE} could not be looked up"):
        push(loopback_hub, finished, public=True)
    assert not loopback_hub.has_repo(REPO)


def test_a_public_repository_takes_no_push_that_was_meant_to_be_private(loopback_hub, finished):
    add_base(loopback_hub)
    loopback_hub.add_repo(REPO)
    with pytest.raises(PublishError, match="is public, so everybody would see this push; pass --public"):
        push(loopback_hub, finished)
    assert loopback_hub.files(REPO) == {}
    push(loopback_hub, finished, public=True)
    assert loopback_hub.files(REPO) == content(finished)


def test_a_repository_that_became_public_meanwhile_gets_nothing(loopback_hub, finished):
    add_base(loopback_hub)
    loopback_hub.add_repo(REPO, private=True)
    checked = plan(loopback_hub, finished)
    loopback_hub.repo(REPO).private = False
    with pytest.raises(PublishError, match="is public although a private one was asked for; nothing was sent"):
        execute(checked, remote=client(loopback_hub))
    assert loopback_hub.files(REPO) == {}


def test_a_gate_that_does_not_hold_keeps_it_private(loopback_hub, relicensed):
    add_base(loopback_hub, NC)

    def undo(step):
        if step == "make the repository public" or step.startswith("look at") and loopback_hub.has_repo(REPO):
            loopback_hub.repo(REPO).gated = False

    with pytest.raises(PublishError, match="it stays private"):
        push(loopback_hub, relicensed(NC), public=True, accept_license=True, remote=client(loopback_hub, on_step=undo))
    assert loopback_hub.repo(REPO).private


def test_a_pull_request_to_a_public_repository_is_as_public(loopback_hub, relicensed):
    add_base(loopback_hub, NC)
    loopback_hub.add_repo(REPO)
    with pytest.raises(PublishError, match="a pull request cannot set the gate"):
        push(loopback_hub, relicensed(NC), create_pr=True, accept_license=True)
    assert loopback_hub.repo(REPO).pulls == {}

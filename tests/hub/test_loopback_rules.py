"""The rules of the loopback Hub, seen through the real client: who may do what, which cards pass, what Spaces do."""

from __future__ import annotations

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import BadRequestError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import get_session

from hf_qep.hub.remote import Remote
from tests.loopback_hub.checks import add, refused

REPO, SPACE = "alice/model", "acme/demo"
SPACE_CARD = "---\ntitle: Demo\nemoji: 🗜️\ncolorFrom: indigo\ncolorTo: green\nsdk: gradio\napp_file: app.py\n---\n"


# ---- accounts and settings


def test_who_is_who(loopback_hub, hub_api):
    account = Remote(hub_api).account()
    assert (account.name, account.namespaces, account.role) == ("alice", ("alice", "acme"), "write")
    fine = loopback_hub.new_token("alice", scopes={"acme": ["repo.write"], "alice/model": ["repo.content.read"]})
    account = Remote(loopback_hub.api(fine)).account()
    assert account.scoped == (("acme", True), ("alice/model", False))
    assert (account.can_write("acme/x"), account.can_write(REPO)) == (True, False)
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        loopback_hub.api("hf_nobody").whoami()


def test_create_again_elsewhere_and_without_paying(loopback_hub, hub_api):
    assert hub_api.create_repo(REPO) == f"{loopback_hub.endpoint}/{REPO}"
    with refused(409):
        hub_api.create_repo(REPO)
    assert hub_api.create_repo(REPO, exist_ok=True).repo_id == REPO
    for repo_id in ("bob/model", "nobody/model"):
        with refused(403):
            hub_api.create_repo(repo_id)
    loopback_hub.state.unpaid = {"gradio"}
    with refused(402):
        hub_api.create_repo(SPACE, repo_type="space", space_sdk="gradio")
    assert not loopback_hub.has_repo(SPACE, "space")
    hub_api.delete_repo(REPO)
    with pytest.raises(RepositoryNotFoundError):
        hub_api.delete_repo(REPO)


FINE = {"acme/model": ["repo.content.read"]}


@pytest.mark.parametrize(
    "who, status",
    [("token", None), ("read_token", 403), ("other_token", 404), ("fine", 403), ("wrong", 401), ("nobody", 401)],
)
def test_who_may_write_to_a_private_repository(who, status, loopback_hub):
    repo = loopback_hub.add_repo("acme/model", private=True)
    tokens = {"fine": loopback_hub.new_token(scopes=FINE), "wrong": "hf_wrong", "nobody": False}
    api = loopback_hub.api(tokens[who] if who in tokens else getattr(loopback_hub, who))
    if status is None:
        api.create_commit("acme/model", [add("a")], commit_message="m")
        api.auth_check("acme/model", write=True)
        return
    calls = [
        lambda: api.create_commit("acme/model", [add("a")], commit_message="m"),
        lambda: api.update_repo_settings("acme/model", private=False),
        lambda: api.auth_check("acme/model", write=True),
        lambda: api.delete_repo("acme/model"),
    ]
    for call in calls:
        with refused(status):
            call()
    assert repo.private and len(repo.commits) == 1


def test_private_and_gated_repositories_and_their_readers(loopback_hub, hub_api):
    loopback_hub.add_repo(REPO, files={"config.json": b"{}"}, private=True)
    bob, nobody = loopback_hub.api(loopback_hub.other_token), loopback_hub.api(False)
    for api, status in ((bob, 404), (nobody, 401)):
        with refused(status, RepositoryNotFoundError):
            api.model_info(REPO)
    hub_api.update_repo_settings(REPO, private=False, gated="manual")
    for api, status in ((bob, 403), (nobody, 401)):
        assert api.model_info(REPO).gated == "manual"
        with refused(status, GatedRepoError):
            api.hf_hub_download(REPO, "config.json")
    loopback_hub.repo(REPO).granted.add("bob")
    bob.hf_hub_download(REPO, "config.json")
    bob.auth_check(REPO)
    hub_api.update_repo_settings(REPO, gated=False)
    assert hub_api.model_info(REPO).gated is False


# ---- cards


@pytest.mark.parametrize(
    "line, said",
    [
        ("license: apache", '"license" must be one of'),
        ("base_model_relation: distilled", '"base_model_relation" must be one of'),
        ("base_model: just-a-name", '"base_model" must be ids'),
        ("language: [en, no]", '"language" must be'),
        ("tags: [1-bit, 1]", '"tags" must be an array of strings'),
        ("tags: onebit", '"tags" must be an array of strings'),
        ("license_link: see there", '"license_link" must be'),
        ("model-index: {name: x}", '"model-index" must be an array'),
        ("model-index: [{name: x, results: [{task: {type: t}}]}]", 'dataset" needs'),
        ("extra_gated_fields: {Name: tekst}", "extra_gated_fields.Name"),
        ("tags: [unclosed", "not YAML"),
    ],
)
def test_cards_that_are_refused(line, said, loopback_hub, hub_api):
    loopback_hub.add_repo(REPO)
    text = f"---\nlicense: mit\n{line}\n---\n" if not line.startswith("license:") else f"---\n{line}\n---\n"
    assert said in Remote(hub_api).validate_card(text)
    with pytest.raises(ValueError, match="Invalid metadata"):
        hub_api.upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id=REPO)


@pytest.mark.parametrize(
    "old, new",
    [
        ("sdk: gradio", "sdk: gradiol"),
        ("colorFrom: indigo", "colorFrom: orange"),
        ("emoji: 🗜️", "emoji: ok"),
        ("title: Demo", f"title: Demo\nshort_description: {'x' * 61}"),
        ("title: Demo", "title: Demo\nsdk_version: 6.16"),
        ("sdk: gradio\n", ""),
    ],
)
def test_space_cards_that_are_refused(old, new, loopback_hub, hub_api):
    api_space = {"repo_id": SPACE, "repo_type": "space", "path_in_repo": "README.md"}
    hub_api.create_repo(SPACE, repo_type="space", space_sdk="gradio")
    hub_api.upload_file(path_or_fileobj=SPACE_CARD.encode(), **api_space)
    changed = SPACE_CARD.replace(old, new)
    assert changed != SPACE_CARD
    with pytest.raises(ValueError, match="Invalid metadata"):
        hub_api.upload_file(path_or_fileobj=changed.encode(), **api_space)


def test_a_card_without_metadata_is_warned_about(hub_api):
    with pytest.warns(UserWarning, match="empty or missing yaml"):
        hub_api.create_repo(REPO)
        hub_api.upload_file(path_or_fileobj=b"# hi", path_in_repo="README.md", repo_id=REPO)


# ---- Spaces


def stages(api: HfApi, looks: int) -> list[str]:
    return [api.get_space_runtime(SPACE).stage for _ in range(looks)]


def test_a_space_is_built_and_runs(loopback_hub, hub_api):
    hub_api.create_repo(
        SPACE,
        repo_type="space",
        space_sdk="gradio",
        space_secrets=[{"key": "HF_TOKEN", "value": "secret value"}],
        space_variables=[{"key": "MODEL_ID", "value": REPO}],
    )
    assert stages(hub_api, 2) == ["NO_APP_FILE"] * 2
    hub_api.upload_file(path_or_fileobj=b"import gradio", path_in_repo="app.py", repo_id=SPACE, repo_type="space")
    assert stages(hub_api, 4) == ["BUILDING", "BUILDING", "RUNNING", "RUNNING"]
    hub_api.add_space_variable(SPACE, "REVISION", "v1")
    assert {k: v.value for k, v in hub_api.get_space_variables(SPACE).items()} == {"MODEL_ID": REPO, "REVISION": "v1"}
    assert list(hub_api.get_space_secrets(SPACE)) == ["HF_TOKEN"]
    address, who = f"{hub_api.endpoint}/api/spaces/{SPACE}/secrets", {"Authorization": f"Bearer {hub_api.token}"}
    assert "secret value" not in get_session().get(address, headers=who).text
    assert loopback_hub.repo(SPACE, "space").secrets == {"HF_TOKEN": "secret value"}
    assert stages(hub_api, 3)[-1] == "RUNNING"
    assert hub_api.request_space_hardware(SPACE, "t4-small").requested_hardware == "t4-small"
    stages(hub_api, 3)
    assert hub_api.get_space_runtime(SPACE).hardware == "t4-small"
    assert hub_api.set_space_sleep_time(SPACE, 600).sleep_time == 600
    assert hub_api.pause_space(SPACE).stage == "PAUSED"
    assert hub_api.restart_space(SPACE).stage == "APP_STARTING"
    assert hub_api.space_info(SPACE).runtime.stage == "APP_STARTING"
    assert loopback_hub.repo(SPACE, "space").runtime.builds == 4  # files, variable, hardware, restart
    hub_api.delete_space_secret(SPACE, "HF_TOKEN")
    hub_api.delete_space_variable(SPACE, "REVISION")
    assert (loopback_hub.repo(SPACE, "space").secrets, list(hub_api.get_space_variables(SPACE))) == ({}, ["MODEL_ID"])


@pytest.mark.parametrize("goal", ["BUILD_ERROR", "RUNTIME_ERROR"])
def test_a_space_that_fails_says_why(goal, loopback_hub, hub_api):
    loopback_hub.state.space_goal = goal
    hub_api.create_repo(SPACE, repo_type="space", space_sdk="gradio")
    hub_api.upload_file(path_or_fileobj=b"import gradio", path_in_repo="app.py", repo_id=SPACE, repo_type="space")
    assert stages(hub_api, 3) == ["BUILDING", "BUILDING", goal]
    assert goal in hub_api.get_space_runtime(SPACE).raw["errorMessage"]
    loopback_hub.repo(SPACE, "space").logs["build"] += ["first\n", "last\n"]
    assert list(hub_api.fetch_space_logs(SPACE, build=True)) == ["first\n", "last\n"]


def test_a_space_with_a_name_twice_or_hardware_that_costs(loopback_hub, hub_api):
    loopback_hub.add_repo(SPACE, "space", files={"app.py": b"import gradio"})
    assert stages(hub_api, 1) == ["RUNNING"]
    hub_api.add_space_variable(SPACE, "TOKEN", "a")
    hub_api.add_space_secret(SPACE, "TOKEN", "b")
    assert stages(hub_api, 1) == ["CONFIG_ERROR"]
    loopback_hub.state.unpaid = {"a100-large"}
    with refused(402):
        hub_api.request_space_hardware(SPACE, "a100-large")
    with pytest.raises(BadRequestError):
        hub_api.request_space_hardware(SPACE, "abacus")
    with refused(403):
        loopback_hub.api(loopback_hub.other_token).get_space_variables(SPACE)

"""A double of the Hugging Face Hub on the loopback interface, for the real huggingface_hub client.

It speaks the wire protocol, so the code under test runs unchanged. It is written after the client, not after the Hub:
what passes here speaks the protocol correctly, which is not a promise that huggingface.co accepts it. Where the Hub's
behaviour is not known, the double takes the stricter one.

    state.py        repositories, commits, content, Spaces: what is stored
    accounts.py     users, organisations, tokens: who may do what
    cards.py        what the Hub refuses in the metadata of a README
    wire.py         requests, replies, errors, routes
    faults.py       answers that go wrong on purpose
    repos.py        routes of accounts and repositories; history.py: of branches and tags
    content.py      routes that write files; reading.py: that list and serve them
    large_files.py  routes of large files, at the Hub and at the storage host
    spaces.py       routes of Spaces
    xet.py          optional transfer through hf_xet's own local store
    server.py       `LoopbackHub`, what tests use; fixtures.py: the fixtures
    checks.py       what tests of refusals have in common
"""

from tests.loopback_hub.server import LoopbackHub

__all__ = ["LoopbackHub"]

"""How often weights are read, and what is shown meanwhile."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from hf_qep.architectures.structure import describe
from hf_qep.engine import streaming
from hf_qep.engine.fingerprint import job_parts
from hf_qep.engine.on_demand import load_on_demand
from hf_qep.engine.shards import Shards, digests_of
from hf_qep.engine.tensor_files import TensorFile
from hf_qep.errors import ArchitectureError, ResumeError
from hf_qep.files import sha256
from hf_qep.progress import Bar, Progress
from tests.engine.test_resume import fail_in_second_block
from tests.engine.test_streaming import config, streamed

FAMILIES = ["llama", "qwen3", "cohere2", "cohere2_vision", "qwen3_moe", "gpt2", "bert", "bert_classifier", "vit"]


@pytest.fixture
def reads(monkeypatch):
    """(file, tensor) -> how often it was read, of everything but activations and finished blocks."""
    found, read = Counter(), TensorFile.read

    def counted(file, name):
        found[file.name, name] += file.name.startswith("model")
        return read(file, name)

    monkeypatch.setattr(TensorFile, "read", counted)
    return found


@pytest.mark.parametrize(
    ("family", "options"),
    [("cohere2", {}), ("qwen3", {"embedding_bits": 8}), ("qwen3_moe", {}), ("vit", {}), ("gpt2", {})],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_weight_is_read_once_in_a_job(tiny_model, tmp_path, reads, family, options):
    tiny_model(family).save_pretrained(tmp_path / "m", max_shard_size="60KB")
    streamed(tmp_path / "m", tmp_path / "out", config(family, **options))
    entries = {(name, key) for name in Shards(tmp_path / "m").names for key in Shards(tmp_path / "m").entries(name)}
    assert {key: count for key, count in reads.items() if count} == dict.fromkeys(entries, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_made_up_weights_show_the_same_structure(tiny_model, tiny_batch, tmp_path, reads, family):
    tiny_model(family).save_pretrained(tmp_path / "m")
    model, blocks, _ = load_on_demand(tmp_path / "m")
    reads.clear()
    one = {key: value[:1] for key, value in tiny_batch(family).items()}
    with blocks.made_up():
        found = describe(model, one)
    assert not +reads
    assert found == describe(model, one) == describe(tiny_model(family), one)
    for name in blocks.names:
        assert all(p.is_meta for p in model.get_submodule(name).parameters())


def test_made_up_weights_see_that_blocks_are_no_chain(tiny_model, tiny_batch, tmp_path):
    """The second block answers otherwise when the whole model runs."""
    tiny_model("llama").save_pretrained(tmp_path / "m")
    model, blocks, _ = load_on_demand(tmp_path / "m")
    running = []
    model.register_forward_pre_hook(lambda *_: running.append(True))
    model.register_forward_hook(lambda *_: running.clear(), always_call=True)
    model.get_submodule(blocks.names[1]).mlp.register_forward_hook(
        lambda module, args, output: output * 2 if running else output
    )
    with blocks.made_up(), pytest.raises(ArchitectureError, match="depends on more than the output of the block"):
        describe(model, {key: value[:1] for key, value in tiny_batch("llama").items()})


def test_real_weights_are_read_where_routing_decides(tiny_model, tmp_path, reads, monkeypatch):
    experts = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2)])})
    assert streaming._routed(experts) and not streaming._routed(tiny_model("qwen3_moe"))
    tiny_model("llama").save_pretrained(tmp_path / "m")
    monkeypatch.setattr(streaming, "_routed", lambda model: True)
    streamed(tmp_path / "m", tmp_path / "out", config(method="rtn"))
    assert reads["model.safetensors", "model.layers.1.mlp.up_proj.weight"] == 3


def test_real_weights_are_read_where_made_up_ones_will_not_do(tiny_model, tmp_path, reads, monkeypatch):
    tiny_model("llama").save_pretrained(tmp_path / "m")
    describe_ = streaming.Residence.describe

    def only_real(self, model, sample, skip_modules):
        if self._blocks._made_up:
            raise ArchitectureError("these numbers will not do")
        return describe_(self, model, sample, skip_modules)

    monkeypatch.setattr(streaming.Residence, "describe", only_real)
    streamed(tmp_path / "m", tmp_path / "out", config(method="rtn"))
    assert reads["model.safetensors", "model.layers.1.mlp.up_proj.weight"] == 3


class Shown(Progress):
    """Bars that are written down."""

    def __init__(self):
        super().__init__(quiet=True)
        self.bars = {}

    @contextmanager
    def bar(self, title, total, unit="step"):
        steps = []

        class Noted(Bar):
            def advance(self, count=1, detail=""):
                steps.append((count, detail))

        self.bars[title, total, unit] = steps
        yield Noted()


def test_hashing_shows_how_far_it_is(tmp_path):
    for name, size in (("a.safetensors", 9 << 20), ("b.safetensors", 5)):
        (tmp_path / name).write_bytes(b"x" * size)
    shown = Shown()
    found = digests_of(sorted(tmp_path.iterdir()), shown)
    assert found == {path.name: sha256(path) for path in tmp_path.iterdir()}
    (((title, total, unit), steps),) = shown.bars.items()
    assert (title, total, unit) == ("hashing", (9 << 20) + 5, "B")
    assert sum(count for count, _ in steps) == total and len(steps) > 3
    assert [detail for _, detail in steps][-1] == "b.safetensors"


def test_files_of_the_hub_cache_are_known_by_their_names(tmp_path):
    (tmp_path / "blobs").mkdir()
    for name, blob in (("a.safetensors", "a" * 64), ("config.json", "b" * 40), ("c.safetensors", "other")):
        (tmp_path / "blobs" / blob).write_bytes(b"x")
        (tmp_path / name).symlink_to(f"blobs/{blob}")
    (tmp_path / "blobs" / ("d" * 64)).symlink_to("other")  # content that repositories share lies elsewhere again
    (tmp_path / "d.safetensors").symlink_to(f"blobs/{'d' * 64}")
    found = digests_of([tmp_path / name for name in ("a.safetensors", "config.json", "c.safetensors", "d.safetensors")])
    assert found == {
        "a.safetensors": "a" * 64,
        "config.json": "b" * 40,
        "c.safetensors": sha256(tmp_path / "blobs" / "other"),
        "d.safetensors": "d" * 64,
    }


def test_another_number_of_threads_is_another_job(tiny_model, tmp_path, monkeypatch):
    tiny_model("llama").save_pretrained(tmp_path / "m")
    with monkeypatch.context() as patch:
        fail_in_second_block(patch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            streamed(tmp_path / "m", tmp_path / "out", config(method="rtn"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    with pytest.raises(ResumeError, match=r"place\.threads \(1 then, 7 now\)"):
        streamed(tmp_path / "m", tmp_path / "out", config(method="rtn"), resume=True)
    assert job_parts(Shards(tmp_path / "m"), config(), "cpu", None)["place"]["threads"] == 7

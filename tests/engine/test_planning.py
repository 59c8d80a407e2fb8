"""Plans from a configuration against real files, real caches, and plans in which the advice was followed."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_qep.config import QepConfig
from hf_qep.engine.calibration import load_calibration
from hf_qep.engine.headers import read_headers
from hf_qep.engine.job import quantize_model
from hf_qep.engine.planning.costs import CostTable, job_operations, load_costs
from hf_qep.engine.planning.decoding import cache_bytes, longest_context
from hf_qep.engine.planning.job import Planner, Request
from hf_qep.engine.planning.limits import Limits, verdicts
from hf_qep.engine.planning.memory import STATES, stream_bytes
from hf_qep.engine.planning.origin import find_origin
from hf_qep.engine.planning.output import plan_output
from hf_qep.engine.planning.sketch import sketch_of
from hf_qep.engine.streams import room_bytes
from hf_qep.engine.writer import save_checkpoint
from hf_qep.errors import AlreadyQuantizedError, CheckpointError
from tests.engine.test_job import calibration
from tests.tiny_models import CAUSAL_FAMILIES, build_batch, build_model

FAMILIES = ["llama", "qwen3", "cohere2", "qwen3_moe", "gpt2", "bert", "vit"]
FAST = {"effort": "fast"}


def command_a() -> tf.PreTrainedConfig:
    """CohereLabs command-a-03-2025 as its config.json has it: tied, three sliding layers to a full one."""
    return tf.Cohere2Config(
        hidden_size=12288, intermediate_size=36864, num_hidden_layers=64, num_attention_heads=96, num_key_value_heads=8,
        head_dim=128, vocab_size=256000, sliding_window=4096, max_position_embeddings=131072, dtype="bfloat16",
    )  # fmt: skip


def planner(config: tf.PreTrainedConfig, dtype: torch.dtype = torch.bfloat16) -> Planner:
    return Planner(config, dtype, load_costs(), rate=1e11)


# ---- files ----


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tables", [False, True], ids=["float tables", "tables in 4 bits"])
def test_planned_parts_are_those_of_the_written_files(family, tables, tmp_path):
    model = build_model(family)
    model.config.architectures = [type(model).__name__]
    if tables and family == "vit":
        pytest.skip("reads no tokens")
    bits = {"embedding_bits": 4, "head_bits": 4} if tables else {}
    recipe = QepConfig(num_samples=12, seq_len=16, batch_size=4, **bits)
    plan = plan_output(model.config, recipe, torch.float32)
    images = build_batch("vit", batch_size=12).get("pixel_values")
    rows = load_calibration(images, None, num_samples=12, seq_len=16, seed=0) if family == "vit" else calibration()
    report = quantize_model(model, recipe, rows)
    folder = save_checkpoint(model, tmp_path / "out", tokenizer=None, manifest={})
    files = sorted(folder.glob("*.safetensors"))
    assert plan.files == len(files) and plan.file_bytes == sum(file.stat().st_size for file in files)
    tensors = read_headers(folder)
    assert plan.tensors == sum(entry.bytes for entry in tensors.values())
    assert 8 * plan.linears == sum(layer.stored_bits for layer in report.layers)
    assert 8 * plan.table_bytes == sum(table.stored_bits for table in report.tables)
    ends = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")
    assert plan.embedding == sum(entry.bytes for name, entry in tensors.items() if name.endswith(ends))
    assert plan.head == sum(entry.bytes for name, entry in tensors.items() if name == "lm_head.weight")


def test_headers_are_counted_in_every_shard(monkeypatch, tmp_path):
    model = build_model("llama")
    model.config.architectures = [type(model).__name__]
    monkeypatch.setattr("hf_qep.engine.planning.output.SHARD_SIZE", "20KB")
    plan = plan_output(model.config, QepConfig(num_samples=12, seq_len=16), torch.float32)
    quantize_model(model, QepConfig(num_samples=12, seq_len=16), calibration())
    folder = save_checkpoint(model, tmp_path / "out", tokenizer=None, manifest={}, max_shard_size="20KB")
    files = list(folder.glob("*.safetensors"))
    assert len(files) == plan.files > 1
    assert plan.file_bytes == sum(file.stat().st_size for file in files)


# ---- cache ----


@pytest.mark.parametrize("family", [name for name in CAUSAL_FAMILIES if name != "cohere2_vision"])
@pytest.mark.parametrize("context", [3, 6, 17])
def test_planned_cache_is_what_a_real_one_holds(family, context):
    model = build_model(family)
    cache = tf.DynamicCache(config=model.config)
    ids = torch.randint(3, 100, (1, context))
    with torch.no_grad():
        for token in ids.split(1, 1):
            model(input_ids=token, past_key_values=cache, use_cache=True)
    held = {layer_part.untyped_storage().data_ptr(): layer_part.untyped_storage().nbytes()
            for layer in cache.layers for layer_part in (layer.keys, layer.values)}  # fmt: skip
    assert cache_bytes(sketch_of(model.config, torch.float32), context) == sum(held.values())


def test_longest_context_is_the_last_that_fits():
    found = planner(build_model("cohere2").config, torch.float32).plan(Request(FAST, contexts=(10,)))
    limit = found.decoding[0].bytes
    longest = longest_context(found.sketch, found.output, limit, 1000)
    assert longest >= 10
    assert longest_context(found.sketch, found.output, found.output.tensors, 1000) == 0


# ---- a model of 111 thousand million weights ----


def test_command_a_fits_one_card_of_24_gigabytes():
    request = Request(FAST | {"embedding_bits": 4}, contexts=(2048, 8192))
    plan = planner(command_a()).plan(request)
    assert plan.sketch.parameters == pytest.approx(111e9, rel=0.01)
    assert plan.output.exact and plan.output.head == 0
    assert plan.output.file_bytes <= 16.5e9
    assert plan.output.saving > 0.92 and plan.output.bits_linear < 1.01 and plan.output.bits_model < 1.1
    assert all(decoding.bytes <= 24e9 for decoding in plan.decoding)
    windows = [layer.window for layer in plan.sketch.cache]
    assert windows.count(4096) == 48 and windows.count(None) == 16


def test_command_a_with_a_float_embedding_is_told_to_round_it():
    found = verdicts(planner(command_a()), Request(FAST, contexts=(32768,)), Limits(gpu=22 * 10**9))
    decoding = next(v for v in found if v.what.startswith("decoding"))
    assert not decoding.fits
    assert any(s.changes == {"embedding_bits": 8} for s in decoding.suggestions)
    assert any(list(s.changes) == ["contexts"] for s in decoding.suggestions)


def test_reading_block_by_block_takes_a_fraction_and_training_signs_needs_all():
    recipes = ({"effort": "fast"}, {"effort": "balanced"}, {"effort": "balanced", "distill_signs": True})
    fast, balanced, signs = (planner(command_a()).plan(Request(recipe)) for recipe in recipes)
    for streamed in (fast, balanced):
        assert streamed.on_cpu.streaming and streamed.on_cpu.ram.bytes < streamed.whole.ram.bytes / 2
    assert not signs.on_cpu.streaming and "distill_epochs 2" in signs.on_cpu.why
    assert signs.on_cpu.ram.bytes >= signs.sketch.float_bytes


def test_command_a_is_quantised_on_a_card_of_24_gigabytes():
    plan = planner(command_a()).plan(Request(FAST | {"embedding_bits": 4}))
    assert plan.on_gpu.streaming and plan.on_gpu.vram.bytes <= 24e9


# ---- memory, disk and time ----


def test_groups_are_those_that_the_engine_finds():
    for family, expected in (("llama", [3, 1, 2, 1]), ("cohere2", [5, 1, 1]), ("qwen3_moe", [3, 1, 4, 4])):
        sketch = sketch_of(build_model(family).config, torch.float32)
        assert sorted(len(g.linears) for g in sketch.blocks[0].groups) == sorted(expected), family
    assert all(group.exempt for group in sketch.blocks[0].groups if group.linears[0].expert is not None)


def test_activations_beyond_the_room_go_to_the_disk():
    at = planner(build_model("llama").config, torch.float32)
    much, none = (at.plan(Request(FAST, stream_room=room)) for room in (1 << 40, 0))
    assert much.on_cpu.spilled == 0 and "activations" not in none.on_cpu.ram.parts
    kept = much.on_cpu.ram.parts["activations"] + much.on_cpu.ram.parts["sums that wait"]
    assert none.on_cpu.spilled == kept > stream_bytes(much.sketch, QepConfig())
    assert none.on_cpu.disk.bytes - much.on_cpu.disk.bytes == none.on_cpu.spilled
    assert much.on_cpu.disk.parts["states to go on from"] == STATES * stream_bytes(much.sketch, QepConfig())


def test_seconds_come_from_the_table_and_grow_with_tokens_depth_and_width():
    def seconds(width=64, depth=1, samples=8):
        config = tf.LlamaConfig(
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=depth,
            num_attention_heads=4,
            vocab_size=128,
        )
        request = Request(FAST | {"num_samples": samples, "seq_len": 32})
        return planner(config, torch.float32).plan(request).seconds.phases

    base = seconds()
    assert set(base) == {"float pass", "observe", "correct", "solve", "error", "advance", "attention", "read", "write"}
    assert seconds(depth=2)["solve"] == pytest.approx(2 * base["solve"])
    assert seconds(samples=16)["observe"] == pytest.approx(2 * base["observe"])
    assert seconds(samples=16)["solve"] == base["solve"]
    assert seconds(width=128)["solve"] > 4 * base["solve"]
    training = planner(build_model("llama").config).plan(Request({"effort": "balanced"}))
    assert training.seconds.phases["train"] > 0


def test_without_phases_in_the_table_time_is_called_a_guess():
    table = CostTable({}, load_costs().workspace, 1.0, 1.0, {})
    found = Planner(build_model("llama").config, torch.float32, table, rate=1e9).plan(Request(FAST))
    assert found.seconds.guess and "guess" in found.seconds.basis
    assert found.seconds.total == pytest.approx(job_operations(found.sketch, QepConfig(**FAST)) / 1e9)


def test_a_table_of_another_machine_is_scaled_and_called_a_guess():
    table = load_costs()
    other = CostTable(table.phases, table.workspace, table.rate, table.disk, {"processor": "another", "threads": 1})
    found = Planner(build_model("llama").config, torch.float32, other, rate=table.rate / 2).plan(Request(FAST)).seconds
    own = Planner(build_model("llama").config, torch.float32, other, rate=table.rate).plan(Request(FAST)).seconds
    assert found.guess and found.phases["solve"] == pytest.approx(2 * own.phases["solve"])
    assert found.phases["read"] == own.phases["read"]


# ---- advice ----


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    family=st.sampled_from(["llama", "qwen3", "cohere2", "qwen3_moe"]),
    effort=st.sampled_from(["fast", "balanced"]),
    method=st.sampled_from(["sign", "factored", "auto"]),
    share=st.floats(0.02, 1.2),
    context=st.integers(1, 128),
)
def test_advice_that_is_followed_makes_it_fit(family, effort, method, share, context):
    at = planner(build_model(family).config, torch.float32)
    options = {"bits": 1.7} if method != "sign" else {}
    request = Request({"effort": effort, "method": method, "num_samples": 64, "seq_len": 32, **options}, (context,))
    first = at.plan(request)
    limits = Limits(
        gpu=max(1, int(share * first.on_gpu.vram.bytes)),
        ram=max(1, int(share * first.on_cpu.ram.bytes)),
        disk=max(1, int(share * first.on_cpu.disk.bytes)),
    )
    for verdict in verdicts(at, request, limits):
        assert verdict.fits == (verdict.needs <= verdict.limit)
        assert not (verdict.fits and verdict.suggestions)
        for suggestion in verdict.suggestions:
            again = verdicts(at, request.changed(suggestion.changes), limits)
            kind = verdict.what.partition(",")[0]
            same = next(v for v in again if v.what.partition(",")[0] == kind and v.place == verdict.place)
            assert same.fits and same.needs == suggestion.needs


# ---- where a plan begins ----


def test_a_configuration_is_read_from_a_folder_and_from_a_file(tmp_path):
    model = build_model("cohere2").to(torch.float16)
    model.save_pretrained(tmp_path / "model")
    folder = find_origin(str(tmp_path / "model"))
    assert folder.dtype == torch.float16 and "headers" in folder.said
    (tmp_path / "model" / "config.json").rename(tmp_path / "mine.json")
    file = find_origin(str(tmp_path / "mine.json"))
    assert file.config.num_hidden_layers == 3 and file.config.architectures == ["Cohere2ForCausalLM"]
    assert file.dtype == torch.float16 and "configuration" in file.said


def test_configurations_that_cannot_be_planned_are_refused(tmp_path):
    def written(**values):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(values))
        return str(path)

    with pytest.raises(CheckpointError, match="model type 'nothing'"):
        find_origin(written(model_type="nothing"))
    with pytest.raises(AlreadyQuantizedError):
        find_origin(written(model_type="llama", quantization_config={"quant_method": "awq"}))
    with pytest.raises(CheckpointError, match="hidden_size"):
        find_origin(written(model_type="llama", hidden_size=-3))
    with pytest.raises(CheckpointError, match="10000|num_hidden_layers"):
        find_origin(written(model_type="llama", num_hidden_layers=10**8))


def test_hub_errors_are_one_sentence_that_says_what_to_do(monkeypatch):
    import httpx
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

    def failing(error):
        def download(*_, **__):
            raise error

        return download

    answer = httpx.Response(403, request=httpx.Request("GET", "https://example.invalid"))
    for error, words in (
        (GatedRepoError("gated", response=answer), "accept its terms"),
        (LocalEntryNotFoundError("offline"), "not in the cache"),
        (ValueError("odd"), "odd; check the name"),
    ):
        monkeypatch.setattr("hf_qep.engine.planning.origin.hf_hub_download", failing(error))
        with pytest.raises(CheckpointError, match=words):
            find_origin("owner/name")
    with pytest.raises(CheckpointError, match="neither a folder"):
        find_origin("no such/folder/at all")


def test_room_for_activations_is_what_a_job_takes_of_the_free_memory():
    config = build_model("llama").config
    asked = Request(FAST | {"num_samples": 64, "seq_len": 512})
    enough, little = (
        Planner(config, torch.float32, load_costs(), rate=1e11, free=free).plan(asked) for free in (None, 1 << 20)
    )
    assert enough.on_cpu.spilled == 0 < little.on_cpu.spilled
    assert little.on_cpu.ram.parts["activations"] == room_bytes(1 << 20) == 1 << 19
    assert little.whole.spilled == 0


def test_what_is_held_while_a_group_is_observed_grows_with_the_tokens_of_a_batch_alone():
    config = tf.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, vocab_size=32
    )

    def peak(batch_size):
        recipe = FAST | {"num_samples": 16, "seq_len": 256, "batch_size": batch_size, "method": "rtn"}
        return planner(config, torch.float32).plan(Request(recipe)).on_cpu.ram

    one, two, four = peak(4), peak(8), peak(16)
    assert {part.moment for part in (one, two, four)} == {"observing a group"}
    passing = [part.parts["tokens that pass the block"] for part in (one, two, four)]
    assert passing == [passing[0], 2 * passing[0], 4 * passing[0]]
    assert four.bytes - two.bytes == 2 * passing[0]


def test_weights_of_groups_that_are_done_have_gone_when_the_widest_is_solved():
    plan = planner(command_a()).plan(Request(FAST | {"embedding_bits": 4}))
    block = max(block.float_bytes for block in plan.sketch.blocks)
    assert plan.on_gpu.vram.parts["a block of float weights"] < block / 3
    assert "sums that wait" not in plan.on_gpu.vram.parts

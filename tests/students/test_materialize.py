"""A student is exactly what its specification says, made of the teacher's weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from hf_qep.errors import ArchitectureError
from hf_qep.students.family import family_of, layers_of, teacher_shape
from hf_qep.students.materialize import blank_student, count_parameters, materialize
from hf_qep.students.scores import UnitScores
from hf_qep.students.spec import COPY_ZERO, KEEP, KINDS, NEW_ZERO, CandidateSpec, LayerSpec, TeacherShape
from hf_qep.students.units import kept_units
from tests.students.specs import mixed_spec, random_scores, uniform_spec
from tests.students.teachers import DECODERS, FAMILIES, batch, outputs, teacher


def added(spec: CandidateSpec, position: int, kind: str, stack: str = "layers") -> CandidateSpec:
    """One layer more, made of the layer before it."""
    layers = list(getattr(spec, stack))
    source = layers[max(position - 1, 0)]
    return replace(spec, **{stack: (*layers[:position], replace(source, kind=kind), *layers[position:])})


@pytest.mark.parametrize("family", FAMILIES)
def test_the_identity_is_the_teacher_in_its_own_class(family):
    model = teacher(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    student = materialize(model, teacher_shape(model).identity())
    assert type(student) is type(model)
    assert torch.equal(outputs(student, batch(family)), outputs(model, batch(family)))
    assert {k: v.tolist() for k, v in student.state_dict().items()} == {k: v.tolist() for k, v in before.items()}
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", [COPY_ZERO, NEW_ZERO])
@pytest.mark.parametrize("family", FAMILIES)
def test_added_layers_start_by_changing_nothing(family, kind):
    model = teacher(family)
    spec = teacher_shape(model).identity()
    expected = outputs(model, batch(family))
    places = [0, 1, len(spec.layers)]
    specs = [added(spec, place, kind) for place in places]
    specs.append(added(added(added(spec, 2, kind), 1, kind), 0, kind))
    if spec.decoder_layers:
        specs += [added(spec, place, kind, "decoder_layers") for place in (0, 2, 3)]
    for changed in specs:
        student = materialize(model, changed)
        assert len(layers_of(student)) == len(changed.layers)
        assert torch.allclose(outputs(student, batch(family)), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", [COPY_ZERO, NEW_ZERO])
@pytest.mark.parametrize("family", ["llama", "cohere2", "bert", "detr"])
def test_added_layers_can_learn(family, kind):
    model = teacher(family)
    student = materialize(model, added(teacher_shape(model).identity(), 1, kind))
    result = student(**batch(family))
    (result.logits.float().square().mean()).backward()
    name, layer = layers_of(student)[1]
    learning = {n for n, p in layer.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    layout = family_of(student).layout
    writers = {f"{layout.attention_out}.weight", f"{layout.mlp_out}.weight"}
    assert learning >= ({"gate"} if layout.normalised_after else writers)


@pytest.mark.parametrize("family", FAMILIES)
def test_counted_parameters_are_those_of_the_student(family):
    model = teacher(family)
    shape = teacher_shape(model)
    specs = [shape.identity(), mixed_spec(shape), uniform_spec(shape), added(mixed_spec(shape), 1, COPY_ZERO)]
    if family != "detr":
        specs.append(replace(mixed_spec(shape), hidden_size=48))
    specs += [replace(s, head="none") for s in specs[:2]]
    if family_of(model).classifier:
        specs.append(replace(mixed_spec(shape), head="classifier", num_labels=7))
    for spec in specs:
        counts = count_parameters(model, spec)
        student = materialize(model, spec)
        assert sum(counts.values()) == sum(p.numel() for p in student.parameters())
        inside = [m for s, _ in spec.stacks() for _, layer in layers_of(student, s) for m in layer.modules()]
        assert counts["blocks"] == sum(m.weight.numel() for m in inside if isinstance(m, torch.nn.Linear))
        blank = blank_student(model, spec, seed=3)
        assert type(blank) is type(student)
        assert {k: v.shape for k, v in blank.state_dict().items()} == {
            k: v.shape for k, v in student.state_dict().items()
        }
        assert torch.isfinite(outputs(blank, batch(family))).all()


def shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items()}


def masked(model: PreTrainedModel, spec: CandidateSpec, scores: UnitScores) -> PreTrainedModel:
    """The teacher with the columns of what is dropped set to zero where they are written, and dropped layers left out.

    Sub-blocks that are skipped write zero, which is the same as none where the norm comes first.
    """
    kept, layout, shape = kept_units(spec, teacher_shape(model), scores), family_of(model).layout, teacher_shape(model)
    for stack, layers in spec.stacks():
        modules = [module for _, module in layers_of(model, stack)]
        for number, layer in enumerate(layers):
            module = modules[layer.source]
            rows = (kept.heads[stack][number][:, None] * shape.head_dim + torch.arange(shape.head_dim)).flatten()
            units = kept.ffn[stack][number]
            for name, index, part in ((layout.attention_out, rows, "attention"), (layout.mlp_out, units, "mlp")):
                writer = module.get_submodule(name)
                mask = torch.zeros(writer.in_features)
                mask[index] = 0.0 if part in layer.skip else 1.0
                with torch.no_grad():
                    writer.weight.mul_(mask)
                    if part in layer.skip and writer.bias is not None:
                        writer.bias.zero_()
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_slicing_equals_masking(family):
    model = teacher(family)
    shape = teacher_shape(model)
    scores = random_scores(shape, seed=1)
    spec = mixed_spec(shape, skip=not family_of(model).layout.normalised_after)
    student = materialize(model, spec, scores)
    assert type(student).__name__ == f"Student{type(model).__name__}"
    expected = outputs(masked(teacher(family), spec, scores), batch(family))
    assert torch.allclose(outputs(student, batch(family)), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["bert", "detr"])
@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_a_skipped_sub_block_goes_with_its_norm_where_that_follows(family, part):
    model = teacher(family)
    spec = teacher_shape(model).identity().with_layer(0, skip={part})
    student = layers_of(materialize(model, spec))[0][1]
    source, hidden = layers_of(model)[0][1], torch.randn(1, 4, 64)
    if family == "bert":
        rest = source.feed_forward_chunk if part == "attention" else lambda x: source.attention(x)[0]
    elif part == "attention":
        rest = lambda x: source.final_layer_norm(x + source.mlp(x))  # noqa: E731
    else:
        rest = lambda x: source.self_attn_layer_norm(x + source.self_attn(x)[0])  # noqa: E731
    assert torch.allclose(student(hidden, None), rest(hidden), atol=1e-6)


@st.composite
def specs(draw: st.DrawFn, shape: TeacherShape) -> CandidateSpec:
    """Any student of the teacher."""

    def layers(theirs: tuple[LayerSpec, ...]) -> tuple[LayerSpec, ...]:
        found = []
        for source in theirs:
            kinds = draw(st.lists(st.sampled_from(KINDS), max_size=2, unique=True))
            for kind in sorted(kinds):
                sizes = {
                    n: draw(st.integers(1, getattr(source, n))) for n in ("kv_heads", "q_per_kv", "intermediate_size")
                }
                skip = draw(st.sampled_from([(), ("mlp",), ("attention",)]))
                found.append(LayerSpec(source.source, kind=kind, skip=skip, **sizes))
        return tuple(found) or theirs[:1]

    hidden = shape.hidden_size if shape.decoder_layers else draw(st.integers(8, shape.hidden_size))
    return CandidateSpec(layers(shape.layers), hidden, layers(shape.decoder_layers) if shape.decoder_layers else ())


@pytest.mark.parametrize("family", ["llama", "cohere2", "bert", "detr"])
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_student_is_as_large_as_counted_and_runs(family, data):
    model = teacher(family)
    spec = data.draw(specs(teacher_shape(model)))
    student = materialize(model, spec)
    assert sum(count_parameters(model, spec).values()) == student.num_parameters()
    assert torch.isfinite(outputs(student, batch(family))).all()
    got = teacher_shape(student)
    assert [replace(layer, source=0) for layer in got.layers + got.decoder_layers] == [
        replace(layer, source=0, kind=KEEP) for layer in spec.all_layers()
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_order_of_the_teachers_units_does_not_matter(family):
    model, permuted = teacher(family), teacher(family)
    shape = teacher_shape(model)
    scores = random_scores(shape, seed=2)
    spec = mixed_spec(shape)
    layout = family_of(model).layout
    new_ffn = []
    for stack, layers in shape.identity().stacks():
        new_ffn.append([])
        for number, layer in enumerate(layers):
            order = torch.randperm(layer.intermediate_size, generator=torch.Generator().manual_seed(number))
            module = layers_of(permuted, stack)[number][1]
            with torch.no_grad():
                for name in layout.mlp_in:
                    linear = module.get_submodule(name)
                    linear.weight.copy_(linear.weight[order])
                    if linear.bias is not None:
                        linear.bias.copy_(linear.bias[order])
                writer = module.get_submodule(layout.mlp_out)
                writer.weight.copy_(writer.weight[:, order])
            new_ffn[-1].append(scores.ffn[stack][number][order])
    other = replace(scores, ffn=tuple(tuple(layers) for layers in new_ffn))
    first = outputs(materialize(model, spec, scores), batch(family))
    second = outputs(materialize(permuted, spec, other), batch(family))
    assert torch.allclose(first, second, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_can_be_a_teacher(family):
    model = teacher(family)
    first = materialize(model, added(mixed_spec(teacher_shape(model)), 1, COPY_ZERO), seed=1)
    shape = teacher_shape(first)
    again = materialize(first, shape.identity())
    assert type(again) is type(first)
    assert torch.equal(outputs(again, batch(family)), outputs(first, batch(family)))
    last = replace(shape.identity(), layers=(replace(shape.layers[-1], intermediate_size=8),))
    smaller = materialize(first, last)
    assert teacher_shape(smaller).layers[0].intermediate_size == 8
    assert torch.isfinite(outputs(smaller, batch(family))).all()


def test_a_gate_that_has_learned_something_is_kept():
    model = teacher("bert")
    first = materialize(model, added(teacher_shape(model).identity(), 1, COPY_ZERO))
    with torch.no_grad():
        layers_of(first)[1][1].gate.fill_(0.5)
    again = materialize(first, teacher_shape(first).identity())
    assert layers_of(again)[1][1].gate.item() == 0.5
    assert torch.equal(outputs(again, batch("bert")), outputs(first, batch("bert")))
    assert not torch.allclose(outputs(first, batch("bert")), outputs(model, batch("bert")), atol=1e-3)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "detr"])
def test_fewer_equal_layers_and_heads_stay_in_the_stock_class_where_it_can_say_so(family):
    model = teacher(family)
    shape = teacher_shape(model)
    student = materialize(model, uniform_spec(shape))
    stock = family in ("llama", "qwen3", "cohere2", "vit")
    assert type(student).__name__ == ("" if stock else "Student") + type(model).__name__
    assert torch.isfinite(outputs(student, batch(family))).all()


def test_llama_with_a_number_of_heads_that_does_not_divide_is_no_stock_model():
    model = teacher("llama")
    layers = tuple(replace(layer, kv_heads=1, q_per_kv=1) for layer in teacher_shape(model).layers)
    one = materialize(model, replace(teacher_shape(model).identity(), layers=layers))
    assert type(one).__name__ == "LlamaForCausalLM"
    three = materialize(model, CandidateSpec(layers, 63))
    assert type(three).__name__ == "LlamaForCausalLM"
    two = materialize(model, CandidateSpec(tuple(replace(layer, q_per_kv=2) for layer in layers), 63))
    assert type(two).__name__ == "StudentLlamaForCausalLM"


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_a_cache_gives_the_same_tokens(family, cache):
    model = teacher(family)
    layers = list(mixed_spec(teacher_shape(model)).layers)
    layers[0] = replace(layers[0], skip=frozenset({"attention"}))
    student = materialize(model, replace(teacher_shape(model).identity(), layers=tuple(layers)))
    prompt = batch(family)["input_ids"]
    mask = torch.ones_like(prompt)
    mask[0, :3] = 0
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "attention_mask": mask}
    without = student.generate(prompt, use_cache=False, **options)
    extra = {"cache_implementation": "static"} if cache == "static" else {}
    assert torch.equal(student.generate(prompt, use_cache=True, disable_compile=True, **extra, **options), without)


@pytest.mark.parametrize("family", ["llama", "qwen3", "cohere2", "bert", "vit"])
def test_a_classifier_has_a_fresh_head_and_the_same_body(family):
    model = teacher(family)
    spec = replace(teacher_shape(model).identity(), head="classifier", num_labels=4)
    student, again, other = (materialize(model, spec, seed=seed) for seed in (0, 0, 1))
    assert student.config.num_labels == 4
    assert family == "vit" or student.config.pad_token_id is not None
    logits = student(**batch(family)).logits
    assert logits.shape == (2, 4)
    assert torch.equal(logits, again(**batch(family)).logits)
    assert not torch.equal(logits, other(**batch(family)).logits)
    body = student.base_model(**batch(family)).last_hidden_state
    assert torch.equal(body, model.base_model(**batch(family)).last_hidden_state)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_head_the_base_model_is_left(family):
    model = teacher(family)
    student = materialize(model, replace(teacher_shape(model).identity(), head="none"))
    assert type(student).__name__ == type(model.base_model).__name__
    body = student(**batch(family)).last_hidden_state
    assert torch.equal(body, model.base_model(**batch(family)).last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_data_type_is_the_teachers(dtype):
    model = teacher("llama").to(dtype)
    student = materialize(model, mixed_spec(teacher_shape(model)))
    assert {p.dtype for p in student.parameters()} == {dtype} == {student.dtype}
    assert student.model.rotary_emb.inv_freq.dtype == torch.float32


def test_the_way_attention_is_computed_stays():
    model = teacher("llama")
    model.set_attn_implementation("eager")
    for spec in (teacher_shape(model).identity(), mixed_spec(teacher_shape(model))):
        assert materialize(model, spec).config._attn_implementation == "eager"


def test_the_vision_tower_of_a_pair_can_be_cut_and_put_back():
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    config = tf.CLIPConfig(
        text_config={**sizes, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1},
        vision_config={**sizes, "image_size": 16, "patch_size": 4},
        projection_dim=24,
    )
    pair = tf.CLIPModel(config).eval()
    with pytest.raises(ArchitectureError, match=r"pass its vision tower, `model\.vision_model`"):
        family_of(pair)
    before = pair.get_image_features(**batch("clip_vision_model")).pooler_output
    spec = added(teacher_shape(pair.vision_model).identity(), 1, COPY_ZERO)
    pair.vision_model = materialize(pair.vision_model, spec)
    assert torch.allclose(pair.get_image_features(**batch("clip_vision_model")).pooler_output, before, atol=1e-6)


def test_layers_keep_their_kind_of_attention():
    model = teacher("cohere2")
    spec = replace(teacher_shape(model).identity(), layers=teacher_shape(model).layers[1:])
    student = materialize(model, spec)
    assert student.config.layer_types == ["full_attention", "sliding_attention"]
    assert [layer.self_attn.layer_idx for layer in student.model.layers] == [0, 1]

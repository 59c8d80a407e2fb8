"""Which units a student keeps, and what cannot be asked of a teacher."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_qep.errors import ArchitectureError, ConfigError, NonFiniteError
from hf_qep.students.family import family_of, layers_of, teacher_shape
from hf_qep.students.materialize import materialize
from hf_qep.students.spec import LayerSpec
from hf_qep.students.units import kept_units
from hf_qep.students.weight_scores import weight_scores
from tests.students.specs import mixed_spec, random_scores
from tests.students.teachers import FAMILIES, batch, outputs, teacher


@pytest.mark.parametrize("family", ["llama", "qwen3", "vit"])
def test_channels_that_were_silent_can_go_without_a_trace(family):
    model = teacher(family)
    silent = torch.arange(1, 64, 3)
    layout = family_of(model).layout
    with torch.no_grad():
        for _, layer in layers_of(model):
            for name in (layout.attention_out, layout.mlp_out):
                writer = layer.get_submodule(name)
                writer.weight[silent] = 0
                if writer.bias is not None:
                    writer.bias[silent] = 0
        if family == "vit":
            for parameter in (model.vit.embeddings.cls_token, model.vit.embeddings.position_embeddings):
                parameter[..., silent] = 0
                parameter -= parameter.mean(-1, keepdim=True) * (parameter != 0)
            projection = model.vit.embeddings.patch_embeddings.projection
            projection.weight[silent] = 0
            projection.bias[silent] = 0
        else:
            model.model.embed_tokens.weight[:, silent] = 0
    student = materialize(model, replace(teacher_shape(model).identity(), hidden_size=64 - len(silent)))
    ours, theirs = outputs(student, batch(family)), outputs(model, batch(family))
    if family == "vit":  # the mean over channels is taken over fewer too, so a norm with a mean is only close
        assert torch.corrcoef(torch.stack([ours, theirs]))[0, 1] > 0.8
    else:
        assert torch.allclose(ours, theirs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "detr"])
def test_a_narrower_student_runs_and_the_channels_are_the_best(family):
    model = teacher(family)
    shape = teacher_shape(model)
    scores = random_scores(shape, seed=4)
    student = materialize(model, replace(mixed_spec(shape), hidden_size=40), scores)
    assert outputs(student, batch(family)).isfinite().all()
    kept = scores.hidden.argsort(descending=True)[:40].sort().values
    name, layer = layers_of(student)[1]
    writer = layer.get_submodule(family_of(model).layout.mlp_out)
    source = layers_of(model)[mixed_spec(shape).layers[1].source][1].get_submodule(family_of(model).layout.mlp_out)
    units = kept_units(mixed_spec(shape), shape, scores).ffn[0][1]
    assert torch.equal(writer.weight, source.weight[kept][:, units])


def test_weight_scores_find_units_that_do_nothing():
    model = teacher("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, :10] = 0
        model.model.layers[1].self_attn.o_proj.weight[:, :16] = 0
    spec = teacher_shape(model).identity().with_layer(0, intermediate_size=86)
    kept = kept_units(spec, teacher_shape(model), weight_scores(model))
    assert kept.ffn[0][0].tolist() == list(range(10, 96))
    assert weight_scores(model).heads[0][1][0] == 0


def test_kept_heads_are_the_best_of_the_best_groups():
    model = teacher("llama")
    shape = teacher_shape(model)
    scores = replace(random_scores(shape), heads=(((torch.tensor([5.0, 1, 3, 4])),) * 2,))
    spec = shape.identity().with_layer(0, kv_heads=1, q_per_kv=1).with_layer(1, q_per_kv=1)
    kept = kept_units(spec, shape, scores)
    assert kept.heads[0][0].tolist() == [3]
    assert kept.kv_heads[0][0].tolist() == [1]
    assert kept.heads[0][1].tolist() == [0, 3]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"intermediate_size": 97}, "intermediate_size 97"),
        ({"kv_heads": 3}, "kv_heads 3"),
        ({"q_per_kv": 3}, "q_per_kv 3"),
        ({"source": 2}, "comes from layer 2"),
    ],
)
def test_more_than_the_teacher_has_is_refused(change, match):
    model = teacher("llama")
    spec = teacher_shape(model).identity()
    last = LayerSpec(**(spec.layers[1].to_dict() | change))
    with pytest.raises(ConfigError, match=match):
        materialize(model, replace(spec, layers=(spec.layers[0], last)))


def test_what_a_family_cannot_do_is_refused():
    detr, llama = teacher("detr"), teacher("llama")
    spec = teacher_shape(detr).identity()
    with pytest.raises(ConfigError, match="hidden_size of a detr student must be the teacher's 64"):
        materialize(detr, replace(spec, hidden_size=32))
    with pytest.raises(ConfigError, match='cannot have head "classifier"'):
        materialize(detr, replace(spec, head="classifier", num_labels=2))
    first = materialize(llama, teacher_shape(llama).identity().with_layer(0, skip={"mlp"}))
    with pytest.raises(ConfigError, match="layer 0 has mlp, and layer 0 of the teacher has none"):
        materialize(first, teacher_shape(llama).identity())
    scores = random_scores(teacher_shape(llama))
    scores.ffn[0][0][3] = float("nan")
    with pytest.raises(NonFiniteError):
        materialize(llama, teacher_shape(llama).identity().with_layer(0, intermediate_size=4), scores)
    llama.config.pad_token_id = llama.config.eos_token_id = None
    with pytest.raises(ConfigError, match="pad_token_id"):
        materialize(llama, replace(teacher_shape(llama).identity(), head="classifier", num_labels=2))


def test_models_that_are_not_known_are_refused():
    with pytest.raises(ArchitectureError, match="llama, qwen3, cohere2, bert, vit, clip_vision_model, detr"):
        family_of(teacher("gpt2"))
    with pytest.raises(ArchitectureError, match="families"):
        family_of(torch.nn.Linear(2, 2))
    strange = teacher("llama")
    strange.model.extra = torch.nn.Linear(3, 3)
    with pytest.raises(ArchitectureError, match=r"`extra\.weight` is none that a llama"):
        materialize(strange, teacher_shape(strange).identity())
    quantized = teacher("llama")
    quantized.config.quantization_config = {"quant_method": "qep"}
    with pytest.raises(ArchitectureError, match="is quantised"):
        family_of(quantized)

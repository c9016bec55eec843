"""What one model takes over from another: everything outside the experts that has its name and shape."""

from __future__ import annotations

import torch

from cl_moe.layers import MoE
from cl_moe.models.inherit import inherit


def test_a_dense_model_takes_the_trunk_and_leaves_the_experts(new_decoder):
    teacher, student = new_decoder("moe", num_blocks=3), new_decoder("dense", num_blocks=3)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(1.0)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    taken = inherit(student, teacher.state_dict())
    theirs, after = teacher.state_dict(), student.state_dict()
    for name, value in after.items():
        if name.startswith("blocks.1."):  # where the experts are
            assert name not in taken
            assert torch.equal(value, before[name])
        else:
            assert name in taken
            assert torch.equal(value, theirs[name])
    assert not torch.equal(after["head.cohorts.0.weight"], before["head.cohorts.0.weight"])


def test_expert_layers_of_equal_shape_keep_their_own(new_decoder):
    teacher, student = new_decoder("moe"), new_decoder("moe")
    (layer,) = student.expert_layers.values()
    assert isinstance(layer, MoE)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(1.0)
    before = layer.cohorts[0].w_in.clone()
    taken = inherit(student, teacher.state_dict())
    assert torch.equal(layer.cohorts[0].w_in, before)
    assert taken
    assert not any(name.startswith("blocks.1.") for name in taken)


def test_another_width_has_nothing_to_give(new_mlp):
    student = new_mlp("dense", width=8)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    assert inherit(student, new_mlp("dense", width=16).state_dict()) == []
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())

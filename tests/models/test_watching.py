"""What is seen of a model from outside: the head's input, the hidden units; and no trace of having looked."""

from __future__ import annotations

import pytest
import torch

from cl_moe.models.watching import POSITIONS, Seen, watched, watching
from cl_moe.plasticity import expected_points, plasticity_points


@pytest.mark.parametrize("layer", ["dense", "moe", "peer", "pkm"])
@torch.no_grad()
def test_the_heads_input_is_seen_and_nothing_changes(new_mlp, layer):
    model = new_mlp(layer, num_blocks=2).eval()
    model.head.grow([0, 1])
    x = torch.randn(7, 2, 4)
    before = model(x)[0]
    seen = Seen()
    with watching(model, seen):
        during = [model(part)[0] for part in (x[:3], x[3:])]
    assert [len(rows) for rows in seen.representations] == [3, 4]
    close = torch.cat([model(part)[0] for part in (x[:3], x[3:])])
    assert torch.equal(torch.cat(during), close)
    rebuilt = torch.nn.functional.linear(
        torch.cat(seen.representations).float(), *model.head.cohorts[0].parameters()
    )
    torch.testing.assert_close(rebuilt, before)
    model(x)
    assert len(seen.representations) == 2, "the hooks are gone"
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


@torch.no_grad()
def test_units_of_a_single_map_are_those_behind_it(new_mlp):
    model = new_mlp("dense", num_blocks=2).eval()
    x = torch.randn(5, 2, 4)
    seen = Seen()
    with watching(model, seen):
        model(x)
    first = torch.relu(model.blocks[0].linear_in(torch.relu(model.stem(x.flatten(1)))))
    torch.testing.assert_close(seen.activity[0].mean, first.double().mean(0))
    torch.testing.assert_close(seen.activity[1].mean, seen.representations[0].mean(0))  # the head reads them


@pytest.mark.parametrize(("layer", "slots"), [("dense", [0]), ("moe", [0]), ("peer", [0]), ("pkm", [])])
def test_which_slots_have_units(new_mlp, layer, slots):
    assert list(watched(new_mlp(layer))) == slots


@pytest.mark.parametrize("layer", ["dense", "moe", "peer", "pkm"])
@torch.no_grad()
def test_what_is_seen_has_the_keys_that_were_expected(new_mlp, layer):
    model = new_mlp(layer, num_blocks=2).eval()
    seen = Seen()
    with watching(model, seen):
        model(torch.randn(5, 2, 4))
    points = plasticity_points(seen)
    assert points.keys() == expected_points(model).keys()
    assert 1 <= points.pop("plasticity/effective_rank") <= 5
    assert all(0 <= value <= 1 for value in points.values())
    assert len(points) == (0 if layer == "pkm" else 6)


@torch.no_grad()
def test_of_a_text_a_few_real_positions_are_kept(new_decoder):
    model = new_decoder("moe", slots="all", depth=0.5, num_blocks=2, ffn_hidden=8).eval()
    tokens, mask = torch.randint(11, (3, 12)), torch.arange(12) < torch.tensor([[12], [7], [1]])
    seen = Seen()
    with watching(model, seen):
        model(tokens, mask=mask)
        model(tokens[:1])
    position = torch.arange(0, 12, 12 // POSITIONS)
    assert [len(rows) for rows in seen.representations] == [int(mask[:, position].sum()), POSITIONS]
    assert sorted(seen.activity) == [0, 1]
    assert seen.activity[0].reached[::8].sum() == 2 * (12 + 7 + 1 + 12), "two experts for every real token"


def test_a_broken_pass_leaves_no_hook(new_mlp):
    model = new_mlp("moe")
    with pytest.raises(RuntimeError), watching(model, Seen()):
        model(torch.randn(5, 3))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())

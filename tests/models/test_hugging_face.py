"""A body of Hugging Face transformers: built offline, causal, grown and frozen like our own."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cl_moe.errors import InputError
from cl_moe.layers import PEER, DenseFFN, ExpertChoice, MoE, TopK
from cl_moe.models.hugging_face import HuggingFaceLM
from cl_moe.seeds import seeded

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
FEW = partial(MoE, num_experts=4, hidden=32, router=partial(TopK, k=2), activation="gelu")
OWN = partial(DenseFFN, hidden=32)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="the extra `transformers` is not installed")

    def refuse(*args: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def new_model(layer=FEW, config: dict | None = None, **options: object) -> HuggingFaceLM:
    with seeded(0, "init"):
        return HuggingFaceLM((12,), 11, layer, config=SIZES | (config or {}), **options)


def tokens() -> Tensor:
    return torch.randint(11, (3, 8), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "family",
    [
        {},
        {"model_type": "llama"},
        {"model_type": "gpt2", "pattern": "h.*.mlp", "config": {"intermediate_size": None}},
    ],
    ids=["gpt_neox", "llama", "gpt2"],
)
@pytest.mark.parametrize("layer", [FEW, partial(PEER, num_experts=16, heads=2, k=2), OWN])
def test_families_and_layers(family: dict, layer) -> None:
    family = dict(family)
    if family.get("model_type") == "gpt2":
        config = {"n_embd": 16, "n_layer": 2, "n_head": 2}
        with seeded(0, "init"):
            model = HuggingFaceLM((12,), 11, layer, "gpt2", config, "h.*.mlp")
    else:
        model = new_model(layer, **family)
    logits, routings = model(tokens())
    assert logits.shape == (3, 8, 11)
    assert list(routings) == list(model.expert_layers) == ([] if layer is OWN else [0, 1])
    (logits.square().mean() + sum(sum(r.losses.values()) for r in routings.values())).backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None}
    assert idle == set()


def test_it_is_causal_and_drawn_by_its_seed():
    model, twin = new_model().eval(), new_model().eval()
    changed = tokens()
    changed[:, 5] = (changed[:, 5] + 1) % 11
    before, after = model(tokens())[0], model(changed)[0]
    torch.testing.assert_close(after[:, :5], before[:, :5])
    assert not torch.allclose(after[:, 5:], before[:, 5:])
    assert torch.equal(twin(tokens())[0], before)


def test_padding_reaches_no_expert():
    model = new_model().eval()
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[1, 4:] = False
    other = tokens()
    other[1, 4:] = 0
    (before, routings), (after, _) = model(tokens(), mask=mask), model(other, mask=mask)
    torch.testing.assert_close(after[mask], before[mask])
    assert all(torch.equal(r.valid, mask.flatten()) for r in routings.values())


def test_growth_freezing_and_old_cohorts():
    model = new_model().eval()
    old = {name: value.clone() for name, value in model.state_dict().items()}
    before = model(tokens())[0]
    for layer in model.expert_layers.values():
        layer.freeze()
        layer.grow(4)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in old.items())
    assert torch.equal(model(tokens(), cohorts=[0])[0], before)
    again = new_model().eval()
    for layer in again.expert_layers.values():
        layer.grow(4)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(tokens())[0], model(tokens())[0])


GPT2 = {"n_embd": 16, "n_inner": 32, "n_layer": 2, "n_head": 2}
PHI3 = SIZES | {"num_key_value_heads": 2, "pad_token_id": 0}
FAMILIES = {
    "gpt_neox": (("gpt_neox", SIZES), {"activation": "gelu"}),
    "llama": (("llama", SIZES), {"activation": "silu", "glu": True, "bias": False}),
    "phi3": (("phi3", PHI3), {"activation": "silu", "glu": True}),
    "gpt2": (("gpt2", GPT2, "h.*.mlp"), {"activation": "gelu_tanh"}),
}


@pytest.mark.parametrize(("family", "formula"), FAMILIES.values(), ids=FAMILIES)
def test_an_upcycled_body_computes_what_it_did(family, formula):
    models = []
    for layer in (OWN, partial(FEW, **formula)):
        with seeded(0, "init"):
            model = HuggingFaceLM((12,), 11, layer, *family, upcycle=layer is not OWN)
        models.append(model.double().eval())
    dense, sparse = models
    theirs = dict(dense.named_parameters())
    with torch.no_grad():  # the two drew different heads
        for name, parameter in sparse.named_parameters():
            if name in theirs:
                parameter.copy_(theirs[name])
    torch.testing.assert_close(sparse(tokens())[0], dense(tokens())[0], rtol=1e-9, atol=1e-9)


def test_a_gated_family_needs_gated_experts_and_says_so():
    with pytest.raises(InputError, match=r"a gated unit has three; .* layer\.glu=true"):
        new_model(model_type="llama", upcycle=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "lama"}, "model_type='lama'"),
        ({"model_type": "bert"}, "hears of the future"),
        ({"config": {"hiden_size": 8}}, "model.config.hiden_size"),
        ({"config": {"vocab_size": 300}}, "which is the stream's"),
        ({"config": {"auto_map": {"AutoModel": "theirs.Model"}}}, "model.config.auto_map"),
        ({"config": {"num_attention_heads": 3}}, "not divisible by the number of attention heads"),
        ({"pattern": "layer.*.mlp"}, r"layers\.\*\.mlp"),
    ],
)
def test_what_cannot_be_built_is_refused(options: dict, message: str):
    with pytest.raises(InputError, match=message):
        new_model(**options)


def test_a_family_without_a_causal_language_model_is_refused():
    with pytest.raises(InputError, match=r"t5 with .*\nallowed: .*causal language model"):
        HuggingFaceLM((12,), 11, FEW, "t5", {"d_model": 16})


def test_a_layer_that_sees_later_tokens_is_refused():
    with pytest.raises(InputError, match="MoE with ExpertChoice, which sees later tokens, in GPTNeoXModel"):
        new_model(partial(MoE, num_experts=4, router=ExpertChoice))


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"cl-moe\[transformers\]"):
        new_model()


def test_it_learns_grows_and_goes_on_through_the_command_line(command: Callable, tmp_path: Path):
    sizes = [f"model.config.{key}={value}" for key, value in SIZES.items()]
    words = ("model=hugging_face", "stream=text_domains", "stream.train_bytes=2000", "stream.test_bytes=500")
    words += ("stream.context=32", "layer=moe", "layer.hidden=32", "layer.activation=gelu", *sizes)
    words += ("model.upcycle=true", "growth=every_experience", "freeze=past_experts", "strategy=lwf")
    done = command(*words, "tracking=none", "output_dir=out")
    assert done.status == 0, done.text
    matrix = (tmp_path / "out/accuracy_matrix.csv").read_bytes()
    for last in (tmp_path / "out/checkpoints").glob("boundary_003-*"):
        last.unlink()
    done = command("resume=out")
    assert done.status == 0, done.text
    assert "resumed after experience 2 of 3" in done.text
    assert (tmp_path / "out/accuracy_matrix.csv").read_bytes() == matrix


def test_too_long_a_text_is_refused():
    with pytest.raises(InputError, match="13 tokens"):
        new_model()(torch.zeros(1, 13).long())

"""A causal language model of Hugging Face ``transformers`` as a body: built from a configuration, not loaded.

Legend: B batch, S positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cl_moe.errors import InputError
from cl_moe.layers.dense import DenseFFN
from cl_moe.layers.routing import Routing
from cl_moe.models.base import ContinualModel, Head
from cl_moe.models.foreign import ExpertSlot, collecting, put_experts
from cl_moe.models.slots import LayerFactory
from cl_moe.models.transformer import context_length


class HuggingFaceLM(ContinualModel):
    """The body of a ``transformers`` language model, with expert layers for its feed-forward ones; our head.

    Nothing is downloaded and no code of a stranger runs: the weights are drawn as the library draws them.
    The head is ours (cohorts of rows), so tied embeddings and scaled logits of some families are left out.
    Padding stands at the end of a sequence, where causal attention needs no mask; the mask goes to the expert
    layers.

    Args:
        input_shape: ``(S,)``, the context length.
        num_classes: V, the vocabulary size (256 for bytes).
        layer: factory of the layers, called with ``dim``; a dense one leaves the model's own in place.
        model_type: a name of the library's: ``gpt_neox``, ``llama``, ``gpt2``, ...
        config: keys of that family's configuration class.
        pattern: of the names of the feed-forward layers in the body: see ``put_experts``.
        upcycle: experts start as copies of the layer that they replace: see ``layers.upcycle``.

    Raises:
        InputError: the library is not installed, the family or a key of it is unknown, it is not causal, or
            the layers cannot be put in.
    """

    kind = "language"
    causal = True

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        layer: LayerFactory,
        model_type: str = "gpt_neox",
        config: Mapping[str, Any] | None = None,
        pattern: str = "layers.*.mlp",
        upcycle: bool = False,
    ) -> None:
        super().__init__()
        self.context = context_length(input_shape)
        self.body = build_body(model_type, num_classes, self.context, _plain(config or {}))
        _check_causal(self.body, num_classes, self.context)
        width = int(self.body.config.hidden_size)  # type: ignore[union-attr, arg-type]
        # Only a layer that was built says whether it is a dense one.
        if not isinstance(layer(dim=width), DenseFFN):
            put_experts(self.body, pattern, layer, upcycle=upcycle, causal=True)
        self.head = Head(width)
        self.head.grow(range(num_classes))

    @property
    def feed_forward(self) -> Sequence[nn.Module]:
        """The expert layers, in the order of the body's modules; none with ``layer=dense``."""
        return [slot.layer for slot in self._slots.values()]

    @property
    def _slots(self) -> dict[str, ExpertSlot]:
        return {part.name: part for part in self.body.modules() if isinstance(part, ExpertSlot)}

    def forward(
        self, inputs: Tensor, mask: Tensor | None = None, cohorts: Sequence[int] | None = None
    ) -> tuple[Tensor, dict[int, Routing]]:
        """Logits (B, S, V) of tokens (B, S), and the routings by place in ``feed_forward``."""
        if inputs.shape[1] > self.context:
            raise InputError(
                got=f"{inputs.shape[1]} tokens",
                allowed=f"at most {self.context}, the context",
                key="stream.context",
            )
        slots = list(self._slots)
        if not slots:
            return self.head(self.body(input_ids=inputs).last_hidden_state), {}
        with collecting(self.body, mask, cohorts) as seen:
            x_BSD = self.body(input_ids=inputs).last_hidden_state
        routings = {}
        for index, name in enumerate(slots):
            (routing,) = seen.routings[name]
            if routing.num_experts:
                routings[index] = routing
        return self.head(x_BSD), routings


def build_body(model_type: str, num_tokens: int, context: int, config: Mapping[str, Any]) -> nn.Module:
    """The body of a causal language model with weights drawn from torch's global generator.

    Args:
        model_type: of the library's families.
        num_tokens: V.
        context: positions, where the family has a table of them.
        config: further keys of its configuration. The special tokens are none, unless they are given.

    Raises:
        InputError: the library is missing, or does not know the family, a key or a combination.
    """
    try:
        import transformers
        from huggingface_hub.errors import StrictDataclassError
    except ModuleNotFoundError as error:
        raise InputError(
            got="model=hugging_face without the library transformers",
            allowed="pip install 'cl-moe[transformers]', or model=decoder",
            key="model",
        ) from error
    default, names = _family(transformers, model_type)
    ours: dict[str, Any] = {"vocab_size": num_tokens, "use_cache": False}
    for key in config:
        if key not in names or key in ours:
            raise InputError(
                got=f"config.{key}" + (", which is the stream's" if key in ours else f" of {default}"),
                allowed=", ".join(sorted(names - ours.keys())),
                key=f"model.config.{key}",
            )
    free = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    place = {"max_position_embeddings": context} if "max_position_embeddings" in names else {}
    try:
        whole = transformers.AutoConfig.for_model(model_type, **{**free, **place, **config, **ours})
        return transformers.AutoModelForCausalLM.from_config(whole).base_model
    except (ValueError, StrictDataclassError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise InputError(
            got=f"{model_type} with {dict(config)}: {reason}",
            allowed="a family and sizes of which transformers can build a causal language model",
            key="model.model_type (or model.config)",
        ) from error


def _family(transformers: Any, model_type: str) -> tuple[str, set[str]]:
    """Name of a family's configuration class, and the keys that it has."""
    try:
        default = transformers.AutoConfig.for_model(model_type)
    except ValueError as error:
        raise InputError(
            got=f"model_type={model_type!r}",
            allowed="a family of transformers, such as gpt_neox, llama, gpt2, opt",
            key="model.model_type",
        ) from error
    names = {name for name in (*default.to_dict(), *default.attribute_map) if not name.startswith("_")}
    return type(default).__name__, names


@torch.no_grad()
def _check_causal(body: nn.Module, num_classes: int, context: int) -> None:
    """Some families are causal only if their configuration says so: ask the model."""
    length = min(context, 4)
    tokens_BS = torch.arange(length).remainder(num_classes).unsqueeze(0)
    changed_BS = tokens_BS.clone()
    changed_BS[:, -1] = (changed_BS[:, -1] + 1) % num_classes
    body.eval()
    past, same = (body(input_ids=ids).last_hidden_state[:, :-1] for ids in (tokens_BS, changed_BS))
    body.train()
    if not torch.allclose(past, same, atol=1e-5):
        raise InputError(
            got=f"{type(body).__name__}, in which the past hears of the future",
            allowed="a causal language model (for some families config.is_decoder=true)",
            key="model.config.is_decoder (or model.model_type)",
        )


def _plain(value: Any) -> Any:
    """Dicts and lists of whatever a configuration is made of."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(one) for one in value]
    return value

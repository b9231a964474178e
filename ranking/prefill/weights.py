"""The weights of a LLaMA-family model as the lean loop reads them: plain matrices, fused where they lie side by side.

Llama, Mistral, Qwen2 and Qwen3 are one computation with a bias here and a norm there. What is read are views of the Hugging
Face parameters, so nothing is held twice; `ranking.prefill.joint` lays them side by side.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, MistralForCausalLM, PreTrainedModel, Qwen2ForCausalLM, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from index.errors import BrewlineError
from ranking.prefill.float8 import Float8, Float8Linear, Scaled
from ranking.prefill.int8 import Int8, Int8Linear, Int8Missing
from ranking.prefill.workspace import Workspace

FAMILY = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
BY_POSITION = frozenset(("default", "linear", "llama3", "yarn"))
"""Rotary scalings whose angle depends on the position alone."""
BY_LENGTH = frozenset(("dynamic", "longrope"))
"""Rotary scalings whose angles change once a text is longer than the original length; up to there they depend on the position."""


class UnsupportedModel(BrewlineError):
    """The model is not one that the layer loop computes correctly."""


class Product(Protocol):
    """y = x @ weight.T + bias, written where the caller says; `ready` makes rows what this kind of layer multiplies."""

    @property
    def weight(self) -> Tensor:
        """[outputs, inputs]."""

    @property
    def bias(self) -> Tensor | None:
        """[outputs]."""

    def ready(self, x: Tensor) -> Tensor | Scaled:
        """Rows for several layers of this kind that read them."""

    def into(self, x: Any, out: Tensor) -> None:
        """The product of plain or ready rows stands in `out` [rows, outputs]."""

    def onto(self, x: Any, out: Tensor) -> None:
        """The product of plain or ready rows is added to `out` [rows, outputs]."""


@dataclass(frozen=True, slots=True)
class Linear:
    """The product in the precision of weight and rows."""

    weight: Tensor
    bias: Tensor | None

    def ready(self, x: Tensor) -> Tensor:
        """The rows as they are."""
        return x

    def into(self, x: Tensor, out: Tensor) -> None:
        """The product stands in `out` [rows, outputs]."""
        if self.bias is None:
            torch.mm(x, self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, x, self.weight.t(), out=out)

    def onto(self, x: Tensor, out: Tensor) -> None:
        """The product is added to `out` [rows, outputs]."""
        torch.addmm(out, x, self.weight.t(), out=out)
        if self.bias is not None:
            out.add_(self.bias)


Joined = tuple[Product, ...]
"""Layers that read the same rows; one if their weights lie side by side, else one each."""


def into(layers: Joined, x: Tensor | Scaled, out: Tensor) -> None:
    """The products of all layers stand side by side in `out`."""
    column = 0
    for layer in layers:
        width = len(layer.weight)
        layer.into(x, out[:, column : column + width])
        column += width


@dataclass(frozen=True, slots=True)
class Block:
    """One decoder layer. `before` and `after` are the gains of its two norms; `q_gain`, `k_gain` those of Qwen3's heads."""

    before: Tensor
    after: Tensor
    qk: Joined
    q: Product
    k: Product
    v: Product
    q_gain: Tensor | None
    k_gain: Tensor | None
    o: Product
    gate_up: Joined
    down: Product


@dataclass(frozen=True)
class Weights:
    """Everything between token ids and the hidden state after the last norm. `rotary` gives cos and sin of positions."""

    embedding: Tensor
    blocks: tuple[Block, ...]
    norm: Tensor
    epsilon: float
    rotary: nn.Module
    heads: int
    kv_heads: int
    dims: int
    mlp: int

    @property
    def hidden(self) -> int:
        """The width of the residual stream."""
        return self.embedding.shape[1]

    @classmethod
    def of(cls, model: PreTrainedModel) -> Weights | None:
        """The weights of a family member, or None if a projection is wrapped (LoRA in training) and has no plain matrix.

        Raises UnsupportedModel.
        """
        check_family(model)
        config, body = model.config, model.model
        if not is_plain(model):
            return None
        space = Workspace()
        return cls(
            embedding=body.embed_tokens.weight.detach(),
            blocks=tuple(_block(layer, space) for layer in body.layers),
            norm=body.norm.weight.detach(),
            epsilon=config.rms_norm_eps,
            rotary=body.rotary_emb,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            dims=head_dims(model),
            mlp=config.intermediate_size,
        )


def check_family(model: PreTrainedModel) -> None:
    """Raises UnsupportedModel unless the layer loops compute exactly what this model computes."""
    if not isinstance(model, FAMILY):
        names = ", ".join(known.__name__ for known in FAMILY)
        raise UnsupportedModel(f"expected one of {names}, got {type(model).__name__}")
    config = model.config
    if (rope := config.rope_parameters["rope_type"]) not in BY_POSITION | BY_LENGTH:
        raise UnsupportedModel(f'unknown rotary scaling "{rope}"; known: {", ".join(sorted(BY_POSITION | BY_LENGTH))}')
    if config.hidden_act != "silu":
        raise UnsupportedModel(f'expected the activation "silu", got "{config.hidden_act}"')
    sliding = isinstance(model, MistralForCausalLM) and config.sliding_window is not None
    if isinstance(model, Qwen2ForCausalLM | Qwen3ForCausalLM):
        sliding = "sliding_attention" in config.layer_types
    if sliding and config.sliding_window < config.max_position_embeddings:
        raise UnsupportedModel(
            f"{type(model).__name__} looks back {config.sliding_window} tokens only but has {config.max_position_embeddings} "
            "positions, so an item would lose part of its prefix. Set sliding_window to null, or the positions to the window"
        )


def is_plain(model: PreTrainedModel) -> bool:
    """Whether every projection is a plain matrix or one in FP8 or int8, none wrapped."""
    halves = [half for layer in model.model.layers for half in (layer.self_attn, layer.mlp)]
    return all(
        type(part) in (nn.Linear, Float8Linear, Int8Linear)
        for half in halves
        for name, part in half.named_children()
        if name.endswith("_proj")
    )


def arithmetic_of(model: PreTrainedModel) -> str:
    """How the projections multiply, as `load_engine` spells it: "fp8", "int8", else the dtype of the embedding."""
    kind = type(model.model.layers[0].mlp.down_proj)
    small = {Float8Linear: "fp8", Int8Linear: "int8"}
    return small.get(kind, str(model.get_input_embeddings().weight.dtype).removeprefix("torch."))


def state_of(model: PreTrainedModel) -> tuple[tuple[int, int], ...]:
    """Changes whenever a parameter is replaced, moved or written to in place (not by a write through `.data`)."""
    return tuple((weight.data_ptr(), weight._version) for weight in model.parameters())


def longest_text(model: PreTrainedModel) -> int:
    """The positions that every token may use: all the model knows, or the original ones where more would change the angles."""
    rope = model.config.rope_parameters
    if rope["rope_type"] not in BY_LENGTH:
        return int(model.config.max_position_embeddings)
    return int(rope.get("original_max_position_embeddings") or model.config.max_position_embeddings)


def head_dims(model: PreTrainedModel) -> int:
    """The dimensions of one attention head."""
    return int(model.model.layers[0].self_attn.head_dim)


def _block(layer: Any, space: Workspace) -> Block:
    attention, mlp = layer.self_attn, layer.mlp
    qwen3 = isinstance(attention, Qwen3Attention)
    return Block(
        before=layer.input_layernorm.weight.detach(),
        after=layer.post_attention_layernorm.weight.detach(),
        qk=_joined(space, attention.q_proj, attention.k_proj),
        q=_linear(attention.q_proj, space),
        k=_linear(attention.k_proj, space),
        v=_linear(attention.v_proj, space),
        q_gain=attention.q_norm.weight.detach() if qwen3 else None,
        k_gain=attention.k_norm.weight.detach() if qwen3 else None,
        o=_linear(attention.o_proj, space),
        gate_up=_joined(space, mlp.gate_proj, mlp.up_proj),
        down=_linear(mlp.down_proj, space),
    )


def _linear(layer: Any, space: Workspace) -> Product:
    if isinstance(layer, Float8Linear):
        return layer.product
    if isinstance(layer, Int8Linear):
        if layer.scale.dtype != torch.float32 or layer.scale.device.type != "cpu":
            raise Int8Missing(
                f"an int8 model stays float32 on a CPU, got {layer.scale.dtype} on {layer.scale.device}; load it anew"
            )
        return layer.product(space)
    return Linear(layer.weight.detach(), None if layer.bias is None else layer.bias.detach())


def _joined(space: Workspace, *layers: nn.Module) -> Joined:
    parts = [_linear(layer, space) for layer in layers]
    weight = _over(part.weight for part in parts)
    biases = [part.bias for part in parts if part.bias is not None]
    bias = _over(biases) if biases else None
    if weight is None or (biases and bias is None):
        return tuple(parts)
    scales = [part.scale for part in parts if isinstance(part, Float8 | Int8)]
    if not scales:
        return (Linear(weight, bias),)
    scale = _over(scales)
    if scale is None:
        return tuple(parts)
    return (Float8(weight, scale, bias) if isinstance(parts[0], Float8) else Int8(weight, scale, bias, space),)


def _over(parts: Iterable[Tensor]) -> Tensor | None:
    """One view over tensors that follow each other in one storage, else None."""
    tensors = list(parts)
    first = tensors[0]
    place = first.storage_offset()
    for part in tensors:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() and part.is_contiguous()
        if not same or part.storage_offset() != place:
            return None
        place += part.numel()
    rows = sum(len(part) for part in tensors)
    return first.as_strided((rows, *first.shape[1:]), first.stride())

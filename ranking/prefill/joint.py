"""Weights that read the same rows lie side by side, as they are, in FP8 or in int8, for a model that only serves.

The module's parameters become views of the joint matrices: nothing is held twice, and the module's own forward still works.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ranking.prefill import float8, int8
from ranking.prefill.weights import UnsupportedModel, check_family, is_plain

TOGETHER = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""The projections of a layer, those that read the same rows together."""


def fuse(model: PreTrainedModel) -> None:
    """The weights that read the same rows lie side by side, and the model's parameters are views of the joint matrices.

    For a model that only serves: its optimizer, if it had one, would not know. Raises UnsupportedModel if LoRA wraps them.
    """
    _check_plain(model)
    for layer in model.model.layers:
        for names in TOGETHER:
            parts = [layer.get_submodule(name) for name in names]
            if len(parts) > 1:
                _move([part.weight for part in parts])
            if len(parts) > 1 and parts[0].bias is not None:
                _move([part.bias for part in parts])


def in_float8(model: PreTrainedModel) -> None:
    """The projections are FP8, weights that read the same rows side by side; the wide matrices are gone, one layer after another.

    Embeddings, norms and the answers' rows stay. Raises UnsupportedModel, and Float8Missing for another body than bfloat16,
    widths that are no multiples of 16, or a device without FP8 products.
    """
    _check_plain(model)
    float8.check_device(model.device)
    _replace(model, float8.check_layer, float8.scaled, lambda *part: float8.Float8Linear(float8.Float8(*part)))


def in_int8(model: PreTrainedModel) -> None:
    """The projections are int8, weights that read the same rows side by side; the wide matrices go, one layer after another.

    Embeddings, norms and the answers' rows stay. Raises UnsupportedModel, and Int8Missing for another body than float32, weights
    of one column, or a device without exact int8 products.
    """
    _check_plain(model)
    int8.check_device(model.device)
    _replace(model, int8.check_layer, int8.on_grid, int8.Int8Linear)


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of all parameters, scales included, shared ones once."""
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


def _replace(
    model: PreTrainedModel,
    check: Callable[[nn.Linear], None],
    coded: Callable[[Tensor], float8.Scaled],
    made: Callable[[Tensor, Tensor, Tensor | None], nn.Module],
) -> None:
    """Every projection gives way to what is `made` of its part of one joint weight, after `check` has seen all of them."""
    groups = [(layer, names) for layer in model.model.layers for names in TOGETHER]
    for layer, names in groups:
        for name in names:
            check(layer.get_submodule(name))
    for layer, names in groups:
        held = [layer.get_submodule(name) for name in names]
        biases = [part.bias.detach() for part in held if part.bias is not None]
        small, sizes = coded(torch.cat([part.weight.detach() for part in held])), [len(part.weight) for part in held]
        joint = torch.cat(biases).split(sizes) if biases else [None] * len(sizes)
        for name, *part in zip(names, small.values.split(sizes), small.scales.split(sizes), joint):
            layer.set_submodule(name, made(*part))


def _move(parameters: Sequence[nn.Parameter]) -> None:
    joint = torch.cat([parameter.detach() for parameter in parameters])
    for parameter, part in zip(parameters, joint.split([len(parameter) for parameter in parameters])):
        parameter.data = part


def _check_plain(model: PreTrainedModel) -> None:
    check_family(model)
    if not is_plain(model):
        raise UnsupportedModel("the projections are wrapped (LoRA); merge them into the weights first")

"""A trunk spread over processes (torch's FSDP): each holds its part of every weight, gradient and AdamW moment.

A layer is gathered when a pass comes to it and let go when the pass has left it, forward and backward, so a process holds one
layer whole at a time, never the model. That costs the weights' travel once per pass, not once per step. Gathering once per
step would keep all weights and, since their gradients must add up somewhere between passes, all gradients whole on every
process: what sharding is there to avoid. Longer passes (`forward_tokens`) make the travel cheap instead.

Gathering is a meeting of all processes: each must make the same passes in the same order. See `Trainer._vectors` for how
those that have fewer make up for it, and `Passes` for why each pass has a backward pass of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from retrieval.learn.checkpoint import TrainingError
from retrieval.learn.ranks import Ranks, whole

Read = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Shards:
    """How one trunk was spread. `skeleton` is its build without numbers, from which whole copies are made."""

    skeleton: PreTrainedModel

    @classmethod
    def of(cls, model: PreTrainedModel, device: str, *, bf16: bool) -> Shards:
        """Spreads a whole trunk, the same on all processes, in place over their devices, weight by weight.

        Weights stay float32 where they are kept. With `bf16` the layers gather and compute in bfloat16 and their gradients are
        summed in float32; the embeddings stay float32, since a frequent token's gradient is a sum over thousands of places.
        Raises TrainingError if this process is alone.
        """
        world = Ranks.here().world
        if world == 1:
            raise TrainingError(
                "the trunk is to be spread over processes (shard), and this process is alone; "
                "start several: torchrun --nproc-per-node N -m ranking.cli.main encoder train ..., or train without --shard"
            )
        skeleton = _skeleton(model)
        mesh = init_device_mesh(torch.device(device).type, (world,))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else MixedPrecisionPolicy()
        for layer in model.get_submodule("layers").children():
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model.get_input_embeddings(), mesh=mesh)
        fully_shard(model, mesh=mesh)
        for module in model.modules():
            if isinstance(module, FSDPModule):  # each process takes the gradient of its own rows: the whole is their sum, no mean
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        return cls(skeleton)

    def whole(self, model: PreTrainedModel, *, keep: bool = True) -> PreTrainedModel:
        """A whole copy of the spread trunk in the host's memory, gathered weight by weight; all processes must ask together.

        Without `keep` the process helps to gather and gets the skeleton.
        """
        gathered = ((name, whole(weight.detach())) for name, weight in model.named_parameters())
        kept = {name: weight.cpu() for name, weight in gathered if keep}
        if keep:
            copied = copy.deepcopy(self.skeleton)
            copied.load_state_dict(kept, assign=True)
            return copied
        return self.skeleton


@dataclass(frozen=True)
class Passes:
    """Forward passes whose backward passes are still to come, one by one.

    In a single backward pass autograd adds up a weight's gradients from all passes before it hands them on, whole, and they
    would be whole on every process. So the loss sees each pass's vectors cut off from what made them, and `back` then carries
    each pass's gradient on alone: it is summed into the parts before the next pass starts. With `cached` the pass forgets all but
    its vectors and is made again in `back` (GradCache).
    """

    cached: bool
    _open: list[tuple[Read, torch.Tensor]] = field(default_factory=list, init=False)

    def make(self, read: Read) -> torch.Tensor:
        """The vectors of one pass, a leaf of the loss's graph."""
        with torch.set_grad_enabled(not self.cached):
            made = read()
        leaf = made.detach().requires_grad_()
        self._open.append((read if self.cached else lambda: made, leaf))
        return leaf

    def back(self) -> None:
        """Carries the gradients that the loss left at the vectors into the weights; all passes are then done."""
        while self._open:
            again, leaf = self._open.pop()
            again().backward(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)


def _skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """The model's build with weights of the right shapes and no numbers."""
    empty: dict[int, nn.Parameter] = {}
    for weight in model.parameters():
        empty[id(weight)] = nn.Parameter(torch.empty_like(weight, device="meta"), weight.requires_grad)
    return copy.deepcopy(model, empty)

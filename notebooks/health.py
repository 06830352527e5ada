"""Instruments of notebook 3: how far the gradient reaches into the chain (E13), and peak memory."""

import weakref

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def chain_gradient(policy, obs, action, omega, advantage):
    """E13 measured: the norms of dL/dx_k for k = K ... 0, L = -mean(log pi A), and the clipped fraction of x_0.

    Arguments as in ncdpo.ppo_loss, omega its `latent`. Rising from left to right the gradient vanishes on its way to
    the first denoising steps, falling it explodes.
    """
    xs = policy.chain(obs, omega.clone().requires_grad_())
    loss = -(policy.head.log_prob(xs[-1], action) * advantage).mean()
    norms = [gradient.norm().item() for gradient in torch.autograd.grad(loss, xs)]
    return np.array(norms), (xs[-1].abs() >= policy.schedule.clip).float().mean().item()


class PeakMemory(TorchDispatchMode):
    """Bytes of the tensors that are made inside the block: alive `now`, and at `most`.

    It sees every operation of torch, adds the storage of each new tensor, and subtracts it when the storage dies.
    """

    def __init__(self):
        super().__init__()
        self.now, self.most, self.alive = 0, 0, set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        inputs = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and id(storage) not in inputs | self.alive:
                self.alive.add(id(storage))
                self.now += storage.nbytes()
                weakref.finalize(storage, self.died, id(storage), storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def died(self, name, size):
        self.alive.discard(name)
        self.now -= size

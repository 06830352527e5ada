"""How far the gradient reaches into the chain (E13): its norm at each denoising step, for notebook 3."""

import numpy as np
import torch


def chain_gradient(policy, obs, action, omega, advantage):
    """E13 measured: the norms of dL/dx_k for k = K ... 0, L = -mean(log pi A), and the clipped fraction of x_0.

    Arguments as in ncdpo.ppo_loss, omega its `latent`. Rising from left to right the gradient vanishes on its way to
    the first denoising steps, falling it explodes.
    """
    xs = policy.chain(obs, omega.clone().requires_grad_())
    loss = -(policy.head.log_prob(xs[-1], action) * advantage).mean()
    norms = [gradient.norm().item() for gradient in torch.autograd.grad(loss, xs)]
    return np.array(norms), (xs[-1].abs() >= policy.schedule.clip).float().mean().item()

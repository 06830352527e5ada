"""What the columns of a run's chain tell: its gradient (E13) and its noise (E17), measured once an update.

ncdpo.py takes this file where it is; alone it trains as well and leaves those columns of metrics.csv empty.
"""

from __future__ import annotations

import numpy as np
import torch


def measure(policy, batch: dict, rows: int = 128) -> dict[str, float]:
    """The columns sigma, chain_std, chain_gradient_ratio and chain_clipped that a policy has, on part of a batch."""
    every = max(1, len(batch["obs"]) // rows)  # from all of the rollout, not its first step alone
    row, few = {}, [batch[name][::every][:rows] for name in ("obs", "action", "latent", "advantage")]
    if policy.K and not hasattr(policy, "M"):  # NCDPO
        norms, row["chain_clipped"] = chain_gradient(policy, *few)
        row["chain_gradient_ratio"] = norms[1] / max(norms[-1], 1e-30)
    if hasattr(policy.head, "log_std"):  # Box actions
        row["sigma"] = policy.head.log_std.exp().mean().item()
        if policy.K:
            row["chain_std"] = chain_std(policy, few[0])
    return row


def chain_gradient(policy, obs, action, omega, advantage) -> tuple[np.ndarray, float]:
    """E13 measured: the norms of dL/dx_k for k = K ... 0, L = -mean(log pi A), and the clipped fraction of x_0.

    Arguments as in ncdpo.ppo_loss. Rising from left to right the gradient vanishes on its way to the first denoising
    steps, falling it explodes.
    """
    xs = policy.chain(obs, omega.clone().requires_grad_())
    loss = -(policy.head.log_prob(xs[-1], action) * advantage).mean()
    norms = [g.norm().item() for g in torch.autograd.grad(loss, xs)]
    return np.array(norms), (xs[-1].abs() >= policy.schedule.clip).float().mean().item()


@torch.no_grad()
def chain_std(policy, obs) -> float:
    """Standard deviation of the action over the chain's noise (std_chain of E17), from two draws at each obs (B, S)."""
    devices = [] if obs.device.type == "cpu" else [obs.device]
    with torch.random.fork_rng(devices, device_type=obs.device.type):  # to measure must not change the run
        one, other = (policy.sample(obs, deterministic=True)[0] for _ in range(2))
    return ((one - other).square().mean() / 2).sqrt().item()

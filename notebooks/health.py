"""Instruments: how far the gradient reaches into the chain (E13), peak memory, and whether a cheetah has tipped over.

    python notebooks/health.py runs/HalfCheetah-v4__dppo__202    # why did its return fall?
"""

import contextlib
import sys
import weakref
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ncdpo  # noqa: E402


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


@torch.no_grad()
def tipped(run, episodes=32):
    """Returns (episodes,) of a HalfCheetah run as it explores; share of decisions that leave its torso past 60 degrees.

    On its back or on its head the cheetah earns nothing and cannot rise, and its episode goes on to the limit.
    """
    config, agent, _ = ncdpo.load_agent(run)
    if not config.env.startswith("HalfCheetah"):
        raise ncdpo.UserError(f"{run} is a run of {config.env}, but only HalfCheetah can lie on its back")
    env = ncdpo.VectorEnv(config.env, episodes, torch.device("cpu"), chunk=config.action_chunk)
    total, steps, over = torch.zeros(3, episodes)
    with contextlib.closing(env):
        torch.manual_seed(config.seed)
        obs, ended = env.reset(1_000_003 + config.seed), torch.zeros(episodes, dtype=torch.bool)
        while not ended.all():  # all end together, but for one that diverges
            action = agent.act(obs, *agent.policy.draw_noise(episodes))[0]
            obs, reward, terminated, truncated, final_obs = env.step(action)
            total += reward.nansum(1).where(~ended, 0)
            steps += ~ended
            over += (torch.cos(final_obs[:, 1]) < 0.5) & ~ended
            ended |= terminated | truncated
    return total.numpy(), (over / steps).numpy()


if __name__ == "__main__":
    for run in sys.argv[1:]:
        try:
            total, over = tipped(run)
        except ncdpo.UserError as error:
            sys.exit(f"health: {error}.")
        lying = over > 0.5
        means = [f"{name} {total[which].mean():.0f}" for name, which in (("tipped over", lying), ("upright", ~lying))
                 if which.any()]
        print(f"{run}: {lying.sum()} of {len(lying)} episodes are spent tipped over; mean return {', '.join(means)}")

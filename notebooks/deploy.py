"""A saved run's policy as a torch module of its own: raw observations to actions of the task.

    from notebooks.deploy import load_policy
    policy = load_policy("runs/HalfCheetah-v4__ncdpo__1")
    action = policy(obs)                            # of one observation or a batch, float64; of a clone a chunk (4, A)
    torch.export.export(policy, (obs,))             # the normaliser, the chain and the chunk are inside
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ncdpo  # noqa: E402

WAYS = "exploring", "mean action", "zero noise"


class LoadedPolicy(nn.Module):
    """Raw observations (S,) or (B, S) to actions of the task: NumPy to NumPy, torch to torch. load_policy makes it.

    S counts all numbers of an observation, whatever its shape; (1, S) is taken for a batch, which obs.ravel() is not.
    Of a game with critic=joint it is all agents': an agent's own first, as games.py tells.
    """

    def __init__(self, agent, bounds, chunk, way):
        super().__init__()
        self.agent, self.bounds, self.chunk, self.way = agent.requires_grad_(False), bounds, chunk, way

    def forward(self, obs):
        policy, S = self.agent.policy, len(self.agent.obs_norm.mean)
        rows = torch.as_tensor(obs).double()  # a bool cannot be normalised
        batched = obs.ndim > 1 and math.prod(obs.shape[1:]) == S
        rows = rows.flatten(1) if batched else rows.reshape(1, S)
        B, K, A = rows.shape[0], policy.K, policy.act_dim  # shape, as len would fix torch.export's B
        omega, noise = torch.zeros(B, K, A), torch.zeros(B, A)
        if self.way != "zero noise":
            omega, drawn = policy.draw_noise(B)
            noise = drawn if self.way == "exploring" else noise
        action = ncdpo.to_task(self.agent.act(rows, omega, noise)[0], **self.bounds)
        if self.chunk > 1:
            action = action.unflatten(-1, (self.chunk, -1))
        action = action if batched else action[0]
        return action.numpy() if isinstance(obs, np.ndarray) else action


def load_policy(run, way="zero noise"):
    """A saved run's policy on the CPU, as a module without gradients; `way` as in ncdpo.evaluate. Raises UserError.

    A Box action is (A,), or of a chunk (H, A), to be played in a row; a Discrete one (). With a batch: (B, ...). It has
    64 bits: action.astype(env.action_space.dtype) is what a task that looks at the type wants.
    """
    if way not in WAYS:
        raise ncdpo.UserError(f"way must be one of {', '.join(WAYS)}, and is {way!r}")
    config, agent, state = ncdpo.load_agent(run)
    return LoadedPolicy(agent, state["bounds"], config.action_chunk, way)

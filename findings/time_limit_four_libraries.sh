#!/usr/bin/env bash
# One time limit, the same rewards and values: four PPO libraries compute three different advantages.
#
# Packages   stable-baselines3 2.9.2, torchrl 0.14.1, skrl 2.1.1, rsl-rl-lib 5.5.1, torch 2.13.0, gymnasium 1.4.0.
# Expected   At a time limit all bootstrap with the value of the state that was reached, and cut the trace there.
# Happens    An episode of values 1 2 3 reaches a state of value 10 at its limit; the next one has 4 5 6 and goes on at
#            7. Rewards are 1, gamma 0.9, lambda 0.8. Stable-Baselines3 and TorchRL do what one expects. skrl does not
#            see the limit at all while time_limit_bootstrap is False, its default: it bootstraps with the NEXT
#            episode's first value and adds that episode's advantages. rsl_rl cuts, but bootstraps with the value of
#            the state BEFORE the last action: that action's advantage is r + (gamma - 1) V(s), whatever came of it.
# Output     Stable-Baselines3    6.653   6.740   7.000   3.182   2.336   1.300
#            TorchRL              6.653   6.740   7.000   3.182   2.336   1.300
#            skrl, default        5.041   4.502   3.891   3.182   2.336   1.300
#            rsl_rl               3.387   2.204   0.700   3.182   2.336   1.300
# Why        Curves of "PPO" on tasks whose every episode ends by a limit (HalfCheetah) are not of one algorithm. And a
#            fine-tuned clone that survives to the limit is told different things about surviving.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install -q --no-compile torch==2.13.0 numpy==2.4.6 gymnasium==1.4.0 stable-baselines3==2.9.2 \
    torchrl==0.14.1 skrl==2.1.1 rsl-rl-lib==5.5.1
OMP_NUM_THREADS=1 venv/bin/python -W ignore - 2>stderr <<'EOF' || { tail -3 stderr; exit 1; }
import sys

import gymnasium as gym
import numpy as np
import torch
from rsl_rl.algorithms import PPO as RslPPO
from rsl_rl.models import MLPModel
from rsl_rl.storage import RolloutStorage
from skrl.agents.torch.ppo.ppo import compute_gae
from stable_baselines3 import PPO
from tensordict import TensorDict
from torchrl.objectives.value.functional import generalized_advantage_estimate

GAMMA, LAMBDA = 0.9, 0.8
value, limit = torch.arange(1.0, 7.0)[:, None], torch.arange(6)[:, None] == 2
next_value = torch.tensor([2.0, 3, 10, 5, 6, 7])[:, None]
reward, never = torch.ones(6, 1), torch.zeros(6, 1, dtype=torch.bool)


class Task(gym.Env):
    """Its observation is its value: 1 2 3 and then 10 at the limit, then 4 5 6 7 ..."""
    observation_space, action_space, t = gym.spaces.Box(-99, 99, (1,)), gym.spaces.Box(-1, 1, (1,)), 1

    def reset(self, seed=None, options=None):
        return np.float32([self.t]), {}

    def step(self, action):
        self.t += 1
        return np.float32([10 if self.t == 4 else self.t]), 1.0, False, self.t == 4, {}


class Identity(MLPModel):
    def forward(self, obs, *_, **__):
        return obs["policy"]


ppo = PPO("MlpPolicy", Task(), n_steps=6, batch_size=6, gamma=GAMMA, gae_lambda=LAMBDA, policy_kwargs={"net_arch": []})
torch.nn.init.ones_(ppo.policy.value_net.weight)
ppo.policy.value_net.bias.data.zero_()
ppo.learn(6)
advantage = {"Stable-Baselines3": torch.from_numpy(ppo.rollout_buffer.advantages)}
advantage["TorchRL"] = generalized_advantage_estimate(GAMMA, LAMBDA, value, next_value, reward, limit, never)[0]
returns, _ = compute_gae(rewards=reward, terminated=never, truncated=limit, values=value, last_values=next_value[-1:],
                         discount_factor=GAMMA, lambda_coefficient=LAMBDA)
advantage["skrl, default"] = returns - value
obs = [TensorDict({"policy": torch.tensor([[float(v)]])}, [1]) for v in range(1, 8)]
groups, head = {"actor": ["policy"], "critic": ["policy"]}, {"class_name": "GaussianDistribution", "init_std": 1.0}
storage = RolloutStorage("rl", 1, 6, obs[0], [1])
actor, critic = MLPModel(obs[0], groups, "actor", 1, distribution_cfg=head), Identity(obs[0], groups, "critic", 1)
rsl = RslPPO(actor, critic, storage, gamma=GAMMA, lam=LAMBDA)
for t in range(6):
    rsl.act(obs[t])
    rsl.process_env_step(obs[t + 1], torch.ones(1), limit[t], {"time_outs": limit[t].float()})
rsl.compute_returns(obs[6])
advantage["rsl_rl"] = storage.returns - storage.values
seen = {"Stable-Baselines3": (6.6528, 6.74, 7), "TorchRL": (6.6528, 6.74, 7), "skrl, default": (5.0411, 4.5015, 3.891),
        "rsl_rl": (3.38688, 2.204, 0.7)}
for name, numbers in advantage.items():
    print(f"{name:18}" + "".join(f"{x:8.3f}" for x in numbers.flatten().tolist()))
    if not np.allclose(numbers.flatten(), (*seen[name], 3.18192, 2.336, 1.3), atol=1e-3):
        sys.exit(f"CHANGED: the advantages of {name} are otherwise than {seen[name]}")
EOF

#!/usr/bin/env bash
# A coordinate that stood still and now reads 0.001 more: five normalisers make of it 5.6, 5.6, 0.07, 0.10 and 0.10.
#
# Packages   gymnasium 1.4.0, stable-baselines3 2.9.2, skrl 2.1.1, rsl-rl-lib 5.5.1, torchrl 0.14.1, torch 2.13.0.
# Expected   Five running normalisers fed the same 5,000 observations agree, within a per cent.
# Happens    They agree on a coordinate of standard deviation 1. Where it is 0.001, one deviation is 0.97 for Gymnasium
#            and Stable-Baselines3 and 0.07 to 0.10 for the others: rsl_rl adds 0.01 to the deviation, skrl starts from
#            one imagined observation of variance 1, TorchRL's VecNorm has no deviation below 0.01. A coordinate that
#            never moved (0.3 throughout) and now reads 0.301 differs up to 78-fold: Gymnasium and Stable-Baselines3
#            start from 1e-4 of an observation, so that the deviation is 1.8e-4 there.
# Output     one deviation of 1; the constant 0.3 read as 0.301; one deviation of 0.001
#            Gymnasium             1.009   5.611   0.968
#            Stable-Baselines3     1.009   5.608   0.968
#            skrl                  1.004   0.072   0.069
#            rsl_rl                0.999   0.100   0.089
#            TorchRL               1.009   0.100   0.098
# Why        Demonstrations are full of coordinates that stood still (a gripper, an object not yet touched, a goal).
#            Fine-tuning moves them for the first time: one normaliser makes of a millimetre a state no clone has ever
#            seen, the other hides it. Statistics cannot be moved from one library to the other by mean and variance.
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
from rsl_rl.modules import EmpiricalNormalization
from skrl.resources.preprocessors.torch import RunningStandardScaler
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from tensordict import TensorDict
from torchrl.envs.transforms import VecNorm

random = np.random.default_rng(0)
data = np.float32([random.normal(0, 1, 5000), np.full(5000, 0.3), random.normal(0, 1e-3, 5000)]).T
probe = np.float32([[1.0, 0.301, 0.001]])
batches = [torch.from_numpy(part) for part in np.split(data, 50)]


class Replay(gym.Env):
    """An environment that shows the rows of `data`, and then those of `probe`."""
    observation_space, action_space = gym.spaces.Box(-np.inf, np.inf, (3,)), gym.spaces.Box(-1, 1, (1,))

    def reset(self, seed=None, options=None):
        self.rows = iter([*data, *probe])
        return next(self.rows), {}

    def step(self, action):
        return next(self.rows), 0.0, False, False, {}


seen = {}
env = gym.wrappers.NormalizeObservation(Replay())
env.reset()
for _ in range(4999):
    env.step(None)
env.update_running_mean = False
seen["Gymnasium"] = env.step(None)[0]
vector = VecNormalize(DummyVecEnv([Replay]))
vector.reset()
for _ in range(4999):
    vector.step([None])
seen["Stable-Baselines3"] = vector.normalize_obs(probe)[0]
scaler, empirical, vecnorm = RunningStandardScaler(3, device="cpu"), EmpiricalNormalization(3), VecNorm(["observation"])
for batch in batches:
    scaler(batch, train=True)
    empirical.update(batch)
    vecnorm(TensorDict({"observation": batch}, [100]))
seen["skrl"] = scaler(torch.from_numpy(probe))[0].numpy()
seen["rsl_rl"] = empirical(torch.from_numpy(probe))[0].numpy()
vecnorm.freeze()
seen["TorchRL"] = vecnorm(TensorDict({"observation": torch.from_numpy(probe)}, [1]))["observation"][0].numpy()
print("one deviation of 1; the constant 0.3 read as 0.301; one deviation of 0.001")
for name, numbers in seen.items():
    print(f"{name:18}" + "".join(f"{x:8.3f}" for x in numbers))
    large = name in ("Gymnasium", "Stable-Baselines3")
    if abs(numbers[0] - 1) > 0.02 or (numbers[1:] > 0.5).tolist() != [large, large]:
        sys.exit(f"CHANGED: {name} now normalises {probe[0]} to {numbers}")
EOF

#!/usr/bin/env bash
# Gymnasium's MuJoCo tasks charge for the action as it was given; MuJoCo moves the robot by the clipped one.
#
# Packages   gymnasium 1.4.0, mujoco 3.14.0.
# Expected   MuJoCo clips controls to their range, so for a Gaussian policy it makes no difference whether the caller
#            clips, too.
# Happens    The physics is the same to the last bit, the reward is not: the control cost takes the raw action (in
#            Humanoid the raw data.ctrl, which MuJoCo leaves as it was written and clips as it uses it). Nothing warns.
# Output     reward lost per 1,000 steps by actions that were not clipped, sigma = the bound; the physics is equal
#            HalfCheetah-v5    281.7
#            Ant-v5           1904.4
#            Hopper-v5           1.4
#            Walker2d-v5         2.8
#            Humanoid-v5       131.5
# Why        PPO's policies start at sigma = 1. The returns of two programs, of which one clips before the environment
#            and the other does not, differ by this; the second pays for its entropy, the first does not.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install -q --no-compile "gymnasium[mujoco]==1.4.0" mujoco==3.14.0 numpy==2.4.6
venv/bin/python -W ignore - 2>stderr <<'EOF' || { tail -3 stderr; exit 1; }
import sys

import gymnasium as gym
import numpy as np

print("reward lost per 1,000 steps by actions that were not clipped, sigma = the bound; the physics is equal")
for name in ("HalfCheetah-v5", "Ant-v5", "Hopper-v5", "Walker2d-v5", "Humanoid-v5"):
    raw, clipped = gym.make(name), gym.make(name)
    space, random, lost, equal = raw.action_space, np.random.default_rng(0), 0.0, True
    for t in range(500):
        if t % 10 == 0:  # before any of them falls
            raw.reset(seed=t)
            clipped.reset(seed=t)
        action = random.normal(0, space.high.max(), space.shape)
        reward = raw.step(action)[1]
        lost += clipped.step(np.clip(action, space.low, space.high))[1] - reward
        equal &= np.array_equal(raw.unwrapped.data.qvel, clipped.unwrapped.data.qvel)
    print(f"{name:16}{1000 * lost / 500:7.1f}")
    if not equal or lost <= 0:
        sys.exit(f"CHANGED: {name}: physics equal {equal}, reward lost {lost}")
EOF

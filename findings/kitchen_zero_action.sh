#!/usr/bin/env bash
# Franka Kitchen: the zero action does not hold the arm, it lets it sink by half a radian and more.
#
# Packages   gymnasium-robotics 1.4.2, mujoco 3.10.0, gymnasium 1.4.0.
# Expected   Actions are joint velocities, scaled to [-1, 1], tracked by position servos: at zero the arm stays.
# Happens    The target of the servos is the joint position that was MEASURED last plus velocity times time. At zero
#            velocity it is wherever gravity has let the joint sink to, step after step: 0.13 radians in ten steps.
# Output     joint angles after 280 zero actions, minus those at the start:
#            [-0.05  0.    1.06  0.77 -0.02  0.33 -0.2 ]
# Why        An untrained chain that predicts the clean action proposes nearly the zero action, and a deployed policy is
#            often stopped by it. Here both move the robot. In demonstrations a pose that is held is an action that
#            works against gravity, so frames that idle cannot be told by the norm of their action.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install -q --no-compile gymnasium-robotics==1.4.2 mujoco==3.10.0 gymnasium==1.4.0 numpy==2.4.6
MUJOCO_GL=disabled venv/bin/python -W ignore - 2>stderr <<'EOF' || { tail -3 stderr; exit 1; }
import sys

import gymnasium as gym
import gymnasium_robotics
import numpy as np

gym.register_envs(gymnasium_robotics)
env = gym.make("FrankaKitchen-v1", tasks_to_complete=["kettle"], robot_noise_ratio=0.0, object_noise_ratio=0.0)
env.reset(seed=0)
start = env.unwrapped.data.qpos[:7].copy()
for _ in range(280):
    env.step(np.zeros(9))
sunk = env.unwrapped.data.qpos[:7] - start
print("joint angles after 280 zero actions, minus those at the start:")
print(sunk.round(2))
if np.abs(sunk).max() < 0.5:
    sys.exit(f"CHANGED: the zero action now holds Kitchen's arm within {np.abs(sunk).max():.2f} rad")
EOF

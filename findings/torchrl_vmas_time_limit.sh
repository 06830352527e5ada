#!/usr/bin/env bash
# TorchRL's VmasEnv tells VMAS's time limit as a termination: its value targets bootstrap with zero there.
#
# Packages   torchrl 0.14.1, vmas 1.5.2, torch 2.13.0.
# Expected   TorchRL keeps "terminated" and "truncated" apart, and VMAS can (terminated_truncated=True): with
#            max_steps=5 the fifth step is truncated, and GAE bootstraps with the next value.
# Happens    The wrapper has no "truncated" entry at all. The limit arrives as done and terminated, so that TorchRL's
#            GAE takes the value after the last step for 0. VmasEnv(..., terminated_truncated=True) raises an error.
# Output     entries: ['done', 'terminated']; terminated_truncated=True: ValueError
#            step 5 of max_steps=5, by time alone: done True, terminated True
#            one-step value targets, rewards 0, critic 1, gamma 0.9: [0.9, 0.9, 0.9, 0.9, 0.0]
# Why        Many episodes of VMAS end by their limit alone (a match without a goal, a goal not reached). The critic is
#            taught that the world ends at a moment that no agent can see. Comparisons of libraries on VMAS carry that.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install -q --no-compile torch==2.13.0 numpy==2.4.6 torchrl==0.14.1 vmas==1.5.2
OMP_NUM_THREADS=1 venv/bin/python -W ignore - 2>stderr <<'EOF' || { tail -3 stderr; exit 1; }
import sys

import torch
from torchrl.envs import VmasEnv
from torchrl.objectives.value.functional import generalized_advantage_estimate

env = VmasEnv("navigation", num_envs=2, max_steps=5, seed=0)
after = env.rollout(5, break_when_any_done=False)["next"]
entries = sorted(key for key in after.keys() if key in ("done", "terminated", "truncated"))
done, terminated = after["done"], after["terminated"]
one = torch.ones_like(done, dtype=torch.float32)
_, target = generalized_advantage_estimate(0.9, 0.0, one, one, 0 * one, done, terminated)
target = [round(x, 3) for x in target[0].flatten().tolist()]
try:
    VmasEnv("navigation", num_envs=2, max_steps=5, seed=0, terminated_truncated=True).rollout(1)
    told = "taken"
except ValueError:
    told = "ValueError"
print(f"entries: {entries}; terminated_truncated=True: {told}")
print(f"step 5 of max_steps=5, by time alone: done {bool(done[:, 4].all())}, terminated {bool(terminated[:, 4].all())}")
print("one-step value targets, rewards 0, critic 1, gamma 0.9:", target)
if entries != ["done", "terminated"] or not terminated[:, 4].all() or terminated[:, :4].any() or target[4] != 0 \
        or told == "taken":
    sys.exit("CHANGED: VmasEnv now tells a time limit otherwise than as a termination")
EOF

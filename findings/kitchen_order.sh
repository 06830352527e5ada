#!/usr/bin/env bash
# Franka Kitchen: the 75 numbers of an observation come in one order from the environment, in another from Minari.
#
# Packages   gymnasium-robotics 1.4.2, mujoco 3.10.0, gymnasium 1.4.0, minari 0.5.4 (extras create, hdf5).
# Expected   A Dict observation has one order of its entries: concatenating its values gives the same vector live, from
#            the recorded dataset and from gymnasium.spaces.flatten.
# Happens    The environment returns observation, achieved_goal, desired_goal, and the tasks in the order in which they
#            were asked for. Its space is sorted by name, goals first and kettle before microwave; Minari stores and
#            returns that order. The lengths are equal, so nothing complains.
#            An episode that was cut by reset() alone is besides recorded as truncated.
# Output     live:     observation (59), achieved_goal (microwave, kettle), desired_goal (microwave, kettle)
#            dataset:  achieved_goal (kettle, microwave), desired_goal (kettle, microwave), observation (59)
#            concatenated: 75 and 75 numbers, equal False, equal when sorted True; flatten is as the dataset True
#            episode cut by reset() after 7 of 280 steps: truncated True
# Why        A policy cloned from the dataset and played on concatenated live observations sees joints where its goals
#            were: it fails without an error. And a value function bootstraps at an end that was none of the task's.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install -q --no-compile gymnasium-robotics==1.4.2 mujoco==3.10.0 gymnasium==1.4.0 \
    "minari[create,hdf5]==0.5.4" numpy==2.4.6
export MUJOCO_GL=disabled MINARI_DATASETS_PATH="$dir"
venv/bin/python -W ignore - 2>stderr <<'EOF' || { tail -3 stderr; exit 1; }
import sys

import gymnasium as gym
import gymnasium_robotics
import minari
import numpy as np

gym.register_envs(gymnasium_robotics)
env = minari.DataCollector(gym.make("FrankaKitchen-v1", tasks_to_complete=["microwave", "kettle"]))
live = [env.reset(seed=0)[0]]
for _ in range(7):
    live.append(env.step(env.action_space.sample())[0])
env.reset()
dataset = env.create_dataset("kitchen-v0", algorithm_name="random", author="nobody", author_email="nobody@example.com",
                             code_permalink="https://example.com")
episode = next(dataset.iterate_episodes())


def describe(obs):
    parts = {name: ", ".join(part) if isinstance(part, dict) else part.shape[-1] for name, part in obs.items()}
    return ", ".join(f"{name} ({part})" for name, part in parts.items())


def concatenate(obs):
    return np.concatenate([concatenate(part) if isinstance(part, dict) else part for part in obs.values()])


def at(tree, t):
    return {name: at(part, t) if isinstance(part, dict) else part[t] for name, part in tree.items()}


one, other = concatenate(live[7]), concatenate(at(episode.observations, 7))
flat = gym.spaces.flatten(env.observation_space, live[7])
equal, sorted_equal = np.array_equal(one, other), np.array_equal(np.sort(one), np.sort(other))
print("live:    ", describe(live[7]))
print("dataset: ", describe(episode.observations))
print(f"concatenated: {len(one)} and {len(other)} numbers, equal {equal}, equal when sorted {sorted_equal};",
      f"flatten is as the dataset {np.array_equal(flat, other)}")
print(f"episode cut by reset() after {len(episode.rewards)} of 280 steps: truncated {episode.truncations[-1]}")
if equal or not sorted_equal or not np.array_equal(flat, other) or not episode.truncations[-1]:
    sys.exit("CHANGED: the order of Kitchen's observations, live or from Minari, or the end of a cut episode")
EOF

#!/usr/bin/env bash
# Gymnasium 1.3.0: RecordEpisodeStatistics of vectors, under SAME_STEP, loses a step of each episode but the first.
#
# Packages   gymnasium 1.3.0 (numpy 2.4.6); gymnasium 1.4.0 is right.
# Expected   The wrapper from which PPO scripts read their learning curves knows the autoreset modes of its own
#            package: an episode of three rewards of 1 has return 3 and length 3.
# Happens    In the mode in which no transition is wasted (SAME_STEP) the first step of each later episode is taken for
#            the reset step of the default mode (NEXT_STEP) and left out: its reward and its length.
# Output     1.3.0: returns and lengths of four episodes: [3.0, 2.0, 2.0, 2.0] [3, 2, 2, 2]
#            1.4.0: returns and lengths of four episodes: [3.0, 3.0, 3.0, 3.0] [3, 3, 3, 3]
# Why        With action chunks an episode is a few decisions long, and one of them is missing from its return. Curves
#            that were logged with 1.3.0 and with 1.4.0 are not comparable.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
for version in 1.3.0 1.4.0; do
    venv/bin/pip install -q --no-compile gymnasium==$version numpy==2.4.6
    venv/bin/python -W ignore - <<'EOF'
import sys

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics


class ThreeSteps(gym.Env):
    observation_space, action_space = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Box(-1, 1, (1,))

    def reset(self, seed=None, options=None):
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.zeros(1, np.float32), 1.0, False, self.t == 3, {}


envs = RecordEpisodeStatistics(SyncVectorEnv([ThreeSteps], autoreset_mode=AutoresetMode.SAME_STEP))
envs.reset(seed=0)
episodes = [info["episode"] for *_, info in (envs.step(np.zeros((1, 1))) for _ in range(12)) if "episode" in info]
returns, lengths = [[float(e["r"][0]) for e in episodes], [int(e["l"][0]) for e in episodes]]
print(f"{gym.__version__}: returns and lengths of four episodes: {returns} {lengths}")
if lengths != ([3, 2, 2, 2] if gym.__version__ == "1.3.0" else [3, 3, 3, 3]) or returns != lengths:
    sys.exit(f"CHANGED: {gym.__version__} reports {returns}, {lengths}")
EOF
done

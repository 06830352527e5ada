#!/usr/bin/env bash
# robosuite: GymWrapper.reset(seed=...) does not seed the environment.
#
# Packages   robosuite 1.5.2, MuJoCo 3.3.7, gymnasium 1.4.0, numpy 1.26.4.
# Expected   As Gymnasium's interface has it: reset(seed=0) twice gives the same first observation, and another seed
#            gives another one.
# Happens    The wrapper hands the seed to NumPy's global generator. robosuite's tasks draw from a generator of their
#            own that only the constructor's seed= sets, so that reset(seed=0) goes on with whatever comes next. What it
#            does do is reseed np.random for the whole process: the caller's own draws repeat after each reset.
#            A seed given to the constructor works: two environments then reset alike, again and again.
# Output     position of the cube after reset(seed=0), twice: equal False
#            np.random.rand() after each of the two: equal True
#            two environments made with seed=0, three resets without a seed: equal [True, True, True]
# Why        "Evaluated on seeds 0 to 49" means nothing through this wrapper, and a comparison of two policies on "the
#            same" starts is none. Exploration noise that is drawn by NumPy repeats itself in every episode.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install -q --no-compile robosuite==1.5.2 mujoco==3.3.7 gymnasium==1.4.0 numpy==1.26.4 h5py==3.16.0
MUJOCO_GL=disabled venv/bin/python -W ignore - 2>stderr <<'EOF' || { tail -3 stderr; exit 1; }
import sys

import numpy as np
import robosuite
from robosuite.wrappers import GymWrapper


def lift(**arguments):
    return GymWrapper(robosuite.make("Lift", robots="Panda", has_renderer=False, has_offscreen_renderer=False,
                                     use_camera_obs=False, use_object_obs=True, **arguments))


def cube(env, **arguments):
    """Where the cube lies after a reset: the first three numbers of the state of the object."""
    return env.reset(**arguments)[0][:3]


env, starts, draws = lift(), [], []
for _ in range(2):
    starts.append(cube(env, seed=0))
    draws.append(np.random.rand())
one, other = lift(seed=0), lift(seed=0)
alike = [np.array_equal(cube(one), cube(other)) for _ in range(3)]
seeded = np.array_equal(*starts)
print(f"position of the cube after reset(seed=0), twice: equal {seeded}")
print(f"np.random.rand() after each of the two: equal {draws[0] == draws[1]}")
print(f"two environments made with seed=0, three resets without a seed: equal {alike}")
if seeded or draws[0] != draws[1] or not all(alike):
    sys.exit("CHANGED: robosuite's reset(seed=...) now seeds the task, or the constructor's seed no longer does")
EOF

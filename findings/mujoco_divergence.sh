#!/usr/bin/env bash
# A simulation that diverges comes back at rest in C MuJoCo and in mujoco.batch, and stays diverged in MuJoCo Warp.
#
# Packages   mujoco 4.0.0 (MjData, mujoco.batch), mujoco-warp 4.0.0 on a CPU.
# Expected   A state that blew up is infinite, NaN or huge after the step, so that a check of qpos finds it; or
#            mujoco.batch raises its SimulationError, or says so in `status`.
# Happens    The C engine puts a diverged simulation back to its default state in the middle of the call: qpos0, time 0,
#            and the controls set to 0. With the usual 4 or 5 substeps an action, what one reads afterwards is small;
#            until then it grows, but a check against the engine's own limit, 1e10, never fires. mujoco.batch does not
#            raise and its `status` stays 0; only its `warning` counts it. Warp resets nothing.
# Output     action  batch: qpos      time  ctrl  status  warnings   Warp: qpos
#            1             13.26      0.10   0.1  0       0               13.26
#            2          -1004.80      0.20   0.1  0       0               -1005
#            3          76704.55      0.30   0.1  0       0            7.67e+04
#            4              0.00      0.04   0.0  0       1          -5.855e+06
#            5              0.00      0.14   0.0  0       1           4.469e+08
# Why        In reinforcement learning the robot is teleported to its start in the middle of an episode, the reward
#            takes the jump for speed, and nothing ends; with Warp the same code meets a huge state or NaN. Set
#            mjDSBL_AUTORESET and look at the state, or read `warning`.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install -q --no-compile mujoco==4.0.0 mujoco-warp==4.0.0 numpy==2.4.6
OMP_NUM_THREADS=1 venv/bin/python -W ignore - 2>stderr <<'EOF' || { tail -3 stderr; exit 1; }
import sys

import mujoco
import mujoco_warp
import numpy as np
import warp
from mujoco.batch import Batch

warp.config.log_level = warp.LOG_WARNING
model = mujoco.MjModel.from_xml_string("""
<mujoco>
  <option timestep="0.02" integrator="Euler"/>
  <worldbody><body><joint name="x" type="slide" axis="1 0 0"/><geom size="0.1" mass="1"/></body></worldbody>
  <actuator><position joint="x" kp="12000"/></actuator>  <!-- a servo that is too stiff for the time step -->
</mujoco>""")
batch, data = Batch(model, 1, 1), mujoco.MjData(model)
batch.ctrl[:] = data.ctrl[:] = 0.1
alike, largest = True, 0.0
print("action  batch: qpos      time  ctrl  status  warnings   Warp: qpos")
with warp.ScopedDevice("cpu"):
    warp_model, warp_data = mujoco_warp.put_model(model), mujoco_warp.make_data(model, 1)
    warp_data.ctrl.assign(np.full((1, 1), 0.1, np.float32))
    for action in range(1, 6):
        batch.step(nstep=5)
        mujoco.mj_step(model, data, nstep=5)
        for _ in range(5):
            mujoco_warp.step(warp_model, warp_data)
        on_warp, warned = float(warp_data.qpos.numpy()[0, 0]), int(batch.warning[0, :, 1].sum())
        alike &= bool(batch.qpos[0, 0] == data.qpos[0] and batch.ctrl[0, 0] == data.ctrl[0])
        largest = max(largest, float(np.abs(np.r_[batch.qpos[0], batch.qvel[0]]).max()))
        print(f"{action:<8}{batch.qpos[0, 0]:11.2f}{batch.time[0]:10.2f}{batch.ctrl[0, 0]:6.1f}  {batch.status[0]:<8}"
              f"{warned:<9}{on_warp:12.4g}")
at_rest = batch.qpos[0, 0] == 0 and batch.ctrl[0, 0] == 0 and batch.time[0] < 0.2 and largest < 1e10
if not (at_rest and alike and warned > 0 and batch.status[0] == 0 and abs(on_warp) > 1e8):
    sys.exit("CHANGED: what C MuJoCo, mujoco.batch or MuJoCo Warp do with a state that diverged")
EOF

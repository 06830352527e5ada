#!/usr/bin/env bash
# diffusers' schedulers asked for n of K steps do not start at the noisy end: 11 of 20 start at timestep 10 of 0..19.
#
# Packages   diffusers 0.42.1 (DDPMScheduler, DDIMScheduler), torch 2.13.0.
# Expected   set_timesteps(n) spaces n steps evenly over the K, from pure noise to clean.
# Happens    The default spacing "leading" takes multiples of the whole number K // n, from 0 up. The noisiest step is
#            (n - 1) (K // n): 90 of 0..99 for 10 of 100 steps, but 12 of 0..19 for 7 of 20, and 59 for 60 of 100. The
#            chain starts from N(0, I) where the network was trained on 0.58 x_0 + noise, without an error.
#            "trailing" and "linspace" start at the last step.
# Output     K    n     leading starts at  sqrt(abar) there   trailing  sqrt(abar)
#            100  10    90                 0.140              99        0.000
#            100  60    59                 0.584              99        0.000
#            20   7     12                 0.519              19        0.002
#            20   11    10                 0.645              19        0.002
#            5    3     2                  0.584              4         0.010
# Why        Diffusion policies are cloned with K = 20 to 100 steps and fine-tuned with fewer, for PPO pays for each.
#            A clone that acts badly with 60 of its 100 steps may be fine: it was started in the middle.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install -q --no-compile torch==2.13.0 numpy==2.4.6 diffusers==0.42.1
OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'EOF'
import sys

from diffusers import DDIMScheduler, DDPMScheduler


def start(kind, steps, n, **spacing):
    """The first timestep of a chain of n of `steps` steps, and how much of x_0 a trained network expects there."""
    scheduler = kind(num_train_timesteps=steps, beta_schedule="squaredcos_cap_v2", **spacing)
    scheduler.set_timesteps(n)
    first = int(scheduler.timesteps[0])
    return first, float(scheduler.alphas_cumprod[first].sqrt())


print("K    n     leading starts at  sqrt(abar) there   trailing  sqrt(abar)")
for steps, n, expected in ((100, 10, 90), (100, 60, 59), (20, 7, 12), (20, 11, 10), (5, 3, 2)):
    for kind in (DDPMScheduler, DDIMScheduler):
        first, signal = start(kind, steps, n)
        last, none = start(kind, steps, n, timestep_spacing="trailing")
        even, _ = start(kind, steps, n, timestep_spacing="linspace")
        if (first, last, even) != (expected, steps - 1, steps - 1) or not (signal > 0.13 and none < 0.02):
            sys.exit(f"CHANGED: {kind.__name__} now starts {n} of {steps} steps at {first}, {last} and {even}")
    print(f"{steps:<4} {n:<5} {first:<18} {signal:<18.3f} {last:<9} {none:.3f}")
EOF

#!/usr/bin/env bash
# diffusers' DDIM step at eta = 1 is not its DDPM step as soon as the clean estimate is clipped, which is the default.
#
# Packages   diffusers 0.42.1 (DDPMScheduler, DDIMScheduler), torch 2.13.0.
# Expected   DDIM at eta = 1 is DDPM: same coefficients, same variance, so the same x_{k-1} from the same noise.
# Happens    Both clip the clean estimate to [-1, 1] (clip_sample=True). DDPM then takes the posterior mean of the
#            clipped one. DDIM puts it beside an eps that still belongs to the unclipped one, unless step() is told
#            use_clipped_model_output=True: its x_{k-1} then mixes two clean estimates. This holds for all of
#            "epsilon", "sample" and "v_prediction"; with nothing to clip the two agree.
# Output     root mean square of DDPM - DDIM, output of the network 0.8 N(0, I)
#            prediction     t = 4   t = 3   t = 2   t = 1   use_clipped_model_output, worst   nothing to clip, worst
#            epsilon        0.037   0.389   0.262   0.091   0.0000                            0.0000
#            sample         0.000   0.028   0.051   0.045   0.0000                            0.0000
#            v_prediction   0.000   0.030   0.056   0.039   0.0000                            0.0000
# Why        The locomotion policies of this field live at the bounds, where the clip is active at every step. A chain
#            cloned or fine-tuned with one of the two and deployed with the other is another policy, by 0.4 of an
#            action's half range in a single step.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install -q --no-compile torch==2.13.0 numpy==2.4.6 diffusers==0.42.1
OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'EOF'
import sys

import torch
from diffusers import DDIMScheduler, DDPMScheduler

K, ROWS = 5, 4096


def difference(prediction, scale, **how):
    """Root mean square of x_{k-1} by DDPM minus that by DDIM at eta = 1, same noise, for t = 4 ... 1."""
    ddpm, ddim = [kind(num_train_timesteps=K, beta_schedule="squaredcos_cap_v2", prediction_type=prediction)
                  for kind in (DDPMScheduler, DDIMScheduler)]
    ddpm.set_timesteps(K)
    ddim.set_timesteps(K)
    found = []
    torch.manual_seed(0)
    for t in range(K - 1, 0, -1):
        signal, noise = ddpm.alphas_cumprod[t].sqrt(), (1 - ddpm.alphas_cumprod[t]).sqrt()
        x = signal * scale * torch.rand(ROWS, 2).sub(0.5) + noise * torch.randn(ROWS, 2)
        output = 0.8 * torch.randn(ROWS, 2)
        if scale < 1:  # a network that is right, with clean actions well inside the bounds
            clean = scale * torch.rand(ROWS, 2).sub(0.5)
            eps = (x - signal * clean) / noise
            output = {"sample": clean, "epsilon": eps, "v_prediction": signal * eps - noise * clean}[prediction]
        torch.manual_seed(t)
        by_ddpm = ddpm.step(output, t, x).prev_sample
        torch.manual_seed(t)
        by_ddim = ddim.step(output, t, x, eta=1.0, variance_noise=torch.randn(ROWS, 2), **how).prev_sample
        found.append(float((by_ddpm - by_ddim).square().mean().sqrt()))
    return found


print("prediction     t = 4   t = 3   t = 2   t = 1   use_clipped_model_output, worst   nothing to clip, worst")
for prediction in ("epsilon", "sample", "v_prediction"):
    plain = difference(prediction, 2.0)
    told = max(difference(prediction, 2.0, use_clipped_model_output=True))
    inside = max(difference(prediction, 0.5))
    print(f"{prediction:14}" + "".join(f"{x:6.3f}  " for x in plain) + f" {told:.4f}{'':28}{inside:.4f}")
    if max(plain) < 0.003 or told > 1e-5 or inside > 1e-4:
        sys.exit(f"CHANGED: DDIM at eta = 1 against DDPM with {prediction}: {plain}, {told}, {inside}")
EOF

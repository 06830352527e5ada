#!/usr/bin/env bash
# "An exponential moving average with decay 0.999" is three different averages in three libraries.
#
# Packages   torch 2.13.0 (AveragedModel), diffusers 0.42.1 (EMAModel), ema-pytorch 0.8.3 (EMA), and the textbook.
# Expected   After T updates each lags a weight that grows by 1 per update by nearly the same number of updates: that
#            of the recursion average = 0.999 average + 0.001 weight, started at the first weight.
# Happens    torch is the textbook, but its buffers are the live model's. diffusers warms its decay up as
#            (1 + T) / (10 + T) although use_ema_warmup is False: it lags T / 10 until T is about 9,000. ema-pytorch
#            copies the weights for 100 updates and then averages every 10th time alone, with a decay that ramps up to
#            0.999 as 1 - (T - 99)^(-2/3): in the end it lags by 10,000. It averages the buffers too.
# Output     lag in updates after       100    1000    3000   10000
#            textbook                  94.2   631.3   949.3   999.0
#            torch                     94.2   631.3   949.3   998.8
#            diffusers                 10.0   100.0   300.0   962.7
#            ema-pytorch                9.0   498.6  1301.8  3400.5
#            torch, a buffer            0.0     0.0     0.0     0.0
#            ema-pytorch, a buffer      9.0   498.6  1301.8  3400.5
# Why        Diffusion policies are cloned with such an average, and papers give its decay alone. A short cloning of
#            1,000 updates ends with the last 100 updates (diffusers) or with the whole run (torch). Running statistics
#            of observations kept as buffers are averaged by one library and not by the other.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install -q --no-compile torch==2.13.0 numpy==2.4.6 diffusers==0.42.1 ema-pytorch==0.8.3
OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'EOF'
import sys

import torch
from diffusers.training_utils import EMAModel
from ema_pytorch import EMA
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

DECAY, TIMES = 0.999, (100, 1000, 3000, 10000)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.register_buffer("statistic", torch.zeros(1))


model = Model()
of_torch = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
of_diffusers = EMAModel(model.parameters(), decay=DECAY)
of_ema_pytorch = EMA(model, beta=DECAY)
lag = {}
for t in range(1, TIMES[-1] + 1):
    with torch.no_grad():
        model.weight.fill_(t)
        model.statistic.fill_(t)
    of_torch.update_parameters(model)
    of_diffusers.step(model.parameters())
    of_ema_pytorch.update()
    textbook = DECAY * textbook + (1 - DECAY) * t if t > 1 else 1.0
    if t in TIMES:
        averages = {"textbook": textbook, "torch": of_torch.module.weight, "diffusers": of_diffusers.shadow_params[0],
                    "ema-pytorch": of_ema_pytorch.ema_model.weight, "torch, a buffer": of_torch.module.statistic,
                    "ema-pytorch, a buffer": of_ema_pytorch.ema_model.statistic}
        for name, average in averages.items():
            lag.setdefault(name, []).append(t - float(average))
print(f"{'lag in updates after':22}" + "".join(f"{t:8}" for t in TIMES))
for name, lags in lag.items():
    print(f"{name:22}" + "".join(f"{x:8.1f}" for x in lags))
seen = {"textbook": (94.2, 631.3, 949.3, 999.0), "torch": (94.2, 631.3, 949.3, 998.8), "torch, a buffer": (0,) * 4,
        "diffusers": (10, 100, 300, 962.7), "ema-pytorch": (9, 498.6, 1301.8, 3400.5),
        "ema-pytorch, a buffer": (9, 498.6, 1301.8, 3400.5)}
for name, lags in seen.items():
    if any(abs(a - b) > 0.01 * b + 0.1 for a, b in zip(lag[name], lags)):
        sys.exit(f"CHANGED: the moving average of {name} lags otherwise than {lags}")
EOF

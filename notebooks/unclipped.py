"""ncdpo.py, but the last step of a chain is not clipped to [-x_max, x_max]: f(s, omega) may leave it, as an MLP's mean.

    python notebooks/unclipped.py --env Hopper-v4 --seed 311      # and other flags of ncdpo.py

A clip passes no gradient. Where it cuts x0hat of the last step (E3), the mean stands still, and only the other
coordinates and sigma go on learning. TUNING.md has what comes of it. Whatever else loads such a run must import this
file first, and set ncdpo.Schedule as main does.
"""

import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ncdpo  # noqa: E402


class Unclipped(ncdpo.Schedule):
    """A Schedule whose clean estimate has no bounds at the step k = 1."""

    def clean(self, output, x, k):
        clip, self.clip = self.clip, math.inf
        free = super().clean(output, x, k)
        self.clip = clip
        last = torch.as_tensor(k == 1, device=x.device)[..., None]
        return free.where(last, free.clamp(-clip, clip))


def main(arguments=None):
    ncdpo.Schedule = Unclipped
    return ncdpo.main(arguments)


if __name__ == "__main__":
    sys.exit(main())

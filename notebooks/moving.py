"""ncdpo.py, but --init-from lets the statistics of observations go on moving, as a run from scratch does.

    python notebooks/moving.py --init-from runs/clones/Hopper-v4__ncdpo__1      # and other flags of ncdpo.py

The clone's inputs then drift away from those that it was taught with. TUNING.md has what comes of it. A run that was
stopped is resumed by this file, too.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ncdpo  # noqa: E402


class Moving(ncdpo.Trainer):
    """A Trainer whose agent's statistics take in every rollout."""

    def make_batch(self, rollout):
        batch = super().make_batch(rollout)
        if self.config.init_from:
            self.agent.obs_norm.update(rollout["obs"].flatten(0, 1))
        return batch


def main(arguments=None):
    ncdpo.Trainer = Moving
    return ncdpo.main(arguments)


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env bash
# ONNX Runtime 1.31.1 draws the noise of an exported denoising chain from streams that overlap between seeds.
#
# Packages   torch 2.13.0, onnx 1.23.2, onnxscript 0.7.2, onnxruntime 1.31.1, on a CPU.
# Expected   A chain exported with its torch.randn inside draws independent noise at each step; two seeds of
#            onnxruntime.set_seed share nothing; two sessions that nobody seeded differ.
# Happens    The exporter writes no seed, and ONNX Runtime then seeds each random node with (global seed + the position
#            of the node in the file), of a generator of its own. So seed s at the node in position p draws the very
#            numbers that seed s + 1 draws at position p - 1: neighbouring seeds share x_K and z_K, and seeds 9 apart
#            share three steps of this chain of 5. Two sessions of one process without a seed draw the same noise.
# Output     positions of the random nodes: [3, 4, 13, 22, 31]
#            seeds 0 and 1 share (step of the first, step of the second): [(1, 0)]
#            seeds 0 and 9 share (step of the first, step of the second): [(2, 1), (3, 2), (4, 3)]
#            two sessions without a seed, three calls, same noise: [True, True, True]
# Why        An evaluation of a diffusion policy over "seeds 0 to 9", or over several robots served by one process, has
#            fewer independent samples than it says. Give omega to the exported policy as an input instead.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install -q --no-compile torch==2.13.0 numpy==2.4.6 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.31.1
OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'EOF'
import contextlib
import io
import logging
import sys

import numpy as np
import onnx
import onnxruntime
import torch

logging.disable(logging.WARNING)


class Chain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(4, 2)

    def forward(self, obs):
        x = torch.randn(obs.shape[0], 2)
        noise = [x]
        for _ in range(4):
            noise.append(torch.randn_like(x))
            x = 0.5 * x + 0.5 * self.net(torch.cat([x, obs], 1)).clamp(-1, 1) + 0.3 * noise[-1]
        return x, torch.stack(noise)


def draw(session):
    """The noise of the five steps (5, 2) for one observation."""
    return session.run(None, {"obs": np.zeros((1, 2), np.float32)})[1][:, 0]


def seeded(seed):
    onnxruntime.set_seed(seed)
    return draw(onnxruntime.InferenceSession("chain.onnx"))


with contextlib.redirect_stdout(io.StringIO()):
    torch.onnx.export(Chain(), (torch.zeros(2, 2),), "chain.onnx", dynamic_shapes=({0: "batch"},))
nodes = [(i, node) for i, node in enumerate(onnx.load("chain.onnx").graph.node) if "Random" in node.op_type]
one, other = [onnxruntime.InferenceSession("chain.onnx") for _ in range(2)]
repeats = [np.array_equal(draw(one), draw(other)) for _ in range(3)]
shared = {}
for second in (1, 9):
    first_noise, second_noise = seeded(0), seeded(second)
    shared[second] = [(i, j) for i in range(5) for j in range(5) if np.array_equal(first_noise[i], second_noise[j])]
positions = [i for i, _ in nodes]
print("positions of the random nodes:", positions)
for second, pairs in shared.items():
    print(f"seeds 0 and {second} share (step of the first, step of the second):", pairs)
print("two sessions without a seed, three calls, same noise:", repeats)
if (any(a.name == "seed" for _, node in nodes for a in node.attribute) or not all(repeats)
        or shared != {s: [(i, i - 1) for i in range(1, 5) if positions[i] - positions[i - 1] == s] for s in (1, 9)}):
    sys.exit("CHANGED: ONNX Runtime no longer seeds a random node with the global seed plus the node's position")
EOF

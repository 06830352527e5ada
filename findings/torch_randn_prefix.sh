#!/usr/bin/env bash
# torch.randn on a CPU: the first rows of a larger draw are not the smaller draw, and 8 numbers are no part of 64.
#
# Packages   torch 2.13.0, on a CPU.
# Expected   With the same seed torch.randn(n) is the beginning of torch.randn(m), m > n, as torch.rand is and as
#            NumPy's generators are: the noise of environment 0 does not depend on how many environments there are.
# Happens    Fewer than 16 numbers are drawn one by one, by another formula than 16 and more: the two share nothing.
#            From 16 on, when the count is no multiple of 16, the LAST 16 numbers are drawn anew, over what was there.
#            A draw into memory that is not contiguous goes one by one as well, whatever its size.
# Output     of randn(n), numbers equal to the beginning of randn(64):
#            n = 8: 0   n = 15: 0   n = 16: 16   n = 17: 1   n = 20: 4   n = 31: 15   n = 32: 32   n = 33: 17
#            of the noise (N, K = 5, A = 6) of N environments, rows equal to those of N + 1:
#            N = 2: 1   N = 3: 2   N = 4: 3   N = 5: 4   N = 8: 8
#            randn(6, 4) and a transposed (4, 6) filled by normal_(): equal False;  rand(20) and rand(64): equal True
# Why        A policy that draws its chain's noise for a batch of N plays other episodes for the same seed when N
#            changes by one: "the first 10 of 20 episodes" are not "the 10 episodes". A test that compares a batch with
#            its rows one at a time (8 numbers each, say) must be handed the noise.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install -q --no-compile torch==2.13.0 numpy==2.4.6
OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'EOF'
import sys

import torch


def draw(*shape, by=torch.randn):
    torch.manual_seed(0)
    return by(*shape)


whole = draw(64)
shared = {n: int((draw(n) == whole[:n]).sum()) for n in (8, 15, 16, 17, 20, 31, 32, 33)}
rows = {n: int((draw(n, 5, 6) == draw(n + 1, 5, 6)[:n]).all(-1).all(-1).sum()) for n in (2, 3, 4, 5, 8)}
torch.manual_seed(0)
transposed = torch.equal(torch.empty(6, 4).T.normal_().T, draw(6, 4))  # in the order of memory
uniform = torch.equal(draw(20, by=torch.rand), draw(64, by=torch.rand)[:20])
print("of randn(n), numbers equal to the beginning of randn(64):")
print("   ".join(f"n = {n}: {k}" for n, k in shared.items()))
print("of the noise (N, K = 5, A = 6) of N environments, rows equal to those of N + 1:")
print("   ".join(f"N = {n}: {k}" for n, k in rows.items()))
print(f"randn(6, 4) and a transposed (4, 6) filled by normal_(): equal {transposed};",
      f" rand(20) and rand(64): equal {uniform}")
blocks = {n: 0 if n < 16 else n if n % 16 == 0 else n - 16 for n in shared}  # all but the last 16
if shared != blocks or rows != {2: 1, 3: 2, 4: 3, 5: 4, 8: 8} or transposed or not uniform:
    sys.exit(f"CHANGED: torch.randn now shares {shared}, rows {rows}, transposed {transposed}, rand {uniform}")
EOF

"""The problem of notebooks 2 and 8 that can be solved exactly: one observation, one action, and a demonstrator who goes
left or right. With K = 2 all integrals over the chain's noise are sums over a grid, in double precision."""

import torch

from ncdpo import NCDPO, Gaussian

OMEGA = torch.cartesian_prod(torch.linspace(-4.5, 4.5, 31), torch.linspace(-4.5, 4.5, 91)).double()  # (x_2, z_2)
WEIGHT = torch.softmax(-0.5 * OMEGA.square().sum(1), 0)  # N(omega; 0, I) on the grid, normalised
ACTIONS = torch.linspace(-2, 2, 301).double()
WIDTH = (ACTIONS[1] - ACTIONS[0]).item()  # of a cell of ACTIONS


def demonstrations(n):
    """Actions (n, 1) of a demonstrator who goes left (-0.8) or right (+0.8), each half of the time."""
    side = torch.where(torch.rand(n, 1) < 0.5, -1.0, 1.0)
    return 0.8 * side + 0.05 * torch.randn(n, 1)


def clone(policy, steps=300, demonstrations=demonstrations):
    """Behaviour cloning (E2) of demonstrations(n), in place."""
    optimizer = torch.optim.Adam(policy.denoiser.parameters(), lr=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = policy.bc_loss(torch.ones(256, 1), demonstrations(256))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return policy


def small(K, kind=NCDPO, **more):
    """A policy of one observation and one action, with the final sigma at 0.1."""
    return kind(1, 1, steps=K, hidden=32, head=Gaussian(1, std=0.1), **more)


def same_weights(policy, kind=NCDPO, **changes):
    """A policy with the weights of `policy` and some settings changed."""
    other = small(policy.K, kind, predict=policy.schedule.predict, **changes)
    other.load_state_dict(policy.state_dict())
    return other


def bump(a):
    """Reward: the best action is 0.5, between the centre and the right-hand mode."""
    return torch.exp(-(a - 0.5) ** 2 / 0.5)


def two_sided(a):
    """Reward: 1 at -0.6 and at +0.6, falling off within about 0.3."""
    return torch.exp(-((a.abs() - 0.6) / 0.2) ** 2 / 2)


@torch.no_grad()
def conditional_log_density(policy):
    """log pi(a | s, omega) for every omega of the grid (rows) and every a of ACTIONS (columns); K = 2."""
    mean = policy.mean(torch.ones(len(OMEGA), 1), OMEGA[:, :, None])
    return policy.head.log_prob(mean[:, None, :], ACTIONS[None, :, None])


def marginal_density(policy):
    """pi(a | s) at ACTIONS: the average of the conditional densities over omega; K = 2."""
    return WEIGHT @ conditional_log_density(policy).exp()

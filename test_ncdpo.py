"""Facts about ncdpo.py, one a test: pytest test_ncdpo.py (some two minutes on two cores).

What is compared with is a closed form or another computation, never a recorded output. (E1) ... (E15) are the labels of
README.md's equations. torch.compile is off but in test_compiled_loss_and_gradients_equal_the_plain_ones.
"""

import ast
import csv
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.distributions import Categorical, Normal

import ncdpo
from ncdpo import UserError, VectorEnv, main

HERE = Path(__file__).resolve().parent
CPU = torch.device("cpu")
PREDICT = ["sample", "epsilon", "v"]
ALGORITHMS = ["ncdpo", "ppo", "dppo"]
WIDE = 1e9  # a clip of the clean estimate that never bites
torch.set_num_threads(1)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def config(**given):
    """A run of four small updates."""
    small = dict(env="CartPole-v1", hidden=16, num_envs=2, num_steps=32, minibatch_size=32, update_epochs=2,
                 total_timesteps=256, episodes=2, checkpoint_every=1, compile=False, device="cpu")
    return ncdpo.Config(**{**small, **given})


def shaken(module, scale=0.3):
    """The module with noise on all its weights: a fresh network's output is nearly zero, which hides mistakes."""
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p += scale * torch.randn_like(p)
    return module


def make_policy(algo="ncdpo", obs_dim=3, act_dim=2, discrete=False, **given):
    given = {"hidden": 8, "clip_denoised": WIDE, **given}
    return shaken(ncdpo.Agent(config(algo=algo, **given), obs_dim, act_dim, discrete).policy)


# --- environments of the tests ---------------------------------------------------------------------------------------

class Tiny(gym.Env):
    """Observation (2, 3): where the episode started (drawn by reset), the step, the last action, then zeros."""

    made_to_fail = None  # (after so many steps of this object, what goes wrong)

    def __init__(self, action_space=gym.spaces.Discrete(3, start=5), observation_space=None, random_start=True,
                 terminates_after=math.inf):
        self.action_space, self.random_start, self.terminates_after = action_space, random_start, terminates_after
        self.observation_space = observation_space or gym.spaces.Box(-np.inf, np.inf, (2, 3), np.float32)
        self.played = 0

    def observe(self, action):
        return np.array([[self.start, self.t, action], [0, 0, 0]], np.float32)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.start, self.t = float(self.np_random.random()) if self.random_start else 0.0, 0
        return self.observe(0), {}

    def step(self, action):
        assert self.made_to_fail or self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        self.t, self.played = self.t + 1, self.played + 1
        obs, reward = self.observe(np.sum(action)), float(np.sum(action)) + self.start
        after, wrong = self.made_to_fail or (math.inf, None)
        if self.played > after:
            if wrong == "exception":
                raise ZeroDivisionError("the physics\nexploded")
            obs, reward = (obs * np.nan, reward) if wrong == "observation" else (obs, reward * np.nan)
        return obs, reward, self.t >= self.terminates_after, False, {}


def register(name, steps=8, **arguments):
    gym.register(name, entry_point=Tiny, max_episode_steps=steps, kwargs=arguments)


BOX = gym.spaces.Box(np.array([-1, 2], np.float32), np.array([3, 10], np.float32))
register("Tiny-v0")
register("TinyBox-v0", action_space=BOX)
register("TinyFixed-v0", steps=32, action_space=BOX, random_start=False)
register("TinyEnds-v0", steps=32, action_space=BOX, terminates_after=7)
register("TinyDict-v0", observation_space=gym.spaces.Dict(a=BOX))
register("TinyMulti-v0", action_space=gym.spaces.MultiDiscrete([2, 3]))
register("TinyUnbounded-v0", action_space=gym.spaces.Box(-np.inf, np.inf, (2,)))


# --- 2  noise schedule -----------------------------------------------------------------------------------------------

def cosine_tables(K):
    """abar_0 ... abar_K and beta_1 ... beta_K (beta_0 unused) of the cosine schedule, from its definition."""
    f = lambda k: math.cos((k / K + 0.008) / 1.008 * math.pi / 2) ** 2
    beta = [0.0] + [min(1 - f(k) / f(k - 1), 0.999) for k in range(1, K + 1)]
    return [math.prod(1 - b for b in beta[:k + 1]) for k in range(K + 1)], beta


def perfect_output(predict, abar, x, x0):
    """What a network that knows x0 must say at x = sqrt(abar) x0 + sqrt(1 - abar) eps (E2)."""
    eps = (x - abar**0.5 * x0) / (1 - abar) ** 0.5
    return {"sample": x0 + 0 * x, "epsilon": eps, "v": abar**0.5 * eps - (1 - abar) ** 0.5 * x0}[predict]


@pytest.mark.parametrize("K", [1, 2, 5, 100])
@pytest.mark.parametrize("predict", PREDICT)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_reverse_step_is_ddpms_posterior_at_eta_1_and_ddims_step_at_eta_0(float64, K, predict, eta):  # E3, E4
    schedule, (abar, beta) = ncdpo.Schedule(K, predict, eta, WIDE), cosine_tables(K)
    x0, x = torch.randn(2, 7, 4)
    for k in range(1, K + 1):
        now, before = abar[k], abar[k - 1]
        mu = schedule.mu(schedule.clean(perfect_output(predict, now, x, x0), x, k), x, k)
        if eta == 1:
            expected = (before**0.5 * beta[k] * x0 + (1 - beta[k]) ** 0.5 * (1 - before) * x) / (1 - now)
            variance = (1 - before) / (1 - now) * beta[k]
        else:
            expected = before**0.5 * x0 + (1 - before) ** 0.5 * (x - now**0.5 * x0) / (1 - now) ** 0.5
            variance = 0.0
        torch.testing.assert_close(mu, expected, rtol=1e-8, atol=1e-8)
        assert schedule.sigma[k].item() ** 2 == pytest.approx(variance, abs=1e-12)


def test_one_step_noising_has_the_marginals_of_diffuse(float64):  # E1
    n, schedule, (_, beta) = 200_000, ncdpo.Schedule(5, "sample", 1.0, 1.0), cosine_tables(5)
    x = torch.full((n, 1), 0.7)
    for k in range(1, 6):
        x = (1 - beta[k]) ** 0.5 * x + beta[k] ** 0.5 * torch.randn(n, 1)
        mean = schedule.diffuse(torch.tensor(0.7), k, torch.tensor(0.0)).item()
        variance = schedule.diffuse(torch.tensor(0.0), k, torch.tensor(1.0)).item() ** 2
        assert x.mean().item() == pytest.approx(mean, abs=5 * (variance / n) ** 0.5)
        assert x.var().item() == pytest.approx(variance, rel=5 * (2 / n) ** 0.5)


class Perfect(torch.nn.Module):
    """A denoiser that knows the clean action, and says it with an error of `shift`."""

    def __init__(self, policy, x0, shift=0.0):
        super().__init__()
        self.abar = torch.tensor(cosine_tables(policy.K)[0])[:, None]
        self.predict, self.x0, self.shift, self.seen = policy.predict, x0, shift, set()

    def given(self, obs):
        return None, None

    def forward(self, x, k, of_obs, of_k):
        self.seen |= set(torch.as_tensor(k).flatten().tolist())
        return perfect_output(self.predict, self.abar[k], x, self.x0) + self.shift


@pytest.mark.parametrize("K", [1, 5, 100])
@pytest.mark.parametrize("predict", PREDICT)
@pytest.mark.parametrize("algo", ["ncdpo", "dppo"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_perfect_denoiser_recovers_the_action_from_any_noise(float64, K, predict, algo, eta):  # E3-E6
    policy = make_policy(algo, denoising_steps=K, predict=predict, eta=eta, clip_denoised=1.0)
    x0 = torch.rand(50, 2) * 2 - 1
    policy.denoiser = Perfect(policy, x0)
    torch.testing.assert_close(policy.sample(torch.randn(50, 3), deterministic=True)[0], x0)


@pytest.mark.parametrize("predict", PREDICT)
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_behaviour_cloning_loss_is_the_squared_error_against_a_perfect_network(float64, predict, shift):  # E2
    policy, action = make_policy(denoising_steps=7, predict=predict), torch.randn(500, 2)
    policy.denoiser = Perfect(policy, action, shift)
    assert policy.bc_loss(torch.randn(500, 3), action).item() == pytest.approx(shift**2, abs=1e-20)
    assert policy.denoiser.seen == set(range(1, 8))


# --- 4  policies -----------------------------------------------------------------------------------------------------

def reference_step(policy, predict, eta, x, k, obs):
    """mu_k and sigma_k of E3, E4 as design.md writes them, without the tables of Schedule."""
    abar, beta = cosine_tables(policy.K)
    now, before = abar[k], abar[k - 1]
    output = policy.denoiser(x, k, *policy.denoiser.given(obs))
    x0 = {"sample": output, "epsilon": (x - (1 - now) ** 0.5 * output) / now**0.5,
          "v": now**0.5 * x - (1 - now) ** 0.5 * output}[predict].clamp(-policy.schedule.clip, policy.schedule.clip)
    variance = eta**2 * (1 - before) / (1 - now) * beta[k]
    eps = (x - now**0.5 * x0) / (1 - now) ** 0.5
    return before**0.5 * x0 + max(1 - before - variance, 0) ** 0.5 * eps, variance**0.5


@pytest.mark.parametrize("predict", PREDICT)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ncdpo_mean_is_the_sampler_run_on_given_noise(float64, predict, eta):  # E5, E6
    policy = make_policy(denoising_steps=4, predict=predict, eta=eta, clip_denoised=0.8)
    obs, omega = torch.randn(9, 3), torch.randn(9, 4, 2)
    noise = {"x4": omega[:, 0], 4: omega[:, 1], 3: omega[:, 2], 2: omega[:, 3], 1: 0.0}
    x = noise["x4"]
    for k in (4, 3, 2, 1):
        mu, sigma = reference_step(policy, predict, eta, x, k, obs)
        x = mu + sigma * noise[k]
    torch.testing.assert_close(policy.mean(obs, omega), x)


@pytest.mark.parametrize("predict", PREDICT)
@pytest.mark.parametrize("discrete", [False, True])
def test_dppo_scores_each_step_as_a_plain_loop_does(float64, predict, discrete):  # E15
    given = dict(denoising_steps=5, predict=predict, eta=0.7, min_std=0.3, temperature=0.5, clip_denoised=0.8)
    policy, obs = make_policy("dppo", discrete=discrete, **given), torch.randn(11, 3)
    action, log_prob, chain = policy.sample(obs)
    x, expected = chain[:, 0], []
    for k in range(5, 0, -1):
        mu, sigma = reference_step(policy, predict, 0.7, x, k, obs)
        x = chain[:, 6 - k] if k > 1 else action
        if k == 1 and discrete:
            expected.append(Categorical(logits=mu / 0.5).log_prob(action))
        else:
            expected.append(Normal(mu, max(sigma, 0.3)).log_prob(x).sum(-1))
    torch.testing.assert_close(log_prob, torch.stack(expected, 1))
    torch.testing.assert_close(policy.log_prob(obs, action, chain), torch.stack(expected, 1))


def test_dppo_discounts_the_advantage_by_the_steps_to_go():  # E15
    weight = make_policy("dppo", denoising_steps=4, gamma_denoising=0.9).weight
    assert weight.tolist() == pytest.approx([0.9**3, 0.9**2, 0.9, 1.0])


@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.parametrize("discrete", [False, True])
def test_ratio_is_one_right_after_sampling(algo, discrete):  # E11
    policy, obs = make_policy(algo, discrete=discrete, denoising_steps=5), torch.randn(64, 3)
    latent, noise = policy.noise(64, CPU)
    action, log_prob, remembered = policy.act(obs, latent, noise)
    again = policy.log_prob(obs, action, remembered)
    assert again.shape == log_prob.shape == (64, 5 if algo == "dppo" else 1) and again.requires_grad
    assert action.shape == ((64,) if discrete else (64, 2)) and remembered.shape == (64, policy.latent_steps, 2)
    if algo == "dppo":  # one parallel pass instead of a loop rounds differently
        torch.testing.assert_close(again, log_prob, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(again, log_prob) and torch.equal(remembered, latent)


@pytest.mark.parametrize("M", [1, 2, 4, 5])
def test_scored_steps_are_conditioned_on_the_noise_of_the_others(float64, M):  # E16
    """Five steps, the last M scored: drawn as DPPO draws them, after E5 on the noise of the others."""
    policy, obs = make_policy("dppo", denoising_steps=5, scored_steps=M, min_std=0.3), torch.randn(11, 3)
    latent, noise = policy.noise(11, CPU)
    action, log_prob, remembered = policy.act(obs, latent, noise)
    x, expected = latent[:, 0], []
    for k in range(5, 0, -1):
        mu, sigma = reference_step(policy, "sample", 1.0, x, k, obs)
        if k > M:
            x = mu + sigma * latent[:, 6 - k]
        else:
            std = max(sigma, 0.3)
            x = mu + std * (latent[:, 6 - k] if k > 1 else noise)
            expected.append(Normal(mu, std).log_prob(x).sum(-1))
    torch.testing.assert_close(action, x)
    torch.testing.assert_close(log_prob, torch.stack(expected, 1))
    torch.testing.assert_close(policy.log_prob(obs, action, remembered), torch.stack(expected, 1))
    assert len(policy.weight) == len(policy.clip_scale) == M and policy.weight[-1] == 1


@pytest.mark.parametrize("flows", [True, False])
def test_one_scored_step_is_ncdpo_with_or_without_its_gradient_through_the_chain(float64, flows):  # E16
    shared = dict(denoising_steps=4, min_std=0.3, init_std=0.3)
    one = make_policy("dppo", scored_steps=1, chain_gradient=flows, **shared)
    ncdpo_ = make_policy("ncdpo", **shared)
    ncdpo_.load_state_dict(one.state_dict())
    obs, action = torch.randn(9, 3), torch.randn(9, 2)
    omega, _ = one.noise(9, CPU)
    gradients = []
    for policy in (one, ncdpo_):
        log_prob = policy.log_prob(obs, action, omega)
        gradients.append(torch.autograd.grad(log_prob.sum(), list(policy.denoiser.parameters())))
    same = [torch.allclose(a, b) for a, b in zip(*gradients)]
    assert all(same) if flows else not any(same)
    torch.testing.assert_close(log_prob, one.log_prob(obs, action, omega))


@pytest.mark.parametrize("algo", ["ncdpo", "dppo"])
def test_noise_scale_is_a_factor_of_all_the_chains_noise(float64, algo):
    given = dict(denoising_steps=4, min_std=1e-9, init_std=1e-9)
    quiet, loud = make_policy(algo, noise_scale=0.3, **given), make_policy(algo, **given)
    loud.load_state_dict(quiet.state_dict())
    obs, noise = torch.randn(9, 3), torch.randn(9, 4, 2)
    a, b = (policy.act(obs, latent, torch.zeros(9, 2))[0] for policy, latent in ((quiet, noise), (loud, 0.3 * noise)))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("algo", ["ncdpo", "dppo"])
def test_frozen_steps_keep_the_network_they_began_with(tmp_path, algo):
    given = dict(env="TinyBox-v0", algo=algo, denoising_steps=4, hidden=8)
    ncdpo.train(config(runs=str(tmp_path), **given))
    trainer = ncdpo.Trainer(config(finetune_steps=2, **given))
    trainer.init_from(tmp_path / f"TinyBox-v0__{algo}__1")
    policy = trainer.agent.policy
    before = [p.clone() for p in policy.frozen.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, policy.denoiser.parameters()))
    trainer.iterate()
    assert all(torch.equal(a, b) for a, b in zip(before, policy.frozen.parameters()))
    assert not any(torch.equal(a, b) for a, b in zip(before, policy.denoiser.parameters()))
    used, forward = [], type(policy.denoiser).forward
    for net, name in ((policy.denoiser, "tuned"), (policy.frozen, "frozen")):
        net.forward = lambda x, k, *given, net=net, name=name: used.append((name, k)) or forward(net, x, k, *given)
    policy.sample(torch.randn(3, 6))
    assert used == [("frozen", 4), ("frozen", 3), ("tuned", 2), ("tuned", 1)]


def test_clip_of_dppo_rises_from_the_first_scored_step_to_the_last():
    scale = make_policy("dppo", denoising_steps=5, clip_coef=0.2, clip_coef_first=0.05).clip_scale
    assert (0.2 * scale[[0, -1]]).tolist() == pytest.approx([0.05, 0.2]) and (scale.diff() > 0).all()
    assert make_policy("dppo", denoising_steps=5).clip_scale.tolist() == [1] * 5


@pytest.mark.parametrize("algo", ["ncdpo", "ppo"])
def test_likelihood_is_torchs_gaussian_and_softmax_around_the_mean(float64, algo):  # E7, E8
    obs, tau = torch.randn(6, 3), 0.3 if algo == "ncdpo" else 1.0
    box, choice = (make_policy(algo, discrete=d, temperature=0.3, denoising_steps=3) for d in (False, True))
    for policy in (box, choice):
        action, log_prob, omega = policy.sample(obs)
        mean = policy.mean(obs, omega)
        end = Categorical(logits=mean / tau) if policy is choice else Normal(mean, policy.head.log_std.exp())
        expected = (end.log_prob(action), end.entropy())
        expected = expected if policy is choice else [term.sum(-1) for term in expected]
        torch.testing.assert_close(log_prob[:, 0], expected[0])
        torch.testing.assert_close(policy.evaluate(obs, action, omega)[1], expected[1])


def test_actions_are_drawn_as_their_likelihood_says(float64):  # E7, E8
    n, mean = 100_000, torch.tensor([0.4, -0.1, 0.2])
    choice, box = ncdpo.Categorical(0.5), ncdpo.Gaussian(3, 0.3)
    drawn = choice.sample(mean, choice.noise((n, 3), CPU))
    probability = torch.softmax(mean / 0.5, -1)
    frequency = torch.bincount(drawn, minlength=3) / n
    assert ((frequency - probability).abs() < 5 * (probability / n).sqrt()).all()
    drawn = box.sample(mean, box.noise((n, 3), CPU))
    assert ((drawn.mean(0) - mean).abs() < 5 * 0.3 / n**0.5).all()
    torch.testing.assert_close(drawn.std(0), torch.full((3,), 0.3), rtol=5 / (2 * n) ** 0.5, atol=0)


@pytest.mark.parametrize("predict", PREDICT)
@pytest.mark.parametrize("K", [1, 4, 10])
def test_bpdt_gradient_equals_finite_differences(float64, predict, K):  # E13
    policy, obs, omega = make_policy(denoising_steps=K, predict=predict), torch.randn(5, 3), torch.randn(5, K, 2)
    weights, parameters = torch.randn(5, 2), list(policy.denoiser.parameters())
    loss = lambda: (policy.mean(obs, omega) * weights).sum()
    gradient = torch.autograd.grad(loss(), parameters)
    for _ in range(3):
        direction, h = [torch.randn_like(p) for p in parameters], 1e-5

        def move(by):
            with torch.no_grad():
                for p, d in zip(parameters, direction):
                    p += by * d

        move(h)
        above = loss().item()
        move(-2 * h)
        below = loss().item()
        move(h)
        slope = sum((g * d).sum().item() for g, d in zip(gradient, direction))
        assert (above - below) / (2 * h) == pytest.approx(slope, rel=1e-5)


def test_gradient_is_zero_where_the_clean_estimate_is_clipped(float64):  # E3
    policy = make_policy(denoising_steps=3, clip_denoised=1.0)
    torch.nn.init.constant_(policy.denoiser.rest[-1].bias, 100.0)
    mean = policy.mean(torch.randn(5, 3), torch.randn(5, 3, 2))
    assert (mean == 1).all()
    assert all((g == 0).all() for g in torch.autograd.grad(mean.sum(), list(policy.denoiser.parameters())))


@pytest.mark.parametrize("discrete", [False, True])
def test_ncdpo_with_one_step_that_ignores_its_noise_is_ppo_with_an_mlp(float64, discrete):
    given = dict(hidden=8, denoising_steps=1, clip_denoised=WIDE, temperature=1.0, ent_coef=0.01)
    chain, plain = (shaken(ncdpo.Agent(config(algo=algo, **given), 3, 2, discrete)) for algo in ("ncdpo", "ppo"))
    denoiser, net = chain.policy.denoiser, plain.policy.net
    with torch.no_grad():
        denoiser.first.weight[:, :2] = 0
        net[0].weight.copy_(denoiser.first.weight[:, 2:5])
        net[0].bias.copy_(denoiser.first.bias + denoiser.first.weight[:, 5:] @ denoiser.embedding[1])
    for mine, yours in zip(net[2:], denoiser.rest[:]):
        mine.load_state_dict(yours.state_dict())
    plain.critic.load_state_dict(chain.critic.state_dict())
    plain.policy.head.load_state_dict(chain.policy.head.state_dict())

    obs, omega, noise = torch.randn(32, 3), torch.randn(32, 1, 2), torch.randn(32, 2)
    with torch.no_grad():
        action, log_prob, _ = chain.policy.act(obs, omega, noise)
        action2, log_prob2, _ = plain.policy.act(obs, omega[:, :0], noise)
    torch.testing.assert_close(chain.policy.mean(obs, omega), plain.policy.mean(obs, None))
    torch.testing.assert_close(action, action2)
    torch.testing.assert_close(log_prob, log_prob2)

    batch = dict(obs=obs, action=action, old_log_prob=log_prob + 0.2 * torch.randn(32, 1),
                 old_value=torch.randn(32), advantage=torch.randn(32), target=torch.randn(32))
    for agent, latent in ((chain, omega), (plain, omega[:, :0])):
        ncdpo.ppo_loss(agent, config(**given), latent=latent, **batch)[0].backward()
    first = denoiser.first
    pairs = [(first.weight.grad[:, 2:5], net[0].weight.grad), (first.bias.grad, net[0].bias.grad)]
    for mine, yours in ((denoiser.rest, net[2:]), (chain.critic, plain.critic), (chain.policy.head, plain.policy.head)):
        pairs += [(p.grad, q.grad) for p, q in zip(mine.parameters(), yours.parameters())]
    assert len(pairs) == (12 if discrete else 13)
    for mine, yours in pairs:
        torch.testing.assert_close(mine, yours)


def gauss_hermite(n, dims):
    """Nodes (n^dims, dims) and weights (n^dims,) of the expectation over a standard normal of `dims` dimensions."""
    x, w = np.polynomial.hermite_e.hermegauss(n)
    w = w / w.sum()
    weights = [math.prod(ws) for ws in itertools.product(w, repeat=dims)]
    return torch.tensor(np.array(list(itertools.product(x, repeat=dims)))), torch.tensor(weights)


@pytest.mark.parametrize("through_the_chain", [True, False])
def test_policy_gradient_is_unbiased_if_it_flows_through_the_whole_chain(float64, through_the_chain):  # E10, E13
    policy = make_policy(obs_dim=1, act_dim=1, denoising_steps=2, init_std=0.5)
    reward = lambda a: torch.sin(2 * a) + 0.5 * a**2
    parameters = list(policy.parameters())
    flat = lambda gradients: torch.cat([g.flatten() for g in gradients])

    nodes, weights = gauss_hermite(24, 3)  # (x_2, z_2) and the final Gaussian's draw
    mean = policy.mean(torch.ones(len(nodes), 1), nodes[:, :2, None])[:, 0]
    J = (weights * reward(mean + policy.head.log_std.exp() * nodes[:, 2])).sum()
    truth = flat(torch.autograd.grad(J, parameters))

    step = policy.step
    if not through_the_chain:
        policy.step = lambda x, *more: step(x.detach(), *more)
    estimates, obs = [], torch.ones(4000, 1)
    for _ in range(250):
        with torch.no_grad():
            action, _, omega = policy.sample(obs)
        score = policy.log_prob(obs, action, omega)[:, 0] * (reward(action[:, 0]) - J.item())
        estimates.append(flat(torch.autograd.grad(score.mean(), parameters)))
    estimates = torch.stack(estimates)
    standard_error = estimates.std(0) / len(estimates) ** 0.5 + 1e-12
    off = ((estimates.mean(0) - truth).abs() / standard_error).max()
    assert (off < 4) == through_the_chain


def test_kl_given_the_noise_bounds_the_kl_of_the_actions(float64):  # E14
    old = make_policy(obs_dim=1, act_dim=1, denoising_steps=2, init_std=0.5)
    new = make_policy(obs_dim=1, act_dim=1, denoising_steps=2, init_std=0.5)
    new.load_state_dict(old.state_dict())
    shaken(new, 0.05)
    nodes, weights = gauss_hermite(24, 2)
    a = torch.linspace(-15, 15, 3001)
    with torch.no_grad():  # log pi(a | omega): a row for each omega, a column for each a
        log_p, log_q = (torch.distributions.Normal(policy.mean(torch.ones(len(nodes), 1), nodes[:, :, None]),
                                                   policy.head.log_std.exp()).log_prob(a) for policy in (old, new))
        row = old.log_prob(torch.ones(3001, 1), a[:, None], nodes[[5]][:, :, None].expand(3001, 2, 1))[:, 0]
    torch.testing.assert_close(log_p[5], row)
    integral = lambda density: torch.trapezoid(density, a)
    p, q = weights @ log_p.exp(), weights @ log_q.exp()
    conditional = (weights * integral(log_p.exp() * (log_p - log_q))).sum()
    marginal = integral(p * (p / q.clamp(min=1e-300)).clamp(min=1e-300).log())
    assert integral(p).item() == pytest.approx(1, abs=1e-9)
    assert 1e-4 < marginal < conditional


@pytest.mark.parametrize("discrete", [False, True])
def test_checkpoint_chain_gives_the_same_gradient(discrete):
    obs, omega = torch.randn(16, 3), torch.randn(16, 5, 2)
    gradients = []
    for switch in (False, True):
        torch.manual_seed(0)
        policy = make_policy(denoising_steps=5, discrete=discrete, checkpoint_chain=switch)
        loss = policy.mean(obs, omega).square().sum()
        gradients.append(torch.autograd.grad(loss, list(policy.denoiser.parameters())))
    assert all(torch.equal(one, other) for one, other in zip(*gradients))


def test_dppo_draws_each_step_as_it_scores_it(float64):  # E15
    policy, obs = make_policy("dppo", denoising_steps=4, min_std=0.5), torch.randn(9, 3)
    latent, noise = policy.noise(9, CPU)
    action, _, chain = policy.act(obs, latent, noise)
    for k in (4, 3, 2, 1):
        mu, sigma = reference_step(policy, "sample", 1.0, chain[:, 4 - k], k, obs)
        drawn, z = (chain[:, 5 - k], latent[:, 5 - k]) if k > 1 else (action, noise)
        torch.testing.assert_close(drawn, mu + max(sigma, 0.5) * z)


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_untrained_policy_proposes_nearly_the_zero_action(algo):
    policy = ncdpo.Agent(config(algo=algo, hidden=128), 17, 6, False).policy
    action = policy.sample(torch.randn(500, 17), deterministic=True)[0]
    assert 0 < action.abs().max() < 0.2


def test_checkpoint_chain_runs_each_step_again_in_the_backward_pass():
    for switch, calls in ((False, 5), (True, 10)):
        policy, ks = make_policy(denoising_steps=5, checkpoint_chain=switch), []
        step = policy.step
        policy.step = lambda x, k, *more: ks.append(k) or step(x, k, *more)
        policy.mean(torch.randn(2, 3), torch.randn(2, 5, 2)).sum().backward()
        assert len(ks) == calls


def test_normalizer_agrees_with_numpy_over_uneven_batches(float64):
    batches = [3 + 2 * torch.randn(n, 4) * torch.tensor([1, 10, 0.1, 1]) for n in (1, 7, 300, 2)]
    norm, everything = ncdpo.Normalizer(4), torch.cat(batches).numpy()
    for batch in batches:
        norm.update(batch)
    mean, var = everything.mean(0), everything.var(0)
    np.testing.assert_allclose(norm.mean, mean)
    np.testing.assert_allclose(norm.var, var)
    assert norm.count == 310
    np.testing.assert_allclose(norm(batches[1]), (batches[1].numpy() - mean) / np.sqrt(var), rtol=1e-5)
    assert norm(torch.full((4,), 1e6)).tolist() == [10.0] * 4


# --- 5  environments -------------------------------------------------------------------------------------------------

def play(env_id, vector, seed=3, num_envs=3, steps=210):
    """Random actions, many of them out of bounds: a dictionary of arrays for each step, and the seeds used."""
    env, seeds = VectorEnv(env_id, num_envs, CPU, vector), []
    reset, rng = env.envs.reset, torch.Generator().manual_seed(seed)
    env.envs.reset = lambda seed: (seeds.append(seed), reset(seed=seed))[1]
    obs, rows = env.reset(seed), []
    for _ in range(steps):
        if env.discrete:
            action = torch.randint(env.act_dim, (num_envs,), generator=rng)
        else:
            action = 1.5 * torch.randn(num_envs, env.act_dim, generator=rng)
        next_obs, reward, terminated, truncated, final_obs = env.step(action)
        row = dict(obs=obs, action=action, reward=reward, terminated=terminated, truncated=truncated,
                   final_obs=final_obs, next_obs=next_obs)
        rows.append({name: tensor.numpy() for name, tensor in row.items()})
        obs = next_obs
    env.close()
    return rows, seeds[0]


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "Tiny-v0", "TinyBox-v0"])
def test_every_environment_plays_as_it_would_alone(env_id):
    rows, seeds = play(env_id, "sync")
    ends = 0
    for i, seed in enumerate(seeds):
        alone = gym.make(env_id, disable_env_checker=True)
        obs, space = alone.reset(seed=seed)[0], alone.action_space
        for row in rows:
            np.testing.assert_array_equal(row["obs"][i], np.float32(obs).ravel())
            if isinstance(space, gym.spaces.Discrete):
                action = row["action"][i] + space.start
            else:
                part = (np.float64(row["action"][i]).clip(-1, 1) + 1) / 2
                action = np.float32(space.low + part * (space.high - space.low))
            obs, reward, terminated, truncated, _ = alone.step(action)
            np.testing.assert_allclose(row["final_obs"][i], np.float32(obs).ravel(), rtol=1e-5, atol=1e-5)
            assert row["reward"][i] == pytest.approx(reward, rel=1e-5)
            assert (row["terminated"][i], row["truncated"][i]) == (terminated, truncated)
            if terminated or truncated:
                ends += 1
                obs = alone.reset()[0]
                assert not np.array_equal(row["final_obs"][i], row["next_obs"][i])
            else:
                assert np.array_equal(row["final_obs"][i], row["next_obs"][i])
    assert ends >= len(seeds) and len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "TinyBox-v0"])
def test_sync_and_async_simulators_give_the_same_trajectories(env_id):
    for one, other in zip(play(env_id, "sync", steps=60)[0], play(env_id, "async", steps=60)[0], strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_box_actions_are_clipped_and_rescaled_to_the_bounds():
    env = VectorEnv("TinyBox-v0", 4, CPU)
    env.reset(0)
    final_obs = env.step(torch.tensor([[-1.0, -1.0], [0.0, 0.0], [1.0, 1.0], [-7.0, 7.0]]))[-1]
    assert final_obs[:, 2].tolist() == [-1 + 2, 1 + 6, 3 + 10, -1 + 10]  # the environment writes the sum of its action
    env.close()


def cartpole_step(s, right):
    """Cart and pole after 0.02 s (Barto, Sutton and Anderson, 1983), the Euler step that every CartPole-v1 takes."""
    x, v, angle, w = np.float64(s).T
    pull = (10 * (2 * right - 1.0) + 0.05 * w**2 * np.sin(angle)) / 1.1
    spin = (9.8 * np.sin(angle) - np.cos(angle) * pull) / (0.5 * (4 / 3 - 0.1 * np.cos(angle) ** 2 / 1.1))
    push = pull - 0.05 * spin * np.cos(angle) / 1.1
    return np.stack([x + 0.02 * v, v + 0.02 * push, angle + 0.02 * w, w + 0.02 * spin], -1)


@pytest.mark.parametrize("vector", ["sync", "envpool"])
def test_no_transition_is_a_fake_one(vector):
    """Each transition obeys the physics: none leads from the end of an episode to the start of the next."""
    if vector == "envpool":
        pytest.importorskip("envpool")
    rows, _ = play("CartPole-v1", vector)
    for row in rows:
        np.testing.assert_allclose(row["final_obs"], cartpole_step(row["obs"], row["action"]), rtol=1e-4, atol=1e-5)
        fell = (np.abs(row["final_obs"][:, 2]) > 12 * math.pi / 180) | (np.abs(row["final_obs"][:, 0]) > 2.4)
        np.testing.assert_array_equal(row["terminated"], fell)
        assert (np.abs(row["next_obs"][fell]) <= 0.05).all() and (row["reward"] == 1).all()
    assert sum(row["terminated"].sum() for row in rows) > 10


@pytest.mark.parametrize("vector", ["sync", "envpool"])
def test_seed_decides_where_episodes_start(vector):
    if vector == "envpool":
        pytest.importorskip("envpool")
    one, again, other = (play("CartPole-v1", vector, seed, steps=1)[0][0]["obs"] for seed in (3, 3, 4))
    assert np.array_equal(one, again) and len(np.unique([one, other])) == 2 * one.size


def test_envpool_truncates_after_as_many_steps_as_gymnasium():
    pytest.importorskip("envpool")
    for vector in ("sync", "envpool"):
        rows, _ = play("Pendulum-v1", vector, steps=610)
        ends = [t for t, row in enumerate(rows, 1) if row["truncated"].any()]
        assert ends == [200, 400, 600] and not any(row["terminated"].any() for row in rows)


@pytest.mark.parametrize("env_id, vector", [("TinyBox-v0", "sync"), ("TinyBox-v0", "async"), ("TinyEnds-v0", "sync"),
                                            ("Hopper-v4", "sync"), ("Pendulum-v1", "envpool")])
def test_a_chunk_plays_its_actions_one_after_another_until_the_episode_ends(env_id, vector):
    """Chunks of 3 in one environment are what its copies, one action at a time, would have seen."""
    if vector == "envpool":
        pytest.importorskip("envpool")
    H, N = 3, 2
    env, seeds = VectorEnv(env_id, N, CPU, vector, chunk=H), []
    reset, A = env.envs.reset, env.act_dim // 3
    env.envs.reset = lambda seed: (seeds.append(seed), reset(seed=seed))[1]
    env.reset(5)
    alone = [gym.make(env_id, disable_env_checker=True) for _ in range(N)]
    for one, seed in zip(alone, seeds[0]):
        one.reset(seed=seed)
    low, high, broken, rng = env.act_space.low[:A], env.act_space.high[:A], 0, torch.Generator().manual_seed(0)
    for t in range(80 if vector != "envpool" else 66):  # EnvPool's own dynamics and seeds differ: count its steps only
        action = 1.5 * torch.randn(N, H * A, generator=rng)
        next_obs, reward, terminated, truncated, final_obs = env.step(action)
        assert reward.shape == (N, H)
        if vector == "envpool":
            left = 200 - 3 * t  # Pendulum's episodes have 200 steps
            assert reward.isfinite().sum(1).tolist() == [3] * N and not truncated.any()
            continue
        for i, one in enumerate(alone):
            rewards, ended = [], False
            for part in (action[i].numpy().reshape(H, A).clip(-1, 1) + 1) / 2:
                if not ended:
                    obs, r, dead, cut, _ = one.step(np.float32(low + part * (high - low)))
                    rewards, ended = rewards + [r], dead or cut
            rewards += [np.nan] * (H - len(rewards))
            np.testing.assert_allclose(reward[i], rewards, rtol=1e-4)
            np.testing.assert_allclose(final_obs[i], np.float32(obs).ravel(), rtol=1e-4, atol=1e-4)
            assert (terminated[i], truncated[i]) == (dead, cut)
            if ended:
                broken += np.isnan(rewards).any()
                np.testing.assert_allclose(next_obs[i], np.float32(one.reset()[0]).ravel(), rtol=1e-5)
    if vector == "envpool":
        _, reward, _, truncated, _ = env.step(action)
        assert left == 5 and reward.isfinite().sum(1).tolist() == [2] * N and truncated.all()
    env.close()
    assert broken or vector == "envpool"


@pytest.mark.parametrize("env", ["TinyBox-v0", "TinyEnds-v0"])  # one truncates inside a chunk, one terminates
def test_a_chunk_is_one_decision_whose_rewards_are_discounted_step_by_step(monkeypatch, env):
    H, gamma, lam = 3, 0.9, 0.8
    given = dict(action_chunk=H, gamma=gamma, gae_lambda=lam, norm_reward=False, norm_obs=False, total_timesteps=768)
    trainer, batches = ncdpo.Trainer(config(env=env, **given)), []
    shaken(trainer.agent.critic)
    monkeypatch.setattr(ncdpo, "update", lambda *given, **more: batches.append(given[-1]) or {})
    row, rollout, V = trainer.iterate(), trainer.rollout, lambda obs: trainer.agent.value(obs).item()
    assert trainer.updates == 4 and row["step"] == 2 * 32 * H
    with torch.no_grad():
        for n in range(2):
            trace, expected = 0.0, np.zeros(32)
            for t in reversed(range(32)):
                rewards = [r for r in rollout.reward[t, n].tolist() if not math.isnan(r)]
                there = 0.0 if rollout.terminated[t, n] else V(rollout.final_obs[t, n])
                ahead = sum(gamma**i * r for i, r in enumerate(rewards)) + gamma ** len(rewards) * there
                trace = ahead - V(rollout.obs[t, n]) + (0 if rollout.ended[t, n] else gamma**H * lam * trace)
                expected[t] = trace
            got = batches[0]["advantage"].view(32, 2)[:, n]
            np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)
    assert row["length"] == (8 if env == "TinyBox-v0" else 7)


# --- 6  rollout and advantages ---------------------------------------------------------------------------------------

def test_omega_is_drawn_afresh_at_each_step():  # E9
    trainer = ncdpo.Trainer(config(env="Pendulum-v1", num_steps=400, total_timesteps=800))
    trainer.obs = trainer.rollout.collect(trainer.env, trainer.agent, trainer.act, trainer.obs)
    omega = trainer.rollout.latent
    assert omega.shape == (400, 2, 5, 1) and len(omega.unique()) > 0.99 * omega.numel()
    n = omega.numel()
    assert abs(omega.mean()) < 5 / n**0.5 and abs(omega.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((omega[1:] * omega[:-1]).mean()) < 5 / n**0.5


@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_first_minibatch_after_a_rollout_has_ratio_one(algo, env):  # E11
    trainer = ncdpo.Trainer(config(algo=algo, env=env, update_epochs=1, minibatch_size=64))
    for _ in range(2):  # in the second, weights and normalisers have moved on from their first values
        row = trainer.iterate()
        assert abs(row["approx_kl"]) < 1e-6 and row["clip_fraction"] == 0 and row["grad_norm"] > 0


def random_rollout(T=40, N=3):
    reward, value, final_value = torch.randn(3, T, N)
    terminated = (torch.rand(T, N) < 0.08).to(reward)
    truncated = ((torch.rand(T, N) < 0.08) & (terminated == 0)).to(reward)
    ended = terminated + truncated
    final_value[:-1] = torch.where(ended[:-1] == 0, value[1:], final_value[:-1])  # without a reset a step leads on
    assert terminated.sum() > 1 and truncated.sum() > 1
    return reward, value, final_value, terminated, ended


def test_advantages_are_the_discounted_sum_of_td_errors_within_an_episode(float64):
    reward, value, final_value, terminated, ended = arguments = random_rollout()
    A = ncdpo.advantages(*arguments, 0.9, 0.8)
    for t, n in np.ndindex(*A.shape):
        expected = 0.0
        for l in range(len(A) - t):
            bootstrap = 0.0 if terminated[t + l, n] else final_value[t + l, n]
            expected += 0.72**l * (reward[t + l, n] + 0.9 * bootstrap - value[t + l, n])
            if ended[t + l, n]:
                break
        assert A[t, n].item() == pytest.approx(float(expected))


def test_return_bootstraps_through_truncation_and_not_through_termination(float64):
    reward, value, final_value, terminated, ended = arguments = random_rollout()
    target = ncdpo.advantages(*arguments, 0.9, 1.0) + value
    for t, n in np.ndindex(*target.shape):
        end = t + int(torch.cat([ended[t:, n], torch.ones(1)]).argmax())
        last = min(end, len(target) - 1)
        expected = sum(0.9 ** (i - t) * reward[i, n] for i in range(t, last + 1))
        expected += 0.9 ** (last + 1 - t) * (1 - terminated[last, n]) * final_value[last, n]
        assert target[t, n].item() == pytest.approx(float(expected))


def test_discounted_sums_start_again_with_each_episode_and_go_on_across_rollouts(float64):
    reward, _, _, _, ended = random_rollout()
    first, carry = ncdpo.discounted_sums(reward[:15], ended[:15], torch.zeros(3), 0.9)
    second, _ = ncdpo.discounted_sums(reward[15:], ended[15:], carry, 0.9)
    running = np.zeros(3)
    for t, sums in enumerate(torch.cat([first, second])):
        running = 0.9 * running * (0 if t == 0 else 1 - ended[t - 1].numpy()) + reward[t].numpy()
        np.testing.assert_allclose(sums, running)


def test_episodes_are_counted_across_rollouts():
    rollout = ncdpo.Trainer(config()).rollout
    rollout.reward = torch.tensor([[1.0, 10], [2, 20], [3, 30]])[..., None]
    rollout.ended = torch.tensor([[0.0, 0], [1, 0], [0, 0]])
    assert rollout.finished().tolist() == [[3, 2]]
    rollout.ended = torch.tensor([[0.0, 1], [1, 1], [1, 0]])
    assert rollout.finished().tolist() == [[70, 4], [6, 3], [20, 1], [3, 1]]


# --- 7  PPO update ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.parametrize("clip_vloss", [False, True])
def test_ppo_loss_is_the_clipped_objective(float64, algo, clip_vloss):  # E11, E12, E15
    c = config(algo=algo, denoising_steps=3, clip_vloss=clip_vloss, ent_coef=0.03, vf_coef=0.7, gamma_denoising=0.5)
    agent, obs = shaken(ncdpo.Agent(c, 3, 2, False)), torch.randn(40, 3)
    action, log_prob, latent = agent.policy.sample(obs)
    log_prob = log_prob.detach()
    old, old_value, advantage, target = log_prob + 0.3 * torch.randn_like(log_prob), *torch.randn(3, 40)
    loss, diagnostics = ncdpo.ppo_loss(agent, c, obs, action, latent, old, old_value, advantage, target)

    normal = (advantage - advantage.mean()) / advantage.std()
    terms, kls, clipped, M = [], [], [], log_prob.shape[1]
    for b, m in np.ndindex(40, M):
        r = math.exp(log_prob[b, m] - old[b, m])
        A = normal[b].item() * 0.5 ** (M - 1 - m)
        terms.append(-min(r * A, min(max(r, 0.8), 1.2) * A))
        kls.append(r - 1 - math.log(r))
        clipped.append(not 0.8 <= r <= 1.2)
    value = agent.critic(obs)[:, 0].detach().numpy()
    errors = (value - target.numpy()) ** 2
    if clip_vloss:
        near = old_value.numpy() + np.clip(value - old_value.numpy(), -0.2, 0.2)
        errors = np.maximum(errors, (near - target.numpy()) ** 2)
    std = agent.policy.head.log_std.exp()
    expected = [np.mean(terms), errors.mean() / 2, Normal(torch.zeros(2), std).entropy().sum().item(),
                np.sum(kls) / 40, np.mean(clipped)]
    assert diagnostics.tolist() == pytest.approx(expected, rel=1e-6)
    assert loss.item() == pytest.approx(expected[0] + 0.7 * expected[1] - 0.03 * expected[2], rel=1e-6)


def test_chain_gradient_measures_the_gradient_at_each_denoising_step(float64):  # E13
    agent, B = shaken(ncdpo.Agent(config(denoising_steps=4, clip_denoised=WIDE), 3, 2, False)), 6
    obs, action, omega, advantage = torch.randn(B, 3), torch.randn(B, 2), torch.randn(B, 4, 2), torch.randn(B)
    norms, clipped = ncdpo.chain_gradient(agent, obs, action, omega, advantage)
    mean = agent.policy.mean(obs, omega.requires_grad_())
    at_x0 = (-advantage[:, None] * (action - mean) / agent.policy.head.log_std.exp() ** 2 / B).detach()
    at_omega, = torch.autograd.grad((mean * at_x0).sum(), omega)
    assert len(norms) == 5 and clipped == 0
    assert (norms[0], norms[-1]) == pytest.approx((at_omega[:, 0].norm().item(), at_x0.norm().item()))


@pytest.mark.parametrize("algo", ["ncdpo", "dppo"])
def test_chain_std_is_the_deviation_of_the_action_over_the_chains_noise(algo):  # E17
    agent = ncdpo.Agent(config(algo=algo, predict="epsilon"), 3, 2, False)
    obs = torch.randn(1, 3)
    actions = agent.policy.sample(obs.expand(20_000, 3), deterministic=True)[0]
    expected = actions.var(0).mean().sqrt().item()
    assert expected > 0.05
    assert ncdpo.chain_std(agent, obs.expand(20_000, 3)) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("target_kl, updates", [(None, 8 * 2), (1e-8, 2)])
def test_target_kl_stops_the_epochs(target_kl, updates):
    trainer, steps = ncdpo.Trainer(config(update_epochs=8, target_kl=target_kl)), []
    trainer.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    trainer.iterate()
    assert len(steps) == updates


@pytest.mark.parametrize("env", ["CartPole-v1", "TinyBox-v0"])  # the first terminates, the second truncates
@pytest.mark.parametrize("norm", [True, False])
def test_update_learns_from_the_steps_played(monkeypatch, env, norm):  # E10, E12
    trainer, steps, batches = ncdpo.Trainer(config(env=env, norm_obs=norm, norm_reward=norm)), [], []
    step, first, agent = trainer.env.step, trainer.obs, trainer.agent
    shaken(agent.critic)
    trainer.env.step = lambda action: steps.append(step(action)) or steps[-1]
    monkeypatch.setattr(ncdpo, "update", lambda *given, **more: batches.append(given[-1]) or {})
    monkeypatch.setattr(ncdpo, "chain_gradient", lambda *_: (np.array([9.0, 2.0, 8.0]), 0.0))
    trainer.iterate()
    row = trainer.iterate()

    obs, reward, terminated, truncated, led = (torch.stack(x) for x in zip(*steps))
    reward = reward[..., 0]
    obs, ended, sums = torch.cat([first[None], obs[:-1]]), terminated | truncated, [torch.zeros(2)]
    assert (terminated if env == "CartPole-v1" else truncated)[32:].any()
    if norm:
        for t in range(64):
            sums.append(0.98 * sums[-1] * ~ended[t - 1] + reward[t])
        reward = reward / torch.stack(sums[1:]).std(correction=0)
        seen = obs[:32].flatten(0, 1)
        obs, led = (((x - seen.mean(0)) / (seen.var(0, correction=0) + 1e-8).sqrt()).clamp(-10, 10) for x in (obs, led))
    with torch.no_grad():
        value, final_value = agent.critic(obs[32:])[..., 0], agent.critic(led[32:])[..., 0]
    advantage = ncdpo.advantages(reward[32:], value, final_value, 1.0 * terminated[32:], 1.0 * ended[32:], 0.98, 0.92)
    target = advantage + value
    for name, expected in dict(obs=obs[32:], advantage=advantage, target=target, old_value=value).items():
        torch.testing.assert_close(batches[1][name], expected.flatten(0, 1), rtol=1e-3, atol=1e-3)
    assert row["explained_variance"] == pytest.approx(1 - float(advantage.var() / target.var()), abs=1e-3)
    assert row["chain_gradient_ratio"] == 2 / 8


@pytest.mark.parametrize("anneal, rates", [(True, [5e-4, 3.75e-4, 2.5e-4, 1.25e-4]), (False, [5e-4] * 4)])
def test_adam_takes_the_learning_rate_of_the_update(anneal, rates):
    trainer, taken = ncdpo.Trainer(config(anneal_lr=anneal, update_epochs=1, minibatch_size=64)), []
    trainer.optimizer.register_step_post_hook(lambda adam, *_: taken.append(adam.param_groups[0]["lr"]))
    for _ in rates:
        trainer.iterate()
    assert taken == pytest.approx(rates)


def descend(size, kl=0.0, **given):
    """`update` on the loss 100 w by plain gradient descent: the minibatches taken, where w went, the diagnostics."""
    w, picks = torch.nn.Parameter(torch.zeros(())), []

    def loss(obs):
        picks.append(obs.tolist())
        return 100 * w, torch.tensor([0, 0, 0, kl, 0])

    row = ncdpo.update(None, config(**given), torch.optim.SGD([w], lr=1.0), loss, {"obs": torch.arange(size)})
    return picks, w.item(), row


def test_update_takes_whole_minibatches_in_a_new_order_each_epoch_and_clips_the_gradient():
    picks, w, row = descend(110, update_epochs=3, minibatch_size=50, max_grad_norm=0.5)
    assert [len(pick) for pick in picks] == [50] * 6  # 10 are left out of each epoch
    epochs = [picks[i] + picks[i + 1] for i in (0, 2, 4)]
    assert all(len(set(epoch)) == 100 and epoch != sorted(epoch) for epoch in epochs) and epochs[0] != epochs[1]
    assert w == pytest.approx(-0.5 * 6) and row["grad_norm"] == pytest.approx(100)


@pytest.mark.parametrize("kl, minibatches", [(0.03, 8), (0.06, 2)])
def test_target_kl_is_compared_with_the_mean_of_each_epoch(kl, minibatches):
    assert len(descend(100, kl, update_epochs=4, minibatch_size=50, target_kl=0.05)[0]) == minibatches


@pytest.mark.parametrize("norm_adv", [False, True])
def test_advantages_are_normalised_only_where_asked(float64, norm_adv):  # E12; at ratio 1 the loss is -mean(A)
    agent, obs, advantage = ncdpo.Agent(config(), 3, 2, False), torch.randn(40, 3), 5 + torch.randn(40)
    action, log_prob, latent = agent.policy.sample(obs)
    rest = dict(old_log_prob=log_prob.detach(), old_value=advantage, target=advantage)
    diagnostics = ncdpo.ppo_loss(agent, config(norm_adv=norm_adv), obs, action, latent, advantage=advantage, **rest)[1]
    assert diagnostics[0].item() == pytest.approx(0 if norm_adv else -advantage.mean().item(), abs=1e-9)


@pytest.mark.parametrize("algo", ["ncdpo", "dppo"])
def test_to_measure_chain_std_leaves_the_random_state_alone(algo):
    agent, before = ncdpo.Agent(config(algo=algo), 3, 2, False), torch.get_rng_state()
    ncdpo.chain_std(agent, torch.zeros(4, 3))
    assert torch.equal(torch.get_rng_state(), before)


def test_scaled_rewards_are_clipped_to_ten(monkeypatch):
    trainer, batches = ncdpo.Trainer(config(gamma=0.0)), []  # without a future, the target is the scaled reward
    trainer.agent.reward_norm.var.fill_(1e-6)
    trainer.agent.reward_norm.count.fill_(1e9)
    monkeypatch.setattr(ncdpo, "update", lambda *given, **more: batches.append(given[-1]) or {})
    trainer.iterate()
    torch.testing.assert_close(batches[0]["target"], torch.full((64,), 10.0))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("error:going on more slowly")
def test_compiled_loss_and_gradients_equal_the_plain_ones():
    results = []
    for switch in (False, True):
        trainer = ncdpo.Trainer(config(env="Pendulum-v1", compile=switch))
        torch.manual_seed(1)
        agent, obs = shaken(trainer.agent), torch.randn(64, 3)
        latent, noise = agent.policy.noise(64, CPU)
        with torch.no_grad():
            action, log_prob, _ = trainer.act(obs, latent, noise)
        rest = dict(zip(("old_value", "advantage", "target"), torch.randn(3, 64)))
        old = log_prob + 0.1 * torch.randn(64, 1)
        loss, diagnostics = trainer.loss(obs=obs, action=action, latent=latent, old_log_prob=old, **rest)
        loss.backward()
        results.append([action, log_prob, loss, diagnostics, *(p.grad for p in agent.parameters())])
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("algo, steps, compiled", [("ncdpo", 0, 2), ("ncdpo", 1, 0), ("dppo", 1, 1), ("ppo", 1, 2)])
def test_a_loop_over_a_long_chain_is_not_compiled(monkeypatch, algo, steps, compiled):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: calls.append(function) or function)
    ncdpo.Trainer(config(algo=algo, denoising_steps=4 + steps, compile_chain=4, compile=True)).iterate()
    assert len(calls) == 1 + compiled  # the first is a trial


def test_training_goes_on_with_one_warning_where_torch_compile_fails(monkeypatch):
    def broken(function, **_):
        def call(*_, **__):
            raise torch._dynamo.exc.TorchDynamoException("no compiler")
        return call

    plain = ncdpo.Trainer(config()).iterate()
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.warns(UserWarning, match="without torch.compile") as caught:
        assert ncdpo.Trainer(config(compile=True)).iterate()["policy_loss"] == plain["policy_loss"]
    assert len(caught) == 1


# --- 8  demonstrations -----------------------------------------------------------------------------------------------

def tiny_demos(lengths=(9, 2, 12, 7), seed=0):
    """Episodes of TinyBox-v0, numbered by their first observation; every action names its episode and its step."""
    rows, rng = [], np.random.default_rng(seed)
    for episode, length in enumerate(lengths):
        for t in range(length):
            action = np.array([episode / 10, 3 + t / 10], np.float32)
            rows.append((np.array([episode, t, 0, 0, 0, 0], np.float32), action, rng.normal(),
                         t == length - 1 and episode % 2 == 0, t == length - 1 and episode % 2 == 1))
    return dict(zip(ncdpo.D4RL_NAMES, (np.array(column) for column in zip(*rows))))


def saved(path, demos):
    if path.suffix == ".npz":
        np.savez(path, **demos)
    else:
        with pytest.importorskip("h5py").File(path, "w") as file:
            for key, name in ncdpo.D4RL_NAMES.items():
                file[name] = demos[key]
    return str(path)


@pytest.mark.parametrize("H", [1, 3, 8])
def test_chunks_of_demonstrations_never_cross_an_episodes_end(tmp_path, capsys, H):
    demos, lengths = tiny_demos(), (9, 2, 12, 7)
    env = VectorEnv("TinyBox-v0", 2, CPU, chunk=H)
    obs, action, episode = ncdpo.load_demos(saved(tmp_path / "d.npz", demos), env)
    expected = [(e, t) for e, length in enumerate(lengths) for t in range(length - H + 1)]
    assert [tuple(map(int, row)) for row in obs[:, :2].tolist()] == expected
    assert episode.tolist() == [e for e, _ in expected]
    low, high = torch.as_tensor(BOX.low), torch.as_tensor(BOX.high)
    real = low + (action.view(-1, H, 2) + 1) / 2 * (high - low)
    for chunk, (e, t) in zip(real, expected):
        shown = torch.tensor([[e / 10, 3 + (t + i) / 10] for i in range(H)])
        torch.testing.assert_close(chunk, shown, rtol=0, atol=1e-5)
    returns = [demos["rewards"][demos["observations"][:, 0] == e].sum() for e in range(4)]
    printed = capsys.readouterr().out
    assert "4 episodes, 30 steps" in printed and f"mean return {np.mean(returns):.1f}" in printed


@pytest.mark.parametrize("kind", ["d.npz", "d.hdf5"])
def test_demonstrations_are_read_as_they_were_written(tmp_path, kind):
    for key, array in ncdpo.read_demos(saved(tmp_path / kind, demos := tiny_demos())).items():
        np.testing.assert_array_equal(array, demos[key])


def test_demonstrations_are_read_from_minari(tmp_path, monkeypatch, capsys):
    pytest.importorskip("h5py")
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    demos, buffers = tiny_demos(), []
    for e in range(4):
        one = {key: array[demos["observations"][:, 0] == e] for key, array in demos.items()}
        one["observations"] = np.concatenate([one["observations"], np.full((1, 6), 99, np.float32)])  # where it ended
        one = {key: list(array) if array.ndim == 1 else array for key, array in one.items()}
        buffers.append(minari.data_collector.EpisodeBuffer(**one))
    space = gym.spaces.Box(-np.inf, np.inf, (6,), np.float32)
    minari.create_dataset_from_buffers("tiny/box-v0", buffers, observation_space=space, action_space=BOX,
                                       algorithm_name="-", author="-", author_email="-", code_permalink="-",
                                       description="-")
    for key, array in ncdpo.read_demos("minari:tiny/box-v0").items():
        np.testing.assert_allclose(array, demos[key], rtol=1e-6)
    monkeypatch.setattr(minari, "load_dataset", lambda name, download: 1 / 0)
    monkeypatch.setattr(minari, "list_remote_datasets", lambda: 1 / 0)  # no network
    flags = arguments("TinyBox-v0", tmp_path / "runs", "--demos", "minari:tiny/boxx-v0")
    assert "did you mean tiny/box-v0" in complaint(capsys, *flags)


@pytest.mark.parametrize("package, source", [("h5py", "d.hdf5"), ("minari", "minari:a/b-v0")])
def test_a_missing_optional_package_is_named(tmp_path, monkeypatch, capsys, package, source):
    monkeypatch.setitem(sys.modules, package, None)
    assert f"pip install {package}" in complaint(capsys, *arguments("TinyBox-v0", tmp_path, "--demos", source))


@pytest.mark.parametrize("damage, words", [
    (dict(observations=np.zeros((30, 5))), "observations of"),
    (dict(actions=np.zeros((30, 3))), "actions of"),
    (dict(terminations=np.zeros(29)), "terminations of"),
    (dict(observations=np.where(np.arange(30)[:, None] == 11, np.nan, np.zeros((30, 6)))), "row 11"),
    (dict(rewards=np.where(np.arange(30) == 4, np.inf, 0.0)), "row 4"),
    (dict(actions=np.where(np.arange(30)[:, None] == 17, 11.0, np.full((30, 2), 2.5))), "row 17"),
    (dict(truncations=np.zeros(30), terminations=np.zeros(30)), "fewer than two episodes"),
    (dict(truncations=np.ones(30)), "--action-chunk 2"),
    ("empty", "need"),
    ("key", "cannot read"),
    ("pickle", "cannot read"),
    ("text", "cannot read"),
    ("truncated", "cannot read"),
    ("missing", "cannot read"),
])
def test_damaged_demonstrations_are_told_in_one_line(tmp_path, capsys, damage, words):
    path, demos = tmp_path / "d.npz", tiny_demos()
    if isinstance(damage, dict):
        demos |= damage
    elif damage == "empty":
        demos = {key: array[:0] for key, array in demos.items()}
    elif damage == "key":
        del demos["truncations"]
    elif damage == "pickle":
        demos["rewards"] = demos["rewards"].astype(object)
    np.savez(path, **demos)
    if damage in ("text", "truncated"):
        path.write_bytes(b"no archive" if damage == "text" else path.read_bytes()[:300])
    elif damage == "missing":
        path.unlink()
    flags = arguments("TinyBox-v0", tmp_path / "runs", "--demos", path, "--action-chunk", "2")
    assert words in complaint(capsys, *flags) and not (tmp_path / "runs").exists()


def test_discrete_actions_are_neither_cloned_nor_chunked(tmp_path, capsys):
    path = saved(tmp_path / "d.npz", tiny_demos())
    flags = arguments("CartPole-v1", tmp_path, "--demos", path, "--action-chunk", "1")
    assert "Box actions only" in complaint(capsys, *flags)
    assert "--action-chunk" in complaint(capsys, *arguments("CartPole-v1", tmp_path, "--action-chunk", "2"))


@pytest.mark.parametrize("predict", PREDICT)
def test_cloning_recovers_two_modes_where_a_gaussian_finds_their_mean(tmp_path, predict):
    """Demonstrated: -0.6 or 0.6 with equal probability, whatever the state."""
    action = torch.where(torch.rand(4000, 1) < 0.5, 0.6, -0.6) + 0.02 * torch.randn(4000, 1)
    demos = (torch.randn(4000, 2), action, np.arange(4000) // 10)
    given = dict(bc_steps=4000, bc_learning_rate=3e-3, hidden=64, denoising_steps=20, predict=predict)
    policies = {}
    for algo in ("ppo", "ncdpo"):
        agent = ncdpo.Agent(config(algo=algo, **given), 2, 1, False)
        ncdpo.clone(agent, config(algo=algo, **given), demos, tmp_path)
        policies[algo] = agent.policy
    with torch.no_grad():
        drawn = policies["ncdpo"].sample(torch.randn(1000, 2), deterministic=True)[0]
        assert policies["ppo"].sample(torch.randn(1000, 2), deterministic=True)[0].abs().mean() < 0.15
    assert ((drawn.abs() - 0.6).abs() < 0.15).float().mean() > 0.9 and 0.4 < (drawn > 0).float().mean() < 0.6
    rows = rows_of(tmp_path, "cloning.csv")
    assert len(rows) == 20 and float(rows[-1]["held_out_loss"]) < float(rows[0]["held_out_loss"])


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A cloned run of TinyBox-v0 with chunks of 2, and the demonstrations."""
    folder = tmp_path_factory.mktemp("clone")
    path = saved(folder / "d.npz", tiny_demos())
    given = dict(env="TinyBox-v0", action_chunk=2, denoising_steps=3, bc_steps=60)
    ncdpo.train(config(demos=path, total_timesteps=0, runs=str(folder), **given))
    return folder / "TinyBox-v0__ncdpo__1", path, given


def test_init_from_reproduces_the_clones_evaluation_exactly(clone, tmp_path):
    run, _, given = clone
    shutil.copytree(run, tmp_path / "copy")
    trainer = ncdpo.Trainer(config(**given))
    trainer.init_from(run)
    ncdpo.write(tmp_path / "copy" / "checkpoint.pt", lambda file: torch.save(trainer.state_dict(), file))
    one, other = (ncdpo.evaluate(folder, 3, device="cpu") for folder in (run, tmp_path / "copy"))
    for way in ("with noise", "without noise"):
        np.testing.assert_array_equal(one[way]["return"], other[way]["return"])


def test_clone_starts_from_the_demonstrations_statistics_and_dppo_starts_from_ncdpos_clone(clone):
    run, path, given = clone
    obs = ncdpo.load_demos(path, VectorEnv("TinyBox-v0", 2, CPU, chunk=2))[0]
    trainer = ncdpo.Trainer(config(algo="dppo", min_std=0.3, **given))
    trainer.init_from(run)
    torch.testing.assert_close(trainer.agent.obs_norm.mean, obs.mean(0))
    torch.testing.assert_close(trainer.agent.obs_norm.var, obs.var(0, correction=0))
    cloned = checkpoint_of(run)["agent"]
    for name, tensor in trainer.agent.policy.denoiser.state_dict().items():
        assert torch.equal(tensor, cloned["policy.denoiser." + name])
    assert trainer.agent.policy.head.log_std.exp().tolist() == pytest.approx([0.3] * 4)


def test_critic_warmup_leaves_the_actor_where_it_was(clone):
    run, _, given = clone
    trainer = ncdpo.Trainer(config(critic_warmup=1, **given))
    trainer.init_from(run)
    actor, critic = ([p.clone() for p in part.parameters()] for part in (trainer.agent.policy, trainer.agent.critic))
    trainer.iterate()
    assert all(torch.equal(a, b) for a, b in zip(actor, trainer.agent.policy.parameters()))
    assert not any(torch.equal(a, b) for a, b in zip(critic, trainer.agent.critic.parameters()))
    trainer.iterate()
    assert not any(torch.equal(a, b) for a, b in zip(actor, trainer.agent.policy.parameters()))


def test_cloning_regulariser_pulls_the_policy_towards_the_demonstrations(clone):
    run, path, given = clone
    losses = []
    for coefficient in (0.0, 100.0):
        trainer = ncdpo.Trainer(config(demos=path, bc_coef=coefficient, norm_obs=False, learning_rate=1e-2, **given))
        trainer.demos = ncdpo.load_demos(path, trainer.env)
        trainer.iterate()
        torch.manual_seed(1)
        losses.append(trainer.agent.policy.bc_loss(*trainer.demos[:2]).item())
    assert losses[1] < 0.7 * losses[0]


@pytest.mark.parametrize("flags, words", [
    (["--action-chunk", "4"], "--action-chunk"), (["--predict", "v"], "--predict"),
    (["--env", "TinyEnds-v0"], "--env"), (["--algo", "ppo"], "not that of ppo"), (["--no-norm-obs"], "--norm-obs"),
    (["--demos", "mine.npz"], "--bc-coef"), (["--bc-coef", "1"], "--demos")])
def test_a_run_that_cannot_start_from_the_clone_says_so(clone, tmp_path, capsys, flags, words):
    flags = ["--init-from", clone[0], "--runs", tmp_path, "--total-timesteps", "512", *flags]
    assert words in complaint(capsys, *flags) and not list(tmp_path.iterdir())


def test_cloned_steps_that_will_be_frozen_are_cloned_too(clone, tmp_path, capsys):
    _, path, given = clone
    ncdpo.train(config(demos=path, total_timesteps=0, finetune_steps=2, runs=str(tmp_path), **given))
    run, agent = tmp_path / "TinyBox-v0__ncdpo__1", checkpoint_of(tmp_path / "TinyBox-v0__ncdpo__1")["agent"]
    assert all(torch.equal(tensor, agent[name.replace("denoiser", "frozen")])
               for name, tensor in agent.items() if ".denoiser." in name)
    flags = ["--init-from", run, "--total-timesteps", "512", "--finetune-steps"]
    assert "--finetune-steps 2" in complaint(capsys, *flags, "1")  # its second network would be used for other steps


def test_fine_tuning_again_keeps_the_floor_that_was_asked_for(tmp_path):
    given = dict(env="TinyBox-v0", algo="dppo", denoising_steps=3)
    ncdpo.train(config(min_std=0.1, runs=str(tmp_path), **given))
    trainer = ncdpo.Trainer(config(min_std=0.4, **given))
    trainer.init_from(tmp_path / "TinyBox-v0__dppo__1")
    assert trainer.agent.policy.head.log_std.exp().tolist() == pytest.approx([0.4] * 2)


def test_averaging_log_likelihoods_does_not_touch_a_single_choice():
    batches = []
    for mean in (False, True):
        trainer = ncdpo.Trainer(config(mean_log_prob=mean))
        batches.append(trainer.iterate())
    assert batches[0]["policy_loss"] == batches[1]["policy_loss"] and batches[0]["approx_kl"] == batches[1]["approx_kl"]


def test_collected_demonstrations_are_what_the_run_plays(clone, tmp_path, capsys):
    """Recorded step by step although the policy decides chunks; read again, they are whole episodes of the task."""
    path = tmp_path / "own.npz"
    assert main(["--collect", str(clone[0]), "--demo-steps", "100", "--demos-out", str(path), "--deterministic"]) == 0
    demos = ncdpo.read_demos(str(path))
    ends = demos["terminations"] | demos["truncations"]
    obs, played = demos["observations"], demos["actions"].sum(1)
    assert len(ends) == 100 and ends.sum() == 2 * math.ceil(50 / 8)  # two environments, episodes of eight steps
    follows = ~ends[:-1]
    np.testing.assert_allclose(obs[1:, 2][follows], played[:-1][follows], rtol=1e-5)  # obs[2] is the last action's sum
    np.testing.assert_allclose(demos["rewards"], played + obs[:, 0], rtol=1e-5)
    whole = demos["rewards"].reshape(2, 50)[:, :48].sum() / 12  # the last two steps of each environment are cut off
    assert f"12 whole episodes of mean return {whole:.1f}" in capsys.readouterr().out
    ncdpo.load_demos(str(path), VectorEnv("TinyBox-v0", 2, CPU, chunk=2))
    assert "exists" in complaint(capsys, "--collect", clone[0], "--demos-out", path)
    assert "folder" in complaint(capsys, "--collect", clone[0], "--demos-out", tmp_path / "none" / "own.npz")
    assert "--demo-steps" in complaint(capsys, "--collect", clone[0], "--demo-steps", "0", "--demos-out", tmp_path / "x")


def test_training_stops_at_the_return_it_was_asked_for(tmp_path, capsys):
    history = ncdpo.train(config(stop_at_return=10.0, total_timesteps=2560, runs=str(tmp_path)))
    assert len(history["update"]) < 40 and "--stop-at-return 10" in capsys.readouterr().out


# --- 9 - 11  runs ----------------------------------------------------------------------------------------------------

def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows_of(run, name="metrics.csv"):
    with open(run / name, newline="") as file:
        return [{key: cell for key, cell in row.items() if not key.startswith("seconds")}
                for row in csv.DictReader(file)]


def checkpoint_of(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)


def same(one, other):
    """Whether two nested states are equal to the last bit, but for the time they took."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one if k != "seconds")
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of CartPole, and what its training printed."""
    runs = tmp_path_factory.mktemp("finished")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr(ncdpo, "print", lambda *words, **_: printed.append(" ".join(map(str, words))), raising=False)
        ncdpo.train(config(runs=str(runs)))
    return runs / "CartPole-v1__ncdpo__1", "\n".join(printed)


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run."""
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


@pytest.mark.parametrize("algo, env", [("ncdpo", "CartPole-v1"), ("dppo", "Pendulum-v1"), ("ppo", "Pendulum-v1")])
def test_same_seed_gives_the_same_metrics_and_another_seed_gives_others(tmp_path, algo, env):
    def metrics(seed, name):
        c = config(algo=algo, env=env, seed=seed, runs=str(tmp_path / name), total_timesteps=128, episodes=1)
        ncdpo.train(c)
        return rows_of(tmp_path / name / f"{env}__{algo}__{seed}")

    one, again, other = metrics(1, "one"), metrics(1, "again"), metrics(2, "other")
    assert len(one) == 2 and one == again
    assert all(a["value_loss"] != b["value_loss"] for a, b in zip(one, other))


def test_a_run_is_never_overwritten(tmp_path, run):
    before = contents(run)
    c = config(runs=str(tmp_path), seed=9)
    names = []
    for _ in range(3):
        names.append(ncdpo.new_run_folder(c).name)
        (tmp_path / names[-1] / "mine").write_text(names[-1])
    assert names == ["CartPole-v1__ncdpo__9", "CartPole-v1__ncdpo__9-2", "CartPole-v1__ncdpo__9-3"]
    assert all((tmp_path / name / "mine").read_text() == name for name in names) and contents(run) == before


def test_checkpoint_restores_everything(run):
    trainer, saved = ncdpo.Trainer(config(total_timesteps=512)), checkpoint_of(run)
    fresh = trainer.state_dict()
    assert not any(same(fresh[name], saved[name]) for name in ("agent", "optimizer", "random", "update"))
    trainer.resume(run)
    assert same(trainer.state_dict(), saved) and torch.equal(torch.get_rng_state(), saved["random"])
    assert saved["agent"]["obs_norm.count"] == saved["agent"]["reward_norm.count"] == 256
    row = trainer.iterate()
    assert (row["update"], row["step"]) == (5, 320) and row["learning_rate"] == pytest.approx(5e-4 * (1 - 4 / 8))


def test_resumed_run_equals_one_that_was_never_interrupted(tmp_path, monkeypatch):
    """In an environment whose episodes end with each rollout and start alike, nothing may differ by a bit."""
    c = config(env="TinyFixed-v0", checkpoint_every=2, total_timesteps=320, runs=str(tmp_path / "whole"))
    ncdpo.train(c)
    iterate = ncdpo.Trainer.iterate

    def power_cut(self):
        if self.done == 3:
            raise MemoryError
        return iterate(self)

    monkeypatch.setattr(ncdpo.Trainer, "iterate", power_cut)
    c.runs = str(tmp_path / "cut")
    with pytest.raises(MemoryError):
        ncdpo.train(c)
    monkeypatch.undo()
    whole, cut = (tmp_path / name / "TinyFixed-v0__ncdpo__1" for name in ("whole", "cut"))
    assert checkpoint_of(cut)["update"] == 2 and len(rows_of(cut)) == 3  # a row that no checkpoint has
    history = ncdpo.train(c, resume=cut)
    assert history["update"].tolist() == [1, 2, 3, 4, 5] and (np.diff(history["seconds"]) > 0).all()
    assert rows_of(cut) == rows_of(whole) and same(checkpoint_of(cut), checkpoint_of(whole))


def test_printed_evaluation_is_that_of_a_later_one(finished):
    run, printed = finished
    later = ncdpo.describe(ncdpo.evaluate(run, 2, device="cpu")).splitlines()
    assert "return" in later[0] and "return" in later[1]
    assert later[0] in printed.splitlines() and later[1] in printed.splitlines()


def test_evaluation_leaves_random_state_and_run_alone(run):
    before, files = torch.get_rng_state(), contents(run)
    np.random.seed(0)
    numbers = np.random.get_state()[1].copy()
    one, two = ncdpo.evaluate(run, 3, device="cpu"), ncdpo.evaluate(run, 3, device="cpu")
    assert all(np.array_equal(one[way]["return"], two[way]["return"]) for way in ("with noise", "without noise"))
    assert contents(run) == files
    assert torch.equal(torch.get_rng_state(), before) and np.array_equal(np.random.get_state()[1], numbers)


def test_evaluation_plays_one_whole_episode_in_each_environment(tmp_path):
    ncdpo.train(config(env="Tiny-v0", runs=str(tmp_path), total_timesteps=64, episodes=1))
    result = ncdpo.evaluate(tmp_path / "Tiny-v0__ncdpo__1", 5, device="cpu")
    for way in ("with noise", "without noise"):
        assert result[way]["length"].tolist() == [8] * 5
        assert len(set(result[way]["return"])) == 5  # each has a start of its own, which is in its rewards
        assert (8 * 5 <= result[way]["return"]).all() and (result[way]["return"] <= 8 * 8).all()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_stops_training_after_a_checkpoint_and_resume_finishes(tmp_path, name):
    command = [sys.executable, str(HERE / "ncdpo.py"), "--env", "CartPole-v1", "--no-compile", "--device", "cpu",
               "--num-steps", "16", "--minibatch-size", "256", "--episodes", "1", "--runs", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run, patience = tmp_path / "CartPole-v1__ncdpo__1", time.monotonic() + 120
    while not ((run / "metrics.csv").is_file() and len(rows_of(run)) >= 2) and time.monotonic() < patience:
        time.sleep(0.05)
    process.send_signal(getattr(signal, name))
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0 and error == ""
    assert f"--resume {run}" in out and name in out
    done = checkpoint_of(run)["update"]
    assert done == len(rows_of(run)) >= 2
    assert main(["--resume", str(run), "--total-timesteps", str(256 * (done + 1))]) == 0
    assert [int(row["update"]) for row in rows_of(run)] == list(range(1, done + 2))


@pytest.mark.parametrize("moment", ["before the first update", "between two updates"])
def test_a_signal_between_updates_loses_none(tmp_path, monkeypatch, capsys, moment):
    """Not while an update runs, but while a line is printed: nothing may be lost then either."""
    kills, bar = [], ncdpo.tqdm

    def interrupt(*words, **_):
        if not kills and (not words or "steps/s" in words[0]):
            kills.append(os.kill(os.getpid(), signal.SIGINT))

    if moment == "between two updates":
        monkeypatch.setattr(ncdpo, "print", interrupt, raising=False)
    else:
        monkeypatch.setattr(ncdpo, "tqdm", lambda **given: (interrupt(), bar(**given))[1])
    assert main(arguments("CartPole-v1", tmp_path, "--checkpoint-every", "3")) == 0 and kills
    assert "Traceback" not in capsys.readouterr().err
    run = tmp_path / "CartPole-v1__ncdpo__1"
    assert checkpoint_of(run)["update"] == len(rows_of(run)) == (moment == "between two updates")
    monkeypatch.undo()
    assert main(["--resume", str(run)]) == 0 and len(rows_of(run)) == 4


# --- 11  command line: mistakes ---------------------------------------------------------------------------------------

def arguments(env, runs, *more):
    return ["--env", env, "--runs", str(runs), "--no-compile", "--device", "cpu", "--num-envs", "2", "--hidden", "8",
            "--num-steps", "16", "--minibatch-size", "16", "--total-timesteps", "128", "--episodes", "1",
            "--checkpoint-every", "1", *more]


def complaint(capsys, *flags):
    """The one line with which the program refuses; asserts that it is one."""
    capsys.readouterr()
    try:
        code = main([str(flag) for flag in flags])
    except SystemExit as leaving:
        code = leaving.code
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("ncdpo: ") and error.endswith("\n") and error.count("\n") == 1, error
    return error


no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with CUDA")


@pytest.mark.parametrize("flags, words", [
    (["--env", "HalfCheeta-v4"], "did you mean HalfCheetah-v4"),
    (["--env", "Nothing-like-it"], "unknown environment"),
    (["--env", "nowhere:Thing-v0"], "nowhere"),
    (["--env", "Hopper-v3"], "Hopper-v3"),  # its simulator is gone
    (["--env", "TinyDict-v0"], "only Box"),
    (["--env", "TinyMulti-v0"], "only Discrete and bounded"),
    (["--env", "TinyUnbounded-v0"], "only Discrete and bounded"),
    (["--denoising-steps", "0"], "--denoising-steps"),
    (["--denoising-steps", "101"], "between 1 and 100"),
    (["--minibatch-size", "4096"], "at most 2048"),
    (["--total-timesteps", "100"], "--total-timesteps"),
    (["--num-envs", "-1"], "--num-envs"),
    (["--num-envs", "0"], "--num-envs"),
    (["--update-epochs", "0"], "--update-epochs"),
    (["--checkpoint-every", "0"], "--checkpoint-every"),
    (["--learning-rate", "-1"], "--learning-rate"),
    (["--learning-rate", "nan"], "--learning-rate"),
    (["--clip-coef", "inf"], "--clip-coef"),
    (["--gamma", "1.5"], "--gamma"),
    (["--eta", "-0.5"], "--eta"),
    (["--seed", "-1"], "--seed"),
    (["--episodes", "0"], "--episodes"),
    (["--target-kl", "nan"], "--target-kl"),
    (["--bc-coef", "0.1"], "--demos"),
    (["--scored-steps", "2"], "--algo dppo"),
    (["--algo", "dppo", "--scored-steps", "6"], "--denoising-steps"),
    (["--num-envs", "2", "--num-steps", "1", "--minibatch-size", "1", "--total-timesteps", "2"], "--minibatch-size"),
    (["--device", "nonsense"], "--device"),
    pytest.param(["--device", "cuda"], "--device cuda", marks=no_cuda),
    (["--resume", "nowhere"], "nowhere"),
    (["--evaluate", "nowhere"], "nowhere"),
])
def test_a_mistake_is_told_in_one_line_and_leaves_nothing_behind(tmp_path, capsys, flags, words):
    if not {"--env", "--resume", "--evaluate"} & set(flags):
        flags = ["--env", "CartPole-v1", *flags]
    assert words in complaint(capsys, "--runs", tmp_path / "runs", "--no-compile", *flags)
    assert not list(tmp_path.iterdir())


def test_runs_that_cannot_be_a_folder_is_a_mistake(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert "file" in complaint(capsys, *arguments("CartPole-v1", tmp_path / "file"))
    assert contents(tmp_path) == {Path("file"): b"mine"}


@pytest.mark.parametrize("flag", ["--evaluate", "--resume"])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "text", "foreign", "list", "config"])
def test_a_damaged_run_is_told_in_one_line(run, capsys, flag, damage):
    path = run / "checkpoint.pt"
    if damage == "missing":
        path.unlink()
    elif damage in ("foreign", "list"):
        torch.save({"model": torch.ones(2)} if damage == "foreign" else [1, 2], path)
    elif damage == "config":
        (run / "config.json").write_text('{"learning_speed": 1}')
    else:
        path.write_bytes({"empty": b"", "text": b"hello\n", "truncated": path.read_bytes()[:5000]}[damage])
    before = contents(run)
    assert str(run) in complaint(capsys, flag, run, *([] if flag == "--evaluate" else ["--total-timesteps", "512"]))
    assert contents(run) == before


@pytest.mark.parametrize("flags", [
    ["--env", "Pendulum-v1"], ["--env", "Tiny-v0"], ["--hidden", "32"], ["--algo", "ppo"], ["--algo", "dppo"],
    ["--predict", "epsilon"], ["--denoising-steps", "7"], ["--activation", "tanh"], ["--num-envs", "4"]])
def test_resume_refuses_another_task_or_policy(run, capsys, flags):
    """Also where the weights would fit: a run must not silently become another one."""
    before = contents(run)
    complaint(capsys, "--resume", run, "--total-timesteps", "4096", *flags)
    assert contents(run) == before


def test_resume_of_a_finished_run_says_so(run, capsys):
    before = contents(run)
    assert "--total-timesteps" in complaint(capsys, "--resume", run)
    assert contents(run) == before


@pytest.mark.parametrize("flags", [["--episodes", "0"], ["--episodes", "-3"], ["--device", "nonsense"],
                                   ["--eta", "0.5"]])
def test_evaluation_refuses_bad_numbers_and_what_it_would_ignore(run, capsys, flags):
    assert flags[0] in complaint(capsys, "--evaluate", run, *flags)


def test_resumed_run_plays_new_episodes(run):
    trainer = ncdpo.Trainer(config(total_timesteps=512))
    first = trainer.obs
    trainer.resume(run)
    assert not torch.isin(trainer.obs, first).any()


def test_evaluation_starts_elsewhere_than_training_and_freezes_the_normaliser(run, monkeypatch):
    reset, starts = VectorEnv.reset, []
    monkeypatch.setattr(VectorEnv, "reset", lambda *given: starts.append(reset(*given)) or starts[-1])
    ncdpo.Trainer(config())
    monkeypatch.delattr(ncdpo.Normalizer, "update")
    ncdpo.evaluate(run, 2, device="cpu")
    training, with_noise, without_noise = starts
    assert torch.equal(with_noise, without_noise) and not torch.isin(training, with_noise).any()


def test_evaluation_counts_first_episodes_and_leaves_the_noise_out_where_it_says_so(run, monkeypatch):
    step, sample, played = VectorEnv.step, ncdpo.Categorical.sample, []
    monkeypatch.setattr(VectorEnv, "step", lambda *given: played.append(step(*given)) or played[-1])
    monkeypatch.setattr(ncdpo.Categorical, "sample", lambda *given: sample(*given) * bool(given[-1].any()))
    result = ncdpo.evaluate(run, 8, device="cpu")
    ended = torch.stack([terminated | truncated for _, _, terminated, truncated, _ in played]).int()
    n = int(result["with noise"]["length"].max())
    for way, part in (("with noise", ended[:n]), ("without noise", ended[n:])):
        assert result[way]["length"].tolist() == result[way]["return"].tolist() == (part.argmax(0) + 1).tolist()
    assert len(ended) - n <= 11 < n  # a cart that is always pushed to the left falls within 11 steps


def test_film_shows_every_other_step_of_the_first_episode(run, tmp_path):
    pytest.importorskip("pygame")
    imageio = pytest.importorskip("imageio")
    result = ncdpo.evaluate(run, 2, str(tmp_path / "film.gif"), "cpu")
    frames = imageio.mimread(tmp_path / "film.gif")
    assert len(frames) == math.ceil(result["without noise"]["length"][0] / 2) and frames[0].shape[:2] == (400, 600)


def test_signal_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with ncdpo.signals(print, signal.SIGTERM):
        assert signal.getsignal(signal.SIGTERM) is print
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_signal_interrupts_at_once(tmp_path, monkeypatch, capsys):
    twice = lambda self: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)] and pytest.fail("went on")
    monkeypatch.setattr(ncdpo.Trainer, "iterate", twice)
    assert main(arguments("CartPole-v1", tmp_path)) == 130
    assert capsys.readouterr().err == "ncdpo: interrupted.\n" and rows_of(tmp_path / "CartPole-v1__ncdpo__1") == []


@pytest.mark.parametrize("given", [dict(algo="sac"), dict(predict="x0"), dict(eta=1.5), dict(gae_lambda=1.1),
                                   dict(gamma_denoising=-0.1), dict(ent_coef=-1), dict(vf_coef=-1)])
def test_configurations_made_in_python_are_checked_too(given):
    with pytest.raises(UserError, match="--" + next(iter(given)).replace("_", "-")):
        config(**given).check()


def test_defaults_are_the_presets_of_the_task_but_for_what_is_given():
    hopper = ncdpo.PRESETS["Hopper"]
    parsed = ncdpo.parse(["--env", "Hopper-v4", "--gamma", "0.5"])[0]
    made = ncdpo.Config.for_task("x/Hopper-v5", gamma=0.5)
    for c in (parsed, made):
        assert (c.gamma, c.init_std, c.min_std) == (0.5, hopper["init_std"], hopper["min_std"])
        assert c.learning_rate == ncdpo.Config.learning_rate and hopper["init_std"] != ncdpo.Config.init_std


@pytest.mark.parametrize("flags", [["--eta", "0.5"], ["--clip-denoised", "2"], ["--temperature", "0.5"],
                                   ["--min-std", "0.5"], ["--num-steps", "16"]])
def test_resume_refuses_another_chain(run, capsys, flags):
    assert f"leave out {flags[0]}," in complaint(capsys, "--resume", run, "--total-timesteps", "4096", *flags)


def test_training_of_another_seed_starts_elsewhere():
    assert not torch.isin(*(ncdpo.Trainer(config(seed=seed)).obs for seed in (1, 2))).any()


def test_empty_cells_of_metrics_are_not_numbers(tmp_path):
    (tmp_path / "metrics.csv").write_text(",".join(ncdpo.COLUMNS) + "\n1,64" + "," * (len(ncdpo.COLUMNS) - 2) + "\n")
    history = ncdpo.read_metrics(tmp_path)
    assert history["step"] == 64 and all(np.isnan(history[name]).all() for name in ncdpo.COLUMNS[2:])


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("writer failed\nat ...")])
def test_a_full_disk_keeps_the_previous_checkpoint(run, capsys, monkeypatch, error):
    before = (run / "checkpoint.pt").read_bytes()

    def full(state, file):
        file.write(b"half a checkpoint")
        raise error

    monkeypatch.setattr(torch, "save", full)
    assert "cannot write" in complaint(capsys, "--resume", run, "--total-timesteps", "512")
    assert (run / "checkpoint.pt").read_bytes() == before and not list(run.glob("*.tmp"))
    assert len(rows_of(run)) >= 4
    monkeypatch.undo()
    assert main(["--resume", str(run), "--total-timesteps", "512"]) == 0
    assert [row["update"] for row in rows_of(run)] == [str(i) for i in range(1, 9)]


@pytest.mark.parametrize("wrong", ["observation", "reward", "exception"])
@pytest.mark.parametrize("vector", ["sync", "async"])
def test_an_environment_that_breaks_keeps_the_last_good_checkpoint(tmp_path, capsys, monkeypatch, wrong, vector):
    monkeypatch.setattr(Tiny, "made_to_fail", (40, wrong))  # in the third rollout of 16 steps
    error = complaint(capsys, *arguments("TinyBox-v0", tmp_path, "--vector", vector))
    run = tmp_path / "TinyBox-v0__ncdpo__1"
    assert f"--resume {run}" in error
    assert "ZeroDivisionError" in error if wrong == "exception" else "update 3" in error
    state = checkpoint_of(run)
    assert state["update"] == len(rows_of(run)) == 2
    assert all(torch.isfinite(tensor).all() for tensor in state["agent"].values())


def test_a_loss_that_is_not_a_number_keeps_the_last_good_checkpoint(tmp_path, capsys, monkeypatch):
    loss, calls = ncdpo.ppo_loss, []

    def poisoned(*args, **batch):
        calls.append(1)
        value, diagnostics = loss(*args, **batch)
        return (value, diagnostics) if len(calls) <= 2 * 2 * 5 else (value * math.nan, diagnostics)

    monkeypatch.setattr(ncdpo, "ppo_loss", poisoned)
    assert "update 3" in complaint(capsys, *arguments("TinyBox-v0", tmp_path))
    state = checkpoint_of(tmp_path / "TinyBox-v0__ncdpo__1")
    assert state["update"] == 2 and all(torch.isfinite(tensor).all() for tensor in state["agent"].values())


# --- notebooks/curves.py ---------------------------------------------------------------------------------------------

@pytest.fixture
def curves(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE / "notebooks"))
    return pytest.importorskip("curves")


def test_interquartile_mean_cuts_a_quarter_at_each_end(curves):
    assert curves.interquartile_mean([100.0, 1, 2, 3, -50]) == 2  # of five, one at each end, as scipy's trim_mean
    x = np.random.default_rng(0).normal(size=(3, 8))
    np.testing.assert_allclose(curves.interquartile_mean(x, 1), np.sort(x)[:, 2:6].mean(1))


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says(curves):
    draws = np.random.default_rng(1).normal(size=(400, 30))
    low, high = curves.interval(np.stack([curves.bootstrap(x, 400) for x in draws], 1))
    assert 0.88 < np.mean((low < 0) & (0 < high)) < 0.98


def test_ratio_of_known_sets_of_seeds(curves):
    point, low, high = curves.ratio([20.0] * 5, [10.0] * 5)
    assert (point, low, high) == (2, 2, 2)
    point, low, high = curves.ratio([9.0, 10, 10, 10, 50], [1.0, 5, 5, 5, 6])
    assert point == 2 and low <= point <= high and low < high


def test_steps_to_a_threshold_are_those_of_a_straight_line(curves):
    curve = {"step": np.arange(1, 101)[None] * 10_000.0, "return": np.arange(100)[None] * 1.0}
    steps = curves.reach({name: x.repeat(2, 0) for name, x in curve.items()}, 50)
    assert steps.shape == (2,) and abs(steps[0] - 0.53) < 0.011  # the mean of five rows lags by two
    assert np.isinf(curves.reach(curve, 1000)).all()


def test_thinned_curve_keeps_episodes_and_their_mean_return(curves):
    rng = np.random.default_rng(2)
    history = {"step": np.arange(1, 1001) * 64.0, "seconds": np.arange(1, 1001) * 0.5,
               "episodes": rng.integers(0, 3, 1000).astype(float), "return": rng.normal(size=1000),
               "length": rng.normal(size=1000), **{name: rng.normal(size=1000) for name in curves.DIAGNOSTICS}}
    history["chain_std"][:] = np.nan  # MLP+PPO has no chain
    history["return"][history["episodes"] == 0] = np.nan
    rows = curves.thin(history)
    episodes = np.array([row["episodes"] for row in rows])
    assert len(rows) == 100 and episodes.sum() == history["episodes"].sum()
    mean = np.average([float(row["return"]) for row in rows], weights=episodes)
    assert mean == pytest.approx(np.nansum(history["return"] * history["episodes"]) / episodes.sum(), abs=1e-4)
    assert float(rows[7]["sigma"]) == pytest.approx(history["sigma"][70:80].mean(), rel=1e-3)
    assert {row["chain_std"] for row in rows} == {""}


def test_table_of_curves_that_are_straight_lines(curves, tmp_path):
    """Return slope * seed * t at row t of 100; no episode ends in each seventh row, ten in the last one, else one."""
    for algo, slope in (("ncdpo", 2), ("ppo", 1)):
        with open(tmp_path / f"Task-v1__{algo}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, curves.COLUMNS)
            writer.writeheader()
            for seed, t in itertools.product(range(1, 6), range(1, 101)):
                n = 0 if t % 7 == 0 else 10 if t == 100 else 1
                writer.writerow({"seed": seed, "step": t, "seconds": 60 * t * seed, "episodes": n,
                                 "return": slope * seed * t if n else ""})
    ours, theirs = ([cell.strip() for cell in line.split("|")] for line in
                    curves.table(curves.load(tmp_path)).splitlines()[2:])
    # the middle seeds are 2, 3, 4; of the last ten rows 91 and 98 are empty: (92 + ... + 99 - 98 + 10 * 100) / 17 = 98
    assert ours[1:4] == ["Task-v1", "NCDPO", "5"] and ours[4].startswith("588 [") and ours[5].startswith("303 [")
    assert theirs[4].startswith("294 [") and ours[6] == "" and ours[8] == theirs[8] == "300.0"
    assert theirs[6].startswith("2.00 [") and theirs[7].startswith("2.00 [")


def test_interquartile_mean_rounds_the_quarter_down(curves):
    assert curves.interquartile_mean([100.0, 1, 2, 6, -50]) == 3  # (1 + 2 + 6) / 3, not the median


def test_interval_leaves_a_fortieth_at_each_end(curves):
    np.testing.assert_allclose(curves.interval(np.arange(101.0)), [2.5, 97.5])


# --- the notebooks ---------------------------------------------------------------------------------------------------

NOTEBOOKS = sorted((HERE / "notebooks").glob("*.ipynb"))


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cell):
    """What a cell leaves on the page: the kinds of its outputs, but for warnings."""
    data = [{"image/png", "text/markdown", "text/html"} & set(out.data) for out in cell.outputs if "data" in out]
    return data, any(out.output_type == "stream" and out.name == "stdout" for out in cell.outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_shows_what_it_showed_when_it_was_committed(path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    committed = nbformat.read(path, as_version=4)
    assert [cell.execution_count for cell in code_cells(committed)] == list(range(1, len(code_cells(committed)) + 1))
    fresh = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(fresh, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
    for was, now in zip(code_cells(committed), code_cells(fresh)):
        assert shown(was) == shown(now), was.source


def test_every_equation_of_the_readme_is_in_a_notebook():
    labels = set(re.findall(r"^\| (E\d+) \|", (HERE / "README.md").read_text(), re.MULTILINE))
    texts = [cell["source"] for path in NOTEBOOKS for cell in json.loads(path.read_text())["cells"]
             if cell["cell_type"] == "markdown"]
    assert len(labels) >= 15 and len(NOTEBOOKS) >= 4
    assert labels <= set(re.findall(r"\bE\d+\b", "".join("".join(text) for text in texts)))


# --- the whole -------------------------------------------------------------------------------------------------------

def test_ncdpo_learns_cartpole(tmp_path, capsys):
    flags = dict(num_envs=8, num_steps=128, minibatch_size=256, update_epochs=10, learning_rate=2e-3, hidden=64,
                 denoising_steps=3, gamma=0.98, gae_lambda=0.95, total_timesteps=36_864, episodes=1)
    line = [word for name, value in flags.items() for word in ("--" + name.replace("_", "-"), str(value))]
    assert main(["--env", "CartPole-v1", "--algo", "ncdpo", "--no-compile", "--runs", str(tmp_path), *line]) == 0
    returns = [float(row["return"]) for row in rows_of(tmp_path / "CartPole-v1__ncdpo__1") if row["return"]]
    assert np.convolve(returns, np.ones(4) / 4, "valid").max() > 400  # four updates in a row


def test_import_prints_and_writes_nothing(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(HERE), "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run([sys.executable, "-c", "import ncdpo"], cwd=tmp_path, env=environment, capture_output=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags, code, words", [
    (["--help"], 0, ["--total-timesteps", "--num-envs", "--gae-lambda", "--clip-coef", "--resume", "--evaluate"]),
    (["--env", "HalfCheeta-v4"], 2, ["ncdpo: unknown environment 'HalfCheeta-v4'; did you mean HalfCheetah-v4"])])
def test_program_answers_from_any_folder(tmp_path, flags, code, words):
    command = [sys.executable, "-B", str(HERE / "ncdpo.py"), *flags]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == code and not list(tmp_path.iterdir())
    said, silent = (result.stdout, result.stderr) if code == 0 else (result.stderr, result.stdout)
    assert all(word in said for word in words) and silent == "" and (code == 0 or said.count("\n") == 1)


def test_dependencies_of_the_script_are_declared_in_both_places():
    tomllib = pytest.importorskip("tomllib")
    source = (HERE / "ncdpo.py").read_text()
    header = re.search(r"^# /// script\n((?:#(?: .*)?\n)+?)# ///$", source, re.MULTILINE).group(1)
    meta = tomllib.loads(re.sub(r"^# ?", "", header, flags=re.MULTILINE))
    name_of = lambda line: re.match(r"[\w.-]+", line).group().lower().replace("_", "-")
    declared = {name_of(line) for line in meta["dependencies"]}
    imported = {name.split(".")[0] for node in ast.walk(ast.parse(source)) for name in
                ([alias.name for alias in node.names] if isinstance(node, ast.Import) else
                 [node.module] if isinstance(node, ast.ImportFrom) else [])} - set(sys.stdlib_module_names)
    assert imported - {"envpool", "imageio"} <= declared and "requires-python" in meta
    lines = (HERE / "requirements.txt").read_text().splitlines()
    assert declared <= {name_of(line) for line in lines if re.match(r"\w", line)}

"""Facts about ncdpo.py, one a test: python -m pytest -q test_ncdpo.py -m "not notebooks" (two minutes).

What is compared with is a closed form or another computation, never a recorded output. (E1) ... (E18) are the labels of
README.md's equations. torch.compile is off but in test_compiled_loss_and_gradients_equal_the_plain_ones.
"""

import ast
import csv
import dataclasses
import importlib.util
import itertools
import json
import math
import operator
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.distributions import Categorical, Normal
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import ncdpo
from ncdpo import UserError, VectorEnv, main, make_env
from notebooks import cloning, health, physics

HERE = Path(__file__).resolve().parent
CPU = torch.device("cpu")
PREDICT = ["sample", "epsilon", "v"]
ALGORITHMS = ["ncdpo", "ppo", "dppo"]
WIDE = 1e9  # a clip of the clean estimate that never bites
torch.set_num_threads(1)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of a marker that no configuration file registers
    notebooks = pytest.mark.notebooks


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
    return shaken(ncdpo.make_policy(config(algo=algo, **given), obs_dim, act_dim, discrete))


# --- environments of the tests ---------------------------------------------------------------------------------------

class Tiny(gym.Env):
    """Observation (2, 3): where the episode started (drawn by reset), the step, the last action, then zeros."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 125}
    made_to_fail = None  # (after so many steps of this object, what goes wrong)

    def __init__(self, action_space=gym.spaces.Discrete(3, start=5), observation_space=None, random_start=True,
                 terminates_after=math.inf, render_mode=None):
        self.action_space, self.random_start, self.terminates_after = action_space, random_start, terminates_after
        self.observation_space = observation_space or gym.spaces.Box(-np.inf, np.inf, (2, 3), np.float32)
        self.played, self.render_mode = 0, render_mode

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
            worse = np.nan if wrong == "observation" else np.inf  # the normaliser clips what is infinite
            obs, reward = (obs, reward * np.nan) if wrong == "reward" else (obs + worse, reward)
        return obs, reward, self.t >= self.terminates_after, False, {}

    def render(self):
        assert self.render_mode == "rgb_array"
        return np.full((32, 48, 3), 7 * self.t, np.uint8)  # the step as a shade of grey


def register(name, steps=8, **arguments):
    gym.register(name, entry_point=Tiny, max_episode_steps=steps, kwargs=arguments)


BOX = gym.spaces.Box(np.array([-1, 2], np.float32), np.array([3, 10], np.float32))
register("Tiny-v0")
register("TinyBox-v0", action_space=BOX)
register("TinyWide-v0", action_space=gym.spaces.Box(-2.0, 6.0, (2,), np.float64), steps=21)
register("TinyFixed-v0", steps=32, action_space=BOX, random_start=False)
register("TinyEnds-v0", steps=32, action_space=BOX, terminates_after=7)
register("TinyEndless-v0", steps=None)
register("TinyDict-v0", observation_space=gym.spaces.Dict(a=BOX))
register("TinyMulti-v0", action_space=gym.spaces.MultiDiscrete([2, 3]))
register("TinyUnbounded-v0", action_space=gym.spaces.Box(-np.inf, np.inf, (2,)))


# --- 1  noise schedule -----------------------------------------------------------------------------------------------

def cosine_tables(K):
    """abar_0 ... abar_K and beta_1 ... beta_K (beta_0 unused) of the cosine schedule, from its definition."""
    f = lambda k: math.cos((k / K + 0.008) / 1.008 * math.pi / 2) ** 2
    beta = [0.0] + [min(1 - f(k) / f(k - 1), 0.999) for k in range(1, K + 1)]
    return [math.prod(1 - b for b in beta[:k + 1]) for k in range(K + 1)], beta


def perfect_output(predict, abar, x, x0):
    """What a network that knows x0 must say at x = sqrt(abar) x0 + sqrt(1 - abar) eps (E2)."""
    eps = (x - abar**0.5 * x0) / (1 - abar) ** 0.5
    return {"sample": x0 + 0 * x, "epsilon": eps, "v": abar**0.5 * eps - (1 - abar) ** 0.5 * x0}[predict]


@pytest.mark.parametrize("K, S", [(1, None), (2, None), (5, None), (100, None), (20, 5), (20, 1), (7, 3)])
@pytest.mark.parametrize("predict", PREDICT)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_reverse_step_is_ddpms_posterior_at_eta_1_and_ddims_step_at_eta_0(float64, K, S, predict, eta):  # E3, E4, E18
    schedule, (abar, betas) = ncdpo.Schedule(K, predict, eta, WIDE, S), cosine_tables(K)
    tau = [round(K * k / (S or K)) for k in range((S or K) + 1)]
    x0, x = torch.randn(2, 7, 4)
    for k in range(1, len(tau)):
        now, before = abar[tau[k]], abar[tau[k - 1]]
        beta = 1 - math.prod(1 - b for b in betas[tau[k - 1] + 1:tau[k] + 1])  # of all the steps that are one now
        mu = schedule.mu(schedule.clean(perfect_output(predict, now, x, x0), x, k), x, k)
        assert schedule.tau(k) == schedule.tau(torch.tensor(k)) == tau[k]
        if eta == 1:
            expected = (before**0.5 * beta * x0 + (1 - beta) ** 0.5 * (1 - before) * x) / (1 - now)
            variance = (1 - before) / (1 - now) * beta
        else:
            expected = before**0.5 * x0 + (1 - before) ** 0.5 * (x - now**0.5 * x0) / (1 - now) ** 0.5
            variance = 0.0
        torch.testing.assert_close(mu, expected, rtol=1e-8, atol=1e-8)
        assert schedule.sigma[k].item() ** 2 == pytest.approx(variance, abs=1e-12)


class Perfect(torch.nn.Module):
    """A denoiser that knows the clean action, and says it with an error of `shift`."""

    def __init__(self, policy, x0, shift=0.0):
        super().__init__()
        self.abar = torch.tensor(cosine_tables(len(policy.schedule.abar) - 1)[0])[:, None]
        self.predict, self.x0, self.shift, self.seen = policy.predict, x0, shift, set()

    def forward(self, x, k, obs):
        self.seen |= set(torch.as_tensor(k).flatten().tolist())
        return perfect_output(self.predict, self.abar[k], x, self.x0) + self.shift


@pytest.mark.parametrize("predict", PREDICT)
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_behaviour_cloning_loss_is_the_squared_error_against_a_perfect_network(float64, predict, shift):  # E2
    policy, action = make_policy(denoising_steps=7, sampling_steps=2, predict=predict), torch.randn(500, 2)
    policy.denoiser = Perfect(policy, action, shift)
    assert policy.bc_loss(torch.randn(500, 3), action).item() == pytest.approx(shift**2, abs=1e-20)
    assert policy.denoiser.seen == set(range(1, 8))


# --- 2  networks -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("algo", ALGORITHMS)
def test_untrained_policy_proposes_nearly_the_zero_action(algo):
    policy = ncdpo.make_policy(config(algo=algo, hidden=128), 17, 6, False)
    action = policy.sample(torch.randn(500, 17), deterministic=True)[0]
    assert 0 < action.abs().max() < 0.05


def test_each_denoising_step_has_an_embedding_of_its_own_on_circles():
    table = ncdpo.Denoiser(3, 2, 100, 8, "silu").embedding
    torch.testing.assert_close(table[:, :8] ** 2 + table[:, 8:] ** 2, torch.ones(101, 8))
    assert torch.pdist(table).min() > 0.5


def test_hidden_layers_begin_orthogonal_with_a_gain_of_root_two(float64):
    net = ncdpo.mlp(8, 8, 3, "tanh", gain=0.5)
    gains = [layer.weight @ layer.weight.T for layer in net[::2]]
    for gain, expected in zip(gains, (2 * torch.eye(8), 2 * torch.eye(8), 0.25 * torch.eye(3)), strict=True):
        torch.testing.assert_close(gain, expected)
    assert not any(layer.bias.any() for layer in net[::2])
    assert [type(layer) for layer in net[1::2]] == [torch.nn.Tanh] * 2


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
    assert norm(1e6 * torch.tensor([1.0, -1, 1, -1])).tolist() == [10.0, -10, 10, -10]


# --- 3 and 5  policies -----------------------------------------------------------------------------------------------

def reference_step(policy, predict, eta, x, k, obs):
    """mu_k and sigma_k of E3, E4, E18 as the README writes them, without the tables of Schedule."""
    K, S = len(policy.schedule.abar) - 1, policy.K
    abar, tau = cosine_tables(K)[0], round(K * k / S)
    now, before = abar[tau], abar[round(K * (k - 1) / S)]
    output = policy.denoiser(x, tau, obs)
    x0 = {"sample": output, "epsilon": (x - (1 - now) ** 0.5 * output) / now**0.5,
          "v": now**0.5 * x - (1 - now) ** 0.5 * output}[predict].clamp(-policy.schedule.clip, policy.schedule.clip)
    variance = eta**2 * (1 - before) / (1 - now) * (1 - now / before)
    eps = (x - now**0.5 * x0) / (1 - now) ** 0.5
    return before**0.5 * x0 + max(1 - before - variance, 0) ** 0.5 * eps, variance**0.5


@pytest.mark.parametrize("predict", PREDICT)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("K", [4, 8, 11])
def test_ncdpo_mean_is_the_sampler_run_on_given_noise(float64, predict, eta, K):  # E5, E6, E18
    policy = make_policy(denoising_steps=K, sampling_steps=4, predict=predict, eta=eta, clip_denoised=0.8)
    obs, omega = torch.randn(9, 3), torch.randn(9, 4, 2)
    noise = {"x4": omega[:, 0], 4: omega[:, 1], 3: omega[:, 2], 2: omega[:, 3], 1: 0.0}
    x = noise["x4"]
    for k in (4, 3, 2, 1):
        mu, sigma = reference_step(policy, predict, eta, x, k, obs)
        x = mu + sigma * noise[k]
    torch.testing.assert_close(policy.act(obs, omega, torch.zeros(9, 2))[0], x)


@pytest.mark.parametrize("M", [1, 2, 4, 5])
@pytest.mark.parametrize("predict, noise_scale, discrete, K", [
    ("sample", 1.0, False, 5), ("epsilon", 0.6, True, 5), ("v", 0.6, False, 12)])
def test_dppo_draws_and_scores_its_steps_as_a_plain_loop_does(float64, M, predict, noise_scale, discrete, K):
    """E15, E16: five steps, of K; the last M are scored, those before follow E5 on the noise that is kept."""
    given = dict(denoising_steps=K, sampling_steps=5, predict=predict, eta=0.7, min_std=0.3, temperature=0.5,
                 clip_denoised=0.8)
    policy = make_policy("dppo", discrete=discrete, scored_steps=M, noise_scale=noise_scale, **given)
    obs, (omega, noise) = torch.randn(11, 3), policy.noise(11)
    action, kept = policy.act(obs, omega, noise)
    x, expected = omega[:, 0], []
    for k in range(5, 0, -1):
        mu, sigma = reference_step(policy, predict, 0.7, x, k, obs)
        std, z = noise_scale * sigma, omega[:, 6 - k] / noise_scale if k > 1 else noise
        if k <= M:
            std = max(std, 0.3)
            end = Categorical(logits=mu / 0.5) if k == 1 and discrete else Normal(mu, std)
            x = action if k == 1 and discrete else mu + std * z
            expected.append(end.log_prob(x) if k == 1 and discrete else end.log_prob(x).sum(-1))
        else:
            x = mu + std * z
    torch.testing.assert_close(action, x)
    torch.testing.assert_close(policy.log_prob(obs, action, kept), torch.stack(expected, 1))
    assert kept.shape == (11, 5, 2)


@pytest.mark.parametrize("flows", [True, False])
def test_one_scored_step_is_ncdpo_with_or_without_its_gradient_through_the_chain(float64, flows):  # E16
    shared = dict(denoising_steps=4, min_std=0.3, init_std=0.3)
    one = make_policy("dppo", scored_steps=1, chain_gradient=flows, **shared)
    ncdpo_ = make_policy("ncdpo", **shared)
    ncdpo_.load_state_dict(one.state_dict())
    obs, action = torch.randn(9, 3), torch.randn(9, 2)
    omega, _ = one.noise(9)
    gradients = []
    for policy in (one, ncdpo_):
        log_prob = policy.log_prob(obs, action, omega)
        gradients.append(torch.autograd.grad(log_prob.sum(), list(policy.denoiser.parameters())))
    same = [torch.allclose(a, b) for a, b in zip(*gradients)]
    assert all(same) if flows else not any(same)
    torch.testing.assert_close(log_prob, one.log_prob(obs, action, omega)[:, 0])


def test_noise_scale_is_a_factor_of_the_chains_noise_alone():
    drawn = []
    for scale in (1.0, 0.3):
        policy = make_policy(noise_scale=scale)
        torch.manual_seed(1)
        drawn.append(policy.noise(9))
    (omega, noise), (quiet, same_noise) = drawn
    torch.testing.assert_close(0.3 * omega, quiet)
    assert torch.equal(noise, same_noise)


@pytest.mark.parametrize("algo", ["ncdpo", "dppo"])
def test_frozen_steps_keep_the_network_they_began_with(tmp_path, algo):
    given = dict(env="TinyBox-v0", algo=algo, denoising_steps=4, hidden=8, total_timesteps=64, episodes=1)
    ncdpo.train(config(runs=str(tmp_path), **given))
    run = tmp_path / f"TinyBox-v0__{algo}__1"
    trainer = ncdpo.Trainer(config(finetune_steps=2, min_std=0.4, init_from=str(run), **given))
    trainer.init_from(run)
    tuned, frozen = trainer.policy.denoiser.denoiser, trainer.policy.denoiser.frozen
    before = [p.clone() for p in frozen.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, tuned.parameters()))
    trainer.iterate()
    assert all(torch.equal(a, b) for a, b in zip(before, frozen.parameters()))
    assert not any(torch.equal(a, b) for a, b in zip(before, tuned.parameters()))
    used, forward = [], type(tuned).forward
    for net, name in ((tuned, "tuned"), (frozen, "frozen")):
        net.forward = lambda x, k, obs, net=net, name=name: used.append((name, k)) or forward(net, x, k, obs)
    trainer.policy.act(torch.randn(3, 6), *trainer.policy.noise(3))
    assert used == [("frozen", 4), ("frozen", 3), ("tuned", 2), ("tuned", 1)]
    assert make_policy(algo, denoising_steps=20, sampling_steps=4, finetune_steps=2).denoiser.tuned == 10  # E18
    if algo == "dppo":  # it scores just the steps that learn, and has the floor asked for
        assert trainer.policy.M == 2 and trainer.policy.head.log_std.exp().tolist() == pytest.approx([0.4] * 2)


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
        torch.testing.assert_close(log_prob, expected[0])
        torch.testing.assert_close(policy.evaluate(obs, action, omega)[1], expected[1])


def test_actions_are_drawn_as_their_likelihood_says(float64):  # E7, E8
    n, mean = 100_000, torch.tensor([0.4, -0.1, 0.2])
    choice, box = ncdpo.Categorical(0.5), ncdpo.Gaussian(3, 0.3)
    drawn = choice.sample(mean, choice.noise(n, 3))
    probability = torch.softmax(mean / 0.5, -1)
    frequency = torch.bincount(drawn, minlength=3) / n
    assert ((frequency - probability).abs() < 5 * (probability / n).sqrt()).all()
    drawn = box.sample(mean, box.noise(n, 3))
    assert ((drawn.mean(0) - mean).abs() < 5 * 0.3 / n**0.5).all()
    torch.testing.assert_close(drawn.std(0), torch.full((3,), 0.3), rtol=5 / (2 * n) ** 0.5, atol=0)


@pytest.mark.parametrize("predict", PREDICT)
@pytest.mark.parametrize("K, M", [(1, None), (4, None), (10, None), (5, 2)])
def test_bpdt_gradient_equals_finite_differences(float64, predict, K, M):  # E13, E16
    policy = make_policy("dppo" if M else "ncdpo", denoising_steps=K, predict=predict, scored_steps=M)
    (obs, action), kept, h = (torch.randn(5, n) for n in (3, 2)), torch.randn(5, K, 2), 1e-5
    parameters, loss = list(policy.denoiser.parameters()), lambda: policy.log_prob(obs, action, kept).sum()
    gradient = parameters_to_vector(torch.autograd.grad(loss(), parameters))
    theta = parameters_to_vector(parameters).detach()

    def at(vector):
        vector_to_parameters(vector, parameters)
        return loss().item()

    for direction in torch.randn(3, len(theta)):
        difference = (at(theta + h * direction) - at(theta - h * direction)) / (2 * h)
        assert difference == pytest.approx((gradient @ direction).item(), rel=1e-5)


def test_gradient_is_zero_where_the_clean_estimate_is_clipped(float64):  # E3
    policy = make_policy(denoising_steps=3, clip_denoised=1.0)
    torch.nn.init.constant_(policy.denoiser.net[-1].bias, 100.0)
    mean = policy.mean(torch.randn(5, 3), torch.randn(5, 3, 2))
    assert (mean == 1).all()
    assert all((g == 0).all() for g in torch.autograd.grad(mean.sum(), list(policy.denoiser.parameters())))


def test_ncdpo_with_one_step_that_ignores_its_noise_is_ppo_with_an_mlp(float64):
    chain, plain = make_policy("ncdpo", denoising_steps=1), make_policy("ppo")
    first, net = chain.denoiser.net[0], plain.net
    with torch.no_grad():
        first.weight[:, :2] = 0
        net[0].weight.copy_(first.weight[:, 2:5])
        net[0].bias.copy_(first.bias + first.weight[:, 5:] @ chain.denoiser.embedding[1])
    net[1:].load_state_dict(chain.denoiser.net[1:].state_dict())
    obs, omega, noise = torch.randn(32, 3), torch.randn(32, 1, 2), torch.zeros(32, 2)
    torch.testing.assert_close(chain.act(obs, omega, noise)[0], plain.act(obs, omega[:, :0], noise)[0])


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

    mu = policy.mu
    if not through_the_chain:
        policy.mu = lambda x, *more: mu(x.detach(), *more)
    estimates, obs = [], torch.ones(4000, 1)
    for _ in range(200):
        omega, noise = policy.noise(len(obs))
        with torch.no_grad():
            action, _ = policy.act(obs, omega, noise)
        score = policy.log_prob(obs, action, omega) * (reward(action[:, 0]) - J.item())
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
        log_p, log_q = (Normal(policy.mean(torch.ones(len(nodes), 1), nodes[:, :, None]),
                               policy.head.log_std.exp()).log_prob(a) for policy in (old, new))
        row = old.log_prob(torch.ones(3001, 1), a[:, None], nodes[[5]][:, :, None].expand(3001, 2, 1))
    torch.testing.assert_close(log_p[5], row)
    integral = lambda density: torch.trapezoid(density, a)
    p, q = weights @ log_p.exp(), weights @ log_q.exp()
    conditional = (weights * integral(log_p.exp() * (log_p - log_q))).sum()
    marginal = integral(p * (p / q.clamp(min=1e-300)).clamp(min=1e-300).log())
    assert integral(p).item() == pytest.approx(1, abs=1e-9)
    assert 1e-4 < marginal < conditional


def test_the_core_runs_when_it_is_pasted_elsewhere():
    """Sections 1 to 4 alone learn a bandit whose best action is a function of the observation."""
    source = (HERE / "ncdpo.py").read_text()
    core = source[source.index("# ===== 1  Noise schedule"):source.index("# ===== 5")]
    assert not [word for word in ("Config", "gym", "DPPO", "np.") if word in core]
    there = {"__name__": "elsewhere"}
    exec("from __future__ import annotations\nimport math, torch\nimport torch.nn as nn\n"
         "from torch.nn import functional as F\n" + core, there)
    policy, critic = there["NCDPO"](2, 2, steps=3, hidden=32), there["mlp"](2, 32, 1, "silu", gain=1.0)
    adam = torch.optim.Adam([*policy.parameters(), *critic.parameters()], 3e-3)
    rewards = []
    for _ in range(60):
        obs = torch.rand(256, 2) * 2 - 1
        with torch.no_grad():
            action, kept = policy.act(obs, *policy.noise(256))
            reward = -(action - 0.8 * obs.flip(1)).square().sum(1)
            batch = dict(obs=obs, action=action, latent=kept, log_prob=policy.log_prob(obs, action, kept),
                         advantage=reward - critic(obs)[:, 0], target=reward)
        there["ppo_update"](partial(there["ppo_loss"], policy, critic), batch, adam, minibatch_size=128)
        rewards.append(reward.mean().item())
    untrained, perfect = -2 * (0.8**2 / 3 + 0.22**2), -2 * 0.22**2  # of the zero action and of the best one
    assert rewards[0] == pytest.approx(untrained, abs=0.1) and np.mean(rewards[-5:]) > 1.5 * perfect
    there |= dict(obs_dim=3, act_dim=2, obs=torch.randn(64, 3), advantage=torch.randn(64), target=torch.randn(64))
    exec(re.search(r"```python\n(import math.*?)```", (HERE / "README.md").read_text(), re.DOTALL).group(1), there)
    there["loss"].backward()  # of README's lines, through the chain
    assert there["policy"].denoiser.net[0].weight.grad.norm() > 1e-4


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


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_ppo_loss_is_the_clipped_objective(float64, algo):  # E11, E12, E15
    c = config(algo=algo, denoising_steps=3, gamma_denoising=0.5)
    agent, obs = shaken(ncdpo.Agent(c, 3, 2, False)), torch.randn(40, 3)
    action, log_prob, latent = agent.policy.sample(obs)
    log_prob = log_prob.detach()
    old, advantage, target = log_prob + 0.3 * torch.randn_like(log_prob), 5 + torch.randn(40), torch.randn(40)
    loss, diagnostics = ncdpo.ppo_loss(agent.policy, agent.critic, obs, action, latent, old, advantage, target,
                                       vf_coef=0.7, ent_coef=0.03)
    M, policy = log_prob[0].numel(), agent.policy
    r = (policy.log_prob(obs, action, latent) - old).view(40, M).exp()
    A = ((advantage - advantage.mean()) / advantage.std())[:, None] * 0.5 ** torch.arange(M - 1, -1, -1)
    gain = (torch.where(A > 0, r.clamp(max=1.2), r.clamp(min=0.8)) * A).mean()
    value_loss = (agent.critic(obs)[:, 0] - target).square().mean() / 2
    entropy, clipped = Normal(torch.zeros(2), policy.head.log_std.exp()).entropy().sum(), (r < 0.8) | (r > 1.2)
    expected = dict(policy_loss=-gain, value_loss=value_loss, entropy=entropy, clip_fraction=clipped.double().mean(),
                    approx_kl=(r - 1 - r.log()).sum() / 40)
    assert {k: v.item() for k, v in diagnostics.items()} == pytest.approx({k: v.item() for k, v in expected.items()})
    learnt = [p for p in agent.parameters() if p.requires_grad]
    both = [[x, *torch.autograd.grad(x, learnt)] for x in (loss, -gain + 0.7 * value_loss - 0.03 * entropy)]
    torch.testing.assert_close(*both)


def descend(size, kl=0.0, **given):
    """`ppo_update` on the loss 100 v + 10 w by plain gradient descent, each a group of its own: the minibatches
    taken, where v and w went, the diagnostics.
    """
    v, w, picks = torch.nn.Parameter(torch.zeros(())), torch.nn.Parameter(torch.zeros(())), []

    def loss(obs, target):
        assert torch.equal(obs, target)  # each row stays together
        picks.append(obs.tolist())
        kls = torch.tensor(2 * kl * (len(picks) % 2))  # two minibatches have the mean `kl`
        return 100 * v + 10 * w, {"nothing": torch.tensor(0.0), "approx_kl": kls, "taken": obs.min() * 1.0}

    sgd = torch.optim.SGD([{"params": [v]}, {"params": [w]}], lr=1.0)
    row = ncdpo.ppo_update(loss, dict.fromkeys(("obs", "target"), torch.arange(size)), sgd, **given)
    return picks, v.item(), w.item(), row


def test_update_takes_whole_minibatches_in_a_new_order_each_epoch_and_clips_each_groups_gradient():
    picks, v, w, row = descend(110, epochs=3, minibatch_size=50, max_grad_norm=0.5)
    assert [len(pick) for pick in picks] == [50] * 6  # 10 are left out of each epoch
    epochs = [picks[i] + picks[i + 1] for i in (0, 2, 4)]
    assert all(len(set(epoch)) == 100 and epoch != sorted(epoch) for epoch in epochs) and epochs[0] != epochs[1]
    assert (v, w) == pytest.approx((-0.5 * 6, -0.5 * 6)) and row["grad_norm"] == pytest.approx(100)
    assert row["taken"] == pytest.approx(np.mean([min(pick) for pick in picks]))  # the mean over all minibatches
    assert [len(pick) for pick in descend(100, epochs=2, minibatch_size=300)[0]] == [100] * 2  # all there is


@pytest.mark.parametrize("kl, minibatches", [(0.03, 8), (0.06, 2)])
def test_target_kl_is_compared_with_the_mean_of_each_epoch(kl, minibatches):
    picks, _, _, row = descend(100, kl, epochs=4, minibatch_size=50, target_kl=0.05)
    assert len(picks) == minibatches and row["last_kl"] == pytest.approx(kl)


# --- 6  environments -------------------------------------------------------------------------------------------------

def play(env_id, vector, seed=3, num_envs=3, steps=210, chunk=1):
    """Random actions, many of them out of bounds: a dictionary of arrays for each step, and the seeds used."""
    env, seeds = VectorEnv(env_id, num_envs, CPU, vector, chunk), []
    reset, rng = env.envs.reset, torch.Generator().manual_seed(seed)
    env.envs.reset = lambda new: seeds.extend(new) or reset(new)
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
    return rows, seeds


@pytest.mark.parametrize("env_id, vector, chunk", [
    ("CartPole-v1", "auto", 1), ("Pendulum-v1", "auto", 1), ("Tiny-v0", "sync", 1), ("TinyBox-v0", "sync", 1),
    ("TinyBox-v0", "sync", 3), ("TinyEnds-v0", "sync", 3), ("Hopper-v4", "sync", 3)])
def test_every_environment_plays_as_it_would_alone(env_id, vector, chunk):
    """Also where the actions of a chunk are played one after another, until its episode ends."""
    rows, seeds = play(env_id, vector, chunk=chunk, steps=210 if chunk == 1 else 80)
    ends, cut_short = 0, False
    for i, seed in enumerate(seeds):
        alone = make_env(env_id)
        obs, space = alone.reset(seed=seed)[0], alone.action_space
        for row in rows:
            np.testing.assert_allclose(row["obs"][i], np.float32(obs).ravel(), rtol=1e-5, atol=1e-5)
            rewards = []
            for part in np.split(np.atleast_1d(row["action"][i]), chunk):
                if isinstance(space, gym.spaces.Discrete):
                    action = part[0] + space.start
                else:
                    action = np.float32(space.low + (np.float64(part).clip(-1, 1) + 1) / 2 * (space.high - space.low))
                obs, reward, *ended, _ = alone.step(action)
                rewards.append(reward)
                if any(ended):
                    break
            cut_short |= len(rewards) < chunk
            np.testing.assert_allclose(row["final_obs"][i], np.float32(obs).ravel(), rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(row["reward"][i], rewards + [np.nan] * (chunk - len(rewards)), rtol=1e-5)
            assert [row["terminated"][i], row["truncated"][i]] == ended
            assert np.array_equal(row["final_obs"][i], row["next_obs"][i]) != any(ended)
            if any(ended):
                ends += 1
                obs = alone.reset()[0]
    assert ends >= len(seeds) and len(set(seeds)) == len(seeds) and cut_short == (chunk > 1)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Hopper-v4"])
def test_seed_decides_where_episodes_start(env_id):
    one, again, other = (play(env_id, "auto", seed, steps=1)[0][0]["obs"] for seed in (3, 3, 4))
    assert np.array_equal(one, again) and not np.isin(one, other).any()


# --- 6  MuJoCo in batches, against Gymnasium --------------------------------------------------------------------------

batched = pytest.mark.skipif(not importlib.util.find_spec("mujoco.batch"), reason="a MuJoCo before 4 has no batches")
FAMILIES = ["HalfCheetah", "Hopper", "Walker2d", "Swimmer"]
MUJOCO = [f"{family}-{version}" for family in FAMILIES for version in ("v4", "v5")] + ["Ant-v4"]
SHOWN = dict(exclude_current_positions_from_observation=False)
CHANGED = [
    ("HalfCheetah-v4", dict(ctrl_cost_weight=0.3, forward_reward_weight=0.7, reset_noise_scale=0.2, **SHOWN)),
    ("Swimmer-v5", dict(ctrl_cost_weight=0.3, frame_skip=3, **SHOWN)),
    ("Hopper-v4", dict(terminate_when_unhealthy=False, healthy_reward=0.3, **SHOWN)),
    ("Hopper-v5", dict(terminate_when_unhealthy=False, healthy_reward=0.3, frame_skip=2, healthy_state_range=(-3, 3))),
    ("Hopper-v5", dict(healthy_state_range=(-2, 2))), ("Hopper-v4", dict(healthy_angle_range=(-9, 9))),
    ("Walker2d-v5", dict(healthy_z_range=(1.1, 1.3), healthy_angle_range=(-9, 9), xml_file="walker2d.xml")),
    ("Walker2d-v4", dict(healthy_angle_range=(-0.1, 0.1), healthy_z_range=(-9, 9))),
    ("Ant-v4", dict(healthy_z_range=(0.5, 0.8), healthy_reward=0.3, **SHOWN)),
]


def follow(env, batch, i):
    """Put a single environment at its start into the state of the batch's i-th; returns its observation."""
    env.reset()
    env.unwrapped.set_state(batch.pool.qpos[i].numpy(), batch.pool.qvel[i].numpy())
    return env.unwrapped._get_obs()


def both(env_id, num_envs=3, chunk=1, **changed):
    """The batch and as many single environments, in the same start states; and a source of actions."""
    task = physics.batched_task(make_env(env_id, **changed))
    batch = physics.MujocoEnvs(task, physics.MujocoPool, num_envs, chunk, CPU)
    singles = [make_env(env_id, **changed) for _ in range(num_envs)]
    batch.reset([1])
    for i, env in enumerate(singles):
        follow(env, batch, i)
    space, rng = singles[0].action_space, np.random.default_rng(1)
    return batch, singles, lambda: rng.uniform(space.low, space.high, (num_envs, chunk, len(space.low)))


@batched
@pytest.mark.parametrize("env_id", ["HalfCheetah-v4", "Hopper-v5", "Swimmer-v4", "Ant-v4"])
def test_batched_episodes_start_as_gymnasiums_do(env_id):
    env, batch = make_env(env_id), VectorEnv(env_id, 2000, CPU).reset(1).double().numpy()
    single = np.array([env.reset(seed=seed)[0] for seed in range(2000)])
    spread = single.std(0)
    assert np.abs(batch.mean(0) - single.mean(0)).max() < 5 * (2 / 2000) ** 0.5 * spread.max()
    assert np.abs(batch.std(0) - spread).max() < 5 * (2 / 2000) ** 0.5 * spread.max()
    assert len(np.unique(batch[:, 0])) > 1900
    uniform = (single.max(0) - single.min(0)) < 4 * spread  # its range is 3.5 deviations; a normal one's is about 7
    assert np.abs(batch.max(0) - single.max(0))[uniform].max() < 0.05 * spread.max()


@batched
@pytest.mark.parametrize("env_id, changed", [(env_id, {}) for env_id in MUJOCO] + CHANGED, ids=str)
def test_every_batched_step_is_the_one_of_gymnasium(env_id, changed):
    batch, singles, draw = both(env_id, max_episode_steps=70, **changed)
    exact, outcome, ended = [], batch.task.outcome, False
    batch.task.outcome = lambda *given: exact.append(outcome(*given)) or exact[-1]  # rewards before the cast
    for _ in range(150):  # free-running: no error may add up, not even through ends and restarts
        for i, data in enumerate(env.unwrapped.data for env in singles):
            assert np.array_equal(batch.pool.qpos[i], data.qpos) and np.array_equal(batch.pool.qvel[i], data.qvel)
        action = draw()
        _, reward, terminated, truncated, final_obs = batch.step(torch.from_numpy(action[:, 0]))
        obs = batch.task.obs(batch.pool)
        for i, env in enumerate(singles):
            now, r, *ends, _ = env.step(action[i, 0])
            assert ends == [terminated[i], truncated[i]]
            assert float(exact[-1][0][i]) == pytest.approx(r, rel=1e-12, abs=1e-12)
            assert float(reward[i, 0]) == pytest.approx(r, rel=1e-6, abs=1e-6)
            assert np.allclose(final_obs[i], now, rtol=1e-6, atol=1e-6)
            ended |= any(ends)
            now = follow(env, batch, i) if any(ends) else now
            assert np.array_equal(obs[i], now.astype(np.float32))
    assert ended  # the comparison has gone through restarts


@batched
def test_time_limit_and_fall_in_one_step_set_both_flags():
    _, (env,), draw = both("Hopper-v5", 1)
    actions = [draw()[:, 0] for _ in range(200)]
    fall = 1 + next(i for i, action in enumerate(actions) if env.step(action[0])[2])
    chunk = torch.from_numpy(np.concatenate(actions[:fall], 1))
    for limit in (fall, fall - 1):  # and a fall that the episode did not live to see sets none
        batch, (env,), _ = both("Hopper-v5", 1, chunk=fall, max_episode_steps=limit)
        _, _, terminated, truncated, _ = batch.step(chunk)
        for action in actions[:limit]:
            _, _, *ends, _ = env.step(action[0])
        assert ends == [terminated[0], truncated[0]] == [limit == fall, True]


@batched
def test_a_state_that_mujoco_itself_resets_goes_on_as_in_gymnasium_and_does_not_poison_the_others():
    batch, singles, draw = both("HalfCheetah-v5", chunk=2)
    batch.pool.qvel[1] = singles[1].unwrapped.data.qvel[:] = 1e11
    for _ in range(3):
        action = draw()
        obs, reward, terminated, truncated, _ = batch.step(torch.from_numpy(action.reshape(3, -1)))
        assert not (terminated | truncated).any() and reward.isfinite().all()
        for i, env in enumerate(singles):
            assert np.array_equal(obs[i], [env.step(a)[0] for a in action[i]][-1].astype(np.float32))


@batched
@pytest.mark.parametrize("value", [torch.nan, -torch.inf, 2e10])
@pytest.mark.parametrize("what", ["qpos", "qvel"])
def test_a_bad_state_at_the_end_of_a_step_terminates_the_episode(monkeypatch, what, value):
    batch, _, draw = both("Hopper-v5")
    step = batch.pool.step
    batch.pool.step = lambda ctrl: (step(ctrl), getattr(batch.pool, what)[1].fill_(value))
    obs, reward, terminated, _, final_obs = batch.step(torch.from_numpy(draw()[:, 0]))
    assert terminated.tolist() == [False, True, False] and reward[1] == 0 and not final_obs[1].any()
    assert obs.abs().max() < 10 and reward.isfinite().all()


@batched
def test_only_tasks_whose_formulas_are_known_are_batched(monkeypatch):
    from gymnasium.envs.mujoco.hopper_v5 import HopperEnv

    class Mine(HopperEnv):
        __module__ = "mine.hopper_v5"

    others = [make_env(name) for name in ("Ant-v5", "Humanoid-v5", "Reacher-v4", "CartPole-v1", "Hopper-v5")]
    others[-1].unwrapped.model.opt.enableflags = 1
    others += [Mine(), make_env("Ant-v4", use_contact_forces=True)]
    others += [gym.wrappers.ClipReward(make_env("Ant-v4"), -1, 1), gym.wrappers.ClipAction(make_env("Hopper-v5"))]
    assert not any(map(physics.batched_task, others)) and all(physics.batched_task(make_env(name)) for name in MUJOCO)
    assert physics.batched_task(HopperEnv()).limit == np.inf
    assert physics.batched_task(make_env("Hopper-v5")).limit == 1000
    for env_id, vector, served in (("Hopper-v5", "auto", "batched"), ("Hopper-v5", "sync", "sync"),
                                   ("CartPole-v1", "auto", "sync")):
        assert VectorEnv(env_id, 1, CPU, vector).vector == served
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # a MuJoCo before 4
    assert physics.batched_task(HopperEnv()) is None


# --- 6  MuJoCo Warp, against MuJoCo ----------------------------------------------------------------------------------

warp = pytest.mark.skipif(not importlib.util.find_spec("mujoco_warp"), reason="mujoco-warp is not installed")


def pools(env_id, num_envs=16, lift=0.0):
    """The formulas, both simulators in the same states near a start (lifted), and a source of actions."""
    task = physics.batched_task(make_env(env_id))
    given = task.env.model, num_envs, task.env.frame_skip, task.fields, CPU
    slow, fast, rng = physics.MujocoPool(*given), physics.WarpPool(*given), np.random.default_rng(3)
    qpos = torch.from_numpy(task.env.init_qpos + rng.uniform(-0.1, 0.1, slow.qpos.shape)).float()
    qvel = torch.from_numpy(rng.uniform(-0.5, 0.5, slow.qvel.shape)).float()
    if lift:
        qpos[:, 2] += lift
    everywhere = torch.ones(num_envs, dtype=torch.bool)
    slow.restart(everywhere, lambda: (qpos.double(), qvel.double()))
    fast.restart(everywhere, lambda: (qpos, qvel))
    space = task.env.action_space
    return task, slow, fast, lambda: torch.from_numpy(rng.uniform(space.low, space.high, slow.ctrl.shape)).float()


def distance(slow, fast, *names):
    """Largest difference in each environment."""
    difference = [(getattr(slow, name) - getattr(fast, name)).abs().flatten(1).amax(1) for name in names]
    return torch.stack(difference).amax(0)


@warp
@pytest.mark.parametrize("env_id", MUJOCO)
def test_warp_moves_as_mujoco_does(env_id):
    """But where a leg steeper than 60 degrees meets the floor: Warp turns its friction pyramid, so Ant falls freely."""
    task, slow, fast, draw = pools(env_id, lift=30.0 if "Ant" in env_id else 0.0)
    scale = 10 if "Ant" in env_id else 1  # float32 at a height of 30
    assert distance(slow, fast, *task.fields).max() < 1e-6 * scale if task.fields else True  # those of the start
    for step in range(100):
        action = draw()
        slow.step(action.double())
        fast.step(action)
        qpos, rest = (distance(slow, fast, *names) for names in (["qpos"], ["qvel", *task.fields]))
        if step == 0:
            assert qpos.max() < 1e-6 * scale and rest.max() < 1e-4
        if step == 19:
            assert qpos.median() < 1e-4 and rest.median() < 2e-3
    if env_id.split("-")[0] not in ("HalfCheetah", "Ant"):  # chaotic, or it has landed
        assert qpos.median() < 3e-4 and rest.median() < 3e-3
    assert not fast.arrays[1].overflow.numpy().any() and slow.qvel.abs().max() > 0.1


@warp
@pytest.mark.parametrize("env_id", MUJOCO)
def test_rewards_and_ends_on_warps_states_are_those_of_the_formulas(env_id):
    task = physics.batched_task(make_env(env_id))
    envs, fields = physics.MujocoEnvs(task, physics.WarpPool, 64, 1, CPU), ("qpos", "qvel", *task.fields)
    envs.reset([5])
    there = type("States", (), {})  # a pool that knows nothing of Warp
    note = lambda: [setattr(there, name, getattr(envs.pool, name).double().clone()) for name in fields]
    outcome, seen, ends = task.outcome, [], 0

    def noted(pool, x_before, action):
        note()
        seen.append((task.healthy(there), outcome(there, x_before.double(), action.double()), task.obs(there)))
        return outcome(pool, x_before, action)

    task.outcome = noted
    for step in range(120):
        action = torch.from_numpy(task.env.action_space.high * np.random.default_rng(step).uniform(-1, 1, (64, 1)))
        age = envs.age.clone()
        obs, reward, terminated, truncated, final_obs = envs.step(action.float().expand_as(envs.pool.ctrl))
        _, (expected, fell), expected_obs = seen[-1]
        assert torch.equal(terminated, fell) and not truncated.any()
        scale = max(1, task.x(there).abs().max().item() / 1e-2)  # float32 positions, divided by dt
        torch.testing.assert_close(reward[:, 0].double(), expected.double(), rtol=1e-5, atol=3e-6 * scale)
        torch.testing.assert_close(final_obs, expected_obs.float(), rtol=1e-5, atol=1e-6)
        assert torch.equal(envs.age, torch.where(terminated, 0, age + 1))
        assert torch.equal((obs != final_obs).any(1), terminated)
        ends += terminated.sum()
    assert ends or env_id.startswith(("HalfCheetah", "Swimmer", "Ant"))


@warp
@pytest.mark.parametrize("env_id", ["HalfCheetah-v4", "Ant-v4"])
def test_a_masked_restart_leaves_the_other_environments_alone(env_id):
    task, slow, fast, draw = pools(env_id, 6)
    names = ["qpos", "qvel", "qacc_warmstart", *task.fields]
    for _ in range(8):  # into contact
        fast.step(action := draw())
    ended = torch.tensor([True, False, False, True, False, True])
    before = [getattr(fast, name).clone() for name in names]
    qpos, qvel = 0.01 + fast.qpos.new_tensor(task.env.init_qpos).expand(6, -1), torch.zeros(6, fast.qvel.shape[1])
    fast.restart(ended, lambda: (qpos, qvel))
    assert torch.equal(fast.qpos[ended], qpos[ended]) and torch.equal(fast.qvel[ended], qvel[ended])
    for name, old in zip(names, before):
        assert torch.equal(getattr(fast, name)[~ended], old[~ended])
    slow.restart(torch.ones(6, dtype=torch.bool), lambda: (qpos.double(), qvel.double()))
    if task.fields:
        assert distance(slow, fast, *task.fields)[ended].max() < 1e-6
    slow.step(action.double())
    fast.step(action)
    assert distance(slow, fast, "qpos", "qvel", *task.fields)[ended].max() < 1e-4


@warp
@pytest.mark.parametrize("chunk", [1, 3])
def test_warps_environments_end_and_begin_again(chunk):
    env = VectorEnv("Hopper-v4", 8, CPU, "warp", chunk)
    env.envs.task.limit = 12
    obs, ends = env.reset(1), torch.zeros(2)
    for step in range(40):
        age = env.envs.age.clone()
        obs, reward, terminated, truncated, final_obs = env.step(1.5 * torch.randn(8, 3 * chunk))
        played = reward.isfinite().sum(1)
        assert torch.equal(truncated, age + played == 12) and (played[~(terminated | truncated)] == chunk).all()
        fresh = terminated | truncated
        assert (env.envs.age[fresh] == 0).all() and (obs[fresh, 0] - 1.25).abs().max() <= 0.005 if fresh.any() else True
        assert torch.equal(obs[~fresh], final_obs[~fresh])
        ends += torch.tensor([terminated.sum(), truncated.sum()])
    assert ends.min() > 0


@warp
def test_a_diverged_world_terminates_and_does_not_poison_the_others():
    env = VectorEnv("HalfCheetah-v5", 3, CPU, "warp")
    env.reset(1)
    env.envs.pool.qpos[1] = torch.nan
    obs, reward, terminated, _, final_obs = env.step(torch.zeros(3, 6))
    assert terminated.tolist() == [False, True, False] and reward[1] == 0 and not final_obs[1].any()
    for _ in range(3):
        assert obs.isfinite().all() and reward.isfinite().all()
        obs, reward, terminated, *_ = env.step(torch.zeros(3, 6))
        assert not terminated.any()


@warp
def test_no_pose_has_more_contacts_than_warp_has_room_for():
    for env_id in ("HalfCheetah-v4", "Walker2d-v4", "Hopper-v4", "Ant-v4"):
        task, _, fast, _ = pools(env_id, 256)
        fast.qpos.uniform_(-1.5, 1.5)  # limbs anywhere, most of them deep in the floor
        fast._forward()
        assert fast.arrays[1].nefc.numpy().max() > 30
        fast.step(torch.zeros_like(fast.ctrl))
        assert not (fast.arrays[1].overflow.numpy() & 31).any()  # the bits above are of solvers


@warp
def test_contacts_that_find_no_room_end_the_run_in_one_line(capfd, monkeypatch, tmp_path):
    import mujoco_warp
    make = mujoco_warp.make_data
    monkeypatch.setattr(mujoco_warp, "make_data", lambda model, n=1, **room: make(model, n, **{**room, "nconmax": 1}))
    flags = arguments("HalfCheetah-v4", tmp_path, "--vector", "warp", "--num-steps", "64", "--total-timesteps", "1024")
    assert main([str(flag) for flag in flags]) == 2  # both feet are on the floor after some 20 steps
    assert "contacts were lost" in capfd.readouterr().err


@warp
def test_more_worlds_than_memory_are_told_with_the_number_that_fits(monkeypatch):
    monkeypatch.setattr(physics, "free_memory", lambda device: 10 * 2**20)
    with pytest.raises(UserError, match=r"enough for --num-envs \d+") as told:
        VectorEnv("Hopper-v4", 10_000, CPU, "warp")
    fits = int(re.search(r"--num-envs (\d+)", str(told.value))[1])
    pool = VectorEnv("Hopper-v4", fits, CPU, "warp").envs.pool
    assert 0.7 * 10 * 2**20 < physics.size(pool.arrays[1]) < 0.9 * 10 * 2**20
    with pytest.raises(UserError, match="enough for"):
        VectorEnv("Hopper-v4", fits + 1, CPU, "warp")


@pytest.mark.parametrize("env_id, hide, words", [
    ("Hopper-v4", True, "mujoco-warp"), ("CartPole-v1", False, "formulas"), ("Humanoid-v5", False, "formulas")])
def test_what_warp_cannot_do_is_told_in_one_line(capsys, monkeypatch, tmp_path, env_id, hide, words):
    if hide:
        monkeypatch.setitem(sys.modules, "mujoco_warp", None)
    assert words in complaint(capsys, *arguments(env_id, tmp_path, "--vector", "warp"))


def test_a_gpu_has_presets_of_its_own(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "mujoco_warp")
    preset = ncdpo.PRESETS["HalfCheetah on a GPU"]
    for flags in ([], ["--algo", "ppo"]):
        chosen = vars(ncdpo.parse(["--env", "HalfCheetah-v4", "--device", "cuda", *flags])[0])
        assert {name: chosen[name] for name in preset} == preset and preset["num_envs"] > 1000
    assert ncdpo.parse(["--device", "cuda:1", "--num-envs", "8"])[0].num_envs == 8
    for flags in ([], ["--device", "cpu"], *(["--device", "cuda", *more] for more in (
            ["--vector", "sync"], ["--env", "CartPole-v1"], ["--env", "mine/HalfCheetah-v0"]))):
        assert ncdpo.parse(flags)[0].num_envs == ncdpo.Config.num_envs


# --- 7 and 10  rollout and update ------------------------------------------------------------------------------------

@pytest.fixture
def batches(monkeypatch):
    """What ppo_update would have learnt from: batch, loss function, optimizer and settings of each update."""
    taken = []
    monkeypatch.setattr(ncdpo, "ppo_update", lambda loss, batch, *more: taken.append((batch, loss, *more)) or {})
    return taken


def test_all_noise_is_drawn_afresh_at_each_step():  # E9
    trainer = ncdpo.Trainer(config(env="Pendulum-v1", num_steps=400, total_timesteps=800))
    trainer.rollout.collect(trainer.env, trainer.policy, trainer.act, trainer.obs)
    omega = trainer.rollout.latent
    mean = trainer.policy.mean(trainer.agent.obs_norm(trainer.rollout.obs).flatten(0, 1), omega.flatten(0, 1))
    final = (trainer.rollout.action - mean.view(400, 2, 1)).detach() / 0.22
    for noise in (omega, final):
        n = noise.numel()
        assert len(noise.unique()) > 0.99 * n and abs((noise[1:] * noise[:-1]).mean()) < 5 / n**0.5
        assert abs(noise.mean()) < 5 / n**0.5 and abs(noise.var() - 1) < 5 * (2 / n) ** 0.5
    assert omega.shape == (400, 2, 5, 1)


@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_first_minibatch_after_a_rollout_has_ratio_one(algo, env):  # E11
    trainer = ncdpo.Trainer(config(algo=algo, env=env, update_epochs=1, minibatch_size=64))
    for _ in range(2):  # in the second, weights and normalisers have moved on from their first values
        row = trainer.iterate()
        assert abs(row["approx_kl"]) < 1e-6 and row["clip_fraction"] == 0 and row["grad_norm"] > 0


def test_episodes_are_counted_across_rollouts():
    rollout = ncdpo.Trainer(config()).rollout
    cut = torch.tensor([math.nan, 0.5]).expand(3, 2)  # one environment plays half of each chunk, the other all of it
    rollout.reward = torch.stack([torch.tensor([[1.0, 10], [2, 20], [3, 30]]), cut], -1)
    rollout.ended = torch.tensor([[0.0, 0], [1, 0], [0, 0]])
    assert rollout.finished().tolist() == [[3, 2]]
    rollout.ended = torch.tensor([[0.0, 1], [1, 1], [1, 0]])
    assert rollout.finished().tolist() == [[72, 8], [6, 3], [20.5, 2], [3, 1]]


@pytest.mark.parametrize("algo, env, H, g", [
    ("ncdpo", "CartPole-v1", 1, 0.9), ("dppo", "TinyBox-v0", 1, 0.9),  # the first terminates, the second truncates
    ("ncdpo", "TinyBox-v0", 3, 0.9), ("ncdpo", "TinyEnds-v0", 3, 0.9), ("ncdpo", "TinyBox-v0", 3, 0.0)])  # in a chunk
def test_update_learns_from_the_decisions_played(monkeypatch, batches, algo, env, H, g):  # E10, E12
    """The second update against loops over its steps: discount g a step, so g^H a decision."""
    lam, coefficients = 0.8, dict(clip_coef=0.1, vf_coef=0.7, ent_coef=0.03)
    trainer = ncdpo.Trainer(config(algo=algo, env=env, action_chunk=H, gamma=g, gae_lambda=lam,
                                   target_kl=0.3, max_grad_norm=0.7, total_timesteps=256 * H, **coefficients))
    step, starts, steps, agent = trainer.env.step, trainer.obs, [], trainer.agent
    shaken(agent)
    trainer.env.step = lambda action: steps.append(step(action)) or steps[-1]
    act, noises = trainer.act, []
    trainer.act = lambda obs, *noise: noises.append(noise) or act(obs, *noise)
    monkeypatch.setattr(health, "chain_gradient", lambda *_: (np.array([9.0, 2.0, 8.0]), 0.25))
    trainer.iterate()
    row = trainer.iterate()
    obs, rewards, terminated, truncated, led = (torch.stack(x) for x in zip(*steps))
    obs, ended = torch.cat([starts[None], obs[:-1]]), terminated | truncated
    seen = obs[:32].flatten(0, 1)  # a rollout's own observations count only from the next one on
    obs, led = (((x - seen.mean(0)) / (seen.var(0, correction=0) + 1e-8).sqrt()).clamp(-10, 10) for x in (obs, led))
    with torch.no_grad():
        value, there = (agent.critic(x)[..., 0] for x in (obs, led))
    reward, sums, A = (g ** torch.arange(H) * rewards).nansum(-1), torch.zeros(65, 2), torch.zeros(65, 2)
    for t in range(64):
        sums[t + 1] = g**H * sums[t] * (~ended[t - 1] if t else 1) + reward[t]
    scale = sums[1:].std(correction=0)
    for t in reversed(range(32, 64)):
        ahead = reward[t] / scale + g ** rewards[t].isfinite().sum(-1) * ~terminated[t] * there[t]
        A[t] = ahead - value[t] + g**H * lam * ~ended[t] * A[t + 1]
    batch, loss, optimizer, *more = batches[1]
    expected = dict(obs=obs[32:], advantage=A[32:64], target=A[32:64] + value[32:])
    played = agent.policy.act(obs[32:].flatten(0, 1), *(torch.cat(x) for x in zip(*noises[32:])))  # as it was seen
    expected |= {name: x.detach().view(32, 2, *x.shape[1:]) for name, x in zip(("action", "latent"), played)}
    for name, tensor in expected.items():
        torch.testing.assert_close(batch[name], tensor.flatten(0, 1), rtol=1e-3, atol=1e-3)
    assert optimizer is trainer.optimizer and more == [2, 32, 0.7, 0.3] and ended[32:].any()
    assert loss(**batch)[0] == ncdpo.ppo_loss(agent.policy, agent.critic, **batch, **coefficients)[0]
    explained = 1 - float(expected["advantage"].var() / expected["target"].var())
    assert row["explained_variance"] == pytest.approx(explained, abs=1e-3) and row["step"] == 2 * 2 * 32 * H
    assert algo != "ncdpo" or (row["chain_gradient_ratio"], row["chain_clipped"]) == (2 / 8, 0.25)


def test_scaled_rewards_are_clipped_to_ten(batches):
    trainer = ncdpo.Trainer(config(gamma=0.0))  # without a future, the target is the scaled reward
    trainer.agent.reward_norm.var.fill_(1e-6)
    trainer.agent.reward_norm.count.fill_(1e9)
    step, signs = trainer.env.step, torch.tensor([[1.0], [-1]])
    trainer.env.step = lambda action: [x * signs if i == 1 else x for i, x in enumerate(step(action))]
    trainer.iterate()
    torch.testing.assert_close(batches[0][0]["target"].view(32, 2), (10 * signs.T).expand(32, 2))


@pytest.mark.parametrize("critics_own", [None, 2e-3])
def test_adam_takes_the_learning_rates_of_the_update(critics_own):
    trainer, taken = ncdpo.Trainer(config(critic_learning_rate=critics_own, update_epochs=1, minibatch_size=64)), []
    trainer.optimizer.register_step_post_hook(lambda adam, *_: taken.append([g["lr"] for g in adam.param_groups]))
    for _ in range(4):
        trainer.iterate()
    rates = [5e-4, 2e-3] if critics_own else [5e-4]
    np.testing.assert_allclose(taken, np.array([[1], [0.75], [0.5], [0.25]]) * rates)
    sizes = [sum(p.numel() for p in group["params"]) for group in trainer.optimizer.param_groups]
    parts = [sum(p.numel() for p in part.parameters()) for part in (trainer.policy, trainer.critic)]
    assert sizes == (parts if critics_own else [sum(parts)])


def test_adaptive_rate_holds_the_kl_of_the_last_epoch_between_its_target_and_half_of_it(monkeypatch, tmp_path):
    kls, taken, given = iter([0.5, 0.03, 0.015, 0.005, 9]), [], dict(adaptive_lr=True, target_kl=0.02)
    trainer = ncdpo.Trainer(config(learning_rate=3e-4, critic_warmup=1, critic_learning_rate=1e-3, **given))
    monkeypatch.setattr(ncdpo, "ppo_update", lambda *_: {"last_kl": next(kls)})
    for _ in range(4):
        trainer.iterate()
        taken.append([group["lr"] for group in trainer.optimizer.param_groups] + [trainer.rate])
    np.testing.assert_allclose(taken, [[0, 1e-3, 3e-4], [3e-4, 7.5e-4, 2e-4], [2e-4, 5e-4, 2e-4], [2e-4, 2.5e-4, 3e-4]])
    trainer.save(tmp_path)
    assert checkpoint_of(tmp_path)["rate"] == trainer.rate
    for start, bound in ((1e-5, 1e-5), (9e-3, 1e-2)):
        kls, trainer.rate = iter([9.0 if start < 1e-3 else 0.0]), start
        trainer.iterate()
        assert trainer.rate == bound


@pytest.mark.parametrize("algo, discrete", [("ncdpo", False), ("dppo", False), ("ncdpo", True)])
def test_mean_log_prob_divides_a_box_actions_log_ratio_by_its_coordinates(algo, discrete):
    """So a log-ratio of d has the loss that one of d / 6 has without the flag: chunks of 3 actions of 2 coordinates."""
    losses, chunk, d = [], 1 if discrete else 3, 0.3
    for mean, shift in ((True, d), (False, d if discrete else d / 6)):
        torch.manual_seed(1)
        trainer = ncdpo.Trainer(config(env="Tiny-v0" if discrete else "TinyBox-v0", algo=algo, action_chunk=chunk,
                                       mean_log_prob=mean, vf_coef=0.0))
        obs = torch.randn(64, 6)
        action, log_prob, latent = trainer.policy.sample(obs)
        old = log_prob.detach() - shift * torch.linspace(-1, 1, 64).view(-1, *[1] * (log_prob.dim() - 1))
        losses.append(trainer.loss(obs=obs, action=action, latent=latent, log_prob=old, advantage=torch.randn(64),
                                   target=torch.zeros(64))[1])
    one, other = ([x.item() for x in diagnostics.values()] for diagnostics in losses)
    assert one == pytest.approx(other, rel=1e-3, abs=1e-6) and losses[0]["approx_kl"] > 1e-5


def test_chain_gradient_measures_the_gradient_at_each_denoising_step(float64):  # E13
    policy, B = make_policy(denoising_steps=4), 6
    obs, action, omega, advantage = torch.randn(B, 3), torch.randn(B, 2), torch.randn(B, 4, 2), torch.randn(B)
    norms, clipped = health.chain_gradient(policy, obs, action, omega, advantage)
    mean = policy.mean(obs, omega.requires_grad_())
    at_x0 = (-advantage[:, None] * (action - mean) / policy.head.log_std.exp() ** 2 / B).detach()
    at_omega, = torch.autograd.grad((mean * at_x0).sum(), omega)
    assert len(norms) == 5 and clipped == 0
    assert (norms[0], norms[-1]) == pytest.approx((at_omega[:, 0].norm().item(), at_x0.norm().item()))
    policy.schedule.clip = mean.abs().median().item()
    share = (policy.mean(obs, omega).abs() == policy.schedule.clip).double().mean().item()
    assert health.chain_gradient(policy, obs, action, omega, advantage)[1] == pytest.approx(share) and 0 < share < 1


def test_a_chain_is_measured_on_decisions_of_the_whole_rollout(monkeypatch):
    seen = []
    monkeypatch.setattr(health, "chain_std", lambda policy, obs: seen.append(obs[:, 0].tolist()) or 0.5)
    for n in (4096, 1000, 50):
        batch = {"obs": torch.arange(3.0 * n).view(n, 3), "action": torch.randn(n, 2), "latent": torch.randn(n, 5, 2),
                 "advantage": torch.randn(n)}
        row = health.measure(make_policy("ncdpo"), batch)
        assert set(row) == {"sigma", "chain_std", "chain_gradient_ratio", "chain_clipped"} and row["chain_std"] == 0.5
        assert len(seen[-1]) == min(n, 128) and seen[-1][0] == 0 and seen[-1][-1] >= 3 * (0.88 * n - 6)
    assert set(health.measure(make_policy("dppo"), batch)) == {"sigma", "chain_std"}
    assert set(health.measure(make_policy("ppo"), batch)) == {"sigma"}
    assert not health.measure(make_policy("ppo", discrete=True), batch)


@pytest.mark.parametrize("algo", ["ncdpo", "dppo"])
def test_chain_std_is_the_deviation_of_the_action_over_the_chains_noise(algo):  # E17
    policy = ncdpo.make_policy(config(algo=algo, predict="epsilon"), 3, 2, False)
    obs = torch.randn(1, 3).expand(20_000, 3)
    actions = policy.sample(obs, deterministic=True)[0]
    expected, before = actions.var(0).mean().sqrt().item(), torch.get_rng_state()
    assert expected > 0.05
    assert health.chain_std(policy, obs) == pytest.approx(expected, rel=0.03)
    assert torch.equal(torch.get_rng_state(), before)  # to measure does not change the run


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("error:going on more slowly")
def test_compiled_loss_and_gradients_equal_the_plain_ones():
    results = []
    for switch in (False, True):
        trainer = ncdpo.Trainer(config(env="Pendulum-v1", compile=switch, denoising_steps=2))
        torch.manual_seed(1)
        agent, obs = shaken(trainer.agent), torch.randn(64, 3)
        with torch.no_grad():
            action, log_prob, latent = trainer.policy.sample(obs)
        rest = dict(zip(("log_prob", "advantage", "target"), torch.randn(3, 64)))
        rest["log_prob"] = log_prob + 0.1 * rest["log_prob"]
        loss, diagnostics = trainer.loss(obs=obs, action=action, latent=latent, **rest)
        loss.backward()
        results.append([action, log_prob, loss, *diagnostics.values(), *(p.grad for p in agent.parameters())])
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("given, compiled", [
    (dict(), 1), (dict(denoising_steps=10), 1), (dict(denoising_steps=11), 0), (dict(algo="ppo"), 1),
    (dict(algo="dppo", denoising_steps=20), 1), (dict(algo="dppo", denoising_steps=20, scored_steps=9), 0)])
def test_a_loop_over_a_long_chain_is_not_compiled(monkeypatch, given, compiled):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: calls.append(function) or function)
    ncdpo.Trainer(config(compile=True, **given))
    assert len(calls) == compiled


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


# --- 7  nobody waits for the device ----------------------------------------------------------------------------------

class NoCopies(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU; counts the operations that launch a kernel."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "lift_fresh", "is_nonzero", "equal.default")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = str(function).removeprefix("aten."), kwargs or {}
        assert not name.startswith(self.REFUSED), f"{name} waits for the device"
        assert not name.startswith("index") or not any(
            x is not None and x.dtype == torch.bool for x in args[1]), f"{name} by a mask waits for the device"
        self.count += not function.is_view and not name.startswith("empty")
        return function(*args, **kwargs)


class NoReads(TorchFunctionMode):
    """Refuses the methods that read a tensor on the host: on a CPU they never reach the dispatcher."""

    REFUSED = {getattr(torch.Tensor, name) for name in
               "cpu numpy item tolist nonzero __bool__ __float__ __int__ __index__ __array__".split()}

    def __init__(self, but=()):
        super().__init__()
        self.but, self.allowed = {getattr(torch.Tensor, name) for name in but}, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.allowed += function in self.but
        assert function not in self.REFUSED - self.but, f"{function.__name__} reads a tensor"
        return function(*args, **(kwargs or {}))


def resident(env="Hopper-v4", **given):
    """A trainer whose simulator lives where its tensors do, after its first update."""
    trainer = ncdpo.Trainer(config(**{**dict(env=env, vector="warp", num_envs=8, num_steps=16, total_timesteps=1280),
                                      **given}))
    trainer.iterate()
    return trainer


def rollout_and_update(trainer):
    """A rollout; then one update, its batch made outside of what is looked at."""
    trainer.obs = trainer.rollout.collect(trainer.env, trainer.policy, trainer.act, trainer.obs)
    yield
    batch, _ = trainer.judge()
    yield
    ncdpo.ppo_update(trainer.loss, batch, trainer.optimizer, epochs=2, minibatch_size=32)
    yield


def test_the_modes_refuse_what_they_should():
    x, mask = torch.arange(3.0), torch.tensor([True, False, True])
    for wrong in (lambda: x[mask], lambda: x.cpu(), lambda: x.sum().item(), lambda: mask.nonzero(), lambda: x.tolist(),
                  lambda: x.new_tensor([1.0]), lambda: float(x[0]), lambda: x.__setitem__(mask, torch.ones(2)),
                  lambda: not mask.all()):
        with pytest.raises(AssertionError, match="waits|reads"), NoCopies(), NoReads():
            wrong()


@warp
@pytest.mark.parametrize("algo", ["ncdpo", "ppo", "dppo"])
@pytest.mark.parametrize("env, chunk", [("Hopper-v4", 1), ("Hopper-v4", 3), ("Ant-v4", 1)])
def test_a_rollout_and_the_epochs_of_an_update_never_read_the_device(algo, env, chunk):
    trainer = resident(env, algo=algo, action_chunk=chunk)
    trainer.env.envs.task.limit = 10
    moves = rollout_and_update(trainer)
    with NoCopies() as rollout, NoReads():
        next(moves)
    assert trainer.rollout.ended.any()  # also where episodes end
    next(moves)
    with NoCopies(), NoReads(but=["tolist"]) as reads:
        next(moves)
    assert reads.allowed == 1  # of all the diagnostics, once, when the update is over
    print(f"{algo}, {env}, chunks of {chunk}: {rollout.count / trainer.config.num_steps:.0f} torch kernels a decision")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("algo, compile", [("ncdpo", False), ("ncdpo", True), ("ppo", False), ("dppo", False)])
def test_nothing_waits_for_the_gpu_in_a_rollout_and_the_epochs_of_an_update(algo, compile):
    trainer = resident(algo=algo, compile=compile, device="cuda", num_envs=64, minibatch_size=256)
    assert trainer.env.vector == "warp" and trainer.env.home.type == "cuda"
    moves = rollout_and_update(trainer)
    torch.cuda.set_sync_debug_mode("error")
    try:
        next(moves)
        torch.cuda.set_sync_debug_mode("default")
        next(moves)
        torch.cuda.set_sync_debug_mode("warn")  # one wait, of the diagnostics when the update is over
        with pytest.warns(UserWarning, match="synchroniz") as waits:
            next(moves)
        assert len(waits) == 1
    finally:
        torch.cuda.set_sync_debug_mode("default")


@warp
def test_training_with_warp_learns_and_writes_what_any_run_does(tmp_path):
    history = ncdpo.train(config(env="Hopper-v4", vector="warp", num_envs=8, num_steps=16, runs=str(tmp_path),
                                 total_timesteps=8 * 16 * 30, learning_rate=3e-3, update_epochs=6))
    assert np.nanmean(history["return"][-5:]) > 1.5 * np.nanmean(history["return"][:5])
    assert (history["seconds_rollout"] > 0).all()


# --- 8  demonstrations -----------------------------------------------------------------------------------------------

def tiny_demos(lengths=(9, 2, 12, 7), seed=0):
    """Episodes of TinyBox-v0, numbered by their first observation; every action names its episode and its step."""
    rows, rng = [], np.random.default_rng(seed)
    for episode, length in enumerate(lengths):
        for t in range(length):
            action = np.array([episode / 10, 3 + t / 10], np.float32)
            rows.append((np.array([episode, t, 0, 0, 0, 0], np.float32), action, rng.normal(),
                         t == length - 1 and episode % 2 == 0, t == length - 1 and episode % 2 == 1))
    return dict(zip(cloning.DEMO_KEYS, (np.array(column) for column in zip(*rows))))


def saved(path, demos):
    np.savez(path, **demos)
    return str(path)


@pytest.mark.parametrize("H", [1, 3, 8])
def test_chunks_of_demonstrations_never_cross_an_episodes_end(tmp_path, capsys, H):
    demos, lengths = tiny_demos(), (9, 2, 12, 7)
    env = VectorEnv("TinyBox-v0", 2, CPU, chunk=H)
    obs, action, episode = cloning.load(saved(tmp_path / "d.npz", demos), env)
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


ROWS = np.arange(30)
DAMAGES = [
    (dict(observations=np.zeros((30, 5))), "observations of"),
    (dict(actions=np.zeros((30, 3))), "actions of"),
    (dict(terminations=np.zeros(29)), "terminations of"),
    (dict(observations=np.where(ROWS[:, None] == 11, np.nan, np.zeros((30, 6)))), "row 11"),
    (dict(rewards=np.where(ROWS == 4, np.inf, 0.0)), "row 4"),
    (dict(actions=np.where(ROWS[:, None] == 17, 11.0, np.full((30, 2), 2.5))), "row 17"),
    (dict(truncations=np.zeros(30), terminations=np.zeros(30)), "fewer than two episodes"),
    (dict(truncations=np.ones(30)), "--action-chunk 2"),
    ({key: np.zeros(0) for key in cloning.DEMO_KEYS}, "need"),
    (dict(rewards=np.zeros(30, object)), "cannot read"),  # a pickle, which may run anything
    (dict(rewards=np.full(30, "one")), "cannot read"), (dict(rewards=np.float64(1)), "need"),
]


def test_damaged_demonstrations_are_told_in_one_line(tmp_path, capsys):
    env, demos, path = VectorEnv("TinyBox-v0", 2, CPU, chunk=2), tiny_demos(), tmp_path / "d.npz"
    for damage, words in DAMAGES:
        with pytest.raises(ValueError, match=words):
            cloning.load(saved(path, demos | damage), env)
    without_a_key = saved(tmp_path / "key.npz", {key: demos[key] for key in cloning.DEMO_KEYS[:4]})
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "cut.npz").write_bytes(path.read_bytes()[:300])
    (tmp_path / "empty.npz").touch()
    for source in (without_a_key, *(tmp_path / f"{name}.npz" for name in ("text", "cut", "empty", "missing"))):
        flags = ["--demos", str(source), "--action-chunk", "2", "--critic-warmup", "0"]
        assert f"cannot read demonstrations from {source}" in complaint(
            capsys, *arguments("TinyBox-v0", tmp_path / "runs", *flags))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("algo, predict", [("ppo", "sample"), *(("ncdpo", predict) for predict in PREDICT)])
def test_cloning_recovers_two_modes_where_a_gaussian_finds_their_mean(capsys, algo, predict):
    """Demonstrated: -0.3 or 0.9 with equal probability, whatever the state; an untrained MLP proposes 0."""
    action = torch.where(torch.rand(4000, 1) < 0.5, 0.9, -0.3) + 0.02 * torch.randn(4000, 1)
    c = config(algo=algo, predict=predict, bc_steps=2000, bc_learning_rate=3e-3, hidden=64, denoising_steps=20)
    agent = ncdpo.Agent(c, 2, 1, False)
    cloning.clone(agent, c, (torch.randn(4000, 2), action, np.arange(4000) // 10))
    drawn = agent.policy.sample(torch.randn(1000, 2), deterministic=True)[0]
    if algo == "ppo":
        assert (drawn - 0.3).abs().mean() < 0.15
    else:
        near = ((drawn - 0.3).abs() - 0.6).abs() < 0.15
        assert near.float().mean() > 0.75 and 0.4 < (drawn > 0.3).float().mean() < 0.6
        losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
        assert len(losses) == 20 and losses[-1] < losses[0]


@pytest.mark.parametrize("predict", ["epsilon", "v"])
def test_cloned_one_hot_actions_are_drawn_as_often_as_they_were_shown(predict):  # E2, E8
    """Two states; with 20 steps (5, or predicting the sample, sharpen the frequencies) the chain's end is a choice."""
    p, state = torch.tensor([[0.2, 0.3, 0.5], [0.7, 0.1, 0.2]]), torch.randint(2, (8000,))
    action = 2 * torch.nn.functional.one_hot(torch.multinomial(p[state], 1).squeeze(1), 3) - 1.0
    c = config(predict=predict, bc_steps=3000, bc_learning_rate=3e-3, hidden=64, denoising_steps=20)
    agent = ncdpo.Agent(c, 1, 3, True)
    cloning.clone(agent, c, (2.0 * state[:, None] - 1, action, np.arange(8000) // 10))
    for s in (0, 1):
        drawn = agent.policy.sample(agent.obs_norm(torch.full((4000, 1), 2.0 * s - 1)))[0]
        error = (torch.bincount(drawn, minlength=3) / 4000 - p[s]) / (p[s] * (1 - p[s]) * 2 / 4000).sqrt()
        assert (error.abs() < 3).all()


@pytest.mark.parametrize("algo", ["ncdpo", "ppo"])
def test_a_cloned_expert_with_discrete_actions_reaches_its_return(tmp_path, capsys, algo):
    env, rows = VectorEnv("CartPole-v1", 8, CPU), []
    obs = env.reset(1)
    for _ in range(500):  # a rule that balances for the whole episode
        action = (obs @ torch.tensor([0.1, 0.3, 2.0, 1.0]) > 0).long()
        after, reward, terminated, truncated, _ = env.step(action)
        rows.append((obs, action, reward[:, 0], terminated, truncated))
        obs = after
    path = saved(tmp_path / "d.npz", {key: torch.stack(x, 1).flatten(0, 1).numpy()
                                      for key, x in zip(cloning.DEMO_KEYS, zip(*rows))})
    ncdpo.train(config(algo=algo, demos=path, total_timesteps=0, denoising_steps=10, bc_steps=2000, hidden=64,
                       runs=str(tmp_path)))
    assert "8 episodes, 4,000 steps, mean return 500.0\n" in capsys.readouterr().out
    assert ncdpo.evaluate(tmp_path / f"CartPole-v1__{algo}__1", 10, "cpu")["mean action"]["return"].mean() > 450
    with np.load(path) as file:
        demos = dict(file)
    for wrong in (2, -1, 0.5, np.nan):
        action = np.where(np.arange(4000) == 17, wrong, demos["actions"])
        with pytest.raises(ValueError, match="row 17"):
            cloning.load(saved(tmp_path / "wrong.npz", demos | {"actions": action}), env)


def test_cloning_never_trains_on_the_episodes_held_out_and_judges_them_on_the_same_noise(capsys):
    """A twentieth of them, rounded up; each observation is the number of its episode."""
    c = config(bc_steps=40, bc_learning_rate=1e-12)  # without learning, nothing else moves their loss
    agent, trained, held_out = shaken(ncdpo.Agent(c, 1, 1, False)), set(), set()
    agent.obs_norm = torch.nn.Identity()
    agent.obs_norm.update = lambda obs: None
    bc_loss, episode = agent.policy.bc_loss, np.arange(30).repeat(7)
    agent.policy.bc_loss = lambda obs, action: (
        (trained if torch.is_grad_enabled() else held_out).update(obs[:, 0].tolist()) or bc_loss(obs, action))
    cloning.clone(agent, c, (torch.tensor(episode)[:, None].float(), torch.zeros(210, 1), episode))
    assert len(held_out) == 2 and trained == set(range(30)) - held_out
    losses = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 20 and len(set(losses)) == 1 and float(losses[0]) > 0.01


def test_cloning_keeps_the_moving_average_of_its_weights():
    """Adam's weights w_1 ... w_n, averaged as m_1 = w_1, m_i = d m_(i-1) + (1 - d) w_i with d = 1 - 10 / n."""
    from torch.optim.optimizer import register_optimizer_step_post_hook
    n, weights, rates = 40, [], []
    hook = register_optimizer_step_post_hook(lambda adam, *_: (
        weights.append([p.clone() for p in adam.param_groups[0]["params"]]), rates.append(adam.param_groups[0]["lr"])))
    c = config(bc_steps=n, bc_learning_rate=1e-2)
    agent = ncdpo.Agent(c, 2, 1, False)
    cloning.clone(agent, c, (torch.randn(100, 2), torch.randn(100, 1), np.arange(100) // 5))
    hook.remove()
    shares = [(0.25 if i else 1) * 0.75 ** (n - 1 - i) for i in range(n)]
    assert sum(shares) == pytest.approx(1)
    for i, p in enumerate(agent.policy.parameters()):
        torch.testing.assert_close(p, sum(share * w[i] for share, w in zip(shares, weights)))
    np.testing.assert_allclose(rates, [1e-2 * (1 + math.cos(math.pi * i / n)) / 2 for i in range(n)])  # along a cosine


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A cloned run of TinyBox-v0 with chunks of 2, and the demonstrations."""
    folder = tmp_path_factory.mktemp("clone")
    path = saved(folder / "d.npz", tiny_demos())
    given = dict(env="TinyBox-v0", action_chunk=2, denoising_steps=3, bc_steps=60)
    ncdpo.train(config(demos=path, total_timesteps=0, runs=str(folder), **given))
    return folder / "TinyBox-v0__ncdpo__1", path, given


def test_clone_starts_from_the_demonstrations_statistics_and_dppo_starts_from_ncdpos_clone(clone):
    run, path, given = clone
    obs = cloning.load(path, VectorEnv("TinyBox-v0", 2, CPU, chunk=2))[0]
    trainer = ncdpo.Trainer(config(algo="dppo", min_std=0.3, **given))
    trainer.init_from(run)
    torch.testing.assert_close(trainer.agent.obs_norm.mean, obs.mean(0))
    torch.testing.assert_close(trainer.agent.obs_norm.var, obs.var(0, correction=0))
    cloned = checkpoint_of(run)["agent"]
    for name, tensor in trainer.policy.denoiser.state_dict().items():
        assert torch.equal(tensor, cloned["policy.denoiser." + name])
    assert trainer.policy.head.log_std.exp().tolist() == pytest.approx([0.3] * 4)


def test_init_from_goes_on_in_another_task_of_the_same_spaces_and_refuses_one_of_others(clone):
    run, _, given = clone
    trainer = ncdpo.Trainer(config(**given | dict(env="TinyEnds-v0")))
    trainer.init_from(run)
    for name, tensor in trainer.agent.state_dict().items():
        assert torch.equal(tensor, checkpoint_of(run)["agent"][name])
    with pytest.raises(UserError, match="Hopper-v4 has other observations or actions than .*: leave out --env"):
        ncdpo.Trainer(config(**given | dict(env="Hopper-v4"))).init_from(run)


@pytest.mark.parametrize("steps", [None, 2])
def test_statistics_of_observations_move_unless_some_steps_are_frozen(clone, steps):
    run, _, given = clone
    trainer = ncdpo.Trainer(config(**given, init_from=str(run), finetune_steps=steps))
    trainer.init_from(run)
    before = trainer.agent.obs_norm.mean.clone()
    trainer.iterate()
    assert torch.equal(trainer.agent.obs_norm.mean, before) == bool(steps)


def test_sigma_is_the_one_asked_for_or_else_the_one_learnt(clone):
    run, _, given = clone
    learnt = checkpoint_of(run)["agent"]["policy.head.log_std"].exp().tolist()
    for init_std, expected in ((ncdpo.Config.init_std, learnt), (0.4, [0.4] * 4)):
        trainer = ncdpo.Trainer(config(init_std=init_std, **given))
        torch.nn.init.constant_(trainer.policy.head.log_std, math.log(init_std))
        trainer.init_from(run)
        assert trainer.policy.head.log_std.exp().tolist() == pytest.approx(expected)


def test_critic_warmup_leaves_the_actor_where_it_was(clone):
    run, _, given = clone
    trainer = ncdpo.Trainer(config(critic_warmup=1, critic_learning_rate=1e-3, **given))
    trainer.init_from(run)
    actor, critic = ([p.clone() for p in part.parameters()] for part in (trainer.policy, trainer.critic))
    trainer.iterate()
    assert all(torch.equal(a, b) for a, b in zip(actor, trainer.policy.parameters()))
    assert not any(torch.equal(a, b) for a, b in zip(critic, trainer.critic.parameters()))
    trainer.iterate()
    assert not any(torch.equal(a, b) for a, b in zip(actor, trainer.policy.parameters()))


@pytest.mark.parametrize("flags, words", [
    (["--action-chunk", "4"], "--action-chunk"), (["--predict", "v"], "--predict"),
    (["--env", "Hopper-v4"], "leave out --env"), (["--algo", "ppo"], "not that of ppo"),
    (["--demos", "mine.npz"], "leave out one of them")])
def test_a_run_that_cannot_start_from_the_clone_says_so(clone, tmp_path, capsys, flags, words):
    flags = ["--init-from", clone[0], "--runs", tmp_path, "--total-timesteps", "512", *flags]
    assert words in complaint(capsys, *flags) and not list(tmp_path.iterdir())


def test_cloned_steps_that_will_be_frozen_are_cloned_too(clone, tmp_path, capsys):
    _, path, given = clone
    ncdpo.train(config(demos=path, total_timesteps=0, finetune_steps=2, runs=str(tmp_path), **given))
    run, agent = tmp_path / "TinyBox-v0__ncdpo__1", checkpoint_of(tmp_path / "TinyBox-v0__ncdpo__1")["agent"]
    tuned = [name for name in agent if ".denoiser.denoiser." in name]
    assert tuned and all(torch.equal(agent[name], agent[name.replace("r.denoiser", "r.frozen")]) for name in tuned)
    flags = ["--init-from", run, "--total-timesteps", "512", "--finetune-steps"]
    assert "finetune_steps = 2" in complaint(capsys, *flags, "1")  # its second network would be used for other steps
    assert "sampling_steps" in complaint(capsys, *flags, "2", "--sampling-steps", "2")
    assert "--sampling-steps" in complaint(capsys, "--evaluate", run, "--sampling-steps", "2")


def test_training_stops_once_twenty_episodes_have_the_mean_return_asked_for(tmp_path, monkeypatch):
    # episodes and their mean return in each update; (19 * 9.9 + 12) / 20 is the first mean above 10
    reports = iter([(1, 100.0), (30, 0.0), (1, 100.0), (0, math.nan), (5, 15.0), (20, 9.9), (1, 12.0)])

    def iterate(trainer):
        trainer.done += 1
        return dict(zip(("episodes", "return"), next(reports)), update=trainer.done, step=64 * trainer.done)

    monkeypatch.setattr(ncdpo.Trainer, "iterate", iterate)
    history = ncdpo.train(config(stop_at_return=10.0, total_timesteps=4096, runs=str(tmp_path)))
    assert history["update"].tolist() == [1, 2, 3, 4, 5, 6, 7]


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


@pytest.mark.parametrize("algo, env", [("ncdpo", "CartPole-v1"), ("dppo", "Pendulum-v1"), ("ppo", "Hopper-v4")])
def test_same_seed_gives_the_same_metrics_and_another_seed_gives_others(tmp_path, algo, env):
    def metrics(seed, name):
        c = config(algo=algo, env=env, seed=seed, runs=str(tmp_path / name), total_timesteps=128)
        trainer = ncdpo.Trainer(c)
        Path(c.runs).mkdir()
        ncdpo.run_updates(trainer, Path(c.runs))
        return rows_of(Path(c.runs))

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


def test_checkpoint_restores_everything(run, tmp_path):
    trainer, saved = ncdpo.Trainer(config(total_timesteps=512)), checkpoint_of(run) | {"rate": 1e-4}
    torch.save(saved, run / "checkpoint.pt")
    trainer.save(tmp_path)
    fresh = checkpoint_of(tmp_path)
    assert not any(same(fresh[name], saved[name]) for name in ("agent", "optimizer", "random", "update"))
    trainer.resume(run)
    trainer.save(tmp_path)
    assert same(checkpoint_of(tmp_path), saved) and torch.equal(torch.get_rng_state(), saved["random"])
    assert trainer.seconds == saved["seconds"] > 0
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


def test_resumed_run_plays_new_episodes(run):
    starts, state = [], checkpoint_of(run)
    for update in (4, 2):  # nor does it play the same ones wherever it goes on from
        torch.save({**state, "update": update}, run / "checkpoint.pt")
        trainer = ncdpo.Trainer(config(total_timesteps=512))
        starts += [trainer.obs] * (not starts)
        trainer.resume(run)
        starts.append(trainer.obs)
    assert len(torch.cat(starts).unique()) == 3 * starts[0].numel()


def test_printed_evaluation_is_that_of_a_later_one(finished):
    run, printed = finished
    later = ncdpo.describe(ncdpo.evaluate(run, 2, "cpu")).splitlines()
    assert [line.split(":")[0].strip() for line in later] == ["exploring", "mean action", "eta 0"]
    assert all("return" in line and line in printed.splitlines() for line in later)


def test_evaluation_leaves_random_state_and_run_alone(run):
    before, files = torch.get_rng_state(), contents(run)
    np.random.seed(0)
    numbers = np.random.get_state()[1].copy()
    one, two = ncdpo.evaluate(run, 3, "cpu"), ncdpo.evaluate(run, 3, "cpu")
    assert all(np.array_equal(one[way]["return"], two[way]["return"]) for way in ("exploring", "mean action", "eta 0"))
    assert contents(run) == files
    assert torch.equal(torch.get_rng_state(), before) and np.array_equal(np.random.get_state()[1], numbers)


@pytest.mark.parametrize("algo", ["ncdpo", "ppo"])
def test_evaluation_plays_one_whole_episode_in_each_environment(tmp_path, algo):
    history = ncdpo.train(config(env="Tiny-v0", algo=algo, runs=str(tmp_path), total_timesteps=64, episodes=1))
    assert history["length"] == 8 and history["return"] >= 8 * 5
    result = ncdpo.evaluate(tmp_path / f"Tiny-v0__{algo}__1", 5, "cpu")
    assert (ways := list(result)) == ["exploring", "mean action", "eta 0"][:2 if algo == "ppo" else 3]
    for way in ways:
        assert result[way]["length"].tolist() == [8] * 5
        assert len(set(result[way]["return"])) == 5  # each has a start of its own, which is in its rewards
        assert (8 * 5 <= result[way]["return"]).all() and (result[way]["return"] <= 8 * 8).all()


def test_evaluation_counts_first_episodes_and_leaves_the_noise_out_where_it_says_so(run, monkeypatch):
    step, sample, played = VectorEnv.step, ncdpo.Categorical.sample, []
    monkeypatch.setattr(VectorEnv, "step", lambda *given: played.append(step(*given)) or played[-1])
    monkeypatch.setattr(ncdpo.Categorical, "sample", lambda *given: sample(*given) * bool(given[-1].any()))
    result = ncdpo.evaluate(run, 8, "cpu")
    ended = torch.stack([terminated | truncated for _, _, terminated, truncated, _ in played]).int()
    for way in ("exploring", "mean action", "eta 0"):
        n = int(result[way]["length"].max())
        part, ended = ended[:n], ended[n:]
        assert result[way]["length"].tolist() == result[way]["return"].tolist() == (part.argmax(0) + 1).tolist()
        assert (n <= 11) == (way != "exploring")  # a cart that is always pushed to the left falls within 11 steps
    assert not len(ended)


def test_evaluation_and_film_of_a_task_without_an_end_stop_at_max_steps(film, tmp_path):
    run = untrained(tmp_path, env="Tiny-v0")
    saved_as = run / "config.json"
    saved_as.write_text(saved_as.read_text().replace("Tiny-v0", "TinyEndless-v0"))
    assert [x["length"].tolist() for x in ncdpo.evaluate(run, 2, "cpu", max_steps=9).values()] == 3 * [[9, 9]]
    assert len(film.play(run, "cpu", max_steps=11)[2]) == 11


def test_evaluation_normalises_as_training_did_and_starts_elsewhere(run, monkeypatch):
    reset, step, mean, norm = VectorEnv.reset, VectorEnv.step, ncdpo.NCDPO.mean, checkpoint_of(run)["agent"]
    starts, shown, seen = [], [], []
    monkeypatch.setattr(VectorEnv, "reset", lambda *given: starts.append(reset(*given)) or starts[-1])
    monkeypatch.setattr(VectorEnv, "step", lambda *given: (result := step(*given), shown.append(result[0]))[0])
    monkeypatch.setattr(ncdpo.NCDPO, "mean", lambda self, obs, omega: seen.append(obs) or mean(self, obs, omega))
    ncdpo.Trainer(config())
    monkeypatch.delattr(ncdpo.Normalizer, "update")
    ncdpo.evaluate(run, 2, "cpu")
    training, *ways = starts
    assert len(ways) == 3 and all(torch.equal(way, ways[0]) for way in ways) and not torch.isin(training, ways[0]).any()
    shown = ((torch.cat(ways + shown) - norm["obs_norm.mean"]) / norm["obs_norm.var"].sqrt()).clamp(-10, 10)
    assert torch.cdist(torch.cat(seen).double(), shown.double()).min(1).values.max() < 1e-4


def test_evaluation_at_eta_0_is_that_of_the_mean_action_of_a_chain_without_noise(clone, tmp_path):
    run = shutil.copytree(clone[0], tmp_path / "run")
    result = ncdpo.evaluate(run, 3, "cpu")
    (run / "config.json").write_text(json.dumps(json.loads((run / "config.json").read_text()) | {"eta": 0.0}))
    returns = ncdpo.evaluate(run, 3, "cpu")["mean action"]["return"]
    np.testing.assert_array_equal(returns, result["eta 0"]["return"])
    assert not np.isin(returns, result["mean action"]["return"]).any()


def test_ctrl_c_tells_how_to_go_on_and_loses_only_the_updates_since_the_checkpoint(tmp_path, capsys):
    command = [sys.executable, str(HERE / "ncdpo.py"), "--env", "CartPole-v1", "--no-compile", "--device", "cpu",
               "--num-envs", "16", "--num-steps", "16", "--minibatch-size", "256", "--episodes", "1",
               "--runs", str(tmp_path), "--checkpoint-every", "3"]
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # also where the tests run in a shell's background
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    run, patience = tmp_path / "CartPole-v1__ncdpo__1", time.monotonic() + 120
    while not ((run / "metrics.csv").is_file() and len(rows_of(run)) >= 4) and time.monotonic() < patience:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    done = checkpoint_of(run)["update"]
    assert process.returncode == 130 and error == (
        f"ncdpo: interrupted; update {done} is saved: python ncdpo.py --resume {run}\n")
    assert done % 3 == 0 and 0 < done <= len(rows_of(run)) < done + 3
    assert main(["--resume", str(run), "--total-timesteps", str(256 * (done + 1))]) == 0
    assert [int(row["update"]) for row in rows_of(run)] == list(range(1, done + 2))


def test_ctrl_c_before_a_checkpoint_says_that_there_is_none(tmp_path, monkeypatch, capsys):
    def interrupted(trainer):
        raise KeyboardInterrupt

    monkeypatch.setattr(ncdpo.Trainer, "iterate", interrupted)
    assert main(arguments("CartPole-v1", tmp_path)) == 130
    assert capsys.readouterr().err == "ncdpo: interrupted; there is no checkpoint yet.\n"


def test_metrics_have_a_column_for_each_thing_measured_and_an_empty_cell_is_not_a_number(run, tmp_path):
    history = ncdpo.read_metrics(run)
    assert list(history) == ncdpo.COLUMNS and all(len(column) == 4 for column in history.values())
    unknown = [name for name, column in history.items() if np.isnan(column).all()]
    assert unknown == ["success", "sigma", "chain_std"]  # CartPole knows no success, and a softmax has no sigma
    assert history["step"].tolist() == [64, 128, 192, 256]
    parts = history["seconds_rollout"] + history["seconds_update"]
    np.testing.assert_allclose(parts, np.diff(history["seconds"], prepend=0), rtol=1e-3)
    (tmp_path / "metrics.csv").write_text(",".join(ncdpo.COLUMNS) + "\n1,64" + "," * (len(ncdpo.COLUMNS) - 2) + "\n")
    history = ncdpo.read_metrics(tmp_path)
    assert history["step"] == 64 and all(np.isnan(history[name]).all() for name in ncdpo.COLUMNS[2:])


# --- 11  command line: mistakes ---------------------------------------------------------------------------------------

def arguments(env, runs, *more):
    return ["--env", env, "--runs", str(runs), "--no-compile", "--device", "cpu", "--num-envs", "2", "--hidden", "8",
            "--num-steps", "16", "--minibatch-size", "16", "--total-timesteps", "128", "--episodes", "1",
            "--checkpoint-every", "1", *more]


def complaint(capsys, *flags):
    """The one line with which the program refuses; asserts that it is one."""
    capsys.readouterr()
    code, error = main([str(flag) for flag in flags]), capsys.readouterr().err
    assert code == 2 and error.startswith("ncdpo: ") and error.endswith("\n") and error.count("\n") == 1, error
    return error


no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with CUDA")


@pytest.mark.parametrize("flags, words", [
    (["--env", "HalfCheeta-v4"], "Did you mean: `HalfCheetah`?"),
    (["--env", "HalfCheetah-v9"], "environments: [ `v4`, `v5` ]"),  # Gymnasium lists v2 and v3, which are gone
    (["--env", "Nothing-like-it"], "cannot make Nothing-like-it"),
    (["--env", "nowhere:Thing-v0"], "nowhere"),
    (["--env", "Hopper-v3"], "Hopper-v3"),  # its simulator is gone
    (["--env", "TinyDict-v0"], "only Box"),
    (["--env", "TinyMulti-v0"], "Discrete or"),
    (["--env", "TinyUnbounded-v0"], "bounded flat Box"),
    (["--denoising-steps", "0"], "--denoising-steps"),
    (["--denoising-steps", "101"], "100"),
    (["--total-timesteps", "100"], "--total-timesteps"),
    (["--num-envs", "many"], "--num-envs"),
    (["--episodes", "0"], "--episodes"),
    (["--action-chunk", "2"], "chunk"),  # of Discrete actions
    (["--demos", "some.npz"], "give --action-chunk 1"),  # the preset's 4 are for Box actions
    (["--env", "TinyBox-v0", "--action-chunk", "2", "--total-timesteps", "2048"], "at least 4096"),
    (["--algo", "dppo", "--scored-steps", "6"], "--denoising-steps"),
    (["--num-envs", "2", "--minibatch-size", "1", "--total-timesteps", "64"], "--minibatch-size"),
    (["--num-envs", "1", "--num-steps", "1", "--total-timesteps", "64"], "--num-steps"),  # nothing to normalise by
    (["--algo", "ppo", "--denoising-steps", "3"], "--denoising-steps has no effect on --algo ppo"),
    (["--algo", "ppo", "--min-std", "0.3"], "--min-std has no effect on --algo ppo"),
    (["--scored-steps", "2"], "--scored-steps has no effect on --algo ncdpo"),
    (["--bc-steps", "2"], "--bc-steps has no effect on --algo ncdpo without --demos"),
    (["--algo", "dppo", "--init-std", "0.3"], "--init-std has no effect on --algo dppo"),
    (["--algo", "dppo", "--no-chain-gradient"], "--chain-gradient has no effect on --algo dppo scoring 5 of 5 steps"),
    (["--algo", "dppo", "--scored-steps", "1", "--gamma-denoising", "0.5"], "scoring 1 of 5 steps"),
    (["--finetune-steps", "2"], "--finetune-steps would freeze a random network"),
    (["--critic-warmup", "9", "--critic-learning-rate", "1e-3", "--total-timesteps", "8192"], "none of 4 updates"),
    (["--algo", "sac"], "--algo"),
    (["--momentum", "0.9"], "--momentum"),
    (["--total", "5000"], "--total"),  # an abbreviation would be guessed
    (["--vector", "envpool"], "--vector"),
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


def test_the_file_alone_in_a_folder_trains_and_says_what_it_cannot_do(tmp_path):
    shutil.copy(HERE / "ncdpo.py", tmp_path)
    run = lambda *flags: subprocess.run([sys.executable, "ncdpo.py", *map(str, flags)], capture_output=True, text=True,
                                        cwd=tmp_path)
    small = ["--num-steps", "32", "--total-timesteps", "2048", "--no-compile", "--episodes", "1"]
    assert run("--env", "Hopper-v4", *small).returncode == 0
    row = rows_of(tmp_path / "runs" / "Hopper-v4__ncdpo__1")[-1]
    assert row["approx_kl"] and not row["chain_std"] and not row["sigma"]
    saved_as = tmp_path / "runs" / "Hopper-v4__ncdpo__1" / "config.json"
    saved_as.write_text(saved_as.read_text().replace('"demos": null', '"demos": "demos.npz"'))
    assert run("--evaluate", saved_as.parent, "--episodes", 1).returncode == 0
    refused = run("--env", "Hopper-v4", "--demos", "demos.npz", "--total-timesteps", 0)
    assert refused.returncode == 2 and "needs this project's notebooks/cloning.py" in refused.stderr


def test_runs_that_cannot_be_a_folder_is_a_mistake(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert "file" in complaint(capsys, *arguments("CartPole-v1", tmp_path / "file"))
    assert contents(tmp_path) == {Path("file"): b"mine"}


@pytest.mark.parametrize("flag", ["--evaluate", "--resume"])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "text", "foreign", "list", "harmful", "config"])
def test_a_damaged_run_is_told_in_one_line(run, capsys, flag, damage):
    class Harmful:
        def __reduce__(self):  # what its file does to whoever reads it
            return Path.touch, (run / "harm",)

    path = run / "checkpoint.pt"
    if damage == "missing":
        path.unlink()
    elif damage in ("foreign", "list", "harmful"):
        torch.save({"foreign": {"model": torch.ones(2)}, "list": [1, 2], "harmful": Harmful()}[damage], path)
    elif damage == "config":
        (run / "config.json").write_text('{"learning_speed": 1}')
    else:
        path.write_bytes({"empty": b"", "text": b"hello\n", "truncated": path.read_bytes()[:5000]}[damage])
    before = contents(run)
    assert str(run) in complaint(capsys, flag, run, *([] if flag == "--evaluate" else ["--total-timesteps", "512"]))
    assert contents(run) == before


def test_resume_refuses_another_task_or_policy_or_chain(run, capsys):
    """Also where the weights would fit: a run must not silently become another one."""
    before, kept = contents(run), ncdpo.load_config(run)
    for name in vars(kept).keys() - set(ncdpo.MAY_CHANGE["resume"]):
        with pytest.raises(UserError, match=f"leave out --{name.replace('_', '-')}.$"):
            ncdpo.train(dataclasses.replace(kept, total_timesteps=4096, **{name: "another"}), resume=run)
    for flag, value in (("--env", "Tiny-v0"), ("--algo", "dppo"), ("--temperature", "0.5"), ("--demos", "some.npz")):
        assert f"leave out {flag}." in complaint(capsys, "--resume", run, "--total-timesteps", "4096", flag, value)
    assert contents(run) == before


def test_resume_refuses_a_finished_run_and_another_verb(run, capsys):
    before = contents(run)
    assert "--total-timesteps" in complaint(capsys, "--resume", run)
    assert "not allowed with" in complaint(capsys, "--resume", run, "--evaluate", run)
    assert contents(run) == before


@pytest.mark.parametrize("flags", [["--episodes", "0"], ["--episodes", "-3"], ["--device", "nonsense"],
                                   ["--eta", "0.5"], ["--env", "Hopper-v4"]])
def test_evaluation_refuses_bad_numbers_and_what_it_would_ignore(run, capsys, flags):
    assert flags[0] in complaint(capsys, "--evaluate", run, *flags)


def test_a_run_is_evaluated_in_another_task_of_the_same_spaces(clone, capsys):
    assert main(["--evaluate", str(clone[0]), "--env", "TinyEnds-v0", "--episodes", "2", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.count("length 7.0") == 3  # where it was trained an episode has 8 steps


def test_evaluate_prints_as_many_episodes_as_asked_for(run, capsys):
    assert main(["--evaluate", str(run), "--episodes", "3", "--device", "cpu"]) == 0
    expected = ncdpo.describe(ncdpo.evaluate(run, 3, "cpu")).splitlines()
    assert capsys.readouterr().out.splitlines()[:3] == expected[:3]


@pytest.mark.parametrize("given", [
    dict(algo="sac"), dict(predict="x0"), dict(gamma=1.5), dict(eta=-0.5), dict(gae_lambda=1.1),
    dict(gamma_denoising=-0.1), dict(ent_coef=-1), dict(vf_coef=-1), dict(num_envs=0), dict(num_steps=-1),
    dict(update_epochs=0), dict(seed=-1), dict(checkpoint_every=0), dict(learning_rate=math.nan),
    dict(clip_coef=math.inf), dict(target_kl=math.nan)])
def test_configurations_made_in_python_are_checked_too(given):
    with pytest.raises(UserError, match="--" + next(iter(given)).replace("_", "-")):
        config(**given).check()


def test_defaults_are_the_presets_of_the_task_but_for_what_is_given():
    hopper, cloning = ncdpo.PRESETS["Hopper"], ncdpo.PRESETS["demonstrations"]
    parsed = ncdpo.parse(["--env", "Hopper-v4", "--gamma", "0.5"])[0]
    made = ncdpo.Config.for_task("x/Hopper-v5", gamma=0.5)
    for c in (parsed, made):
        assert (c.gamma, c.init_std, c.min_std) == (0.5, hopper["init_std"], hopper["min_std"])
        assert c.learning_rate == ncdpo.Config.learning_rate and hopper["init_std"] != ncdpo.Config.init_std
    ncdpo.parse(["--algo", "ppo", "--denoising-steps", "5"])  # a default may be repeated, also where it has no effect
    c = ncdpo.parse(["--env", "Hopper-v4", "--demos", "some.npz", "--gamma", "0.5"])[0]
    assert (c.gamma, c.init_std, c.action_chunk) == (0.5, cloning["init_std"], cloning["action_chunk"])


def test_a_run_that_starts_from_another_takes_over_its_settings_but_not_its_end(tmp_path):
    kept = dict(env="Pendulum-v1", eta=0.5, seed=7, action_chunk=3)
    left = dict(total_timesteps=77, demos="old.npz", stop_at_return=3.0, runs="elsewhere")
    (tmp_path / "config.json").write_text(json.dumps(kept | left))
    c, *others = ncdpo.parse(["--init-from", str(tmp_path), "--seed", "8", "--demos", "new.npz"])
    assert c == ncdpo.Config(**kept | dict(seed=8, demos="new.npz", init_from=str(tmp_path))) and others == [None, None]
    c, resume, _ = ncdpo.parse(["--resume", str(tmp_path), "--total_timesteps=78"])  # underscores do as well
    assert c == ncdpo.Config(**kept | left | dict(total_timesteps=78)) and resume == str(tmp_path)


def test_help_says_what_each_field_is_and_its_default(capsys):
    documented = {name: text for fields in ncdpo.documented_fields().values() for name, text in fields.items()}
    assert list(documented) == [field.name for field in dataclasses.fields(ncdpo.Config)]
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for name, text in documented.items():
        assert f"--{name.replace('_', '-')}" in printed
        assert re.sub(r"\s", "", f"{text} [{getattr(ncdpo.Config, name)}]") in re.sub(r"\s", "", printed)


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


@pytest.mark.parametrize("wrong", ["observation", "infinity", "reward", "exception"])
def test_an_environment_that_breaks_keeps_the_last_good_checkpoint(tmp_path, capsys, monkeypatch, wrong):
    monkeypatch.setattr(Tiny, "made_to_fail", (40, wrong))  # in the third rollout of 16 steps
    error = complaint(capsys, *arguments("TinyBox-v0", tmp_path))
    run = tmp_path / "TinyBox-v0__ncdpo__1"
    assert f"--resume {run}" in error
    assert ("in step: the physics exploded" if wrong == "exception" else "not finite in update 3") in error
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


# --- notebooks/demos.py and notebooks/film.py ------------------------------------------------------------------------

def untrained(runs, **given):
    """A run folder whose policy has only seen one update."""
    ncdpo.train(config(runs=str(runs), num_steps=16, total_timesteps=32 * given.get("action_chunk", 1), **given))
    return next(runs.glob("*__1"))


def script(name):
    """A fixture: the module notebooks/<name>.py, imported as its own program would be."""
    @pytest.fixture(name=name)
    def module(monkeypatch):
        monkeypatch.syspath_prepend(str(HERE / "notebooks"))
        return pytest.importorskip(name)
    return module


demos, film, curves, speed = map(script, ("demos", "film", "curves", "speed"))


def scripts_complaint(capsys, script, *line):
    """The one line with which a script refuses; asserts that it is one."""
    capsys.readouterr()
    code, said = script.main([str(word) for word in line]), capsys.readouterr()
    assert code == 2 and said.err.startswith(f"{script.__name__}: ") and said.err.count("\n") == 1 and said.out == ""
    return said.err


def saved_hdf5(path, arrays):
    names = dict(terminations="terminals", truncations="timeouts")
    with pytest.importorskip("h5py").File(path, "w") as file:
        for key, array in arrays.items():
            file[names.get(key, key)] = array
    return path


def loaded(path):
    with np.load(path, allow_pickle=False) as file:
        assert set(file) == set(cloning.DEMO_KEYS)
        return dict(file)


def test_recorded_demonstrations_are_what_the_run_plays(demos, clone, tmp_path, capsys):
    """Recorded step by step although the policy decides chunks; read again, they are whole episodes of the task."""
    path = tmp_path / "own.npz"
    assert demos.main(["record", str(clone[0]), str(path), "--steps", "4004", "--deterministic"]) == 0
    own = loaded(path)
    ends = own["terminations"] | own["truncations"]
    obs, played = own["observations"], own["actions"].sum(1)
    assert len(ends) == 4004 and ends.sum() == 2 * math.ceil(2002 / 8)  # two environments, episodes of eight steps
    follows = ~ends[:-1]
    np.testing.assert_allclose(obs[1:, 2][follows], played[:-1][follows], rtol=1e-5)  # obs[2] is the last action's sum
    np.testing.assert_allclose(own["rewards"], played + obs[:, 0], rtol=1e-5)
    whole = own["rewards"].reshape(2, 2002)[:, :2000].sum() / 500  # the last two steps of each environment are cut off
    assert f"500 whole episodes of mean return {whole:.1f}, 2 cut off" in capsys.readouterr().out
    cloning.load(str(path), VectorEnv("TinyBox-v0", 2, CPU, chunk=2))


@pytest.mark.parametrize("env, least", [("Tiny-v0", 5), ("TinyBox-v0", -1), ("TinyWide-v0", -2)])
def test_recorded_actions_are_those_of_the_task_in_its_dtype(demos, tmp_path, env, least):
    run, played, step = untrained(tmp_path, env=env, init_std=2.0), [], Tiny.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tiny, "step", lambda self, action: played.append(action) or step(self, action))
        assert demos.main(["record", str(run), str(tmp_path / "own.npz"), "--steps", "50", "--device", "cpu"]) == 0
    actions = loaded(tmp_path / "own.npz")["actions"]  # at a bound where the Gaussian asked for more
    np.testing.assert_array_equal(actions, np.array(played))
    assert actions.dtype == gym.make(env).action_space.dtype and least <= actions.min()


def test_a_new_episode_asks_for_a_new_chunk(demos, tmp_path, monkeypatch):
    """Chunks of four in episodes of twenty-one steps; every decision names the steps of its chunk."""
    run, asked = untrained(tmp_path, env="TinyWide-v0", action_chunk=4), []
    monkeypatch.setattr(ncdpo.Normalizer, "forward", lambda self, x: x)

    def sample(self, obs, deterministic=False):
        asked.append(round(obs[0, 1].item()))
        return torch.linspace(-0.3, 0.3, 4).repeat_interleave(2)[None], None, None

    monkeypatch.setattr(ncdpo.NCDPO, "sample", sample)
    own = demos.record(run, 63, False, "cpu")
    assert asked == [0, 4, 8, 12, 16, 20] * 3
    whole = np.linspace(-0.3, 0.3, 4).tolist() * 5 + [-0.3]
    np.testing.assert_allclose(own["actions"][0, :, 0], 2 + 4 * np.tile(whole, 3), rtol=1e-6)


def test_recorded_episodes_start_elsewhere_than_those_of_training_and_evaluation(demos, clone, monkeypatch):
    reset, starts = VectorEnv.reset, []
    monkeypatch.setattr(VectorEnv, "reset", lambda *given: starts.append(reset(*given)[:, 0]) or reset(*given))
    ncdpo.Trainer(config(env="TinyBox-v0"))
    ncdpo.evaluate(clone[0], 2, device="cpu")
    demos.record(clone[0], 4000, False, "cpu")
    assert len(starts[-1]) == 2 and not torch.isin(starts[-1], torch.cat(starts[:-1])).any()


def test_d4rl_files_become_the_same_numbers(demos, tmp_path, capsys):
    tiny, out = tiny_demos(), tmp_path / "d.npz"
    source = saved_hdf5(tmp_path / "d.hdf5", tiny | {"terminations": tiny["terminations"].astype(np.uint8)})
    assert demos.main(["convert", str(source), str(out)]) == 0
    for key, array in loaded(out).items():
        np.testing.assert_array_equal(array, tiny[key])
    mean = np.mean([tiny["rewards"][tiny["observations"][:, 0] == e].sum() for e in range(4)])
    assert f"30 steps, 4 whole episodes of mean return {mean:.1f}, 0 cut off" in capsys.readouterr().out
    cloning.load(str(out), VectorEnv("TinyBox-v0", 2, CPU))


def test_several_sources_become_one_file(demos, tmp_path, capsys):
    """Each keeps its episodes: the first one's last, cut off without an end, does not run on into the second."""
    parts = [{key: array[:-1] for key, array in tiny_demos(seed=seed).items()} for seed in (0, 1)]
    sources = [saved_hdf5(tmp_path / f"{i}.hdf5", part) for i, part in enumerate(parts)]
    assert demos.main(["convert", *map(str, sources), str(tmp_path / "d.npz")]) == 0
    both = loaded(tmp_path / "d.npz")
    for key in ("observations", "actions", "rewards", "terminations"):
        np.testing.assert_array_equal(both[key], np.concatenate([part[key] for part in parts]))
    cut = sum(part["truncations"].sum() for part in parts)
    assert both["truncations"][[28, 57]].all() and both["truncations"].sum() == cut + 2
    other = saved_hdf5(tmp_path / "other.hdf5", parts[0] | {"observations": parts[0]["observations"][:, :2]})
    flags = ["convert", str(sources[0]), str(other), str(tmp_path / "e.npz")]
    assert demos.main(flags) == 2 and "of different tasks" in capsys.readouterr().err
    assert not (tmp_path / "e.npz").exists()


def test_minari_datasets_become_the_same_numbers(demos, tmp_path, monkeypatch, capsys):
    pytest.importorskip("h5py")
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    tiny, buffers = tiny_demos(), []
    for e in range(4):
        one = {key: array[tiny["observations"][:, 0] == e] for key, array in tiny.items()}
        one["observations"] = np.concatenate([one["observations"], np.full((1, 6), 99, np.float32)])  # where it ended
        one = {key: list(array) if array.ndim == 1 else array for key, array in one.items()}
        buffers.append(minari.data_collector.EpisodeBuffer(**one))
    space = gym.spaces.Box(-np.inf, np.inf, (6,), np.float32)
    minari.create_dataset_from_buffers("tiny/box-v0", buffers, observation_space=space, action_space=BOX,
                                       algorithm_name="-", author="-", author_email="-", code_permalink="-",
                                       description="-")
    assert demos.main(["convert", "minari:tiny/box-v0", str(tmp_path / "d.npz")]) == 0
    for key, array in loaded(tmp_path / "d.npz").items():
        np.testing.assert_allclose(array, tiny[key], rtol=1e-6)
    monkeypatch.setattr(minari, "load_dataset", lambda name, download: 1 / 0)
    monkeypatch.setattr(minari, "list_remote_datasets", lambda: 1 / 0)  # no network
    flags = "convert", "minari:tiny/boxx-v0", tmp_path / "e.npz"
    assert "did you mean tiny/box-v0" in scripts_complaint(capsys, demos, *flags)


@pytest.mark.parametrize("package, source", [("h5py", "d.hdf5"), ("minari", "minari:a/b-v0")])
def test_a_missing_package_of_a_source_is_named(demos, tmp_path, monkeypatch, capsys, package, source):
    monkeypatch.setitem(sys.modules, package, None)
    error = scripts_complaint(capsys, demos, "convert", source, tmp_path / "d.npz")
    assert f"needs the package {package}: pip install {package}." in error


@pytest.mark.parametrize("damage, words", [
    (None, "cannot read"), (b"no archive", "cannot read"), (dict(truncations=None), "timeouts"),
    (dict(rewards=ROWS[1:]), "differ in length"), (dict(rewards=1.0), "cannot read"),
    (dict.fromkeys(cloning.DEMO_KEYS, ROWS[:0]), "empty")], ids=str)
def test_damaged_d4rl_files_are_told_in_one_line(demos, tmp_path, capsys, damage, words):
    path = tmp_path / "d.hdf5"
    if isinstance(damage, dict):
        saved_hdf5(path, {key: array for key, array in (tiny_demos() | damage).items() if array is not None})
    elif damage:
        path.write_bytes(damage)
    error = scripts_complaint(capsys, demos, "convert", path, tmp_path / "d.npz")
    assert words in error and not (tmp_path / "d.npz").exists()


def test_demos_refuses_what_it_cannot_do(demos, clone, tmp_path, capsys):
    (tmp_path / "mine.npz").write_bytes(b"mine")
    for line, words in (("mine.npz --steps 9", "exists"), ("none/own.npz --steps 9", "folder"),
                        ("x --steps 0", "--steps"), ("x --device nonsense", "--device")):
        out, *flags = line.split()
        assert words in scripts_complaint(capsys, demos, "record", clone[0], tmp_path / out, *flags)
    assert "no run folder" in scripts_complaint(capsys, demos, "record", tmp_path, tmp_path / "x")
    assert (tmp_path / "mine.npz").read_bytes() == b"mine" and len(list(tmp_path.iterdir())) == 1


def film_of(film, capsys, run, out):
    """Number of frames, shade of each, milliseconds in all, steps and return of a film of Tiny."""
    image = pytest.importorskip("PIL.Image")
    capsys.readouterr()
    assert film.main([str(run), str(out), "--device", "cpu"]) == 0
    printed = re.search(r"of (\d+) steps with the return (\S+), (\d+) frames", capsys.readouterr().out)
    steps, score, count = printed.groups()
    shades, time = [], 0
    with image.open(out) as picture:
        for i in range(picture.n_frames):
            picture.seek(i)
            assert picture.size == (48, 32) and picture.info["duration"] >= 20  # browsers slow faster ones down
            shades.append(picture.convert("L").getpixel((0, 0)))
            time += picture.info["duration"]
    assert int(count) == len(shades)
    return shades, time, int(steps), float(score)


@pytest.mark.parametrize("env, fps, every", [("Tiny-v0", 20, 2), ("TinyBox-v0", 50, 2), ("TinyWide-v0", 125, 3)])
def test_film_shows_an_evaluations_episode_at_its_true_speed(film, tmp_path, capsys, monkeypatch, env, fps, every):
    """Every other step, or as many as make fifty frames a second; chunks are played action by action."""
    monkeypatch.setitem(Tiny.metadata, "render_fps", fps)
    run = untrained(tmp_path, env=env, action_chunk=1 if env == "Tiny-v0" else 4, init_std=2.0)
    shades, time, steps, score = film_of(film, capsys, run, tmp_path / "film.gif")
    expected = ncdpo.evaluate(run, 1, device="cpu")["mean action"]
    assert score == pytest.approx(expected["return"][0], abs=0.06) and steps == expected["length"][0]
    assert shades == [7 * t for t in range(0, steps, every)]
    assert time == pytest.approx(1000 * every * len(shades) / fps, abs=10)


@pytest.mark.parametrize("env", ["CartPole-v1", "Hopper-v4"])
def test_film_of_a_real_task(film, tmp_path, capsys, env):
    try:
        task = gym.make(env, render_mode="rgb_array")
        task.reset()
        task.render()
    except Exception as error:  # no pygame, no screen
        pytest.skip(str(error))
    run = untrained(tmp_path, env=env)
    frames, _, rewards = film.play(run, "cpu")
    assert len(rewards) == ncdpo.evaluate(run, 1, device="cpu")["mean action"]["length"][0]
    assert frames[0].dtype == np.uint8 and frames[0].ndim == 3 and (frames[0] != frames[-1]).any()


def test_strip_shows_evenly_spaced_moments_and_is_white_where_an_episode_has_ended(film):
    shade = lambda value: np.full((20, 30, 3), value, np.uint8)
    picture = np.asarray(film.strip([[shade(10 * i) for i in range(15)], [shade(200)] * 5], frames=8, size=4))
    assert picture.shape == (8, 32, 3)
    assert picture[2, 1::4, 0].tolist() == list(range(0, 160, 20)) and (picture[4:, :12] == 200).all()
    assert (picture[4:, 12:] == 255).all()


def test_film_refuses_what_it_cannot_do(film, clone, tmp_path, capsys, monkeypatch):
    assert "folder" in scripts_complaint(capsys, film, clone[0], tmp_path / "none" / "film.gif")
    assert ".gif, .mp4 or .png" in scripts_complaint(capsys, film, clone[0], tmp_path / "film.avi")
    assert "one run" in scripts_complaint(capsys, film, clone[0], clone[0], tmp_path / "film.gif")
    assert "no run folder" in scripts_complaint(capsys, film, tmp_path, tmp_path / "film.gif")
    monkeypatch.setattr(film.importlib.util, "find_spec", lambda name: None)
    assert "pip install imageio-ffmpeg" in scripts_complaint(capsys, film, clone[0], tmp_path / "film.mp4")
    monkeypatch.setattr(Tiny, "render", lambda self: 1 / 0)
    assert "MUJOCO_GL=egl" in scripts_complaint(capsys, film, clone[0], tmp_path / "film.gif")
    assert not list(tmp_path.iterdir())


def test_speed_prints_a_row_for_each_number_of_environments_and_policy(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(HERE / "notebooks"))
    monkeypatch.setattr(ncdpo.torch, "compile", lambda function, **_: function)
    importlib.import_module("speed").main("--env CartPole-v1 --device cpu --num-envs 4 8 --num-steps 8".split())
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0].strip() for row in rows] == ["4", "4", "8", "8"]
    assert all(float(row[i].replace(",", "")) > 0 for row in rows for i in (2, 3))


# --- notebooks/curves.py ---------------------------------------------------------------------------------------------

def test_picture_of_runs_shows_the_updates_with_episodes_and_few_of_them_as_points(tmp_path, curves):
    for name, n in (("short", 4), ("long", 300)):
        (tmp_path / name).mkdir()
        rows = [f"{i},{i},{2 * i},{'' if i == 1 else -i}" for i in range(n)]
        (tmp_path / name / "metrics.csv").write_text("\n".join(["update,step,seconds,return", *rows]))
    picture = curves.picture([tmp_path / "short", tmp_path / "long"])
    for axes, factor in zip(picture.axes, (1, 2), strict=True):
        for line, n, name in zip(axes.lines, (4, 300), ("short", "long"), strict=True):
            steps = np.delete(np.arange(n), 1)
            assert line.get_xdata().tolist() == (factor * steps).tolist() and line.get_label() == name
            assert line.get_ydata().tolist() == (-steps).tolist() and (line.get_marker() == ".") == (n == 4)


def test_figure_against_steps_shows_final_returns_at_each_number_of_steps(curves, tmp_path):
    values = {"ppo": 1, "dppo-s20": 20, "ncdpo-k10": 10, "ncdpo-k2": 2, "ncdpo-epsilon": 9}
    for line, value in values.items():
        rows = [f"{seed},{step},1,1,{value + seed},5" for seed in (0, 1, 2) for step in (1, 2)]
        (tmp_path / f"Task-v0__{line}.csv").write_text("\n".join(["seed,step,seconds,episodes,return,length", *rows]))
    loaded = curves.load(tmp_path)
    assert list(loaded["Task-v0"]) == ["ncdpo-k2", "ncdpo-k10", "ppo", "dppo-s20"]  # "ncdpo-epsilon" is no line
    assert [row.split("|")[2].strip() for row in curves.table(loaded).splitlines()[2:]] == [
        "NCDPO, K = 2", "NCDPO, K = 10", "MLP+PPO", "DPPO, S = 20"]
    del loaded["Task-v0"]["ppo"]
    points = [bars[0].get_xydata().tolist() for bars in curves.against_steps(loaded).axes[0].containers]
    assert points == [[[2, 3], [10, 11]], [[20, 21]]]


def test_interquartile_mean_cuts_a_quarter_rounded_down_at_each_end(curves):
    assert curves.interquartile_mean([100.0, 1, 2, 6, -50]) == 3  # (1 + 2 + 6) / 3, not the median
    x = np.random.default_rng(0).normal(size=(3, 8))
    np.testing.assert_allclose(curves.interquartile_mean(x, 1), np.sort(x)[:, 2:6].mean(1))


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says(curves):
    draws = np.random.default_rng(1).normal(size=(400, 30))
    low, high = curves.interval(np.stack([curves.bootstrap(x, 400) for x in draws], 1))
    assert 0.88 < np.mean((low < 0) & (0 < high)) < 0.98
    np.testing.assert_allclose(curves.interval(np.arange(101.0)), [2.5, 97.5])  # a fortieth is left out at each end


def test_ratio_of_known_sets_of_seeds(curves):
    point, low, high = curves.ratio([20.0] * 5, [10.0] * 5)
    assert (point, low, high) == (2, 2, 2)
    point, low, high = curves.ratio([9.0, 10, 10, 10, 50], [1.0, 5, 5, 5, 6])
    assert point == 2 and low <= point <= high and low < high


def test_steps_to_a_threshold_are_those_of_a_straight_line(curves):
    curve = {"step": np.arange(1, 101)[None] * 10_000.0, "return": np.arange(100)[None] * 1.0}
    curve = {name: x.repeat(2, 0) for name, x in curve.items()} | {"seconds": np.arange(200.0).reshape(2, 100)}
    steps = curves.reach(curve, 50)
    assert steps.shape == (2,) and abs(steps[0] - 530_000) < 11_000  # the mean of five rows lags by two
    assert curves.reach(curve, 50, "seconds").tolist() == [52, 152]  # each seed has its own clock
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


# --- the notebooks ---------------------------------------------------------------------------------------------------

NOTEBOOKS = sorted((HERE / "notebooks").glob("*.ipynb"))


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cell):
    """What a cell leaves on the page: the kinds of its outputs, but for warnings."""
    data = [{"image/png", "text/markdown", "text/html"} & set(out.data) for out in cell.outputs if "data" in out]
    return data, any(out.output_type == "stream" and out.name == "stdout" for out in cell.outputs)


@notebooks
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_shows_what_it_showed_when_it_was_committed(path):
    if path.stem == "06_games":
        pytest.importorskip("vmas")
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    committed = nbformat.read(path, as_version=4)
    assert [cell.execution_count for cell in code_cells(committed)] == list(range(1, len(code_cells(committed)) + 1))
    fresh = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(fresh, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
    for was, now in zip(code_cells(committed), code_cells(fresh)):
        assert shown(was) == shown(now), was.source


README = HERE / "README.md"
TEXTS = [README, *(HERE / "notebooks" / f"{name}.md" for name in ("RESULTS", "TUNING", "RUNNING"))]


def test_every_equation_of_the_readme_is_in_its_notebook_and_in_the_file():
    rows = re.findall(r"^\| (E\d+) \|.*\| ([^|]*) \| (\d) \|$", README.read_text(), re.MULTILINE)
    assert [label for label, _, _ in rows] == [f"E{i}" for i in range(1, 19)]
    for label, code, number in rows:
        cells = json.loads(NOTEBOOKS[int(number) - 1].read_text())["cells"]
        assert re.search(rf"\b{label}\b", "".join(line for cell in cells for line in cell["source"])), (label, number)
        for name in re.findall(r"`([\w.]+)`", code):
            operator.attrgetter(name)(health if name.startswith("chain_") else ncdpo)


def test_readme_is_short_and_names_only_flags_files_and_functions_that_exist():
    lines = README.read_text().splitlines()
    assert len(lines) <= 170 and max(map(len, lines)) <= 120
    sources = [path.read_text() for path in (HERE / "ncdpo.py", *sorted((HERE / "notebooks").glob("*.py")))]
    flags = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(ncdpo.Config)} | {"--help"}
    others = {"--standalone", "--nproc-per-node"}  # torchrun's
    flags |= {"--no-" + flag[2:] for flag in flags} | set(re.findall(r'add_argument\("(--[\w-]+)"', "".join(sources)))
    for path in TEXTS:
        text = path.read_text()
        wrong = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text)) - flags - others
        assert not wrong, (path.name, wrong)
    named = re.findall(r"ncdpo\.([\w.]+)\(", README.read_text()) + re.findall(r"`(Trainer\.\w+)`", README.read_text())
    for name in named:
        operator.attrgetter(name)(ncdpo)
    assert len(named) >= 3


def anchors(path) -> list[str]:
    """GitHub's anchors of a Markdown file's headings."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall("^#+ (.*)", text, re.MULTILINE)
    names = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
    return [f"{name}-{before}" if (before := names[:i].count(name)) else name for i, name in enumerate(names)]


@pytest.mark.parametrize("path", [*TEXTS, *NOTEBOOKS], ids=lambda path: path.name)
def test_links_lead_to_files_and_headings_that_exist(path):
    text = path.read_text()
    if path.suffix == ".ipynb":
        text = "\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")
    for file, heading in re.findall(r"\]\((?!http|attachment)([^)#\s]*)#?([^)\s]*)\)", text):
        target = path.parent / file if file else path
        assert target.exists(), file
        if heading:
            assert heading in anchors(target), f"{file}#{heading}"


# --- games -----------------------------------------------------------------------------------------------------------

@pytest.fixture
def games(monkeypatch):
    """notebooks/games.py, with a scenario "coded" whose numbers tell of which world and agent they are."""
    pytest.importorskip("vmas", reason="games need vmas")
    games = pytest.importorskip("notebooks.games")
    games.load("football")  # imports VMAS without its noise
    from vmas.simulator.core import Agent, World
    from vmas.simulator.scenario import BaseScenario

    class Coded(BaseScenario):
        """World w ends after 3 + w steps. An agent observes w, itself, the step, a random start, its last action."""

        def make_world(self, batch_dim, device, **kwargs):
            world, self.w = World(batch_dim, device), torch.arange(batch_dim, device=device)
            for i in range(kwargs.pop("n_agents", 3)):
                world.add_agent(Agent(f"agent {i}"))
            self.hidden = [{"t": torch.zeros(batch_dim)}]
            return world

        def reset_world_at(self, env_index=None):
            assert env_index is None  # one at a time is slow
            self.hidden[0]["t"][:] = 0
            self.start = torch.rand(len(self.w))
            for agent in self.world.agents:
                agent.last = torch.zeros(len(self.w))

        def process_action(self, agent):
            agent.last = agent.action.u[:, 0].clone()

        def post_step(self):
            self.hidden[0]["t"] += 1

        def observation(self, agent):
            i = torch.full_like(self.start, self.world.agents.index(agent))
            return torch.stack([self.w, i, self.hidden[0]["t"], self.start, agent.last], 1)

        def reward(self, agent):
            return 100 * self.w + 10 * self.world.agents.index(agent) + self.hidden[0]["t"]

        def done(self):
            return self.hidden[0]["t"] >= 3 + self.w

        def info(self, agent):
            return {"well": self.w != 1}  # world 1 never ends well

    real = games.load
    monkeypatch.setattr(games, "load", lambda name: Coded() if name == "coded" else real(name))
    monkeypatch.setitem(games.WON, "test_ncdpo", lambda info: info["well"])
    return games


def test_actions_observations_and_rewards_of_agents_land_on_their_rows(games):
    game = games.make_vec("coded?continuous=1", 4, CPU)
    game.reset([0])
    obs, reward, *_ = game.step(torch.arange(24.0).view(12, 2) / 24)
    rows = [[w, i, 1, 2 * (3 * w + i) / 24] for w in range(4) for i in range(3)]
    torch.testing.assert_close(obs.view(12, 3, 5)[:, 0, [0, 1, 2, 4]], torch.tensor(rows))
    assert reward.tolist() == [[100 * w + 10 * i + 1] for w in range(4) for i in range(3)]
    assert obs.view(12, 3, 5)[:, :, 1].tolist() == 4 * [[0, 1, 2], [1, 2, 0], [2, 0, 1]]  # own first, then in turn
    for world in obs.view(4, 3, 3, 5):  # the same numbers for all its agents
        assert all(torch.equal(seen[seen[:, 1].argsort()], world[0]) for seen in world)
    own = games.make_vec("coded?continuous=1&critic=own", 4, CPU)
    assert own.reset([0]).shape == (12, 5) and own.policy_dim == game.policy_dim == 5


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_permuting_agents_permutes_their_actions_and_only_the_critic_sees_the_others(games, algo):
    env = VectorEnv("notebooks.games:coded", 4, CPU)
    agent = shaken(ncdpo.Agent(config(algo=algo), *env.spaces))
    omega, noise = (x.view(4, 3, *x.shape[1:]) for x in agent.policy.noise(12))
    obs, swap = list(torch.randn(3, 4, 5)), [1, 0, 2]
    normal = lambda obs: agent.obs_norm(env.envs.joint(obs))
    act = lambda obs, pick: agent.policy.act(normal(obs), omega[:, pick].flatten(0, 1), noise[:, pick].flatten(0, 1))
    action = act(obs, [0, 1, 2])[0].view(4, 3)
    assert torch.equal(act([obs[i] for i in swap], swap)[0].view(4, 3), action[:, swap])
    value = lambda obs: agent.critic(env.envs.joint(obs)).view(4, 3)
    moved = [obs[0], obs[1], obs[2] + 1]
    assert torch.equal(act(moved, [0, 1, 2])[0].view(4, 3)[:, :2], action[:, :2])
    assert (value(moved) != value(obs)).all()


def test_an_agent_of_football_may_observe_its_nearest_opponents_alone(games):
    see = lambda reds, more: games.make_vec(f"football?n_blue_agents=2&n_red_agents={reds}{more}", 5, CPU)
    game, one = see(3, "&nearest=2"), see(2, "")
    obs = game.reset([0])
    assert (game.policy_dim, obs.shape) == (one.policy_dim, one.reset([0]).shape)  # so that a team may go on
    scenario = game.game.scenario
    for i, agent in enumerate(scenario.blue_agents):
        seen = obs.view(5, 2, 2, -1)[:, i, 0, 16:32].view(5, 2, 8)[..., :2]  # of each of two: where it is from here
        away = agent.state.pos[:, None] - torch.stack([red.state.pos for red in scenario.red_agents], 1)
        order = away.norm(dim=-1).argsort(1)[:, :2, None].expand(-1, -1, 2)
        torch.testing.assert_close(seen, away.gather(1, order))
    for name in ("football?nearest=-1", "football?nearest=x", "balance?nearest=1"):
        with pytest.raises(ValueError, match="nearest must be a number of football's opponents"):
            games.make_vec(name, 2, CPU)


def test_speed_tells_what_the_adapter_of_a_game_costs(games, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(HERE / "notebooks"))
    monkeypatch.setattr(ncdpo.torch, "compile", lambda function, **_: function)
    importlib.import_module("speed").main("--env vmas:coded --device cpu --num-envs 4 --num-steps 8".split())
    first = capsys.readouterr().out.splitlines()[0]
    assert float(re.fullmatch(r"4 worlds: a step through the adapter takes ([\d.]+) of VMAS's own", first)[1]) > 0


def test_a_world_ends_and_begins_again_without_the_others(games):
    """Worlds 0 to 3 terminate after 3 to 6 steps, those behind them are truncated after 7, world 4 is both."""
    env = VectorEnv("notebooks.games:coded?max_steps=7&critic=own", 6, CPU)
    before, w, starts = env.reset(3), torch.arange(6).repeat_interleave(3), set()
    age = torch.zeros(18)
    for _ in range(40):
        now, _, terminated, truncated, final = env.step(torch.randint(9, (18,)))
        age += 1
        assert torch.equal(terminated, age >= 3 + w) and torch.equal(truncated, age >= 7)
        assert torch.equal(final[:, 2], age) and torch.equal(final[:, 3], before[:, 3])
        assert torch.equal(env.envs.success, (terminated & (w != 1)).float())
        ended = terminated | truncated
        age[ended] = 0
        assert torch.equal(now[:, 2], age) and torch.equal(now[~ended], final[~ended])
        assert (now[ended, 3] != final[ended, 3]).all() and (now[ended, 4] == 0).all()
        starts |= {round(x, 6) for x in now[ended, 3].tolist()}
        before = now
    assert len(starts) == sum(40 // min(3 + i, 7) for i in range(6))  # no beginning is used twice
    assert torch.equal(env.reset(3), env.reset(3)) and not torch.equal(env.reset(3), env.reset(4))


@pytest.mark.parametrize("name", ["football?n_red_agents=1", "navigation?continuous=1", "balance", "transport",
                                  "sampling"])  # whose resets rebuild objects
def test_worlds_of_vmas_begin_again_as_their_observations_say(games, name):
    env = VectorEnv(f"notebooks.games:{name}{'&' if '?' in name else '?'}max_steps=5", 4, CPU)
    env.reset(1)
    env.envs.game.steps += torch.arange(4)  # their episodes end one after the other
    for _ in range(12):
        action = torch.zeros(env.num_envs, dtype=torch.long) if env.discrete else torch.ones(env.num_envs, env.act_dim)
        obs, reward, *_ = env.step(action)
        scenario = env.envs.game.scenario
        torch.testing.assert_close(obs, env.envs.joint([scenario.observation(a) for a in env.envs.game.agents]))
        assert reward.shape == (env.num_envs, 1)


def test_success_in_football_is_a_goal_of_the_own_team(games):
    game = games.make_vec("football?n_blue_agents=2&n_red_agents=1", 3, CPU)
    game.reset([0])
    ball = game.game.scenario.ball
    ball.state.pos = torch.tensor([[1.55, 0.0], [-1.55, 0.0], [0.0, 0.0]])
    _, _, terminated, truncated, _ = game.step(torch.zeros(6, dtype=torch.long))
    assert terminated.tolist() == [True] * 4 + [False] * 2 and not truncated.any()
    assert game.success.tolist() == [1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_a_team_is_trained_recorded_and_cloned(games, demos, tmp_path, capsys, algo):
    env, path = "notebooks.games:coded?max_steps=6", tmp_path / "d.npz"
    history = ncdpo.train(config(env=env, algo=algo, total_timesteps=4 * 192, runs=str(tmp_path)))
    run = tmp_path / f"notebooks.games_coded__{algo}__1"
    assert history["step"].tolist() == [192, 384, 576, 768]  # of two worlds of three agents
    with pytest.raises(UserError, match="at least 192"):
        ncdpo.Trainer(config(env=env, algo=algo, total_timesteps=191))
    ended = [3 * (32 // 3), 3 * (32 // 4)]  # in the first update, by world
    assert history["episodes"][0] == sum(ended) and history["success"][0] == pytest.approx(ended[0] / sum(ended))
    result = ncdpo.evaluate(run, 4, "cpu")["mean action"]
    assert result["length"].tolist() == np.repeat([3, 4, 5, 6], 3).tolist()
    assert result["success"].tolist() == np.repeat([1, 0, 1, 1], 3).tolist()
    assert "success 50%" in capsys.readouterr().out  # of the worlds 0 and 1, after training
    assert demos.main(["record", str(run), str(path), "--steps", "600", "--device", "cpu"]) == 0
    own = loaded(path)
    assert (own["observations"].reshape(3, 200, 15)[:, :, 1] == np.arange(3)[:, None]).all()  # one after the other
    ncdpo.train(config(env=env, algo=algo, demos=str(path), total_timesteps=0, bc_steps=20, runs=str(tmp_path)))
    assert "201 episodes, 600 steps" in capsys.readouterr().out  # three of them cut off


@pytest.mark.parametrize("name, words", [
    ("footbal", "did you mean football?"), ("football?n_blue=3", "did you mean n_blue_agents?"),
    ("football?multidiscrete_actions=1", "MultiDiscrete"), ("football?critic=both", "joint or own"),
    ("football?max_steps=0", "max_steps"), ("football?n_blue_agents", "n_blue_agents"),
    ("football?n_blue_agents=0", "change these"), ("football?ai_blue_agents=1", "no agent is left"),
    ("simple_tag", "differ in their spaces"), ("balance?continuous=1 --action-chunk 2", "--action-chunk 1"),
    ("missing", "pip install vmas")])
def test_games_refuses_what_it_cannot_play(games, tmp_path, capsys, monkeypatch, name, words):
    if name == "missing":
        monkeypatch.setitem(sys.modules, "vmas", None)
        monkeypatch.setitem(sys.modules, "vmas.scenarios", None)
    name, *flags = name.split()
    assert words in complaint(capsys, *arguments("notebooks.games:" + name, tmp_path / "runs", *flags))


# --- the whole -------------------------------------------------------------------------------------------------------

def test_ncdpo_learns_cartpole(tmp_path, capsys):
    flags = dict(num_envs=8, num_steps=128, minibatch_size=256, update_epochs=10, learning_rate=2e-3, hidden=64,
                 denoising_steps=3, gamma=0.98, gae_lambda=0.95, total_timesteps=36_864, episodes=1)
    line = [word for name, value in flags.items() for word in ("--" + name.replace("_", "-"), str(value))]
    assert main(["--env", "CartPole-v1", "--algo", "ncdpo", "--no-compile", "--runs", str(tmp_path), *line]) == 0
    returns = [float(row["return"]) for row in rows_of(tmp_path / "CartPole-v1__ncdpo__1") if row["return"]]
    assert np.convolve(returns, np.ones(4) / 4, "valid").max() > 400  # four updates in a row


def run_python(folder, *command, **environment):
    environment = {**os.environ, "PYTHONPATH": str(HERE), "PYTHONDONTWRITEBYTECODE": "1", **environment}
    return subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)


# Several processes, by notebooks/parallel.py

SHARED = dict(env="Hopper-v4", num_envs=4, num_steps=64, minibatch_size=256, total_timesteps=512, update_epochs=3)
ONE_UPDATE = """
import os, sys, torch
import ncdpo
from notebooks import parallel
from torch import distributed
settings, folder = ncdpo.Config(**eval(sys.argv[1])), sys.argv[2]
if parallel.WORLD:
    distributed.init_process_group()
trainer, mine = (parallel.SharedTrainer if parallel.WORLD else ncdpo.Trainer)(settings), slice(None)
if parallel.WORLD:
    mine = slice(2 * parallel.RANK, 2 * parallel.RANK + 2)
    trainer.join()
    for name, x in torch.load(folder + "/played.pt").items():
        setattr(trainer.rollout, name, x[:, mine])
else:
    trainer.rollout.collect(trainer.env, trainer.policy, trainer.act, trainer.obs)
    torch.save({name: x for name, x in vars(trainer.rollout).items() if torch.is_tensor(x)}, folder + "/played.pt")
trainer.rollout.collect = lambda *given: None
row = {name: float(x) for name, x in trainer.iterate().items() if not name.startswith("seconds")}
torch.save((row, trainer.agent.state_dict()), f"{folder}/{parallel.WORLD}_{parallel.RANK}.pt")
os._exit(0)
"""


def torchrun(processes, *line, **more):
    """Start a script by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, *line]
    return subprocess.Popen([str(word) for word in command], cwd=HERE, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(HERE)),
                            **more)


def parallel(processes, *flags):
    """Exit code, output and the program's own complaints of notebooks/parallel.py in several processes."""
    return ended(torchrun(processes, "notebooks/parallel.py", *flags))


def ended(process):
    out, err = process.communicate(timeout=300)
    print(err)  # pytest shows it where a test fails
    return process.returncode, out, [line for line in err.splitlines() if line.startswith("ncdpo:")]


@pytest.mark.parametrize("given", [dict(algo="ncdpo"), dict(algo="dppo", target_kl=1e-9)], ids=str)
def test_two_processes_with_half_of_the_environments_each_take_the_step_of_one_with_all(tmp_path, given):
    """Gradients, advantages' scale, clip, normalisers, the KL that ends the epochs, metrics: the minibatch is all."""
    (tmp_path / "script.py").write_text(ONE_UPDATE)
    settings = dataclasses.asdict(config(**SHARED, **given))
    line = [str(tmp_path / "script.py"), repr(settings), str(tmp_path)]
    assert run_python(tmp_path, *line, PYTHONPATH=str(HERE)).returncode == 0
    assert ended(torchrun(2, *line))[0] == 0
    (row, alone), *both = (torch.load(tmp_path / name) for name in ("0_0.pt", "2_0.pt", "2_1.pt"))
    before = ncdpo.Trainer(config(**SHARED, **given)).agent.state_dict()
    for name, tensor in alone.items():
        assert torch.equal(both[0][1][name], both[1][1][name])  # bit by bit
        torch.testing.assert_close(both[0][1][name], tensor, rtol=2e-4, atol=2e-6)
        assert not torch.equal(before[name], tensor) or "log_std" in name
    for name in set(row) - {"chain_std", "chain_gradient_ratio", "chain_clipped", "explained_variance"}:  # one's own
        assert both[0][0][name] == both[1][0][name] == pytest.approx(row[name], rel=1e-3, abs=1e-5), name


FEW = ["--env", "Hopper-v4", "--num-envs", 4, "--num-steps", 32, "--minibatch-size", 64, "--hidden", 16, "--no-compile",
       "--device", "cpu", "--episodes", 1, "--checkpoint-every", 1]


def test_torchrun_writes_one_run_and_any_number_of_processes_resumes_it(tmp_path):
    code, out, mistakes = parallel(2, *FEW, "--total-timesteps", 512, "--runs", tmp_path)
    assert (code, mistakes) == (0, []) and out.count("writing") == out.count("mean action") == 1
    run, = tmp_path.iterdir()
    weights = lambda: torch.load(run / "checkpoint.pt")["agent"]["critic.0.weight"]
    before = weights()
    code, out, mistakes = parallel(4, "--resume", run, "--total-timesteps", 768)
    assert (code, mistakes) == (0, []) and [int(row["step"]) for row in rows_of(run)] == list(range(128, 769, 128))
    assert not torch.equal(before, weights())


def test_processes_play_different_episodes_with_different_noise(tmp_path):
    (tmp_path / "script.py").write_text(ONE_UPDATE.split("if parallel.WORLD:\n    mine")[0] + """
trainer.join()
trainer.rollout.collect(trainer.env, trainer.policy, trainer.act, trainer.obs)
torch.save([trainer.rollout.obs, trainer.rollout.action], f"{folder}/{parallel.RANK}.pt")
os._exit(0)
""")
    settings = dataclasses.asdict(config(**SHARED))
    assert ended(torchrun(2, tmp_path / "script.py", repr(settings), tmp_path))[0] == 0
    for ours, theirs in zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(2))):
        assert not torch.isin(ours, theirs).any()


@pytest.mark.parametrize("flags, words", [(["--num-envs", 5], "multiples of 2"), (["--resume", "nowhere"], "nowhere"),
                                          (["--total-timesteps", 100], "at least 128")])
def test_a_mistake_is_told_once_by_all_processes(tmp_path, flags, words):
    code, _, mistakes = parallel(2, *(FEW if flags[0] != "--resume" else ()), *flags, "--runs", tmp_path)
    assert code and len(mistakes) == 1 and words in mistakes[0] and not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs Linux")
@pytest.mark.parametrize("victim", ["the second", "all"])
def test_a_dead_process_or_ctrl_c_ends_all_with_one_sentence_and_keeps_the_checkpoint(tmp_path, victim):
    process = torchrun(2, "notebooks/parallel.py", *FEW, "--total-timesteps", 10**8, "--runs", tmp_path)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not list(tmp_path.glob("*/checkpoint.pt")):
        assert process.poll() is None
        time.sleep(0.1)
    if victim == "all":
        process.send_signal(signal.SIGINT)
    else:
        os.kill(int(children.read_text().split()[1]), signal.SIGKILL)
    code, _, mistakes = ended(process)
    run, = tmp_path.iterdir()
    assert code and (run / "checkpoint.pt").is_file() and len(mistakes) <= 1  # torchrun may be faster
    assert all(f"--resume {run}" in line for line in mistakes)


def test_a_task_of_ones_own_module_is_made_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "my_module.py").write_text("import gymnasium as gym\n"
                                           "gym.register('MyTask-v0', 'gymnasium.envs.classic_control:CartPoleEnv')")
    monkeypatch.syspath_prepend(tmp_path)
    assert make_env("my_module:MyTask-v0").reset()[0].shape == (4,)  # as film.py makes it, before any import of it
    env = VectorEnv("my_module:MyTask-v0", 2, CPU)
    assert env.reset(1).shape == (2, 4)
    gym.registry.pop("MyTask-v0")


def test_a_mistake_in_reset_is_told_in_one_sentence(tmp_path, monkeypatch):
    def reset(envs, seeds):
        raise ZeroDivisionError("no start")

    monkeypatch.setattr(ncdpo.GymnasiumEnvs, "reset", reset)
    with pytest.raises(UserError, match="CartPole-v1 raised an error in reset: no start"):
        ncdpo.Trainer(config())


def test_import_prints_and_writes_nothing_and_needs_neither_mujoco_nor_matplotlib(tmp_path):
    code = """import ncdpo, sys, torch
ncdpo.VectorEnv("CartPole-v1", 1, torch.device("cpu"))
assert not {"mujoco", "matplotlib"} & set(sys.modules)"""
    result = run_python(tmp_path, "-c", code)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "") and not list(tmp_path.iterdir())


def test_program_names_a_broken_display_from_any_folder(tmp_path):
    result = run_python(tmp_path, str(HERE / "ncdpo.py"), "--env", "Hopper-v4", MUJOCO_GL="nonsense")
    assert result.returncode == 2 and result.stdout == "" and not list(tmp_path.iterdir())
    assert re.fullmatch("ncdpo: cannot make Hopper-v4: .*nonsense.*\n", result.stderr)


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
    beside = {"notebooks", "mujoco"}  # one is ours, the other is what gymnasium[mujoco] runs on
    assert imported - beside <= declared <= imported | beside and "requires-python" in meta
    lines = (HERE / "requirements.txt").read_text().splitlines()
    assert declared <= {name_of(line) for line in lines if re.match(r"\w", line)}

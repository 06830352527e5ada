"""MuJoCo in batches behind ncdpo.VectorEnv: on the threads of a CPU, or on a GPU by MuJoCo Warp.

ncdpo.py takes it where it is (`--vector auto`); without this file it steps Gymnasium's environments one by one. Two
pools step N copies of a model in one call. Over either, Gymnasium's observation, reward, termination and reset are
formulas on tensors (N, ...), which read their constants from Gymnasium's own object: HalfCheetah, Hopper, Walker2d and
Swimmer, v4 and v5, and Ant-v4. Nothing here knows of a policy.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from functools import partial

import gymnasium as gym
import numpy as np
import torch


def batched(env: gym.Env, num_envs: int, chunk: int, device: torch.device, vector: str = "auto") -> MujocoEnvs | None:
    """N copies of a task made by gym.make, or None if only Gymnasium can serve it; `vector` "warp" asks for Warp."""
    task = batched_task(env)
    warp = vector == "warp" or device.type == "cuda" and importlib.util.find_spec("mujoco_warp")
    if task is None:
        return None
    return MujocoEnvs(task, WarpPool if warp else MujocoPool, num_envs, chunk, device if warp else torch.device("cpu"))


class MujocoPool:
    """N copies of a MuJoCo model, stepped by C++ threads in one call: the same bits as N simulations one by one.

    qpos (N, nq), qvel (N, nv), ctrl (N, nu) and the derived quantities `fields` are float64 views of MuJoCo's memory.
    As in Gymnasium, derived ones are those of the last evaluation, before the last substep or (RK4) within it.
    """

    def __init__(self, model, num_envs: int, frame_skip: int, fields, device: torch.device):
        from mujoco import batch
        self.batch, self.frame_skip = batch.Batch(model, num_envs, torch.get_num_threads()), frame_skip
        for name in ("qpos", "qvel", "ctrl", *fields):
            memory = self.batch.bind(name)
            memory.flags.writeable = True  # nobody writes, but torch warns of memory that is not
            setattr(self, name, torch.from_numpy(memory))

    def step(self, ctrl):
        """Hold ctrl (N, nu) for frame_skip substeps."""
        self.ctrl.copy_(ctrl)
        self.batch.step(nstep=self.frame_skip)

    def restart(self, where, states):
        """Begin anew in the environments `where` (N,) is true; states() draws qpos (N, nq) and qvel (N, nv)."""
        if len(rows := np.flatnonzero(where)):
            qpos, qvel = states()
            self.batch.reset(rows, stage=0)
            self.qpos[rows], self.qvel[rows] = qpos[rows], qvel[rows]
            self.batch.forward(rows)  # derived quantities, and the solver's warm start


def free_memory(device: torch.device) -> float:
    """Bytes that are free on a GPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf


def size(data) -> int:
    """Bytes of all arrays in an object of MuJoCo Warp's, and in the objects in it."""
    return sum(size(x) if dataclasses.is_dataclass(x) else getattr(x, "capacity", 0) for x in vars(data).values())


class WarpPool:
    """The same on `device` by MuJoCo Warp: float32 views of its arrays, and nothing ever waits for the device.

    The substeps are recorded once, as a CUDA graph (on a CPU as one of Warp's own), and launched. Raises ValueError
    for more worlds than the device has memory for, and for contacts that its arrays had no room for.
    """

    def __init__(self, model, num_envs: int, frame_skip: int, fields, device: torch.device):
        try:
            import mujoco_warp
            import warp
        except ImportError as error:
            raise ImportError(f"{error}: pip install mujoco-warp, with Python 3.11 or newer") from error
        warp.config.log_level = warp.LOG_WARNING
        with warp.ScopedDevice(str(device)):
            m, contacts = mujoco_warp.put_model(model), 3 * model.ngeom  # a capsule lies on the floor at two points
            make = partial(mujoco_warp.make_data, model, nconmax=contacts, njmax=4 * contacts + model.njnt)
            fits = 0.8 * free_memory(device) / (size(make(2)) - size(make(1)))  # the rest is the rollout's
            if num_envs > fits:
                raise ValueError(f"the free memory of {device} is enough for --num-envs {fits:.0f}")
            d = make(num_envs)
            mujoco_warp.step(m, d)  # compiles
            with warp.ScopedCapture() as step:
                for _ in range(frame_skip):
                    mujoco_warp.step(m, d)
            with warp.ScopedCapture() as forward:
                mujoco_warp.forward(m, d)
        stream = warp.stream_from_torch(device) if device.type == "cuda" else None
        self._step, self._forward = (partial(warp.capture_launch, x.graph, stream) for x in (step, forward))
        names = ("qpos", "qvel", "ctrl", "overflow", "qacc_warmstart", *fields)
        vars(self).update(views := {name: warp.to_torch(getattr(d, name)) for name in names})
        T = mujoco_warp.OverflowType
        self.lost = int(T.NEFC | T.NJMAX_NNZ | T.BROADPHASE | T.NARROWPHASE | T.CCD)
        self.news = torch.zeros((), dtype=torch.int32, pin_memory=device.type == "cuda")
        self.heard = self.news.numpy()  # the same memory, on the host
        self.derived, self.arrays = [views[name] for name in ("qacc_warmstart", *fields)], (m, d)  # kept alive

    def step(self, ctrl):
        self.ctrl.copy_(ctrl)
        self._step()
        if self.heard:  # of the step before: what is copied now comes when it comes, and nobody waits
            raise ValueError("contacts were lost, for which MuJoCo Warp's arrays have no room: give --vector sync")
        self.news.copy_((self.overflow & self.lost).amax(), non_blocking=True)

    def restart(self, where, states):
        qpos, qvel = states()
        choose = lambda new, old: new.where(where.view(-1, *[1] * (old.dim() - 1)), old)
        self.qpos.copy_(choose(qpos, self.qpos))
        self.qvel.copy_(choose(qvel, self.qvel))
        self.qacc_warmstart.masked_fill_(where[:, None], 0)
        if len(self.derived) > 1:  # what the formulas read of them, in the new episodes alone
            before = [x.clone() for x in self.derived]
            self._forward()
            for now, old in zip(self.derived, before):
                now.copy_(choose(now, old))


class Locomotion:
    """Gymnasium's formulas over a pool `p`: forward velocity plus health minus control cost.

    All constants are read from Gymnasium's object `env`; `limit` is the number of steps of an episode. `unseen` of the
    positions are not observed, velocities up to `top_speed`; the noise of the first velocities is uniform or `normal`.
    """

    def __init__(self, env: gym.Env, limit: float, unseen: int, normal=False, top_speed=math.inf, height=1, fields=()):
        self.env, self.limit, self.v4, self.fields = env, limit, type(env).__module__.endswith("v4"), fields
        self.normal, self.top_speed, self.height = normal, top_speed, height
        self.unseen = unseen * env._exclude_current_positions_from_observation
        self.first = torch.from_numpy(env.init_qpos), torch.from_numpy(env.init_qvel)

    def start(self, p, random: torch.Generator):
        """Start states for all environments, qpos (N, nq) and qvel (N, nv)."""
        draw = lambda kind, like: kind(like.shape, generator=random, dtype=like.dtype, device=like.device)
        u, v = draw(torch.rand, p.qpos), draw(torch.randn if self.normal else torch.rand, p.qvel)
        qpos, qvel = self.first = [x.to(u) for x in self.first]
        s = self.env._reset_noise_scale
        return qpos + s * (2 * u - 1), qvel + s * (v if self.normal else 2 * v - 1)

    def x(self, p):
        if "xpos" in self.fields:  # Ant's torso, which lags behind qpos, as in Gymnasium
            return p.xpos[:, self.env.model.body("torso").id, 0]
        return p.qpos[:, 0]

    def obs(self, p):
        return torch.cat([p.qpos[:, self.unseen:], p.qvel.clamp(-self.top_speed, self.top_speed)], 1).float()

    def healthy(self, p):
        """Whether each environment may go on (N,); where a task has no such range, all may."""
        values = dict(z=p.qpos[:, self.height, None], angle=p.qpos[:, 2:3], state=torch.cat([p.qpos[:, 2:], p.qvel], 1))
        ranges = {name: getattr(self.env, f"_healthy_{name}_range", (-math.inf, math.inf)) for name in values}
        return torch.cat([(ranges[name][0] < x) & (x < ranges[name][1]) for name, x in values.items()], 1).all(1)

    def outcome(self, p, x_before, action):
        """Reward (N,) and termination (N,) of the step that led from x_before to p."""
        env, healthy, speed = self.env, self.healthy(p), (self.x(p) - x_before) / self.env.dt
        reward = getattr(env, "_forward_reward_weight", 1) * speed - env._ctrl_cost_weight * action.square().sum(1)
        ends = getattr(env, "_terminate_when_unhealthy", False)
        paid = torch.ones_like(speed) if self.v4 and ends else healthy.double()  # v4 pays in the last step too
        return reward + getattr(env, "_healthy_reward", 0) * paid, ~healthy & ends


TASKS = {"half_cheetah": dict(unseen=1, normal=True), "hopper": dict(unseen=1, top_speed=10),
         "walker2d": dict(unseen=1, top_speed=10), "swimmer": dict(unseen=2),
         "ant": dict(unseen=2, normal=True, height=2, fields=("xpos",))}


def batched_task(env: gym.Env) -> Locomotion | None:
    """Formulas of a task made by gym.make, or None if only Gymnasium itself can serve it: another class or wrapper."""
    limit, wrappers = math.inf, gym.wrappers
    while type(env) in (wrappers.TimeLimit, wrappers.OrderEnforcing, wrappers.PassiveEnvChecker):
        limit, env = min(limit, getattr(env, "_max_episode_steps", limit)), env.env
    package, _, module = type(env).__module__.rpartition(".")
    family, _, version = module.rpartition("_")
    if package != "gymnasium.envs.mujoco" or family not in TASKS or version not in ("v4", "v5"):
        return None
    if not importlib.util.find_spec("mujoco.batch") or env.model.nplugin or env.model.opt.enableflags:
        return None  # MuJoCo older than 4, or a model of which it may not know all of the state
    if family == "ant" and (version == "v5" or env._use_contact_forces):
        return None  # observes contact forces, which cost a further MuJoCo call for each environment
    return Locomotion(env, limit, **TASKS[family])


class MujocoEnvs:
    """A MuJoCo task in batches, as ncdpo.VectorEnv wants it, without a branch on what happens in an environment."""

    success = None

    def __init__(self, task: Locomotion, pool, num_envs: int, chunk: int, device: torch.device):
        self.task, self.chunk, self.device, self.close = task, chunk, device, task.env.close
        self.kind = "warp" if pool is WarpPool else "batched"
        self.pool = pool(task.env.model, num_envs, task.env.frame_skip, task.fields, device)
        self.age, self.random = torch.zeros(num_envs, dtype=torch.long, device=device), torch.Generator(device)

    def reset(self, seeds: list[int]):
        self.random.manual_seed(seeds[0])
        return self.start(torch.ones_like(self.age, dtype=torch.bool))

    def start(self, where):
        """Observations (N, S) after new episodes have begun where `where` (N,) is true."""
        self.pool.restart(where, partial(self.task.start, self.pool, self.random))
        self.age.masked_fill_(where, 0)
        return self.task.obs(self.pool)

    def step(self, action):
        task, pool = self.task, self.pool
        reward = torch.full((len(action), self.chunk), torch.nan, device=self.device)
        terminated, truncated = torch.zeros(2, len(action), dtype=torch.bool, device=self.device)
        alive, final_obs = ~terminated, None
        for i, part in enumerate(action.chunk(self.chunk, 1)):
            x_before = task.x(pool).clone()
            pool.step(part)  # also where the episode has ended: what happens there is not looked at
            (one, fell), obs = task.outcome(pool, x_before, part), task.obs(pool)
            # a state that diverged is no consequence of an action: it terminates, with zeros for what is not known
            diverged = ~(torch.cat([pool.qpos, pool.qvel], 1).abs() < 1e10).all(1)  # MuJoCo's own limit
            one, obs = one.masked_fill(diverged, 0), obs.masked_fill(diverged[:, None], 0)
            final_obs = obs if final_obs is None else torch.where(alive[:, None], obs, final_obs)
            reward[:, i] = one.masked_fill(~alive, torch.nan)
            self.age += 1
            terminated |= alive & (diverged | fell)
            truncated |= alive & (self.age >= task.limit)
            alive = ~(terminated | truncated)
        return self.start(~alive), reward, terminated, truncated, final_obs

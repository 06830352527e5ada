"""Manipulation with a sparse reward: Meta-World's tasks of a robot arm, and demonstrations of them with errors.

    pip install -r requirements.txt metaworld==3.1.1      # it pins MuJoCo 3.3.0: in an environment of its own
    python notebooks/manipulation.py demos push-v3 push.npz --episodes 60
    python notebooks/cloning.py push.npz --env notebooks.manipulation:push-v3 --runs runs/clones --bc-steps 5000
    python ncdpo.py --init-from runs/clones/notebooks.manipulation_push-v3__ncdpo__1 --total-timesteps 300000
    python notebooks/film.py runs/notebooks.manipulation_push-v3__ncdpo__1 push.gif

Importing this file registers each of Meta-World's fifty tasks with Gymnasium under its own id, with the reward 1 and
the end of the episode at success, else 0; and as dense/push-v3 and so on with Meta-World's own reward. An episode has
LIMIT steps at most, or LONGER. An observation is 39 numbers: hand, fingers and objects, now and a step ago, and a goal.
The demonstrator is Meta-World's scripted expert with the errors of a person (Sloppy), so large that about half of its
episodes fail. `python notebooks/manipulation.py probe RUN` tells which noise of a policy decides its success.
"""

import argparse
import contextlib
import csv
import difflib
import importlib.metadata
import io
import sys
import warnings
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

try:
    if int((version := importlib.metadata.version("mujoco")).split(".")[0]) > 3:
        raise ImportError(f"this is MuJoCo {version}")
    import metaworld
    from metaworld.policies import ENV_POLICY_MAP as EXPERTS
except ImportError as error:
    sentence = (f"Meta-World cannot be imported ({error}): in an environment of its own, as it pins MuJoCo 3.3, "
                "pip install -r requirements.txt metaworld==3.1.1")
    if __name__ == "__main__":
        sys.exit(f"manipulation: {sentence}.")
    raise ImportError(sentence) from None
import mujoco  # noqa: E402

import ncdpo  # noqa: E402
from ncdpo import UserError  # noqa: E402
from notebooks.cloning import DEMO_KEYS  # noqa: E402

LIMIT = 150  # steps of 12.5 ms
LONGER = dict.fromkeys("bin-picking-v3 disassemble-v3 peg-insert-side-v3 peg-unplug-side-v3 stick-pull-v3".split(), 200)
CPU = torch.device("cpu")
VIEW = dict(lookat=np.array([0, 0.68, 0.12]), azimuth=215, elevation=-25, distance=1.1)  # of a film


class Rotation:
    """The part of SciPy's Rotation that Meta-World uses, by MuJoCo: SciPy's took a third of a step's time."""

    def __init__(self, quat):
        self.quat = quat

    @classmethod
    def from_matrix(cls, matrix):
        """From a matrix (3, 3)."""
        m = np.ravel(matrix)
        quat = np.empty(4)
        mujoco.mju_mat2Quat(quat, m)
        quat = quat[[1, 2, 3, 0]]
        largest = np.argmax([m[0], m[4], m[8], m[0] + m[4] + m[8]])
        return cls(quat if quat[largest] > 0 else -quat)  # of the two signs SciPy's

    def as_quat(self):
        """Quaternion (x, y, z, w)."""
        return self.quat


class Shared:
    """What all copies of a task share: 20 MB of a model, and the arm at its first position, as it settled there.

    An episode differs from another in where the model has its bodies and sites (`places`), and in nothing else of it.
    """

    made = {}  # by the name of the task

    def __init__(self, model):
        self.model = model
        self.settled = None  # MuJoCo's whole state, once there is one
        self.places = [model.body_pos.copy(), model.site_pos.copy()]

    @classmethod
    def make(cls, name, **arguments):
        """Meta-World's object for a task, and what it shares with others."""

        class Task(metaworld.ALL_V3_ENVIRONMENTS[name]):
            def _initialize_simulation(self):
                if name not in cls.made:
                    cls.made[name] = cls(super()._initialize_simulation()[0])
                return cls.made[name].model, mujoco.MjData(cls.made[name].model)

        return Task(**arguments), cls.made[name]

    def settle(self, arm, settle):
        """Put the arm to its first position: by Meta-World's own function `settle`, the first time."""
        whole = mujoco.mjtState.mjSTATE_INTEGRATION
        if self.settled is None:
            settle()
            self.settled = np.empty(mujoco.mj_stateSize(arm.model, whole))
            mujoco.mj_getState(arm.model, arm.data, self.settled, whole)
        mujoco.mj_setState(arm.model, arm.data, self.settled, whole)
        mujoco.mj_forward(arm.model, arm.data)
        arm.init_tcp = arm.tcp_center


class Arm(gym.Env):
    """One of Meta-World's tasks as a Gymnasium task: reset(seed) decides all its goals and objects from there on.

    Meta-World draws them from fifty that the constructor's seed decides, resets twice and lets the arm settle for fifty
    steps each time; here each episode has its own, and the arm settles once. With the sparse reward nothing is computed
    that success does not read. So 32 copies take a third of the time, in one process, and two runs fill two cores.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 80}

    def __init__(self, name, dense=False, render_mode=None):
        self.dense = dense
        self.render_mode = render_mode
        arm, self.shared = Shared.make(name, render_mode=render_mode, camera_id=-1, width=240, height=240)
        self.arm = arm
        self.places = self.shared.places
        arm.mujoco_renderer.default_cam_config = VIEW
        arm._set_task_called = True
        arm._freeze_rand_vec = False
        arm.seeded_rand_vec = True
        # Meta-World clips what it shows to these bounds, and those of a hidden goal are zero
        arm.sawyer_observation_space = self.observation_space = gym.spaces.Box(-np.inf, np.inf, (39,))
        arm._partially_observable = False
        self.action_space = arm.action_space
        arm._reset_hand = partial(self.shared.settle, arm, arm._reset_hand)
        arm._get_curr_obs_combined_no_goal = self.observe
        if hasattr(own := sys.modules[metaworld.ALL_V3_ENVIRONMENTS[name].__module__], "Rotation"):
            own.Rotation = Rotation
        if not dense:
            arm._gripper_caging_reward = lambda *args, **kwargs: 0.0
        self.quick = not dense and name != "stick-push-v3"  # whose success asks for the forces of the fingers
        if self.quick:
            arm.touching_object = lambda geom: False
        self.claws = [arm.data.body(name).xpos for name in ("rightclaw", "leftclaw")]

    def place(self, places):
        """Move the bodies and sites of the shared model."""
        model = self.arm.model
        model.body_pos[:], model.site_pos[:] = places

    def observe(self):
        """Hand (3), gap between the fingers, and position and quaternion of one object or two; zeros up to 18."""
        arm = self.arm
        obs = np.zeros(18)
        obs[:3] = arm.get_endeff_pos()
        obs[3] = min(np.linalg.norm(self.claws[0] - self.claws[1]) / 0.1, 1.0)
        objects = [arm._get_pos_objects().reshape(-1, 3), arm._get_quat_objects().reshape(-1, 4)]
        objects = np.concatenate(objects, 1).ravel()
        obs[4:4 + len(objects)] = objects
        return obs

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        arm = self.arm
        arm.np_random = self.np_random
        self.place(self.shared.places)
        mujoco.mj_resetData(arm.model, arm.data)
        arm.reset_model()
        self.places = [arm.model.body_pos.copy(), arm.model.site_pos.copy()]
        mujoco.mj_forward(arm.model, arm.data)  # what it moved in the model shows only now
        now = arm._get_curr_obs_combined_no_goal()
        arm._prev_obs = now
        return np.hstack([now, now, arm._get_pos_goal()]), {}

    def step(self, action):
        self.place(self.places)
        arm = self.arm
        arm.set_xyz_action(action[:3])
        arm.data.ctrl[:] = action[3], -action[3]
        mujoco.mj_step(arm.model, arm.data, nstep=arm.frame_skip)
        if self.quick:
            mujoco.mj_kinematics(arm.model, arm.data)  # positions are all that is read
        else:
            mujoco.mj_forward(arm.model, arm.data)
        obs = arm._get_obs()
        reward, info = arm.evaluate_state(obs, action)
        success = bool(info["success"])
        return obs, float(reward if self.dense else success), success, False, {"success": float(success)}

    def render(self):
        self.place(self.places)
        return self.arm.render()

    def close(self):
        self.arm.close()


for task in metaworld.ALL_V3_ENVIRONMENTS:
    for task_id in (task, f"dense/{task}"):
        if task_id not in gym.registry:  # this file may be the program that runs, and be imported as well
            gym.register(task_id, "notebooks.manipulation:Arm", max_episode_steps=LONGER.get(task, LIMIT),
                         kwargs={"name": task, "dense": task_id != task})


class Sloppy:
    """The scripted expert of a task with the errors of a person, larger with `level`; 0 leaves but the two ways.

    Its hand trembles, it hesitates, it may take the object for a little beside where it is, until it notices; and it
    swings out to the left or to the right on its way, equally often.
    """

    def __init__(self, task, random):
        self.expert = EXPERTS[task]()
        self.random = random

    def begin(self, level):
        """Draw what an episode has of its own."""
        self.level = level
        self.age = 0  # steps so far
        self.pause = 0  # steps still to hesitate
        self.tremble = np.zeros(3)
        self.side = self.random.choice([-1.0, 1.0])
        wrong = self.random.random() < 0.5
        self.offset = self.random.normal(0, 0.01 * level, 2) if wrong else np.zeros(2)
        self.notices = self.random.integers(40, 160)

    def act(self, obs):
        """An action (4,) in [-1, 1] for an observation (39,)."""
        seen = obs.copy()
        if self.age < self.notices:
            seen[4:6] += self.offset
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the expert on its own large actions, which are clipped
            action = np.clip(self.expert.get_action(seen), -1, 1)
        action[0] += self.side * max(0.0, 1 - self.age / 20)
        self.age += 1
        if self.pause == 0 and self.random.random() < 0.01 * self.level:
            self.pause = self.random.integers(5, 20)
        if self.pause:
            self.pause -= 1
            action[:3] = 0
        self.tremble = 0.8 * self.tremble + self.random.normal(0, 0.2 * self.level, 3)
        action[:3] += self.tremble
        return np.clip(action, -1, 1)


def record(task, episodes, seed):
    """Demonstrations under cloning's DEMO_KEYS, and the name of the task; about half of the episodes succeed.

    The errors grow by a tenth after a success and shrink by a tenth after a failure. Raises UserError if none
    succeeds within the limit of steps.
    """
    env = ncdpo.make_env(task)
    random = np.random.default_rng([seed, 3_000_003])  # apart from training and evaluation
    person = Sloppy(task, random)
    level = 1.0
    rows, won = [], []
    obs, _ = env.reset(seed=int(random.integers(2**31)))
    while len(won) < episodes:
        person.begin(level)
        ended = False
        while not ended:
            action = person.act(obs).astype(np.float32)
            after, reward, terminated, truncated, _ = env.step(action)
            rows.append((obs, action, reward, terminated, truncated))
            obs, ended = after, terminated or truncated
        won.append(terminated)
        level *= 1.1 if terminated else 1 / 1.1
        if len(won) in (50, episodes) and not any(won):
            raise UserError(f"none of {len(won)} demonstrations of {task} succeeds within its "
                            f"{env.spec.max_episode_steps} steps, so nothing could be learnt: take another task")
        obs, _ = env.reset()
    env.close()
    print(f"{task}: {episodes} episodes, {len(rows):,} steps, {np.mean(won):.0%} of them succeed, errors at a level of "
          f"{level:.2f} at the end")
    return dict(zip(DEMO_KEYS, map(np.array, zip(*rows)))) | {"env": f"notebooks.manipulation:{task}"}


@torch.no_grad()
def probe(run, starts=25, repeats=4):
    """Which noise decides whether a saved run succeeds: it plays each of the same `starts` so many times.

    Returns a row (a dictionary) for each kind of noise that is left on: both, the chain's or the final Gaussian's. Its
    success; noise_share, how much of the variance of success lies between episodes that start alike (the rest is
    decided by the start); and of the failures the shares that left the object where it was, and that moved it.
    """
    config, agent, _ = ncdpo.load_agent(run)
    ways = ["both", "chain", "final"] if agent.policy.K else ["final"]
    N = starts * repeats
    rows = []
    env = ncdpo.VectorEnv(config.env, N, CPU, chunk=config.action_chunk)
    torch.manual_seed(config.seed)
    with contextlib.closing(env):
        for way in ways:
            first = obs = env.reset(4_000_003 + config.seed, repeat=repeats)  # apart from all others
            alive, won, last = torch.ones(N, dtype=torch.bool), torch.zeros(N), obs.clone()
            while alive.any():
                omega, noise = agent.policy.draw_noise(N)
                action, _, _ = agent.act(obs, omega * (way != "final"), noise * (way != "chain"))
                obs, _, terminated, truncated, final_obs = env.step(action)
                ended = alive & (terminated | truncated)
                won[ended] = env.envs.success[ended]
                last[ended] = final_obs[ended]
                alive &= ~ended
            by_start = won.view(repeats, starts)
            within = by_start.var(0).mean() / won.var().clamp(min=1e-8)
            moved = (last - first)[:, 4:7].norm(dim=1) > 0.01  # the object, by more than a centimetre
            lost = won == 0
            rows.append({"run": str(run), "noise": way, "episodes": N, "success": won.mean().item(),
                         "noise_share": within.item(), "left": (lost & ~moved).float().mean().item(),
                         "moved": (lost & moved).float().mean().item()})
    return rows


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recorder = commands.add_parser("demos", help="record demonstrations")
    recorder.add_argument("task", help="one of Meta-World's, push-v3 for example")
    recorder.add_argument("out", type=Path, help="the .npz file to write")
    recorder.add_argument("--episodes", type=int, default=200)
    recorder.add_argument("--seed", type=int, default=1)
    prober = commands.add_parser("probe", help="which noise decides success, as rows of a CSV file")
    prober.add_argument("run", nargs="+", help="run folders of these tasks")
    line = parser.parse_args(arguments)
    try:
        if line.command == "probe":
            writer = csv.DictWriter(sys.stdout, "run noise episodes success noise_share left moved".split())
            writer.writeheader()
            for run in line.run:
                writer.writerows({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
                                 for row in probe(run))
            return 0
        if line.out.exists() or not line.out.parent.is_dir():
            raise UserError(f"{line.out} exists, or its folder does not; choose another name")
        if line.episodes < 2 or line.seed < 0:
            raise UserError("--episodes must be 2 or more, --seed 0 or more")
        if line.task not in EXPERTS:
            near = " or ".join(difflib.get_close_matches(line.task, EXPERTS)) or ", ".join(EXPERTS)
            raise UserError(f"Meta-World has no task {line.task!r}, did you mean {near}?")
        np.savez_compressed(buffer := io.BytesIO(), **record(line.task, line.episodes, line.seed))
        ncdpo.write(line.out, buffer.getvalue())
    except UserError as error:
        print(f"manipulation: {' '.join(str(error).split()).rstrip('.')}.", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

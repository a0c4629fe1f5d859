"""What the processes of a farm are asked to do: pieces of training, each of which also works alone."""

from pathlib import Path

import torch
from comfyui_dmm.training.run.synthesis import painted_by_teachers
from comfyui_dmm.training.run.train import train
from comfyui_dmm.training.run.validation import validation_error
from comfyui_dmm.training.run.watch.controls import StopAndSave
from comfyui_dmm.training.run.watch.watch import Watch

from .families import small_run


def begun(ranks, **settings):
    """A run; with adaptive sampling as if every cell had been seen, and some were ten times as hard as others."""
    run = small_run(ranks=ranks, **settings)
    if run.difficulty:
        cells = run.difficulty.loss
        hard = 10 ** torch.linspace(-1, 0, cells.numel(), dtype=torch.float64).view_as(cells)
        run.draws.load_difficulty({"loss": hard, "rows": torch.ones_like(cells, dtype=torch.int64)})
    return run


def train_all(ranks, **settings) -> dict:
    """Every step's metrics, and at the end the weights, raw and averaged, and what was hard."""
    run = begun(ranks, **settings)
    metrics = list(run.run())
    return {"metrics": metrics, "difficulty": run.difficulty and run.difficulty.loss, **weights_of(run)}


def weights_of(run) -> dict:
    """Raw and averaged; where the student is shared out, for all processes together."""
    return {"raw": run.student_weights(False), "average": run.student_weights(True)}


def learn_few_steps(ranks, folder: str, settings, **train_settings) -> dict:
    """``train_all`` of a few-step run, and its paintings, kept in a folder."""
    from .test_few_steps import few

    run = few(settings, ranks=ranks, folder=Path(folder), **train_settings)
    metrics = list(run.run())
    (paths,) = run.kind.paths.sizes.values()
    return {"metrics": metrics, "paths": paths.states, "check": validation_error(run), **weights_of(run)}


def train_with_other_signs(ranks, **settings) -> dict:
    """``train_all`` where every process but the first is a machine whose eigenvectors point the other way."""
    eigh = torch.linalg.eigh
    if ranks.rank:
        torch.linalg.eigh = lambda matrix: torch.return_types.linalg_eigh((eigh(matrix)[0], -eigh(matrix)[1]))
    try:
        return train_all(ranks, **settings)
    finally:
        torch.linalg.eigh = eigh


def first_gradients(ranks, **settings) -> dict[str, torch.Tensor]:
    """Of the student and the discriminator's head, as the optimisers get them in the first step."""
    run = begun(ranks, grad_clip=0.0, **settings)
    seen = {}

    def look(optimizer, *_):
        named = {**run.student.trained, **dict(run.discriminator.head.named_parameters())}
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, p in named.items():
            if id(p) in mine:
                grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
                seen[name] = grad.detach().clone()

    for optimizer in (run.optimizer, run.discriminator_optimizer):
        optimizer.register_step_pre_hook(look)
    run.train_step()
    return seen


def train_until(ranks, folder: str, stop_at: int | None = None, asked_of: int = 0, **settings) -> dict:
    """``train`` in a run folder; the process ``asked_of`` is asked to stop at a step."""
    run = begun(ranks, **settings)
    steps, losses = [], []

    def on_step(run, metrics):
        steps.append(metrics.step)
        losses.append(metrics.loss)
        if metrics.step == stop_at and ranks.rank == asked_of:
            watch.controls.ask("stop")

    watch, stopped = Watch(on_step), False
    try:
        train(run, Path(folder), watch)
    except StopAndSave:
        stopped = True
    return {"steps": steps, "losses": losses, "stopped": stopped, **weights_of(run)}


def paint_all(ranks, folder: str, **settings) -> dict:
    """The final stage's pictures, and how many this process painted itself."""
    run = small_run(ranks=ranks, **settings)
    own = []
    data = painted_by_teachers(run, Path(folder), lambda done, total, what: own.append(what))
    return {"latents": data.buckets[0], "captions": data.captions, "owner": data.owner, "own": own}


def check(ranks, **settings) -> float:
    run = small_run(ranks=ranks, **settings)
    run.train_step()
    return validation_error(run)


def make(ranks, **settings) -> None:
    small_run(ranks=ranks, **settings)


def meet_nan(ranks, teacher: int, **settings) -> str:
    """What each process says when one teacher predicts NaN."""
    run = small_run(ranks=ranks, **settings)
    with torch.no_grad():
        run.teachers[teacher].unet.out[2].bias.fill_(float("nan"))
    try:
        run.train_step()
    except ValueError as error:
        return str(error)
    return "nothing"


def fail_in_one(ranks, who: int) -> str:
    """A block that one process leaves with an error."""
    try:
        with ranks.together():
            if ranks.rank == who:
                raise ValueError(f"the file of process {who} is damaged")
    except ValueError as error:
        return str(error)
    return "nothing"


def talk(ranks) -> dict:
    return {
        "sum": ranks.sum(torch.tensor([1.0, float(ranks.rank)])).tolist(),
        "any": ranks.any([ranks.rank == 1, False]),
        "gather": ranks.gather({"rank": ranks.rank, "text": "x" * (10 + ranks.rank)}),
        "from_main": ranks.from_main(f"of {ranks.rank}"),
    }


def ask(ranks, requests: dict[int, list[str]]) -> dict:
    """One look at the controls after these requests, by rank: what was done, and whether the run stops or waits."""
    from comfyui_dmm.training.run.watch.controls import Controls

    controls, done = Controls(), []
    for action in requests.get(ranks.rank, []):
        controls.ask(action)
    stopped = False
    try:
        controls.after_step(lambda: done.append("save"), lambda: done.append("sample"), ranks=ranks)
    except StopAndSave:
        stopped = True
    return {"done": done, "stopped": stopped}


def load_and_train(ranks, config: str) -> dict:
    """A run from its files: 3 steps, which teachers were read, and the run's identity."""
    from comfyui_dmm.training.config_file import load_config
    from comfyui_dmm.training.run.load import load_run
    from comfyui_dmm.training.run.state import identity

    with ranks.together():
        loaded = load_run(load_config(config), torch.device("cpu"), ranks=ranks)
    run = loaded.start()
    losses = [run.train_step().loss for _ in range(3)]
    return {"settled": sorted(run.targets.pool._settled), "losses": losses, "identity": identity(run)}


def grow(ranks, forget: bool, **settings) -> dict:
    """Three steps of a DMM model that learns a style, from a code that was looked for, or that forgets one."""
    import dataclasses

    from comfyui_dmm.dmm_core.metadata import StyleInfo
    from comfyui_dmm.training.config import AttackConfig, TrainConfig
    from comfyui_dmm.training.loop.forget import forgetting
    from comfyui_dmm.training.loop.trainer import Trainer

    from .families import small_teacher
    from .test_grow import DATA, old_model

    defaults = {"steps": 3, "batch_size": 8, "lr": 5e-5, "seed": 3, "lambda_adv": 0.0, "validation": 0}
    config, old = TrainConfig(**{**defaults, **settings}), old_model()
    styles = [old.as_style(i, StyleInfo(f"old {i}")) for i in range(3)]
    cpu = torch.device("cpu")
    if forget:
        run = forgetting(
            old, styles, ["old 1"], DATA, config=config, device=cpu, attack=AttackConfig(2, 3, 2), ranks=ranks
        )
    else:
        config = dataclasses.replace(config, warm_start=3)
        run = Trainer(old, [*styles, small_teacher("new", 10, DATA)], DATA, config, device=cpu, ranks=ranks)
    losses = []
    train(run, None, Watch(lambda run, metrics: losses.append(metrics.loss)))
    return {"losses": losses, "raw": run.student_weights(False)}

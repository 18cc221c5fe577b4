"""`train`: a recipe becomes a model folder."""

import shutil
import time
from collections.abc import Iterable
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from handmill import data, families
from handmill import folder as folders
from handmill import recipe as recipes
from handmill.disk import alone
from handmill.errors import UserError
from handmill.recipe import Recipe
from handmill.training import checkpoint, distributed, plan
from handmill.training.curve import draw as draw_curve
from handmill.training.loop import Choices, Progress, Run, Task
from handmill.training.monitor import Monitor, duration, size
from handmill.training.precision import free_threads, machine, matrix_peak
from handmill.verbs.setup import assemble, begin

FREE = ("training.shard",)  # what may differ where a run is gone on with: the result is the same


def train(recipe: Recipe | Path | str, out: Path | str | None = None, overrides: Iterable[str] = (),
          quiet: bool = False) -> Path:
    """Prepare the data, train, and write the model folder `out` (default: runs/NAME); returns its path.

    A folder that holds checkpoints of the same recipe is gone on with, from the newest that is whole.
    Raises UserError for anything the user can mend.
    """
    started = time.perf_counter()
    recipe, out = begin(recipe, out, overrides)
    with distributed.session() as device, ExitStack() as held:
        return _train(recipe, out, device, quiet or distributed.rank() > 0, started, held)


def _train(recipe: Recipe, out: Path, device: torch.device, quiet: bool, started: float, held: ExitStack) -> Path:
    prepared = claimed(recipe, out, quiet, held)
    network, codec, task = assemble(recipe, prepared, device, out)
    saved, made_of = checkpoint.newest_facts(out / "checkpoints"), sources(prepared, codec)
    refuse_other(made_of, saved, out)
    planned = agreed_plan(recipe, network, task, device, out, Choices(**saved["choices"]) if saved else None)
    peak = matrix_peak(device, torch.bfloat16 if planned.choices.precision == "bf16" else torch.float32)
    with closing(Monitor(out, quiet, saved["progress"]["step"] if saved else 0)) as monitor:
        for line in [*data.report_lines(recipe, prepared), *plan.lines(planned)]:
            monitor.say(line)
        setup = time.perf_counter() - started
        run = Run(task, recipe.training, recipe.seed, out, device, monitor, planned.choices, peak, made_of)
        if run.resume():
            monitor.say(f"going on from step {run.progress.step}")
        progress = run.train()
    if progress.step < recipe.training.steps and not progress.stopped:
        if not quiet:
            tell(f"stopped at step {progress.step}; the same command goes on from there")
        raise SystemExit(0)
    with distributed.first() as mine:
        if mine:
            facts = summary(recipe, network, task, progress, planned, setup, prepared)
            finish(out, recipe, network, run, codec, prepared, facts)
            if not quiet:
                tell("\n".join(last_lines(out, task, facts)))
    return out


def claimed(recipe: Recipe, out: Path, quiet: bool, held: ExitStack) -> Any:
    """The prepared data, once `out` is this run's own and free of leftovers."""
    cache = out.parent / ".prepared"
    with distributed.first() as mine:
        if mine:
            claim(out, recipe, held)
            clear_leftovers(out)
            prepared = data.prepare(recipe, cache, progress=not quiet)
    return prepared if distributed.rank() == 0 else data.prepare(recipe, cache, progress=False)


def agreed_plan(recipe: Recipe, network: nn.Module, task: Task, device: torch.device, out: Path,
                kept: Choices | None) -> plan.Plan:
    """The plan of the first process, which all follow. Raises UserError where it does not fit the machine."""
    torch.set_num_threads(kept.threads if kept else free_threads())
    made = plan.make(recipe, network, task, device, out, kept) if distributed.rank() == 0 else None
    planned: plan.Plan = distributed.agreed(made)
    plan.refuse(planned, recipe)
    return planned


def tell(text: str) -> None:
    """Print; that nobody reads any more, as the terminal was closed, is no fault of a run that is saved."""
    with suppress(OSError):
        print(text, flush=True)


def sources(prepared: Any, codec: Any) -> dict[str, str]:
    """What a run learns from -> its fingerprint: a run cannot go on with anything else."""
    trained = getattr(codec, "model", None)
    weights = {"codec": trained.receipt["files"]["weights.safetensors"]["sha256"]} if trained is not None else {}
    return {"data": prepared.content, **weights}


def clear_leftovers(out: Path) -> None:
    """Remove what a run that was killed left half done."""
    checkpoint.clear_leftovers(out / "checkpoints")
    for trial in out.glob(f"{plan.TRIAL}*"):
        shutil.rmtree(trial, ignore_errors=True)


def refuse_other(made_of: dict[str, str], saved: dict[str, Any] | None, out: Path) -> None:
    """Raise UserError where a run that is gone on with began with other data, or another codec."""
    before = (saved or {}).get("made_of", made_of)
    if changed := [name for name in made_of if before.get(name) != made_of[name]]:
        raise UserError(f"the {' and the '.join(changed)} changed since the run in {out} began: put it back as it was, "
                        "choose another folder with --out, or delete this one to begin again")


def claim(out: Path, recipe: Recipe, held: ExitStack) -> None:
    """Make sure, before anything is trained, that `out` can be written, belongs to this recipe and to this process."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): choose another folder with --out") from None
    if not held.enter_context(alone(out)):
        raise UserError(f"another process is training into {out}: wait for it, stop it, or choose another folder with "
                        "--out")
    kept = out / "recipe.toml"
    if kept.exists() and checkpoint.checkpoints(out / "checkpoints"):
        before, now = recipes.read(kept).table(), recipe.table()
        changed = sorted(f"{t}.{k}" if isinstance(now[t], dict) else t for t in now
                         for k in (now[t] if isinstance(now[t], dict) else [t])
                         if (before[t].get(k) if isinstance(now[t], dict) else before[t])
                         != (now[t][k] if isinstance(now[t], dict) else now[t]))
        changed = [key for key in changed if key not in FREE]
        if changed:
            raise UserError(f"{out} holds a run of another recipe ({changed[0]} differs): "
                            "choose another folder with --out, or delete this one")
    import tomli_w

    folders.write_text(kept, tomli_w.dumps(recipe.table()))
    (out / "receipt.json").unlink(missing_ok=True)


def found(task: Task, progress: Progress) -> list[str]:
    """What the evaluations found wrong, a sentence each."""
    remark = task.remark(progress.history) if task.remark is not None else ""
    return [*progress.faults, *([f"in the end: {remark}"] if remark else [])]


def summary(recipe: Recipe, network: nn.Module, task: Task, progress: Progress, planned: plan.Plan, setup: float,
            prepared: Any) -> dict[str, Any]:
    """What the receipt says about the run, predicted against actual included."""
    return {
        "steps": progress.step, "seed": recipe.seed, "stopped_early": progress.stopped,
        "items": progress.step * recipe.training.batch * task.items, "unit": task.unit, "measure": task.measure,
        "training_measure": task.training_measure, "faults": found(task, progress),
        "parameters": sum(p.numel() for p in network.parameters()),
        "loss": progress.loss, "validation_loss": min(progress.best, progress.validation),
        "best_step": progress.best_step,
        "seconds": {"setup": setup, **progress.seconds},
        "precision": planned.choices.precision, "compile": planned.choices.compiled,
        "processes": distributed.world(), "threads": planned.choices.threads,
        "machine": machine(), "fingerprint": prepared.fingerprint,
        "plan": {"predicted": planned.predicted(), "actual": plan.actual(progress, setup)},
    }


def finish(out: Path, recipe: Recipe, network: nn.Module, run: Run, codec: Any, prepared: Any,
           facts: dict[str, Any]) -> None:
    """Write the model folder from the best (or averaged, or last) weights, and draw the curve."""
    with run.chosen():
        network.eval()
        facts["witness"] = families.witness(network, codec, prepared, recipe)
        weights = {k: v.clone() for k, v in folders.weights_of(network).items()}
    parts = {f"data/{name}": prepared.folder / name for name in prepared.held_out_files()}
    shutil.rmtree(out / "data", ignore_errors=True)
    folders.write(out, recipe, weights, codec, parts, facts)
    draw_curve(out / "metrics.jsonl", out / "loss.png", facts["measure"], facts["training_measure"])


def last_lines(out: Path, task: Task, facts: dict[str, Any]) -> list[str]:
    predicted, actual = facts["plan"]["predicted"], facts["plan"]["actual"]
    picture = [f"samples       {task.picture}"] if task.picture and task.picture.exists() else []
    return [
        f"trained {facts['steps']} steps, {facts['items']:,} {task.unit}, in {duration(actual['seconds'])}"
        + (" (stopped early)" if facts["stopped_early"] else f" (planned {duration(predicted['seconds'])})"),
        f"memory: {size(actual['memory_bytes'])} at most (planned {size(predicted['memory_bytes'])})",
        f"loss {facts['loss']:.4f} {task.training_measure}".rstrip()
        + f", validation {facts['validation_loss']:.4f} {task.measure}"
        + (f" (step {facts['best_step']}, whose weights are kept)" if 0 < facts["best_step"] < facts["steps"] else ""),
        *(f"found         {fault}" for fault in facts["faults"]),
        f"model folder  {out}",
        f"loss curve    {out / 'loss.png'}",
        *picture,
        f"next          handmill check {out}",
    ]

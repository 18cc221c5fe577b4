"""The plan of a run, made before it trains: memory, time and disk, and the arithmetic that is fastest here.

Memory is what MemTracker counts in a training step, an evaluation and a save; the worst of them is planned for. A step
that might not fit is tracked with tensors that hold no data (FakeTensorMode), so that planning never takes what it
plans. Only a step far below the free memory is counted on the real ones, which is quicker. Time is that of real steps.

An element is one item of a batch, such as the sequence of a text model.
"""

import os
import shutil
import signal
import statistics
import tempfile
import threading
import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from handmill.errors import UserError
from handmill.recipe import Recipe, Training
from handmill.training import batches, checkpoint, distributed, memory, sharding
from handmill.training.loop import SAMPLE_SHARE, Choices, Progress, Task, evaluating
from handmill.training.monitor import duration, size
from handmill.training.precision import COMPILE_GAIN, compiler_found, worth_compiling
from handmill.training.rehearsal import Rehearsal, rehearsing

SPARE, LEAST_SPARE = 0.05, 64 << 20  # of the free memory, and bytes at least, left to what no plan sees
SMALL = 0.25  # of the free memory: a step surely below it is tracked on the real tensors
SMALL_STEP = 5e10  # floating-point operations, a second on an old machine
ACTIVATIONS = 8  # times the inputs and outputs of every matrix: more than training keeps of them
TRACKED_ITEMS = 1 << 14  # of a batch with more the need is extrapolated: it is linear long before
HEAP = {"fp32": 1.4, "bf16": 1.3}  # times the live tensors: what glibc's heap grows to, measured on five decoders
LONGEST = 1.0  # seconds of one probed pass; a larger batch is extrapolated
PROBE_SHARE, PROBE_SECONDS = 0.004, 1.0  # of the run, and at most: the repeats of a short pass
SLOWER = 1.25  # times as slow, and a single repeat has settled it
CLOSE = 4.0  # times as slow in the first passes, and more of them decide
TURNS = 5  # of those, at most
FASTER = 0.95  # of the eager step: less than this and the compiled one is kept
TRIAL = ".handmill-"  # how the folder of a trial checkpoint begins
WRITTEN = 8 << 20  # bytes that time a save, at most
SAVE_SHARE, SAVE_SECONDS = 0.03, 10.0  # of the training time: checkpoints that take more are worth a word
LINE = 200  # bytes of metrics.jsonl a step


@dataclass(frozen=True)
class Plan:
    """What a run will need, in bytes and seconds; of this process where there are many."""

    choices: Choices
    parameters: int
    steps: int
    step_seconds: float
    evaluate_seconds: float  # of one evaluation
    save_seconds: float  # of one checkpoint
    sample_seconds: float  # of one sample on the screen
    seconds: float  # of all steps, evaluations, checkpoints and samples
    memory_bytes: int  # of the process, or of the GPU, at the worst moment
    memory_limit: int  # what it could have at most
    memory_tracked: str  # "without data" or "on real tensors"
    disk_bytes: int
    disk_free: int
    largest_batch: int  # elements a step that fit without accumulation, over all processes
    reasons: list[str]  # how precision, compilation and micro-batches were chosen, a sentence each
    saving: str = ""  # what checkpoints cost where that is much, and how it is less
    fault: str = ""  # why this run cannot be done, and the remedy

    def predicted(self) -> dict[str, Any]:
        """What the receipt puts beside `actual`."""
        return {"seconds": self.seconds, "memory_bytes": self.memory_bytes, "disk_bytes": self.disk_bytes}


@dataclass(frozen=True)
class Job:
    """What is planned, and what there is for it."""

    recipe: Recipe
    task: Task
    device: torch.device
    out: Path
    kept: Choices | None  # of the run that is gone on with
    room: int  # bytes this process can still take

    @property
    def training(self) -> Training:
        return self.recipe.training

    @property
    def share(self) -> int:
        """Elements of a batch that are this process's."""
        return -(-self.training.batch // distributed.world())

    @property
    def shared(self) -> bool:
        """Whether the processes split the weights and what belongs to them."""
        return self.training.shard and distributed.world() > 1

    @property
    def micro_batch(self) -> int:
        """Elements a pass, as asked for."""
        return min(self._asked or self.share, self.share)

    @property
    def fixed(self) -> bool:
        """Whether the micro-batch may not be changed."""
        return bool(self.kept or self._asked)

    @property
    def held_out(self) -> int:
        """Items in an evaluation."""
        return self.task.held_out or self.training.evaluate_items or 100_000

    @property
    def at_once(self) -> int:
        """Elements in one pass of an evaluation."""
        return self.task.at_once or max(1, 8192 // self.task.items)

    @property
    def _asked(self) -> int:
        return self.kept.micro_batch if self.kept else self.training.micro_batch

    def choices(self, precision: str, micro_batch: int) -> Choices:
        return self.kept or Choices(precision, False, micro_batch if micro_batch < self.share else self._asked)


@dataclass(frozen=True)
class Size:
    """What a run in one precision takes."""

    micro_batch: int  # elements a pass; 0: does not fit
    beyond: int  # bytes beyond what the process has before training
    largest: int  # elements of the largest batch that fits in one pass
    parts: tuple[int, ...]  # bytes of a checkpoint's files
    remedy: int = 0  # a micro-batch that would fit in the place of the one asked for
    alone: bool = True  # one process could do it without the others that it shares the weights with


@dataclass(frozen=True)
class Speed:
    """What was measured, in seconds."""

    choices: Choices
    passes: float = 0.0  # forward and backward passes of a step
    update: float = 0.0  # the rest of it
    elements: int = 1  # that one measured pass had,
    pace: float = 0.0  # and what it took

    @property
    def step(self) -> float:
        return self.passes + self.update


class Need:
    """Bytes of tensors on the device, at the worst moments of a run with these choices.

    What is rehearsed is a step of a whole network. Of processes that split it each keeps its part, has some blocks
    gathered in a step, and the whole weights in an evaluation; the first one has all of a checkpoint.
    """

    def __init__(self, rehearsal: Rehearsal, choices: Choices, at_once: int) -> None:
        self.rehearsal, self.at_once = rehearsal, at_once
        self.choices = replace(choices, compiled=False)  # the compiler needs no more than the operators one by one
        self.steps: dict[tuple[int, int], int] = {}
        self.weights = sum(memory.size_of(p.network.parameters()) for p in rehearsal.task.owners)
        self.model = memory.size_of(rehearsal.task.phases[0].network.parameters())
        self.best = self.model if rehearsal.training.weights == "best" else 0  # the copy of the best weights so far
        self.element = batches.size_of(rehearsal.fetch(1))
        self.processes = distributed.world() if rehearsal.training.shard else 1  # that split the weights

    @property
    def spared(self) -> int:
        """Of what lasts from step to step, what the other processes keep."""
        lasting = sum(self.rehearsal.parts()) - memory.size_of(self.rehearsal.carried())
        return lasting - lasting // self.processes

    @cached_property
    def gathered(self) -> int:
        """Whole weights in a step of a split network: those outside of the blocks, and of two blocks."""
        if self.processes == 1:
            return 0
        network = self.rehearsal.task.phases[0].network
        inside = sorted((memory.size_of(b.parameters()) for b in sharding.blocks(network)), reverse=True)
        return self.model - sum(inside[2:])

    def step(self, elements: int, cuts: int) -> int:
        """In a step of `cuts` micro-batches of `elements`."""
        most = max(2, TRACKED_ITEMS // self.rehearsal.task.items)
        if elements > most:
            a, b = self.step(most // 2, cuts), self.step(most, cuts)
            return b + (b - a) * (elements - most) // (most - most // 2)
        if (elements, cuts) not in self.steps:
            self.steps[elements, cuts] = self.rehearsal.tracked(
                lambda: self.rehearsal.step(self.choices, elements, cuts))
        return self.steps[elements, cuts]

    @cached_property
    def evaluation(self) -> int:
        """In an evaluation, on real tensors from a part of it, and when it ends in a new copy of the best weights.

        Averages stand in for the weights meanwhile, which are kept aside.
        """
        few = max(1, self.at_once // 8) if self.rehearsal.real else self.at_once
        peak = self.rehearsal.tracked(lambda: self.rehearsal.evaluate(self.choices, few))
        held = sum(self.rehearsal.parts())
        aside = self.model if self.rehearsal.average or self.processes > 1 else 0
        return held - self.spared + aside + max((peak + self.best - held) * self.at_once // few, self.best)

    @cached_property
    def saving(self) -> int:
        """While a checkpoint, and at the end the model folder, is written from copies."""
        parts, split = self.rehearsal.parts(), self.processes > 1
        copies = max(parts) + (sum(parts) if split else 0) if self.rehearsal.device.type == "cpu" else 0
        swapped = self.model if self.best or self.rehearsal.average or split else 0
        return sum(parts) - self.spared + max(copies, self.model + swapped)

    def beyond(self, elements: int, share: int) -> int:
        """Beyond the weights, for `share` elements a step in micro-batches of `elements`."""
        step = self.step(elements, 2 if share > elements else 1) + self.best - self.spared + self.gathered
        worst = max(step, self.evaluation, self.saving)
        batch = self.element * (share + elements) + 32 * share  # its tokens, and their places
        return self._in_process(worst - self.weights) + (batch if self.rehearsal.device.type == "cpu" else 0)

    def micro_batch(self, share: int, room: int) -> int:
        """The largest micro-batch that divides `share` and fits into `room` bytes; 0 when none does."""
        if self.beyond(share, share) <= room:
            return share
        options = [0, *reversed(divisors(share)[1:])]  # 0 fits always
        return options[bisect_right(options, room, lo=1, key=lambda n: self.beyond(n, share)) - 1]

    def largest(self, room: int) -> int:
        """The largest power of two of elements that fits in one pass, by tracking it; 0 when none does."""
        few, many = self.beyond(1, 1), self.beyond(8, 8)
        n = power_of_two(1 + (room - few) // max(1, (many - few) // 7))
        while n and self.beyond(n, n) > room:
            n //= 2
        while n and self.beyond(2 * n, 2 * n) <= room:
            n *= 2
        return n

    def about_largest(self, elements: int, room: int) -> int:
        """`largest` from one step of `elements`: hardly ever too large, and at most a little too small."""
        held = sum(self.rehearsal.parts())
        each = max(1, self._in_process(self.step(elements, 1) + self.best - held) // elements + 2 * self.element)
        return power_of_two((room - self._in_process(held - self.spared + self.gathered - self.weights)) // each)

    def alone(self, elements: int, room: int) -> bool:
        """Whether a step of the whole network fits."""
        return self.processes == 1 or self._in_process(self.step(elements, 1) - self.weights) <= room

    def _in_process(self, tensors: int) -> int:
        """Bytes of the process, or the GPU, for so many bytes of tensors."""
        return int(tensors * HEAP[self.choices.precision]) if self.rehearsal.device.type == "cpu" else tensors


def make(recipe: Recipe, network: nn.Module, task: Task, device: torch.device, out: Path,
         choices: Choices | None = None, careful: bool = False) -> Plan:
    """Plan the run of `recipe` into the folder `out`; `choices` are those of a run that is gone on with, and kept.

    `careful` tracks without data whatever the size, and finds the largest batch by trying. What does not fit becomes
    the plan's `fault`. Raises UserError when `out` cannot be written, or training.compile = "yes" cannot be done.
    """
    before, mapped = memory.used(device), memory.mapped(device)
    free = memory.room(device)
    job = Job(recipe, task, device, out, choices, free - max(LEAST_SPARE, int(SPARE * free)))
    with rehearsing(task, recipe.training, device) as real:
        small = not careful and is_small(job)
        sizes = sizes_in(job, real, candidates(recipe.training, device, choices), small)
        fitting = {p: s.micro_batch for p, s in sizes.items() if s.micro_batch}
        timed = bool(fitting) and all(sizes[p].alone for p in fitting)
        if timed:
            speed, reasons = fastest(job, real, fitting)
            if not sizes[speed.choices.precision].beyond:
                sizes[speed.choices.precision] = size_of(job, Need(real, speed.choices, job.at_once))
            speed, grown = compiled(job, real, speed, reasons)
            grown += surplus(real, speed, mapped)
            seconds = durations(job, real, speed)
        else:
            precision = next(iter(fitting), min(sizes, key=lambda p: sizes[p].beyond))
            speed, grown, seconds = Speed(job.choices(precision, fitting.get(precision, 0))), 0, (0.0, 0.0, 0.0)
            reasons = [f"{precision}, not timed: no process can hold the whole by itself"] if fitting else []
        size = sizes[speed.choices.precision]
        if careful or not fitting:
            with real.without_data() as fake:
                size = replace(size, largest=Need(fake, speed.choices, job.at_once).largest(job.room))
    if job.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(job.device)
    return assemble(job, network, size, speed, seconds, reasons, before, grown, small)


def assemble(job: Job, network: nn.Module, size: Size, speed: Speed, seconds: tuple[float, float, float],
             reasons: list[str], before: int, grown: int, small: bool) -> Plan:
    """The plan from what was tracked and measured; `before` and `grown` are bytes of the process beside the tensors."""
    training, (evaluate, save, sample) = job.training, seconds
    evaluations, saves = -(-training.steps // training.evaluate_every), -(-training.steps // training.save_every)
    total = training.steps * speed.step + evaluations * evaluate + saves * save
    total += sample * int(total / (max(training.sample_every, SAMPLE_SHARE * sample) + sample)) if sample else 0.0
    needed = before + grown + size.beyond
    kept = min(saves, training.keep) + (saves > training.keep)  # one more while it is written
    disk = sum(size.parts) * kept + size.parts[0] + LINE * training.steps
    free = shutil.disk_usage(existing(job.out)).free + written(job.out / "checkpoints")
    plan = Plan(
        choices=speed.choices, parameters=sum(p.numel() for p in network.parameters()), steps=training.steps,
        step_seconds=speed.step, evaluate_seconds=evaluate, save_seconds=save, sample_seconds=sample, seconds=total,
        memory_bytes=max(needed, memory.peak(job.device)), memory_limit=before + job.room,
        memory_tracked="on real tensors" if small else "without data",
        disk_bytes=disk, disk_free=free, largest_batch=size.largest * distributed.world(), reasons=reasons,
        saving=saving(training, speed.step, save))
    return replace(plan, fault=memory_fault(job, size, needed, plan.memory_limit) or disk_fault(job, plan))


def refuse(plan: Plan, recipe: Recipe) -> None:
    """Raise UserError when the run cannot be done: the sentence names the sizes and a setting that fits."""
    if plan.fault:
        raise UserError(plan.fault)


def lines(plan: Plan) -> list[str]:
    """The plan for the screen."""
    evaluations = f"{duration(plan.evaluate_seconds)} an evaluation, {duration(plan.save_seconds)} a checkpoint"
    threads, cores = plan.choices.threads, os.cpu_count() or 1
    few = f"{threads} of {cores}: other programs are busy, or OMP_NUM_THREADS says so" if threads < cores else ""
    table = [
        ("parameters", f"{plan.parameters:,}"),
        ("memory", f"{size(plan.memory_bytes)} of {size(plan.memory_limit)} (tracked {plan.memory_tracked})"),
        ("largest batch", f"{plan.largest_batch:,} in one pass"),
        ("disk", f"{size(plan.disk_bytes)} of {size(plan.disk_free)}"),
        ("time", f"{duration(plan.seconds)}: {plan.steps:,} steps of {1000 * plan.step_seconds:.3g} ms, {evaluations}"
         if plan.step_seconds else "not measured"),
        *(("chosen", reason) for reason in plan.reasons),
        *([("threads", few)] if few else []),
        *([("saving", plan.saving)] if plan.saving else []),
        *([("does not fit", plan.fault)] if plan.fault else []),
    ]
    return [f"{name:14s}{text}" for name, text in table]


def actual(progress: Progress, setup: float) -> dict[str, Any]:
    """What the run took, like with like: `seconds` of the loop, `setup_seconds` before it, `memory_bytes` at most."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return {"seconds": sum(progress.seconds.values()), "setup_seconds": setup, "memory_bytes": memory.peak(device)}


def candidates(training: Training, device: torch.device, kept: Choices | None) -> list[str]:
    """The precisions to try, the likelier one first."""
    if kept or training.precision != "auto":
        return [kept.precision if kept else training.precision]
    half = device.type == "cpu" or torch.cuda.is_bf16_supported()
    return ["bf16", "fp32"] if half else ["fp32"]


def is_small(job: Job) -> bool:
    """Whether a step surely takes little memory and time, by a bound that no network here reaches."""
    parameters = [p for phase in job.task.owners for p in phase.network.parameters()]
    ends = sum(p.shape[0] + p.shape[1] for p in parameters if p.ndim > 1)  # inputs and outputs of the matrices
    elements = max(job.micro_batch, job.at_once)
    passed = ACTIVATIONS * ends * elements * job.task.items * job.task.positions
    held = 4 * (passed + 6 * sum(p.numel() for p in parameters))
    whole = job.micro_batch == job.share and job.task.flops * job.task.items * job.share < SMALL_STEP
    return job.device.type == "cpu" and whole and held < SMALL * job.room


def sizes_in(job: Job, real: Rehearsal, precisions: list[str], small: bool) -> dict[str, Size]:
    """The size of a run in each precision; of a small run that of the likeliest, as all of them fit."""
    if small:
        likeliest = size_of(job, Need(real, Choices(precisions[0]), job.at_once))
        return dict.fromkeys(precisions, Size(job.micro_batch, 0, 0, ())) | {precisions[0]: likeliest}
    with real.without_data() as fake:
        return {p: size_of(job, Need(fake, Choices(p), job.at_once)) for p in precisions}


def size_of(job: Job, need: Need) -> Size:
    """With the micro-batch that was asked for, or where that is free, the largest that fits."""
    micro = job.micro_batch
    if not job.fixed and not need.rehearsal.real:
        micro = need.micro_batch(job.share, job.room)
    beyond = need.beyond(micro or 1, job.share)
    fits = bool(micro) and beyond <= job.room
    remedy = 0 if fits or not job.fixed or job.kept else need.micro_batch(job.share, job.room)
    largest = need.about_largest(micro or 1, job.room)
    alone = need.alone(micro or 1, job.room)
    return Size(micro if fits else 0, beyond, largest, tuple(need.rehearsal.parts()), remedy, alone)


def fastest(job: Job, real: Rehearsal, fitting: Mapping[str, int]) -> tuple[Speed, list[str]]:
    """The fastest of the precisions (each with its micro-batch), and the sentences that say why.

    What comes close is measured again in turns, and the quickest passes are compared: the rest of a machine only adds
    time, and a run that is repeated should find the same.
    """
    speeds: dict[str, Speed] = {}
    for precision, micro in fitting.items():
        best = min(speeds.values(), key=lambda s: s.step, default=None)
        speeds[precision] = measure(job, real, job.choices(precision, micro), micro, best)
    least = {p: s.step for p, s in speeds.items()}
    close = {p: s for p, s in speeds.items() if s.step < CLOSE * min(least.values())}
    for p, passes in (in_turns(real, close) if len(close) > 1 else {}).items():
        least[p] = min(passes) + speeds[p].update
        speeds[p] = replace(speeds[p], passes=statistics.median_low(passes))
    chosen = min(least, key=lambda p: least[p])
    others = [f"{p} takes {1000 * s:.3g} ms a step" for p, s in least.items() if p != chosen]
    how = ", ".join([f"{chosen} at {1000 * least[chosen]:.3g} ms a step", *others])
    reasons = [how if others else how + (", as the run began" if job.kept else "")]
    if job.choices(chosen, fitting[chosen]).micro_batch and not job.fixed:
        reasons.append(f"micro-batches of {fitting[chosen]}, as {job.share} do not fit at once; the result is the same")
    return speeds[chosen], reasons


def in_turns(real: Rehearsal, speeds: Mapping[str, Speed]) -> dict[str, list[float]]:
    """Seconds that the passes of a step take, measured some times of each, one after the other."""
    passes: dict[str, list[float]] = {name: [] for name in speeds}
    start, turns = time.perf_counter(), 0
    while not turns or (turns < TURNS and time.perf_counter() - start < PROBE_SECONDS):
        for name, speed in speeds.items():
            passes[name].append(real.passes(speed.choices, speed.elements) * speed.passes / speed.pace)
            real.drop()
        turns += 1
    return passes


def measure(job: Job, real: Rehearsal, choices: Choices, micro: int, best: Speed | None = None) -> Speed:
    """Time some passes, few when they are far slower than the `best` so far, and the update unless that is known."""
    elements, one = affordable(job, real, choices, micro)
    if (choices.precision, choices.compiled, elements) not in real.warm:
        real.passes(choices, elements)
        real.update()
    updates = [best.update] if best else []
    passes: list[float] = []
    speed, budget = Speed(choices), 0.0
    while len(passes) < 2 or sum(passes) < budget:
        passes.append(real.passes(choices, elements))
        updates += [real.update()] if not best else []
        real.drop()
        pace = statistics.median_low(passes)
        whole = pace if elements == micro else one + (pace - one) * (micro - 1) / max(1, elements - 1)
        speed = Speed(choices, whole * job.share / micro, statistics.median_low(updates), elements, pace)
        if (best and speed.step > SLOWER * best.step) or pace > LONGEST / 3:
            break
        budget = min(PROBE_SECONDS, PROBE_SHARE * job.training.steps * speed.step)
    return speed


def affordable(job: Job, real: Rehearsal, choices: Choices, micro: int) -> tuple[int, float]:
    """(how many elements a probed pass may have, seconds of a pass of 1 where the step may be too long for a probe)."""
    if micro == 1 or job.task.flops * job.task.items * micro < SMALL_STEP:
        return micro, 0.0
    real.passes(choices, 1)
    one, two = real.passes(choices, 1), real.passes(choices, 2)
    real.drop()
    return max(2, min(micro, 1 + int((LONGEST - one) / max(two - one, 0.1 * one)))), one


def compiled(job: Job, real: Rehearsal, eager: Speed, reasons: list[str]) -> tuple[Speed, int]:
    """The faster of the eager and the compiled step where compiling can pay, and the bytes that the compiler takes."""
    wish, before = job.training.compile, memory.used(job.device)
    if job.kept or wish == "no":
        return eager, 0
    if uncompiled := "the weights are split over processes" if job.shared else job.task.uncompiled:
        reasons.append(f"not compiled: {uncompiled}")
        return eager, 0
    if wish == "auto" and not worth_compiling(eager.step, job.training.steps, job.device):
        found = compiler_found(job.device)
        reasons.append("not compiled, " + ("the run is too short to win it back" if found else "no compiler was found"))
        return eager, 0
    speed, why = eager, ""
    try:
        with time_limit(COMPILE_GAIN * eager.step * job.training.steps if wish == "auto" else 0.0):
            speed = measure(job, real, replace(eager.choices, compiled=True), eager.elements)
    except Exception as error:  # whatever a compiler raises
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if wish == "yes":
            raise UserError(f'the compiler failed ({why}): set training.compile = "no"') from error
        real.drop()
    grown = max(0, memory.used(job.device) - before)
    took = f"{1000 * speed.step:.3g} ms a step compiled, {1000 * eager.step:.3g} ms not"
    if wish == "auto" and speed.step > FASTER * eager.step:
        reasons.append(f"not compiled, the compiler failed ({why})" if why else f"not compiled: {took}")
        return eager, grown
    reasons.append(f"compiled: {took}")
    return speed, grown


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after so many seconds (0: never); only a main thread can be stopped so."""
    if not seconds or not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"it took more than the {duration(seconds)} that it could save")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, previous)


def surplus(real: Rehearsal, speed: Speed, mapped: int) -> int:
    """Bytes of the device that no tensor holds: libraries' pages, or what a GPU's kernels keep."""
    if real.device.type == "cpu":
        return max(0, memory.mapped(real.device) - mapped)
    torch.cuda.reset_peak_memory_stats(real.device)
    counted = real.tracked(lambda: real.step(speed.choices, speed.elements))
    return max(0, memory.peak(real.device) - counted)


def durations(job: Job, real: Rehearsal, speed: Speed) -> tuple[float, float, float]:
    """Seconds of an evaluation, of a checkpoint, and of a sample where the run is long enough to show some."""
    half = speed.passes / job.share / 2  # a forward pass of an element takes less
    elements = max(1, min(job.at_once, speed.elements * 2, int(LONGEST / 2 / half)))
    real.evaluate(speed.choices, elements)
    per_item = real.evaluate(speed.choices, elements) / (elements * job.task.items)
    every, sample = job.training.sample_every, 0.0
    if every and job.training.steps * speed.step > 3 * every:
        start, network = time.perf_counter(), job.task.phases[0].network
        with torch.no_grad(), evaluating(network):
            job.task.sample(network)
        sample = time.perf_counter() - start
    return per_item * job.held_out / distributed.world(), save_seconds(job.out, real), sample


def saving(training: Training, step: float, save: float) -> str:
    """What checkpoints of `save` seconds cost steps of `step` seconds; empty where that is little.

    The interval stays as the recipe has it: it is also the most that a killed run loses.
    """
    share = save / max(1e-9, save + training.save_every * step)
    if share <= SAVE_SHARE or save * (training.steps // training.save_every) < SAVE_SECONDS or not step:
        return ""
    rarer = min(training.steps, int(save / (step * SAVE_SHARE)) + 1)
    return (f"{100 * share:.0f} % of the time goes into checkpoints: training.save_every = {rarer} takes less, and a "
            f"killed run then loses up to {duration(rarer * step)}")


def save_seconds(out: Path, real: Rehearsal) -> float:
    """Seconds of a checkpoint, from writing a part of one beside `out`. Raises UserError when that cannot be done."""
    total = sum(real.parts())
    left, sample = min(total, WRITTEN), {}
    for i, p in enumerate(p for phase in real.task.owners for p in phase.network.parameters()):
        sample[str(i)] = p.detach().flatten()[: left // p.element_size()]
        left -= sample[str(i)].nbytes
    try:
        with tempfile.TemporaryDirectory(dir=existing(out), prefix=TRIAL) as scratch:
            start = time.perf_counter()
            checkpoint.save(Path(scratch), 0, {"probe": sample}, {}, 1)
            seconds = time.perf_counter() - start
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): choose another folder with --out") from None
    return seconds * max(1.0, total / sum(t.nbytes for t in sample.values()))


def memory_fault(job: Job, size_: Size, needed: int, limit: int) -> str:
    """Why memory does not do, and what would; empty when it does."""
    if size_.micro_batch and needed <= limit:
        return ""
    training = job.training
    said = f"training.batch = {training.batch} needs {size(needed)} of memory and {size(limit)} can be had"
    if job.kept:
        return said + ": free some memory, as a run that is gone on with keeps its micro-batches"
    if size_.remedy:
        return f"{said}: set training.micro_batch = {size_.remedy} (the result is the same)"
    if size_.largest:
        free = " and training.micro_batch = 0" if training.micro_batch else ""
        return f"{said}: set training.batch = {size_.largest * distributed.world()}{free}"
    return f"{said}, too little even for a batch of 1: make the network smaller (network.width, network.layers, " \
           "network.context)"


def disk_fault(job: Job, plan: Plan) -> str:
    """Why the disk does not do; empty when it does."""
    if plan.disk_bytes <= plan.disk_free:
        return ""
    less = ", or set training.keep = 1" if job.training.keep > 1 else ""
    return (f"the run writes {size(plan.disk_bytes)} into {job.out} and {size(plan.disk_free)} can be had: "
            f"free some space, choose another disk with --out{less}")


def divisors(number: int) -> list[int]:
    """All divisors, the largest first."""
    low = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*low, *(number // n for n in low)}, reverse=True)


def power_of_two(number: int) -> int:
    """The largest power of two up to `number`; 0 below 1."""
    return 1 << (number.bit_length() - 1) if number > 0 else 0


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.is_dir())


def written(folder: Path) -> int:
    """Bytes of the files below `folder`."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())

"""The training loop. It knows phases, not families.

Contracts: the loss is the mean over all items of the whole global batch, so micro-batches and processes do not change
it; the batch of step s is a pure function of (seed, s) and the noise of (seed, s, rank), so a resumed run is bit-equal
to one that never stopped; a loss or gradient that is not finite never reaches an optimizer.
"""

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from handmill.data.order import draw
from handmill.errors import UserError
from handmill.networks.weights import weights_of
from handmill.recipe import Training
from handmill.training import checkpoint, distributed, sharding
from handmill.training.batches import Batch, moved
from handmill.training.carried import Carried
from handmill.training.monitor import Monitor, count, duration
from handmill.training.optimizers import Optimizer, rate
from handmill.training.precision import HalfPrecision, free_threads

SKIPS = 3  # batches in a row that may be skipped before the run goes back to its last checkpoint
RETURNS = 3  # times a run may go back
HANGUP = getattr(signal, "SIGHUP", None)  # of a terminal that closes; Windows has none
SAMPLE_SHARE = 20  # a sample is followed by at least this many times its own duration of training


@dataclass
class Phase:
    """One objective of a step: `loss(module, batch, *beside)` gives its sum over the items, and sums of other figures.

    It trains `network` alone; the networks `beside` it are read, and take no gradient meanwhile. A later phase may
    train the network of an earlier one, by that one's optimizers, every so many steps.
    """

    name: str
    network: nn.Module
    loss: Callable[..., tuple[Tensor, dict[str, Tensor]]]
    count: Callable[[Any], int]  # items that a batch's loss is summed over
    optimizers: list[Optimizer]
    every: int = 1  # steps
    beside: tuple[nn.Module, ...] = ()
    learn: Callable[[dict[str, float], float], None] | None = None  # after a step: from its figures and items

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While the block runs, what lies beside the phase's network takes no gradient."""
        held = [p for network in self.beside for p in network.parameters() if p.requires_grad]
        for p in held:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in held:
                p.requires_grad_(True)

    def clipped(self) -> list[Tensor]:
        """The parameters whose gradients are slopes, not the sums of a statistic, and count in the gradient's norm."""
        return [p for o in self.optimizers if o.clipped for p in o.parameters() if p.grad is not None]


@dataclass
class Task:
    """What a family and a medium give the loop."""

    phases: list[Phase]
    batch: Callable[[NDArray[np.int64]], Batch]  # places in the endless order -> the items there, on the CPU
    evaluate: Callable[[nn.Module], dict[str, float]]  # this process's sums: "items", their "loss", and parts of it
    sample: Callable[[nn.Module], str]
    items: int  # in the loss, per element of a batch (the tokens of a sequence)
    flops: float  # of training on one item, forward and backward
    held_out: int = 0  # items that an evaluation scores
    at_once: int = 0  # elements of a batch in one pass of an evaluation
    positions: int = 1  # at which the network's widest layers work on one item (the pixels of an image)
    unit: str = "tokens"  # of the items
    measure: str = "nats per token"  # of the loss, held out
    training_measure: str = ""  # of the loss in training, where it is another
    picture: Path | None = None  # the file that `sample` draws into
    judge: Callable[[list[dict[str, float]]], str] | None = None  # of all evaluations: what went wrong; "": nothing
    remark: Callable[[list[dict[str, float]]], str] | None = None  # of all evaluations, when a run ends
    shown: tuple[str, ...] = ()  # parts of an evaluation in the live line
    uncompiled: str = ""  # why the compiler cannot take the step; "": it can
    carried: Carried | None = None  # the state that the model hands on from step to step

    @property
    def owners(self) -> list[Phase]:
        """The first phase of each network. The first network of all is the model; others only help to train it."""
        return [p for i, p in enumerate(self.phases) if all(p.network is not q.network for q in self.phases[:i])]


@dataclass
class Choices:
    """What the probe settled; kept by a resumed run, because another arithmetic gives other weights."""

    precision: str = "fp32"
    compiled: bool = False
    micro_batch: int = 0
    threads: int = field(default_factory=torch.get_num_threads)  # sums are added up by them, in their order
    processes: int = field(default_factory=distributed.world)

    def __post_init__(self) -> None:
        """Other processes than the run began with have other cores for themselves."""
        if self.processes != distributed.world():
            self.threads, self.processes = free_threads(), distributed.world()


@dataclass
class Progress:
    """What a checkpoint knows beside the tensors."""

    step: int = 0  # optimizer steps done
    shift: int = 0  # steps' worth of data passed over after going back
    returns: int = 0
    loss: float = float("nan")
    validation: float = float("nan")  # the last one
    best: float = float("inf")  # the lowest validation loss
    best_step: int = 0
    slowed: float = 1.0  # the rates' factor, halved whenever the run goes back to its best checkpoint
    history: list[dict[str, float]] = field(default_factory=list)  # of evaluations that are judged
    sums: dict[str, float] = field(default_factory=dict)  # since the last of them: of the steps' figures,
    counts: dict[str, int] = field(default_factory=dict)  # and of how many steps
    faults: list[str] = field(default_factory=list)  # what the judge found
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("train", "evaluate", "save", "sample"), 0.0))
    stopped: bool = False  # early: asked to, or `stop_at` reached


class Run:
    """One run of the loop: `Run(...).train()`."""

    def __init__(self, task: Task, training: Training, seed: int, folder: Path, device: torch.device, monitor: Monitor,
                 choices: Choices, peak: float = 0.0, made_of: Mapping[str, str] | None = None) -> None:
        self.task, self.training, self.seed = task, training, seed
        self.made_of = dict(made_of or {})  # what it learns from -> its fingerprint, for who goes on with the run
        self.folder, self.device, self.monitor = folder / "checkpoints", device, monitor
        self.choices, self.peak = choices, peak
        self.progress = Progress()
        torch.set_num_threads(choices.threads)
        if training.batch < distributed.world():
            raise UserError(f"training.batch = {training.batch} leaves some of {distributed.world()} processes without "
                            "work: raise it, or start fewer processes")
        owners, model = task.owners, task.phases[0]
        half = choices.precision == "bf16"
        self.shards = sharding.sharded(task.phases, training.batch, half, monitor.say) if training.shard else None
        how = replace(choices, compiled=choices.compiled and self.shards is None)  # the compiler knows no split weights
        self.modules = {id(p.network): prepared(self.trained(p.name), how) for p in owners}
        self.averages = {model.name: copied(weights_of(self.trained(model.name)))} if training.ema else {}
        self.best: dict[str, checkpoint.Tensors] = {}  # the model's weights at the lowest validation loss
        self.asked = self.ended = False  # by a signal to end: this process; all of them, once they know
        self.sample_seconds = 0.0  # of the last sample
        self.sampled = self.started = time.monotonic()
        self.recent: list[tuple[float, int]] = []  # (time, step) for the live speed
        self.told: dict[str, float] = {}  # of the last evaluation, for the live line
        if task.carried is not None:
            task.carried.on = True

    def train(self) -> Progress:
        """Train to the last step, the early stop or a signal; what was reached is saved in every case."""
        with stop_signals(self):
            saved = self.progress.step if self.progress.step else -1
            while self.progress.step < self.training.steps and not self.ended:
                self.step()
                done = self.progress.step
                last = done == self.training.steps
                if last or done % self.training.evaluate_every == 0:
                    self.evaluate()
                    if self.progress.step != done:  # it went back
                        saved = self.progress.step
                        continue
                best = self.task.judge is not None and self.progress.best_step == done
                if done % self.training.save_every == 0 or self.ended or last or best or self.progress.stopped:
                    self.save()
                    saved = done
                if self.progress.stopped:
                    break
                self.show_sample()
            if self.ended and saved != self.progress.step:
                self.save()
        self.merge()
        return self.progress

    def step(self) -> None:
        """One optimizer step of every phase that is due; batches that are not finite are skipped."""
        start = time.perf_counter()
        step, skips = self.progress.step, 0
        statistics = [(b, b.clone()) for b in self.statistics()]
        while True:
            places = np.arange(self.training.batch, dtype=np.int64) + (step + self.progress.shift) * self.training.batch
            torch.manual_seed(draw(self.seed, "noise", step + self.progress.shift, distributed.rank()))
            done = {p.name: self.phase_step(p, places) for p in self.task.phases if step % p.every == 0}
            faults = [fault for _, fault in done.values() if fault]
            if not faults:
                break
            for buffer, before in statistics:
                buffer.copy_(before)
            skips += 1
            self.progress.shift += 1
            self.monitor.say(f"step {step + 1}: {faults[0]}; batch {places[0]} to {places[-1]} is skipped")
            if skips > SKIPS:
                self.go_back(step, faults[0])
                return
        self.agree()
        if self.averages:
            self.average()
        self.progress.step += 1
        figures = {name: value for found, _ in done.values() for name, value in found.items()}
        self.progress.loss = figures.get("loss", self.progress.loss)
        self.progress.seconds["train"] += time.perf_counter() - start
        self.report(figures)

    def phase_step(self, phase: Phase, places: NDArray[np.int64]) -> tuple[dict[str, float], str]:
        """Forward, backward and optimizer step of one phase: its figures, and what was not finite, where; "": all was.

        The figures are means over the items: "loss", what the loss tells beside it, and the "gradient_norm"; of other
        phases than the first with the phase's name before them.
        """
        modules = [self.modules[id(network)] for network in (phase.network, *phase.beside)]
        mine = np.array_split(places, distributed.world())[distributed.rank()]
        cuts = max(1, -(-mine.size // (self.choices.micro_batch or max(1, mine.size))))
        batches = [self.task.batch(part) for part in np.array_split(mine, cuts)]
        counted = torch.tensor([sum(phase.count(b) for b in batches), self.asked], dtype=torch.float64)
        items, asked = distributed.total(counted.to(self.device)).tolist()
        self.ended = self.ended or (asked > 0 and distributed.world() > 1)
        assert items > 0, "a global batch without a single item to predict"
        sums: dict[str, Tensor] = {}
        with phase.alone():
            for batch in batches:
                part, told = phase.loss(modules[0], moved(batch, self.device), *modules[1:])
                (part * (1 / items)).backward()
                for name, value in ({"loss": part} | told).items():
                    sums[name] = sums.get(name, 0.0) + value.detach().double()
        own = distributed.where_odd([sums["loss"], *(p.grad for p in phase.network.parameters() if p.grad is not None)])
        values, odd = distributed.total(torch.cat([torch.stack([*sums.values()]), own])).split([len(sums), len(own)])
        distributed.total_of(p.grad for p in phase.network.parameters() if p.grad is not None)
        norm = sharding.clip(phase.clipped(), self.training.clip or float("inf"))
        figures = dict(zip(sums, (values / items).tolist(), strict=True)) | {"gradient_norm": norm}
        fault = ""
        if not np.isfinite(figures["loss"]) or not np.isfinite(norm):
            ranks = [str(rank) for rank in odd.nonzero().flatten().tolist()]
            fault = "the loss or a gradient" + (f" of rank {', '.join(ranks)}" if ranks else "") + " is not finite"
        else:
            self.update(phase)
            if phase.learn is not None:
                phase.learn(figures, items)
        modules[0].zero_grad(set_to_none=True)
        prefix = "" if phase is self.task.phases[0] else f"{phase.name}_"
        return {prefix + name: value for name, value in figures.items()}, fault

    def update(self, phase: Phase) -> None:
        """The optimizer step of one phase."""
        scale = rate(self.progress.step, self.training) * self.progress.slowed
        for optimizer in phase.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * scale
            optimizer.step()

    def statistics(self) -> list[Tensor]:
        """What a forward pass may change, such as the moments of batch normalisation."""
        return [b for phase in self.task.owners for b in phase.network.buffers() if b.is_floating_point()]

    @torch.no_grad()
    def agree(self) -> None:
        """Statistics that each process kept of its own items become their mean."""
        if distributed.world() > 1:
            buffers = self.statistics()
            for buffer in buffers:
                buffer.div_(distributed.world())
            distributed.total_of(buffers)

    @torch.no_grad()
    def average(self) -> None:
        """EMA of the weights; its decay grows with the steps, so that the average forgets the start."""
        decay = min(self.training.ema, (1 + self.progress.step) / (10 + self.progress.step))
        for name, average in self.averages.items():
            current = weights_of(self.trained(name))
            torch._foreach_lerp_(sharding.locals_of(average[k] for k in current), sharding.locals_of(current.values()),
                                 1 - decay)

    def evaluate(self) -> None:
        """Mean loss over the held-out data, of the averaged weights where there are any."""
        start = time.perf_counter()
        phase = self.task.phases[0]
        with torch.no_grad(), self.averaged(), evaluating(phase.network):
            half = self.choices.precision == "bf16"
            sums = self.task.evaluate(HalfPrecision(phase.network) if half else phase.network)
            values = distributed.total(torch.tensor([*sums.values()], dtype=torch.float64, device=self.device))
            means = dict(zip(sums, (values / values[[*sums].index("items")]).tolist(), strict=True))
            del means["items"]
            self.progress.validation = means.pop("loss")
            if self.progress.validation < self.progress.best and self.training.weights == "best":
                self.progress.best, self.progress.best_step = self.progress.validation, self.progress.step
                self.best = {phase.name: copied(self.averages.get(phase.name) or weights_of(self.trained(phase.name)))}
        self.progress.stopped = self.progress.validation <= self.training.stop_at
        self.progress.seconds["evaluate"] += time.perf_counter() - start
        self.monitor.record(step=self.progress.step, seconds=round(self.elapsed(), 3),
                            validation_loss=self.progress.validation,
                            **{f"validation_{name}": mean for name, mean in means.items()})
        self.told = {name: means[name] for name in self.task.shown}
        self.live(now=True)
        if self.task.judge is not None:
            self.judge(means)

    def judge(self, means: dict[str, float]) -> None:
        """Where the evaluations say that the run went wrong, go back to its best checkpoint, at half the rates."""
        p = self.progress
        steps = {name: total / p.counts[name] for name, total in p.sums.items()}
        p.history.append(steps | {"step": p.step, "loss": p.validation} | means)
        p.sums, p.counts = {}, {}
        assert self.task.judge is not None
        fault = self.task.judge(p.history)
        if not fault:
            return
        self.monitor.say(f"step {p.step}: {fault}")
        faults, slowed, past, said = p.faults, p.slowed / 2, p.step + p.shift, f"step {p.step}: {fault}"
        if len(faults) == RETURNS or not p.best_step or not self.resume(p.best_step):
            kept = f"the weights of step {p.best_step} are kept" if p.best_step else "no step before was better"
            p.faults, p.stopped = [*faults, f"{said}; ended, {kept}"], True
            self.monitor.say(f"training ends here, {kept}")
            return
        p = self.progress
        p.faults, p.slowed, p.shift = [*faults, f"{said}; went back to step {p.step}"], slowed, past - p.step
        self.save()
        with distributed.first() as mine:
            if mine:
                checkpoint.drop_after(self.folder, p.step)
        self.monitor.say(f"went back to the best checkpoint, of step {p.step}; the data goes on, at {slowed:g} of the "
                         "rates")

    def averaged(self) -> Any:
        """The averaged weights, where there are any, in place of the trained ones while the block runs; whole ones."""
        return self.swapped(self.averages)

    def chosen(self) -> Any:
        """What the model folder gets: the best weights, else the averaged, else the last."""
        return self.swapped(self.best or self.averages)

    @contextmanager
    def swapped(self, weights: dict[str, checkpoint.Tensors]) -> Iterator[None]:
        if self.shards is not None:
            with self.shards.whole(weights.get(self.task.phases[0].name)):
                yield
            return
        trained = {name: copied(weights_of(self.network(name))) for name in weights}
        for name, other in weights.items():
            self.network(name).load_state_dict(other, strict=False)
        try:
            yield
        finally:
            for name, own in trained.items():
                self.network(name).load_state_dict(own, strict=False)

    def network(self, name: str) -> nn.Module:
        """The network that the phase of this name trains."""
        return next(p.network for p in self.task.phases if p.name == name)

    def trained(self, name: str) -> nn.Module:
        """What is trained in its place: itself, or its double that is split over the processes."""
        return self.network(name) if self.shards is None else self.shards.double

    def merge(self) -> None:
        """A network that was split is whole again, with the chosen weights, in every process."""
        if self.shards is not None:
            self.shards.fill((self.best or self.averages).get(self.task.phases[0].name))
            self.shards, self.best, self.averages = None, {}, {}

    def save(self) -> None:
        """A checkpoint of everything the next step depends on."""
        start, parts = time.perf_counter(), self.tensors()
        self.monitor.flush()
        with distributed.first() as mine:
            if mine:
                whole = -(-self.training.batch // distributed.world())
                choices = replace(self.choices, micro_batch=self.choices.micro_batch or whole)
                facts = {"progress": asdict(self.progress), "choices": asdict(choices), "seed": self.seed,
                         "made_of": self.made_of}
                kept = self.progress.best_step if self.task.judge else None
                checkpoint.save(self.folder, self.progress.step, parts, facts, self.training.keep, kept)
        self.progress.seconds["save"] += time.perf_counter() - start

    def tensors(self) -> dict[str, checkpoint.Tensors]:
        """File name -> tensors: weights and optimizer states of all networks, average and best weights of the model,
        the state that it carries. Every process must call it; of what is split, the first alone gets the tensors."""
        parts = {f"{name}-average": weights for name, weights in self.averages.items()}
        parts |= {f"{name}-best": weights for name, weights in self.best.items()}
        for phase in self.task.owners:
            parts[phase.name] = weights_of(self.trained(phase.name))
            for i, optimizer in enumerate(phase.optimizers):
                parts[f"{phase.name}-optimizer-{i}"] = optimizer.tensors()
        if self.shards is not None:
            parts = {name: sharding.collected(tensors) for name, tensors in parts.items()}
        return parts | ({"carried": self.task.carried.tensors()} if self.task.carried else {})

    def resume(self, last: int | None = None) -> bool:
        """Go on from the newest whole checkpoint, if there is one, up to that of step `last`."""
        found = checkpoint.load(self.folder, last)
        if found is None:
            return False
        parts, facts, passed = found
        for sentence in passed:
            self.monitor.say(sentence)
        assert facts["seed"] == self.seed, "another run's checkpoint"
        kept = Choices(**facts["choices"])
        assert (kept.precision, kept.compiled) == (self.choices.precision, self.choices.compiled), "another arithmetic"
        self.restore(parts)
        spent = self.progress.seconds
        self.progress = Progress(**facts["progress"])
        if sum(spent.values()):  # in this process already: what it goes back over was spent all the same
            self.progress.seconds = spent
        self.progress.stopped = False
        return True

    def restore(self, parts: dict[str, checkpoint.Tensors]) -> None:
        for phase in self.task.owners:
            load_weights(self.trained(phase.name), parts[phase.name])
            for i, optimizer in enumerate(phase.optimizers):
                optimizer.load(parts[f"{phase.name}-optimizer-{i}"])
        model = self.task.phases[0].name
        own = weights_of(self.trained(model))
        for name, kept in (("average", self.averages), ("best", self.best)):
            if f"{model}-{name}" in parts:
                kept[model] = {k: sharding.taken(v, own[k]) for k, v in parts[f"{model}-{name}"].items()}
        if self.task.carried is not None:
            self.task.carried.load(parts["carried"], self.device)

    def go_back(self, step: int, fault: str) -> None:
        """Return to the last checkpoint and pass over the data that ended in numbers that are not finite."""
        past, returns = step + self.progress.shift, self.progress.returns + 1
        advice = "lower training.learning_rate and training.matrix_rate, or raise training.warmup"
        if returns > RETURNS or not checkpoint.checkpoints(self.folder):
            raise UserError(f"training diverged at step {step + 1}: {SKIPS + 1} batches in a row were skipped, because "
                            f"{fault}; {advice}")
        self.resume()
        self.progress.shift, self.progress.returns = past - self.progress.step, returns
        self.monitor.say(f"went back to the checkpoint of step {self.progress.step}; "
                         "the data goes on after the bad batches")

    def elapsed(self) -> float:
        return sum(self.progress.seconds.values())

    def report(self, figures: dict[str, float]) -> None:
        """A line of metrics and, at times, the live line."""
        now, p = time.monotonic(), self.progress
        if self.task.judge is not None:
            for name, value in figures.items():
                p.sums[name], p.counts[name] = p.sums.get(name, 0.0) + value, p.counts.get(name, 0) + 1
        self.recent = [r for r in self.recent[-200:] if now - r[0] < 10] + [(now, self.progress.step)]
        self.monitor.record(step=p.step, seconds=round(self.elapsed(), 3), **figures,
                            rate=rate(p.step - 1, self.training) * p.slowed,
                            items_per_second=round(self.speed(), 1) or None)
        self.live()

    def speed(self) -> float:
        """Items per second over the last ten seconds."""
        (first, a), (last, b) = self.recent[0], self.recent[-1]
        per_step = self.training.batch * self.task.items
        return (b - a) * per_step / (last - first) if last > first else 0.0

    def live(self, now: bool = False) -> None:
        p, speed = self.progress, self.speed()
        if not speed:
            return
        parts = [f"step {p.step}/{self.training.steps}", f"loss {p.loss:.3f}"]
        if np.isfinite(p.validation):
            parts.append(f"validation {p.validation:.3f}")
            parts += [f"{name} {value:.3f}" for name, value in self.told.items()]
        parts.append(f"{count(speed)} {self.task.unit}/s")
        if self.peak:
            parts.append(f"{100 * speed * self.task.flops / self.peak / distributed.world():.0f} % of the matrix peak")
        left = (self.training.steps - p.step) * self.training.batch * self.task.items / speed
        picture = [str(self.task.picture)] if self.task.picture and self.task.picture.exists() else []
        self.monitor.live("  ".join([*parts, f"{duration(left)} left", *picture]), now)

    def show_sample(self) -> None:
        """A sample on the screen every `sample_every` seconds, less often where that costs 5 % of the time."""
        pause = max(self.training.sample_every, SAMPLE_SHARE * self.sample_seconds)
        mine = distributed.rank() == 0 and not self.monitor.quiet
        due = time.monotonic() - self.sampled >= pause
        if self.shards is not None and self.training.sample_every:  # all gather the weights when the first one samples
            due = distributed.total(torch.tensor(float(due and mine), device=self.device)).item() > 0
        if not (due and self.training.sample_every):
            return
        start = time.perf_counter()
        if mine or self.shards is not None:
            network = self.task.phases[0].network
            with torch.no_grad(), self.averaged(), evaluating(network):
                text = self.task.sample(network) if mine else ""
            self.monitor.say(f"  sample at step {self.progress.step}: {text}")
        self.sampled = time.monotonic()
        self.sample_seconds = time.perf_counter() - start
        self.progress.seconds["sample"] += self.sample_seconds


def prepared(network: nn.Module, choices: Choices) -> nn.Module:
    """The module that a loss calls: the network in its precision, compiled or not."""
    module: nn.Module = HalfPrecision(network) if choices.precision == "bf16" else network
    return torch.compile(module) if choices.compiled else module  # type: ignore[return-value]


def copied(weights: checkpoint.Tensors) -> checkpoint.Tensors:
    return {k: v.detach().clone() for k, v in weights.items()}


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    network.eval()
    try:
        yield
    finally:
        network.train()


def load_weights(network: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load what `weights_of` saved. Raises UserError when it belongs to another network."""
    own = weights_of(network)
    odd = set(own) ^ set(weights) or {k for k in own if own[k].shape != weights[k].shape}
    if odd:
        raise UserError(f"the checkpoint is of another network ({sorted(odd)[0]} differs): "
                        "train into another folder, or delete this one's checkpoints")
    network.load_state_dict({k: sharding.parted(v, own[k]) for k, v in weights.items()}, strict=False)


@contextmanager
def stop_signals(run: Run) -> Iterator[None]:
    """SIGTERM, Ctrl-C and a terminal that closes end the run after the step at hand, saved; a second one at once."""
    def stop(number: int, frame: Any) -> None:
        if run.asked and number != HANGUP:
            raise SystemExit(128 + number)
        if run.asked:  # a terminal that closes may say so more than once
            return
        run.asked, run.ended = True, distributed.world() == 1
        with suppress(RuntimeError):  # the signal came in the midst of another line
            run.monitor.say("stopping: this step is finished and saved first (once more: stop at once)")

    previous = {}
    try:
        for number in (signal.SIGTERM, signal.SIGINT, HANGUP):
            if number is not None and (number != HANGUP or signal.getsignal(number) != signal.SIG_IGN):  # nohup's
                previous[number] = signal.signal(number, stop)
    except ValueError:  # not the main thread: signals are the caller's
        pass
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

"""Steps and evaluations as the loop takes them, to be measured: nothing is different afterwards.

The rates are zero, so an optimizer does all of its work and adds nothing. What it leaves (its state, gradients,
buffers, random numbers) is put back.
"""

import copy
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from handmill.networks.weights import weights_of
from handmill.recipe import Training
from handmill.training import memory
from handmill.training.batches import Batch, like, moved
from handmill.training.loop import Choices, Phase, Task, evaluating, prepared
from handmill.training.optimizers import Optimizer
from handmill.training.precision import synchronise


@dataclass
class Rehearsal:
    """A task on its device, with real tensors or with tensors that hold no data."""

    task: Task
    training: Training
    device: torch.device
    fetch: Callable[[int], Batch]  # a batch of so many elements
    real: bool = True
    average: list[Tensor] = field(default_factory=list)  # of the model, where training.ema
    modules: dict[tuple[str, bool], dict[int, nn.Module]] = field(default_factory=dict)
    warm: set[tuple[str, bool, int]] = field(default_factory=set)  # precision, compiled, elements of passes so far

    def step(self, choices: Choices, elements: int, cuts: int = 1) -> None:
        """One optimizer step of `cuts` micro-batches of `elements`: the arithmetic of loop.Run.phase_step."""
        self.passes(choices, elements, cuts)
        self.update()

    def passes(self, choices: Choices, elements: int, cuts: int = 1) -> float:
        """Seconds of the forward and backward passes of a step; the gradients stay for `update`."""
        seconds = 0.0
        for phase in self.task.phases:
            start = time.perf_counter()
            batches = [self.fetch(elements) for _ in range(cuts)]
            items = sum(phase.count(b) for b in batches)
            with phase.alone():
                for batch in batches:
                    (self.loss(choices, phase, batch) * (1 / items)).backward()
            synchronise(self.device)
            seconds += (time.perf_counter() - start) / phase.every
        self.warm.add((choices.precision, choices.compiled, elements))
        return seconds

    def loss(self, choices: Choices, phase: Phase, batch: Batch) -> Tensor:
        """The sum of one phase's loss over a batch."""
        made = self.made(choices)
        modules = [made[id(network)] for network in (phase.network, *phase.beside)]
        return phase.loss(modules[0], moved(batch, self.device), *modules[1:])[0]

    def update(self) -> float:
        """Seconds of the rest of a step: clipping, optimizers, averages. The gradients go."""
        seconds = 0.0
        for phase in self.task.owners:
            start = time.perf_counter()
            parameters = phase.clipped()
            norm = nn.utils.clip_grad_norm_(parameters, self.training.clip or float("inf"), foreach=True)
            if not self.real or bool(norm.isfinite()):  # infinity times a rate of zero would reach the weights
                for optimizer in phase.optimizers:
                    optimizer.step()
            phase.network.zero_grad(set_to_none=True)
            if self.average and phase is self.task.phases[0]:
                with torch.no_grad():
                    torch._foreach_lerp_(self.average, list(weights_of(phase.network).values()), 0.0)
            synchronise(self.device)
            seconds += (time.perf_counter() - start) / phase.every
        return seconds

    def drop(self) -> None:
        """Forget the gradients of passes that no update follows."""
        for phase in self.task.phases:
            phase.network.zero_grad(set_to_none=True)

    def evaluate(self, choices: Choices, elements: int) -> float:
        """Seconds of one forward pass over `elements` as in an evaluation."""
        phase = self.task.phases[0]
        start = time.perf_counter()
        with torch.no_grad(), evaluating(phase.network):
            self.loss(choices, phase, self.fetch(elements))
        synchronise(self.device)
        return time.perf_counter() - start

    def made(self, choices: Choices) -> dict[int, nn.Module]:
        """The modules that losses call, by the id of their network."""
        key = choices.precision, choices.compiled
        if key not in self.modules:
            self.modules[key] = {id(p.network): prepared(p.network, choices) for p in self.task.owners}
        return self.modules[key]

    def tracked(self, work: Callable[[], object]) -> int:
        """Bytes of tensors on the device at the worst moment of `work()`, weights, optimizers and averages included."""
        networks, optimizers = _trained(self.task)
        kept = [*(t for o in optimizers for t in o.tensors().values()), *self.average, *self.carried()]
        if self.real:
            return memory.counted(work, [*networks, *kept])
        return memory.tracked(work, [*networks, *kept], self.device)

    def parts(self) -> list[int]:
        """Bytes of a checkpoint's files: weights, the model's average and best weights, and the optimizers' state."""
        networks, optimizers = _trained(self.task)
        weights = [memory.size_of(weights_of(network).values()) for network in networks]
        best = weights[:1] if self.training.weights == "best" else []
        states = [memory.size_of(t for s in o.state.values() for t in s.values() if isinstance(t, Tensor))
                  for o in optimizers]
        carried = [memory.size_of(self.carried())] if self.task.carried else []
        return [*weights, memory.size_of(self.average), *best, *states, *carried]

    def carried(self) -> list[Tensor]:
        """What stands for the state that the model hands on from step to step."""
        return self.task.carried.example() if self.task.carried else []

    @contextmanager
    def without_data(self) -> "Iterator[Rehearsal]":
        """The same with tensors of the same shapes that hold nothing, the optimizers' state included."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        example = self.fetch(1)

        def fetch(elements: int) -> Batch:
            return like(example, elements, self.device)

        with FakeTensorMode(allow_non_fake_inputs=True), _without_state(_trained(self.task)[1]):
            buffers = [b for network in _trained(self.task)[0] for b in network.buffers()]
            memo: dict[int, Any] = {id(b): torch.zeros_like(b) for b in buffers}  # deepcopy would copy their storage
            copies = copy.deepcopy([(p.network, p.optimizers, p.beside) for p in self.task.phases], memo)
            phases = [replace(p, network=n, optimizers=o, beside=b)
                      for p, (n, o, b) in zip(self.task.phases, copies, strict=True)]
            task = replace(self.task, phases=phases)
            for phase in task.owners:
                for p in phase.network.parameters():
                    p.grad = torch.zeros_like(p) if p.requires_grad else None
                for optimizer in phase.optimizers:
                    optimizer.step()
                phase.network.zero_grad(set_to_none=True)
            yield Rehearsal(task, self.training, self.device, fetch, False, _average(task, self.training))


@contextmanager
def rehearsing(task: Task, training: Training, device: torch.device) -> Iterator[Rehearsal]:
    """A rehearsal on the real tensors, which are afterwards as they were before, bit for bit."""
    networks, optimizers = _trained(task)
    rates = [(group, group["lr"]) for o in optimizers for group in o.param_groups]
    buffers = [(b, b.clone()) for n in networks for b in n.buffers()]
    for group, _ in rates:
        group["lr"] = 0.0
    try:
        with _without_state(optimizers), torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield Rehearsal(task, training, device, lambda n: task.batch(np.arange(n)), True, _average(task, training))
    finally:
        for group, rate in rates:
            group["lr"] = rate
        for buffer, before in buffers:
            buffer.copy_(before)
        for network in networks:
            network.zero_grad(set_to_none=True)


@contextmanager
def _without_state(optimizers: list[Optimizer]) -> Iterator[None]:
    """The optimizers as if they had not stepped yet, while the block runs."""
    states = [o.state for o in optimizers]
    for optimizer in optimizers:
        optimizer.state = defaultdict(dict)
    try:
        yield
    finally:
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.state = state


def _trained(task: Task) -> tuple[list[nn.Module], list[Optimizer]]:
    """Every network and every optimizer, once."""
    return [p.network for p in task.owners], [o for p in task.owners for o in p.optimizers]


def _average(task: Task, training: Training) -> list[Tensor]:
    return [v.detach().clone() for v in weights_of(task.phases[0].network).values()] if training.ema else []

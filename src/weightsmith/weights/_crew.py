"""This side of an executor with several processes: who is told what, and what happens when one dies.

The threads of `weightsmith.weights._execute.run` stay, but each has a worker process that computes
for it. So order, memory and errors are what they are with threads, and so are the bytes: the same
units in the same chunks, and the same sums of statistics in the same order.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from weightsmith.weights import _lazy
from weightsmith.weights._bench import Key, Opening, Order, Totalling, Writing, machine
from weightsmith.weights._execute import Call, default_threads
from weightsmith.weights._lazy import Piece, Reduction, naming, reductions_of
from weightsmith.weights._staging import WorkersLost
from weightsmith.weights._travel import Packed, Packer

if TYPE_CHECKING:
    from weightsmith.weights._save import Group

ATTEMPTS = 4
"""So often a piece of work is begun, if the workers die over it."""

TOGETHER = 8
"""Units of one message at most."""


class Died(Exception):
    """A worker is gone; the text says how."""


class Link(Protocol):
    """A worker process."""

    def ask(self, message: bytes) -> bytes:
        """The answer of its `Bench`; `Died` if it is gone."""
        ...

    def stop(self) -> None:
        """End it at once. May be called from another thread, while `ask` waits."""
        ...


class Crew:
    """The workers of one save.

    Args:
        executor: ``"processes"`` or ``"ray"``.
        workers: how many; default one a core.
        outputs: the files that tensors are written to.
        folder: where tensors in memory may be written for the workers.
    """

    def __init__(self, executor: str, workers: int | None, outputs: Sequence[Path], folder: Path):
        self.executor, self.workers = executor, workers or default_threads()
        self._asked_for = workers
        self._start: Callable[[], Link] | None = None
        self.opening = Opening(machine(), tuple(str(path.absolute()) for path in outputs), _lazy.CHUNK)
        self.packer = Packer(folder)
        self.stopping = False
        self._packed: dict[Key, Packed] = {}
        self._names: dict[int, str] = {}
        self._links: list[Link] = []
        self._lock = threading.Lock()

    # Before anything is computed

    def check(self, groups: Sequence[Group]) -> None:
        """An error that names the tensor, if something cannot be computed in another process."""
        for group in groups:
            with naming(group.names[0]):
                self.packer.pack(group, trial=True)
                for reduction in (one for node in group.nodes for one in reductions_of(node)):
                    if id(reduction) not in self._names and not reduction.done:
                        self._names[id(reduction)] = group.names[0]
                        for item in reduction.items:
                            self.packer.pack(item, trial=True)

    # Calls for `run`

    def writing(
        self,
        number: int,
        group: Group,
        units: Sequence[int],
        places: Sequence[tuple[int, int]],
        wrote: Callable[[int], None],
    ) -> list[Call]:
        """Calls that compute units of a group and write them; ``wrote`` is told of each unit."""

        def call(seat: Seat, chosen: tuple[int, ...]) -> None:
            with naming(group.names[0]):
                things = self._with_values({("group", number): self._once(("group", number), group)})
            seat.ask(Writing(number, chosen, tuple(places)), things, group.names[0])
            for unit in chosen:
                wrote(unit)

        return [Call(lambda seat, chosen=chosen: call(seat, chosen), group.cost) for chosen in self._cut(units)]

    def totals(self, pieces: Sequence[Piece], cost: int) -> list[Call]:
        """Calls that make a pass over units of a reduction, each with a list of totals for a result."""
        if not pieces:
            return []
        reduction, wanted = pieces[0].reduction, pieces[0].wanted
        name = self._names.get(id(reduction), "")
        with naming(name):
            packed = self.packer.pack(wanted)
        number = self.packer.number(reduction)

        def call(seat: Seat, units: tuple[tuple[int, int, int], ...]) -> Any:
            things = {}
            for index in {index for index, _, _ in units}:
                key = ("item", number, index)
                with naming(name):
                    things[key] = self._once(key, (reduction.items[index], reduction.offsets[index]))
            order = Totalling(number, packed.data, units)
            return seat.ask(order, self._with_values(things, packed.needs), name)

        runs = self._cut([piece.unit for piece in pieces])
        return [Call(lambda seat, units=units: call(seat, units), cost) for units in runs]

    def _cut(self, units: Sequence[Any]) -> list[tuple[Any, ...]]:
        """Few messages, but enough of them that all workers are busy."""
        size = max(min(len(units) // (2 * self.workers), TOGETHER), 1)
        return [tuple(units[first : first + size]) for first in range(0, len(units), size)]

    def _once(self, key: Key, thing: object) -> Packed:
        packed = self._packed.get(key)
        if packed is None:
            packed = self._packed[key] = self.packer.pack(thing)
        return packed

    def _with_values(self, things: dict[Key, Packed], more: Sequence[int] = ()) -> dict[Key, Packed]:
        """The things, and the results of the reductions that they rest on."""
        for number in {*more, *(number for packed in things.values() for number in packed.needs)}:
            reduction: Reduction = self.packer.reductions[number]
            things["value", number] = self._once(("value", number), reduction.value())
        return things

    # Workers

    def seat(self) -> Seat:
        """A place for a thread of `run`."""
        return Seat(self)

    @contextmanager
    def at_work(self) -> Iterator[int]:
        """Workers can be hired, so many side by side; they are gone at the end."""
        if self.executor == "ray":
            from weightsmith.weights._ray import cluster as place
        else:
            from weightsmith.weights._processes import machine as place
        with place(self._asked_for) as (self._start, self.workers):
            try:
                yield self.workers
            finally:
                self.stop()
                self.packer.clear()

    def hired(self) -> Link:
        """Another worker."""
        with self._lock:
            if self.stopping or self._start is None:
                raise Died("the save was stopped")
            link = self._start()
            self._links.append(link)
            return link

    def stop(self) -> None:
        """End all workers."""
        with self._lock:
            self.stopping = True
            for link in self._links:
                link.stop()


class Seat:
    """A worker process, replaced when it dies, and what it has been sent."""

    def __init__(self, crew: Crew):
        self._crew = crew
        self._link: Link | None = None
        self._sent: set[Key] = set()

    def ask(self, do: Writing | Totalling, things: dict[Key, Packed], name: str) -> Any:
        """Have something done; the result, or the error that the worker met."""
        reason = ""
        for _ in range(ATTEMPTS):
            try:
                return self._asked(do, things)
            except Died as died:
                self._drop()
                reason = str(died)
                if self._crew.stopping:
                    break
        raise WorkersLost(
            f"tensor {name}: the workers that compute it die ({reason}), {ATTEMPTS} times now. If memory is short, "
            "take fewer workers= or less memory=; resume=True (--resume) goes on with what is finished"
        )

    def _asked(self, do: Writing | Totalling, things: dict[Key, Packed]) -> Any:
        new = {key: packed.data for key, packed in things.items() if key not in self._sent}
        order = Order(do, new)
        if self._link is None:
            self._link = self._crew.hired()
            order = replace(order, opening=self._crew.opening)
        well, result = pickle.loads(self._link.ask(pickle.dumps(order, pickle.HIGHEST_PROTOCOL)))
        if not well:
            raise result
        self._sent |= new.keys()
        return result

    def _drop(self) -> None:
        if self._link is not None:
            self._link.stop()
        self._link = None
        self._sent = set()

    def next_unit(self) -> None:
        """Nothing is kept here between units."""

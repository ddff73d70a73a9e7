"""What changed between two steps? Asked of every tensor at every step, so it has to be cheap.

torch has fast accessors for this, functions of its stable C ABI, which take handles. A Python tensor object holds such a
handle, but where is not public; nor is where a tensor has its dispatch keys, which tell negated, sparse and fake tensors from
plain ones. Both are found by looking, and used only if what is found passes a test. The plain Python way, slower by
microseconds a tensor, is the definition. Neither keeps a tensor alive beyond what Python's collector can see.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from array import array
from collections.abc import Callable, Sequence
from itertools import compress
from operator import is_not
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from ..parameters.entry import Entry, InFlight
from ..parameters.memory import PLAIN_TYPES, facts_of, has_memory, kind_of
from ..tables.tensor_table import GRAD, KEPT, PARAM, SCALE0, STATE0, WIDTH, address_of
from . import cpu
from .cpu import Library

# What became of a slot since it was seen, as bits: csrc/look.h.
GONE, CAME, MOVED, OTHER, STATE_MOVED = 1, 2, 4, 8, 16

# The words of a record that are written from here: csrc/look.h.
_DIM, _SIZES = 9, 14
_WATCHED, _ADDRESS = 7, 2  # words for each watched tensor, of which the first is the object


class Look:
    """The parameters of a plan, by slot, and what was seen of them. The definition, in Python."""

    def __init__(self) -> None:
        self._params: list[Tensor] = []
        self._entries: list[Entry | None] = []
        self._facts: dict[int, tuple[Any, ...]] = {}

    def resize(self, params: list[Tensor]) -> None:
        """The slots are those of these parameters, and nothing is known of any that are new."""
        self._entries = [*self._entries, *[None] * len(params)][: len(params)]
        self._params = params
        self._facts = {slot: facts for slot, facts in self._facts.items() if slot < len(params)}

    def accepted(self, entries: Sequence[Entry], grads: Sequence[Any]) -> dict[int, Entry]:
        """By slot, those of which all tensors are plain ones on the CPU that lie in memory alike and have memory, which passes
        most checks at once. They are set on the way."""
        return {}

    def set(self, entry: Entry, grad: Tensor) -> None:
        """This is how the entry, which has this gradient, is now."""
        self._entries[entry.slot] = entry
        self._facts[entry.slot] = self._seen(entry, grad)

    def forget(self, slot: int) -> None:
        """Nothing is known of this slot."""
        self._entries[slot] = None
        self._facts.pop(slot, None)

    def placed(self, entries: Sequence[Entry]) -> None:
        """The entries' rows are in other places, or are active or not. Writes the addresses of their tensors to them."""
        for e in entries:
            if e.row >= 0:
                full, scales, _ = e.watched()
                rows, start = e.bucket.table.rows, WIDTH * e.row
                rows[start + PARAM] = full[0].data_ptr()
                for k in range(len(e.states)):
                    rows[start + STATE0 + k] = full[1 + k].data_ptr()
                rows[start + KEPT] = 0 if e.kept is None else e.kept.data_ptr()
                for k, scale in enumerate(scales):
                    rows[start + SCALE0 + k] = scale.data_ptr()

    def exchange(self, given: Sequence[tuple[Entry, Any, Sequence[Any]]]) -> list[Entry]:
        """Watch other tensors than the entry's states, what is kept, scales and its counter: those of this state dictionary,
        which the entry takes. Returns the entries that have to be made anew."""
        return [entry for entry, _, _ in given]

    def start_of(self, entry: Entry) -> int:
        """Where the memory of the parameter is."""
        return entry.local.data_ptr()

    @staticmethod
    def _seen(entry: Entry, grad: Tensor) -> tuple[Any, ...]:
        full, scales, memory = entry.watched()
        return kind_of(grad), *map(facts_of, (*full, *scales, *memory))

    def changes(self, params: list[Tensor], grads: list[Tensor | None]) -> list[int] | None:
        """Slots that changed, each followed by what changed. None if these are other parameters.

        Writes the gradients' addresses to the rows.
        """
        if len(params) != len(self._params) or any(map(is_not, params, self._params)):
            return None
        found: list[int] = []
        for slot, (entry, grad) in enumerate(zip(self._entries, grads, strict=True)):
            change = self._change(entry, grad)
            if change:
                found += (slot, change)
        return found

    def _change(self, entry: Entry | None, grad: Tensor | None) -> int:
        if entry is None:
            return 0 if grad is None else OTHER
        if grad is None:
            return GONE if entry.active else 0
        if self._seen(entry, grad) != self._facts[entry.slot] or not has_memory(grad):
            return OTHER
        if entry.bucket is not None:
            entry.bucket.table.rows[entry.row * WIDTH + GRAD] = grad.data_ptr()
        return 0 if entry.active else CAME


class NativeLook(Look):
    """The same through the C++ library, some nanoseconds a tensor. What it cannot read is looked at in Python."""

    def __init__(self, library: Library, keys: int) -> None:
        super().__init__()
        self._look, self._plain_keys = library.look, keys
        self._make_record, self._make_records = library.make_record, library.make_records
        self._place, self._exchange = library.place, library.exchange
        self._expected = array("q")
        self._records = array("q")
        self._changed = array("q")
        self._slots = array("q", bytes(40))  # struct Slots
        self._address = address_of(self._slots)

    def resize(self, params: list[Tensor]) -> None:
        super().resize(params)
        count = len(params)
        self._expected = array("q", map(id, params))
        self._records = array("q", [*self._records, *[0] * count][:count])
        self._changed = array("q", bytes(16 * max(count, 1)))
        self._slots[:] = array(
            "q", [address_of(self._expected), address_of(self._records), count, id(None), address_of(self._changed)]
        )

    def accepted(self, entries: Sequence[Entry], grads: Sequence[Any]) -> dict[int, Entry]:
        alike: dict[tuple[int, bool], list[Entry]] = {}
        for e in entries:
            alike.setdefault((len(e.states), e.counter is not None), []).append(e)
        found: dict[int, Entry] = {}
        for (states, counts), group in alike.items():
            tensors = [(grads[e.slot], e.local, *e.states, e.counter)[: 2 + states + counts] for e in group]
            if not PLAIN_TYPES.issuperset({type(t) for own in tensors for t in own}):
                plain = [PLAIN_TYPES.issuperset(map(type, own)) for own in tensors]
                group, tensors = [*compress(group, plain)], [*compress(tensors, plain)]
            records = [_blank_record(e.local.dim(), 1 + states + counts)[:] for e in group]
            at = [record.buffer_info()[0] for record in records]
            objects, out = array("q", [id(t) for own in tensors for t in own]), array("q", at)
            lengths = array("q", bytes(8 * len(group)))
            self._make_records(
                address_of(objects), states, counts, self._plain_keys, address_of(out), len(group), address_of(lengths)
            )
            for e, record, start, length in zip(group, records, at, lengths, strict=True):
                if length:
                    slot = e.slot
                    if self._facts:
                        super().forget(slot)
                    found[slot], e.record, self._records[slot] = e, record, start
        return found

    def set(self, entry: Entry, grad: Tensor) -> None:
        if entry.record is not None:  # it was accepted
            return
        self.forget(entry.slot)
        full, scales, memory = entry.watched()
        watched = [*full, *scales, *memory]
        readable = all(type(t) in PLAIN_TYPES for t in watched) and type(grad) in PLAIN_TYPES
        if readable and all(t.layout is torch.strided for t in (*watched, grad)) and not grad._is_zerotensor():
            record = _blank_record(full[0].dim(), len(watched))[:]
            objects = array("q", [id(grad), *map(id, watched)])
            states, at = len(entry.states), objects.buffer_info()[0]
            if self._make_record(at, states, len(full), len(scales), len(memory), 0, record.buffer_info()[0]):
                entry.record = record
                self._records[entry.slot] = address_of(record)
                return
        super().set(entry, grad)

    def forget(self, slot: int) -> None:
        super().forget(slot)
        self._records[slot] = 0

    def placed(self, entries: Sequence[Entry]) -> None:
        if self._facts:
            super().placed([e for e in entries if e.record is None])
            entries = [e for e in entries if e.record is not None]
        slots = array("q", [e.slot for e in entries])
        active = array("q", [e.active for e in entries])
        rows = array("q", [0 if e.row < 0 else e.bucket.table.address + 8 * WIDTH * e.row for e in entries])
        self._place(self._address, address_of(slots), address_of(active), address_of(rows), len(entries))

    def exchange(self, given: Sequence[tuple[Entry, Any, Sequence[Any]]]) -> list[Entry]:
        others: list[Entry] = []
        if self._facts or not PLAIN_TYPES.issuperset({type(t) for _, _, tensors in given for t in tensors}):
            readable = [entry.record is not None and PLAIN_TYPES.issuperset(map(type, tensors)) for entry, _, tensors in given]
            others = [entry for (entry, _, _), is_readable in zip(given, readable, strict=True) if not is_readable]
            given = [*compress(given, readable)]
        slots = array("q", [entry.slot for entry, _, _ in given])
        active = array("q", [entry.active for entry, _, _ in given])
        objects = array("q", [id(t) for _, _, tensors in given for t in tensors])
        self._exchange(self._address, address_of(slots), address_of(active), address_of(objects), len(given))
        for entry, state, tensors in given:
            entry.take(state, tensors)
        return others

    def start_of(self, entry: Entry) -> int:
        record = entry.record
        return super().start_of(entry) if record is None else record[_SIZES + 3 * record[_DIM] + _ADDRESS]

    def changes(self, params: list[Tensor], grads: list[Tensor | None]) -> list[int] | None:
        found = self._look(id(params), id(grads), self._address)
        if found == 0 and not self._facts:
            return []
        if found < 0:
            return None
        changed = self._changed[: 2 * found].tolist()
        if not self._facts:
            return changed
        merged = {slot: change for slot, change in zip(changed[::2], changed[1::2], strict=True) if slot not in self._facts}
        for slot in self._facts:
            if change := self._change(self._entries[slot], grads[slot]):
                merged[slot] = change
        return [word for slot in sorted(merged) for word in (slot, merged[slot])]


@functools.cache
def _blank_record(dim: int, watched: int) -> array[int]:
    return array("q", bytes(8 * (_SIZES + 3 * dim + _WATCHED * watched)))


def make_look() -> Look:
    """What looks at the tensors of one plan."""
    library = cpu.library()
    if library is not None and (keys := _plain_keys(library)):
        return NativeLook(library, keys)
    return Look()


_verdicts: dict[Library, int] = {}


def _plain_keys(library: Library) -> int:
    """The dispatch keys of a plain CPU tensor; 0 if the library cannot look at tensors of this torch."""
    if library not in _verdicts:
        _verdicts[library] = _found_keys(library)
    return _verdicts[library]


def _found_keys(library: Library) -> int:
    if sys.implementation.name != "cpython" or not library.has_tensors:
        return 0
    tried: list[Any] = []  # stays, so that the next tensors lie elsewhere
    for _ in range(8):  # chance may leave the same word in several places
        # What is found outlives the caller's modes, so it is found outside of them.
        with (
            torch._C.DisableTorchFunction(),
            temporarily_clear_interpreter_stack(),
            torch.utils._python_dispatch._disable_current_modes(),
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            try:
                if keys := _find_offsets(library, tried):
                    return keys
            # Not public API: whatever goes wrong, the plain way remains. What a signal's handler raises goes on its way.
            except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
                pass
    return 0


def _find_offsets(library: Library, tried: list[Any]) -> int:
    def plain(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device="cpu")

    same = [
        plain(2, 3),
        plain(5),
        plain(4, dtype=torch.bfloat16),
        plain(),
        plain(1, 2, 3, 4, dtype=torch.float64),
        torch.nn.Parameter(plain(3)),
        torch.nn.Buffer(plain(3)),
    ]
    different = [
        torch._neg_view(plain(2, 3)),
        torch._efficientzerotensor(2, 3, dtype=torch.float32, device="cpu"),
        plain(2, 3).to_sparse(),
        torch.zeros(2, 3, dtype=torch.float32, device="meta"),
    ]
    with torch.inference_mode():
        different.append(plain(2, 3))
    tried.append((same, different))
    impls = {id(t): _impl_of(library, t) for t in (*same, *different)}
    head = object.__basicsize__

    def only(candidates: list[int]) -> int:
        (found,) = candidates
        return found

    handle = only([at for at in range(head, Tensor.__basicsize__, 8) if all(_word(id(t) + at) == impls[id(t)] for t in same)])

    def keys_at(tensor: Tensor, at: int) -> int:
        return _word(impls[id(tensor)] + at)

    def tells(at: int) -> bool:
        known = keys_at(same[0], at)
        return all(keys_at(t, at) == known for t in same) and all(keys_at(t, at) != known for t in different)

    # A TensorImpl has 160 to 208 bytes, and says so itself.
    keys = only([at for at in range(8, 208, 8) if tells(at)])
    library.set_offsets(head, handle, keys)
    return keys_at(same[0], keys) if _passes_test(library, keys_at(same[0], keys)) else 0


def _word(address: int) -> int:
    return int(ctypes.c_int64.from_address(address).value)


def _impl_of(library: Library, tensor: Tensor) -> int:
    (capsule,) = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors([tensor])
    pointer = _capsule_pointer()(capsule, None)
    impl = _word(pointer)
    library.release(pointer)  # the capsule owns nothing
    return impl


@functools.cache
def _capsule_pointer() -> Callable[[Any, None], int]:
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.argtypes, get_pointer.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_void_p
    return get_pointer


def _passes_test(library: Library, keys: int) -> bool:
    """Whether the library sees what it has to see."""

    def plain() -> Tensor:
        return torch.zeros(2, 3, dtype=torch.float32, device="cpu")

    def entry(slot: int, param: Tensor, state: Tensor) -> Entry:
        e = Entry()
        e.slot, e.local, e.states, e.kept, e.scales = slot, param, [state], None, []
        e.counter = torch.zeros((), device="cpu")
        e.in_flight = InFlight()
        e.active, e.record, e.bucket, e.row = True, None, None, -1
        return e

    tensors: list[Any] = [torch.nn.Parameter(plain()) for _ in range(6)]
    states = [plain() for _ in tensors]
    grads: list[Any] = [plain() for _ in tensors]
    look = NativeLook(library, keys)
    look.resize(tensors)
    entries = [entry(slot, p, s) for slot, (p, s) in enumerate(zip(tensors, states, strict=True))]
    if len(look.accepted(entries, grads)) != len(entries):
        return False
    for e, g in zip(entries, grads, strict=True):
        look.set(e, g)
    if look.changes(list(tensors), list(grads)) != [] or look.changes(tensors[1:], grads[1:]) is not None:
        return False
    tensors[0].data = tensors[0].data.clone()
    tensors[1].data = tensors[1].data.view(3, 2)
    states[2].data = states[2].data.view(torch.int32)
    kept = grads[3:]
    grads[3], grads[4] = torch._neg_view(plain()), plain().t()
    given: list[Any] = [*grads[:5], None]
    expected = [0, MOVED, 1, OTHER, 2, OTHER, 3, OTHER, 4, OTHER, 5, GONE]
    return look.changes(list(tensors), given) == expected and len(kept) == 3

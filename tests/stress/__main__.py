"""``make stress``, ``python -m stress`` in tests/: random programs until the time is over, or one that fails.

python -m stress --seconds 600 [--seed 1]      # seed, seed + 1, ...; without it, one from the clock
python -m stress --program FILE                # a program that was printed, again
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from .programs import Program, random_program, shortest
from .twins import difference


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m stress", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, help="the first program's")
    parser.add_argument("--program", type=Path, help="a file with a program that was printed")
    given = parser.parse_args()
    if given.program:
        found = difference(eval(given.program.read_text(), {"Program": Program, "inf": float("inf"), "nan": float("nan")}))
        print(found or "no difference")
        return int(found is not None)
    first = int(time.time()) % 10**8 * 1000 if given.seed is None else given.seed
    started, seed, steps, events = time.monotonic(), first, 0, 0
    print(f"first seed {first}", flush=True)
    while time.monotonic() - started < given.seconds:
        program = random_program(seed)
        if difference(program):
            failing = shortest(program, difference)
            print(f"seed {seed}: {difference(failing)}\n{failing}\nThe program as it was drawn: python -m stress --seed {seed}")
            return 1
        seed += 1
        steps += sum(name == "step" for name, _ in program.events)
        events += sum(name != "step" for name, _ in program.events)
    print(f"{seed - first} programs, {steps} steps, {events} events between them: no difference")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Which 32-bit offsets of a Triton kernel can overflow, from intervals over its intermediate representation (TTIR).

The run-time integers of a launch are known numbers, the program's index is between 0 and the grid's size, and every
other integer follows from these by intervals, which never leave a possible value out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

RESULT = re.compile(r"^\s*%(?P<name>[\w.#]+)(?::\d+)? = (?P<operation>[a-z_]+\.[a-z_]+) ?(?P<rest>.*)$")
CONSTANT = re.compile(r"(?:dense<)?(-?\d+|true|false)>? : (.*)$")
LOOP = re.compile(
    r"(?P<indent> *).*scf\.for %(?P<name>[\w.]+) = %(?P<first>[\w.#]+) to %(?P<last>[\w.#]+) step %(?P<step>[\w.#]+)"
    r"(?: iter_args\((?P<carried>[^)]*)\))?"
)
CARRIED = re.compile(r"%([\w.]+) = %([\w.#]+)")
OPERAND = re.compile(r"%([\w.#]+)")
LIMIT = 2**31


class Interval(NamedTuple):
    low: int
    high: int


def _corners(a: Interval, b: Interval, operation: str) -> Interval:
    if operation in ("divsi", "remsi"):
        if b.low <= 0:
            raise ValueError(f"a divisor may be {b.low}")
        if operation == "remsi":
            return Interval(max(a.low, -b.high + 1) if a.low < 0 else 0, min(max(a.high, 0), b.high - 1))
        values = [int(x / y) if abs(x) < 2**52 else x // y for x in a for y in b]
        return Interval(min(values), max(values))
    function = {
        "addi": lambda x, y: x + y,
        "subi": lambda x, y: x - y,
        "muli": lambda x, y: x * y,
        "minsi": min,
        "maxsi": max,
    }[operation]
    if operation == "subi":
        return Interval(a.low - b.high, a.high - b.low)
    if operation in ("minsi", "maxsi"):
        return Interval(function(a.low, b.low), function(a.high, b.high))
    values = [function(x, y) for x in a for y in b]
    return Interval(min(values), max(values))


def overflows(ttir: str, values: Mapping[str, int], programs: int) -> list[str]:
    """Lines whose 32-bit result may leave 32 bits, and 32-bit numbers and offsets about which nothing is known.

    Args:
        ttir: the module's text.
        values: the run-time integers by the names of the kernel's arguments.
        programs: the size of the one-dimensional grid.
    """
    known = {name: Interval(value, value) for name, value in values.items()}
    found: list[str] = []
    lines = [line.split(" loc(")[0] for line in ttir.splitlines()]
    for index, line in enumerate(lines):
        if loop := LOOP.match(line):
            known |= _of_loop(loop, lines[index + 1 :], known)
            continue
        match = RESULT.match(line)
        if match is None:
            continue
        operation = match["operation"].partition(".")[2]
        if operation == "addptr":
            offset = OPERAND.findall(match["rest"])[1]
            if match["rest"].endswith("i32>") or match["rest"].endswith(", i32"):
                found += [] if offset in known else [f"unknown offset: {line.strip()}"]
            continue
        interval = _interval(operation, match["rest"], known, programs)
        narrow = re.search(r"i32>?$", match["rest"]) is not None
        if interval is None:
            # Widened later on, it would be no unknown offset any more.
            found += [f"unknown number: {line.strip()}"] if narrow and operation != "cmpi" else []
            continue
        known[match["name"]] = interval
        if narrow and not (interval.low >= -LIMIT and interval.high < LIMIT):
            found.append(f"{interval.low} to {interval.high}: {line.strip()}")
    return found


def _of_loop(loop: re.Match[str], body: list[str], known: Mapping[str, Interval]) -> dict[str, Interval]:
    """The loop's variable, and each carried integer to which every turn adds the same constant."""
    first, last, step = (known.get(loop[name]) for name in ("first", "last", "step"))
    if not (first and last and step):
        return {}
    result = {loop["name"]: Interval(first.low, max(first.low, last.high - 1))}
    turns = max(0, -(-(last.high - first.low) // step.low))
    end = next((line for line in body if line.startswith(f"{loop['indent']}  scf.yield")), "")
    for (name, start), following in zip(CARRIED.findall(loop["carried"] or ""), OPERAND.findall(end), strict=False):
        addition = re.compile(rf" *%{re.escape(following)} = arith\.addi %{re.escape(name)}, ")
        added = next((line for line in body if addition.match(line)), None)
        if added and start in known and (amount := known.get(OPERAND.findall(added)[2])):
            result[name] = Interval(
                known[start].low + min(0, turns * amount.low), known[start].high + max(0, turns * amount.high)
            )
    return result


def _interval(operation: str, rest: str, known: Mapping[str, Interval], programs: int) -> Interval | None:
    operands = [known.get(name) for name in OPERAND.findall(rest)]
    if operation == "constant":
        match = CONSTANT.match(rest)
        integer = match is not None and re.search(r"i(32|64)>?$", match[2])
        return Interval(int(match[1]), int(match[1])) if integer else None
    if operation == "get_program_id":
        return Interval(0, programs - 1)
    if operation == "make_range":
        end, start = (int(re.search(rf"{name} = (-?\d+)", rest)[1]) for name in ("end", "start"))
        return Interval(start, end - 1)
    if operation in ("splat", "broadcast", "expand_dims", "extsi", "trunci", "reshape", "trans"):
        return operands[0] if operands else None
    if operation == "select":
        chosen = operands[1:3]
        return None if None in chosen else Interval(min(c.low for c in chosen), max(c.high for c in chosen))
    if operation in ("addi", "subi", "muli", "divsi", "remsi", "minsi", "maxsi"):
        return None if None in operands[:2] else _corners(*operands[:2], operation)
    return None

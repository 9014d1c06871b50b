"""Barriers and warp collectives (PTX ISA, "Parallel Synchronization and Communication")."""

from __future__ import annotations

from ..ir import Not, Operand, Reg
from .emit import Emit, here, op


def _mask(e: Emit, operand: Operand) -> str:
    """The member mask; the threads that it names must come together before the instruction runs."""
    mask = f"{e.source(operand, 'u32')}"
    e.effect("alu", mask)
    return mask


@op("shfl")
def shuffle(e: Emit) -> None:
    """shfl.sync: up, down, bfly, idx."""
    e.type("b32")
    e.one_of("sync")
    mode = e.one_of("up", "down", "bfly", "idx")
    e.finish(5)
    mask = _mask(e, e.operands[4])
    e.code.pipe = "shfl"
    a, b, c = (e.source(x, "u32") for x in e.operands[1:4])
    value, inside = e.temporary(), e.temporary()
    e.line(f"{value}, {inside} = m.shuffle(g, {here(e)}, {mode!r}, {a}, {b}, {c}, {mask})")
    first, second = e.pair(e.operands[0])
    e.result(first, value, "b32")
    e.result(second, inside, "pred")


@op("vote")
def vote(e: Emit) -> None:
    """vote.sync: all, any, uni, ballot."""
    e.one_of("sync")
    mode = e.one_of("all", "any", "uni", "ballot")
    kind = e.type("b32" if mode == "ballot" else "pred")
    e.finish(3)
    mask = _mask(e, e.operands[2])
    a = _predicate(e, e.operands[1])
    e.result(e.operands[0], f"m.vote(g, {here(e)}, {mode!r}, {a}, {mask})", kind)


def _predicate(e: Emit, operand: Operand) -> str:
    value = e.source(operand, "pred")
    return value if isinstance(operand, Reg | Not) else f"g.fill({value})"


@op("activemask")
def active_mask(e: Emit) -> None:
    """activemask: the lanes that run together now."""
    e.type("b32")
    e.finish(1)
    e.effect("alu")
    e.result(e.operands[0], "m.active_mask(g)", "b32")


@op("match")
def match(e: Emit) -> None:
    """match.sync: any, all."""
    kind = e.type("b32", "b64")
    e.one_of("sync")
    mode = e.one_of("any", "all")
    e.finish(3)
    mask = _mask(e, e.operands[2])
    a = e.source(e.operands[1], kind)
    value, same = e.temporary(), e.temporary()
    e.line(f"{value}, {same} = m.match(g, {here(e)}, {mode!r}, {a}, {mask})")
    first, second = e.pair(e.operands[0])
    e.result(first, value, "b32")
    e.result(second, same, "pred")


@op("redux")
def reduce_warp(e: Emit) -> None:
    """redux.sync: add, min, max, and, or, xor."""
    e.needs(80)
    kind = e.type("u32", "s32", "b32")
    e.one_of("sync")
    name = e.one_of(*(("and", "or", "xor") if kind == "b32" else ("add", "min", "max")))
    e.finish(3)
    mask = _mask(e, e.operands[2])
    a = e.source(e.operands[1], kind)
    e.result(e.operands[0], f"m.reduce(g, {here(e)}, {name!r}, {a}, {mask})", kind)


@op("elect")
def elect(e: Emit) -> None:
    """elect.sync: the lowest lane of the mask leads."""
    e.needs(90)
    e.one_of("sync")
    e.finish(2)
    mask = _mask(e, e.operands[1])
    leader, chosen = e.temporary(), e.temporary()
    e.line(f"{leader}, {chosen} = m.elect(g, {here(e)}, {mask})")
    first, second = e.pair(e.operands[0])
    e.result(first, leader, "b32")
    e.result(second, chosen, "pred")


@op("bar", "barrier")
def barrier(e: Emit) -> None:
    """bar, barrier: sync, arrive, red, with their named barriers and counts; bar.warp.sync.

    Warps reach the aligned forms, of which `bar` is one, as a whole; to the others their threads may come one by one.
    """
    if e.op == "bar" and e.flag("warp"):
        e.one_of("sync")
        e.finish(1)
        mask = _mask(e, e.operands[0])
        e.code.pipe = "branch"
        e.line(f"m.warp_barrier(g, {here(e)}, {mask})")
        return
    e.flag("cta")
    kind = e.one_of("sync", "arrive", "red")
    aligned = e.op == "bar" or e.flag("aligned")
    name = "none"
    if kind == "red":
        name = e.one_of("and", "or", "popc")
        e.type("u32" if name == "popc" else "pred")
    target, operands = e.operands[0], e.operands[1 if kind == "red" else 0 :]
    predicate = _predicate(e, operands[-1]) if kind == "red" else "None"
    operands = operands[:-1] if kind == "red" else operands
    e.operands[:] = [target, *operands] if kind == "red" else operands
    extra = 1 if kind == "red" else 0
    e.finish((2,) if kind == "arrive" else (1 + extra, 2 + extra))
    if kind == "arrive" or len(operands) == 2:
        e.names.partial_order = True
    number = e.source(operands[0], "u32")
    count = e.source(operands[1], "u32") if len(operands) == 2 else "None"
    e.effect("branch", "warp" if aligned else None)
    if kind == "red":  # the result is put into the register by the scheduler, when all have arrived
        if not isinstance(target, Reg) or target.name not in e.names.number:
            e.bad_operand(target)
        e.code.reads.append(e.names.number[target.name])
        e.code.writes.append(e.names.number[target.name])
    e.line(f"condition = ({number}, {count}, {predicate})")

"""Loads, stores, atomics, asynchronous copies, fences and addresses (PTX ISA, "Data Movement", "Atomics")."""

from __future__ import annotations

from ..ir import SIZES, Address, Int, Reg, Symbol, Vector
from .emit import Emit, device_wide, op
from .kinds import storage

_TYPES = (
    *("b8", "b16", "b32", "b64", "u8", "u16", "u32", "u64", "s8", "s16", "s32", "s64"),
    *("f32", "f64", "f16", "f16x2", "bf16", "bf16x2"),
)
_SPACES = ("global", "shared", "shared::cta", "local", "param", "param::func")
_SCOPES = ("cta", "cluster", "gpu", "sys")
_EVICTION = tuple(
    f"L1::{hint}" for hint in ("evict_normal", "evict_unchanged", "evict_first", "evict_last", "no_allocate")
)
_PREFETCH = ("L2::64B", "L2::128B", "L2::256B")


def _space(e: Emit, *others: str) -> str:
    space = e.one_of(*_SPACES, *others, default="generic").split("::")[0]
    return "global" if space == "const" else space


def _order(e: Emit, fencing: str) -> tuple[str, str]:
    """Takes .weak, .volatile, .relaxed, .acquire or .release, and the scope: the order and the scope, "" where weak."""
    order = e.one_of("weak", "volatile", "relaxed", fencing, default="weak")
    if order in ("weak", "volatile"):
        return order, "sys" if order == "volatile" else ""
    return order, e.one_of(*_SCOPES)


def _fence(e: Emit, scope: str) -> None:
    e.names.fences = e.names.partial_order = True
    e.line(f"m.fence(g, {device_wide(scope)})")


def _hints(e: Emit, *operators: str) -> None:
    """Cache operators and hints change no result."""
    e.one_of(*operators, default="")
    e.one_of(*_EVICTION, default="")


def _element(e: Emit, kind: str, count: int) -> int:
    """Bytes of each element of a vector, which has 16 at most."""
    if SIZES[kind] * count > 16:
        e.unsupported(f"a vector of {count} .{kind}")
    return SIZES[kind]


@op("ld", "ldu")
def load(e: Emit) -> None:
    """ld, ldu: scalars and vectors; wider destinations are sign- or zero-extended."""
    kind = e.type(*_TYPES)
    count = int(e.one_of("v2", "v4", default="v1")[1:])
    read_only = e.op == "ldu"
    order, scope = "weak", ""
    if read_only:
        space = e.one_of("global", default="generic")
    else:
        order, scope = _order(e, "acquire")
        space = _space(e, "const", "param::entry")
        read_only = e.flag("nc")
        _hints(e, "ca", "cg", "cs", "lu", "cv")
        e.one_of(*_PREFETCH, default="")
    e.finish(2)
    size = _element(e, kind, count)
    target, source = e.operands
    targets = target.items if isinstance(target, Vector) else (target,)
    if len(targets) != count:
        e.bad_operand(target)
    if space == "param" and isinstance(source, Address) and isinstance(source.base, Symbol):
        where, offset = e.symbol(source.base.name)
        if where == "param":
            for position, item in enumerate(targets):
                at = offset + source.base.offset + source.offset + position * size
                e.result(item, f"m.parameter(g, {at}, u{size}).view({_loaded(kind)})", kind, extend=True)
            e.code.pipe = "const"
            return
    space, address = e.address(source, space)
    if space == "param":
        e.unsupported("space .param with this address")
    e.effect("lsu")
    site = e.site("load", space, size * count, scope, read_only)
    name = e.temporary()
    e.line(f"{name} = m.load_{space}(g, {site}, {address}, {count})")
    if order == "acquire":
        _fence(e, scope)
    for position, item in enumerate(targets):
        value = f"{name}[{position}]"
        e.result(item, value if _loaded(kind) == f"u{size}" else f"{value}.view({_loaded(kind)})", kind, extend=True)


def _loaded(kind: str) -> str:
    return f"i{SIZES[kind]}" if kind[0] == "s" else storage(kind)


@op("st")
def store(e: Emit) -> None:
    """st: scalars and vectors; the low bits of wider sources."""
    kind = e.type(*_TYPES)
    count = int(e.one_of("v2", "v4", default="v1")[1:])
    order, scope = _order(e, "release")
    space = _space(e)
    _hints(e, "wb", "cg", "cs", "wt")
    e.finish(2)
    size = _element(e, kind, count)
    values = e.many(e.operands[1], f"b{size * 8}")
    if len(values) != count:
        e.bad_operand(e.operands[1])
    space, address = e.address(e.operands[0], space)
    if space == "param":
        e.unsupported("space .param")
    e.effect("lsu")
    site = e.site("store", space, size * count, scope)
    if order == "release":
        _fence(e, scope)
    e.line(f"m.store_{space}(g, {site}, {address}, [{', '.join(values)}])")


_ATOMIC = {
    "exch": ("b32", "b64"),
    "cas": ("b16", "b32", "b64"),
    "and": ("b32", "b64"),
    "or": ("b32", "b64"),
    "xor": ("b32", "b64"),
    "add": ("u32", "s32", "u64", "s64", "f32", "f64", "f16", "f16x2", "bf16", "bf16x2"),
    "inc": ("u32",),
    "dec": ("u32",),
    "min": ("u32", "s32", "u64", "s64"),
    "max": ("u32", "s32", "u64", "s64"),
}


@op("atom", "red")
def atomic(e: Emit) -> None:
    """atom, red: read-modify-write, one thread after the other in the order of their numbers."""
    name = e.one_of(*(("exch", "cas") if e.op == "atom" else ()), *list(_ATOMIC)[2:])
    kind = e.type(*_ATOMIC[name])
    order = e.one_of("relaxed", "acquire", "release", "acq_rel", default="relaxed")
    scope = e.one_of(*_SCOPES, default="gpu")
    space = e.one_of("global", "shared", "shared::cta", default="generic").split("::")[0]
    if "f16" in kind:
        e.one_of("noftz")
        e.needs(90 if kind.startswith("b") else 70)
    sources = 2 if name == "cas" else 1
    e.finish(sources + (2 if e.op == "atom" else 1))
    target = e.operands[0] if e.op == "atom" else Reg("_")
    rest = e.operands[1:] if e.op == "atom" else e.operands
    values = [e.source(x, kind) for x in rest[1:]]
    space, address = e.address(rest[0], space)
    e.effect("lsu")
    number = e.names.number.get(target.name, -1) if isinstance(target, Reg) else -1
    site = e.site("atomic", space, SIZES[kind], scope, result=number)
    result = e.temporary()
    if order in ("release", "acq_rel"):
        _fence(e, scope)
    e.line(f"{result} = m.atomic_{space}(g, {site}, {address}, {name!r}, {kind!r}, {', '.join(values)})")
    if order in ("acquire", "acq_rel"):
        _fence(e, scope)
    e.result(target, result, kind)


@op("cp")
def asynchronous_copy(e: Emit) -> None:
    """cp.async, with zero-fill, commit_group, wait_group and wait_all."""
    e.needs(80)
    e.one_of("async")
    if e.flag("commit_group"):
        e.finish(0)
        e.effect("lsu")
        e.line("m.commit_copies(g)")
        return
    if e.flag("wait_all"):
        e.finish(0)
        e.effect("lsu")
        e.line("m.wait_copies(g, None)")
        return
    if e.flag("wait_group"):
        e.finish(1)
        e.effect("lsu")
        e.line(f"m.wait_copies(g, {e.literal(0)})")
        return
    cached = e.one_of("ca", "cg")
    e.one_of("shared", "shared::cta")
    e.one_of("global")
    e.one_of(*_PREFETCH, default="")
    e.finish((3, 4))
    size = e.literal(2)
    if size not in ((4, 8, 16) if cached == "ca" else (16,)):
        e.unsupported(f"cp-size {size}")
    used = "None"
    if len(e.operands) == 4:
        extra = e.operands[3]
        if isinstance(extra, Reg) and e.names.registers.get(extra.name) == "pred":
            used = f"where({e.source(extra, 'pred')}, {e.integer(0, 'u4')}, {e.integer(size, 'u4')})"
        else:
            used = f"{e.source(extra, 'u32')} + g.zero(u4)" if isinstance(extra, Int) else e.source(extra, "u32")
    _, target = e.address(e.operands[0], "shared")
    _, source = e.address(e.operands[1], "global")
    e.effect("lsu")
    site = e.site("copy", "shared", size)
    e.site("copy", "global", size)
    e.line(f"m.copy_async(g, {site}, s{len(e.names.sites) - 1}, {target}, {source}, {used})")


@op("cvta")
def convert_address(e: Emit) -> None:
    """cvta: state space <-> generic addresses."""
    e.type("u64")
    to = e.flag("to")
    space = e.one_of("global", "shared", "local", "const", "shared::cta")
    e.finish(2)
    base = e.names.windows[space.split("::")[0]]
    operand = e.operands[1]
    if isinstance(operand, Symbol) and not to:
        e.result(e.operands[0], e.symbol_address(operand, "u8", base), "u64")
        return
    value = e.source(operand, "u64")
    if base:
        value = f"{value} {'-' if to else '+'} {e.integer(base, 'u8')}"
    e.result(e.operands[0], value, "u64")


@op("isspacep")
def is_space(e: Emit) -> None:
    """isspacep: whether a generic address lies in a window; constants lie in global memory here."""
    space = e.one_of("global", "shared", "local", "shared::cta")
    e.finish(2)
    address = e.source(e.operands[1], "u64")
    e.result(e.operands[0], f"m.in_window({address}, {space.split('::')[0]!r})", "pred")


@op("membar", "fence")
def fence(e: Emit) -> None:
    """membar, fence: they order what was written before later atomics, for the checks of races."""
    if e.op == "membar":
        scope = e.one_of("cta", "gl", "sys")
    else:
        e.one_of("sc", "acq_rel", default="acq_rel")
        scope = e.one_of(*_SCOPES)
    e.finish(0)
    e.effect("lsu")
    _fence(e, scope)


@op("prefetch", "prefetchu")
def prefetch(e: Emit) -> None:
    """prefetch, prefetchu: change nothing."""
    if e.op == "prefetch":
        e.one_of("global", "local", default="generic")
    e.one_of("L1", *(("L2",) if e.op == "prefetch" else ()))
    e.finish(1)
    e.effect("lsu")
    e.address(e.operands[0], "generic")

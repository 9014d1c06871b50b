"""How one PTX instruction becomes Python source: the emitter that the instruction tables in this folder write with.

A handler takes every modifier that it implements off the opcode; what is left over is an error, so nothing is guessed.
In the generated source a register is a NumPy array with one element per active thread, and arrays are never changed
in place, so registers may share them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from ..errors import EmulatorError, Place
from ..ir import SIZES, Address, Float, Instruction, Int, Not, Operand, Pair, Reg, Symbol, Vector
from .kinds import FLOAT, numpy_type, storage


@dataclass(frozen=True)
class Site:
    """One memory instruction of a program: what its checks and counts need to know.

    Attributes:
        index: Position among the sites of the program.
        instruction: Where it stands.
        op: ``"load"``, ``"store"``, ``"atomic"``, ``"copy"``, ``"ldmatrix"`` or ``"stmatrix"``.
        space: State space, ``"generic"`` where the address tells.
        size: Bytes that one thread accesses.
        scope: Where it is strong (atomic, volatile, relaxed, acquire or release), so that it does not race with others
            of its kind: ``"cta"``, ``"cluster"``, ``"gpu"`` or ``"sys"``; empty where it is weak.
        read_only: Whether it goes through the non-coherent path (``ld.global.nc``).
        result: Number of the register that an atomic writes what it found to; -1 where there is none.
    """

    index: int
    instruction: Instruction
    op: str
    space: str
    size: int
    scope: str = ""
    read_only: bool = False
    result: int = -1

    @property
    def strong(self) -> bool:
        """Whether it is strong among the threads of a block."""
        return self.scope != ""

    @property
    def device_wide(self) -> bool:
        """Whether it is strong between blocks."""
        return device_wide(self.scope)


def device_wide(scope: str) -> bool:
    """Whether a scope has several blocks; a cluster has one here."""
    return scope in ("gl", "gpu", "sys")


@dataclass
class Code:
    """The translation of one instruction.

    Attributes:
        lines: Python statements.
        reads: Numbers of the registers that it reads.
        writes: Numbers of the registers that it writes.
        pure: Whether it only computes registers, so that a guard may select its result.
        collective: Name of the variable part that says which lanes must come together: ``"warp"`` where all live lanes
            of the warp must, a register expression where a member mask names them, None for the rest.
        pipe: The hardware pipe that it is counted for.
    """

    lines: list[str] = field(default_factory=list)
    reads: list[int] = field(default_factory=list)
    writes: list[int] = field(default_factory=list)
    pure: bool = True
    collective: str | None = None
    pipe: str = "alu"


class Names:
    """What the instructions of one program share.

    Attributes:
        target: Number of the sm_ version.
        registers: PTX type by name.
        windows: What makes an address of a state space generic.
        number: Position of a register in the register file.
        symbols: State space and address of variables.
        constants: Values by the names that generated code has for them.
        sites: Memory instructions.
        fences: Whether an instruction is a fence, or orders memory as one does.
        partial_order: Whether warps can be ordered by other things than barriers of their whole block.
    """

    def __init__(
        self, registers: dict[str, str], symbols: dict[str, tuple[str, int]], windows: dict[str, int], target: int
    ) -> None:
        self.target = target
        self.registers = registers
        self.windows = windows
        self.number = {name: position for position, name in enumerate(registers)}
        self.symbols = symbols
        self.constants: dict[str, object] = {}
        self.sites: list[Site] = []
        self.fences = False
        self.partial_order = False
        self._constant_names: dict[tuple[str, bytes], str] = {}

    def constant(self, value: Any) -> str:
        """Names a NumPy scalar."""
        key = (value.dtype.str, value.tobytes())
        name = self._constant_names.get(key)
        if name is None:
            name = self._constant_names[key] = f"k{len(self._constant_names)}"
            self.constants[name] = value
        return name


Handler = Callable[["Emit"], None]
HANDLERS: dict[str, Handler] = {}
FLOAT_HANDLERS: dict[str, Handler] = {}
"""Of the opcodes that are another instruction where their type is a floating-point one."""


def op(*names: str) -> Callable[[Handler], Handler]:
    """Registers the handler of opcodes."""
    return _register(HANDLERS, names)


def float_op(*names: str) -> Callable[[Handler], Handler]:
    """Registers the handler of opcodes that are integer instructions as well, for floating-point types."""
    return _register(FLOAT_HANDLERS, names)


def _register(table: dict[str, Handler], names: tuple[str, ...]) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        table.update(dict.fromkeys(names, handler))
        return handler

    return register


class Emit:
    """Writes the translation of one instruction."""

    def __init__(self, instruction: Instruction, names: Names) -> None:
        self.instruction = instruction
        self.names = names
        self.op, *self.mods = instruction.parts
        self.operands = list(instruction.operands)
        self.code = Code()
        self._temporaries = 0

    # ---- modifiers

    def error(self, reason: str, kind: str = "syntax") -> EmulatorError:
        """An error at this instruction."""
        return EmulatorError(reason, kind=kind, place=Place(line=self.instruction.line))

    def unsupported(self, what: str) -> NoReturn:
        """Raises the error of something that is not implemented."""
        raise self.error(f"{what} of {self.instruction.opcode} is not implemented", "unsupported")

    def flag(self, name: str) -> bool:
        """Takes an optional modifier."""
        if name in self.mods:
            self.mods.remove(name)
            return True
        return False

    def one_of(self, *choices: str, default: str | None = None) -> str:
        """Takes one modifier out of a set; without a default it must be there."""
        for mod in self.mods:
            if mod in choices:
                self.mods.remove(mod)
                return mod
        if default is None:
            self.unsupported(f"leaving out {' or '.join('.' + choice for choice in choices)}")
        return default

    def type(self, *allowed: str) -> str:
        """Takes the last modifier, which must be one of the types."""
        if not self.mods or self.mods[-1] not in allowed:
            self.unsupported(f"type .{self.mods[-1] if self.mods else ''}")
        return self.mods.pop()

    def needs(self, target: int) -> None:
        """States which sm_ version the instruction came with."""
        if self.names.target < target:
            raise self.error(f"{self.instruction.opcode} needs sm_{target}, not sm_{self.names.target}", "unsupported")

    def finish(self, count: int | tuple[int, ...]) -> None:
        """States that all modifiers were taken, and how many operands there must be."""
        if self.mods:
            self.unsupported(f"modifier .{self.mods[0]}")
        counts = (count,) if isinstance(count, int) else count
        if len(self.operands) not in counts:
            raise self.error(
                f"{self.instruction.opcode} takes {' or '.join(map(str, counts))} operands, not {len(self.operands)}"
            )

    # ---- operands

    def misfit(self, operand: Operand) -> EmulatorError:
        """The error of an operand of the wrong kind or size."""
        return self.error(f"{type(operand).__name__.lower()} operand does not fit {self.instruction.opcode}")

    def bad_operand(self, operand: Operand) -> NoReturn:
        """Raises `misfit`."""
        raise self.misfit(operand)

    def temporary(self) -> str:
        """A fresh local name."""
        self._temporaries += 1
        return f"t{self._temporaries}"

    def line(self, text: str) -> None:
        """Adds a statement."""
        self.code.lines.append(text)

    def read(self, reg: Reg) -> str:
        """Names a register that is read."""
        number = self.names.number.get(reg.name)
        if number is None:
            self.bad_operand(reg)
        self.code.reads.append(number)
        return f"v{number}"

    def source(self, operand: Operand, kind: str) -> str:
        """An expression for a source operand in the NumPy type of a PTX type.

        A register may be wider than the type, as the ISA allows for cvt and st; its low bits are taken then.
        """
        wanted = numpy_type(kind)
        match operand:
            case Reg(name) if name in self.names.number:
                expression = self.read(operand)
                declared = self.names.registers[name]
                have = storage(declared)
                if SIZES[declared] < SIZES[kind] or (kind == "pred") != (declared == "pred"):
                    self.bad_operand(operand)
                if SIZES[declared] > SIZES[kind]:
                    bits = f"u{SIZES[declared]}"
                    expression = expression if have == bits else f"{expression}.view({bits})"
                    have = f"u{SIZES[kind]}"
                    expression = f"{expression}.astype({have})"
                return expression if have == wanted else f"{expression}.view({wanted})"
            case Reg(name):
                expression, size = self.special(name)
                if size != SIZES[kind]:
                    expression = f"{expression}.astype(u{SIZES[kind]})"
                return expression if wanted == f"u{SIZES[kind]}" else f"{expression}.view({wanted})"
            case Not(reg) if kind == "pred":
                return f"~{self.read(reg)}"
            case Int(value):
                return self.integer(value, wanted)
            case Float(bits, size):
                return self.constant(self._float(bits, size, wanted))
            case Symbol():
                return self.symbol_address(operand, wanted)
        raise self.misfit(operand)

    def integer(self, value: int, wanted: str) -> str:
        """A named integer constant, wrapped to its type."""
        dtype = np.dtype(wanted)
        if dtype.kind == "f":
            return self.constant(np.array(value, dtype))
        if dtype.kind == "b":
            return self.constant(np.array(value, np.bool_))
        wrapped = value & ((1 << dtype.itemsize * 8) - 1)
        return self.constant(np.array(wrapped, f"u{dtype.itemsize}").view(dtype))

    def constant(self, value: NDArray[Any]) -> str:
        """Names the scalar in an array without dimensions."""
        return self.names.constant(np.asarray(value)[()])

    def _float(self, bits: int, size: int, wanted: str) -> NDArray[Any]:
        literal = np.array(bits, f"u{size}").view(f"f{size}")
        dtype = np.dtype(wanted)
        if dtype.kind == "f":
            return literal if dtype.itemsize == size else literal.astype(dtype)
        if dtype.itemsize == size:
            return literal.view(dtype)
        if dtype.itemsize == 4 and size == 8:
            return literal.astype("f4").view(dtype)
        raise self.misfit(Float(bits, size))

    def symbol(self, name: str) -> tuple[str, int]:
        """State space and address of a variable."""
        if name not in self.names.symbols:
            raise self.error(f"{name} is not defined in this module")
        return self.names.symbols[name]

    def symbol_address(self, operand: Symbol, wanted: str, add: int = 0) -> str:
        """The address of a variable, a scalar; those in global memory are known at the launch only."""
        space, address = self.symbol(operand.name)
        if space == "global":
            if np.dtype(wanted).itemsize != 8:
                raise self.misfit(operand)
            return f"m.symbol({operand.name!r}, {operand.offset + add}, {wanted})"
        return self.integer(address + operand.offset + add, wanted)

    def special(self, name: str) -> tuple[str, int]:
        """Expression and bytes of a special register."""
        if name in SPECIAL_64:
            return f"m.special(g, {name!r})", 8
        if name in SPECIAL_32:
            return f"m.special(g, {name!r})", 4
        raise self.error(f"{name} is neither declared nor a special register that is implemented", "unsupported")

    def many(self, operand: Operand, kind: str) -> list[str]:
        """The expressions of a vector operand, or of a scalar taken as a vector of one."""
        items = operand.items if isinstance(operand, Vector) else (operand,)
        return [self.source(item, kind) for item in items]

    def literal(self, position: int) -> int:
        """An operand that must be an integer literal."""
        operand = self.operands[position]
        if not isinstance(operand, Int):
            self.bad_operand(operand)
        return operand.value

    # ---- results

    def result(self, operand: Operand, expression: str, kind: str, extend: bool = False) -> None:
        """Assigns an expression, of the NumPy type of a PTX type, to a destination register.

        Args:
            operand: The destination.
            expression: The value.
            kind: Its type.
            extend: Whether a wider destination is allowed; it is then sign- or zero-extended.
        """
        if not isinstance(operand, Reg):
            self.bad_operand(operand)
        if operand.name == "_":
            return
        if operand.name not in self.names.number:
            self.bad_operand(operand)
        declared = self.names.registers[operand.name]
        have, wanted = numpy_type(kind), storage(declared)
        if SIZES[declared] != SIZES[kind] or (kind == "pred") != (declared == "pred"):
            if not extend or SIZES[declared] < SIZES[kind]:
                self.bad_operand(operand)
            have = f"{have[0] if have[0] == 'i' else 'u'}{SIZES[declared]}"
            expression = f"{_view(expression, numpy_type(kind), kind)}.astype({have})"
        if have != wanted:
            expression = f"({expression}).view({wanted})"
        number = self.names.number[operand.name]
        guard = self.instruction.guard
        if guard is not None:
            expression = f"where({self.source(guard, 'pred')}, {expression}, v{number})"
            self.code.reads.append(number)
        elif not self.code.reads and "(g" not in expression:  # the operands were all constants
            expression = f"g.fill({expression})"
        self.line(f"v{number} = {expression}")
        self.code.writes.append(number)

    def pair(self, operand: Operand) -> tuple[Operand, Operand]:
        """Splits ``d|p``; the second is the sink where there is only one."""
        return (operand.first, operand.second) if isinstance(operand, Pair) else (operand, Reg("_"))

    # ---- effects

    def effect(self, pipe: str, collective: str | None = None) -> None:
        """States that the instruction does more than compute registers."""
        self.code.pure = False
        self.code.pipe = pipe
        self.code.collective = collective

    def site(self, op: str, space: str, size: int, scope: str = "", read_only: bool = False, result: int = -1) -> str:
        """Registers a memory site, and names it."""
        site = Site(len(self.names.sites), self.instruction, op, space, size, scope, read_only, result)
        self.names.sites.append(site)
        name = f"s{site.index}"
        self.names.constants[name] = site
        return name

    def address(self, operand: Operand, space: str) -> tuple[str, str]:
        """State space and expression (a 64-bit integer array, or a scalar) of ``[...]``."""
        if not isinstance(operand, Address):
            self.bad_operand(operand)
        base, offset = operand.base, operand.offset
        if isinstance(base, Symbol):
            found, _ = self.symbol(base.name)
            if space in ("generic", "param") and found != "param":
                space = found
            return space, f"g.fill({self.symbol_address(base, 'i8', offset)})"
        if base is None:
            return space, f"g.fill({self.integer(offset, 'i8')})"
        size = SIZES[self.names.registers[base.name]]
        if size not in (4, 8):
            self.bad_operand(base)
        expression = self.source(base, f"u{size * 8}")
        expression = f"{expression}.view(i8)" if size == 8 else f"{expression}.astype(i8)"
        return space, expression if not offset else f"{expression} + {self.integer(offset, 'i8')}"


def here(e: Emit) -> str:
    """Names the instruction itself, for the report of an error."""
    name = f"i{e.instruction.line}"
    e.names.constants[name] = e.instruction
    return name


def _view(expression: str, have: str, kind: str) -> str:
    """The bits of a float expression, so that it can be extended as an integer."""
    return f"({expression}).view(u{SIZES[kind]})" if have[0] == "f" else f"({expression})"


_AXES = [f"%{base}.{axis}" for base in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"]
SPECIAL_32 = {
    *_AXES,
    *("%laneid", "%warpid", "%nwarpid", "%smid", "%nsmid", "%gridid"),
    *(f"%lanemask_{order}" for order in ("eq", "le", "lt", "ge", "gt")),
    *("%clock", "%clock_hi", "%dynamic_smem_size", "%total_smem_size"),
}
SPECIAL_64 = {"%clock64", "%globaltimer"}


def translate(instruction: Instruction, names: Names) -> Code:
    """Translates one instruction.

    Raises:
        EmulatorError: The opcode, a modifier or a type is not implemented, or an operand does not fit.
    """
    emit = Emit(instruction, names)
    handler = HANDLERS.get(emit.op)
    if emit.mods and emit.mods[-1] in FLOAT:
        handler = FLOAT_HANDLERS.get(emit.op, handler)
    if handler is None:
        raise EmulatorError(
            f"instruction {instruction.opcode} is not implemented",
            kind="unsupported",
            place=Place(line=instruction.line),
        )
    try:
        handler(emit)
    except IndexError:  # handlers read operands before `finish` counts them
        raise emit.error(f"{instruction.opcode} has too few operands") from None
    return emit.code

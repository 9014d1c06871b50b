"""A kernel made ready to run: calls inlined, variables laid out, registers numbered, control flow resolved."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

from .errors import EmulatorError, Place
from .ir import (
    SIZES,
    Address,
    Function,
    Instruction,
    Int,
    Label,
    Module,
    Not,
    Operand,
    Pair,
    Reg,
    Symbol,
    Tuple,
    Variable,
    Vector,
)
from .isa import Code, Names, translate
from .isa.emit import HANDLERS, Site
from .isa.integer import CARRY
from .isa.kinds import storage

SHARED_WINDOW = 1 << 48
LOCAL_WINDOW = 1 << 49
WINDOWS = {"global": 0, "const": 0, "shared": SHARED_WINDOW, "local": LOCAL_WINDOW}
"""What is added to an address of a state space to make it generic."""

DYNAMIC_ALIGNMENT = 16
"""Alignment of dynamic shared memory behind static arrays: what the CUDA runtime gives."""
_SHARED_HOLE = 128
"""Bytes between variables of shared memory, so that an index past the end of one does not reach the next."""


@dataclass(frozen=True)
class Limits:
    """What a target allows one block (CUDA programming guide, "Technical Specifications per Compute Capability").

    Attributes:
        threads: Threads.
        shared: Bytes of shared memory, opted in.
        reserved: Bytes at the start of shared memory that the system keeps.
    """

    threads: int
    shared: int
    reserved: int


_SHARED_KB = {70: 96, 72: 96, 75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227}


def version(target: str) -> int:
    """The number of a target such as ``sm_80``."""
    return int(target.split("_")[1].rstrip("af"))


def limits(target: str) -> Limits:
    """The limits of a target such as ``sm_80``."""
    number = version(target)
    return Limits(1024, _SHARED_KB.get(number, 48) * 1024, 1024 if number >= 90 else 0)


@dataclass
class Program:
    """A kernel, flattened to one list of instructions.

    Attributes:
        name: Of the entry.
        module: Where it comes from.
        params: Its parameters, with their offsets in the parameter bank.
        code: Instructions with their translations; a position in it is a program counter.
        names: Registers, constants, sites and symbols.
        branches: Program counter of a branch -> its targets.
        leaders: Program counters at which control can arrive.
        static_shared: Where the dynamic part of shared memory starts.
        shared_variables: Name, address and size of the variables before it; there are holes between them.
        shared_used: Bytes that the variables take on the hardware.
        local_size: Bytes of local memory of a thread.
    """

    name: str
    module: Module
    params: list[tuple[Variable, int]]
    instructions: list[Instruction] = field(default_factory=list)
    code: list[Code] = field(default_factory=list)
    names: Names = field(default_factory=lambda: Names({}, {}, WINDOWS, 0))
    branches: dict[int, list[int]] = field(default_factory=dict)
    leaders: list[int] = field(default_factory=list)
    static_shared: int = 0
    shared_variables: list[tuple[str, int, int]] = field(default_factory=list)
    shared_used: int = 0
    local_size: int = 0
    max_threads: int | None = None

    @property
    def sites(self) -> list[Site]:
        """Its memory instructions."""
        return self.names.sites

    @cached_property
    def register_storage(self) -> list[str]:
        """NumPy type of each register."""
        return [storage(kind) for kind in self.names.registers.values()]

    @cached_property
    def read_registers(self) -> set[int]:
        """Registers that some instruction reads."""
        return {number for code in self.code for number in code.reads}

    def symbols_used(self, name: str) -> bool:
        """Whether an instruction, or another variable that may be used, names a variable."""
        return name in self._symbols_used

    @cached_property
    def _symbols_used(self) -> set[str]:
        found: set[str] = set()
        for instruction in self.instructions:
            for operand in instruction.operands:
                base = operand.base if isinstance(operand, Address) else operand
                if isinstance(base, Symbol):
                    found.add(base.name)
        for variable in self.module.variables.values():
            found.update(x.name for x in variable.initial if isinstance(x, Symbol))
        return found

    def place(self, instruction: Instruction) -> Place:
        """Where an instruction stands."""
        source = None
        if instruction.loc is not None and instruction.loc[1]:
            source = f"{self.module.files.get(instruction.loc[0], '?')}:{instruction.loc[1]}"
        return Place(
            readable(self.name),
            line=instruction.line,
            ptx=self.module.statement(instruction.line),
            source=source,
        )


def readable(name: str) -> str:
    """The Python name in a name that Numba mangled: ``_ZN4mine6kernelB2v1...`` is ``mine.kernel``."""
    rest, parts = name.removeprefix("_ZN"), []
    while name.startswith("_ZN") and (number := re.match(r"\d+", rest)):
        end = number.end() + int(number[0])
        parts.append(rest[number.end() : end])
        rest = rest[end:]
    return ".".join(parts) or name


def build(module: Module, entry: str | None) -> Program:
    """Flattens and translates one kernel of a module.

    Raises:
        EmulatorError: There is no such kernel, or it has something that is not implemented.
    """
    kernels = [f for f in module.functions.values() if f.entry and f.defined]
    if entry is None and len(kernels) == 1:
        function = kernels[0]
    else:
        found = [f for f in kernels if f.name == entry]
        if not found:
            names = ", ".join(f.name for f in kernels) or "none"
            what = "name one kernel of the module" if entry is None else f"the module has no kernel {entry!r}"
            raise EmulatorError(f"{what}; it has: {names}", kind="argument")
        function = found[0]
    return _Builder(module, function).program()


@dataclass
class _Scope:
    """One inlined copy of a function."""

    function: Function
    prefix: str
    end: str
    aliases: dict[str, tuple[str, int]] = field(default_factory=dict)

    @cached_property
    def names(self) -> set[str]:
        """Registers, labels and tables that belong to the function itself."""
        function = self.function
        labels = (x.name for x in function.body if isinstance(x, Label))
        formal = (x.name for x in (*function.params, *function.returns) if x.space == "reg")
        return {*function.registers, *labels, *function.tables, *formal}


class _Builder:
    def __init__(self, module: Module, function: Function) -> None:
        self.module = module
        self.function = function
        self.target = limits(module.target)
        self.registers: dict[str, str] = {CARRY: "pred"}
        self.symbols: dict[str, tuple[str, int]] = {}
        self.local = 0
        self.shared = self.target.reserved
        self.shared_used = 0
        self.shared_variables: list[tuple[str, int, int]] = []
        self.copies = 0
        self.labels: dict[str, int] = {}
        self.tables: dict[str, list[str]] = {}
        self.items: list[Instruction] = []
        self.static_shared: dict[str, tuple[str, int]] = {}

    def program(self) -> Program:
        offset = 0
        params = []
        for param in self.function.params:
            offset = -(-offset // param.align) * param.align
            params.append((param, offset))
            self.symbols[param.name] = ("param", offset)
            offset += param.size
        self._module_variables()
        self._flatten(_Scope(self.function, "", "$exit"), ())
        self.labels.setdefault("$exit", len(self.items))
        names = Names(self.registers, self.symbols, WINDOWS, version(self.module.target))
        program = Program(self.function.name, self.module, params, self.items, names=names)
        for item in self.items:
            try:
                program.code.append(translate(item, names))
            except EmulatorError as error:
                raise EmulatorError(error.reason, kind=error.kind, place=program.place(item)) from None
        program.static_shared = self.shared
        program.shared_variables = self.shared_variables
        program.shared_used = self.shared_used
        program.local_size = -(-self.local // 16) * 16
        program.max_threads = self.function.max_threads
        self._control_flow(program)
        return program

    # ---- layout

    def _module_variables(self) -> None:
        dynamic = []
        for variable in self.module.variables.values():
            if variable.space == "shared" and (variable.external or variable.size == 0):
                dynamic.append(variable)
            elif variable.space == "shared":
                self.symbols[variable.name] = ("shared", self._place_shared(variable))
            else:
                self.symbols[variable.name] = ("global", 0)
        for function in self.module.functions.values():
            for variable in function.variables.values():
                if variable.space == "shared":
                    place = ("shared", self._place_shared(variable))
                    self.static_shared[f"{function.name}/{variable.name}"] = place
        if self.shared_variables:
            self.shared += _SHARED_HOLE
        align = max(DYNAMIC_ALIGNMENT, *(v.align for v in dynamic), 1)
        self.shared = -(-self.shared // align) * align
        for variable in dynamic:
            self.symbols[variable.name] = ("shared", self.shared)

    def _place_shared(self, variable: Variable) -> int:
        """The next place that has the declared alignment, and no more than it, so that relying on more shows."""
        align = variable.align
        hole = _SHARED_HOLE if self.shared_variables else 0
        at = -(-(self.shared + hole) // align) * align
        if at % (2 * align) == 0:
            at += align
        self.shared = at + variable.size
        self.shared_used = -(-self.shared_used // align) * align + variable.size
        self.shared_variables.append((variable.name, at, variable.size))
        return at

    def _place_local(self, variable: Variable) -> int:
        at = -(-self.local // variable.align) * variable.align
        self.local = at + variable.size
        return at

    # ---- inlining

    def _flatten(self, scope: _Scope, active: tuple[str, ...]) -> None:
        function, prefix = scope.function, scope.prefix
        for name, kind in function.registers.items():
            self.registers[prefix + name] = kind
        for variable in function.variables.values():
            if variable.space == "shared":
                place = self.static_shared[f"{function.name}/{variable.name}"]
            elif variable.space in ("local", "param"):
                place = ("local", self._place_local(variable))
            else:
                place = ("global", 0)
                self.module.variables.setdefault(variable.name, variable)
            self.symbols[prefix + variable.name] = place
        for name, place in scope.aliases.items():
            self.symbols[prefix + name] = place
        for name, labels in function.tables.items():
            self.tables[prefix + name] = [prefix + label for label in labels]
        for item in function.body:
            if isinstance(item, Label):
                self.labels[prefix + item.name] = len(self.items)
                continue
            instruction = replace(
                item,
                operands=tuple(self._rename(x, scope) for x in item.operands),
                guard=self._guard(item.guard, prefix),
            )
            self._add(instruction, scope, active)
        self.labels[scope.end] = len(self.items)

    def _add(self, instruction: Instruction, scope: _Scope, active: tuple[str, ...]) -> None:
        opcode = instruction.parts[0]
        if opcode == "ret" and scope.prefix:
            jump = replace(instruction, opcode="bra", operands=(Symbol(scope.end),))
            self.items.append(jump)
        elif opcode in ("bra", "ret", "exit") or instruction.guard is None or _pure(instruction):
            if opcode == "call":
                self._call(instruction, scope, active)
            else:
                self.items.append(instruction)
        else:  # a guarded effect is a branch around it
            self.copies += 1
            label = f"$skip{self.copies}"
            guard = instruction.guard
            inverse = guard.reg if isinstance(guard, Not) else Not(guard)
            self.items.append(replace(instruction, opcode="bra", operands=(Symbol(label),), guard=inverse))
            self._add(replace(instruction, guard=None), scope, active)
            self.labels[label] = len(self.items)

    def _call(self, instruction: Instruction, scope: _Scope, active: tuple[str, ...]) -> None:
        operands = list(instruction.operands)
        outputs, target, inputs = _call_operands(operands)
        name = target.name.removeprefix(scope.prefix) if isinstance(target, Symbol) else ""
        function = self.module.functions.get(name)
        place = Place(readable(self.function.name), line=instruction.line)
        if function is None or not function.defined or operands:
            raise EmulatorError(
                f"call of {name or 'a function pointer'}, which is not defined in this module",
                kind="unsupported",
                place=place,
            )
        if name in active:
            raise EmulatorError(f"recursive call of {name} is not implemented", kind="unsupported", place=place)
        if len(inputs) != len(function.params) or len(outputs) != len(function.returns):
            raise EmulatorError(f"call of {name} with the wrong number of arguments", kind="syntax", place=place)
        self.copies += 1
        inner = _Scope(function, f"{name}#{self.copies}/", f"$return{self.copies}")
        copies_back = []
        for formal, actual in zip((*function.params, *function.returns), (*inputs, *outputs), strict=True):
            if formal.space == "param":
                if not isinstance(actual, Symbol):
                    raise EmulatorError(f"argument {formal.name} of {name} is no variable", kind="syntax", place=place)
                inner.aliases[formal.name] = self.symbols[actual.name]
                continue
            register = Reg(inner.prefix + formal.name)
            self.registers[register.name] = formal.type
            kind = "pred" if formal.type == "pred" else f"b{SIZES[formal.type] * 8}"
            move = replace(instruction, opcode=f"mov.{kind}")
            if formal in function.returns:
                copies_back.append(replace(move, operands=(actual, register)))
            else:
                self.items.append(replace(move, operands=(register, actual)))
        self._flatten(inner, (*active, name))
        self.items.extend(copies_back)

    def _guard(self, guard: Reg | Not | None, prefix: str) -> Reg | Not | None:
        if isinstance(guard, Not):
            return Not(Reg(prefix + guard.reg.name))
        return None if guard is None else Reg(prefix + guard.name)

    def _rename(self, operand: Operand, scope: _Scope) -> Operand:
        prefix = scope.prefix
        if not prefix:
            return operand
        match operand:
            case Reg(name):
                return Reg(prefix + name) if name in scope.names else operand
            case Not(reg):
                return Not(Reg(prefix + reg.name))
            case Pair(first, second):
                return Pair(Reg(prefix + first.name), Reg(prefix + second.name))
            case Vector(items):
                return Vector(tuple(self._rename(x, scope) for x in items))
            case Tuple(items):
                return Tuple(tuple(self._rename(x, scope) for x in items))
            case Address(base, offset):
                renamed = self._rename(base, scope) if base is not None else None
                assert renamed is None or isinstance(renamed, Reg | Symbol)
                return Address(renamed, offset)
            case Symbol(name, offset):
                mine = prefix + name in self.symbols or name in scope.names
                return Symbol(prefix + name, offset) if mine else operand
            case Int():
                return operand
        return operand

    # ---- control flow

    def _control_flow(self, program: Program) -> None:
        leaders = {0, *self.labels.values()}
        for position, item in enumerate(self.items):
            opcode = item.parts[0]
            if opcode in ("bra", "brx"):
                program.branches[position] = list(self._targets(item, program))
            if opcode in ("bra", "brx", "ret", "exit", "trap") or is_barrier(item):
                leaders.add(position + 1)
            if is_barrier(item):
                leaders.add(position)
        program.leaders = sorted(x for x in leaders if x <= len(self.items))

    def _targets(self, item: Instruction, program: Program) -> Iterator[int]:
        target = item.operands[-1]
        assert isinstance(target, Symbol)
        names = [target.name] if item.parts[0] == "bra" else self.tables.get(target.name, [target.name])
        for name in names:
            if name not in self.labels:
                raise EmulatorError(f"label {name} is not defined", kind="syntax", place=program.place(item))
            yield self.labels[name]


def _call_operands(operands: list[Operand]) -> tuple[tuple[Operand, ...], Operand, tuple[Operand, ...]]:
    """Takes results, function and arguments off the operands of a call."""
    first = operands.pop(0)
    outputs: tuple[Operand, ...] = ()
    if isinstance(first, Tuple):
        outputs, first = first.items, operands.pop(0)
    inputs: tuple[Operand, ...] = ()
    if operands and isinstance(operands[0], Tuple):
        inputs = operands[0].items
        operands.pop(0)
    return outputs, first, inputs


def is_barrier(instruction: Instruction) -> bool:
    """Whether an instruction waits for other warps."""
    return instruction.parts[0] in ("bar", "barrier") and instruction.parts[1] != "warp"


def _pure(instruction: Instruction) -> bool:
    """Whether an instruction only computes registers, so that its guard can select the result."""
    handler = HANDLERS.get(instruction.parts[0])
    if handler is None or "cc" in instruction.parts or instruction.parts[0] in ("addc", "subc", "madc"):
        return handler is None
    chapter = handler.__module__.rsplit(".", 1)[1]
    vector = instruction.operands and isinstance(instruction.operands[0], Vector)
    return chapter in ("integer", "floating", "convert", "data") and not vector
